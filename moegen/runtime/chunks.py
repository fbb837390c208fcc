# SPDX-License-Identifier: Apache-2.0
"""Path collective: where the chunks of one kind of call lie. Laid out once and kept: slices of tensors cost the host
microseconds each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moegen.kernels.coll import chunk_planes


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

    def _view(self, dtype: torch.dtype, columns: int, place: int) -> torch.Tensor:
        width = columns * dtype.itemsize
        plane = self.came.view(self._ranks, self.size)[:, place : place + self._slots * width]
        view: torch.Tensor = plane.view(dtype).unflatten(1, (self._slots, columns))
        return view
