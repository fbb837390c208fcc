# SPDX-License-Identifier: Apache-2.0
"""`moegen bench --suite node` on the CPU: its JSON, and that a part that fails takes nothing with it.

What needs the benchmark's own kernels runs in processes of its own: they belong to no catalog.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.forked import Done, moegen, python

from moegen.bench.part_world import LeftError, PartWorld, run_part
from moegen.runtime.worlds import LocalWorld

PARTS = ["ll", "ll_fp8", "ht", "a2a", "coll", "coll_many"]
LAYER = ("--hidden", "128", "--experts", "7", "--topk", "3")
TINY = ("--device", "cpu", "--ranks", "2", *LAYER, "--routing", "zipf", "--ops", "1", "--replays", "2", "--calls", "1")


def suite(folder: Path, *words: str, before: str = "") -> tuple[Done, dict[str, Any]]:
    """Runs it; gives what it wrote, too."""
    done = moegen("bench", "--suite", "node", *TINY, "--out", str(folder), *words, before=before)
    (data,) = folder.glob("*.json")
    return done, json.loads(data.read_text())


def test_all_parts_of_two_virtual_ranks(tmp_path: Path) -> None:
    done, result = suite(tmp_path, "--most-tokens", "3")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert list(result["parts"]) == ["kernels", *PARTS] and result["complete"] is True
    assert result["seconds"] >= sum(part["seconds"] for part in result["parts"].values())
    assert all(part["errors"] == [] for part in result["parts"].values())
    cases = {name: result["parts"][name]["result"]["cases"] for name in PARTS}
    assert {name: len(of_part) for name, of_part in cases.items()} == {
        "ll": 2 * 4,  # 1 and 3 tokens, ops
        "ll_fp8": 2 * 4,
        "ht": 2 * (3 + 2),  # layouts, ops of each dtype
        "a2a": 2 * 5,
        "coll": 4,
        "coll_many": 4,
    }
    assert [row["part"] for row in result["summary"]] == [name for name in PARTS for _ in cases[name]]
    for row in result["summary"]:
        assert isinstance(row["us"], float)  # less the barrier's time, which on a busy CPU may be longer
        assert row["routing"] == "zipf" and row["target"] is None and row["published"] == []
    (text,) = tmp_path.glob("*.txt")
    assert text.stem == "node_cpu_virtual_r2_h128_k3_e7"
    printed = text.read_text()
    assert printed.index("medians of the slowest rank") < printed.index("---- ll ----")
    assert "selections GB/s" in done.stdout and "---- ll ----" not in done.stdout
    listed = moegen("bench", "--suite", "node", *TINY, "--most-tokens", "3", "--list-stems").stdout.split()
    used = {stem for name in PARTS for stem in result["parts"][name]["result"]["stems"]}
    assert used <= set(listed)
    assert result["parts"]["kernels"]["result"]["kernels"] == len(listed) == len(set(listed))


BREAK_HT = """
from moegen.bench import ht
def broken(world, config):
    if world.rank == 1:
        raise ValueError("out of order")
    world.barrier()
ht.measure = broken
"""


def test_a_part_that_fails_takes_nothing_with_it(tmp_path: Path) -> None:
    done, result = suite(tmp_path, "--most-tokens", "1", "--parts", "ll,ht,coll", before=BREAK_HT)
    assert done.returncode == 1
    assert done.stderr == "error: 1 of 4 parts failed (ht): rank 1: ValueError: out of order\n"
    assert "FAILED ht: rank 1: ValueError: out of order" in done.stdout
    assert result["complete"] is False
    assert result["parts"]["ht"]["errors"] == ["rank 1: ValueError: out of order"]
    assert {row["part"] for row in result["summary"]} == {"ll", "coll"}


@pytest.mark.dist
@pytest.mark.slow
def test_processes(tmp_path: Path) -> None:
    done, result = suite(tmp_path, "--world", "processes", "--most-tokens", "1", "--parts", "a2a,coll")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert result["world"]["kind"] == "processes" and result["complete"] is True


def test_what_cannot_be_is_refused() -> None:
    wrong = {
        ("--suite", "rack"): "suite is one of node",
        ("--suite", "node", "--parts", "ll,nope"): "parts of this world are ll, ll_fp8",
        ("--suite", "node", *TINY, "--hidden", "64"): "hidden",
        ("--suite", "node", "ll"): "either a family",
        ("--ranks", "2"): "either a family",
    }
    for words, said in wrong.items():
        done = moegen("bench", *words)
        assert done.returncode == 1 and said in done.stderr, (words, done.stderr)


def test_virtual_ranks_of_a_gpu_have_no_collectives() -> None:
    sizes = ("--suite", "node", "--device", "cuda", "--ranks", "8", "--list-stems")
    virtual, processes = (moegen("bench", *sizes, "--world", world).stdout.split() for world in ("local", "processes"))
    assert virtual and all("_r8_" in stem or stem.endswith("_r8") for stem in processes)
    assert any(stem.startswith("coll_") for stem in processes)
    assert not any(stem.startswith("coll_") for stem in virtual)


ESTIMATES = """
from moegen.bench.config import GPU_LINK, LowLatencyConfig
from moegen.bench.node_config import NodeConfig, parts_of

