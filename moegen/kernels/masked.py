# SPDX-License-Identifier: Apache-2.0
"""Parameters that only the kernels have whose peers may be missing."""

from __future__ import annotations

from moegen.kernels.params import Param

WAITING = (
    Param("uint32_t*", "active", "[ranks]: 0: that rank is missing"),
    Param("const Liveness*", "liveness", "where ranks show that they are alive, and which ones they have left out"),
    Param("uint32_t*", "verdicts", "[ranks]: what the blocks of a launch agreed on"),
    Param("uint64_t*", "waited_ns", "[ranks], to which the ns waited for each are added; or null"),
)
SELECTED = (
    Param("int32_t*", "selected_ranks", "[max_tokens, topk]: the rank of each selection, or -1"),
    Param("float*", "selected_weights", "[max_tokens, topk]: as given to dispatch"),
)
RENORMALIZE = (Param("uint32_t", "renormalize", "1: the weights of what was added make up for what is missing"),)
