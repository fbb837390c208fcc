# SPDX-License-Identifier: Apache-2.0
"""What frameworks read of `deep_ep` without sending anything: names, signatures, sizes, events, replacement."""

from __future__ import annotations

import inspect
import weakref

import pytest
import torch
from support.forked import python

import moegen
from moegen.compat import deep_ep
from moegen.compat.deep_ep import elastic_sizes

DISPATCH = (
    "self x topk_idx num_max_dispatch_tokens_per_rank num_experts cumulative_local_expert_recv_stats "
    "dispatch_wait_recv_cost_stats use_fp8 round_scale use_ue8m0 async_finish return_recv_hook"
)
COMBINE = (
    "self x topk_idx topk_weights handle use_logfmt zero_copy async_finish return_recv_hook out "
    "combine_wait_recv_cost_stats"
)
LAYOUT = "self topk_idx num_experts previous_event async_finish allocate_on_comm_stream"
NORMAL_DISPATCH = (
    "self x handle num_tokens_per_rank num_tokens_per_rdma_rank is_token_in_rank num_tokens_per_expert topk_idx "
    "topk_weights expert_alignment num_worst_tokens config previous_event async_finish allocate_on_comm_stream"
)
NORMAL_COMBINE = "self x handle topk_weights bias config previous_event async_finish allocate_on_comm_stream"
ELASTIC = (
    "self group num_bytes num_cpu_bytes num_max_tokens_per_rank hidden num_topk use_fp8_dispatch deterministic "
    "allow_hybrid_mode allow_multiple_reduction prefer_overlap_with_compute sl_idx num_allocated_qps "
    "num_cpu_timeout_secs num_gpu_timeout_secs explicitly_destroy"
)
ELASTIC_DISPATCH = (
    "self x topk_idx topk_weights cumulative_local_expert_recv_stats num_experts num_max_tokens_per_rank "
    "expert_alignment num_sms num_qps previous_event previous_event_before_epilogue async_with_compute_stream "
    "allocate_on_comm_stream handle do_handle_copy do_cpu_sync do_expand do_zero_padding use_tma_aligned_col_major_sf"
)
ELASTIC_COMBINE = (
    "self x handle topk_weights bias num_sms num_qps previous_event previous_event_before_epilogue "
    "async_with_compute_stream allocate_on_comm_stream"
)
ELASTIC_HINT = (
    "group num_max_tokens_per_rank hidden num_topk use_fp8_dispatch allow_hybrid_mode allow_multiple_reduction"
)
THEORETICAL = "self num_experts num_topk num_scaleout_topk rdma_gbs nvlink_gbs sm_read_gbs sm_write_gbs"
NOT_THERE = (
    "engram_write engram_fetch get_engram_storage_size_hint pp_set_config pp_send pp_recv get_pp_buffer_size_hint "
    "create_agrs_session destroy_agrs_session agrs_new_session agrs_set_config agrs_get_inplace_tensor all_gather "
    "get_agrs_num_max_session_bytes get_agrs_buffer_size_hint"
)
LOCAL = "self dtype size offset use_rdma_buffer"
CONSTRUCTOR = (
    "self group num_nvl_bytes num_rdma_bytes low_latency_mode num_qps_per_rank allow_nvlink_for_low_latency_mode "
    "allow_mnnvl explicitly_destroy enable_shrink comm"
)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (deep_ep.Buffer.__init__, CONSTRUCTOR),
        (deep_ep.Buffer.get_dispatch_layout, LAYOUT),
        (deep_ep.Buffer.dispatch, NORMAL_DISPATCH),
        (deep_ep.Buffer.combine, NORMAL_COMBINE),
        (deep_ep.Buffer.internode_dispatch, NORMAL_DISPATCH.replace(" num_worst_tokens", "")),
        (deep_ep.Buffer.internode_combine, NORMAL_COMBINE),
        (deep_ep.Buffer.get_comm_stream, "self"),
        (deep_ep.Buffer.low_latency_dispatch, DISPATCH),
        (deep_ep.Buffer.low_latency_combine, COMBINE),
        (deep_ep.Buffer.low_latency_update_mask_buffer, "self rank_to_mask mask"),
        (deep_ep.Buffer.low_latency_query_mask_buffer, "self mask_status"),
        (deep_ep.Buffer.low_latency_clean_mask_buffer, "self"),
        (deep_ep.Buffer.get_local_buffer_tensor, LOCAL),
        (deep_ep.ElasticBuffer.__init__, ELASTIC),
        (deep_ep.ElasticBuffer.dispatch, ELASTIC_DISPATCH),
        (deep_ep.ElasticBuffer.combine, ELASTIC_COMBINE),
        (deep_ep.ElasticBuffer.get_buffer_size_hint, ELASTIC_HINT),
        (deep_ep.ElasticBuffer.get_theoretical_num_sms, THEORETICAL),
        (deep_ep.ElasticBuffer.get_theoretical_num_qps, "self num_sms"),
        (deep_ep.ElasticBuffer.barrier, "self use_comm_stream with_cpu_sync sequential"),
    ],
)
def test_signatures_are_deep_eps(function: object, names: str) -> None:
    assert list(inspect.signature(function).parameters) == names.split()  # type: ignore[arg-type]