for ranks in (2, 4, 8):
    shape = dict(preset="deepseek-v3", hidden=7168, num_experts=256, num_topk=8)
    sizes = dict(tokens=(1,), max_tokens=0, routings=("uniform", "zipf", "hot"), ops=1, replays=1, calls=1)
    base = LowLatencyConfig(ranks, "cuda", True, **shape, **sizes, link=GPU_LINK)
    parts = parts_of(base, (0, 0, 0), 0, ())
    assert [part.config.tokens[-1] for part in parts] == [512, 512, 4096, 4096, 64, 4096]
    print(NodeConfig(base, parts, "", "").estimate_seconds)
"""


def test_eight_gpus_are_measured_within_eight_minutes_by_its_own_estimate() -> None:
    seconds = [float(line) for line in python(ESTIMATES).stdout.split()]
    assert seconds == sorted(seconds) and len(seconds) == 3 and 60 < seconds[-1] < 8 * 60


# ---- one part ---------------------------------------------------------------------------------------


def parts_in_turn(world: Any, *steps: Any) -> list[dict[str, Any]]:
    return [run_part(world, "part", step) for step in steps]


def counting(within: PartWorld) -> dict[str, Any]:
    """Two exchanges, and memory of all."""
    within.exchange(within.rank)
    within.allocate(64).give_back()
    return {"ranks": within.exchange(within.rank)}


def late(within: PartWorld) -> dict[str, Any]:
    """Rank 1 fails when the others have exchanged something already, and allocate."""
    within.exchange(within.rank)
    if within.rank == 1:
        raise MemoryError("no room")
    within.allocate(64).give_back()
    return {}


def at_the_end(within: PartWorld) -> dict[str, Any]:
    """All have made their last exchange; two of them fail."""
    within.barrier()
    if within.rank != 1:
        raise KeyError(within.rank)
    return {"done": True}


def test_ranks_leave_a_part_together() -> None:
    steps = (counting, late, counting, at_the_end, counting)
    for found in LocalWorld(3).run(parts_in_turn, *steps):
        assert [part["result"] for part in found] == [
            {"ranks": [0, 1, 2]},
            None,
            {"ranks": [0, 1, 2]},
            None,
            {"ranks": [0, 1, 2]},
        ]
        assert found[1]["errors"] == ["rank 1: MemoryError: no room"]
        assert found[3]["errors"] == ["rank 0: KeyError: 0", "rank 2: KeyError: 2"]


def test_who_waits_for_a_rank_that_left_is_told() -> None:
    said: dict[int, str] = {}

    def step(within: PartWorld) -> dict[str, Any]:
        if within.rank == 0:
            raise ValueError("alone")
        with pytest.raises(LeftError) as error:
            within.barrier()
        said[within.rank] = str(error.value)
        raise error.value

    LocalWorld(2).run(parts_in_turn, step)
    assert said == {1: "rank 0 has left: ValueError: alone"}


# ---- the link's limit -------------------------------------------------------------------------------

LINK = """
import json
from dataclasses import replace
from moegen.bench.barrier import DeviceBarrier
from moegen.bench.config import HOST_LINK
from moegen.bench.failure import BenchError
from moegen.bench.link import LinkProbe, measure_link
from moegen.runtime.worlds import LocalWorld

CONFIG = replace(HOST_LINK, bytes=7 * 64 * 16, replays=2)

def measured(world):
    return measure_link(world, DeviceBarrier(world, 30.0), CONFIG)

def one_is_silent(world):
    probe = LinkProbe(world, CONFIG)
    probe.poison()
    if world.rank != 5:
        probe.push()
    try:
        probe.check_push()
    except BenchError as error:
        return str(error)

print(json.dumps([LocalWorld(8).run(measured), LocalWorld(8).run(one_is_silent)]))
"""


def test_the_links_limit_is_of_every_rank_to_every_rank() -> None:
    done = python(LINK)
    assert done.returncode == 0, done.stderr
    links, silent = json.loads(done.stdout)
    assert all(link == links[0] for link in links)
    link = links[0]
    assert link["bytes_per_rank"] == 7 * 64 * 16
    for name in ("push", "pull", "copy"):
        assert len(link["gbps_of_ranks"][name]) == 8
        assert link["gbps_aggregate"][name] == pytest.approx(8 * link["gbps"][name])
        us = link["us"][name]
        assert link["gbps"][name] == pytest.approx(link["bytes_per_rank"] / us / 1e3 if us > 0 else 0.0)
    assert silent[5] is None
    assert [said for rank, said in enumerate(silent) if rank != 5] == [
        f"rank {rank}: the push from rank 5 did not arrive whole" for rank in range(8) if rank != 5
    ]
