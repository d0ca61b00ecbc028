"""The peers' own benchmarks: each protocol of `protocols/`, by its library's settings and metric, on both libraries.

    UPWEIGHT_DATA=… python benchmarks/peers/run_protocols.py [PROTOCOL …]    # ten minutes; goes on where it was stopped

Writes results/peers_protocols.json; `scripts/docs pages` makes a section of docs/peers.md of it. Every step runs in the
environment that it names, one thread; finished steps lie in ~/.cache/upweight-peers/protocols ($XDG_CACHE_HOME): remove
a folder there to have its protocol measured again. Needs xlrd where it runs.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import environments
from table import LIBRARIES

HERE = Path(__file__).parent
RESULT = HERE.parent / "results" / "peers_protocols.json"
NAMES = ("dattri_mnist", "kronfluence_concrete", "pyinfluence_removal")
THREADS = 1


def protocol(name: str) -> ModuleType:
    """protocols/NAME.py, which imports its library only in the steps that need it."""
    sys.path.insert(0, str(HERE / "protocols"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(HERE / "protocols"))


def measured(name: str) -> dict[str, Any]:
    """The table of a protocol, with what it is."""
    module, folder = protocol(name), environments.cache() / "protocols" / name
    folder.mkdir(parents=True, exist_ok=True)
    for library, step in module.STEPS:
        if not (folder / f"{step}.done").exists():
            _run(name, library, step, folder)
    version = next(one.version for one in LIBRARIES if one.name == module.LIBRARY)
    found = {"title": module.TITLE, "library": module.LIBRARY, "version": version}
    found |= {"documented": module.DOCUMENTED, "smaller": module.SMALLER}
    note = folder / "note.txt"
    return found | {
        "note": note.read_text() if note.exists() else "",
        **json.loads((folder / "table.json").read_text()),
    }


def _run(name: str, library: str, step: str, folder: Path) -> None:
    """A step in its library's environment, or in this one."""
    if library:
        environments.make(library)
        if failure := environments.failure(library):
            message = f"{library}: {failure}"
            raise SystemExit(message)
    interpreter = str(environments.interpreter(library)) if library else sys.executable
    source = str(HERE.parents[1] / "src") if library == "upweight" else ""
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""}
    print(f"{name}: {step}", flush=True)
    script = str(HERE / "protocols" / f"{name}.py")
    with (folder / f"{step}.log").open("w") as log:
        done = subprocess.run([interpreter, script, step, str(folder)], stdout=log, stderr=log, env=environment)
    if done.returncode:
        lines = (folder / f"{step}.log").read_text().strip().splitlines()
        message = f"{name}, {step}: {lines[-1] if lines else done.returncode} (see {folder / step}.log)"
        raise SystemExit(message)
    (folder / f"{step}.done").touch()


def main() -> None:
    """Run what is asked for, and write what is there."""
    kept = json.loads(RESULT.read_text())["protocols"] if RESULT.exists() else {}
    for name in sys.argv[1:] or NAMES:
        kept[name] = measured(name)
    report = {
        "settings": {"threads": THREADS},
        "protocols": {name: kept[name] for name in NAMES if name in kept},
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
        },
    }
    RESULT.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
