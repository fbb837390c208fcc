# SPDX-License-Identifier: Apache-2.0
"""How one order is taken away from a kernel."""

from __future__ import annotations

from host.sanitize.build import KERNEL, Edit

EPOCH = "moegen/epoch.cuh"
LAUNCH = "moegen/launch.cuh"
ROUTING = "moegen/routing.cuh"
SIGNAL = "moegen/signal.cuh"

RELAXED = "[](auto* to, auto word) { host::store_word(to, word, __ATOMIC_RELAXED, {}); }"


def relaxed_store(target: str, file: str = KERNEL) -> Edit:
    """The store to a place that begins with `target`, with its value but without order."""
    return Edit(file, rf"store_release_sys\((?={target})", f"{RELAXED}(")


def relaxed_load(word: str, after: str = "", file: str = KERNEL) -> Edit:
    """The load of what `word` points to, behind `after`, with its value but without order."""
    relaxed = f"host::load_word({word}, __ATOMIC_RELAXED, {{}})"
    return Edit(file, rf"({after})load_acquire_sys\({word}\)", rf"\1{relaxed}")


def barrier_before(target: str, barrier: str = "__syncwarp") -> Edit:
    """Takes away the last barrier before `target`."""
    return Edit(KERNEL, rf"{barrier}\(\);(?=(?:(?!{barrier}).){{,320}}{target})", "")


def leaving(order: str) -> Edit:
    """How a block tells, and the last one learns, that the blocks of a launch have left its epoch."""
    pattern = r"atomic_add_acq_rel_gpu\((&control->blocks_left), 1\)"
    return Edit(EPOCH, pattern, rf"__atomic_fetch_add(\1, 1, {order})")


CONSUMED = {
    "consumed_store": relaxed_store(r"consumed_at\(", EPOCH),
    "consumed_load": relaxed_load("word", file=LAUNCH),
}
"""How ranks know that what they overwrite has been read."""

REPORT = Edit(SIGNAL, r"store_release_sys(?=\(&failure->valid)", "store_relaxed_sys")
"""How the host learns that all of a report is there."""
