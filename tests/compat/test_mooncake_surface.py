# SPDX-License-Identifier: Apache-2.0
"""Mooncake EP as its users see and make it: names, sizes, replacement, and SGLang's call site between processes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.forked import python
from support.processes import Processes

import moegen
from moegen import env
from moegen.compat import mooncake

RANKS, EXPERTS, TOPK, HIDDEN, MAX_TOKENS = 2, 8, 4, 2048, 16
ROOT = Path(__file__).resolve().parents[2]

DISPATCH = (
    "self x topk_idx active_ranks num_max_dispatch_tokens_per_rank num_experts timeout_us use_fp8 async_finish "
    "return_recv_hook"
)
COMBINE = "self x topk_idx topk_weights active_ranks timeout_us handle zero_copy async_finish return_recv_hook out"


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (mooncake.Buffer.__init__, "self group num_ep_buffer_bytes disable_p2p"),
        (mooncake.Buffer.dispatch, DISPATCH),
        (mooncake.Buffer.combine, COMBINE),
        (mooncake.Buffer.get_ep_buffer_size_hint, "num_max_dispatch_tokens_per_rank hidden num_ranks num_experts"),
        (mooncake.Buffer.get_next_combine_buffer, "self handle"),
        (mooncake.Buffer.update_ep_member, "self"),
        (mooncake.Buffer.connect, "self is_update"),
    ],
)
def test_signatures_are_mooncakes(function: object, names: str) -> None:
    assert list(inspect.signature(function).parameters) == names.split()  # type: ignore[arg-type]


def test_sizes_are_mooncakes() -> None:
    hint = mooncake.Buffer.get_ep_buffer_size_hint
    assert hint(128, 7168, 8, 288) == 4 * 288 * 4 + 4 * 288 * 128 * (32 + 2 * 7168)
    buffer = mooncake.Buffer(moegen.LocalWorld(3).ranks[2], 7, disable_p2p=True)
    assert (buffer.rank, buffer.group_size, buffer.num_ep_buffer_bytes, buffer.disable_p2p) == (2, 3, 7, True)
    buffer.connect()
    buffer.destroy()


@pytest.mark.parametrize(
    ("value", "means"), [("", False), ("0", False), ("1", True), ("on", True), ("TRUE", True), ("Yes", True)]
)
def test_mooncakes_switch(monkeypatch: pytest.MonkeyPatch, value: str, means: bool) -> None:
    monkeypatch.setenv("MOONCAKE_EP_USE_TORCH_ALLTOALL", value)
    assert env.mooncake_uses_alltoall() == means


REPLACED = """
import importlib.util
from moegen.compat.mooncake.installed import install_if_asked
install_if_asked()
assert importlib.util.find_spec("mooncake.mooncake_ep_buffer").name == "mooncake.mooncake_ep_buffer"
import mooncake.mooncake_ep_buffer
from mooncake.mooncake_ep_buffer import Buffer, EventOverlap
import moegen.compat.mooncake
assert Buffer is moegen.compat.mooncake.Buffer is mooncake.mooncake_ep_buffer.Buffer
"""


def test_it_replaces_mooncakes_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEGEN_REPLACE_MOONCAKE_EP", "1")
    done = python(REPLACED)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("MOEGEN_REPLACE_MOONCAKE_EP", "0")
    done = python(REPLACED)
    assert done.returncode != 0 and "No module named 'mooncake'" in done.stderr
    entry = 'moegen_mooncake_ep = "moegen.compat.mooncake.installed:install_if_asked"'
    assert (ROOT / "pyproject.toml").read_text().count(entry) == 2


@pytest.fixture(scope="module")
def group() -> Iterator[Processes]:
    processes = Processes(RANKS, "cpu")
    yield processes
    processes.stop()


def sglang(rank: int, device: str, return_recv_hook: bool) -> str:
    """Its dispatcher: no deadline in the first execution, one health tensor for all calls, hook or event."""
    group = torch.distributed.group.WORLD
    size = mooncake.Buffer.get_ep_buffer_size_hint(MAX_TOKENS, HIDDEN, RANKS, EXPERTS)
    buffer = mooncake.Buffer(group, size)
    active_ranks = torch.ones(RANKS, dtype=torch.int32)
    generator = torch.Generator().manual_seed(rank)
    asked = {"async_finish": not return_recv_hook, "return_recv_hook": return_recv_hook}
    for timeout_us in (-1, 10_000_000):
        x = torch.randn(5 + 3 * rank, HIDDEN, generator=generator).bfloat16()
        ids = torch.rand(len(x), EXPERTS, generator=generator).topk(TOPK, dim=1).indices
        weights = torch.rand(len(x), TOPK, generator=generator)
        received, count, handle, event, hook = buffer.dispatch(
            x, ids.to(torch.int64), active_ranks, MAX_TOKENS, EXPERTS, timeout_us, use_fp8=True, **asked
        )
        hook() if return_recv_hook else event.current_stream_wait()  # type: ignore[misc]
        assert int(count.sum()) > 0
        tokens, scales = received
        y = (tokens.float() * scales.repeat_interleave(128, dim=2)).bfloat16()
        combined, event, hook = buffer.combine(y, ids, weights, active_ranks, timeout_us, handle, **asked)
        hook() if return_recv_hook else event.current_stream_wait()  # type: ignore[misc]
        want = x.float() * weights.sum(dim=1, keepdim=True)
        if not ((combined.float() - want).abs() <= want.abs() / 8 + 0.1).all():
            return "wrong"
    torch.distributed.barrier()
    buffer.destroy()
    return "ok"


@pytest.mark.dist
@pytest.mark.parametrize("return_recv_hook", [True, False], ids=["hook", "event"])
def test_sglangs_call_site(group: Processes, return_recv_hook: bool) -> None:
    assert group.call(sglang, return_recv_hook) == ["ok"] * RANKS
