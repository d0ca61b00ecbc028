"""How every figure is run, written, read and drawn: `python -m paper.NAME [--draw]`.

A figure's file has `compute(**settings) → {"settings", "numbers", "arrays"}` and `draw(result) → Figure`. `run` writes
paper/results/NAME.json and NAME.png; `--draw` only draws again from the JSON. Settings other than the paper's are
options of the command line; what they give is printed, and written only into a folder named by `--out`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import sklearn
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import upweight as uw
from upweight.show.plots import BLUE, GREY, INK, ORANGE, note, style

RESULTS = Path(__file__).parent / "results"


def run(name: str, compute: Callable[..., dict[str, Any]], draw: Callable[[dict[str, Any]], Figure]) -> None:
    """What `python -m paper.NAME` does."""
    parser = argparse.ArgumentParser(prog=f"python -m paper.{name}", description=inspect.getdoc(compute))
    parser.add_argument("--draw", action="store_true", help="draw again from the JSON, compute nothing")
    parser.add_argument("--out", type=Path, help="folder for NAME.json and NAME.png instead of paper/results")
    defaults = {key: value.default for key, value in inspect.signature(compute).parameters.items()}
    for key, default in defaults.items():
        kind: dict[str, Any] = {"action": "store_true"} if isinstance(default, bool) else {"type": type(default)}
        parser.add_argument(f"--{key.replace('_', '-')}", default=default, **kind)
    given = vars(parser.parse_args())
    only_draw, out = given.pop("draw"), given.pop("out")
    if only_draw:
        result = read(name, out or RESULTS)
    else:
        result = timed(compute, **given)
        print(json.dumps({key: value for key, value in result.items() if key != "arrays"}, indent=1))
        if out is None and given != defaults:
            return
        write(name, result, out or RESULTS)
    file = (out or RESULTS) / f"{name}.png"
    draw(result).savefig(file, dpi=160, bbox_inches="tight", pad_inches=0.15)
    print(f"drew {file}")


def timed(compute: Callable[..., dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """The result of `compute`, with its seconds, the machine, the versions, and the warnings it gave."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", uw.errors.TheoryWarning)
        result = compute(**settings)
    elapsed = time.perf_counter() - start
    said = [str(entry.message) for entry in caught if issubclass(entry.category, uw.errors.TheoryWarning)]
    return {
        "settings": result["settings"],
        "numbers": {key: _plain(value) for key, value in result["numbers"].items()},
        "warnings": list(dict.fromkeys(said)),
        "seconds": round(elapsed, 1),
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
        },
        "versions": {
            "upweight": uw.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "arrays": {key: _short(value) for key, value in result["arrays"].items()},
    }


def write(name: str, result: dict[str, Any], folder: Path = RESULTS) -> None:
    """NAME.json, with each array on one line."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in result.items() if key != "arrays"}
    lines = ",\n".join(
        f"  {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in result["arrays"].items()
    )
    text = json.dumps(head, indent=1, ensure_ascii=False)[:-2] + ',\n "arrays": {\n' + lines + "\n }\n}\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """What `write` wrote."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def progress_file(name: str, settings: dict[str, Any]) -> Path:
    """Where a long computation keeps what is finished, so that it goes on there after an interruption."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "upweight" / "paper"
    cache.mkdir(parents=True, exist_ok=True)
    return cache / f"{name}-{'-'.join(str(value) for value in settings.values())}.json"


def predicted_against_actual(ax: Axes, predicted: Any, actual: Any, *, color: str = BLUE, equal: bool = True) -> Axes:
    """A dot per removed row, in thousandths of a nat, with the diagonal on which prediction and truth agree."""
    shown = 1e3 * np.asarray(predicted), 1e3 * np.asarray(actual)
    return uw.plots.predicted_against_actual(*shown, ax, color=color, equal=equal)


def canvas(columns: int, width: float, height: float, **settings: Any) -> tuple[Figure, list[Axes]]:
    """A figure with one row of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **settings)[0]
    return figure, list(axes)


def _plain(value: Any) -> int | float:
    return int(value) if isinstance(value, int | np.integer | np.bool_) else float(f"{float(value):.10g}")


def _short(values: Any) -> list[Any]:
    array = np.asarray(values)
    if array.dtype.kind in "iub":
        return array.astype(int).tolist()
    return [float(f"{value:.7g}") for value in array.ravel()] if array.ndim == 1 else [_short(line) for line in array]


__all__ = [
    "BLUE", "GREY", "INK", "ORANGE", "RESULTS", "canvas", "note", "predicted_against_actual", "progress_file", "read",
    "run", "style", "timed", "write",
]  # fmt: skip
