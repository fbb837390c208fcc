# SPDX-License-Identifier: Apache-2.0
"""Ranks of two machines, as far as one machine has them: 2 x 2 processes in two network namespaces, gloo over TCP."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests/support/namespaces.sh"
SECONDS = 240

pytestmark = pytest.mark.dist

# When the first process of the process namespace ends, so do all others in it, and the networks with them.
OWN_NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child")
AS_ROOT, AS_USER = ("unshare", *OWN_NAMESPACES), ("unshare", "--map-root-user", *OWN_NAMESPACES)


def in_namespaces(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in all four ranks, as root or in a user namespace, whichever is allowed; else skips the test."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("there are no programs unshare and ip to make network namespaces with")
    why = ""
    for start in (AS_ROOT, AS_USER):
        done = subprocess.run(
            [*start, str(SCRIPT), *command], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS
        )
        if done.stdout.startswith("READY"):
            return done
        why = done.stderr.strip()
    pytest.skip(f"network namespaces are not allowed here: {why}")


def test_round_trips_between_two_networks() -> None:
    done = in_namespaces(sys.executable, "tests/support/namespace_rank.py")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[1:-1]) == [f"rank {rank}: ok" for rank in range(4)]


def test_a_rank_that_fails_fails_the_test() -> None:
    done = in_namespaces("sh", "-c", 'test "$RANK" != 3 && test "$GLOO_SOCKET_IFNAME" != ""')
    assert done.stdout == "READY\n"
    assert done.returncode != 0
