# SPDX-License-Identifier: Apache-2.0
"""What frameworks read of `flashinfer.comm` without sending anything: names, signatures, sizes, mappings."""

from __future__ import annotations

import inspect
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from moegen.compat import flashinfer
from moegen.compat.flashinfer import Mapping, MoeAlltoAll, mnnvl, trtllm_moe_alltoall
from moegen.compat.flashinfer.communicators import BackendWorld
from moegen.runtime.worlds import torch

DISPATCH = (
    "token_selected_experts input_payloads workspace metainfo runtime_max_tokens_per_rank ep_rank ep_size top_k "
    "num_experts enable_pdl eplb_local_stats enable_rank_mask active_rank_mask backend recv_view_cache"
)
COMBINE = (
    "payload local_num_tokens workspace metainfo runtime_max_tokens_per_rank ep_rank ep_size top_k "
    "combine_payload_offset payload_in_workspace output_dtype output_scales output_scalar_scale sf_layout output "
    "use_low_precision enable_pdl enable_rank_mask active_rank_mask backend"
)
SIZE = (
    "ep_size max_num_tokens total_dispatch_payload_size_per_token combine_payload_size_per_token "
    "eplb_stats_num_experts backend"
)
CONSTRUCTOR = (
    "self mapping max_num_tokens top_k num_experts workspace_size_per_rank hidden_size mnnvl_config "
    "eplb_stats_num_experts enable_rank_mask backend"
)
METHOD_DISPATCH = (
    "self token_selected_experts input_payloads runtime_max_tokens_per_rank invalid_token_expert_id "
    "expert_id_payload_index eplb_local_stats active_rank_mask enable_pdl output_payload_layouts"
)
METHOD_COMBINE = (
    "self payload runtime_max_tokens_per_rank payload_in_workspace output_dtype output_scales output_scalar_scale "
    "sf_layout output use_low_precision active_rank_mask enable_pdl"
)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (flashinfer.moe_a2a_dispatch, DISPATCH),
        (flashinfer.moe_a2a_combine, COMBINE),
        (
            flashinfer.moe_a2a_initialize,
            "workspace ep_rank ep_size max_num_tokens eplb_stats_num_experts backend comm_backend",
        ),
        (
            flashinfer.moe_a2a_sanitize_expert_ids,
            "expert_ids workspace metainfo ep_rank invalid_expert_id enable_pdl backend",
        ),
        (
            flashinfer.moe_a2a_wrap_payload_tensor_in_workspace,
            "workspace leading_shape slice_start slice_end dtype",
        ),
        (flashinfer.moe_a2a_get_workspace_size_per_rank, SIZE),
        (flashinfer.moe_a2a_active_rank_mask, "active_ranks ep_size"),
        (MoeAlltoAll.__init__, CONSTRUCTOR),
        (MoeAlltoAll.dispatch, METHOD_DISPATCH),
        (MoeAlltoAll.combine, METHOD_COMBINE),
        (
            MoeAlltoAll.get_combine_payload_tensor_in_workspace,
            "self runtime_max_tokens_per_rank hidden_size dtype",
        ),
        (
            MoeAlltoAll.get_moe_workspace_size_per_rank,
            "ep_size top_k max_num_tokens hidden_size extra_payload_bytes_per_token eplb_stats_num_experts backend",
        ),
        (mnnvl.MnnvlConfig, "comm_backend allocation_granularity fabric_page_size"),
    ],
)
def test_signatures_are_flashinfers(function: Any, names: str) -> None:
    assert list(inspect.signature(function).parameters) == names.split()


