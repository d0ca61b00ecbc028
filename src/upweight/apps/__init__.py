"""The paper's four uses (section 5) and the question of contrast (section 6), by the public API only."""

from upweight.apps.mismatch import FeatureEffects, GroupEffects, Mismatch, Places, Side, mismatch, one_hot_groups

__all__ = [
    "FeatureEffects",
    "GroupEffects",
    "Mismatch",
    "Places",
    "Side",
    "mismatch",
    "one_hot_groups",
]
