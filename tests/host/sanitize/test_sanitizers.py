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
RELAXED = "__ATOMIC_RELAXED"
TAG_LOAD = Edit(KERNEL, "uint32_t(load_acquire_sys(tag))", f"uint32_t(host::load_word(tag, {RELAXED}, {{}}))")
READ_STORE = Edit(
    KERNEL, "store_release_sys(consumed + p.rank, watch.epoch)", "store_relaxed_sys(consumed + p.rank, watch.epoch)"
)
READ_LOAD = Edit(KERNEL, "load_acquire_sys(consumed + peer)", "load_relaxed_sys(consumed + peer)")


def tag_store(place: str) -> Edit:
    old = f"store_release_sys(tag_at({place}), uint64_t(watch.epoch));"
    return Edit(KERNEL, old, f"host::store_word(tag_at({place}), uint64_t(watch.epoch), {RELAXED}, {{}});")


def last_block(order: str) -> Edit:
    old = "atomic_add_acq_rel_gpu(&control->blocks_done, 1)"
    return Edit(SIGNAL, old, f"__atomic_fetch_add(&control->blocks_done, 1, {order})")


def without(barrier: str, before: str = "", after: str = "") -> Edit:
    return Edit(KERNEL, before + barrier + after, before + after)


# Wire format `inline` has no order to take away that a race detector could miss: its payload is in relaxed atomics.
WEAKENED = [
    weakened(ROW, "dispatch", "tag_store", tag_store("p, outgoing.destinations[to], p.rank, outgoing.places[to]")),
    weakened(ROW, "dispatch", "tag_load", TAG_LOAD),
    weakened(ROW, "dispatch", "read_store", READ_STORE),
    weakened(ROW, "dispatch", "read_load", READ_LOAD),
    weakened(ROW, "dispatch", "last_block", last_block(RELAXED)),
    weakened(ROW, "dispatch", "last_block_release", last_block("__ATOMIC_RELEASE")),
    weakened(ROW, "dispatch", "last_block_acquire", last_block("__ATOMIC_ACQUIRE")),
    weakened(ROW, "combine", "tag_store", tag_store("p, source, p.rank, token")),
    weakened(ROW, "combine", "tag_load", TAG_LOAD),
    weakened(ROW, "combine", "read_store", READ_STORE),
    weakened(ROW, "combine", "read_load", READ_LOAD),
    weakened(ROW, "combine", "last_block", last_block(RELAXED)),
]
