"""traker: one model, one projection, its defaults (2,048 dimensions, no regularisation)."""

from torch.utils.data import DataLoader
from trak import TRAKer


def scores(work):
    model, count = work.module(), len(work.rows)
    traker = TRAKer(
        model=model, task="image_classification", train_set_size=count, device="cpu", use_half_precision=False
    )
    traker.load_checkpoint(model.state_dict(), model_id=0)
    for batch in DataLoader(work.rows, batch_size=100):
        traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    traker.start_scoring_checkpoint("run", model.state_dict(), model_id=0, num_targets=len(work.queries))
    for batch in DataLoader(work.queries, batch_size=len(work.queries)):
        traker.score(batch=batch, num_samples=len(batch[0]))
    return traker.finalize_scores("run").T


METHODS = {"TRAK": scores}
