# SPDX-License-Identifier: Apache-2.0
"""`moegen bench ll` from one end to the other on the CPU, and that it notices wrong results.

What needs the benchmark's own kernels runs in processes of its own: they belong to no catalog.
"""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from support.forked import moegen

from moegen import reference, tuning
from moegen.bench.case import OPS
from moegen.bench.config import HOST_LINK, LowLatencyConfig
from moegen.bench.failure import BenchError
from moegen.bench.halves import HALVES
from moegen.bench.inputs import Batch, Buffers
from moegen.bench.timing import WARMUPS, Recording, time_in_turn
from moegen.bench.verify import Verifier
from moegen.handle import Dispatched, Handle, NumbersLayout
from moegen.runtime.worlds import LocalWorld

ROOT = Path(__file__).resolve().parents[2]
LINK_STEMS = ("bench_push_r3_t64_n8", "bench_pull_r3_t64_n8", "bench_push_r1_t512_n8", "bench_pull_r8_t512_n8")
BARRIER_STEMS = ("bench_barrier_r1", "bench_barrier_r3", "bench_barrier_r64")


def bench(folder: Path, *words: str) -> dict[str, object]:
    """Runs it on tiny inputs; gives the one JSON that it wrote."""
    sizes = ("--device", "cpu", "--hidden", "64", "--experts", "7", "--topk", "3", "--ops", "2", "--replays", "2")
    done = moegen("bench", "ll", *sizes, "--out", str(folder), *words)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    (data,) = folder.glob("*.json")
    assert data.with_suffix(".txt").is_file()
    for word in ("combine_weighted", "GB/s avg", "limit measured in this run", "correctness, not speed"):
        assert word in done.stdout and word in data.with_suffix(".txt").read_text()
    result: dict[str, object] = json.loads(data.read_text())
    return result


def test_virtual_ranks(tmp_path: Path) -> None:
    result = bench(tmp_path, "--ranks", "3", "--tokens", "1,5", "--max-tokens", "6")
    assert [path.stem for path in tmp_path.glob("*.json")] == ["ll_cpu_virtual_r3_h64_k3_e7"]
    cases = result["cases"]
    assert isinstance(cases, list)
    assert len(cases) == 2 * 3 * 4  # tokens, routings, ops
    for case in cases:
        assert case["us"]["p50"] <= case["us"]["p90"] <= case["us"]["p99"]
        assert case["us_over_ranks"]["min"] <= case["us_over_ranks"]["avg"] <= case["us_over_ranks"]["max"]
        assert len(case["ranks"]) == 3 and case["stems"] and case["verified"]["worst_error_over_bound"] <= 1
        assert case["bytes"]["cross_node"] == 0
    assert str(ROOT) not in json.dumps(result) and os.uname().nodename not in json.dumps(result)


def test_fp8(tmp_path: Path) -> None:
    more = ("--hidden", "128", "--quantize", "fp8", "--routing", "uniform")
    result = bench(tmp_path, "--ranks", "2", "--tokens", "3", *more)
    assert [path.stem for path in tmp_path.glob("*.json")] == ["ll_cpu_virtual_r2_h128_k3_e7_fp8"]
    dispatch, combine = result["cases"][:2]  # type: ignore[index]
    assert "fp8" in dispatch["stems"][0] and "bf16" in combine["stems"][0]
    assert dispatch["bytes"]["selections"] * 256 == combine["bytes"]["selections"] * (128 + 4)


