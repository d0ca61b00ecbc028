"""Results to look at: plots in matplotlib and reports as one HTML page."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["plots"])
