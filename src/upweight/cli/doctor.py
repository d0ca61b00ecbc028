"""What a bug report needs to know of a machine: versions, threads, memory, disk; does it compute alike, and how fast.

Gradients of examples may not depend on the batch they are computed in, on the number of threads, or on the day. What is
fast is asked of the machine itself: a large copy gives the bandwidth of its memory, a product of matrices its flops,
and sweeps over rows are shown as a share of these. Nothing here names a user, a host or a folder.
"""

from __future__ import annotations

import os
import platform
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from upweight.data.examples import Examples
from upweight.influence.face import Influence
from upweight.model import losses, per_row
from upweight.model.objective import Linear, Objective
from upweight.operators import Identity
from upweight.runs import machine
from upweight.runs.machine import in_bytes

_PACKAGES = ("upweight", "torch", "numpy", "scipy", "scikit-learn", "transformers", "peft", "safetensors", "jaxtyping")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
_ROWS = 96
_BATCHES = (1, 7, 32)
_COPIED = 2**27  # bytes
_SIDE = 1024  # of the matrices that are multiplied
_WIDTH = 110  # of a line
_SECONDS = 0.2  # that one rate is measured for, at least
_LINEAR = (20_000, 200)  # rows and features of a sweep
_WIDE = (2_000, 128)  # rows and width of another


@dataclass(frozen=True)
class Check:
    """Something that must be the same, and how far it is from that.

    Args:
        name: what is compared.
        difference: the largest one, relative to the largest number.
        bitwise: whether there is none at all.
        tolerance: what rounding explains.
    """

    name: str
    difference: float
    bitwise: bool
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether rounding explains it."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        if self.bitwise:
            return f"{self.name}: the same to the bit"
        verdict = "rounding" if self.ok else f"NOT rounding, which explains {self.tolerance:.0e}"
        return f"{self.name}: differ by {self.difference:.1e}, {verdict}"


@dataclass(frozen=True)
class Health:
    """What is known of a machine, and what was found out.

    Args:
        facts: by section, name and value.
        checks: what must be alike.
        rates: what the machine reaches, and sweeps as a share of it.
    """

    facts: dict[str, dict[str, Any]]
    checks: tuple[Check, ...]
    rates: dict[str, float]

    @property
    def ok(self) -> bool:
        """Whether everything that must be alike is, and files in the working folder are safe."""
        return all(check.ok for check in self.checks) and not machine.unsafe(self.facts["disk"])

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        checks = [asdict(check) | {"ok": check.ok} for check in self.checks]
        return {"ok": self.ok, **self.facts, "alike": checks, "rates": self.rates}

    def __str__(self) -> str:
        lines = []
        for section, entries in self.facts.items():
            words = ", ".join(f"{name} {_shown(name, value)}" for name, value in entries.items())
            lines += textwrap.wrap(words, _WIDTH, initial_indent=f"{section:<21}", subsequent_indent=" " * 21)
        for number, check in enumerate(self.checks):
            lines.append(f"{'' if number else 'gradients':<21}{check}")
        for number, (name, value) in enumerate(self.rates.items()):
            shown = f"{value:.0%} of it" if "share" in name else f"{value / 1e9:.3g} G{name.rpartition(' in ')[2]}"
            lines.append(f"{'' if number else 'speed':<21}{name.rpartition(' in ')[0] or name}: {shown}")
        return "\n".join([*lines, f"verdict              {'ok' if self.ok else 'NOT ok'}"])


def examine() -> Health:
    """The state of this machine.  Cost: some seconds."""
    facts = {
        "versions": _versions(),
        "processor": machine.processor(),
        "threads": _threads(),
        "memory": {
            "total": machine.total_bytes(),
            "available": machine.available_bytes(),
            "limit": machine.container_bytes()[0],
        },
        "disk": machine.disk(),
        "torch": _settings(),
        "gpu": _gpu(),
    }
    return Health(facts, tuple(_checks()), _rates())


