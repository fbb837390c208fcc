# SPDX-License-Identifier: Apache-2.0
"""What the benchmark computes without running anything: bytes of a known routing, bandwidths, quantiles, routings."""

from __future__ import annotations

import math

import pytest
import torch

from moegen.bench.a2a_config import OneSidedConfig
from moegen.bench.config import GPU_LINK, LowLatencyConfig
from moegen.bench.exchange import padding
from moegen.bench.halves import HALVES
from moegen.bench.inputs import plan_rotation
from moegen.bench.machine import short_name
from moegen.bench.report import file_stem
from moegen.bench.routing import ROUTINGS, draw
from moegen.bench.stats import over_ranks, quantile, quantiles, slowest
from moegen.bench.traffic import bandwidths, byte_summary, dispatch_traffic, matrices, traffic_of
from moegen.errors import InputError
from moegen.kernels.problem import Problem
from moegen.reference import expert_ranges

# Seven experts on three ranks: 0-2, 3-4, 5-6.
EXPERTS = 7
ROUTING = [
    torch.tensor([[0, 1, 3], [2, 5, 6], [-1, -1, -1]]),  # rank 0: {0, 1}, {0, 2}, none
    torch.tensor([[3, 3, -1]]),  # rank 1: the same expert twice is two selections and one row
    torch.tensor([[0, 4, 6], [1, 2, 0]]),  # rank 2: {0, 1, 2}, {0}
]
ROW = 100
NODES = [0, 0, 1]


def test_rows_and_selections_of_a_known_routing() -> None:
    moved = matrices(ROUTING, EXPERTS)
    assert moved.rows == ((2, 1, 1), (0, 1, 0), (2, 1, 1))
    assert moved.selections == ((3, 1, 2), (0, 2, 0), (4, 1, 1))


def test_bytes_three_ways_and_by_node() -> None:
    first, second, third = dispatch_traffic(matrices(ROUTING, EXPERTS), ROW, NODES)
    assert (first.send.unique_remote, first.send.unique_with_self, first.send.selections) == (200, 400, 600)
    assert (first.send.same_node, first.send.cross_node) == (100, 100)
    assert (first.receive.unique_remote, first.receive.unique_with_self, first.receive.selections) == (200, 400, 700)
    assert (first.receive.same_node, first.receive.cross_node) == (0, 200)
    assert (second.send.unique_remote, second.send.unique_with_self, second.send.selections) == (0, 100, 200)
    assert (second.receive.same_node, second.receive.cross_node) == (100, 100)
    assert (third.send.same_node, third.send.cross_node) == (0, 300)


def test_what_is_sent_is_received() -> None:
    for op in ("dispatch", "combine", "pair"):
        traffic = traffic_of(op, matrices(ROUTING, EXPERTS), ROW, ROW, NODES)
        for name in ("unique_remote", "unique_with_self", "selections", "same_node", "cross_node"):
            sent, received = (sum(getattr(way, name) for way in ways) for ways in zip(*map(ends, traffic), strict=True))
            assert sent == received


