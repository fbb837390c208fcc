# SPDX-License-Identifier: Apache-2.0
"""Family `a2a`: parameters that its kernels have in common."""

from __future__ import annotations

from moegen.kernels.params import Param

BEGIN = (
    Param("Control*", "control", "this op's epoch"),
    Param("uint32_t*", "aborted", "this object's abort word"),
    Param("Failure*", "failure", "where the host reads what went wrong"),
    Param("uint64_t", "active", "bit r: rank r takes part"),
    Param("uint64_t", "presence_offset", "[rank] u64: the last dispatch that it has done with"),
    Param("uint64_t", "timeout_ns", "how long one wait may take"),
)
ROLES = (
    Param("Blocks", "senders", "blocks that send"),
    Param("Blocks", "receivers", "blocks that receive; the same one if there is only one"),
    Param("uint32_t", "rank", "this rank"),
    Param("uint32_t", "tokens", "tokens of this rank"),
    Param("uint32_t", "slots", "rows that a source may send to a rank in this call"),
    Param("uint32_t", "max_tokens", "the same in any call"),
)
