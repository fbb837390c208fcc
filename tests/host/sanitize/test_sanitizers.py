# SPDX-License-Identifier: Apache-2.0
"""The low-latency kernels under ThreadSanitizer and AddressSanitizer: clean as they are, and every order that they rest
on is missed where it is taken away.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from simt_harness import Toolchain

from host.sanitize.build import KERNEL, SIGNAL, Edit, Variant, build, variant, weakened
from moegen.kernels.spec import WarpGroups

DRIVER = Path(__file__).with_name("driver.cpp")
RIGHT = [
    variant("inline", "atdispatch", WarpGroups(2, 1)),
    variant("inline", "atcombine", WarpGroups(1, 2)),
    variant("row", "atdispatch", WarpGroups(2, 1)),
    variant("row", "atcombine", WarpGroups(2, 1)),
    variant("row", "atdispatch", WarpGroups(1, 2)),
    variant("row", "atcombine", WarpGroups(2, 2)),
]
"""Together: both wire formats, both times of weights, each of a team's three kinds of barrier."""

ROW = RIGHT[2]


def relaxed_store(target: str) -> Edit:
    relaxed = "[](auto* to, auto word) { host::store_word(to, word, __ATOMIC_RELAXED, {}); }"
    return Edit(KERNEL, f"store_release_sys({target}(", f"{relaxed}({target}(")


def last_to_enter(order: str) -> Edit:
    old = "atomic_add_acq_rel_gpu(&control->blocks_entered, 1)"
    return Edit(SIGNAL, old, f"__atomic_fetch_add(&control->blocks_entered, 1, {order})")


def without(barrier: str, before: str) -> Edit:
    return Edit(KERNEL, f"    {barrier};\n{before}", before)


TAG_LOAD = Edit(KERNEL, "load_acquire_sys(tag)", "host::load_word(tag, __ATOMIC_RELAXED, {})")
CONSUMED_LOAD = Edit(KERNEL, "load_acquire_sys(consumed_at", "load_relaxed_sys(consumed_at")
DISPATCH_TAGS = "    for (uint32_t to = team_thread(); to < num_destinations"
COMBINE_TAG = "        if (team_thread() == 0) store_release_sys(tag_at"

WEAKENED = [
    *(
        weakened(ROW, op, name, edit)
        for op in ("dispatch", "combine")
        for name, edit in {
            "tag_store": relaxed_store("tag_at"),
            "tag_load": TAG_LOAD,
            "consumed_store": relaxed_store("consumed_at"),
            "consumed_load": CONSUMED_LOAD,
            "last_to_enter": last_to_enter("__ATOMIC_RELAXED"),
            "last_to_enter_release": last_to_enter("__ATOMIC_ACQUIRE"),
            "last_to_enter_acquire": last_to_enter("__ATOMIC_RELEASE"),
        }.items()
    ),
    weakened(ROW, "dispatch", "tag_barrier", without("team_sync()", DISPATCH_TAGS)),
    weakened(ROW, "combine", "tag_barrier", without("    team_sync()", COMBINE_TAG)),
]
"""Wire format `inline` has no such order: its payload crosses in relaxed 16-byte atomics, which are no data race."""
