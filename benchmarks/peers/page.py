"""docs/peers.md, written from results/peers.json and results/peers_protocols.json. Nothing is measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parents[1] / "results" / "peers.json"
PROTOCOLS = RESULT.with_name("peers_protocols.json")
Report = dict[str, Any]

HEAD = """# The peers, measured

Written by `scripts/docs` from [`benchmarks/results/peers.json`](../benchmarks/results/peers.json), which
[`benchmarks/peers/run.py`](../benchmarks/peers/run.py) measured: {libraries} libraries, {workloads} workloads, the
same weights, rows and queries for all, each library in its own environment and each cell in a process of its own with
{threads} thread and {limit} seconds. The machine ({machine}) was shared with others: seconds are those of the
processor.

Every library is asked for the same numbers: the effect of removing each row on each query, with one λ in (C + λI)⁻¹.
They are compared with a dense solve in float64 that the harness writes out itself (`truth.py`), with nothing of
upweight in it: **r** is Pearson's over all pairs; **slope** that of a line through 0 of their score, turned into ours
by what their documentation says of its unit, on the dense value: 1 is right; **error** the largest one after the best
single scale is granted, as a share of the largest value. A network has two dense answers: methods that approximate
Gauss–Newton or Fisher matrices are compared with that of Gauss–Newton, those that take the Hessian with the
Hessian's.

