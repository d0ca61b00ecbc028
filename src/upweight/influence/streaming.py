"""Equation 2 for more queries × rows than can be held: every chunk of values is looked at once and dropped.

Queries are solved in blocks, and each block takes one sweep over the rows. What is kept of it does not grow with the
rows: `running` holds it, `Leading` is the answer.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from upweight.data.examples import Examples
from upweight.data.ids import Ids, of_keys
from upweight.errors import UnsupportedModel
from upweight.influence import kept, removal, scoring
from upweight.influence.certificate import Certificate
from upweight.influence.classes import class_of_rows
from upweight.influence.leading import Leading, joined, with_sums
from upweight.influence.running import Belonging, Running
from upweight.influence.scores import called, naming
from upweight.influence.system import System
from upweight.influence.top import TopK, checked_k
from upweight.model import per_row
from upweight.model.chunks import CHUNK
from upweight.model.objective import Objective
from upweight.runs import ranks
from upweight.runs.stopping import asked, stop_here
from upweight.runs.store import SCORES, Store
from upweight.solvers import Solution

_QUERIES = 1024  # whose values of one chunk of rows are held at once
KEPT_EVERY = 5.0  # seconds between two states, at least
SELDOM = 50  # times as long as one takes to be kept, at least
_PASSED, _CHUNKS = "passed", "chunks"


@dataclass(frozen=True)
class _Added:
    """Groups of rows whose values are added up: how many, and their names."""

    count: int
    names: Ids | None


def leading(
    system: System, Xq: Any, yq: Any, measure: Callable[[Any, Any], Tensor] | None, k: int, groups: Any, store: Any
) -> Leading:
    """`Influence.leading`.

    Raises:
        InvalidInput: if k is not between 1 and the number of rows.
        UnsupportedModel: if the solver gives estimates.
    """
    checked_k(k, system.n)
    measured, queries = removal.asked(system, measure, Xq, yq)
    kept.refuse_other_queries(queries, measured.name)
    added, belonging, asked_for = _added(system, groups, k)
    size = min(_QUERIES, removal.block(system, len(queries)))
    single = len(queries) <= size
    parts = [
        _of_block(
            system,
            measured,
            block,
            added,
            Running(len(block), k, belonging),
            store if single else removal.of_block(store, number * size),
            asked_for,
        )
        for number, block in enumerate(queries.blocks(size))
    ]
    return joined(parts)


def _of_block(
    system: System,
    measured: Objective,
    queries: Examples,
    added: Mapping[str, _Added],
    running: Running,
    store: Any,
    asked_for: str,
) -> Leading:
    with kept.opened(system, queries, measured.name, store, values=False) as folder:
        if folder is None:
            found, known = removal.in_chunks(system, measured, queries, None)
            _refuse_estimates(system, known)
            for number, values in found:
                running.add(number * CHUNK, values)
        else:
            known = removal.solved(system, measured, queries, folder)
            _refuse_estimates(system, known)
            _passed(system, known, running, Passed(folder, asked_for))
    certificate = known if isinstance(known, Certificate) else scoring.certificate(system, known)
    return _answer(system, measured, queries, running, added, certificate)


def _passed(system: System, solution: Solution, running: Running, passed: Passed) -> None:
    """All rows pass by that have not yet; scores that the folder holds whole are read."""
    begun, chunks = passed.resume(running), -(-system.n // CHUNK)
    if begun == chunks:
        return
    whole = ranks.first_finds("finished scores", lambda: passed.folder.has(SCORES))
    for number, values in removal.of_rows(system, solution, passed.folder if whole else None, begun):
        running.add(number * CHUNK, values)
        passed.after(running, number + 1, chunks)


class Passed:
    """What is kept in a folder of rows that have passed by: not their values, but what `Running` knows of them.

    It is written when some seconds are over, a fiftieth of the time at most, and when all have passed.

    Args:
        folder: of the scores of the same queries.
        asked_for: a hash of how many rows are kept, and of the groups that are added up.
    """

    def __init__(self, folder: Store, asked_for: str) -> None:
        self.folder, self._name = folder, f"{_PASSED}-{asked_for}"
        self._since, self._wait = time.monotonic(), KEPT_EVERY

    def resume(self, running: Running) -> int:
        """How many chunks have passed already; `running` knows what they left."""

        def kept_there() -> dict[str, NDArray[Any]] | None:
            if not self.folder.has(self._name):
                return None
            arrays, card = self.folder.kept(self._name)
            return {**arrays, _CHUNKS: np.array(card[_CHUNKS])}

        state = ranks.by_first("looking for rows that have passed by", kept_there)
        if state is None:
            return 0
        running.resume(state)
        return int(state[_CHUNKS])

    def after(self, running: Running, chunks: int, of: int) -> None:
        """Keep it after so many chunks, if it is time, or a signal asks to stop here."""
        begun = time.monotonic()
        if not ranks.first():
            stop_here(f"chunk {chunks} of {of}")
            return
        if chunks < of and not asked() and begun - self._since < self._wait:
            return
        self.folder.keep(self._name, running.state(), {_CHUNKS: chunks}, chunks=chunks)
        stop_here(f"chunk {chunks} of {of}")
        self._since = time.monotonic()
        self._wait = max(KEPT_EVERY, SELDOM * (self._since - begun))


def _refuse_estimates(system: System, known: Solution | Certificate) -> None:
    """Raises where values are estimates, whose errors nobody keeps.

    Raises:
        UnsupportedModel: if they are.
    """
    if not isinstance(known, Certificate) and known.replicas is not None:
        message = (
            f"leading keeps no standard errors, and {system.solver} gives estimates that have some. Use Cholesky() or "
            "CG(); or on_loss, whose standard_error says how far each value can be trusted."
        )
        raise UnsupportedModel(message)


def _answer(
    system: System,
    measured: Objective,
    queries: Examples,
    running: Running,
    added: Mapping[str, _Added],
    certificate: Certificate,
) -> Leading:
    rows = system.examples.names
    asked = None if queries.names is None else queries.names.values
    largest, smallest = (
        TopK(found, keys, None if rows is None else rows.values[found], asked)
        for found, keys in (running.largest.found(), running.smallest.found())
    )
    counts, edges = running.spread.found()
    answer = Leading(
        largest,
        replace(smallest, values=np.where(np.isnan(smallest.values), np.nan, -smallest.values)),
        running.total,
        running.squares,
        counts,
        edges,
        "row removed",
        system.n,
        certificate,
        system.objective.measure if measured is system.objective else measured.name,
        per_row.measures(system.sweep.over(measured, queries)),
        axes=naming(rows, queries.names)["axes"],
    )
    ends = np.cumsum([one.count for one in added.values()])
    parts = np.split(running.sums.T, ends[:-1], 1) if len(ends) else []
    sums = {
        name: (values, None if one.names is None else one.names.values, called(one.names))
        for (name, one), values in zip(added.items(), parts, strict=True)
    }
    return with_sums(answer, **sums)


def _added(system: System, groups: Any, k: int) -> tuple[dict[str, _Added], Belonging, str]:
    """The groups that were asked for, and the classes; which rows are in them; and a hash of k and those groups."""
    members = [] if groups is None else system.examples.groups(groups)
    found = {} if groups is None else {"by_group": _Added(len(members), of_keys(groups))}
    asked_for, classes = _hash(k, members), class_of_rows(system)
    if classes is None:
        return found, Belonging(members, system.n), asked_for
    names, numbers = classes
    told = of_keys(dict.fromkeys(names))
    found["by_class"] = _Added(len(names), Ids(told.values, "class"))  # type: ignore[union-attr]
    if groups is None:
        return found, Belonging.by_number(numbers, len(names)), asked_for
    every = [np.flatnonzero(numbers == number) for number in range(len(names))]
    return found, Belonging([*members, *every], system.n), asked_for


def _hash(k: int, members: Sequence[NDArray[np.int64]]) -> str:
    """What tells one k and its groups from others."""
    told = hashlib.sha256(f"{k}".encode())
    for group in members:
        told.update(f" {len(group)} ".encode())
        told.update(np.ascontiguousarray(group, "<i8").data)
    return told.hexdigest()[:16]