def test_sizes_are_flashinfers() -> None:
    """As its own test has them, and one row counted by hand."""
    size = flashinfer.moe_a2a_get_workspace_size_per_rank
    aux = trtllm_moe_alltoall.get_moe_alltoall_module().moe_a2a_get_aux_data_size
    assert MoeAlltoAll.get_moe_workspace_size_per_rank(8, 2, 10, 128) == size(8, 10, 128 * 2 + 2 * 4 + 2 * 4, 128 * 2)
    assert size(8, 10, 0, 0) == aux(8, 10)
    assert size(8, 10, 128, 128) - size(8, 10, 0, 0) == 2 * 128 * 8 * 10
    tables = -(-10 * 22 * 4 // 128) * 128
    assert aux(8, 10) == 128 + 128 + 128 + 2 * tables
    assert aux(8, 10, 33) == aux(8, 10) + -(-8 * 33 * 4 // 128) * 128
    with pytest.raises(ValueError, match="backend"):
        size(8, 10, 0, 0, backend="other")


def test_offsets_have_flashinfers_names() -> None:
    index = MoeAlltoAll._METAINFO_INDEX
    names, values = trtllm_moe_alltoall.get_moe_alltoall_module().moe_a2a_get_metainfo_index_pairs()
    assert dict(zip(names, values, strict=True)) == {f"MOE_A2A_{name}": value for name, value in index.items()}
    assert (index["SEND_COUNTERS_OFFSET_INDEX"], index["RECV_COUNTERS_OFFSET_INDEX"]) == (2, 3)
    assert (index["PAYLOAD_DATA_OFFSET_INDEX"], index["NUM_METAINFO_FIELDS"]) == (9, 10)
    a2a = MoeAlltoAll(Mapping(), 10, 2, 8, hidden_size=128)
    assert a2a.metainfo.dtype == torch.int64 and a2a.metainfo.shape == (10,)
    assert a2a.metainfo.tolist() == sorted(a2a.metainfo.tolist())
    assert a2a.workspace_size_per_rank == MoeAlltoAll.get_moe_workspace_size_per_rank(1, 2, 10, 128)
    assert a2a.workspace.shape == (1, a2a.workspace_size_per_rank) and a2a.workspace.dtype == torch.uint8
    assert (a2a.ep_rank, a2a.ep_size, a2a.top_k, a2a.num_experts, a2a.max_num_tokens) == (0, 1, 2, 8, 10)
    a2a.destroy()


def test_mappings() -> None:
    ranks = [Mapping(16, rank, 8, tp_size=8, pp_size=2, moe_ep_size=4) for rank in range(16)]
    assert [of.moe_ep_rank for of in ranks] == [0, 1, 2, 3] * 4
    assert [of.moe_tp_rank for of in ranks] == ([0] * 4 + [1] * 4) * 2
    assert [of.pp_rank for of in ranks] == [0] * 8 + [1] * 8
    assert [of.cp_rank for of in ranks] == [0] * 16 and ranks[9].tp_rank == 1
    assert (ranks[9].local_rank, ranks[9].node_rank, ranks[9].moe_tp_size) == (1, 1, 2)
    assert [Mapping(4, rank, tp_size=2, cp_size=2).cp_rank for rank in range(4)] == [0, 0, 1, 1]
    assert Mapping(8, tp_size=8, moe_tp_size=2).moe_ep_size == 4 and ranks[0].has_moe_ep()
    assert (Mapping().moe_ep_size, Mapping(4, tp_size=4).moe_ep_size) == (1, 1)
    for says, options in (
        ("world_size is", {"world_size": 4, "tp_size": 2}),
        ("tp_size is", {"world_size": 4, "tp_size": 4, "moe_ep_size": 3}),
        ("rank is 0..3", {"world_size": 4, "tp_size": 4, "rank": 4}),
    ):
        with pytest.raises(ValueError, match=says):
            Mapping(**options)  # type: ignore[arg-type]


class BytesOnly:
    """Hooks that gather bytes and nothing else."""

    def Get_rank(self) -> int:  # noqa: N802
        return 1

    def Get_size(self) -> int:  # noqa: N802
        return 2

    def allgather(self, data: bytes) -> list[bytes]:
        assert isinstance(data, bytes)
        return [pickle.dumps("of rank 0"), data]

    def bcast(self, data: Any, root: int) -> Any: ...

    def barrier(self) -> None: ...

    def Split(self, color: int, key: int) -> Any:  # noqa: N802
        return SimpleNamespace(color=color, key=key, Get_rank=self.Get_rank)


def test_hooks() -> None:
    backend = BytesOnly()
    assert isinstance(backend, flashinfer.CommBackend)
    world = BackendWorld(backend, torch.device("cpu"))
    assert (world.rank, world.size, world.exchange({"any": 1})) == (1, 2, ["of rank 0", {"any": 1}])
    split = mnnvl.communicator(Mapping(8, 5, tp_size=4, pp_size=2), mnnvl.MnnvlConfig(backend))
    assert (split.color, split.key) == (1, 1)
    bare = SimpleNamespace(moe_ep_rank=1, moe_ep_size=2)
    assert mnnvl.communicator(bare, backend).key == 1
    with pytest.raises(ValueError, match="init_process_group"):
        flashinfer.TorchDistBackend()
