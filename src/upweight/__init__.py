"""Influence functions: which training data made the model say that, and what would it say without them?

The public names and their homes stand in `__init__.pyi`, once. They are loaded when first used, so that
`import upweight` and `upweight --help` stay fast.
"""

from functools import cache
from typing import Any

import lazy_loader

_loaded, _, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in __all__:
        return _loaded(name)
    message = f"module 'upweight' has no attribute {name!r}"
    raise AttributeError(message)


@cache
def _version() -> str:
    """What was installed; the build takes it from the tags of the repository."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("upweight")
    except PackageNotFoundError:  # the source folder alone is on the path
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
