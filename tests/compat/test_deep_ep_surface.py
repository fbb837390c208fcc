# SPDX-License-Identifier: Apache-2.0
"""What frameworks read of `deep_ep` without sending anything: names, signatures, sizes, events, replacement."""

from __future__ import annotations

import inspect
import subprocess
import sys
import weakref

import pytest
import torch

import moegen
from moegen.compat import deep_ep

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
from deep_ep import Buffer, Config
from deep_ep.utils import EventHandle, EventOverlap
import deep_ep, moegen.compat.deep_ep
assert Buffer is moegen.compat.deep_ep.Buffer and deep_ep.utils.EventHandle is EventHandle
"""


def test_entry_points_replace_deep_ep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEGEN_REPLACE_DEEP_EP", "1")
    subprocess.run([sys.executable, "-c", REPLACED], check=True)
    monkeypatch.setenv("MOEGEN_REPLACE_DEEP_EP", "0")
    done = subprocess.run([sys.executable, "-c", REPLACED], capture_output=True, text=True)
    assert done.returncode != 0