def test_high_throughput(tmp_path: Path) -> None:
    sizes = ("--hidden", "128", "--experts", "7", "--topk", "3", "--ops", "2", "--replays", "2", "--calls", "1")
    more = ("--ranks", "3", "--tokens", "70", "--num-sms", "0,3", "--alignment", "8", "--routing", "uniform")
    done = moegen("bench", "ht", "--device", "cpu", *sizes, *more, "--out", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    (data,) = tmp_path.glob("*.json")
    assert data.stem == "ht_cpu_virtual_r3_h128_k3_e7" and "limit measured in this run" in done.stdout
    result = json.loads(data.read_text())
    assert len(result["cases"]) == 2 * 2 * (3 + 2 + 2)  # layouts, numbers of blocks, ops of each dtype
    assert len(result["exact"]) == 2 * 3
    for case in result["cases"]:
        assert case["us"]["p50"] <= case["us"]["p99"] and case["verified"]["worst_error_over_bound"] <= 1
        whole, given = case["bytes"]["unique_remote"], case["bytes"]["unique_with_self"]
        assert 0 < whole < given < case["bytes"]["selections"]


STAGES = {"dispatch_pack", "dispatch_collective", "dispatch_compact", "combine_collective", "combine_reduce"}


def test_path_collective(tmp_path: Path) -> None:
    sizes = ("--hidden", "64", "--experts", "7", "--topk", "3", "--ops", "2", "--replays", "2", "--calls", "2")
    more = ("--ranks", "3", "--tokens", "64,8192", "--routing", "uniform", "--path", "collective")
    done = moegen("bench", "a2a", "--device", "cpu", *sizes, *more, "--out", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    (data,) = tmp_path.glob("*.json")
    assert data.stem == "coll_cpu_virtual_r3_h64_k3_e7"
    for word in ("stages of calls", "auto takes", "dispatch counts", "pair_of_exchanges", "limit measured in this run"):
        assert word in done.stdout and word in data.with_suffix(".txt").read_text()
    result = json.loads(data.read_text())
    assert "--path collective --exchange padded,exact" in result["command"]
    assert [case["op"] for case in result["cases"]] == ["dispatch", "combine", "pair", "pair_of_exchanges"] * 2
    assert [row["op"] for row in result["eager"]] == ["eager_padded", "eager_exact"] * 2
    for padded, exact in (result["eager"][:2], result["eager"][2:]):
        assert set(padded["stages_us"]) == STAGES
        assert set(exact["stages_us"]) == STAGES | {"dispatch_counts", "combine_pack"}
    for case in result["cases"]:
        if case["op"] == "pair":
            sizes_of = case["padding"]
            assert sizes_of["wasted"] == sizes_of["padded"] - case["bytes"]["unique_remote"] > 0


def test_halves(tmp_path: Path) -> None:
    result = bench(tmp_path, "--ranks", "3", "--tokens", "5", "--routing", "zipf", "--halves", "3")
    cases = {case["op"]: case for case in result["cases"]}  # type: ignore[attr-defined]
    assert list(cases)[len(OPS) :] == [name for names in HALVES.values() for name in names if name]
    for name, case in cases.items():
        (phase,) = {"send", "receive"} & set(name.split("_")) or {"whole"}
        assert all(phase in stem.split("_") for stem in case["stems"])
        assert case["verified"]["worst_error_over_bound"] <= 1
    assert cases["combine_weighted_send"]["stems"][0].endswith("atcombine")
    assert cases["dispatch_send"]["bytes"]["busiest"] > 0 == cases["dispatch_receive"]["bytes"]["busiest"]


def test_tune_writes_a_table_of_what_it_verified(tmp_path: Path) -> None:
    out = tmp_path / "ll_host.json"
    shape = ("--hidden", "256", "--experts", "7", "--topk", "3", "--device", "cpu", "--warp-groups", "2x1")
    more = ("--tokens", "1,5", "--dtypes", "bf16", "--ops", "2", "--replays", "2")
    done = moegen("bench", "tune", *shape, *more, "--out", str(out))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "combine, bf16, hidden 256" in done.stdout and "*" in done.stdout
    table = tuning.parse(out.read_text())
    made = [entry for entry in table.entries if entry.row_bytes == 512]
    assert table.arch == "host" and [entry.op for entry in made] == ["dispatch", "combine"]
    for entry in made:
        assert [row.tokens for row in entry.measured] == [1, 5]
        assert {choice.wire for choice in entry.rules[0].choices} == set(tuning.WIRES)
    done = moegen("bench", "tune", *shape, *more, "--list-stems")
    assert done.returncode == 0 and done.stdout.split()[0] == "bench_barrier_r2"


@pytest.mark.dist
def test_processes(tmp_path: Path) -> None:
    more = ("--routing", "uniform", "--world", "processes", "--halves", "2")
    result = bench(tmp_path, "--ranks", "2", "--tokens", "2", *more)
    assert result["world"]["kind"] == "processes"  # type: ignore[index]
    assert "combine_receive" in {case["op"] for case in result["cases"]}  # type: ignore[attr-defined]


def test_recordings_in_turn_have_a_time_each() -> None:
    order: list[str] = []
    recordings = [Recording([partial(order.append, "quick")]), Recording([partial(order.append, "slow"), slow])]
    quick_us, slow_us = time_in_turn(LocalWorld(1).ranks[0], recordings, replays=3)
    assert order == ["quick", "slow"] * (WARMUPS["cpu"] + 3)
    assert len(quick_us) == len(slow_us) == 3 and min(slow_us) >= SLOW_SECONDS * 1e6 > min(quick_us)


SLOW_SECONDS = 0.005


def slow() -> None:
    time.sleep(SLOW_SECONDS)


def test_what_cannot_run_fails() -> None:
    done = moegen("bench", "ll", "--device", "cpu", "--hidden", "64")
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    if not torch.cuda.is_available():
        done = moegen("bench", "ll", "--device", "cuda")
        assert done.returncode == 1 and "torch sees 0" in done.stderr


@pytest.mark.nvrtc
def test_kernels_compile_for_every_target() -> None:
    done = moegen("build", *LINK_STEMS, *BARRIER_STEMS, "--arch", "sm80,sm90,sm100,host")
    assert done.returncode == 0, done.stdout + done.stderr


CONFIG = LowLatencyConfig(
    ranks=2,
    device="cpu",
    processes=False,
    preset="",
    hidden=16,
    num_experts=5,
    num_topk=2,
    tokens=(6,),
    max_tokens=0,
    routings=("uniform",),
    ops=2,
    replays=1,
    calls=1,
    link=HOST_LINK,
)
TOKENS = 6


class RightResult:
    """What rank 0 of two gets from a dispatch and a combine that are right, and who checks it."""

    def __init__(self) -> None:
        world = LocalWorld(2).ranks[0]
        buffers = Buffers(world, CONFIG, TOKENS, TOKENS)
        batch = Batch.draw(world, CONFIG, TOKENS, "uniform", seed=3)
        x = [buffers.x_of(rank, 1) for rank in range(2)]
        expected = reference.dispatch(x, batch.ids, CONFIG.num_experts, TOKENS)
        y = [buffers.table[buffers.table_rows(rank, 1)] for rank in range(2)]
        combined = reference.combine(y, expected, batch.ids, batch.weights, CONFIG.num_experts)
        self.verifier = Verifier(0, buffers, batch, CONFIG.num_experts)
        self.tokens = expected[0].tokens
        experts = len(expected[0].counts)
        memory = torch.cat((expected[0].counts, expected[0].ranges.flatten()))
        layout = NumbersLayout(experts, 2, 2 * TOKENS, ranges=experts, counts=0, row_tokens=0)
        self.dispatched = Dispatched(self.tokens, None, Handle(None, TOKENS, memory, ()), layout)
        self.combined = combined[0].exact.to(torch.bfloat16)


def test_right_results_pass() -> None:
    right = RightResult()
    assert torch.equal(torch.stack(Buffers(LocalWorld(2).ranks[0], CONFIG, TOKENS, TOKENS).x)[1], right_x(right))
    right.verifier.check_counts(right.dispatched)
    right.verifier.check_tokens(right.dispatched, 1)
    right.verifier.check_combined(right.combined, 1)
    assert 0 < right.verifier.worst <= 1


def right_x(right: RightResult) -> torch.Tensor:
    return right.verifier._buffers.x_of(0, 1)


def test_wrong_results_are_noticed() -> None:
    right = RightResult()
    expert = int(right.dispatched.counts.argmax())
    with pytest.raises(BenchError, match="tokens differ"):
        right.verifier.check_tokens(right.dispatched, 0)
    right.tokens[expert, 0, 15] += 1
    with pytest.raises(BenchError, match="tokens differ"):
        right.verifier.check_tokens(right.dispatched, 1)
    with pytest.raises(BenchError, match="times the bound"):
        right.verifier.check_combined(right.combined, 0)
    right.combined[5, 3] += 1
    with pytest.raises(BenchError, match="times the bound"):
        right.verifier.check_combined(right.combined, 1)
    right.combined[5, 3] = torch.nan
    with pytest.raises(BenchError, match="nobody wrote"):
        right.verifier.check_combined(right.combined, 1)
    right.dispatched.counts[0] += 1
    with pytest.raises(BenchError, match="counts differ"):
        right.verifier.check_counts(right.dispatched)
