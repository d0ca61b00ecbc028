"""The questions: which training rows are behind an answer, and what would it be without them?

`Influence` (face.py) is what a user holds; each question is a file of functions of what is prepared (`System`).
`Scores` are the answers, with their sign, unit and certificate; `defaults` holds the only automatic choices.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["baselines", "defaults", "diagnostics"])
