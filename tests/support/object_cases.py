# SPDX-License-Identifier: Apache-2.0
"""Rules of every object that users hold, on every device: torch's modes and defaults at its construction do not matter,
it cannot be copied, and one thread at a time uses it.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import moegen
from moegen import errors
from moegen.compat import deep_ep, flashinfer, mooncake
from moegen.runtime.lifecycle import Lifecycle
from moegen.runtime.worlds import RankWorld
from support.object_kinds import KINDS, MAX_TOKENS, PAYLOAD_BYTES, Data, Kind, in_step

EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=str)
REFUSED = "a moegen .* belongs to its process .*; it cannot be pickled or copied"


def on_ranks(kind: Kind, device: str, work: Callable[[Any, RankWorld], Any]) -> list[Any]:
    """`work` with an object on each rank, which is used once more afterwards and destroyed."""

    def rank(world: RankWorld) -> Any:
        made = kind.make(kind, world)
        result = work(made, world)
        kind.round_trip(made, world)
        in_step(world)
        made.destroy()
        return result

    return moegen.LocalWorld(kind.ranks, device).run(rank)


@EVERY_KIND
def test_made_and_used_in_inference_mode_first(kind: Kind, device: str) -> None:
    def rank(world: RankWorld) -> None:
        with torch.inference_mode():
            made = kind.make(kind, world)
            kind.round_trip(made, world)
        kind.round_trip(made, world)
        with torch.inference_mode():
            kind.round_trip(made, world)
        in_step(world)
        made.destroy()

    moegen.LocalWorld(kind.ranks, device).run(rank)


@pytest.fixture
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@EVERY_KIND
@pytest.mark.usefixtures("default_dtype")
def test_made_and_used_under_other_defaults(kind: Kind, device: str) -> None:
    """As vLLM's and DeepEP's own tests do; a tensor on "meta" has no memory to give a kernel."""

    def rank(world: RankWorld) -> None:
        for default in ("meta", "cuda") if device == "cuda" else ("meta",):
            with torch.device(default):
                made = kind.make(kind, world)
                kind.round_trip(made, world)
                if isinstance(made, Lifecycle):
                    made.warmup()  # type: ignore[attr-defined]
                in_step(world)
                made.destroy()

    moegen.LocalWorld(kind.ranks, device).run(rank)


@EVERY_KIND
def test_copies_are_refused_and_leave_the_original_alone(kind: Kind, device: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self, made: Any) -> None:
            super().__init__()
            self.comm = made

    def work(made: Any, world: RankWorld) -> None:
        for held in (made, world):
            for stolen in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match=REFUSED):
                    stolen(held)
        with pytest.raises(TypeError, match=REFUSED):
            copy.deepcopy(Model(made))

    on_ranks(kind, device, work)


def test_worlds_cannot_be_copied(device: str) -> None:
    for stolen in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=REFUSED):
            stolen(moegen.LocalWorld(2, device))


def test_handles_of_low_latency_buffers_cannot_be_copied(device: str) -> None:
    kind = next(kind for kind in KINDS if kind.name == "deep_ep.Buffer-low-latency")

    def work(made: Any, world: RankWorld) -> None:
        data = Data(kind, world)
        in_step(world)
        handle = kind.dispatch(made, data)[2]
        for stolen in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="a moegen handle belongs to its process"):
                stolen(handle)

    on_ranks(kind, device, work)


# ---- what belongs to an object may be written in any mode -----------------------------------------------------------


def written_later(device: str, kind: Kind, steps: Callable[[Any, Any], list[Callable[[], object]]]) -> None:
    """`steps` of an object and of what its dispatch in inference mode returned, each made inside and outside."""

    def rank(world: RankWorld) -> None:
        with torch.inference_mode():
            made = kind.make(kind, world)
            data = Data(kind, world)
            in_step(world)
            kept = kind.dispatch(made, data)
            in_step(world)
            todo = steps(made, kept)
        for step in todo:
            step()
            with torch.inference_mode():
                step()
        in_step(world)
        made.destroy()

    moegen.LocalWorld(kind.ranks, device).run(rank)


def kind_of(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


def test_masks_and_buffers_of_deep_ep_are_written_later(device: str) -> None:
    def steps(made: deep_ep.Buffer, kept: Any) -> list[Callable[[], object]]:
        status = torch.zeros(2, dtype=torch.int32, device=kept[0].device)  # of the user, in inference mode
        rows = made.get_next_low_latency_combine_buffer(kept[2])
        local = made.get_local_buffer_tensor(torch.float32, use_rdma_buffer=True)
        return [
            lambda: made.low_latency_update_mask_buffer(0, False),
            made.low_latency_clean_mask_buffer,
            lambda: made.low_latency_query_mask_buffer(status),
            lambda: rows.fill_(1),
            lambda: local.fill_(1),
        ]

    written_later(device, kind_of("deep_ep.Buffer-low-latency"), steps)


@pytest.mark.parametrize("path", ["ipc", "collective"])
def test_rows_of_one_sided_objects_are_written_later(path: str, device: str) -> None:
    def rank(world: RankWorld) -> None:
        kind = kind_of("OneSided" if path == "ipc" else "OneSided-collective")
        size = 2 * kind.hidden + PAYLOAD_BYTES
        with torch.inference_mode():
            made = moegen.OneSided(world, payload_bytes=size, expert_rows=True, path=path, **kind.sizes)
            rows, data = made.expert_rows(), Data(kind, world)
            in_step(world)
            made.dispatch(data.ids, data.payloads)
            in_step(world)
        rows.zero_()
        in_step(world)
        received = made.dispatch(data.ids, data.payloads)
        in_step(world)
        received.payloads[0].zero_()
        in_step(world)
        made.destroy()

    moegen.LocalWorld(2, device).run(rank)


def test_workspaces_of_flashinfer_are_written_later(device: str) -> None:
    def steps(made: flashinfer.MoeAlltoAll, kept: Any) -> list[Callable[[], object]]:
        rows = made.get_combine_payload_tensor_in_workspace(MAX_TOKENS, 64, torch.bfloat16)
        return [lambda: rows.fill_(1), lambda: made.workspace[0].fill_(1), lambda: kept[0][0].fill_(1)]

    written_later(device, kind_of("flashinfer.MoeAlltoAll"), steps)


def test_masks_of_mooncake_are_written_later(device: str) -> None:
    """The first mask is the user's own; it may be an inference tensor, and others are copied there."""
    kind = kind_of("mooncake.Buffer")

    def rank(world: RankWorld) -> None:
        with torch.inference_mode():
            made: mooncake.Buffer = kind.make(kind, world)
            kind.round_trip(made, world)
            other = Data(kind, world)
        data = Data(kind, world)
        for each in (data, other):
            in_step(world)
            kept = kind.dispatch(made, each)
            in_step(world)
            kind.check(kind.combine(made, each, kept), each)
        in_step(world)
        made.destroy()

    moegen.LocalWorld(kind.ranks, device).run(rank)


