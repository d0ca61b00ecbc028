"""A solve by CG that is interrupted goes on from its folder, and one may stop where its values have settled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import upweight as uw
from upweight.influence.scores import Scores
from upweight.operators import EKFAC, KFAC, Arnoldi, GaussNewton
from upweight.operators.implicit import Implicit
from upweight.solvers import CG, Cholesky, LiSSA, Preconditioned
from upweight.solvers.pacing import Pace

X = torch.randn(80, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (80,), generator=torch.Generator().manual_seed(1))
XQ, YQ = X[:3] + 0.3, Y[:3]


def explained(solver, curvature=None, damping=1e-3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    how = {"curvature": curvature or GaussNewton(), "solver": solver, "damping": damping}
    return uw.explain(model, X, Y, loss=cross_entropy, **how)


class Counted:
    """An operator that counts its products, and fails at one of them."""

    def __init__(self, operator, fails_at=10**9):
        self.operator, self.products, self.fails_at = operator, 0, fails_at

    def __getattr__(self, name):
        if name == "coarse":
            raise AttributeError(name)
        return getattr(self.operator, name)

    def apply(self, V):
        self.products += 1
        if self.products == self.fails_at:
            raise KeyboardInterrupt
        return self.operator.apply(V)


def counted(influence, fails_at=10**9):
    influence.system.__dict__["operator"] = found = Counted(influence.operator, fails_at)
    return found


@pytest.mark.parametrize("preconditioner", [None, Preconditioned(EKFAC())], ids=["plain", "preconditioned"])
def test_an_interrupted_solve_goes_on_from_its_folder(tmp_path, monkeypatch, preconditioner):
    monkeypatch.setattr("upweight.solvers.pacing.SECONDS", 0.0)
    solver = CG(rtol=1e-8, preconditioner=preconditioner)
    whole = explained(solver)
    operator = counted(whole)
    exact = whole.on_loss(XQ, YQ).values
    needed = operator.products
    first = explained(solver)
    counted(first, fails_at=needed - 5)
    with pytest.raises(KeyboardInterrupt):
        first.on_loss(XQ, YQ, store=tmp_path / "run")
    assert (tmp_path / "run" / "state.safetensors").is_file()
    second = explained(solver)
    operator = counted(second)
    found = second.on_loss(XQ, YQ, store=tmp_path / "run").values
    assert operator.products < needed  # of the steps since the state was kept, five seconds at most are made again
    assert np.abs(found - exact).max() < 1e-6 * np.abs(exact).max()
    assert not (tmp_path / "run" / "state.safetensors").exists()
    third = explained(solver)
    operator = counted(third)
    assert np.array_equal(third.on_loss(XQ, YQ, store=tmp_path / "run").values, found)
    assert operator.products <= 3  # to see that the solutions there are solutions


def test_sums_of_several_curvatures_are_kept_apart_and_only_while_the_folder_is_held(tmp_path):
    """One for C and another as preconditioner: the second must not take up the first one's sums."""
    folder = tmp_path / "run"

    def asked(store):
        solver = CG(rtol=1e-8, preconditioner=Preconditioned(EKFAC()))
        influence = explained(solver, curvature=KFAC(samples=1))
        return influence, influence.on_loss(XQ, YQ, store=store)

    _, alone = asked(None)
    influence, kept = asked(folder)
    np.testing.assert_allclose(kept.values, alone.values, rtol=1e-9)
    np.testing.assert_allclose(kept.certificate.preconditioner_gap, alone.certificate.preconditioner_gap, rtol=1e-6)
    sums = sorted(file.name for file in folder.glob("sum-*"))
    assert len(sums) == 3
    EKFAC(seed=1, samples=2).bind(influence.operator.sweep)
    assert sorted(file.name for file in folder.glob("sum-*")) == sums


def test_values_settle_before_the_residual_does(tmp_path):
    whole = explained(CG(rtol=1e-9))
    operator = counted(whole)
    exact, needed = whole.on_loss(XQ, YQ).values, operator.products
    for share in (0.05, 0.001):
        influence = explained(CG(rtol=1e-9, settled=share))
        operator = counted(influence)
        scores = influence.on_loss(XQ, YQ)
        missed = np.linalg.norm(scores.values - exact, axis=1) / np.linalg.norm(exact, axis=1)
        assert operator.products < needed
        assert missed.max() < 2 * share
        assert scores.certificate.settled.max() <= share
        assert scores.certificate.residual.max() > 1e-9
        assert "values settled to" in str(scores.certificate)
    scores.save(tmp_path / "scores")
    again = Scores.load(tmp_path / "scores")
    assert np.array_equal(again.certificate.settled, scores.certificate.settled)
    joined = Scores.joined([scores, scores]).certificate
    assert len(joined.settled) == 6


