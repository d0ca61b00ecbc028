"""The paper's four uses (section 5) and the question of contrast (section 6), by the public API only."""

from upweight.apps.contrast import Answer, Contrast, contrast, contrast_by_removal
from upweight.apps.mismatch import FeatureEffects, GroupEffects, Mismatch, Places, Side, mismatch, one_hot_groups
from upweight.apps.understand import (
    Ranked,
    SideBySide,
    Understanding,
    side_by_side,
    understand,
)

__all__ = [
    "Answer",
    "Contrast",
    "FeatureEffects",
    "GroupEffects",
    "Mismatch",
    "Places",
    "Ranked",
    "Side",
    "SideBySide",
    "Understanding",
    "contrast",
    "contrast_by_removal",
    "mismatch",
    "one_hot_groups",
    "side_by_side",
    "understand",
]
