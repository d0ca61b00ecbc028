"""Files that say whether they are what was written: no bit of one may change a number without a word."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from small import refuses
from upweight.errors import Damaged, UpweightError
from upweight.runs.files import check_room, read_tensors, write_tensors
from upweight.runs.store import Store

ARRAYS = {"b": np.arange(6.0).reshape(2, 3), "a": np.array([1, 2], dtype=np.int32), "none": np.zeros((0, 4))}
CARD = {"n": 7, "text": "λ ≥ 0", "axes": [["row", None]]}


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "file"
    write_tensors(path, ARRAYS, CARD)
    return path.read_bytes()


def same(found):
    arrays, card = found
    equal = arrays.keys() == ARRAYS.keys() and all(
        np.array_equal(arrays[name], array) and arrays[name].dtype == array.dtype for name, array in ARRAYS.items()
    )
    return equal and card == CARD


def test_every_bit_counts(content, tmp_path):
    """With a bit flipped a file is refused, but in the names of card and digest: all numbers are as they were."""
    path, silent = tmp_path / "file", []
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(bytes(changed))
        try:
            arrays, card = read_tensors(path)
        except Damaged:
            continue
        assert same((arrays, CARD)), place
        if card != CARD:  # a bit may also choose between two ways of writing the same letter
            silent.append(place // 8)
            assert {name: value for name, value in card.items() if name in CARD} in ({}, CARD), place
    names = [(content.index(name), len(name)) for name in (b"sha256", b"upweight")]
    assert set(silent) <= {place for start, length in names for place in range(start, start + length)}


def test_a_file_that_was_cut_is_refused(content, tmp_path):
    path = tmp_path / "file"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(Damaged):
            read_tensors(path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused_and_nothing_else(tmp_path_factory, junk):
    path = tmp_path_factory.getbasetemp() / "junk"
    path.write_bytes(junk)
    with pytest.raises(UpweightError):
        read_tensors(path)


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1])
def test_a_head_that_claims_to_be_huge_is_refused(tmp_path, length):
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(Damaged):
        read_tensors(path)


def test_the_page_in_the_docs_reads_a_file_without_this_library(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "store-format.md").read_text()
    code = page.split("```py\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    Store("folder", {}).write(0, ARRAYS["b"])
    read = {}
    exec(code, read)
    assert np.array_equal(read["arrays"]["values"], ARRAYS["b"])
    with Path("folder/chunk-000000.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(AssertionError):
        exec(code, read)


def test_equal_content_has_equal_bytes_in_every_process(content, tmp_path):
    code = (
        "import sys, json, numpy as np; from upweight.runs.files import write_tensors; "
        "arrays = {'none': np.zeros((0, 4)), 'a': np.array([1, 2], dtype=np.int32)}; "
        "arrays['b'] = np.arange(6.0).reshape(2, 3); "
        "write_tensors(sys.argv[1], arrays, dict(reversed(json.loads(sys.argv[2]).items())))"
    )
    for seed in ("1", "2"):
        path = tmp_path / seed
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.run([sys.executable, "-c", code, str(path), json.dumps(CARD)], check=True, env=environment)
        assert path.read_bytes() == content


def test_files_of_version_0_1_are_read(tmp_path):
    from safetensors.numpy import save_file

    save_file(ARRAYS, tmp_path / "file", metadata={"upweight": json.dumps(CARD)})
    assert same(read_tensors(tmp_path / "file"))


def test_room_is_looked_for_where_the_folder_will_be(tmp_path):
    check_room(tmp_path / "not" / "there", 1)
    refuses(lambda: check_room(tmp_path / "not" / "there", 2**80), OSError, r"would take 1.2")
