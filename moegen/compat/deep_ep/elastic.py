# SPDX-License-Identifier: Apache-2.0
"""DeepEP V2's `ElasticBuffer`."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch

from moegen import checks
from moegen.compat.deep_ep import elastic_sizes
from moegen.compat.deep_ep.elastic_handle import EPHandle
from moegen.compat.deep_ep.elastic_missing import NotThere
from moegen.compat.deep_ep.streams import Streams
from moegen.compat.deep_ep.utils import EventHandle, EventOverlap
from moegen.compat.groups import rank_and_size, usual_device
from moegen.compat.rows import RowLayers, Shape
from moegen.errors import CapacityError, HandleError, InputError
from moegen.high_throughput import HighThroughput
from moegen.rows import DispatchedRows, Given
from moegen.runtime.kernel import HOST_NUM_SMS
from moegen.runtime.ownership import Exclusive, exclusive

Tensor = torch.Tensor
Tokens = Tensor | Given


class ElasticBuffer(Exclusive, NotThere):
    """DeepEP V2's communication buffer for expert parallelism. moegen allocates what the shapes of the calls need, when
    a shape is first seen; that first call is collective and compiles. The order of rows is always deterministic.

    Args:
        group: a torch process group (gloo or nccl); or the rank_world that `LocalWorld.run` gives.
        num_bytes: kept as an attribute; None: what `get_buffer_size_hint` says of the next arguments.
        num_max_tokens_per_rank: what dispatch takes if it is not told.
        hidden, num_topk, use_fp8_dispatch, num_cpu_bytes: for num_bytes only.
        prefer_overlap_with_compute: False: at least 64 multiprocessors are recommended.
        deterministic, allow_hybrid_mode, allow_multiple_reduction, sl_idx, num_allocated_qps, num_cpu_timeout_secs,
            explicitly_destroy: kept as attributes or ignored.
        num_gpu_timeout_secs: how long a call waits for a rank.

    Attributes:
        rank_idx, num_ranks, num_scaleup_ranks, num_nvlink_ranks: of one domain with all ranks in it; of the scale-out
            and RDMA domain there is one.
        timeout: num_gpu_timeout_secs; moegen's own, and may be set at any time.
    """

    nccl_comm_handle: None = None

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        num_max_tokens_per_rank = checks.integer("num_max_tokens_per_rank", num_max_tokens_per_rank)
        hidden, num_topk = checks.integer("hidden", hidden), checks.integer("num_topk", num_topk)
        num_bytes = None if num_bytes is None else checks.integer("num_bytes", num_bytes)
        self.group = group
        self.rank_idx, self.num_ranks = rank_and_size(group)
        if num_bytes is None and num_max_tokens_per_rank > 0 and hidden > 0:
            sizes = (num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch)
            num_bytes = elastic_sizes.buffer_bytes(self.num_ranks, *sizes)
        self.num_bytes = num_bytes or 0
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.deterministic = deterministic
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.num_allocated_qps = num_allocated_qps
        self.explicitly_destroy = explicitly_destroy
        self.timeout = float(num_gpu_timeout_secs)
        self.num_scaleout_ranks = self.num_rdma_ranks = 1
        self.num_scaleup_ranks = self.num_nvlink_ranks = self.num_ranks
        self.scaleout_rank_idx, self.scaleup_rank_idx = 0, self.rank_idx
        self._row_layers: dict[torch.device, RowLayers] = {}

    @exclusive
    def destroy(self) -> None:
        """Gives all memory back. Not collective."""
        for rows in self._row_layers.values():
            rows.destroy()
        self._row_layers.clear()

    @exclusive
    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """Waits, always on the host, for what is queued on this rank's device, and then for all ranks to be here."""
        rows = self._rows(usual_device(self.group))
        if rows.comm.device.type == "cuda":
            torch.cuda.synchronize(rows.comm.device)
        rows.world.barrier()

    @staticmethod
    def capture() -> EventHandle:
        """An event on the current stream."""
        return EventHandle()

    def get_comm_stream(self) -> Any:
        """The stream of asynchronous calls; None on a CPU, where a call is over when it returns."""
        return self._rows(usual_device(self.group)).comm.stream

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes of symmetric memory per rank that such calls take here, which is not DeepEP's number."""
        _, ranks = rank_and_size(group)
        return elastic_sizes.buffer_bytes(ranks, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch)

    def get_physical_domain_size(self) -> tuple[int, int]:
        """RDMA ranks, NVLink ranks."""
        return self.num_rdma_ranks, self.num_nvlink_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """Scale-out ranks, scale-up ranks."""
        return self.num_scaleout_ranks, self.num_scaleup_ranks

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """Thread blocks that keep the link busy, by the model of `elastic_sizes.sms_that_fill_the_link`: even, 4 or
        more; with prefer_overlap_with_compute=False 64 or more; no more than the device has.

        Args:
            num_scaleout_topk, rdma_gbs: nothing crosses nodes: ignored.
            nvlink_gbs: of the link, in one direction; 0: 430, eighteen links of the fourth generation.
            sm_read_gbs, sm_write_gbs: of one multiprocessor.
        """
        gbs = (nvlink_gbs or elastic_sizes.NVLINK_GBS, sm_read_gbs, sm_write_gbs)
        sms = elastic_sizes.sms_that_fill_the_link(self.num_ranks, num_experts, num_topk, *gbs)
        device = usual_device(self.group)
        most = HOST_NUM_SMS
        if device.type == "cuda":
            most = torch.cuda.get_device_properties(device).multi_processor_count
        least = 0 if self.prefer_overlap_with_compute else 64
        return min(max(sms, least), most) if sms else most

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """0: there are no queue pairs here."""
        return 0

    @exclusive
    def dispatch(
        self,
        x: Tokens,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Tokens, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """Sends tokens to the ranks that hold their experts.

        Args:
            x: bfloat16 [T, hidden], or (float8_e4m3fn [T, hidden], scales [T, hidden / 128] float32 or [T, hidden /
                512] int32, of any strides).
            topk_idx, topk_weights: int64 (or int32) and float32 [T, topk]; -1 selects nothing. The weights may be left
                out.
            cumulative_local_expert_recv_stats: int32 [local experts], to which the counts are added.
            num_experts: of all ranks together, a multiple of the ranks.
            num_max_tokens_per_rank: T at most, the same on all ranks; None: the constructor's.
            expert_alignment: with do_expand an expert's first row is a multiple of it; None: 1.
            num_sms: thread blocks; 0: `get_theoretical_num_sms`. num_qps: ignored.
            previous_event, previous_event_before_epilogue: what the call waits for; the first needs
                allocate_on_comm_stream, as in DeepEP.
            async_with_compute_stream: run on the communication stream, for whose end the event stands.
            allocate_on_comm_stream: results of asynchronous calls are made on that stream in any case, and the event
                makes them safe on the stream that waits.
            handle: of an earlier dispatch, in place of topk_idx: the same rows come. Weights may be given anew; tokens
                may be of another dtype or length.
            do_handle_copy: whether the handle has a copy of topk_idx.
            do_cpu_sync: whether the host waits for the counts, and results have as many rows as came; None: unless a
                handle is given. Else they have room for whatever may come.
            do_expand: a row per (token, expert), grouped by expert, in place of one per (token, rank) by source rank
                and then by the source's token.
            do_zero_padding: rows of recv_x that nothing came for are zeros.
            use_tma_aligned_col_major_sf: rows of the scales lie side by side, columns at multiples of 16 bytes.

        Returns:
            recv_x: [n, hidden], or with its scales;
            recv_topk_idx: int64 [n, topk] local expert or -1; None with do_expand;
            recv_topk_weights: float32 [n, topk], or [n] with do_expand; None without topk_weights;
            handle: the given one, if one was; event.

        Raises:
            InputError, HandleError: arguments that do not fit; nothing was launched.
            CapacityError: more tokens than num_max_tokens_per_rank.
        """
        streams = _streams(
            async_with_compute_stream, allocate_on_comm_stream, previous_event, previous_event_before_epilogue
        )
        parts = x if isinstance(x, tuple) else (x,)
        rows = self._rows(parts[0].device)
        options: dict[str, Any] = {
            "timeout": self.timeout,
            "zero_unused": do_zero_padding,
            "scales_by_column": use_tma_aligned_col_major_sf,
        }
        if handle is not None:
            settings = (num_experts, num_max_tokens_per_rank, expert_alignment)
            _check_cached(handle, settings, topk_idx, cumulative_local_expert_recv_stats, do_cpu_sync, do_expand)
            options["num_sms"] = num_sms or handle.num_sms
            again = partial(_again, rows, x, handle, topk_weights, options)
            received, event = streams.call(rows.comm, (*parts, topk_weights), again, _allocations)
            weights = None if topk_weights is None else received.topk_weights
            return _tokens(received), handle.recv_topk_idx, weights, handle, event
        if topk_idx is None or num_experts is None:
            raise InputError("dispatch takes topk_idx and num_experts, or the handle of an earlier dispatch")
        num_experts = checks.integer("num_experts", num_experts)
        if topk_idx.dim() != 2 or num_experts % self.num_ranks != 0:
            raise InputError(
                f"topk_idx is [tokens, topk] and num_experts a multiple of the {self.num_ranks} ranks; got "
                f"{list(topk_idx.shape)} and {num_experts}"
            )
        most = self.num_max_tokens_per_rank
        if num_max_tokens_per_rank is not None:
            most = checks.integer("num_max_tokens_per_rank", num_max_tokens_per_rank)
        if not 0 <= len(parts[0]) <= most:
            raise CapacityError(f"{len(parts[0])} tokens; give num_max_tokens_per_rank, now {most}, on all ranks")
        alignment = 1 if expert_alignment is None else checks.integer("expert_alignment", expert_alignment)
        topk = topk_idx.shape[1]
        layout = ("packed", alignment) if do_expand else ("token", 1)
        shape = Shape(0, topk, num_experts, *layout).of(x)
        if do_cpu_sync is not None and not do_cpu_sync:
            share = num_experts // self.num_ranks
            room = elastic_sizes.expanded_rows(self.num_ranks, most, topk, share, alignment)
            options |= {"mode": "capacity", "max_rows": room if do_expand else self.num_ranks * most}
        else:
            options["mode"] = "exact"
        options["num_sms"] = num_sms or self.get_theoretical_num_sms(num_experts, topk)
        options["total_counts"] = cumulative_local_expert_recv_stats
        layer = rows.with_room(shape, most)
        call = partial(_fresh, layer, x, topk_idx, topk_weights, do_handle_copy, options)
        inputs = (*parts, topk_idx, topk_weights, cumulative_local_expert_recv_stats)
        (received, kept), event = streams.call(rows.comm, inputs, call, lambda made: (*made[0].allocations, made[1]))
        made = EPHandle(
            shape,
            received,
            kept,
            expert_alignment=alignment,
            num_max_tokens_per_rank=most,
            num_sms=options["num_sms"],
        )
        weights = None if topk_weights is None else received.topk_weights
        return _tokens(received), received.topk_idx, weights, made, event

    @exclusive
    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Brings rows back: each token's plain sum of all its rows, in fp32. After do_expand a rank's rows of a token
        are added first and rounded once, but for those of the token's own rank.

        Args:
            x: bfloat16 [n, hidden], rows where dispatch put them.
            handle: of the dispatch.
            topk_weights: float32 beside `x`, brought back too: [n, topk], or [n] after do_expand.
            bias: one or two tensors bfloat16 [T, hidden] that are added.
            num_sms: 0: the dispatch's. The others as in `dispatch`.

        Returns:
            combined_x: bfloat16 [T, hidden]; combined_topk_weights: float32 [T, topk], or None; event.

        Raises:
            InputError, HandleError: arguments that do not fit; nothing was launched.
        """
        streams = _streams(
            async_with_compute_stream, allocate_on_comm_stream, previous_event, previous_event_before_epilogue
        )
        _check_handle(handle)
        rows = self._rows(x.device)
        biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
        options = {"bias": biases, "weighted": False, "num_sms": num_sms or handle.num_sms, "timeout": self.timeout}
        call = partial(_sum, rows, x, handle, topk_weights, options)
        (combined, weights), event = streams.call(rows.comm, (x, topk_weights, *biases), call, lambda sums: sums)
        return combined, weights, event

    def _rows(self, device: torch.device) -> RowLayers:
        """The objects for tensors that are there."""
        if device not in self._row_layers:
            self._row_layers[device] = RowLayers(self.group, device)
        self._row_layers[device].timeout = self.timeout
        return self._row_layers[device]


def _streams(asynchronous: bool, allocate_on_comm_stream: bool, previous: Any, before_epilogue: Any) -> Streams:
    if previous is not None and not allocate_on_comm_stream:
        raise InputError("previous_event needs allocate_on_comm_stream=True")
    return Streams(asynchronous, previous, before_epilogue)


def _fresh(
    layer: HighThroughput, x: Tokens, ids: Tensor, weights: Tensor | None, copies: bool, options: dict[str, Any]
) -> tuple[DispatchedRows, Tensor]:
    """What came, and the ids for the handle."""
    return layer.dispatch(x, ids, weights, **options), ids.clone() if copies else ids


def _again(
    rows: RowLayers, x: Tokens, handle: EPHandle, weights: Tensor | None, options: dict[str, Any]
) -> DispatchedRows:
    """By the plan of the handle, or, to send weights too, by its ids, which put every row where it was."""
    layer, routing = rows.for_handle(handle.shape.of(x), handle.received)
    if weights is None:
        return cast(DispatchedRows, layer.dispatch(x, handle=routing, **options))
    options = options | {"mode": "capacity", "max_rows": routing.rows}
    return cast(DispatchedRows, layer.dispatch(x, handle.topk_idx, weights, **options))


def _sum(
    rows: RowLayers, x: Tensor, handle: EPHandle, weights: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    layer, received = rows.for_sums(handle.shape.of(x), handle.received)
    return layer.combine(x, received, weights, **options)


def _check_handle(handle: Any) -> None:
    if not isinstance(handle, EPHandle):
        raise HandleError(f"the handle is the EPHandle that dispatch returned; got {type(handle).__name__}")


def _check_cached(
    handle: Any,
    settings: tuple[int | None, ...],
    topk_idx: Tensor | None,
    stats: Tensor | None,
    do_cpu_sync: bool | None,
    do_expand: bool,
) -> None:
    """A dispatch by a handle takes nothing that the handle says otherwise."""
    _check_handle(handle)
    if topk_idx is not None or stats is not None or do_cpu_sync:
        raise InputError(
            "dispatch by a handle takes no topk_idx, no cumulative_local_expert_recv_stats and no do_cpu_sync: the "
            "rows are the handle's, and were counted"
        )
    names = ("num_experts", "num_max_tokens_per_rank", "expert_alignment")
    for name, value in zip(names, settings, strict=True):
        if value is not None and value != getattr(handle, name):
            raise InputError(f"the handle has {name}={getattr(handle, name)}; got {value}")
    if do_expand and not handle.do_expand:
        raise InputError("the handle is of a dispatch without do_expand")


def _tokens(received: DispatchedRows) -> Tokens:
    return received.tokens if received.scales is None else (received.tokens, received.scales)


def _allocations(received: DispatchedRows) -> tuple[Tensor | None, ...]:
    return received.allocations
