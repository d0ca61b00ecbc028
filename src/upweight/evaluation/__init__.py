"""Predicted against actual: leave-one-out, subsets and the linear datamodeling score, removal and mislabel curves."""
