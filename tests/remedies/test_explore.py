"""What is said to type by upweight/explore, typed."""

from __future__ import annotations

import shutil
import socket

import numpy as np

import upweight as uw
from explored import browser, influence, queries, write
from refusals import refused
from upweight.explore.comparing import together
from upweight.explore.explorer import Explorer
from upweight.explore.server import bound
from upweight.runs.files import read_tensors, write_tensors


def test_a_run_says_what_its_rows_are_before_it_is_explored(tmp_path):
    path = tmp_path / "run"
    influence().on_loss(*queries(), store=path)
    with refused(" holds scores only: ", "uw.write_run(influence, "):
        Explorer.open(path)
    uw.write_run(influence(), path, *queries())
    assert browser(path).get("/").status_code == 200


def test_a_run_that_lacks_some_items_is_filled(tmp_path):
    path = tmp_path / "run"
    write(path)
    file = path / "items-000000.safetensors"
    arrays, card = read_tensors(file)
    few = {name: array[:9] if len(array) == 500 else array for name, array in arrays.items()}
    few["cards"] = few["cards"][: int(few["card_ends"][-1])]
    if "labels" in few and few["labels"].dtype == "uint8":
        del few["labels"], few["predictions"]
    write_tensors(file, few, card)
    with refused(" rows are, and has scores of ", "Make the call again that made it"):
        Explorer.open(path)
    file.unlink()
    write(path)
    assert Explorer.open(path).n == 500


def test_links_out_of_the_folder_are_deleted(tmp_path):
    path = tmp_path / "run"
    write(path)
    Explorer.open(path)
    (path / "explorer").rename(tmp_path / "elsewhere")
    (path / "explorer").symlink_to(tmp_path / "elsewhere")
    with refused(" leads out of ", "Delete the link"):
        Explorer.open(path)
    (path / "explorer").unlink()
    assert Explorer.open(path).n == 500


def test_runs_of_other_queries_are_not_compared(tmp_path):
    one, other, same = (tmp_path / name for name in ("one", "other", "same"))
    write(one)
    Xq, yq = queries()
    uw.write_run(influence(), other, Xq[:5], yq[:5])
    with refused(" is not of the same rows and queries as ", "runs that write_run made of the same data and queries"):
        together(one, other)
    uw.write_run(influence(curvature=uw.operators.EmpiricalFisher(), damping=0.1), same, Xq, yq)
    assert browser(one, same).get("/compare").status_code == 200


def test_an_address_is_one_of_this_machine():
    with refused(" is no address. ", "Name one of this machine, such as 127.0.0.1"):
        bound("everywhere", 0, beyond=False)
    bound("127.0.0.1", 0, beyond=False).close()


def test_other_machines_are_let_in_by_name_only():
    with refused(" would show the run to other machines", "add --beyond-this-machine"):
        bound("0.0.0.0", 0, beyond=True)
    with refused(" would show the run to other machines", "Leave it out and use"):
        bound("192.0.2.1", 0, beyond=False)
    bound("127.0.0.1", 0, beyond=False).close()


def test_a_port_that_is_taken_is_left_out():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with refused(" cannot be listened at (", "Leave out --port"):
            bound("127.0.0.1", taken.getsockname()[1], beyond=False)
        bound("127.0.0.1", 0, beyond=False).close()


def test_an_index_that_is_damaged_while_it_is_read_is_deleted(tmp_path):
    write(tmp_path / "run")
    explorer = Explorer.open(tmp_path / "run")
    file = tmp_path / "run" / "explorer" / "values.f64"
    right = explorer.line(0)
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with refused(" is not what was written: some of its bits are others", "delete "):
        explorer.line(0)
    shutil.rmtree(tmp_path / "run" / "explorer")
    assert np.array_equal(Explorer.open(tmp_path / "run").line(0), right)


def test_the_index_can_be_deleted_at_any_time(tmp_path):
    write(tmp_path / "run")
    Explorer.open(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "explorer")
    assert Explorer.open(tmp_path / "run").n == 500
