# SPDX-License-Identifier: Apache-2.0
"""Kernels of combine whose sums share scales: for which shapes there are any, and what they need on GPUs."""

from __future__ import annotations

import pytest

from moegen.codegen.render import render
from moegen.compile.binary import obtain
from moegen.compile.target import Target
from moegen.errors import SpecError
from moegen.kernels.a2a import OneSidedCombine
from moegen.kernels.a2a_results import RESULTS
from moegen.kernels.coll import CollectiveSum
from moegen.kernels.spec import Spec, WarpGroups

WORDS = [word for word, result in RESULTS.items() if result.group]
HIDDEN = 7168


@pytest.mark.parametrize(("out", "hidden"), [("mxfp8", 48), ("mxfp8tiled", 16), ("nvfp4", 24), ("nvfp4tiled", 8)])
def test_hidden_is_a_multiple_of_a_group(out: str, hidden: int) -> None:
    with pytest.raises(SpecError, match="a scale for every"):
        OneSidedCombine("bf16", out, 2, hidden, 2, "ipc", WarpGroups(1, 1))


@pytest.mark.parametrize("out", WORDS)
def test_stems_parse_back(out: str) -> None:
    groups = WarpGroups(1, 1)
    specs = (
        OneSidedCombine("bf16", out, 2, 64, 2, "ipc", groups),
        OneSidedCombine("fp32", out, 2, 64, 2, "ipc", groups, rows="pulled"),
        CollectiveSum("e4m3", out, 2, 64, 2, "collective", groups),
    )
    for spec in specs:
        assert Spec.parse(spec.stem) == spec


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    "arch", ["sm90", pytest.param("sm80", marks=pytest.mark.slow), pytest.param("sm100", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("out", WORDS)
def test_nothing_spills(out: str, dtype: str, arch: str) -> None:
    """With the teams of the largest capacities, which leave a thread the fewest registers."""
    for groups in (WarpGroups(2, 7), WarpGroups(4, 4)):
        for ranks in (2, 8):
            made = obtain(render(OneSidedCombine(dtype, out, ranks, HIDDEN, ranks, "ipc", groups)), Target(arch))
            assert made.resources is not None
            assert made.resources.spill_bytes == 0, ranks