def test_sizes_are_deep_eps() -> None:
    """Figures of DeepEP 1.2.1's own functions."""
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint
    assert round(hint(128, 7168, 8, 288) / 1e6, 1) == 2147.0
    assert round(hint(256, 7168, 8, 256) / 1e6, 1) == 3816.8
    assert hint(128, 7168, 8, 288) % 128 == 0
    config = deep_ep.Config()
    assert [round(config.get_nvl_buffer_size_hint(14336, r) / 1e6, 1) for r in (2, 4, 8)] == [83.9, 167.9, 335.7]
    assert config.get_rdma_buffer_size_hint(14336, 8) == 0
    assert deep_ep.Buffer.get_dispatch_config(8).num_max_nvl_chunked_send_tokens == 6
    with pytest.raises(ValueError, match="got 5"):
        deep_ep.Buffer.get_combine_config(5)


def test_buffer_can_be_referenced_weakly_and_says_what_it_is() -> None:
    world = moegen.LocalWorld(1)
    buffer = deep_ep.Buffer(world.ranks[0], 1, 2, low_latency_mode=True, explicitly_destroy=True)
    assert weakref.ref(buffer)() is buffer
    assert (buffer.rank, buffer.group_size, buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (0, 1, 1, 2)
    buffer.clean_low_latency_buffer(128, 7168, 256)
    buffer.destroy()
    with pytest.raises(NotImplementedError, match="process group"):
        deep_ep.Buffer(world.ranks[0], comm=1)


def test_elastic_buffer_says_what_it_is() -> None:
    world = moegen.LocalWorld(4)
    rank = world.ranks[2]
    buffer = deep_ep.ElasticBuffer(rank, num_max_tokens_per_rank=100, hidden=512, num_topk=4, explicitly_destroy=True)
    assert weakref.ref(buffer)() is buffer
    assert (buffer.group, buffer.rank_idx, buffer.num_ranks, buffer.num_max_tokens_per_rank) == (rank, 2, 4, 100)
    assert (buffer.scaleup_rank_idx, buffer.scaleout_rank_idx) == (2, 0)
    assert buffer.get_physical_domain_size() == buffer.get_logical_domain_size() == (1, 4)
    assert buffer.get_theoretical_num_qps(24) == 0
    assert buffer.get_comm_stream() is None
    buffer.capture().current_stream_wait()
    assert deep_ep.ElasticBuffer(rank, num_bytes=4 << 20).num_bytes == 4 << 20
    assert deep_ep.ElasticBuffer(rank).num_bytes == 0
    with pytest.raises(moegen.errors.InputError, match="multiple of the 4 ranks"):
        buffer.get_theoretical_num_sms(num_experts=10, num_topk=2)
    buffer.destroy()


def test_elastic_size_is_what_an_object_takes() -> None:
    world = moegen.LocalWorld(1)
    hint = deep_ep.ElasticBuffer.get_buffer_size_hint(world.ranks[0], 100, 256, 2)

    def work(rank: moegen.runtime.worlds.RankWorld) -> int:
        layer = moegen.HighThroughput(rank, num_experts=4, num_topk=2, hidden=256, max_tokens_per_rank=128)
        with layer:
            return layer.buffer_bytes

    (taken,) = world.run(work)
    assert hint % (2 << 20) == 0
    assert taken <= hint <= taken + (3 << 20)
    fp8 = deep_ep.ElasticBuffer.get_buffer_size_hint(world.ranks[0], 8192, 7168, 8, use_fp8_dispatch=True)
    assert fp8 < deep_ep.ElasticBuffer.get_buffer_size_hint(world.ranks[0], 8192, 7168, 8)


def test_multiprocessors_by_the_documented_formula() -> None:
    reach = elastic_sizes.expected_ranks(8, 256, 8)
    assert round(reach, 3) == 5.295
    sms = elastic_sizes.sms_that_fill_the_link
    crossing = reach * 7 / 8
    assert 1.25 * ((crossing + reach) / 50) / (crossing / 430) == pytest.approx(23.04, abs=0.01)
    assert sms(8, 256, 8, 430, 200, 50) == 24
    assert sms(2, 4, 2, 1, 200, 50) == 4
    assert sms(1, 256, 8, 430, 200, 50) == 0
    assert all(sms(ranks, 240, 8, 430, 200, 50) % 2 == 0 for ranks in (1, 2, 3, 4, 5, 6, 8))


@pytest.mark.parametrize("name", NOT_THERE.split())
def test_what_is_not_there_says_its_name(name: str) -> None:
    buffer = deep_ep.ElasticBuffer(moegen.LocalWorld(1).ranks[0])
    with pytest.raises(NotImplementedError, match=rf"ElasticBuffer\.{name}:"):
        getattr(buffer, name)(1, x=2)


def test_local_memory() -> None:
    world = moegen.LocalWorld(1)
    buffer = deep_ep.Buffer(world.ranks[0], 64, 40)
    words = buffer.get_local_buffer_tensor(torch.int32)
    assert words.shape == (16,)
    words.copy_(torch.arange(16))
    assert buffer.get_local_buffer_tensor(torch.int32, torch.Size([2, 3]), offset=8).tolist() == [[2, 3, 4], [5, 6, 7]]
    assert buffer.get_local_buffer_tensor(torch.bfloat16, use_rdma_buffer=True).tolist() == [0.0] * 20
    assert buffer.get_local_buffer_tensor(torch.int64, offset=64).shape == (0,)
    beyond = [((17,), 0, "num_nvl_bytes=68"), ((16,), 4, "num_nvl_bytes=68")]
    for size, offset, says in [*beyond, (None, 6, "multiple of 4"), (None, 68, r"0\.\.64"), (None, -4, r"0\.\.64")]:
        with pytest.raises(moegen.errors.InputError, match=says):
            buffer.get_local_buffer_tensor(torch.int32, None if size is None else torch.Size(size), offset)
    with pytest.raises(moegen.errors.InputError, match="num_rdma_bytes=48"):
        buffer.get_local_buffer_tensor(torch.int64, torch.Size([6]), use_rdma_buffer=True)
    buffer.destroy()


def test_local_memory_of_many_bytes_is_allocated_when_it_is_used() -> None:
    """Frameworks zero it when they recover from a lost rank, on a GPU without room for it."""
    world = moegen.LocalWorld(1)
    buffer = deep_ep.Buffer(world.ranks[0], 2 << 20, 1 << 50)
    everything = buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True)
    assert (everything.shape, everything.device, everything.dtype) == ((1 << 50,), world.ranks[0].device, torch.int8)
    assert everything.numel() == len(everything) == 1 << 50
    assert everything.zero_() is everything
    everything.fill_(0)[:] = 0
    torch.zero_(everything)
    with pytest.raises(moegen.errors.CapacityError, match=r"1,125,899,906,842,624 bytes of num_rdma_bytes"):
        everything[0] = 1

    with torch.inference_mode():
        words = buffer.get_local_buffer_tensor(torch.int32, offset=8).zero_()
        assert not words.any()
    assert words[:3].tolist() == [0, 0, 0]  # allocated now
    words[1] = 7
    assert buffer.get_local_buffer_tensor(torch.int32).tolist()[:4] == [0, 0, 0, 7]
    assert (words + 1)[1] == 8 and torch.cat([words, words]).sum() == 14 and words.data_ptr() != 0
    assert not words.zero_().any()
    buffer.destroy()


