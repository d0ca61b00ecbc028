"""One builder per scikit-learn estimator: what its fit() minimised, as an Objective at its parameters."""
