"""The paper's four uses (section 5) and the question of contrast (section 6), by the public API only."""

from upweight.apps.answers import Answer, Contrast
from upweight.apps.attack import Attack, Vulnerability, attack, vulnerability
from upweight.apps.columns import one_hot_groups
from upweight.apps.contrast import contrast, contrast_by_removal
from upweight.apps.corrections import (
    Corrected,
    corrected,
    read_patch,
    read_review,
    write_labels,
    write_patch,
    write_review,
)
from upweight.apps.effects import FeatureEffects, GroupEffects, Places
from upweight.apps.label_attacks import Edits, flip_labels, replace_rows
from upweight.apps.mismatch import Mismatch, Side, mismatch
from upweight.apps.repair import Found, Repair, repair
from upweight.apps.understand import (
    Ranked,
    SideBySide,
    Understanding,
    side_by_side,
    understand,
)

__all__ = [
    "Answer",
    "Attack",
    "Contrast",
    "Corrected",
    "Edits",
    "FeatureEffects",
    "Found",
    "GroupEffects",
    "Mismatch",
    "Places",
    "Ranked",
    "Repair",
    "Side",
    "SideBySide",
    "Understanding",
    "Vulnerability",
    "attack",
    "contrast",
    "contrast_by_removal",
    "corrected",
    "flip_labels",
    "mismatch",
    "one_hot_groups",
    "read_patch",
    "read_review",
    "repair",
    "replace_rows",
    "side_by_side",
    "understand",
    "vulnerability",
    "write_labels",
    "write_patch",
    "write_review",
]
