"""Work in blocks, done one after the other or by joblib's workers; the one door to joblib.

    with joblib.parallel_config(backend="loky", n_jobs=4): …      4 processes; "dask" and "ray" as well

Without such a line nothing is sent anywhere. The results have the same bits wherever they are made: a block always
holds the same jobs, and a worker takes the number of threads that the caller has, which sums depend on. The work goes
to each worker once, as bytes that joblib shares where it can; jobs and results are small. Within a process one block
is done at a time, because models and random states are shared there.
"""

from __future__ import annotations

import hashlib
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from upweight.errors import UpweightError, WorkerError, first_line

Block = tuple[tuple[int, ...], Sequence[Any]]  # the numbers of some jobs, and the jobs
Work = Callable[[Sequence[Any]], Sequence[Any]]  # of the jobs of one block: a result for each
_ONE_AT_A_TIME = threading.RLock()
_LOADED: dict[str, Work] = {}  # on a worker: the work that came last, by its digest
_DEEP = 12  # parts of parts that are looked through for what cannot be sent


def finished(work: Work, blocks: Iterable[Block], unit: str = "job") -> Iterator[tuple[tuple[int, ...], Sequence[Any]]]:
    """The numbers and the results of every block, as they end: in order, or on workers as they come.

    Args:
        work: what is done with the jobs of a block.
        blocks: numbers and jobs; made when their turn comes.
        unit: what a job is called.

    Raises:
        WorkerError: if the work cannot be sent to another process, or a worker ends before its work does.
        Exception: what the work raises, with a note that says in which job.
    """
    workers, (backend, _) = count(), _active()
    if workers == 1:
        for numbers, jobs in blocks:
            with _noted(numbers, unit):
                results = work(jobs)
            yield numbers, results
        return
    shipped = (work, "") if getattr(backend, "supports_sharedmem", False) else _packed(work)
    here = _Here.now()
    failed: dict[tuple[int, ...], Exception] = {}  # once there is one no more is sent, and what was sent is awaited
    left = takewhile(lambda _: not failed, blocks)
    calls = ((_done, (*shipped, here, numbers, jobs, unit), {}) for numbers, jobs in left)
    for numbers, results in _returned(calls, backend, workers, unit):
        if isinstance(results, Exception):
            failed[numbers] = results
        else:
            yield numbers, results
    if failed:
        raise failed[min(failed)]


def count() -> int:
    """How many workers there are: what `joblib.parallel_config` says, or 1."""
    backend, wanted = _active()
    return backend.effective_n_jobs(backend.default_n_jobs if wanted is None else wanted)


def _active() -> tuple[Any, int | None]:
    """joblib's backend, and how many workers were asked for."""
    from joblib.parallel import get_active_backend

    return get_active_backend()  # type: ignore[return-value]


def _returned(calls: Iterator[Any], backend: Any, workers: int, unit: str) -> Iterator[Any]:
    """What the workers give back, as it comes; from a backend that does not stream, a round for all workers at a time.

    Raises:
        WorkerError: if joblib gives no more.
    """
    from joblib import Parallel as JoblibParallel

    Parallel: Any = JoblibParallel
    name, done = type(backend).__name__.removesuffix("Backend").removesuffix("Distributed").lower(), 0
    try:
        if backend.supports_return_generator:
            with _closed(Parallel(return_as="generator_unordered", batch_size=1)(calls)) as found:
                for result in found:
                    done += len(result[0])
                    yield result
            return
        with Parallel(batch_size=1) as parallel:
            while some := list(islice(calls, workers)):
                for result in parallel(some):
                    done += len(result[0])
                    yield result
    except (GeneratorExit, UpweightError):
        raise
    except Exception as error:
        message = (
            f"A {name} worker ended before its {unit} did, after {done} {unit}s ({type(error).__name__}: "
            f"{first_line(error)}). Usual reasons: it was killed, often for want of memory, or its machine is gone; "
            f"each of {workers} workers holds a copy of the data. What had finished is in the folder, if store= named "
            "one: make the same call again, with a smaller n_jobs."
        )
        raise WorkerError(message) from error


@contextmanager
def _closed(found: Any) -> Iterator[Any]:
    """A generator of joblib's; what is not done when it is left, as by Ctrl-C, is given up without a warning."""
    try:
        yield found
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found.close()


def _done(shipped: Any, digest: str, here: _Here, numbers: tuple[int, ...], jobs: Sequence[Any], unit: str) -> Any:
    """On a worker: the numbers of a block, and its results or what was raised."""
    from joblib import parallel_config

    with _ONE_AT_A_TIME, parallel_config(backend="sequential"):
        try:
            work = _loaded(shipped, digest) if digest else shipped
            with here.again(), _noted(numbers, unit):
                return numbers, work(jobs)
        except Exception as error:
            error.add_note("On the worker:\n" + "".join(traceback.format_tb(error.__traceback__)).rstrip())
            return numbers, _portable(error)


