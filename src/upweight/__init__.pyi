"""Every public name, once, beside the file it comes from; `lazy_loader` and type checkers both read this."""

from . import adapters as adapters, apps as apps, errors as errors, operators as operators, solvers as solvers
from .adapters import explain as explain
from .cli.study import Study as Study
from .data import datasets as datasets, markup as markup
from .data.examples import Examples as Examples
from .evaluation.blends import blended as blended
from .evaluation.curves import (
    MislabelCurve as MislabelCurve,
    RemovalCurve as RemovalCurve,
    mislabel_auc as mislabel_auc,
    removal_curve as removal_curve,
)
from .evaluation.lds import LDS as LDS, lds as lds
from .evaluation.leave_one_out import (
    Agreement as Agreement,
    Outcomes as Outcomes,
    agreement as agreement,
    leave_one_out as leave_one_out,
)
from .evaluation.subsets import (
    SubsetOutcomes as SubsetOutcomes,
    random_subsets as random_subsets,
    subset_retraining as subset_retraining,
)
from .influence import baselines as baselines, defaults as defaults, diagnostics as diagnostics
from .influence.checks import Report as Report
from .influence.damping_path import DampingPath as DampingPath
from .influence.face import Influence as Influence
from .influence.index import Coordinates as Coordinates, Index as Index
from .influence.leading import Leading as Leading
from .influence.plan import Plan as Plan
from .influence.scores import (
    Certificate as Certificate,
    Extremes as Extremes,
    Scores as Scores,
    SelfScores as SelfScores,
    extremes as extremes,
)
from .influence.tokens import TokenScores as TokenScores
from .influence.top import TopK as TopK
from .model import calculus as calculus, losses as losses, penalties as penalties
from .model.objective import L2 as L2, Linear as Linear, Objective as Objective
from .show import plots as plots
from .show.evidence import Evidence as Evidence, evidence as evidence, keep_evidence as keep_evidence
from .show.items import write_run as write_run
from .show.look import Look as Look, look as look
from .show.run import Items as Items, Run as Run
from .show.run_report import write_report as write_report
from .training import minibatch as minibatch
from .training.checkpoints import TracIn as TracIn, checkpoints as checkpoints
from .training.counterfactuals import edited as edited, retrained as retrained
from .training.course import Course as Course
from .training.ensembles import Ensemble as Ensemble, ensemble as ensemble
from .training.locality import Locality as Locality
from .training.predictions import (
    Predictions as Predictions,
    classes as classes,
    features as features,
    predict as predict,
    query_labels as query_labels,
    training_inputs as training_inputs,
    training_labels as training_labels,
)
from .training.recorded import recorded as recorded
from .training.recording import Recording as Recording
from .training.retrainers import (
    LBFGS as LBFGS,
    Newton as Newton,
    Refit as Refit,
    Retrain as Retrain,
    RetrainMany as RetrainMany,
)
from .training.stacked import StackedTraining as StackedTraining
from .training.through import Through as Through, through as through
from .training.trajectory import Trajectory as Trajectory

__all__: list[str]
__version__: str
