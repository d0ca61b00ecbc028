"""`upweight explore` prints a link, answers at it, and ends quietly with Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import httpx2


def test_the_link_opens_the_run_and_ctrl_c_ends_it(made):
    code = "import signal; signal.signal(2, signal.default_int_handler); from upweight.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", code, "explore", str(made)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        line = ""
        while "http://" not in line:
            line = process.stdout.readline()
        with httpx2.Client(follow_redirects=True) as client:
            assert "Overview" in client.get(line.strip()).text
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, "")
