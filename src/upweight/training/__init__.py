"""Training again, and what its result says: retrainers, models trained side by side, edits, checkpoints, ensembles.

A retrainer is a function (weights, seed) → θ; `trials` trains with it and measures queries afterwards; `predictions`
says what a model answers, in the user's own names.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["minibatch"])
