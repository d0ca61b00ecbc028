#!/usr/bin/env bash
# Equal tensors and equal metadata of two keys or more make files of different bytes, from process to process.
#
# Library: safetensors 0.8.0, numpy 2.4.6.
# Surprise: the metadata of a file lie in a hash map with a random seed, and are written in the order in which it is
#   walked. save() of the same tensors with the same metadata gives one of k! files for k keys; with one key, or none, always
#   the same. A checksum of the file, a cache that goes by content, or a test that compares bytes finds a change where
#   there is none, now and then.
# Expected: equal content, equal bytes, as it is for the tensors, which are sorted.
# Where upweight meets it: runs/files.py keeps everything that is told of the numbers in one JSON text under one key;
#   tests/unit/runs/test_files.py compares the bytes that two processes write.
#
# Seen: 20 processes, three keys: 6 different files (3 to 6, by chance); one key: 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 safetensors==0.8.0
digests() {
  for _ in $(seq 20); do
    "$folder/venv/bin/python" - "$@" <<'PYTHON'
import hashlib
import sys

import numpy as np
from safetensors.numpy import save

content = save({"b": np.zeros(2), "a": np.ones(3)}, metadata={key: "told" for key in sys.argv[1:]})
print(hashlib.sha256(content).hexdigest())
PYTHON
  done | sort -u | wc -l
}
several=$(digests damping measure rows)
one=$(digests damping)
echo "20 processes: $several different files with three keys of metadata, $one with one key"
[ "$several" -ge 2 ] && [ "$one" -eq 1 ]
