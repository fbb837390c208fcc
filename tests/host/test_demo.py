# SPDX-License-Identifier: Apache-2.0
"""The demo runs across processes, finds its kernels again, and notices a wrong layer."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moegen.demo import dense, memory, plan, progress, ranks, text
from moegen.demo.layer import make_expert
from moegen.errors import CapacityError, InputError
from moegen.kernels.presets import preset
from moegen.runtime.worlds import LocalWorld

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny() -> plan.Plan:
    return plan.make_plan(4, "cpu", "tiny", 24, 2)


@pytest.fixture(scope="module")
def results(tiny: plan.Plan) -> list[ranks.RankResult]:
    plan.build(tiny)
    return LocalWorld(tiny.num_ranks).run(ranks._run_rank, tiny)


@pytest.mark.dist
def test_the_command_runs_four_processes_and_compiles_once() -> None:
    command = [
        sys.executable,
        "-m",
        "moegen",
        "demo",
        "--device",
        "cpu",
        "--ranks",
        "4",
        "--tokens",
        "24",
        "--steps",
        "2",
    ]
    for expected in ("from cache", "compiled 0, from cache 4"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        assert expected in done.stdout
        assert "within the bound" in done.stdout
        assert "4 processes on cpu" in done.stdout


def test_the_ranks_agree_with_the_dense_layer(tiny: plan.Plan, results: list[ranks.RankResult]) -> None:
    verdict = dense.compare(tiny, results)
    assert verdict.ok
    assert verdict.worst > 0.01, "a bound that is never nearly met proves nothing"
    assert verdict.elements == 4 * 2 * 24 * 128


@pytest.mark.parametrize("damage", ["tokens shifted", "weights shifted", "one element off", "not a number"])
def test_a_wrong_layer_is_over_the_bound(tiny: plan.Plan, results: list[ranks.RankResult], damage: str) -> None:
    out, weights = results[1].out.clone(), results[1].weights
    if damage == "tokens shifted":
        out[0] = out[0].roll(1, dims=0)
    elif damage == "weights shifted":
        weights = weights.roll(1, dims=2)
    elif damage == "one element off":
        out[1, 5, 7] += 0.1
    else:
        out[1, 5, 7] = float("nan")
    wrong = dataclasses.replace(results[1], out=out, weights=weights)
    assert not dense.compare(tiny, [results[0], wrong, *results[2:]]).ok


def test_an_expert_is_within_its_error_of_the_exact_one() -> None:
    expert = make_expert(preset("tiny"), 3, CPU)
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(1))
    exact, error = expert.exact(x)
    off = (expert(x).double() - exact).abs()  # float32 in, float32 out: no rounding to bfloat16
    assert (off <= error + 2.0**-24 * exact.abs()).all()


def test_text_is_real_and_wraps_around() -> None:
    content = text.text()
    assert len(content) > 50_000
    assert text.piece(b"abc", 2, 5) == list(b"cabca")


def test_what_the_user_leaves_open_fits_the_machine() -> None:
    chosen = plan.make_plan(0, "cpu", "", 0, 1)
    assert (chosen.num_ranks, chosen.preset.name, chosen.tokens, chosen.world) == (4, "tiny", 64, "processes")
    with pytest.raises(InputError, match="cpu or cuda"):
        plan.make_plan(4, "tpu", "", 0, 1)
    with pytest.raises(InputError, match="no preset"):
        plan.make_plan(4, "cpu", "huge", 0, 1)


def test_a_layer_that_does_not_fit_is_refused_with_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda _: 20 * 10**9)
    large = plan.make_plan(4, "cpu", "deepseek-v3", 64, 5)
    assert 22.5e9 < memory.needed(large).weights < 22.6e9
    with pytest.raises(
        CapacityError, match=r"deepseek-v3 with 4 ranks on cpu needs 2\d\.\d GB .*20\.0 GB.*gpt-oss-120b"
    ):
        memory.check(large)
    small = plan.make_plan(4, "cpu", "tiny", 64, 5)
    need, there = memory.check(small)
    assert need.total < 2e9 and there == 20 * 10**9
    with pytest.raises(CapacityError, match=r"--preset tiny with fewer, e.g. --ranks 2 or --tokens 50000000"):
        memory.check(dataclasses.replace(small, tokens=100_000_000))


def test_the_need_of_a_gpu_is_one_ranks_where_each_has_its_own() -> None:
    own = plan.Plan(preset("deepseek-v3"), 8, 64, 5, "cuda", "processes")
    shared = dataclasses.replace(own, world="local")
    assert 8 * memory.needed(own).weights == memory.needed(shared).weights
    assert memory.needed(own).processes == 0


def test_the_limits_of_control_groups_are_found(tmp_path: Path) -> None:
    """A limit of the group around it counts too; cached files are given back."""
    files = {
        "outer/memory.max": "1000\n",
        "outer/memory.current": "900\n",
        "outer/memory.stat": "anon 1\ninactive_file 300\n",
        "outer/inner/memory.max": "max\n",
        "memory/old/memory.limit_in_bytes": "5000\n",
        "memory/old/memory.usage_in_bytes": "4000\n",
        "memory/old/memory.stat": "total_inactive_file 10\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    groups = tmp_path / "groups"
    groups.write_text("4:memory:/old\n7:cpu:/old\n0::/outer/inner\n")
    assert sorted(memory._left_in_groups(tmp_path, groups)) == [400, 1010]
    assert list(memory._left_in_groups(tmp_path, tmp_path / "none")) == []


def test_long_parts_say_how_far_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    assert list(progress.reported(range(4), "things")) == [0, 1, 2, 3]
    assert "things: 1 of 4\n" in capsys.readouterr().err
    assert list(progress.reported(range(4), "things", silent=True)) == [0, 1, 2, 3]
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    assert list(progress.reported(range(4), "things")) == [0, 1, 2, 3]
    assert capsys.readouterr().err == ""
