"""What was minimised, and its derivatives: the objective, and every room that knows autograd or a closed form.

`Objective` is the noun. `calculus` and `linear` give losses, gradients and products with curvature for a batch,
`penalties` those of the penalty. `layers` takes per-example gradients apart by the layers they pass, `routes` finds
which way autograd can take, and `sweep` is the one loop over data: `fold` adds over examples, `emit` writes one line
for each.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["calculus", "losses", "penalties"])
