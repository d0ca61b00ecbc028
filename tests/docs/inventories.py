"""What the site links to elsewhere: a small inventory of each project, kept in docs/inventories, so that no build asks
a network.

    python tests/docs/inventories.py FOLDER

takes what the pages and docstrings name from the whole inventories in FOLDER: python.inv, scikit-learn.inv and
pandas.inv, the objects.inv of Debian's python3-doc, python-sklearn-doc and python-pandas-doc. No package carries those
of NumPy and PyTorch; their few lines stand here.
"""

from __future__ import annotations

import re
import sys
import zlib
from functools import cache
from pathlib import Path

import reference

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "inventories"
SITES = {
    "python": "https://docs.python.org/3/",
    "numpy": "https://numpy.org/doc/stable/",
    "pandas": "https://pandas.pydata.org/docs/",
    "scikit-learn": "https://scikit-learn.org/stable/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}
# The names that annotations and docstrings use for them.
SHORT = {
    "ArrayLike": "numpy.typing.ArrayLike",
    "DataFrame": "pandas.DataFrame",
    "Path": "pathlib.Path",
    "Tensor": "torch.Tensor",
    "np.random.Generator": "numpy.random.Generator",
    "os.PathLike": "os.PathLike",
    "pd.DataFrame": "pandas.DataFrame",
}
_BY_HAND = {
    "numpy": {
        "numpy.random.Generator": "py:class 1 reference/random/generator.html#$ -",
        "numpy.typing.ArrayLike": "py:data 1 reference/typing.html#$ -",
        "numpy.typing.NDArray": "py:data 1 reference/typing.html#$ -",
    },
    "torch": {
        "torch.Tensor": "py:class 1 tensors.html#$ -",
        "torch.dtype": "py:class 1 tensor_attributes.html#$ -",
        "torch.nn.Module": "py:class 1 generated/torch.nn.Module.html#$ -",
        "torch.nn.functional.cross_entropy": "py:function 1 generated/torch.nn.functional.cross_entropy.html#$ -",
        "torch.nn.utils.clip_grad_norm_": "py:function 1 generated/torch.nn.utils.clip_grad_norm_.html#$ -",
        "torch.optim.Adam": "py:class 1 generated/torch.optim.Adam.html#$ -",
        "torch.optim.SGD": "py:class 1 generated/torch.optim.SGD.html#$ -",
    },
}
_KINDS = ("py:class", "py:exception", "py:function", "py:method", "py:data")


def read(file: Path) -> dict[str, str]:
    """The names of an inventory, each with the rest of its line."""
    _, _, _, _, packed = file.read_bytes().split(b"\n", 4)
    lines = (line.split(" ", 1) for line in zlib.decompress(packed).decode().splitlines())
    return {name: rest for name, rest in lines if rest.startswith(_KINDS)}


@cache
def ways() -> dict[str, str]:
    """What the pages and docstrings may call something that is documented elsewhere, to its whole name."""
    whole = {name for project in SITES for name in read(KEPT / f"{project}.inv")}
    return (
        {name.rpartition(".")[2]: name for name in whole if name.startswith("sklearn.")}
        | {name: name for name in whole}
        | SHORT
    )


def wanted(project: str, whole: dict[str, str]) -> dict[str, str]:
    """The lines of the names that docstrings or pages use: classes of scikit-learn by their last part."""
    docstrings = "\n".join(file.read_text() for file in ROOT.glob("src/upweight/**/*.py"))
    pages = "\n".join(file.read_text() for file in [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/[rs]*/*.md")])
    used = set(re.findall(r"`([a-z]\w*\.[\w.]+)(?:\([^`]*\))?`", docstrings)) | set(SHORT.values()) | _bases()
    words = set(re.findall(r"\b[A-Z]\w+", pages)) - set(reference.targets())
    found = used & whole.keys()
    if project == "scikit-learn":
        classes = {name for name, rest in whole.items() if rest.startswith("py:class") and "._" not in name}
        found |= {name for name in classes if name.rpartition(".")[2] in words and ".kernels." not in name}
    return {name: whole[name] for name in sorted(found)}


def _bases() -> set[str]:
    """What upweight's errors are beside UpweightError."""
    errors = [entry.value for entry in reference.entries().values() if entry.kind == "exception"]
    return {base.__name__ for error in errors if isinstance(error, type) for base in error.__bases__}


def write(project: str, lines: dict[str, str]) -> None:
    """docs/inventories/PROJECT.inv, as Sphinx has it."""
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n# The remainder is compressed by zlib.\n"
    body = "".join(f"{name} {rest}\n" for name, rest in lines.items())
    KEPT.mkdir(exist_ok=True)
    (KEPT / f"{project}.inv").write_bytes(head.encode() + zlib.compress(body.encode(), 9))


def main() -> None:
    """Write all of them from the whole ones in a folder."""
    for project in SITES:
        whole = Path(sys.argv[1]) / f"{project}.inv"
        lines = wanted(project, read(whole)) if whole.exists() else _BY_HAND[project]
        write(project, lines)
        print(f"{project}: {len(lines)} names: {', '.join(lines)}")


if __name__ == "__main__":
    main()
