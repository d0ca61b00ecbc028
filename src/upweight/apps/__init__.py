"""The paper's four uses (section 5) and the question of contrast (section 6), by the public API only."""

from upweight.apps.mismatch import FeatureEffects, GroupEffects, Mismatch, Places, Side, mismatch, one_hot_groups
from upweight.apps.understand import (
    Ranked,
    SideBySide,
    Understanding,
    side_by_side,
    understand,
)

__all__ = [
    "FeatureEffects",
    "GroupEffects",
    "Mismatch",
    "Places",
    "Ranked",
    "Side",
    "SideBySide",
    "Understanding",
    "mismatch",
    "one_hot_groups",
    "side_by_side",
    "understand",
]
