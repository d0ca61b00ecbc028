"""Real data by the ordinary public route, checked against known digests; a folder in UPWEIGHT_DATA is used first."""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from upweight.errors import InvalidInput, PathNotFound, first_line
from upweight.store import write_file

__all__ = ["Mnist", "local", "mnist"]

_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_SHA256 = {  # of the uncompressed idx files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@dataclass(frozen=True)
class Mnist:
    """The 60,000 training and 10,000 test digits: images (n, 784) with pixels 0 … 255, labels (n,)."""

    images: UInt8[NDArray[np.uint8], "n 784"]
    labels: UInt8[NDArray[np.uint8], " n"]
    test_images: UInt8[NDArray[np.uint8], "m 784"]
    test_labels: UInt8[NDArray[np.uint8], " m"]


def mnist(folder: str | os.PathLike[str] | None = None) -> Mnist:
    """MNIST (LeCun, Cortes and Burges, 1998), from `folder`, $UPWEIGHT_DATA/mnist, the cache, or the public mirror.

    Args:
        folder: where the four `*.gz` files are; None looks in $UPWEIGHT_DATA/mnist, then in ~/.cache/upweight/mnist,
            and downloads into the latter (11 MB) what is not there.

    Raises:
        PathNotFound: if a named folder lacks a file.
        InvalidInput: if a file's content is not the published one.
    """
    parts = [_idx(_mnist_file(name, folder), name) for name in _MNIST_SHA256]
    return Mnist(parts[0].reshape(-1, 784), parts[1], parts[2].reshape(-1, 784), parts[3])


def local(name: str) -> Path | None:
    """The folder of a data set under $UPWEIGHT_DATA, if there is one."""
    root = os.environ.get("UPWEIGHT_DATA")
    folder = Path(root) / name if root else None
    return folder if folder is not None and folder.is_dir() else None


def _mnist_file(name: str, folder: str | os.PathLike[str] | None) -> Path:
    place = Path(folder) if folder is not None else local("mnist")
    if place is not None:
        file = place / f"{name}.gz"
        if not file.is_file():
            message = (
                f"There is no {name}.gz in {place}. It should hold the four MNIST files; unset UPWEIGHT_DATA to "
                "download them."
            )
            raise PathNotFound(message)
        return file
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "upweight" / "mnist"
    file = cache / f"{name}.gz"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(f"{_MNIST_URL}{name}.gz", timeout=60) as response:
            write_file(file, response.read())
    return file


def _idx(file: Path, name: str) -> NDArray[np.uint8]:
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        message = f"{file} is no gzip archive, or is damaged ({first_line(error)}). Delete it and load again."
        raise InvalidInput(message) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != _MNIST_SHA256[name]:
        message = f"{file} has SHA-256 {digest[:16]}…, not that of the published {name}. Delete it and load again."
        raise InvalidInput(message)
    axes = content[3]
    shape = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes)]
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)
