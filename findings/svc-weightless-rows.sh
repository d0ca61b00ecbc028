#!/usr/bin/env bash
# An SVC on a precomputed kernel that is given rows of weight 0 predicts from the kernel of other rows.
#
# Library: scikit-learn 1.9.1 (SVC; NumPy 2.4.6).
# Surprise: libsvm drops rows of weight 0 before it solves and counts the rows that are left. scikit-learn takes those
#   counts for row numbers of X, so `support_` names wrong rows. With kernel="precomputed", or with a function as
#   kernel, predict() looks the kernel up at these rows: it answers without a word, and wrongly. With kernel="linear"
#   the support vectors were copied before, and the predictions are right.
# Expected: `support_` is documented as the indices of the support vectors; and a row of weight 0 adds nothing to the
#   objective, so a fit with it and a fit without it are the same model, whichever way the kernel is given.
# Where upweight works around it: src/upweight/adapters, the builder `support_vectors` of kernel machines. Leaving rows
#   out is fitting again with weight 0. For these two kernels it fits an SVC(kernel="linear") on a factor of the Gram
#   matrix instead, which is the same problem and needs no row numbers.
#
# Seen:
#   rows 0, 1 and 2 weigh nothing; the kernel is the inner product
#   kernel=linear       support_ starts [7, 13, 14, 22]  largest error of the decision function 1.78e-15
#   kernel=precomputed  support_ starts [7, 13, 14, 22]  largest error of the decision function 5.16
#   without these rows  support  starts [10, 16, 17, 25]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 scikit-learn==1.9.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
from sklearn.svm import SVC

draw = np.random.default_rng(0)
X = draw.normal(size=(40, 2))
y = (X[:, 0] + 0.5 * draw.normal(size=40) > 0).astype(int)
weights = np.ones(40)
weights[:3] = 0
K = X @ X.T

right = SVC(kernel="precomputed", tol=1e-8).fit(K[3:, 3:], y[3:])
truth = right.decision_function(K[:, 3:])
errors, named = {}, {}
print("rows 0, 1 and 2 weigh nothing; the kernel is the inner product")
for kernel, rows in (("linear", X), ("precomputed", K)):
    model = SVC(kernel=kernel, tol=1e-8).fit(rows, y, sample_weight=weights)
    errors[kernel] = float(np.abs(model.decision_function(rows) - truth).max())
    named[kernel] = model.support_.tolist()
    start = f"support_ starts {named[kernel][:4]}"
    print(f"kernel={kernel:<12} {start}  largest error of the decision function {errors[kernel]:.3g}")
print(f"without these rows  support  starts {(right.support_ + 3).tolist()[:4]}")

wrong_rows = named["precomputed"] == right.support_.tolist() and named["linear"] == right.support_.tolist()
if not (wrong_rows and errors["linear"] < 1e-6 and errors["precomputed"] > 1):
    sys.exit("No longer so: support_ or the predictions of a precomputed kernel have changed.")
PYTHON
