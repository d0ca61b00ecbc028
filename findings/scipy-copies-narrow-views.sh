#!/usr/bin/env bash
# A sparse matrix made with copy=False of views is a copy where they are less than half of their array, else it is not.
#
# Library: SciPy 1.17.1, NumPy 2.4.6.
# Surprise: the constructor of CSR and CSC matrices and arrays ends in prune(), which copies data and indices that are views
#   of arrays more than twice as long. copy=False, and a cut of whole rows by the row pointer, do not change that.
# Expected: of copy=False that the arrays are used as they are, as for a longer view; or a word in the constructor's page.
# Where upweight meets it: operators/sparse.py cuts rows into chunks for products. Through the constructor a matrix of eight
#   chunks was in memory twice; `rows` sets data, indices and indptr of an empty matrix instead.
#
# Seen: of 1,000 rows the first 400 are a copy and the first 600 are not, for csr_matrix, csr_array and csc_array.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 scipy==1.17.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import scipy.sparse

whole = scipy.sparse.random_array((1000, 50), density=0.1, format="csr", rng=np.random.default_rng(0))


def shares(kind, rows):
    """Whether a matrix of the first rows, made without a copy, shares the memory of the whole."""
    last = whole.indptr[rows]
    shape = (50, rows) if kind is scipy.sparse.csc_array else (rows, 50)
    part = kind((whole.data[:last], whole.indices[:last], whole.indptr[: rows + 1]), shape=shape, copy=False)
    return bool(np.shares_memory(part.data, whole.data))


kinds = (scipy.sparse.csr_matrix, scipy.sparse.csr_array, scipy.sparse.csc_array)
seen = {kind.__name__: (shares(kind, 400), shares(kind, 600)) for kind in kinds}
for name, (narrow, wide) in seen.items():
    print(f"{name}: the first 400 rows share the memory of 1,000: {narrow}; the first 600: {wide}")
sys.exit(set(seen.values()) != {(False, True)})
PYTHON
