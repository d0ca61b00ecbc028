"""Indexed data: arrays, frames, Datasets and what they hold, as examples whose row i keeps the number i.

`Examples` is the noun; `arrays` reads what a user passes as numbers, `stored` and `tables` what lies in files; `trees`
walks nested tuples, lists and dicts of tensors; `datasets` downloads what the paper and the recipes use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["datasets"])
