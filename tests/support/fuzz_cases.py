# SPDX-License-Identifier: Apache-2.0
"""A case of the fuzz, and what happens in it: a round trip with hostile arguments, and behind it one without."""

from __future__ import annotations

import random
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import moegen
from moegen.errors import PeerTimeoutError
from support import fuzz_values
from support.fuzz_modes import around_call, around_case
from support.fuzz_oracles import Done, Trip, Unseen
from support.fuzz_surfaces import Session, Step, Surface
from support.fuzz_tensors import Plain

Tensor = torch.Tensor
FATAL = (RecursionError, MemoryError)
"""Exceptions that are as bad as crashes."""
KEPT_HANDLES = 12
LONGEST_WAIT = 15
"""Seconds between ranks of a case."""


@dataclass(frozen=True)
class Case:
    """What is tried.

    Attributes:
        changes: (number of the call, argument, variant of `fuzz_values`).
        present: (number of the call, argument): optional arguments that are there, as they should be.
        mode: of `fuzz_modes`.
        hook: when hooks and events are called: "once", "twice", "late": when the round trip is over.
        scribble: whether results are written over before they are used.
    """

    surface: str
    ranks: int
    seed: int
    changes: tuple[tuple[int, str, str], ...] = ()
    present: tuple[tuple[int, str], ...] = ()
    mode: str = "none"
    hook: str = "once"
    scribble: bool = False


class FaultError(AssertionError):
    """What a case has found."""


@dataclass
class Call:
    """What one rank's call came to: what it has done, or the error."""

    done: Done
    values: dict[str, Any]
    error: BaseException | None = None
    trusted: bool = True


@dataclass
class Stage:
    """The objects of a surface, one per rank, that all cases use.

    Attributes:
        handles: of earlier round trips: each rank's, and what is known of them.
    """

    surface: Surface
    world: moegen.LocalWorld
    made: list[Any]
    handles: list[tuple[list[Any], Trip]] = field(default_factory=list)
    last_error: str = ""

    def __post_init__(self) -> None:
        self.errors: list[BaseException | None] = [None] * len(self.made)
        self.all_here = threading.Barrier(len(self.made))

    @staticmethod
    def of(surface: Surface, ranks: int) -> Stage:
        world = moegen.LocalWorld(ranks)
        stage = Stage(surface, world, world.run(surface.make))
        clean_trip(stage, 0)  # which may load kernels
        return stage

    def end(self) -> None:
        for made in self.made:
            made.destroy()

    def play(self, case: Case, others: list[Any]) -> list[list[Call]]:
        """The case's calls, by rank and step; the first that was refused is the last."""
        with around_case(case.mode):
            return self.world.run(self._play, case, others)

    def _play(self, world: Any, case: Case, others: list[Any]) -> list[Call]:
        session = Session(self.surface, self.made[world.rank], world, case.seed)
        calls: list[Call] = []
        handles = [of[world.rank] for of, _ in self.handles] + others
        for number, step in enumerate(self.surface.steps):
            chance = random.Random(case.seed + number)
            call = _prepared(session, step, number, case, chance, handles)
            calls.append(call)
            _make_call(session, step, call, case)
            self.errors[world.rank] = call.error
            self.all_here.wait(LONGEST_WAIT)
            refused = any(error is not None for error in self.errors)
            self.all_here.wait(LONGEST_WAIT)
            if refused:
                break
            if case.scribble and number + 1 < len(self.surface.steps):
                _scribble(call.done.result, chance)
        for hook in session.hooks:
            _ignoring_errors(hook)
        self.surface.settle(session.made)
        return calls


