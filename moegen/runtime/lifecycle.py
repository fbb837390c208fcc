# SPDX-License-Identifier: Apache-2.0
"""What becomes of an object whose launches may fail: alive, poisoned by a failure, destroyed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch

from moegen.errors import (
    DestroyedError,
    DifferentCallError,
    LaunchError,
    MoegenError,
    PeerTimeoutError,
    SlotError,
)
from moegen.runtime.memory import SymmetricMemory
from moegen.runtime.ownership import Exclusive, exclusive
from moegen.runtime.streams import read_by_host, wait_for_stream
from moegen.runtime.waiting import pointless_if

if TYPE_CHECKING:
    from typing_extensions import Self

    from moegen.runtime.worlds import RankWorld

T = TypeVar("T")


class Launches(Protocol):
    """What of an object's launches matters here."""

    memory: SymmetricMemory
    buffer_bytes: int

    def raise_expired(self) -> None: ...

    def raise_what_happened(self) -> None: ...


Ops = TypeVar("Ops", bound=Launches)


class Lifecycle(Exclusive, Generic[Ops]):
    """The part of what users hold that raises what kernels report, and ends."""

    device: torch.device
    world: RankWorld
    _ops: Ops | None = None
    _poison: MoegenError | None = None

    @exclusive
    def check(self) -> None:
        """Raises what the kernels have reported so far, without waiting for those under way.

        Raises:
            PeerTimeoutError: a call waited for a rank in vain; from then on every call raises it until `destroy()`.
            DifferentCallError: a rank's arguments differed where they must be equal; from then on as well.
            InvalidRoutingError: a call met an id that names no expert.
            DestroyedError: after `destroy()`.
            BusyError: another thread is inside a call.
        """
        self._raise_reported()

    def _raise_reported(self) -> None:
        """`check`, for those that hold the lock already."""
        ops = self._alive()
        if self._poison is not None:
            raise copy.copy(self._poison)
        self._raise_by(ops.raise_what_happened)

    def _raise_by(self, look: Callable[[], None]) -> None:
        try:
            look()
        except (PeerTimeoutError, DifferentCallError) as error:
            self._poison = error
            raise

    @exclusive
    def synchronize(self) -> None:
        """Waits for the current stream and raises what went wrong, which `torch.cuda.synchronize` alone does not."""
        self._synchronize_device()
        self._raise_reported()

    @exclusive
    def destroy(self) -> None:
        """Gives the buffers back once all that was launched on the device is over. Not collective; may be called again.

        A graph that holds calls of this object must not be replayed afterwards.

        Raises:
            BusyError: another thread is inside a call; nothing was freed.
        """
        ops, self._ops = self._ops, None
        if ops is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # calls may have gone to any stream
            ops.memory.give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    @property
    def destroyed(self) -> bool:
        return self._ops is None

    def _alive(self) -> Ops:
        if self._ops is None:
            raise DestroyedError(f"this {type(self).__name__} was destroyed; make a new one")
        return self._ops

    def _synchronize_device(self) -> None:
        """Ranks that are gone end a wait for torch.distributed; kernels' waits for them end by themselves."""
        if self.device.type == "cuda":
            with pointless_if(self.world.raise_if_ranks_are_gone):
                wait_for_stream(self.device)

    def _read(self, numbers: torch.Tensor) -> list[Any]:
        """What launches have made, once they have."""
        with pointless_if(self.world.raise_if_ranks_are_gone):
            return read_by_host(numbers)

    def _launch(self, op: Callable[..., T], *arguments: Any) -> T:
        """A launch that fails leaves this rank one epoch behind: the object is poisoned. On the host a launch is over
        when it returns, so a wait that expired is raised at once. What the object survives is left for the next check,
        as on a GPU: the call's result is needed to make the calls that the other ranks make.
        """
        try:
            result = op(*arguments)
        except SlotError:  # nothing was launched
            raise
        except MoegenError as error:
            self._poison = error
            raise
        except BaseException as error:  # Ctrl-C among them
            why = f"{type(error).__name__} {error}".strip()
            self._poison = LaunchError(f"a call was not made to its end ({why}): call destroy() and make a new object")
            raise
        if self.device.type == "cpu":
            self._raise_by(self._alive().raise_expired)
        return result
