"""pyDVL: DirectInfluence, CgInfluence for all queries at once, and EkfacInfluence with updated diagonal."""

from pydvl.influence.torch import CgInfluence, DirectInfluence, EkfacInfluence
from torch.utils.data import DataLoader


def scores(work, fitted):
    X, y, Xq, yq = work.tensors
    return fitted.fit(DataLoader(work.rows, batch_size=len(X))).influences(Xq, yq, X, y).detach()


METHODS = {
    "direct": lambda work: scores(work, DirectInfluence(work.module(), work.criterion(), work.λ)),
    "block CG": lambda work: scores(
        work, CgInfluence(work.module(), work.criterion(), work.λ, solve_simultaneously=True)
    ),
    "EK-FAC": lambda work: scores(
        work, EkfacInfluence(work.module(), update_diagonal=True, hessian_regularization=work.λ)
    ),
}