def _prepared(session: Session, step: Step, number: int, case: Case, chance: random.Random, handles: list[Any]) -> Call:
    changed = {name: variant for at, name, variant in case.changes if at == number}
    there = {name for at, name in case.present if at == number}
    values: dict[str, Any] = {}
    for name, param in step.params.items():
        if not param.optional or name in changed or name in there:
            values[name] = param.make(session)
    for name, variant in changed.items():
        others = {key: part for key, part in session.given.items() if isinstance(part, Tensor)}
        others |= {key: part for key, part in values.items() if isinstance(part, Tensor) and key != name}
        for result in session.kept.values():
            others |= dict(_tensors("result", result))
        scene = fuzz_values.Scene(chance, others, handles, session.surface.memory(session.made))
        try:
            values[name] = fuzz_values.make(step.params[name].kind, variant, values[name], scene)
        except fuzz_values.NotApplicableError:
            continue
    seen = {}
    for name, value in values.items():
        if isinstance(value, Iterator):
            parts = list(value)
            seen[name], values[name] = [_seen(part) for part in parts], iter(parts)
        else:
            seen[name] = _seen(value)
    session.given |= values
    return Call(Done(seen, None, {}), values)


def _make_call(session: Session, step: Step, call: Call, case: Case) -> None:
    try:
        with around_call(case.mode):
            answer = step.method(session.made)(**call.values)
        result, event = (answer, None) if step.unpack is None else step.unpack(answer)
        if event is not None:
            finish = event if callable(event) else event.wait
            if case.hook == "late":
                session.hooks.append(finish)
                call.trusted = False
            else:
                finish()
            if case.hook == "twice":
                _ignoring_errors(finish)
        call.done.result = session.kept[step.name] = result
        call.done.after = {
            name: _seen(call.values[name])
            for name, param in step.params.items()
            if param.written and name in call.values
        }
    except Exception as error:
        call.error = error


def _ignoring_errors(function: Any) -> None:
    try:
        function()
    except FATAL:
        raise
    except Exception:  # whichever it is
        return


def _scribble(result: Any, chance: random.Random) -> None:
    """Writes over what a result shows."""
    for _, tensor in _tensors("result", result):
        if tensor.numel() and not tensor.is_floating_point() and tensor.device.type == "cpu":
            number = chance.choice((-1, -(2**31), 2**31 - 1, 7, 1000))
            _ignoring_errors(lambda tensor=tensor, number=number: tensor.fill_(number))


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from _tensors(f"{name}[{index}]", part)
    else:
        for attribute in (
            "tokens",
            "counts",
            "ranges",
            "row_tokens",
            "source_starts",
            "topk_idx",
            "topk_weights",
            "payloads",
            "rows",
        ):
            part = getattr(value, attribute, None)
            if part is not None:
                yield from _tensors(f"{name}.{attribute}", part)


def _seen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value)
    if type(value) in (tuple, list):
        return [_seen(part) for part in value]
    return value


def _plain(tensor: Tensor) -> Any:
    """Its values in memory of their own."""
    ordinary = type(tensor) in (Tensor, Plain, torch.nn.Parameter)
    if not ordinary or tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
        return Unseen()
    if torch._is_functional_tensor(tensor):
        torch._sync(tensor)
        return _plain(torch._from_functional_tensor(tensor))
    if tensor.is_nested:
        return Unseen()
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    if tensor.numel() and tensor.untyped_storage().nbytes() < end:
        return Unseen()
    with torch.no_grad(), torch.inference_mode():
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        made.copy_(tensor.as_subclass(Tensor))
    return made


def judge(stage: Stage, case: Case, calls: list[list[Call]]) -> bool:
    """Returns whether the objects may have been harmed by right.

    Raises:
        FaultError: a call did what it must not.
    """
    trip, harmed = stage.surface.trip(), False
    for number in range(len(stage.surface.steps)):
        of_step = [of[number] for of in calls if number < len(of)]
        if not of_step:
            return harmed
        errors = [call.error for call in of_step]
        for error in errors:
            if isinstance(error, FATAL) or (error is not None and not isinstance(error, Exception)):
                raise FaultError("".join(traceback.format_exception(error)))
        if len({error is None for error in errors}) > 1:
            return True  # they are not alike, and a rank has waited for another
        if any(isinstance(error, PeerTimeoutError) for error in errors) or (case.scribble and case.ranks > 1):
            harmed = True  # what was written over has said what ranks send to each other
        if errors[0] is not None:
            stage.last_error = f"{type(errors[0]).__name__}: {errors[0]}"
            return harmed
        step = stage.surface.steps[number]
        if not all(step.trusted(call.done) for call in of_step):
            return True
        handles = [call.values.get("handle") for call in of_step]
        of_call = next((known for of, known in stage.handles if of[0] is handles[0]), trip)
        if not all(call.trusted for call in of_step) or case.scribble or _is_altered(case, number):
            return harmed
        try:
            _judge(step, of_call, of_step)
        except FaultError:
            if not _is_written_over(stage, case, number):
                raise
        _remember(stage, step, trip, of_step)
    return harmed


