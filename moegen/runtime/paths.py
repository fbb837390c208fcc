# SPDX-License-Identifier: Apache-2.0
"""Which path joins the ranks of a world."""

from __future__ import annotations

import logging

from moegen import env
from moegen.errors import UnsupportedPlatformError
from moegen.runtime.worlds import RankWorld

log = logging.getLogger(__name__)

PATHS = ("ipc", "collective")

_PROBE_BYTES = 4096


def choose(world: RankWorld, wanted: str) -> str:
    """`wanted`, or for "auto" the best that all ranks have: ipc where every rank's memory can be mapped into every
    other, else collective. All ranks call it.
    """
    if wanted != "auto":
        return wanted
    answers = world.exchange("" if env.peer_access() else "MOEGEN_PEER_ACCESS=0", "which paths they have")
    why = next((answer for answer in answers if answer), "")
    if not why:
        try:
            world.allocate(_PROBE_BYTES).give_back()
        except UnsupportedPlatformError as error:
            why = str(error)
    path = "collective" if why else "ipc"
    log.info("rank %d of %s: path %s%s", world.rank, world.description, path, f" ({why})" if why else "")
    return path