# ---- one thread at a time -------------------------------------------------------------------------------------------


class Gate:
    """Holds the next launch of one object's thread until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.armed: threading.Thread | None = None
        self.reached, self.opened = threading.Event(), threading.Event()
        launch = Lifecycle._launch

        def held(owner: Any, *arguments: Any) -> Any:
            if threading.current_thread() is self.armed:
                self.armed = None
                self.reached.set()
                assert self.opened.wait(30)
            return launch(owner, *arguments)

        monkeypatch.setattr(Lifecycle, "_launch", held)


@EVERY_KIND
def test_a_second_thread_is_refused_at_once(kind: Kind, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)

    def work(made: Any, world: RankWorld) -> None:
        kind.round_trip(made, world)
        if world.rank != 0:
            kind.round_trip(made, world)
            return
        failed: list[BaseException] = []

        def first() -> None:
            try:
                with world.stream_context():  # type: ignore[attr-defined]
                    kind.round_trip(made, world)
            except BaseException as error:
                failed.append(error)

        thread = gate.armed = threading.Thread(target=first)
        thread.start()
        assert gate.reached.wait(30)
        data = Data(kind, world)
        refused: list[Callable[[], object]] = [lambda: kind.dispatch(made, data), made.destroy]
        if isinstance(made, Lifecycle):
            refused += [made.check, made.synchronize, made.warmup]  # type: ignore[attr-defined]
        for call in refused:
            with pytest.raises(errors.BusyError, match="used by another thread"):
                call()
        gate.opened.set()
        thread.join()
        if failed:
            raise failed[0]

    on_ranks(kind, device, work)


@pytest.mark.parametrize("name", ["ExpertParallel", "HighThroughput-packed"])
def test_threads_without_order_get_right_results_or_are_refused(name: str, device: str) -> None:
    """On one rank, where calls of different threads need no common order."""
    kind = kind_of(name)

    def work(world: RankWorld) -> None:
        made = kind.make(kind, world)
        wrong: list[BaseException] = []

        def loop(number: int) -> None:
            data = Data(kind, world)
            data.x, data.want = data.x * 2**number, data.want * 2**number
            for _ in range(30):
                try:
                    kept = kind.dispatch(made, data)
                    kind.check(kind.combine(made, data, kept), data)
                except errors.BusyError:
                    continue
                except BaseException as error:
                    wrong.append(error)

        threads = [threading.Thread(target=loop, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, wrong[0]
        made.synchronize()
        made.destroy()

    moegen.LocalWorld(1, device).run(work)


def test_a_hook_may_be_called_by_another_thread_than_its_dispatch(device: str) -> None:
    """One after the other is no conflict: frameworks hand buffers from thread to thread."""
    kind = kind_of("deep_ep.Buffer-low-latency")

    def work(made: deep_ep.Buffer, world: RankWorld) -> None:
        data = Data(kind, world)
        results: list[Any] = []

        def dispatch() -> None:
            with world.stream_context():  # type: ignore[attr-defined]
                results.append(
                    made.low_latency_dispatch(
                        data.x, data.ids, MAX_TOKENS, kind.experts, use_fp8=False, return_recv_hook=True
                    )
                )

        in_step(world)
        thread = threading.Thread(target=dispatch)
        thread.start()
        thread.join()
        (kept,) = results
        kept[-1]()
        in_step(world)
        kind.check(kind.combine(made, data, kept), data)

    on_ranks(kind, device, work)
