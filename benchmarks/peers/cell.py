"""One cell of the table, in the interpreter of its library: `cell.py LIBRARY METHOD WORKLOAD FOLDER OUT`.

Reads the workload's files in FOLDER, lets `libraries/LIBRARY.py` answer in OUT, and writes there `scores.npy` and
`cell.json`: seconds of the call, peak memory of the process, bytes left on the disk; or the error that stopped it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import time
import traceback
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Work:
    """What an adapter is given: arrays in float32 (or whole numbers), and λ of (C + λI)."""

    name: str
    folder: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "facts.json").read_text())

    @cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        with np.load(self.folder / "data.npz") as data:
            parts = [data[key] for key in ("X", "y", "Xq", "yq")]
        return tuple(part.astype(np.float32) if part.dtype.kind == "f" else part for part in parts)

    @property
    def kind(self) -> str:
        """The targets: numbers, two classes, classes, tokens."""
        return self.facts["kind"]

    @property
    def λ(self) -> float:
        return self.facts["λ"]

    @property
    def l2(self) -> float:
        return self.facts["l2"]

    @cached_property
    def tensors(self) -> tuple[Any, ...]:
        import torch

        return tuple(torch.from_numpy(part) for part in self.arrays)

    @property
    def rows(self) -> Any:
        from torch.utils.data import TensorDataset

        return TensorDataset(*self.tensors[:2])

    @property
    def queries(self) -> Any:
        from torch.utils.data import TensorDataset

        return TensorDataset(*self.tensors[2:])

    def module(self) -> Any:
        import networks

        return networks.loaded(self.name, self.folder)

    def criterion(self) -> Any:
        """criterion(output, target): the mean of the rows' losses."""
        import networks

        return networks.loss_of(self.name)

    def coefficients(self) -> np.ndarray:
        """The weights of a linear model, (outputs, inputs)."""
        with np.load(self.folder / "weights.npz") as weights:
            return weights["0.weight"]


def adapter(library: str) -> Any:
    """libraries/LIBRARY.py, under another name than the package that it calls."""
    file = Path(__file__).parent / "libraries" / f"{library}.py"
    spec = importlib.util.spec_from_file_location("adapter", file)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["adapter"] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def main() -> None:
    library, method, workload, folder, out = sys.argv[1:]
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    work = Work(workload, Path(folder))
    os.chdir(target)
    found: dict[str, Any] = {}
    try:
        methods = adapter(library).METHODS
        found["megabytes_before"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        start, processor = time.perf_counter(), time.process_time()
        scores = np.asarray(methods[method](work), np.float64)
        found["seconds"] = time.perf_counter() - start
        found["processor_seconds"] = time.process_time() - processor
        found["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found["disk_megabytes"] = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 1e6
        np.save(target / "scores.npy", scores)
    except Exception as error:  # whatever stops a library is its cell
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"
    (target / "cell.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
