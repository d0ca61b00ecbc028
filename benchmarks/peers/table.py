"""Which libraries are asked, by which methods and settings, and what their documentation says of a score.

`factor` turns a documented score into the change of a query's loss if the row is removed; None where the documentation
gives it no unit. `system` is what the method solves or approximates: the Hessian or the Gauss–Newton matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from workloads import kind

Factor = Callable[[int], float | None]


def of_removal(_rows: int) -> float:
    """The score is documented as the change itself."""
    return 1.0


def no_unit(_rows: int) -> None:
    """The score is for ranking."""


@dataclass(frozen=True)
class Method:
    """One way in which a library answers; `answers` is "pairs", or "rows" where it gives one number a row."""

    name: str
    settings: str
    system: str = "hessian"
    factor: Factor = lambda n: 1 / n
    answers: str = "pairs"
    only: tuple[str, ...] = ()
    why_only: str = ""


@dataclass(frozen=True)
class Library:
    """A library, its version, and what it does not answer: kinds of targets or workloads, with the reason."""

    name: str
    version: str
    methods: tuple[Method, ...]
    sign_and_unit: str
    leaves_out: str
    not_for: Mapping[str, str] = field(default_factory=dict)

    def why_not(self, method: Method, workload: str) -> str | None:
        """The reason why a cell is not asked for, or None."""
        if method.only and workload not in method.only:
            return method.why_only
        for key in (workload, kind(workload)):
            if key in self.not_for:
                return self.not_for[key]
        return None


NETWORKS = ("mlp-concrete", "mlp-mnist", "cnn-mnist", "llama")
LINEAR_ONLY = "linear models of scikit-learn only"
NOT_A_NETWORK = "the exact answer is the default here"
LANGUAGE_ONLY = "language models only"

LIBRARIES = (
    Library(
        "upweight",
        "0.2.dev",
        (
            Method(
                "default",
                "explain(…, penalty=l2, penalty_per_example=False, damping=λ − l2).on_loss, its defaults (exact)",
                "gauss_newton",
                of_removal,
            ),
            Method(
                "EKFAC",
                "the same with curvature=EKFAC()",
                "gauss_newton",
                of_removal,
                only=NETWORKS,
                why_only=NOT_A_NETWORK,
            ),
            Method(
                "CG until settled",
                "the same with curvature=GaussNewton(), solver=CG(settled=0.05)",
                "gauss_newton",
                of_removal,
                only=("llama",),
                why_only=NOT_A_NETWORK,
            ),
        ),
        "the predicted change of the query's loss if the row is removed; positive helps",
        "nothing",
    ),
    Library(
        "dattri",
        "0.3.0",
        (
            Method("explicit", "IFAttributorExplicit(regularization=λ), all rows in one batch"),
            Method("CG", "IFAttributorCG(regularization=λ), its 10 iterations, all rows in one batch"),
            Method("EK-FAC", "IFAttributorEKFAC(damping=λ), all rows in one batch", "gauss_newton"),
        ),
        "gᵀH⁻¹g, positive helps; no 1/n",
        "EK-FAC: everything but Linear",
    ),
    Library(
        "kronfluence",
        "1.0.1",
        (
            Method("EK-FAC", "strategy=ekfac, damping_factor=λ, losses summed, whole batches", "gauss_newton"),
            Method("EK-FAC, its default damping", "the same with its default damping_factor, 1e-8", "gauss_newton"),
        ),
        "gᵀC⁻¹g of losses summed over tokens, positive helps; no 1/n",
        "embeddings, normalisation",
    ),
    Library(
        "pydvl",
        "0.10.0",
        (
            Method("direct", "DirectInfluence(regularization=λ)"),
            Method("block CG", "CgInfluence(regularization=λ, solve_simultaneously=True), its tolerances"),
            Method(
                "EK-FAC",
                "EkfacInfluence(hessian_regularization=λ, update_diagonal=True)",
                "gauss_newton",
                only=("softmax", "softmax-784", "mlp-mnist", "cnn-mnist", "llama"),
                why_only="for cross-entropy of several outputs only, as documented",
            ),
        ),
        "gᵀH⁻¹g, equation 2 without its minus; no 1/n",
        "EK-FAC: everything but Linear and cross-entropy",
    ),
    Library(
        "captum",
        "0.9.0",
        (
            Method("TracInCP", "one checkpoint, learning rate 1, all layers", factor=no_unit),
            Method(
                "Arnoldi",
                "ArnoldiInfluenceFunction (not exported), its defaults: projection_dim 50, hessian_reg 1e-3",
                factor=of_removal,
            ),
        ),
        "TracInCP: gᵀg, no unit; Arnoldi: gᵀH⁻¹g with the Hessian of the sum, which holds 1/n",
        "Arnoldi: all but 50 directions",
    ),
    Library(
        "traker",
        "0.3.2",
        (
            Method(
                "TRAK",
                "task='image_classification' (a margin, not the loss), one model, proj_dim 2048, lambda_reg 0",
                factor=no_unit,
            ),
        ),
        "for ranking; no unit",
        "what the projection loses",
        {
            "numbers": "built-in tasks are classifications; others are written by the user",
            "two classes": "built-in tasks are classifications by softmax; others are written by the user",
            "tokens": "built-in tasks do not include next-token prediction; others are written by the user",
        },
    ),
    Library(
        "bergson",
        "2.5.1",
        (
            Method("EK-FAC", "its EK-FAC pipeline, defaults, float32", "gauss_newton"),
            Method("gradient dot", "build and score, projection_dim 0, no preconditioner", factor=no_unit),
        ),
        "positive is a proponent; sums over tokens, no 1/n",
        "embeddings, normalisation, lm_head, biases",
        dict.fromkeys(("numbers", "two classes", "classes"), LANGUAGE_ONLY),
    ),
    Library(
        "dattri-llm",
        "0.1.0",
        (
            Method("EK-FAC", "EKFACAttributor(damping=λ), all rows in one batch", "gauss_newton"),
            Method("gradient dot", "TracInAttributor, all rows in one batch", factor=no_unit),
        ),
        "a product of gradients of whatever the loss returns; no 1/n",
        "Llama's normalisation; all but one of equal rows",
    ),
    Library(
        "pyinfluence",
        "0.5.0",
        (Method("InfluenceFunctions", "defaults: damping 1e-5 is always added", factor=of_removal),),
        "the change of the query's loss if the row is removed; positive helps; half of the squared error",
        "nothing",
        dict.fromkeys(("mlp-concrete", "mlp-mnist", "cnn-mnist", "llama"), LINEAR_ONLY),
    ),
    Library(
        "torch-influence",
        "0.1.0",
        (
            Method("autograd", "AutogradInfluenceModule(damp=λ)", factor=of_removal),
            Method("CG", "CGInfluenceModule(damp=λ), its defaults", factor=of_removal),
        ),
        "the change of the query's loss if the row is removed, with 1/n",
        "nothing",
    ),
    Library(
        "statsmodels",
        "0.15.0",
        (
            Method(
                "OLS influence",
                "OLS, get_influence().dfbeta times the gradient of the query's loss",
                factor=of_removal,
            ),
        ),
        "DFBETA, the exact change of the parameters with the row, 1/(1 − h) included",
        "nothing",
        {
            "text": "no influence of a penalised fit",
            "classes": "no influence of a multinomial fit",
            "mlp-concrete": "linear models only",
            "tokens": "linear models only",
        },
    ),
    Library(
        "cleanlab",
        "2.9.0",
        (Method("label quality", "get_label_quality_scores of the model's own probabilities", answers="rows"),),
        "between 0 and 1, low is suspicious; no query",
        "the model: it sees probabilities alone",
        {
            "numbers": "regression needs a model of its own there",
            "mlp-mnist": "the same function as for softmax regression: it sees probabilities alone",
            "cnn-mnist": "the same function as for softmax regression: it sees probabilities alone",
            "tokens": "no label of a row",
        },
    ),
)
