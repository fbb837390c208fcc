# SPDX-License-Identifier: Apache-2.0
"""Every exception that moegen raises on purpose. All derive from `MoegenError`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class MoegenError(Exception):
    """Base of all of moegen's exceptions."""


class SpecError(MoegenError, ValueError):
    """A kernel configuration that cannot exist; the text says what is allowed."""


class InputError(MoegenError, ValueError):
    """A call whose arguments do not fit; nothing was launched."""


class HandleError(InputError):
    """A handle that is foreign to the object it was given to, or has expired."""


class CapacityError(InputError):
    """A buffer that is too small; the text names the size to use.

    Attributes:
        tokens_needed: what every rank's `max_tokens_per_rank` has to be at least, if all ranks know it; else 0.
    """

    tokens_needed: int = 0


class SlotError(MoegenError, RuntimeError):
    """More hooks are open than the object has slots, or a hook was called twice."""


class UnsupportedPlatformError(MoegenError, RuntimeError):
    """What was asked for cannot run on this machine; the text says what is missing and what to install."""


class MissingKernelError(MoegenError, RuntimeError):
    """A kernel would have to be compiled where compiling is not allowed; the text names the `moegen build` to run."""


class CacheError(MoegenError, RuntimeError):
    """A kernel cache or pack that is not safe to execute from."""


class WorldError(MoegenError, RuntimeError):
    """Ranks do not agree, or peers' memory cannot be mapped."""


@dataclass(eq=False)
class MissingRanksError(WorldError, TimeoutError):
    """Ranks did not come to what all ranks do together between their hosts, in time or because they have ended. The
    group, and the objects of it that exchange through torch.distributed, are unusable from then on.

    Attributes:
        rank: the rank that waited.
        missing: those that it waited for.
        what: what was to be exchanged; "" if it does not matter.
        timeout: seconds that it waited; None: the processes of those ranks are known to have ended.
    """

    rank: int
    missing: tuple[int, ...]
    what: str = ""
    timeout: float | None = None

    ADVICE: ClassVar[str] = "This group cannot be used any more: make a new one, and new objects"

    def __str__(self) -> str:
        who = f"rank{'s' if len(self.missing) > 1 else ''} {', '.join(map(str, self.missing))}"
        what = f" to exchange {self.what}" if self.what else ""
        if self.timeout is None:
            return f"rank {self.rank} cannot go on: the process of {who} has ended. {self.ADVICE}"
        return (
            f"rank {self.rank} waited {self.timeout:g} s for {who}{what}: all ranks make the same objects and the same "
            f"calls, in the same order. {self.ADVICE}"
        )

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.rank, self.missing, self.what, self.timeout)


@dataclass(eq=False)
class DifferentCallError(WorldError):
    """Ranks gave different arguments to the same call, where all must give equal ones. The other rank's data was left
    out; the object that raised it is unusable until `destroy()`.

    Attributes:
        op: stem of the kernel that compared them.
        rank: the rank that reports.
        peer: the rank whose arguments differ.
        arguments: those that differ, with both values.
    """

    op: str
    rank: int
    peer: int
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"rank {self.rank} and rank {self.peer} gave different arguments to the same call, and all ranks must give "
            f"equal ones: {', '.join(self.arguments)}. Data of rank {self.peer} in {self.op} was left out. This object "
            "cannot be used any more: call destroy() on all ranks and make new ones."
        )

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.op, self.rank, self.peer, self.arguments)


class DestroyedError(MoegenError, RuntimeError):
    """A call on an object after its `destroy()`."""


class BusyError(MoegenError, RuntimeError):
    """A call on an object while another thread was inside one; nothing was launched, and the object is as it was."""


class KernelFaultError(MoegenError, RuntimeError):
    """A kernel on the host target broke a rule of the machine (deadlock, missing fence, misaligned copy)."""


class LaunchError(MoegenError, RuntimeError):
    """The CUDA driver refused a launch. The other ranks may have launched: the object is unusable until `destroy()`."""


class InvalidRoutingError(MoegenError, RuntimeError):
    """A kernel met an expert id outside `[-1, num_experts)`; that selection was ignored."""


@dataclass(eq=False)
class CompileError(MoegenError, RuntimeError):
    """A kernel did not compile.

    Attributes:
        stem: name of the kernel.
        target: e.g. ``sm_90`` or ``host``.
        options: the compiler's options, in order.
        log: what the compiler printed.
        folder: a folder with the source, headers, log and a `repro.sh`, or "" if it could not be written.
    """

    stem: str
    target: str
    options: tuple[str, ...]
    log: str
    folder: str = ""

    def __str__(self) -> str:
        where = f"\nreproduce: {self.folder}/repro.sh" if self.folder else ""
        return f"{self.stem} does not compile for {self.target} with {' '.join(self.options)}:\n{self.log}{where}"

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.stem, self.target, self.options, self.log, self.folder)


class LeftOutError(MoegenError, RuntimeError):
    """The other ranks have left this one out, because they take it for dead. Raised once, by the next call, which was
    not launched: make it again, and all calls that the others make, to be taken back.
    """


@dataclass(eq=False)
class PeerTimeoutError(MoegenError, TimeoutError):
    """A wait for a peer ran out of time; the object that raised it is unusable until `destroy()`.

    Attributes:
        op: stem of the kernel that waited.
        phase: what it waited for.
        rank: the rank that waited.
        peer: the rank that was missing.
        index: row or token that was awaited, -1 where that makes no sense.
        epoch: sequence number of the operation.
        expected: the value that was awaited.
        seen: the value that stood there instead.
        timeout: the deadline in seconds.
    """

    op: str
    phase: str
    rank: int
    peer: int
    index: int
    epoch: int
    expected: int
    seen: int
    timeout: float

    def __str__(self) -> str:
        row = f", row {self.index}" if self.index >= 0 else ""
        return (
            f"rank {self.rank} waited {self.timeout:g} s for {self.phase} of rank {self.peer}{row} in {self.op} "
            f"(epoch {self.epoch}: expected {self.expected:#x}, saw {self.seen:#x}). Is rank {self.peer} alive, and do "
            "all ranks make the same calls in the same order, with equal arguments where they must be equal? This "
            "object cannot be used any more: call destroy() and make a new one."
        )

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        fields = (self.op, self.phase, self.rank, self.peer, self.index)
        return type(self), (*fields, self.epoch, self.expected, self.seen, self.timeout)