This is agreement with the system, not with retraining; for that see [the LDS
table](../benchmarks/results/mnist_lds.md) and [language models](recipes/language-models.md#what-to-expect). Settings
are the libraries' documented ones: where a default makes an answer poor, it is the default that is shown. How to come
from each: [coming from](coming-from.md); what surprised on the way: [findings](../findings/README.md).
"""


OWN = """## By their own benchmarks

What three of the libraries measure themselves with, in their own environments and by their own metric, the scores of
upweight beside theirs ([`run_protocols.py`](../benchmarks/peers/run_protocols.py),
[`peers_protocols.json`](../benchmarks/results/peers_protocols.json); one thread).
"""


def page(report: Report, protocols: Report) -> str:
    """The whole page."""
    settings, machine = report["settings"], report["machine"]
    libraries, workloads = report["libraries"], report["workloads"]
    head = HEAD.format(
        libraries=len(libraries),
        workloads=len(workloads),
        threads=settings["threads"],
        limit=settings["limit_seconds"],
        machine=f"{machine['processor']}, {machine['cores']} cores",
    )
    parts = [head, *_at_a_glance(report)]
    for name, facts in workloads.items():
        parts += _workload(report, name, facts)
    parts += [OWN, *(line for one in protocols["protocols"].values() for line in _protocol(one))]
    parts += _libraries(libraries)
    return "\n".join(parts).rstrip() + "\n"


def _at_a_glance(report: Report) -> list[str]:
    """r of every method on every workload."""
    titles = [facts["title"] for facts in report["workloads"].values()]
    out = ["## At a glance", "", "r with the dense answer; – not asked, × stopped.", ""]
    out += ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for library, method in _methods(report):
        cells = [_cell(report, library, method, workload) for workload in report["workloads"]]
        row = [_glance(report, library, method, cell) for cell in cells]
        out.append(f"| {library} {report['libraries'][library]['version']}, {method} | " + " | ".join(row) + " |")
    return [*out, ""]


def _workload(report: Report, name: str, facts: dict[str, Any]) -> list[str]:
    """One workload: every cell."""
    out = [f"## {facts['title']}", "", _facts(facts), ""]
    out += [
        "| library, method | r | slope | error | processor s | peak MB | disk MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for library, method in _methods(report):
        cell = _cell(report, library, method, name)
        label = f"{library}, {method}"
        if "not" in cell:
            continue
        if "error" in cell:
            out.append(f"| {label} | × `{_plain(cell['error'])}` | | | | | |")
            continue
        found = _compared(report, library, method, cell)
        cost = f"{_number(cell['processor_seconds'])} | {cell['megabytes']:.0f} | {_number(cell['disk_megabytes'])} |"
        if found is None:
            rank = cell["spearman_with_self"]
            out.append(f"| {label} | Spearman with self-influence {rank:.2f} | | | {cost}")
        elif "error" in found:
            out.append(f"| {label} | × {found['error']} | | | {cost}")
        else:
            slope = _number(found["slope"]) if found["largest_error"] is not None else "no unit"
            error = found["largest_error_rescaled"]
            out.append(f"| {label} | {_share(found['pearson'])} | {slope} | {_number(error)} | {cost}")
    skipped = [
        (library, method, reason)
        for library, method in _methods(report)
        if (reason := _cell(report, library, method, name).get("not"))
    ]
    if skipped:
        out += ["", "Not asked: " + "; ".join(f"{_of(*pair)} ({reason})" for *pair, reason in skipped) + "."]
    return [*out, ""]


def _protocol(one: dict[str, Any]) -> list[str]:
    """The benchmark of a library, as it documents it; what is smaller here; and the table."""
    out = [f"### {one['title']}", "", f"{one['library']} {one['version']}: {one['documented']}", ""]
    out += [f"Smaller here: {one['smaller']}." + (f" {one['note']}" if one["note"] else ""), ""]
    out += ["| " + " | ".join(one["columns"]) + " |", "|---" * len(one["columns"]) + "|"]
    for row in one["rows"]:
        out.append("| " + " | ".join(_shown(cell) for cell in row) + " |")
    return [*out, ""]


def _shown(cell: object) -> str:
    return "" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else _plain(str(cell))


def _libraries(libraries: dict[str, Any]) -> list[str]:
    """What each library says of its scores, and what it was asked with."""
    out = ["## Sign, unit, settings", ""]
    out += ["| library | sign and unit, as documented | leaves out | lines of its adapter |", "|---|---|---|---|"]
    for name, one in libraries.items():
        file = f"../benchmarks/peers/libraries/{name}.py"
        row = (f"{name} {one['version']}", one["sign_and_unit"], one["leaves_out"], f"[{one['lines_of_code']}]({file})")
        out.append("| " + " | ".join(row) + " |")
    out.append("")
    for name, one in libraries.items():
        out += [f"* {name}, {method}: {settings}" for method, settings in one["methods"].items()]
    return out


def _facts(facts: dict[str, Any]) -> str:
    gradient = facts["gradient_norm"]
    return (
        f"{facts['n']:,} rows, {facts['q']} queries, {facts['p']:,} parameters, λ = {facts['λ']:g}; "
        f"the gradient of R at the weights is {gradient:.1g}."
    )


def _methods(report: Report) -> list[tuple[str, str]]:
    return [(library, method) for library, one in report["libraries"].items() for method in one["methods"]]


def _cell(report: Report, library: str, method: str, workload: str) -> dict[str, Any]:
    return report["cells"][f"{library}/{method}/{workload}"]


def _compared(report: Report, library: str, method: str, cell: dict[str, Any]) -> dict[str, Any] | None:
    """The comparison with the system that the method names, or with the only one there is."""
    both = (report["libraries"][library]["compared_with"][method], "gauss_newton", "hessian")
    return next((cell[name] for name in both if name in cell), None)


def _glance(report: Report, library: str, method: str, cell: dict[str, Any]) -> str:
    if "not" in cell:
        return "–"
    found = None if "error" in cell else _compared(report, library, method, cell)
    if "error" in cell or (found is not None and "error" in found):
        return "×"
    return "rows only" if found is None else _share(found["pearson"])


def _of(library: str, method: str) -> str:
    return f"{library}, {method}"


def _share(r: float) -> str:
    """A correlation, with as many nines as it has."""
    return next((f"{r:.{digits}f}" for digits in (2, 3, 4, 5) if float(f"{r:.{digits}f}") < 1), "1.00000")


def _number(value: float) -> str:
    """Two figures."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("`", "'")


def main() -> None:
    """Write docs/peers.md."""
    target = RESULT.parents[2] / "docs" / "peers.md"
    target.write_text(page(*(json.loads(file.read_text()) for file in (RESULT, PROTOCOLS))))


if __name__ == "__main__":
    main()