def _versions() -> dict[str, str]:
    """Of Python, and of packages that are installed."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _threads() -> dict[str, Any]:
    """How many threads torch and the libraries of linear algebra take."""
    found: dict[str, Any] = {"torch": torch.get_num_threads()}
    found |= {name: os.environ[name] for name in _THREADS if name in os.environ}
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return found
    for pool in threadpool_info():
        name = f"{pool['internal_api']} {pool.get('version') or ''}".strip()
        found[name] = pool["num_threads"]
    return found


def _settings() -> dict[str, Any]:
    """What changes the arithmetic of torch."""
    return {
        "default dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32 products": torch.get_float32_matmul_precision(),
        "mkl": torch.backends.mkl.is_available(),
        "mkldnn": torch.backends.mkldnn.is_available(),
    }


def _gpu() -> dict[str, Any]:
    """The first graphics processor."""
    if not torch.cuda.is_available():
        return {"cuda": "none"}
    known = torch.cuda.get_device_properties(0)
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "count": torch.cuda.device_count(),
        "name": known.name,
        "total": float(known.total_memory),
        "tf32 products": torch.backends.cuda.matmul.allow_tf32,
        "tf32 convolutions": torch.backends.cudnn.allow_tf32,
        "cudnn deterministic": torch.backends.cudnn.deterministic,
    }


# ---- alike -----------------------------------------------------------------------------------------------------------


def _checks() -> Iterator[Check]:
    for dtype in _TOLERANCE:
        name = str(dtype).removeprefix("torch.")
        whole = _gradients(dtype)
        batches = [_gradients(dtype, batch_size=size) for size in _BATCHES]
        yield _compared(f"{name}, batches of {', '.join(map(str, _BATCHES))}", whole, batches)
        yield _compared(f"{name}, asked again", whole, [_gradients(dtype) for _ in range(3)])
        usual = torch.get_num_threads()
        other = 1 if usual > 1 else 2
        with _threaded(other):
            found = _gradients(dtype)
        yield _compared(f"{name}, threads {usual} or {other}", whole, [found])
        if torch.cuda.is_available():
            yield _compared(f"{name}, cpu or cuda", whole, [_gradients(dtype, device="cuda")])


def _gradients(dtype: torch.dtype, batch_size: int | None = None, device: str = "cpu") -> Tensor:
    """∇L of every row of a small network with a convolution and a nonlinearity."""
    sweep = _network(dtype, device, batch_size).sweep
    return per_row.gradients(sweep)


def _network(dtype: torch.dtype, device: str, batch_size: int | None) -> Influence:
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(_ROWS, 2, 8, 8, generator=draw, dtype=torch.float64)
    y = torch.randint(0, 3, (_ROWS,), generator=draw)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)).to(device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    objective = Objective.from_module(model, nn.functional.cross_entropy, dtype=dtype)
    return Influence(
        objective, (X.to(device, dtype), y.to(device)), curvature=Identity(), batch_size=batch_size, progress=False
    )


def _compared(name: str, whole: Tensor, others: list[Tensor]) -> Check:
    difference = max(float((other - whole).abs().max() / whole.abs().max()) for other in others)
    dtype = torch.float64 if "float64" in name else torch.float32
    return Check(name, difference, all(torch.equal(other, whole) for other in others), _TOLERANCE[dtype])


@contextmanager
def _threaded(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- fast ------------------------------------------------------------------------------------------------------------


def _rates() -> dict[str, float]:
    """Bandwidth and flops of the processors, and sweeps as shares of them."""
    copied = _bandwidth()
    flops = {dtype: 2.0 * _SIDE**3 / _fastest(_product(dtype)) for dtype in (torch.float32, torch.float64)}
    (n, d), (rows, width) = _LINEAR, _WIDE
    linear, network = _linear(n, d), _perceptron(rows, width)
    read = 8.0 * n * d / _fastest(_scoring(linear))
    done = 6.0 * rows * network.objective.size / _fastest(_scoring(network))
    return {
        "copying memory in B/s": copied,
        "products in float32 in FLOP/s": flops[torch.float32],
        "products in float64 in FLOP/s": flops[torch.float64],
        "scores of a linear model in B/s": read,
        "scores of a linear model, share of copying": read / copied,
        "scores of a network in FLOP/s": done,
        "scores of a network, share of float32 products": done / flops[torch.float32],
    }


def _bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    size = int(min(_COPIED, machine.available_bytes() / 8)) // 8
    source, target = torch.ones(size, dtype=torch.float64), torch.empty(size, dtype=torch.float64)
    return 16.0 * size / _fastest(lambda: target.copy_(source))


def _fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of several calls, the first of which does not count."""
    call()
    best, until = float("inf"), time.perf_counter() + _SECONDS
    while best == float("inf") or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _product(dtype: torch.dtype) -> Callable[[], Tensor]:
    A = torch.ones(_SIDE, _SIDE, dtype=dtype)
    return lambda: A @ A


def _scoring(influence: Influence) -> Callable[[], Any]:
    """The step of `on_loss` that grows with the rows, for one query."""
    from upweight.influence import scoring
    from upweight.solvers import Solution

    S = torch.ones(1, influence.objective.size, dtype=torch.float64)
    solution = Solution(S, torch.zeros(1, dtype=torch.float64), True)
    return lambda: scoring.with_rows(influence.system, solution, torch.zeros_like(S[0]))


def _linear(n: int, d: int) -> Influence:
    """Least squares."""
    params = {"coef": torch.ones(1, d, dtype=torch.float64)}

    def loss(params: Any, example: Any) -> Tensor:
        return 0.5 * ((params["coef"] @ example[0])[0] - example[1]) ** 2

    objective = Objective(loss, params, linear=Linear(losses.squared, 1, d, intercept=False))
    X = torch.ones(n, d, dtype=torch.float64)
    influence = Influence(objective, Examples(X, X[:, 0]), damping=1.0, progress=False)
    influence.operator.slopes  # type: ignore[attr-defined]  # noqa: B018 they are computed once
    return influence


def _perceptron(n: int, width: int) -> Influence:
    """Two layers, in float32."""
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    X, y = torch.ones(n, width), torch.zeros(n, dtype=torch.int64)
    objective = Objective.from_module(model, nn.functional.cross_entropy)
    influence = Influence(objective, (X, y), curvature=Identity(), progress=False)
    influence.risk_gradient  # noqa: B018 it is computed once
    return influence


def _shown(name: str, value: Any) -> str:
    if name in ("total", "available", "limit", "free"):
        return "none" if value == float("inf") else in_bytes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