def test_masks_without_a_call() -> None:
    world = moegen.LocalWorld(3)
    buffer = deep_ep.Buffer(world.ranks[1], enable_shrink=True)
    status = torch.full((3,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0, 0, 0]
    buffer.low_latency_update_mask_buffer(2, True)
    buffer.low_latency_update_mask_buffer(0, mask=True)
    buffer.low_latency_update_mask_buffer(0)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0, 0, 1]
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0, 0, 0]
    with pytest.raises(moegen.errors.InputError, match=r"a rank is 0\.\.2; got 3"):
        buffer.low_latency_update_mask_buffer(3, True)
    for bad in (torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(moegen.errors.InputError, match=r"mask_status is torch.int32 \[3\]"):
            buffer.low_latency_query_mask_buffer(bad)
    plain = deep_ep.Buffer(world.ranks[1])
    for call in (
        lambda: plain.low_latency_update_mask_buffer(0),
        lambda: plain.low_latency_query_mask_buffer(status),
        plain.low_latency_clean_mask_buffer,
    ):
        with pytest.raises(moegen.errors.InputError, match="enable_shrink=True"):
            call()


def test_an_event_that_was_not_asked_for() -> None:
    deep_ep.EventOverlap(deep_ep.EventHandle()).current_stream_wait()
    with deep_ep.Buffer.capture():
        pass
    with pytest.raises(ValueError, match="async_finish"):
        deep_ep.EventOverlap().current_stream_wait()


REPLACED = """
import importlib.util
from importlib.metadata import entry_points
for group in ("vllm.general_plugins", "sglang.srt.plugins"):
    (entry,) = [e for e in entry_points(group=group) if e.name == "moegen_deep_ep"]
    entry.load()()
assert importlib.util.find_spec("deep_ep").name == "deep_ep"
from deep_ep import Buffer, Config, ElasticBuffer, EPHandle
from deep_ep.utils import EventHandle, EventOverlap
import deep_ep, moegen.compat.deep_ep
assert Buffer is moegen.compat.deep_ep.Buffer and deep_ep.utils.EventHandle is EventHandle
"""


def test_entry_points_replace_deep_ep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEGEN_REPLACE_DEEP_EP", "1")
    done = python(REPLACED)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("MOEGEN_REPLACE_DEEP_EP", "0")
    done = python(REPLACED)
    assert done.returncode != 0 and "object has no attribute 'name'" in done.stderr
