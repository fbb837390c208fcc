# SPDX-License-Identifier: Apache-2.0
"""Path collective: where things lie that are exchanged. Slices of tensors cost the host microseconds each; what does
not change between calls is laid out once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from moegen.kernels.coll import MAX_HEADER_BYTES, chunk_planes, header_bytes, part_bytes
from moegen.payloads import ExchangedRows
from moegen.runtime.ownership import lasting
from moegen.runtime.streams import read_by_host


class Chunks:
    """One chunk per rank to send, and one per rank that comes.

    Args:
        to_send, to_receive: bytes of this rank's with room for them.
        ranks: chunks in each.
        widths: bytes per token of each payload.
        slots: rows that a source may send to a rank.
        words: statistics of a rank.

    Attributes:
        planes: where the planes of the payloads begin in a chunk, bytes.
        size: bytes of a chunk.
        sent, came: the chunks themselves.
    """

    def __init__(
        self,
        to_send: torch.Tensor,
        to_receive: torch.Tensor,
        ranks: int,
        widths: tuple[int, ...],
        slots: int,
        words: int,
    ) -> None:
        *self.planes, self.size = chunk_planes(widths, slots, words)
        self.sent, self.came = to_send[: ranks * self.size], to_receive[: ranks * self.size]
        self._ranks, self._slots = ranks, slots
        self._views: dict[tuple[torch.dtype, ...], list[torch.Tensor]] = {}

    def views(self, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What has come, as [ranks, slots, columns] of each payload, with the dtypes and columns of `parts`: a source's
        rows side by side, sources a chunk apart. New tensors in every call, which the user may do anything with.
        """
        dtypes = tuple([part.dtype for part in parts])
        views = self._views.get(dtypes)
        if views is None:
            views = self._views[dtypes] = [
                self._view(part.dtype, part.shape[1], place) for part, place in zip(parts, self.planes, strict=True)
            ]
        return tuple([view.detach() for view in views])

    @lasting()
    def _view(self, dtype: torch.dtype, columns: int, place: int) -> torch.Tensor:
        width = columns * dtype.itemsize
        plane = self.came.view(self._ranks, self.size)[:, place : place + self._slots * width]
        view: torch.Tensor = plane.view(dtype).unflatten(1, (self._slots, columns))
        return view


class Headers:
    """Of calls that exchange counts first: they cross by themselves.

    Attributes:
        addresses: of those that go, and of the int32 [2, ranks] for rows from each source and rows to each rank.
    """

    def __init__(self, ranks: int, device: torch.device) -> None:
        self._memory = torch.zeros(2, ranks * MAX_HEADER_BYTES, dtype=torch.uint8, device=device)
        self._exchanged = torch.zeros(2, ranks, dtype=torch.int32, device=device)
        self._ranks = ranks
        self.addresses = self._memory.data_ptr(), self._exchanged.data_ptr()

    def of(self, words: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those that go and those that come, with so many words of statistics each."""
        sent, came = self._memory[:, : self._ranks * self.size(words)]
        return sent, came

    def size(self, words: int) -> int:
        """Bytes of one."""
        return header_bytes(words)

    def read(self) -> ExchangedRows:
        """What is exchanged. Waits for the current stream; torch lets go of the GIL."""
        came, sent = read_by_host(self._exchanged)
        return ExchangedRows(tuple(came), tuple(sent))


class Line(NamedTuple):
    """Rows without gaps, a part for each rank.

    Attributes:
        memory: all of them.
        address: of the memory, even where there are none.
        sizes: of the parts, bytes.
        begins: of the parts, from the line's begin.
    """

    memory: torch.Tensor
    address: int
    sizes: list[int]
    begins: list[int]

    @staticmethod
    def of(widths: tuple[int, ...], memory: torch.Tensor, rows: Sequence[int]) -> Line:
        """At the begin of `memory`, of so many rows for each rank."""
        sizes = part_bytes(widths, rows)
        *begins, end = accumulate(sizes, initial=0)
        return Line(memory[:end], memory.data_ptr(), sizes, begins)