def _is_altered(case: Case, number: int) -> bool:
    """Whether a handle was put together by the caller: then nothing is known of the numbers."""
    return any(at <= number and variant == "altered" for at, _, variant in case.changes)


def _is_written_over(stage: Stage, case: Case, number: int) -> bool:
    """Whether a later call was given a result of this one to write into."""
    steps = stage.surface.steps
    aliases = [(at, name) for at, name, variant in case.changes if variant.startswith("alias")]
    return any(at > number and steps[at].params[name].written for at, name in aliases)


def _judge(step: Step, trip: Trip, calls: list[Call]) -> None:
    for call in calls:
        for name, value in call.done.seen.items():
            given = call.values[name]
            parts = zip(value, given, strict=False) if isinstance(value, list) and type(given) in (list, tuple) else ()
            for one, of in ((value, given), *parts):
                if isinstance(one, Unseen) and of.numel() and step.params[name].read:
                    if any(isinstance(_plain(part), Tensor) for _, part in _tensors("result", call.done.result)):
                        raise FaultError(
                            f"{step.name} has taken a {name} without memory: {type(of)} {of.layout} {of.device}"
                        )
                    return  # what torch traces has no values on either side
        _check_unchanged(step, call)
    try:
        step.judge(trip, [call.done for call in calls])
    except AssertionError as error:
        raise FaultError(f"{step.name}: {error}") from error
    except Exception as error:
        raise FaultError(
            f"{step.name} has taken what its judge cannot: {''.join(traceback.format_exception(error))}"
        ) from error


def _check_unchanged(step: Step, call: Call) -> None:
    written = {
        part.untyped_storage().data_ptr()
        for name, part in call.values.items()
        if step.params[name].written and isinstance(part, Tensor) and not isinstance(call.done.seen[name], Unseen)
    }
    for name, value in call.values.items():
        before = call.done.seen[name]
        if not isinstance(value, Tensor) or isinstance(before, Unseen) or step.params[name].written:
            continue
        if torch._is_functional_tensor(value) or value._is_zerotensor():
            continue
        if value.untyped_storage().data_ptr() in written:
            continue
        after = _plain(value)
        if after.shape != before.shape or not torch.equal(
            after.flatten().view(torch.uint8), before.flatten().view(torch.uint8)
        ):
            raise FaultError(f"{step.name} has changed {name}")


def _remember(stage: Stage, step: Step, trip: Trip, calls: list[Call]) -> None:
    handles = [step.handle(call.done.result) for call in calls]
    if handles[0] is None or any(of[0] is handles[0] for of, _ in stage.handles):
        return
    stage.handles.append((handles, trip))


@contextmanager
def explained(case: Case, when: str) -> Iterator[None]:
    try:
        yield
    except FaultError as fault:
        raise FaultError(f"{when}: {fault}\n{case}") from fault


def run(stage: Stage, case: Case, others: list[Any]) -> bool:
    """The case, and a round trip behind it that must be right. Returns whether the objects have to be made anew.

    Raises:
        FaultError: they did what they must not.
    """
    del stage.handles[:-KEPT_HANDLES]
    with explained(case, "in the case"):
        harmed = judge(stage, case, stage.play(case, others))
    if harmed:
        return True
    for made in stage.made:
        if hasattr(made, "check"):
            _ignoring_errors(made.check)  # what the case's calls have left to report
    with explained(case, "afterwards"):
        clean_trip(stage, case.seed + 1)
    return False


def clean_trip(stage: Stage, seed: int) -> None:
    """A round trip in which nothing is hostile, which has to be right."""
    case = Case(stage.surface.name, len(stage.made), seed)
    calls = stage.play(case, [])
    for of in calls:
        if of[-1].error is not None:
            raise FaultError("".join(traceback.format_exception(of[-1].error)))
    judge(stage, case, calls)
