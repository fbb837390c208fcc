# SPDX-License-Identifier: Apache-2.0
"""Op `layout` of family `ht` at run time: counts a rank's own routing, without any other rank."""

from __future__ import annotations

import torch

from moegen.kernels.ht_layout import HighThroughputLayout
from moegen.rows import Layout
from moegen.runtime.bound import BoundKernel
from moegen.runtime.kernel import LoadedKernel
from moegen.runtime.watchdog import Watchdog

_VARYING = ("topk_idx", "counters", "token_in_rank", "tokens", "wide_ids")


MAX_BLOCKS = 128
"""More would count fewer tokens each than they have warps, and only add to the additions at the end."""


class LayoutOp:
    """One rank's `layout`; the kernel is loaded already."""

    def __init__(self, kernel: LoadedKernel, device: torch.device, ranks_per_device: int) -> None:
        spec = kernel.spec
        assert isinstance(spec, HighThroughputLayout)
        self._spec, self._device = spec, device
        self._watchdog = Watchdog([spec.stem], {}, 0.0, pinned=device.type == "cuda")
        fixed = {"failure": self._watchdog.address(0)}
        blocks = kernel.blocks(ranks_per_device, MAX_BLOCKS if device.type == "cuda" else None)
        self._bound = BoundKernel(kernel, spec.params, blocks, fixed, _VARYING)

    def __call__(self, topk_idx: torch.Tensor) -> Layout:
        """`topk_idx` is checked already."""
        ranks, experts = self._spec.num_ranks, self._spec.num_experts
        tokens = topk_idx.shape[0]
        counters = torch.zeros(ranks + experts, dtype=torch.int32, device=self._device)
        token_in_rank = torch.empty(tokens, ranks, dtype=torch.bool, device=self._device)
        self._bound(
            topk_idx.data_ptr(),
            counters.data_ptr(),
            token_in_rank.data_ptr(),
            tokens,
            topk_idx.dtype == torch.int64,
        )
        return Layout(counters[:ranks], counters[ranks:], token_in_rank)

    def raise_what_happened(self) -> None:
        self._watchdog.raise_what_happened()
