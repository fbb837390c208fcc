# SPDX-License-Identifier: Apache-2.0
"""DeepEP's `Config` and its size formulas. moegen needs neither chunks nor these buffers: callers size with them."""

from __future__ import annotations

from dataclasses import dataclass

from moegen.errors import InputError
from moegen.kernels.integers import settle_integers

_MAX_TOPK = 128
_MAX_SCALES = 128
_ALIGNMENT = 128
_MAX_NVL_PEERS = 8
_SOURCE_META_BYTES = 8

# Chunks by number of ranks: dispatch (nvl send, nvl receive, rdma send, rdma receive), then combine.
_DISPATCH = {
    2: (24, 256, 6, 128), 4: (6, 256, 6, 128), 8: (6, 256, 6, 128), 16: (36, 288, 20, 128), 24: (32, 288, 8, 128),
    32: (32, 288, 8, 128), 48: (32, 288, 8, 128), 64: (32, 288, 8, 128), 96: (20, 480, 12, 128),
    128: (20, 560, 12, 128), 144: (32, 720, 12, 128), 160: (28, 720, 12, 128),
}  # fmt: skip
_COMBINE = {
    2: (10, 256, 6, 128), 4: (9, 256, 6, 128), 8: (4, 256, 6, 128), 16: (4, 288, 12, 128), 24: (1, 288, 8, 128),
    32: (1, 288, 8, 128), 48: (1, 288, 8, 128), 64: (1, 288, 8, 128), 96: (1, 480, 8, 128), 128: (1, 560, 8, 128),
    144: (2, 720, 8, 128), 160: (2, 720, 8, 128),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Numbers of multiprocessors and chunk sizes, as DeepEP's constructor takes them."""

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        settle_integers(self, InputError)

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of DeepEP's NVLink buffer, by its formula (csrc/config.hpp)."""
        channels, peers = self.num_sms // 2, min(num_ranks, _MAX_NVL_PEERS)
        nodes, chunk = max(num_ranks // _MAX_NVL_PEERS, 1), self.num_max_nvl_chunked_recv_tokens
        per_token = hidden_bytes + _SOURCE_META_BYTES + _MAX_TOPK * (8 + 4) + _MAX_SCALES * 4
        return _aligned(channels * peers * (2 * nodes + 3) * 4 + channels * peers * chunk * per_token)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of DeepEP's RDMA buffer: 0 within one node."""
        if num_ranks <= _MAX_NVL_PEERS:
            return 0
        channels, nodes = self.num_sms // 2, num_ranks // _MAX_NVL_PEERS
        chunk = self.num_max_rdma_chunked_recv_tokens
        per_token = hidden_bytes + _SOURCE_META_BYTES + _MAX_TOPK * (8 + 4) + _MAX_SCALES * 4 + 16
        counters = channels * nodes * (_MAX_NVL_PEERS * 2 + 2) * 2 * 4
        return _aligned(counters + channels * nodes * chunk * per_token * 2)


def dispatch_config(num_sms: int, num_ranks: int) -> Config:
    """DeepEP's recommendation for dispatch."""
    return Config(num_sms, *_chunks(_DISPATCH, num_ranks))


def combine_config(num_sms: int, num_ranks: int) -> Config:
    """DeepEP's recommendation for combine."""
    return Config(num_sms, *_chunks(_COMBINE, num_ranks))


def low_latency_size_hint(max_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Bytes of DeepEP's low-latency buffer, by its formula (csrc/config.hpp); independent of the number of ranks."""
    dispatch = 16 + max(hidden * 2, hidden + hidden // 128 * 4)
    combine = hidden // 128 * 4 + hidden * 2
    send = max(max_tokens * dispatch, num_experts * max_tokens * combine)
    receive = num_experts * max_tokens * max(dispatch, combine)
    total = 2 * (send + receive + _aligned(num_experts * 4))
    return (total + _ALIGNMENT) // _ALIGNMENT * _ALIGNMENT


def _chunks(table: dict[int, tuple[int, int, int, int]], num_ranks: int) -> tuple[int, int, int, int]:
    if num_ranks not in table:
        raise ValueError(f"there are configurations for {', '.join(map(str, table))} ranks; got {num_ranks}")
    return table[num_ranks]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
