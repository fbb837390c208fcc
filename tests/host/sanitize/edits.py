# SPDX-License-Identifier: Apache-2.0
"""How one order is taken away from a kernel."""

from __future__ import annotations

from host.sanitize.build import KERNEL, Edit

LAUNCH = "moegen/launch.cuh"
SIGNAL = "moegen/signal.cuh"

RELAXED = "[](auto* to, auto word) { host::store_word(to, word, __ATOMIC_RELAXED, {}); }"


def relaxed_store(target: str) -> Edit:
    """The store to a place that begins with `target`, with its value but without order."""
    return Edit(KERNEL, rf"store_release_sys\((?={target})", f"{RELAXED}(")


def relaxed_load(word: str, after: str = "") -> Edit:
    """The load of what `word` points to, behind `after`, with its value but without order."""
    relaxed = f"host::load_word({word}, __ATOMIC_RELAXED, {{}})"
    return Edit(KERNEL, rf"({after})load_acquire_sys\({word}\)", rf"\1{relaxed}")


def barrier_before(target: str, barrier: str = "__syncwarp") -> Edit:
    """Takes away the last barrier before `target`."""
    return Edit(KERNEL, rf"{barrier}\(\);(?=(?:(?!{barrier}).){{,320}}{target})", "")


def entering(order: str) -> Edit:
    """How a block tells, and the last one learns, that the blocks of a launch have read its epoch."""
    pattern = r"atomic_add_acq_rel_gpu\((&control->blocks_entered), 1\)"
    return Edit(LAUNCH, pattern, rf"__atomic_fetch_add(\1, 1, {order})")


REPORT = Edit(SIGNAL, r"store_release_sys(?=\(&failure->valid)", "store_relaxed_sys")
"""How the host learns that all of a report is there."""
