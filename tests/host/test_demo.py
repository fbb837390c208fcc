# SPDX-License-Identifier: Apache-2.0
"""The demo runs across processes, finds its kernels again, and notices a wrong layer."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moegen.demo import dense, plan, ranks, text
from moegen.demo.layer import make_expert
from moegen.errors import InputError
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
