#!/usr/bin/env bash
# Adding a float32 tensor in place to a float64 one holds a float64 copy of the whole of it for a moment.
#
# Library: torch 2.13.0, on the CPU.
# Surprise: total.add_(part) takes 8 bytes for every number of `part` beside both tensors, so that a sum kept in float64
#   of what a float32 model gives needs twice the memory of the addend once more; in place, and nothing says so.
# Expected: the addition reads float32 and writes float64, number by number, as it does where both are float64.
# Where upweight meets it: sums over rows are float64 whatever the model's precision. The largest ones, the covariances
#   of Kronecker factors, are added in parts (model/chunks.py): 17.7 bytes an entry at the peak in place of 21.
#
# Seen: 8.0 bytes a number for float32, 0.0 for float64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6"
cat > "$folder/adds.py" <<'PYTHON'
import resource
import sys

import torch

n = 2**26
total, part = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=getattr(torch, sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total.add_(part)
print(round(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / n, 1))
PYTHON
single=$("$folder/venv/bin/python" "$folder/adds.py" float32)
double=$("$folder/venv/bin/python" "$folder/adds.py" float64)
echo "bytes more for each number that is added to a float64 sum in place: float32 $single, float64 $double"
python3 -c "import sys; sys.exit(not (7 < $single < 9 and $double < 1))" || { echo "no longer as stated"; exit 1; }