# ---- the same arithmetic everywhere ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Here:
    """What decides about the last bits of a sum: how many threads share it, and the precision of new tensors."""

    torch_threads: int
    other_threads: Mapping[str, int]
    dtype: torch.dtype

    @classmethod
    def now(cls) -> _Here:
        """Of this thread."""
        from threadpoolctl import threadpool_info

        pools = threadpool_info()
        most = {kind: max(pool["num_threads"] for pool in pools if pool["user_api"] == kind) for kind in _kinds(pools)}
        return cls(torch.get_num_threads(), most, torch.get_default_dtype())

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same in another process, as long as it lasts."""
        from threadpoolctl import threadpool_limits

        before, dtype = torch.get_num_threads(), torch.get_default_dtype()
        with threadpool_limits(limits=dict(self.other_threads)):
            torch.set_num_threads(self.torch_threads)
            torch.set_default_dtype(self.dtype)
            try:
                yield
            finally:
                torch.set_num_threads(before)
                torch.set_default_dtype(dtype)


def _kinds(pools: list[dict[str, Any]]) -> set[str]:
    return {pool["user_api"] for pool in pools}


# ---- what is sent ----------------------------------------------------------------------------------------------------


def _packed(work: Work) -> tuple[NDArray[np.uint8], str]:
    """The work as bytes in an array, which joblib sends to a worker once, and their digest.

    Raises:
        WorkerError: if a part of it cannot be sent, with its name.
    """
    import cloudpickle

    try:
        content = cloudpickle.dumps(work)
    except Exception as error:
        where, part = _unsendable(work)
        message = (
            f"{where or 'What is trained'} is a {type(part).__name__}, which cannot be sent to another process "
            f"({first_line(error)}). Locks, connections and files that are written stay where they are: let the "
            "function open what it needs when it is called. Or train in this process: leave parallel_config out."
        )
        raise WorkerError(message) from error
    return np.frombuffer(content, dtype=np.uint8), hashlib.sha256(content).hexdigest()


def _loaded(shipped: NDArray[np.uint8], digest: str) -> Work:
    """The work on a worker, read from its bytes once.

    Raises:
        WorkerError: if something that it needs cannot be imported there.
    """
    import cloudpickle

    if digest not in _LOADED:
        _LOADED.clear()
        try:
            _LOADED[digest] = cloudpickle.loads(shipped)  # type: ignore[arg-type]
        except Exception as error:
            message = (
                f"A worker cannot read what is trained ({type(error).__name__}: {first_line(error)}). Usual reason: "
                "the retrainer is defined in a file that the worker does not find. Define it in the script that is "
                "run, or set PYTHONPATH to its folder before the workers start."
            )
            raise WorkerError(message) from error
    return _LOADED[digest]


def _unsendable(value: Any, name: str = "", depth: int = 0) -> tuple[str, Any]:
    """The innermost part that cannot be sent, and where it is."""
    import cloudpickle

    for inside, part in _parts(value) if depth < _DEEP else ():
        try:
            cloudpickle.dumps(part)
        except Exception:
            return _unsendable(part, f"{name}.{inside}" if name else inside, depth + 1)
    return name, value


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What something is made of, by name: attributes, items, and what a function closes over."""
    if isinstance(value, MethodType):
        return [(type(value.__self__).__name__, value.__self__)]
    if isinstance(value, FunctionType):
        names = value.__code__.co_freevars
        return [(name, cell.cell_contents) for name, cell in zip(names, value.__closure__ or (), strict=True)]
    if isinstance(value, Mapping):
        return [(str(name), part) for name, part in value.items()]
    if isinstance(value, list | tuple):
        return [(str(place), part) for place, part in enumerate(value)]
    if hasattr(value, "func") and hasattr(value, "args"):  # a functools.partial
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    return list(getattr(value, "__dict__", {}).items())


# ---- what went wrong -------------------------------------------------------------------------------------------------


@contextmanager
def _noted(numbers: tuple[int, ...], unit: str) -> Iterator[None]:
    """What is raised inside says in which job."""
    try:
        yield
    except Exception as error:
        first, last = numbers[0] + 1, numbers[-1] + 1
        error.add_note(f"In {unit} {first}." if first == last else f"In {unit}s {first} to {last}.")
        raise


def _portable(error: Exception) -> Exception:
    """An error as it is, or its text if it cannot be sent."""
    import cloudpickle

    try:
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:
        told = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        return told
    return error
