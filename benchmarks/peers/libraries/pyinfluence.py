"""pyinfluence: InfluenceFunctions of the fitted scikit-learn estimator, damping as it always adds it."""

import numpy as np
from pyinfluence import InfluenceFunctions
from sklearn.linear_model import LinearRegression, LogisticRegression


def scores(work):
    X, y, Xq, yq = (part.astype(float) for part in work.arrays)
    if work.kind == "numbers":
        model = LinearRegression().fit(X, y[:, 0])
    else:
        model = LogisticRegression(C=1 / (work.l2 * len(X)), fit_intercept=False)
        model.coef_, model.intercept_, model.classes_ = work.coefficients(), np.zeros(1), np.unique(y)
    return InfluenceFunctions().fit(model, X, y.ravel()).explain(Xq, yq.ravel())


METHODS = {"InfluenceFunctions": scores}