@pytest.mark.parametrize(("ranks", "experts", "topk"), [(4, 16, 4), (8, 33, 5), (16, 256, 8)])
def test_bytes_of_many_ranks_are_those_of_counting_one_by_one(ranks: int, experts: int, topk: int) -> None:
    ids = draw("zipf", ranks, 11, experts, topk, seed=ranks)
    ids[1][3] = -1
    ids[2][5] = ids[2][5, 0]  # the same expert again and again: one row
    holder = {expert: rank for rank, held in enumerate(expert_ranges(experts, ranks)) for expert in held}
    rows, selections = torch.zeros(ranks, ranks, dtype=torch.int64), torch.zeros(ranks, ranks, dtype=torch.int64)
    for source, own in enumerate(ids):
        for token in own.tolist():
            chosen = [holder[expert] for expert in token if expert >= 0]
            for rank in chosen:
                selections[source, rank] += 1
            for rank in set(chosen):
                rows[source, rank] += 1
    nodes = [rank * 2 // ranks for rank in range(ranks)]
    for rank, own in enumerate(dispatch_traffic(matrices(ids, experts), ROW, nodes)):
        others = [peer for peer in range(ranks) if peer != rank]
        near = [peer for peer in others if nodes[peer] == nodes[rank]]
        for way, counted, selected in ((own.send, rows[rank], selections[rank]),
                                       (own.receive, rows[:, rank], selections[:, rank])):  # fmt: skip
            assert way.unique_remote == ROW * int(counted[others].sum())
            assert way.unique_with_self == ROW * int(counted.sum())
            assert way.selections == ROW * int(selected.sum())
            assert way.same_node == ROW * int(counted[near].sum())
            assert way.same_node + way.cross_node == way.unique_remote


def test_a_hot_rank_is_the_busiest_and_bounds_the_bandwidth() -> None:
    ranks, tokens = 8, 10
    traffic = traffic_of("dispatch", matrices(draw("hot", ranks, tokens, 32, 4, seed=1), 32), ROW, ROW, [0] * ranks)
    assert byte_summary(traffic)["busiest"] == (ranks - 1) * tokens * ROW
    found = bandwidths(traffic, {"min": 1.0, "avg": 1.0, "max": 1.0})
    assert found["busiest"] == pytest.approx(found["aggregate"]) and found["from_avg"] == pytest.approx(
        found["aggregate"] / ranks
    )


def ends(traffic: object) -> tuple[object, object]:
    return traffic.send, traffic.receive  # type: ignore[attr-defined]


def test_combine_swaps_and_a_pair_adds() -> None:
    moved = matrices(ROUTING, EXPERTS)
    there, back, both = (traffic_of(op, moved, ROW // 2, ROW, NODES) for op in ("dispatch", "combine", "pair"))
    for a, b, c in zip(there, back, both, strict=True):
        assert (2 * a.send.selections, 2 * a.receive.unique_remote) == (b.receive.selections, b.send.unique_remote)
        assert c.send.unique_remote == a.send.unique_remote + b.send.unique_remote
    assert traffic_of("combine_weighted", moved, ROW // 2, ROW, NODES) == back


def test_a_half_sends_what_the_op_sends_and_receives_nothing_over_the_link() -> None:
    moved = matrices(ROUTING, EXPERTS)
    for op in ("dispatch", "combine"):
        whole, send, receive = (traffic_of(name, moved, ROW // 2, ROW, NODES) for name in names_of(op))
        assert send == whole
        assert byte_summary(receive) == dict.fromkeys(byte_summary(whole), 0)
        for a, b in zip(whole, receive, strict=True):
            assert b.receive.unique_with_self == a.receive.unique_with_self > b.receive.unique_remote == 0
    weighted = traffic_of("combine_weighted_send", moved, ROW // 2, ROW, NODES)
    assert weighted == traffic_of("combine", moved, ROW // 2, ROW, NODES)


def names_of(op: str) -> tuple[str, ...]:
    return (op, *HALVES[op])


def test_one_rank_sends_nothing_over_the_link() -> None:
    (only,) = dispatch_traffic(matrices([torch.tensor([[0, 1], [2, -1]])], 3), ROW, [0])
    assert (only.send.unique_remote, only.send.unique_with_self, only.send.selections) == (0, 200, 300)


def test_bandwidth_from_the_average_and_from_the_slowest() -> None:
    traffic = dispatch_traffic(matrices(ROUTING, EXPERTS), 1000, NODES)  # remote rows sent: 2, 0, 3; received: 2, 2, 1
    found = bandwidths(traffic, {"min": 1.0, "avg": 2.0, "max": 4.0})
    expected = {"from_avg": 5000 / 3 / 2e3, "from_max": 5000 / 3 / 4e3, "aggregate": 5000 / 4e3, "busiest": 3000 / 4e3}
    assert found == pytest.approx(expected)
    assert byte_summary(traffic)["busiest"] == 3000
    assert byte_summary(traffic)["unique_remote"] == pytest.approx(5000 / 3)


def test_quantiles() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0], 0.9) == pytest.approx(1.9)
    assert quantiles([5.0]) == {"p50": 5.0, "p90": 5.0, "p99": 5.0}
    assert slowest([[1.0, 5.0], [2.0, 3.0]]) == [2.0, 5.0]
    assert over_ranks([1.0, 3.0]) == {"min": 1.0, "avg": 2.0, "max": 3.0}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_select_distinct_experts_and_depend_on_the_seed(routing: str) -> None:
    ids = draw(routing, 3, 40, 10, 4, seed=5)
    assert [tuple(own.shape) for own in ids] == [(40, 4)] * 3
    for own in ids:
        assert int(own.min()) >= 0 and int(own.max()) < 10
        assert all(len(set(row)) == 4 for row in own.tolist())
    again, other = draw(routing, 3, 40, 10, 4, seed=5), draw(routing, 3, 40, 10, 4, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(ids, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ids, other, strict=True))


def test_a_hot_rank_gets_everything() -> None:
    moved = matrices(draw("hot", 4, 20, 32, 8, seed=1), 32)
    received = [sum(row[rank] for row in moved.selections) for rank in range(4)]
    assert sorted(received) == [0, 0, 0, 4 * 20 * 8]


def test_zipf_is_skewed_and_uniform_is_not() -> None:
    popularity = {}
    for routing in ("zipf", "uniform"):
        ids = torch.cat(draw(routing, 2, 2000, 64, 1, seed=3))
        popularity[routing] = torch.bincount(ids.flatten(), minlength=64).sort(descending=True).values / len(ids)
    harmonic = sum(1 / n for n in range(1, 65))
    assert popularity["zipf"][0].item() == pytest.approx(1 / harmonic, rel=0.15)
    assert popularity["uniform"][0].item() < 2 / 64
    assert len(expert_ranges(64, 2)) == 2


def config(**changes: object) -> LowLatencyConfig:
    given = {
        "ranks": 2,
        "device": "cuda",
        "processes": True,
        "preset": "deepseek-v3",
        "hidden": 7168,
        "num_experts": 256,
        "num_topk": 8,
        "tokens": (128,),
        "max_tokens": 0,
        "routings": ("uniform",),
        "ops": 50,
        "replays": 100,
        "calls": 100,
        "link": GPU_LINK,
    }
    return LowLatencyConfig(**{**given, **changes})  # type: ignore[arg-type]


def test_a_configuration_that_cannot_be_is_refused() -> None:
    counts = ({"tokens": ()}, {"tokens": (0,)}, {"max_tokens": 1}, {"replays": 0}, {"halves": 1}, {"halves": 17})
    for wrong in ({"routings": ("nope",)}, *counts):
        with pytest.raises(InputError):
            config(**wrong)


def test_padding_is_what_is_sent_for_nothing() -> None:
    """Four tokens of 16 elements, payloads of 32, 8 and 8 bytes: a chunk is a header and three planes of up to 128."""
    small = config(ranks=3, hidden=16, num_experts=5, num_topk=2)
    collective = OneSidedConfig(**vars(small), path="collective")
    sizes = padding(Problem(3, 5, 2, 16, 4, layout="rank", path="collective"), collective, 4, needed=100.0)
    assert sizes["padded"] == 2 * (4 * 128 + 4 * 32)
    assert sizes["wasted"] == sizes["padded"] - 100
    assert 0 < sizes["expected_waste"] < 2 * 4 * (48 + 32)
    assert not sizes["takes_exact"]


@pytest.mark.parametrize("exchanges", [(), ("auto",), ("padded", "some")])
def test_exchanges_that_cannot_be_measured(exchanges: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="exchange is padded, exact or both"):
        OneSidedConfig(**vars(config()), path="collective", exchanges=exchanges)


def test_buffers_exceed_the_cache_where_memory_allows() -> None:
    sizes = {"l2_bytes": 50 << 20, "memory_bytes": 80 << 30}
    plan = plan_rotation(config(), 128, 128, ranks_per_device=1, **sizes)
    assert plan.tokens == 50 and plan.rows == math.ceil(2 * (50 << 20) / (128 * 8 * 14336))
    assert plan.row_bytes > plan.l2_bytes and plan.note == ""
    small = plan_rotation(config(), 1, 1, ranks_per_device=1, **sizes)
    assert small.tokens == small.rows == 50 and "fit into L2" in small.note
    crowded = plan_rotation(config(), 512, 512, ranks_per_device=16, **sizes)
    assert crowded.rows == 1
    assert plan_rotation(config(), 8, 8, l2_bytes=0, memory_bytes=0, ranks_per_device=2).rows == 2


def test_names_of_files() -> None:
    assert short_name("NVIDIA H100 80GB HBM3") == "h100"
    assert short_name("NVIDIA H200") == "h200"
    assert short_name("NVIDIA A100-SXM4-80GB") == "a100"
    assert short_name("CPU (x86_64)") == "cpu"
    result = {
        "bench": "ll",
        "machine": {"name": "NVIDIA H200"},
        "world": {"kind": "virtual", "ranks": 2},
        "config": {"preset": "deepseek-v3", "hidden": 7168, "num_topk": 8, "num_experts": 256, "quantize": ""},
    }
    assert file_stem(result) == "ll_h200_virtual_r2"
    result["config"]["preset"] = ""
    assert file_stem(result) == "ll_h200_virtual_r2_h7168_k8_e256"
    result["config"]["quantize"] = "fp8"
    assert file_stem(result) == "ll_h200_virtual_r2_h7168_k8_e256_fp8"
