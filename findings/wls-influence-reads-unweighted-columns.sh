#!/usr/bin/env bash
# statsmodels' OLSInfluence accepts a weighted fit and weighs the columns only once in its leverages.
#
# Library: statsmodels 0.15.0.
# Surprise: RegressionResults of WLS have no get_influence(), and the class behind it, OLSInfluence(results), takes them
#   without a word. It multiplies the columns as they are by the pseudoinverse of the weighted ones, so that a leverage is
#   sqrt(w) x' (X'WX)^-1 x in place of w x' (X'WX)^-1 x, and they do not sum to the number of parameters. Cook's distance,
#   the deletion residual and DFBETAS follow from them.
# Expected: the hat matrix of a weighted fit, whose trace is the number of parameters; a deletion residual that is
#   y - prediction by the fit without the row; and so on.
# Where upweight works around it: src/upweight/influence/diagnostics.py takes weights as precisions, and its columns for
#   weighted fits are tested against fits without the row; docs/recipes/statistics.md shows the numbers side by side.
#
# Seen, row 4 of 30:
#   sum of leverages:      2 parameters    statsmodels 1.1941
#   deletion residual:     refit -0.3729   statsmodels -0.3708
#   Cook's distance:       refit 0.001150  statsmodels 0.000545
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 pandas==2.3.3 scipy==1.17.1 statsmodels==0.15.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import statsmodels.api as sm
from statsmodels.stats.outliers_influence import OLSInfluence

draw = np.random.default_rng(0)
x = draw.normal(size=(30, 1))
y, w, row = x[:, 0] + draw.normal(size=30), draw.uniform(0.2, 5, 30), 4
X = sm.add_constant(x)
whole = sm.WLS(y, X, weights=w).fit()
kept = np.arange(30) != row
without = sm.WLS(y[kept], X[kept], weights=w[kept]).fit()
theirs = OLSInfluence(whole)
moved = np.sqrt(w) * (X @ (whole.params - without.params))
cook = moved @ moved / 2 / whole.mse_resid
refit = y[row] - X[row] @ without.params
trace = theirs.hat_matrix_diag.sum()
print(f"sum of leverages:      2 parameters    statsmodels {trace:.4f}")
print(f"deletion residual:     refit {refit:.4f}   statsmodels {theirs.resid_press[row]:.4f}")
print(f"Cook's distance:       refit {cook:.6f}  statsmodels {theirs.cooks_distance[0][row]:.6f}")
seen = np.array([trace, refit, theirs.resid_press[row], cook, theirs.cooks_distance[0][row]])
same = np.allclose(seen, [1.1941, -0.3729, -0.3708, 0.001150, 0.000545], atol=5e-5)
has = hasattr(whole, "get_influence")
sys.exit(0 if same and not has else f"The behaviour changed: {seen}, get_influence: {has}")
PYTHON