@pytest.mark.parametrize("settled", [None, 0.01], ids=["to a residual", "to settled values"])
def test_a_state_that_is_kept_costs_no_product(tmp_path, monkeypatch, settled):
    """Whatever a product takes: where one takes longer than a state may wait, the state is kept after each."""
    monkeypatch.setattr("upweight.solvers.pacing.SECONDS", 0.0)
    monkeypatch.setattr("upweight.solvers.pacing._PATIENCE", 0.0)
    needed = []
    for store in (None, tmp_path / "run"):
        influence = explained(CG(rtol=1e-8, settled=settled))
        operator = counted(influence)
        influence.on_loss(XQ, YQ, store=store)
        needed.append(operator.products)
    assert needed[0] == needed[1]


def test_a_solve_that_was_too_short_goes_on_with_more_products(tmp_path, monkeypatch):
    monkeypatch.setattr("upweight.solvers.pacing.SECONDS", 0.0)
    whole = explained(CG(rtol=1e-8))
    operator = counted(whole)
    exact, needed = whole.on_loss(XQ, YQ).values, operator.products
    short = explained(CG(rtol=1e-8, max_sweeps=needed - 6))
    counted(short)
    with pytest.raises(uw.errors.NotConverged, match="raise max_sweeps"):
        short.on_loss(XQ, YQ, store=tmp_path / "run")
    influence = explained(CG(rtol=1e-8, max_sweeps=500))
    operator = counted(influence)
    found = influence.on_loss(XQ, YQ, store=tmp_path / "run").values
    assert operator.products < needed / 2
    assert np.abs(found - exact).max() < 1e-6 * np.abs(exact).max()


def test_values_that_settle_at_once_are_not_solved_for_long():
    """A large λ leaves little to do: six steps tell that, one more agrees, and the residual takes a product."""
    influence = explained(CG(rtol=1e-12, settled=0.05), damping=3.0)
    operator = counted(influence)
    scores = influence.on_loss(XQ, YQ)
    exact = explained(CG(rtol=1e-12), damping=3.0).on_loss(XQ, YQ).values
    assert operator.products <= 10
    assert np.linalg.norm(scores.values - exact) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "asked",
    [
        lambda influence, **how: influence.of_adding(XQ + 1, YQ, **how),
        lambda influence, **how: influence.of_replacing([1, 2, 3], XQ + 1, YQ, **how),
        lambda influence, **how: influence.of_relabeling([1, 2, 3], (YQ + 1) % 3, **how),
        lambda influence, **how: influence.of_groups([[1, 2], [7]], **how),
    ],
    ids=["adding", "replacing", "relabeling", "groups"],
)
def test_other_questions_on_the_same_queries_go_on_in_the_same_folder(tmp_path, monkeypatch, asked):
    monkeypatch.setattr("upweight.solvers.pacing.SECONDS", 0.0)
    whole = explained(CG(rtol=1e-8))
    operator = counted(whole)
    exact, needed = asked(whole, on=(XQ, YQ)).values, operator.products
    first = explained(CG(rtol=1e-8))
    counted(first, fails_at=needed - 3)
    with pytest.raises(KeyboardInterrupt):
        first.on_loss(XQ, YQ, store=tmp_path / "run")
    for most in (10, 2):  # what was left to do, and later nothing but a look at the residual
        again = explained(CG(rtol=1e-8))
        operator = counted(again)
        scores = asked(again, on=(XQ, YQ), store=tmp_path / "run")
        assert operator.products <= most < needed
        assert np.abs(scores.values - exact).max() < 1e-6 * np.abs(exact).max()
        lowest = np.linalg.eigvalsh(again.operator.matrix())[0]
        assert lowest - 1e-9 <= scores.certificate.min_curvature < 1  # an upper bound, and a number
    with pytest.raises(uw.errors.StoreMismatch, match="queries"):
        asked(again, on=(XQ[:2], YQ[:2]), store=tmp_path / "run")


