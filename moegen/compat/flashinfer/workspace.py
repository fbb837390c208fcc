# SPDX-License-Identifier: Apache-2.0
"""What stands behind a workspace tensor, which in FlashInfer is the memory that peers write to."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moegen.compat.flashinfer import checks, communicators, sizes
from moegen.compat.flashinfer.checks import CallError
from moegen.compat.flashinfer.layers import PayloadLayers, Routed, Rows
from moegen.payloads import DispatchedPayloads
from moegen.runtime.ownership import Exclusive, exclusive, lasting

Tensor = torch.Tensor

_by_address: weakref.WeakValueDictionary[int, Workspace] = weakref.WeakValueDictionary()
"""By the address of their own row."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A dispatch that a combine may follow."""

    received: DispatchedPayloads
    routed: Routed
    ids: Tensor
    slots: int
    combine_offset: int
    active: int | None

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[0]


class Workspace(Exclusive):
    """One rank's.

    Args:
        communicator: hooks, a torch process group, a rank_world; None: the default group, or a rank alone.
        ep_rank, ep_size: the rank and the number of the ranks.
        size_per_rank: bytes of a row.
        tensor: uint8 [ep_size, size_per_rank], if the user has made it.
    """

    def __init__(
        self, communicator: Any, ep_rank: int, ep_size: int, size_per_rank: int, tensor: Tensor | None = None
    ) -> None:
        ep_rank, ep_size = checks.ranks(ep_rank, ep_size)
        size_per_rank = checks.positive("the size of a workspace row", size_per_rank)
        have = communicators.rank_and_size(communicator, ep_size)
        if have != (ep_rank, ep_size):
            raise CallError(
                f"this is to be rank {ep_rank} of {ep_size}, and the communicator says rank {have[0]} of {have[1]}: "
                "give comm_backend (of MnnvlConfig, or of moe_a2a_initialize) the group of the experts' ranks"
            )
        self.communicator = communicator
        self.ep_rank, self.ep_size, self.size_per_rank = ep_rank, ep_size, size_per_rank
        self.max_num_tokens = self.eplb_stats_num_experts = 0
        self.offsets: tuple[int, ...] = ()
        self.layers = PayloadLayers(communicator, ep_size)
        weakref.finalize(self, self.layers.destroy).atexit = False
        self.last: Sent | None = None
        """The newest dispatch: the functional calls give combine no handle."""
        self._tensor: Tensor | None = None
        self._combine_rows: Tensor | None = None
        if tensor is not None:
            self._keep(tensor)

    def lay_out(self, max_num_tokens: int, eplb_stats_num_experts: int = 0) -> Tensor:
        """Says for how many tokens it is; returns the metainfo tensor, int64 on the CPU."""
        max_num_tokens = checks.positive("max_num_tokens", max_num_tokens)
        eplb_stats_num_experts = checks.at_least_zero("eplb_stats_num_experts", eplb_stats_num_experts)
        self.max_num_tokens, self.eplb_stats_num_experts = max_num_tokens, eplb_stats_num_experts
        self.offsets = sizes.offsets(self.ep_size, max_num_tokens, eplb_stats_num_experts)
        checks.room(self.offsets[-1], self.size_per_rank, "its counters", _REMEDY)
        self.last = None
        return torch.tensor(self.offsets, dtype=torch.int64, device="cpu")

    @property
    def tensor(self) -> Tensor:
        """uint8 [ep_size, size_per_rank], made when it is first read. All rows are this rank's own memory."""
        if self._tensor is None:
            with lasting():
                row = torch.zeros(self.size_per_rank, dtype=torch.uint8, device=self._device())
                self._keep(row.expand(self.ep_size, -1))
        assert self._tensor is not None
        return self._tensor

    @property
    def row(self) -> Tensor:
        """uint8 [size_per_rank]."""
        return self.tensor[self.ep_rank]

    @exclusive
    def dispatch(
        self,
        routed: Routed,
        ids: Tensor,
        payloads: Sequence[Tensor],
        slots: int,
        *,
        hidden: int | None = None,
        **options: Any,
    ) -> Sent:
        """Sends payloads. The first call with a new routing, and any that needs more room, is collective.

        Args:
            routed: the layer's shape.
            ids: [T, top_k]; payloads: [T, n] each.
            slots: per source, 1..max_num_tokens.
            hidden: elements of combine's rows, if known.
            options: of `OneSided.dispatch`.

        Raises:
            CallError: arguments that do not fit; nothing was launched.
        """
        slots = checks.runtime_max(slots, self.max_num_tokens)
        checks.routing(ids, routed.top_k, slots)
        checks.payloads(payloads, ids)
        per_token = sum(payload.shape[1] * payload.element_size() for payload in payloads)
        behind = self.offsets[-1] + self.ep_size * slots * per_token
        checks.room(behind, self.size_per_rank, f"payloads of {per_token} bytes per token", _REMEDY)
        offset = sizes.rounded_up(behind)
        rows = self._rows_guessed(payloads) if hidden is None else Rows(hidden, torch.bfloat16)
        layer = self.layers.for_dispatch(routed, self.max_num_tokens, payloads, rows)
        received = layer.dispatch(ids, payloads, max_tokens=slots, **options)
        self.last = Sent(received, routed, ids, slots, offset, options.get("active_ranks"))
        return self.last

    @exclusive
    def combine(
        self,
        sent: Sent,
        payload: Tensor,
        *,
        in_workspace: bool,
        output_dtype: torch.dtype | None,
        output: Tensor | None,
        low_precision: bool,
        **options: Any,
    ) -> Tensor:
        """Brings rows [ep_size, slots, hidden] back. The first call with a new length or dtype is collective.

        Raises:
            CallError: arguments that do not fit; nothing was launched.
        """
        checks.combine_payload(payload, self.ep_size, sent.slots)
        if in_workspace:
            self._check_place(sent, payload)
        narrow = low_precision or payload.dtype == torch.float8_e4m3fn
        dtype = output_dtype or (torch.bfloat16 if narrow else payload.dtype)
        checks.output(output, payload, sent.num_tokens, dtype)
        if low_precision:
            payload = _to_fp8(payload)
        rows = Rows(payload.shape[2], payload.dtype)
        layer, handle = self.layers.for_combine(sent.routed, sent.received.handle, rows)
        return layer.combine(payload, handle, out_dtype=dtype, out=output, **options)

    @exclusive
    @lasting()
    def combine_rows(self, sent: Sent, slots: int, hidden: int, dtype: torch.dtype) -> Tensor:
        """[ep_size, slots, hidden]: rows for combine. If nobody has read the tensor they have memory of their own,
        always the same: the rest of a row would lie idle.
        """
        length = self.ep_size * slots * hidden * dtype.itemsize
        checks.room(sent.combine_offset + length, self.size_per_rank, "the rows of combine", _REMEDY)
        if self._tensor is not None:
            room = self.row[sent.combine_offset :]
        else:
            most = self.ep_size * self.max_num_tokens * hidden * dtype.itemsize
            if self._combine_rows is None or self._combine_rows.numel() < most:
                self._combine_rows = torch.zeros(most, dtype=torch.uint8, device=sent.ids.device)
            room = self._combine_rows
        return room[:length].view(dtype).view(self.ep_size, slots, hidden)

    @exclusive
    def destroy(self) -> None:
        """Gives the objects' memory back. Not collective."""
        self.layers.destroy()
        self.last = self._combine_rows = None

    def _keep(self, tensor: Tensor) -> None:
        self._tensor = tensor
        _by_address[_row_address(tensor, self.ep_rank)] = self

    def _device(self) -> torch.device:
        return communicators.usual_device(self.communicator) if self.last is None else self.last.ids.device

    def _rows_guessed(self, payloads: Sequence[Tensor]) -> Rows:
        """What combine will get, which is not known yet: rows as those of a 16-bit payload that may take what the
        payloads leave of the workspace; else 16-bit ones that take it. A wrong guess costs the time to make two
        objects.
        """
        per_token = sum(payload.shape[1] * payload.element_size() for payload in payloads)
        used = sizes.combine_offset(self.offsets[-1], self.ep_size, self.max_num_tokens, per_token)
        left = max(self.size_per_rank - used, 0) // (self.ep_size * self.max_num_tokens)
        likely = [
            Rows(payload.shape[1], payload.dtype)
            for payload in payloads
            if payload.dtype in (torch.bfloat16, torch.float16) and left // 2 < 2 * payload.shape[1] <= left
        ]
        rows = max(likely, key=lambda rows: rows.size, default=Rows(left // 2, torch.bfloat16))
        return Rows(min(max(rows.hidden // 8 * 8, 8), _LONGEST_ROW), rows.dtype)

    def _check_place(self, sent: Sent, payload: Tensor) -> None:
        places = [] if self._combine_rows is None else [self._combine_rows.data_ptr()]
        if self._tensor is not None:
            places.append(self.row.data_ptr() + sent.combine_offset)
        if payload.data_ptr() not in places:
            raise CallError(
                "payload_in_workspace is True but tensor pointer mismatch: take the payload from "
                "get_combine_payload_tensor_in_workspace after this dispatch, or give payload_in_workspace=False"
            )


def find(workspace: Tensor, ep_rank: int) -> Workspace | None:
    """What stands behind a tensor, if moegen knows it."""
    if not isinstance(workspace, torch.Tensor) or workspace.dim() != 2 or not 0 <= ep_rank < workspace.shape[0]:
        raise CallError("workspace is a uint8 tensor [ep_size, size_per_rank] and ep_rank one of its rows")
    return _by_address.get(_row_address(workspace, ep_rank))


def initialized(workspace: Tensor, ep_rank: int, ep_size: int) -> Workspace:
    """Raises CallError if it is not."""
    found = find(workspace, ep_rank)
    if found is None or not found.offsets:
        raise CallError(
            "this workspace is not initialized: give moe_a2a_initialize the same tensor first, and keep the metainfo "
            "that it returns"
        )
    if found.ep_size != ep_size:
        raise CallError(f"the workspace is for ep_size={found.ep_size}; got {ep_size}")
    return found


_REMEDY = "moe_a2a_get_workspace_size_per_rank says how large to make it"
_LONGEST_ROW = 32768
_E4M3_LARGEST = 448.0


def _row_address(tensor: Tensor, ep_rank: int) -> int:
    return tensor.data_ptr() + ep_rank * tensor.stride(0) * tensor.element_size()


def _to_fp8(rows: Tensor) -> Tensor:
    """Rounded to e4m3 without a scale; what is larger becomes the largest."""
    if rows.dtype == torch.float8_e4m3fn:
        return rows
    return rows.clamp(-_E4M3_LARGEST, _E4M3_LARGEST).to(torch.float8_e4m3fn)
