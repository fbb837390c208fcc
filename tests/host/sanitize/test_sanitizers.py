# SPDX-License-Identifier: Apache-2.0
"""The low-latency kernels under ThreadSanitizer and AddressSanitizer: clean as they are, and every order that they rest
on is missed where it is taken away.
"""

from __future__ import annotations

from pathlib import Path

from host.sanitize.build import KERNEL, SIGNAL, Edit, variant, weakened

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
    return Edit(KERNEL, rf"store_release_sys\((?={target}\()", f"{relaxed}(")


def entering(order: str) -> Edit:
    pattern = r"atomic_add_acq_rel_gpu\((&control->blocks_entered), 1\)"
    return Edit(SIGNAL, pattern, rf"__atomic_fetch_add(\1, 1, {order})")


ORDERS = {
    "tag_store": relaxed_store("tag_at"),
    "tag_load": Edit(KERNEL, r"load_acquire_sys\(tag\)", "host::load_word(tag, __ATOMIC_RELAXED, {})"),
    "tag_barrier": Edit(KERNEL, r"team_sync\(\);(?=(?:(?!team_sync).){,120}store_release_sys\(tag_at\()", ""),
    "consumed_store": relaxed_store("consumed_at"),
    "consumed_load": Edit(KERNEL, r"load_acquire_sys(?=\(consumed_at\()", "load_relaxed_sys"),
    "entering": entering("__ATOMIC_RELAXED"),
    "entering_release": entering("__ATOMIC_ACQUIRE"),
    "entering_acquire": entering("__ATOMIC_RELEASE"),
}
"""What wire format `row` rests on, by name, and how to take it away. `inline` has no such order: its payload crosses in
relaxed 16-byte atomics, which are no data race.
"""
WEAKENED = [weakened(ROW, op, name, edit) for op in ("dispatch", "combine") for name, edit in ORDERS.items()]
