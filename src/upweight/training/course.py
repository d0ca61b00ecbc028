"""The trainings of one question: where they run, and what a folder keeps of them.

A question asks for its parts in an order of its own, and always in the same: the k-th part of the same question is the
same numbers. So a part that the folder has is read, and the question goes on where it had come to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from upweight import __version__
from upweight.data.examples import PROBE_ROWS
from upweight.influence.face import Influence
from upweight.model import calculus, penalties
from upweight.runs import identity, workers
from upweight.runs.progress import bar
from upweight.runs.stopping import stop_here
from upweight.runs.store import Store
from upweight.training.counterfactuals import changed, factors_of, found
from upweight.training.found import Found
from upweight.training.retrainers import bound
from upweight.training.trials import in_words

_ROUNDING = 1e-6  # by which what a hash cannot compare may differ


class Course:
    """The trainings of one question, in the order in which it asks for them; a folder keeps each as soon as it is done.

    Independent trainings go through joblib: one after the other, or on processes, on Dask or on Ray inside of
    `joblib.parallel_config`. The parts of a question that the folder has are read, so the same call goes on where an
    earlier one was stopped, to the same bits.

    Args:
        influence: whose objective and data are trained again.
        store: the folder; None keeps nothing.
        question: what else the numbers depend on, as numbers, texts, lists and functions.
        retrain: the retrainer, where the question does not say it in words: told by its settings, or a digest of code.

    Raises:
        StoreMismatch: if the folder holds the trainings of another question.
        InvalidInput: if the folder cannot be used.
    """

    def __init__(self, influence: Influence, store: Any, question: Mapping[str, Any], retrain: Any = None) -> None:
        self.folder: Store | None = None
        self.next = 0
        if store is not None:
            if "retrain" not in question:
                question = {**question, "retrain": in_words(retrain, bound(retrain, influence))}
            plain = json.loads(json.dumps({**_asked(influence), **question}, default=_plain))
            self.folder = Store(store, plain)
            self.folder.agree("penalty_gradient", penalties.gradient(influence.objective).numpy(), _ROUNDING)
            probe = influence.examples.batch(influence.examples.spread(PROBE_ROWS))
            self.folder.agree("losses", calculus.losses(influence.objective, probe).double().cpu().numpy(), _ROUNDING)

    def agree(self, name: str, array: NDArray[np.float64]) -> None:
        """What the numbers depend on, but a hash cannot compare; kept, or compared to rounding.

        Raises:
            StoreMismatch: if the folder holds another array of this name.
        """
        if self.folder is not None:
            self.folder.agree(name, array, _ROUNDING)

    def numbers(self, compute: Callable[[], Any]) -> NDArray[np.float64]:
        """The next part: some numbers in an array, computed and kept, or read."""
        number, self.next = self.next, self.next + 1
        if self.folder is not None and number in self.folder:
            return self.folder.read(number)
        if self.folder is None:
            return np.asarray(compute(), dtype=np.float64)
        with self.folder:
            values = np.asarray(compute(), dtype=np.float64)
            self.folder.write(number, values)
            stop_here(f"part {number + 1}")
        return values

    def retrained(self, influence: Influence, *, without: Any = None, retrain: Any = None, seed: int = 0) -> Influence:
        """The next part: the influence of the model that training finds, as `upweight.retrained`; θ is kept.

        Raises:
            InvalidInput: as `upweight.retrained`.
        """
        factors = factors_of(influence, without)
        kept = self.numbers(lambda: found(influence, factors, retrain, seed).numbers(influence.objective))
        return changed(influence, factors, Found.read(kept, influence.objective))

    def each(
        self,
        work: workers.Work,
        job: Callable[[int], Any],
        blocks: Sequence[Sequence[int]],
        *,
        label: str,
        unit: str = "training",
        progress: bool | None = None,
    ) -> list[Any]:
        """The next parts, independent of each other: a result for every job, in the order of their numbers.

        Args:
            work: from the jobs of a block to a result for each: numbers in an array, or an exception, which stands in
                its place and is not kept.
            job: makes the job of a number, something small.
            blocks: the numbers 0, 1, … of the jobs that are done together.
            label: what is done, in words.
            unit: what a job is called.
            progress: True or False forces the bar on or off; None shows it on a terminal only.

        Raises:
            WorkerError: if the work cannot be sent to a worker, or a worker ends before its work does.
        """
        results: dict[int, Any] = {}
        first = self.next
        self.next += sum(map(len, blocks))
        if self.folder is not None:
            kept = (number for block in blocks for number in block if first + number in self.folder)
            results = {number: self.folder.read(first + number) for number in kept}
        left = [tuple(block) for block in blocks if not set(block) <= results.keys()]
        sent = ((block, [job(number) for number in block]) for block in left)
        with (
            self.folder or nullcontext(),
            bar(sum(map(len, left)), label, progress, unit=unit, announced=workers.count() == 1) as done,
        ):
            for numbers, values in workers.finished(work, sent, unit):
                for number, value in zip(numbers, values, strict=True):
                    if number not in results and not isinstance(value, Exception) and self.folder is not None:
                        self.folder.write(first + number, value)
                    results.setdefault(number, value)
                done(len(numbers))
                stop_here(f"{unit} {len(results)} of {sum(map(len, blocks))}")
        return [results[number] for block in blocks for number in block]


def _asked(influence: Influence) -> dict[str, Any]:
    """What every training depends on."""
    return {
        "theta": digest(influence.objective.theta.numpy()),
        "data": influence.examples.fingerprint(),
        "targets": _targets(influence),
        "n": influence.n,
        "objective": influence.objective.name,
        "penalty_per_example": influence.objective.folded,
        "versions": f"upweight {__version__}, torch {torch.__version__}",
    }


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's, anything else as a digest of what it does."""
    return value.tolist() if hasattr(value, "tolist") else identity.digest(value)


def digest(array: NDArray[Any]) -> str:
    """A hash of an array's numbers."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _targets(influence: Influence) -> str:
    """A digest of the labels, for the fingerprint of a Dataset looks at a few of its rows only."""
    y = influence.examples.targets() if influence.examples.dataset is not None else None
    return "" if y is None else digest(y.cpu().numpy())