def test_values_that_a_recurrence_without_its_residual_saw_settle_are_looked_at_again():
    pace = Pace(0.01, explained(CG()).operator, None)
    x = torch.randn(2, pace.rows.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = [x * (1 - 0.1**step) for step in range(1, 30)]  # converges to x at once

    def until(start):
        return next(step for step in range(start, 30) if pace.look(steps[step], x))

    first = until(0)
    assert not pace.rests(steps[first], x, 0.5, None)  # half of the residual is not what it was believed to be
    second = until(first + 1)
    assert second - first == first + 1  # as many steps, looked at alone
    assert pace.rests(steps[second], x, 0.1, None)


def test_what_was_promised_is_told_of_values_too():
    with pytest.raises(uw.errors.NotConverged, match=r"; 1e-08, or values settled to 0\.001, was promised"):
        explained(CG(rtol=1e-8, settled=0.001, max_sweeps=4)).on_loss(XQ, YQ)


def test_equal_queries_settle_together():
    twice = torch.cat([XQ, XQ]), torch.cat([YQ, YQ])
    exact = explained(CG(rtol=1e-9)).on_loss(XQ, YQ).values
    scores = explained(CG(rtol=1e-9, settled=0.01)).on_loss(*twice)
    assert np.abs(scores.values - np.concatenate([exact, exact])).max() < 0.02 * np.abs(exact).max()
    assert scores.certificate.settled.max() <= 0.01


def test_values_that_settled_are_taken_again_as_they_are(tmp_path):
    solver = CG(rtol=1e-9, settled=0.05)
    first = explained(solver).on_loss(XQ, YQ, store=tmp_path / "run")
    again = explained(solver)
    operator = counted(again)
    second = again.on_loss(XQ, YQ, store=tmp_path / "run")
    assert np.array_equal(second.values, first.values)
    assert operator.products <= 2
    assert np.array_equal(second.certificate.settled, first.certificate.settled)
    assert np.allclose(second.certificate.residual, first.certificate.residual, rtol=1e-6)


class CountedRows(Counted):
    """The same of products with a few rows."""

    def apply_rows(self, V, rows):
        self.products += 1
        if self.products == self.fails_at:
            raise KeyboardInterrupt
        return self.operator.apply_rows(V, rows)

    def apply(self, V):
        return self.operator.apply(V)


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
@pytest.mark.parametrize("lost", [130, 250], ids=["in the second estimate", "in the third"])
def test_an_interrupted_recursion_goes_on_to_the_same_bits(tmp_path, monkeypatch, lost):
    monkeypatch.setattr("upweight.solvers.pacing.SECONDS", 0.0)
    solver = LiSSA(depth=100, repeats=3, batch_size=4, scale=20.0, seed=3)

    def asked(store, fails_at=10**9):
        influence = explained(solver)
        influence.system.__dict__["operator"] = found = CountedRows(influence.operator, fails_at)
        return lambda: influence.on_loss(XQ, YQ, store=store), found

    alone, every = asked(None)
    whole = alone()
    assert every.products == 300
    first, _ = asked(tmp_path / "run", fails_at=lost)
    with pytest.raises(KeyboardInterrupt):
        first()
    second, rest = asked(tmp_path / "run")
    found = second()
    assert rest.products == 300 - lost + 1  # nothing but the step that was lost is made twice
    assert found.values.tobytes() == whole.values.tobytes()
    assert found.standard_error.tobytes() == whole.standard_error.tobytes()
    third, none = asked(tmp_path / "run")
    again = third()
    assert none.products == 0
    assert again.values.tobytes() == whole.values.tobytes()
    assert again.standard_error.tobytes() == whole.standard_error.tobytes()


@pytest.mark.filterwarnings("ignore::upweight.errors.TheoryWarning")
@pytest.mark.parametrize("lost", [1, 7, 24])
@pytest.mark.parametrize("rows", [X, X[:, :1].expand(-1, 6)], ids=["full", "a space that is left at once"])
def test_an_interrupted_basis_goes_on_to_the_same_bits(tmp_path, monkeypatch, lost, rows):
    monkeypatch.setattr("upweight.model.chunks.KEPT_EVERY", 0.0)
    apply, products = Implicit.apply, []

    def asked(store, fails_at=10**9):
        torch.manual_seed(0)
        model = nn.Linear(6, 5).double()
        how = {"loss": cross_entropy, "curvature": Arnoldi(4, of=GaussNewton(keep=0), steps=25), "damping": 0.1}
        influence = uw.explain(model, rows, Y, penalty=0.01, **how)
        products.clear()

        def counted(self, V):
            products.append(len(V))
            if len(products) == fails_at:
                raise KeyboardInterrupt
            return apply(self, V)

        monkeypatch.setattr(Implicit, "apply", counted)
        return influence.on_loss(XQ, YQ, store=store)

    whole = asked(None)
    every = len(products)
    assert every >= 25
    with pytest.raises(KeyboardInterrupt):
        asked(tmp_path / "run", fails_at=lost)
    found = asked(tmp_path / "run")
    assert len(products) == every - lost + 1
    assert found.values.tobytes() == whole.values.tobytes()
    (tmp_path / "run" / "scores.safetensors").unlink()
    (tmp_path / "run" / "chunk-000000.safetensors").unlink()
    assert asked(tmp_path / "run").values.tobytes() == whole.values.tobytes()
    assert len(products) == every - 25


@pytest.mark.parametrize("share", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("damping", [1.0, 0.01, 1e-4])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("preconditioner", [None, Preconditioned(EKFAC())], ids=["plain", "preconditioned"])
def test_values_have_settled_as_far_as_is_said(share, damping, queries, preconditioner):
    on = XQ[:queries], YQ[:queries]
    exact = explained(Cholesky(), damping=damping).on_loss(*on).values
    scores = explained(CG(rtol=1e-12, settled=share, preconditioner=preconditioner), damping=damping).on_loss(*on)
    missed = np.linalg.norm(scores.values - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert missed.max() <= share
    assert scores.certificate.settled is None or missed.max() <= 2 * scores.certificate.settled.max() + 1e-9
