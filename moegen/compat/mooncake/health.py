# SPDX-License-Identifier: Apache-2.0
"""Mooncake's `active_ranks`: who takes part, told with every call and written by it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from moegen import admission
from moegen.compat.low_latency import Layers
from moegen.errors import InputError
from moegen.runtime.ownership import write_anyway


class Health:
    """The tensors that calls are given, and the one that kernels know: the first one. Any other is copied there before
    a call, and gets what became of it behind the call.

    Args:
        layers: whose objects take the mask; None: all ranks take part in every call, and nothing is read or written.
    """

    def __init__(self, layers: Layers | None, num_ranks: int) -> None:
        self._layers = layers
        self._num_ranks = num_ranks

    def of_call(self, active_ranks: torch.Tensor, device: torch.device) -> Callable[[], None]:
        """Tells the kernels of the next call; what it returns is to be called once that call is over.

        Raises:
            InputError: the tensor does not fit.
        """
        self._check(active_ranks, device)
        if self._layers is None:
            return _nothing
        mask = self._layers.keep_in(active_ranks)
        if mask.data_ptr() == active_ranks.data_ptr():
            return _nothing
        write_anyway(mask, active_ranks)
        return partial(write_anyway, active_ranks, mask)

    def _check(self, given: torch.Tensor, device: torch.device) -> None:
        fits = isinstance(given, torch.Tensor) and given.dtype == torch.int32 and given.is_contiguous()
        if not fits or given.shape != (self._num_ranks,) or given.device != device:
            said = f"{given.dtype} {list(given.shape)} on {given.device}" if isinstance(given, torch.Tensor) else given
            raise InputError(
                f"active_ranks is a contiguous torch.int32 [{self._num_ranks}] on {device}, one number per rank (1: it "
                f"takes part); got {said}"
            )
        admission.written("active_ranks", given)


def _nothing() -> None:
    pass
