"""How the source is laid out, in figures, for one or more checkouts: python benchmarks/rooms.py NAME=FOLDER …

Files per folder; median and ninetieth percentile of lines; arrows between the top-level rooms, and the files that lie
in a circle of imports (type-only and function-level imports included); lines that stand twice (runs of six or more
equal lines, without blank lines, comments and imports). Writes benchmarks/results/rooms.json.
"""

from __future__ import annotations

import ast
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

RUN = 6


def names(source: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(files: dict[str, Path]) -> dict[str, set[str]]:
    """The files that each file imports; the package itself, whose names are loaded when used, is none of them."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {t if t in files else node.module for t in targets}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
        found[name] = {target for target in found[name] if target in files and target not in {name, "upweight"}}
    found.pop("upweight", None)
    return found


def in_a_circle(graph: dict[str, set[str]]) -> int:
    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += graph[name]
        return seen

    return sum(name in reached(name) for name in list(graph))


def standing_twice(files: dict[str, Path]) -> int:
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, path in files.items():
        lines = [line.strip() for line in path.read_text().splitlines()]
        lines = [line for line in lines if len(line) > 3 and not line.startswith(("#", "import ", "from "))]
        for start in range(len(lines) - RUN + 1):
            places[tuple(lines[start : start + RUN])].append((name, start))
    twice = {
        (name, start + k) for found in places.values() if len(found) > 1 for name, start in found for k in range(RUN)
    }
    return len(twice)


def figures(source: Path) -> dict[str, object]:
    files = names(source)
    graph = arrows(files)
    lengths = sorted(len(path.read_text().splitlines()) for path in files.values() if path.name != "__init__.py")
    rooms = {name: name.split(".")[1] if "." in name else name for name in files}
    between = {(rooms[a], rooms[b]) for a, targets in graph.items() for b in targets if rooms[a] != rooms[b]}
    return {
        "files_per_folder": dict(Counter(str(path.parent.relative_to(source)) for path in files.values())),
        "files": len(files),
        "median_lines": lengths[len(lengths) // 2],
        "ninetieth_percentile_of_lines": lengths[int(0.9 * len(lengths))],
        "files_over_400_lines": sum(length > 400 for length in lengths),
        "rooms_at_the_top": len(set(rooms.values()) - {"upweight"}),
        "arrows_between_rooms": len(between),
        "files_in_a_circle": in_a_circle(graph),
        "lines_that_stand_twice": standing_twice(files),
    }


if __name__ == "__main__":
    report = {}
    for argument in sys.argv[1:] or ["now=src/upweight"]:
        name, _, folder = argument.partition("=")
        report[name] = figures(Path(folder))
    text = json.dumps(report, indent=1)
    (Path(__file__).parent / "results" / "rooms.json").write_text(text + "\n")
    print(text)
