"""Each library's own environment, made from requirements/NAME.txt: `python benchmarks/peers/environments.py [NAME …]`.

The files list everything at a pinned version, so pip resolves nothing (--no-deps). kronfluence declares torchvision,
which it does not use and which does not import beside torch 2.13: it is left out of its file. An environment that is
there is kept; what pip says when it fails is kept beside it, and a library that is named is tried again. The files are
of Python 3.11 and of torch without CUDA: where pip does not find that, set
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def cache() -> Path:
    """Where environments, workloads and cells lie: outside the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "upweight-peers"


def interpreter(library: str) -> Path:
    return cache() / "environments" / library / "bin" / "python"


def failure(library: str) -> str | None:
    """What pip said, if the environment could not be made."""
    file = cache() / "environments" / f"{library}.error"
    return file.read_text().strip() if file.exists() else None


def make(library: str) -> None:
    """The environment of a library, unless it is there."""
    folder = cache() / "environments" / library
    done, error = folder.with_suffix(".done"), folder.with_suffix(".error")
    if done.exists() or error.exists():
        return
    print(f"{library}: environment", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    told = subprocess.run(
        [*pip, "-r", str(HERE / "requirements" / f"{library}.txt")], capture_output=True, text=True, env=environment
    )
    if told.returncode:
        said = [line.strip() for line in told.stderr.splitlines()]
        lines = [line for line in said if line.lower().startswith(("error", "fatal"))] or said
        error.write_text("pip install -r: " + "; ".join(lines[:2]))
    else:
        done.touch()


def main() -> None:
    """Those that are named, also where they failed before; or all."""
    for name in sys.argv[1:]:
        (cache() / "environments" / f"{name}.error").unlink(missing_ok=True)
    for name in sys.argv[1:] or sorted(file.stem for file in (HERE / "requirements").glob("*.txt")):
        make(name)
        print(f"{name}: {failure(name) or interpreter(name)}")


if __name__ == "__main__":
    main()
