# SPDX-License-Identifier: Apache-2.0
"""The all-to-all of path collective in a torch process group: what becomes of it when ranks are missing."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from moegen.errors import MissingRanksError, MoegenError, UnsupportedPlatformError, WorldError
from moegen.runtime.group_exchange import exchange_of
from moegen.runtime.waiting import SLICE_SECONDS, raise_if_pointless

log = logging.getLogger(__name__)

Sizes = tuple[Sequence[int], Sequence[int]]

_SLICE = timedelta(seconds=SLICE_SECONDS)


class TensorExchange:
    """One rank's end."""

    def __init__(self, group: Any, rank: int, device: torch.device) -> None:
        self._group, self._rank, self._device = group, rank, device
        self._exchange = exchange_of(group)
        self._last: torch.cuda.Event | None = None
        self._has_worked = False

    def __call__(self, output: torch.Tensor, given: torch.Tensor, sizes: Sizes | None, seconds: float) -> None:
        """See `RankWorld.all_to_all`."""
        if self._exchange is not None:
            self._exchange.raise_if_broken()
        begin = time.monotonic()
        came, sent = (None, None) if sizes is None else map(list, sizes)
        try:
            if self._device.type == "cuda":
                self._enqueue(output, given, came, sent)
            else:
                self._wait(output, given, came, sent, seconds)
        except Exception as error:
            raise self._failed(error, time.monotonic() - begin) from error
        except BaseException as error:  # Ctrl-C: this rank is out of step
            if self._exchange is not None:
                self._exchange.give_up(error)
            raise
        self._has_worked = True

    def _enqueue(
        self, output: torch.Tensor, given: torch.Tensor, came: list[int] | None, sent: list[int] | None
    ) -> None:
        torch.distributed.all_to_all_single(output, given, came, sent, group=self._group)
        if not torch.cuda.is_current_stream_capturing():
            if self._last is None:
                self._last = torch.cuda.Event()
            self._last.record(torch.cuda.current_stream(self._device))

    def _wait(
        self, output: torch.Tensor, given: torch.Tensor, came: list[int] | None, sent: list[int] | None, seconds: float
    ) -> None:
        """In slices, between which signals act."""
        work: Any = torch.distributed.all_to_all_single(output, given, came, sent, group=self._group, async_op=True)
        deadline = time.monotonic() + seconds
        while work is not None:
            try:
                work.wait(_SLICE)
                return
            except RuntimeError:
                if work.is_completed():  # it has failed, and says why
                    work.wait()
                    return
            raise_if_pointless()
            if time.monotonic() > deadline:
                raise RuntimeError(f"it was not over after {seconds:g} s")

    def raise_if_ranks_are_gone(self) -> None:
        """See `RankWorld.raise_if_ranks_are_gone`. On a CPU, calls are over when they return."""
        if self._last is None or self._last.query():
            return
        if self._exchange is not None:
            self._exchange.raise_if_gone()

    def _failed(self, error: Exception, waited: float) -> MoegenError:
        """What the failure is for all ranks."""
        if isinstance(error, MoegenError):
            return error
        reason = str(error).strip() or type(error).__name__
        failure: MoegenError | None = None
        if self._exchange is not None:
            try:
                failure = self._exchange.missing_after_failure("tensors", waited)
            except WorldError as unknown:
                failure = unknown
        if failure is None and not self._has_worked:
            return UnsupportedPlatformError(
                f"the group cannot exchange tensors on {self._device.type}: {reason}. Path collective needs one whose "
                "backend can (nccl for GPUs, gloo or mpi for CPUs)"
            )
        failure = failure or WorldError(f"the ranks could not exchange tensors: {reason}. {MissingRanksError.ADVICE}")
        if self._exchange is not None:
            self._exchange.give_up(failure)
        return failure
