#!/usr/bin/env bash
# Arrays in Fortran order come back from a safetensors file with their numbers in other places.
#
# Library: safetensors 0.8.0 (safetensors.numpy, with NumPy 2.4.6 and SciPy 1.17.1).
# Surprise: save() writes the memory of an array as it lies there, and the shape as if it lay row by row. An array in
#   Fortran order, such as a transpose or what LAPACK returns through SciPy, is read back with the right shape and
#   dtype and the wrong entries. Nothing is raised, and sums, norms and histograms of the entries still agree.
# Expected: a round trip gives what was saved. The documentation asks for contiguous and dense arrays, which a Fortran
#   array is by NumPy's own flags; the same library's writer for torch raises for tensors that are not row by row.
# Where upweight works around it: src/upweight/runs, `write_tensors`, the only writer of such files. It passes every
#   array through np.ascontiguousarray first.
#
# Seen:
#   eigenvectors Q of a symmetric 3 x 3 matrix, by scipy.linalg.eigh: C order False, Fortran order True
#   in C order:        largest error 0, |Q' A Q - diagonal| 4.41e-15
#   in Fortran order:  largest error 1.71, |Q' A Q - diagonal| 3.95
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 scipy==1.17.1 safetensors==0.8.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import scipy.linalg
from safetensors.numpy import load, save

A = np.array([[4.0, 1.0, 2.0], [1.0, 3.0, 0.5], [2.0, 0.5, 1.0]])
values, Q = scipy.linalg.eigh(A)
flags = Q.flags
print(
    "eigenvectors Q of a symmetric 3 x 3 matrix, by scipy.linalg.eigh: "
    f"C order {flags.c_contiguous}, Fortran order {flags.f_contiguous}"
)
errors = {}
for order, array in (("C", np.ascontiguousarray(Q)), ("Fortran", Q)):
    again = load(save({"Q": array}))["Q"]
    kept = again.shape == Q.shape and again.dtype == Q.dtype
    kept &= np.array_equal(np.sort(again, axis=None), np.sort(Q, axis=None))  # the same numbers, somewhere
    errors[order] = float(np.abs(again - Q).max())
    missed = float(np.abs(again.T @ A @ again - np.diag(values)).max())
    print(f"{f'in {order} order:':<18} largest error {errors[order]:.3g}, |Q' A Q - diagonal| {missed:.3g}")

if not (kept and flags.f_contiguous and not flags.c_contiguous and errors["C"] == 0 and errors["Fortran"] > 0.1):
    sys.exit("No longer so: the round trip of an array in Fortran order has changed.")
PYTHON
