# SPDX-License-Identifier: Apache-2.0
"""The handle of DeepEP's normal mode: six tensors, each made when it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import torch

from moegen.compat.rows import Shape
from moegen.rows import RowsHandle
from moegen.runtime.ownership import ProcessBound
from moegen.runtime.streams import record

Tensor = torch.Tensor


class NormalHandle(ProcessBound, tuple[Any, ...]):
    """DeepEP's six elements. Frameworks pass the handle on and read nothing, so an element costs nothing until it is
    read. R ranks, T tokens of this rank, n rows received; a source's tokens are split into C = num_sms / 2 channels of
    ceil(tokens / C) each, as DeepEP's senders do. Rows that nothing came for have -1 and count nowhere.

    0. rank_prefix_matrix: int32 [R, R]: tokens that ranks 0..i send to rank j.
    1. channel_prefix_matrix: int32 [R, C]: this rank's tokens for rank i in channels 0..c.
    2. recv_channel_prefix_matrix: int32 [R, C]: rows from rank i in channels below c.
    3. recv_src_idx: int32 [n]: which of its source's tokens a row is.
    4. is_token_in_rank: bool [T, R].
    5. send_head: int32 [T, R]: how many earlier tokens of its channel go to that rank; -1: the token does not.

    Attributes:
        shape, received: what further calls need.
    """

    _noun: ClassVar[str] = "handle"
    _belongs_to: ClassVar[str] = "its process and its Buffer"

    shape: Shape
    received: RowsHandle
    _num_channels: int
    _is_token_in_rank: Tensor
    _made: dict[int, Tensor]

    @staticmethod
    def of(shape: Shape, received: RowsHandle, num_sms: int, is_token_in_rank: Tensor) -> NormalHandle:
        handle = NormalHandle((None,) * len(_ELEMENTS))
        handle.shape, handle.received = shape, received
        handle._num_channels = max(1, num_sms // 2)
        handle._is_token_in_rank = is_token_in_rank
        handle._made = {}
        return handle

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(len(self))[index])
        number = range(len(self))[index]
        if number not in self._made:
            memory = self.received.memory
            record(memory.device, (memory, self._is_token_in_rank))
            self._made[number] = _ELEMENTS[number](self)
        return self._made[number]

    def forget(self, number: int) -> None:
        """Makes that element again when it is read next."""
        self._made.pop(number, None)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    @property
    def _source_counts(self) -> Tensor:
        return cast(Tensor, self.received.numbers.source_counts)

    def _rank_prefix(self) -> Tensor:
        return self._source_counts[:, 1:].cumsum(dim=0, dtype=torch.int32)

    def _channels_of_tokens(self) -> Tensor:
        """Int64 [T]."""
        tokens = len(self._is_token_in_rank)
        per_channel = max(1, -(-tokens // self._num_channels))
        return torch.arange(tokens, dtype=torch.int64, device=self._is_token_in_rank.device) // per_channel

    def _sent_per_channel(self) -> Tensor:
        """Int32 [C, R]."""
        goes = self._is_token_in_rank.int()
        counts = torch.zeros(self._num_channels, goes.shape[1], dtype=torch.int32, device=goes.device)
        return counts.index_add_(0, self._channels_of_tokens(), goes)

    def _channel_prefix(self) -> Tensor:
        return self._sent_per_channel().cumsum(dim=0, dtype=torch.int32).t().contiguous()

    def _send_head(self) -> Tensor:
        goes = self._is_token_in_rank.int()
        sent = self._sent_per_channel()
        before_channel = sent.cumsum(dim=0, dtype=torch.int32) - sent
        before_token = goes.cumsum(dim=0, dtype=torch.int32) - goes
        head = before_token - before_channel[self._channels_of_tokens()]
        return head.masked_fill_(~self._is_token_in_rank, -1)

    def _sources_of_rows(self) -> Tensor:
        """Int64 [n]: rank of each row; R where nothing came."""
        ends = self.received.numbers.first_rows[1:]
        return torch.searchsorted(
            ends, torch.arange(self.received.rows, dtype=torch.int64, device=ends.device), right=True
        )

    def _recv_src_idx(self) -> Tensor:
        tokens = self.received.numbers.row_tokens[: self.received.rows]
        ranks = len(self._source_counts)
        return torch.where(self._sources_of_rows() < ranks, tokens, -1).to(torch.int32)

    def _recv_channel_prefix(self) -> Tensor:
        ranks, channels = len(self._source_counts), self._num_channels
        per_channel = (self._source_counts[:, 0] + channels - 1) // channels
        sources = self._sources_of_rows()
        came = sources < ranks
        channel = self[3] // per_channel.clamp(min=1)[sources.clamp(max=ranks - 1)]
        at = torch.where(came, sources * channels + channel, ranks * channels)
        counts = torch.zeros(ranks * channels + 1, dtype=torch.int32, device=at.device)
        counts.index_add_(0, at, came.int())
        per_source = counts[:-1].view(ranks, channels)
        return per_source.cumsum(dim=1, dtype=torch.int32) - per_source


_ELEMENTS: tuple[Callable[[NormalHandle], Tensor], ...] = (
    NormalHandle._rank_prefix,
    NormalHandle._channel_prefix,
    NormalHandle._recv_channel_prefix,
    NormalHandle._recv_src_idx,
    lambda handle: handle._is_token_in_rank,
    NormalHandle._send_head,
)
