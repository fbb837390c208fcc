# SPDX-License-Identifier: Apache-2.0
"""Values that the ranks of a torch process group exchange through its store: with a deadline, and with the names of the
ranks that have not come, whatever the backend.

Each rank puts its value under a key of its own and waits for the others' keys. A rank that comes to exchange n+1 has
read all values of exchange n, so whoever has completed n+1 can remove what it had put there for n.
"""

from __future__ import annotations

import copy
import logging
import pickle
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from moegen.errors import MissingRanksError, WorldError
from moegen.runtime.processes import ProcessName, gone, this_process
from moegen.runtime.waiting import until

log = logging.getLogger(__name__)

T = TypeVar("T")

_PIECE_BYTES = 4 << 20
"""Of a value under one key: torch's TCPStore takes up to 8 MiB."""

_LOOK_SECONDS = 0.2
"""How often a waiting rank looks for processes that have ended, and for ranks that have given up."""

ANSWER_SECONDS = 2.0
"""After a failure: how long the other ranks have to say that they are there."""


class GroupExchange:
    """One rank's end. Ranks make the same exchanges in the same order."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._broken: WorldError | None = None
        self._names: list[ProcessName | None] = [None] * size
        self._next = 0
        self._before: list[str] = []
        self._next_look = 0.0
        # A group may be destroyed and made again with the same name and store.
        self._prefix = f"moegen/{self._ask(store.add, f'moegen/uses/{rank}', 1)}"
        self._put("name", pickle.dumps(this_process()))

    def __call__(self, value: T, what: str, seconds: float) -> list[T]:
        """Every rank's `value`, in rank order.

        Raises:
            MissingRanksError: ranks did not come within so many seconds, or have ended. The group cannot be used then.
            WorldError: the same has happened before, here or on another rank; or the store does not answer.
        """
        self.raise_if_broken()
        number, self._next = self._next, self._next + 1
        try:
            keys = self._put(f"{number}", pickle.dumps(value))
            missing = [rank for rank in range(self._size) if rank != self._rank]
            if not until(lambda: self._have_come(f"{number}", missing), seconds):
                missing = [rank for rank in missing if not self._is_there(f"{number}", rank)]
                if missing:
                    raise MissingRanksError(self._rank, tuple(missing), what, seconds)
            self._raise_if_given_up()  # by one that waited for this rank
            values = [value if rank == self._rank else self._get(f"{number}", rank) for rank in range(self._size)]
        except BaseException as error:  # also Ctrl-C: this rank is out of step
            self.give_up(error)
            raise
        self._remove(self._before)
        self._before = keys
        return values

    def raise_if_broken(self) -> None:
        if self._broken is not None:
            raise copy.copy(self._broken)

    def raise_if_gone(self) -> None:
        """Looks, now and then, whether processes of the group have ended, or have given it up.

        Raises:
            MissingRanksError: which.
            WorldError: why another rank has given the group up.
        """
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        self._raise_if_given_up()  # first: whoever gives up may end for that, and is not the cause
        self._learn_names()
        ended = gone(self._names)
        if ended:
            raise MissingRanksError(self._rank, ended)

    def _raise_if_given_up(self) -> None:
        if self._ask(self._store.check, [f"{self._prefix}/given_up"]):
            raise pickle.loads(self._ask(self._store.get, f"{self._prefix}/given_up"))

    def missing_after_failure(self, what: str, waited: float) -> MissingRanksError | None:
        """Of something else that all ranks do together, and that all of them see fail: those are missing whose
        processes have ended, or else those that do not say soon that they see it too. None: all are there.
        """
        self._learn_names()
        ended = gone(self._names)
        if ended:
            return MissingRanksError(self._rank, ended)
        self._put("sees_failure", b"")
        missing = [rank for rank in range(self._size) if rank != self._rank]
        if until(lambda: self._have_come("sees_failure", missing), ANSWER_SECONDS):
            return None
        silent = tuple(rank for rank in missing if not self._is_there("sees_failure", rank))
        return MissingRanksError(self._rank, silent, what, waited) if silent else None

    def give_up(self, why: BaseException) -> None:
        """No exchange can be made any more; the other ranks read so in the store."""
        if self._broken is not None:
            return
        if isinstance(why, WorldError):
            self._broken = copy.copy(why)  # without the frames that its traceback holds
        else:
            self._broken = WorldError(
                f"rank {self._rank} stopped waiting ({type(why).__name__}). {MissingRanksError.ADVICE}"
            )
        with suppress(RuntimeError):
            self._store.set(f"{self._prefix}/given_up", pickle.dumps(self._broken))

    def _have_come(self, word: str, missing: list[int]) -> bool:
        """Takes those out of `missing` that have."""
        while missing and self._is_there(word, missing[0]):
            del missing[0]
        if missing:
            try:
                self.raise_if_gone()
            except MissingRanksError:  # unless it has come, and gone since
                missing[:] = [rank for rank in missing if not self._is_there(word, rank)]
                if missing:
                    raise
        return not missing

    def _learn_names(self) -> None:
        for rank, name in enumerate(self._names):
            if name is None and rank != self._rank and self._is_there("name", rank):
                self._names[rank] = self._get("name", rank)

    def _key(self, word: str, rank: int) -> str:
        return f"{self._prefix}/{word}/{rank}"

    def _is_there(self, word: str, rank: int) -> bool:
        return bool(self._ask(self._store.check, [self._key(word, rank)]))

    def _put(self, word: str, content: bytes) -> list[str]:
        """The keys that it takes; last comes what says that all of it is there."""
        key = self._key(word, self._rank)
        begins = range(_PIECE_BYTES, len(content), _PIECE_BYTES)
        keys = [f"{key}/{part}" for part in range(len(begins))]
        for more, begin in zip(keys, begins, strict=True):
            self._ask(self._store.set, more, content[begin : begin + _PIECE_BYTES])
        self._ask(self._store.set, key, len(keys).to_bytes(4, "little") + content[:_PIECE_BYTES])
        return [*keys, key]

    def _get(self, word: str, rank: int) -> Any:
        key = self._key(word, rank)
        first = self._ask(self._store.get, key)
        more = int.from_bytes(first[:4], "little")
        return pickle.loads(first[4:] + b"".join(self._ask(self._store.get, f"{key}/{part}") for part in range(more)))

    def _remove(self, keys: list[str]) -> None:
        """A store that cannot keeps them."""
        with suppress(RuntimeError):
            for key in keys:
                self._store.delete_key(key)

    def _ask(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except RuntimeError as error:
            ended = gone(self._names)
            if ended:
                raise MissingRanksError(self._rank, ended) from error
            raise WorldError(
                f"rank {self._rank}: the store of the group does not answer ({_first_line(error)}). Has the process "
                f"that holds it, usually that of rank 0, ended? {MissingRanksError.ADVICE}"
            ) from error


_of_groups: WeakKeyDictionary[Any, GroupExchange | None] = WeakKeyDictionary()
_making = threading.Lock()


def exchange_of(group: Any) -> GroupExchange | None:
    """The group's; None if it has no store that answers."""
    import torch.distributed as dist

    with _making:
        if group not in _of_groups:
            made: GroupExchange | None = None
            try:
                store = dist.distributed_c10d._get_process_group_store(group)
                made = GroupExchange(store, dist.get_rank(group), dist.get_world_size(group)) if store else None
            except (KeyError, AttributeError, WorldError) as error:
                if isinstance(error.__cause__, dist.DistNetworkError):  # there is one, without a server
                    raise
                log.info("a process group has no store that answers (%s): exchanges cannot name missing ranks", error)
            _of_groups[group] = made
        return _of_groups[group]


def exchange_in_group(group: Any, value: T, what: str, seconds: float) -> list[T]:
    """As GroupExchange; for a group without a store by torch's object collective, which cannot name who is missing."""
    exchange = exchange_of(group)
    if exchange is not None:
        return exchange(value, what, seconds)
    return _gather_objects(group, value, what, seconds)


def _gather_objects(group: Any, value: T, what: str, seconds: float) -> list[T]:
    """In a thread, which is left behind if it does not end: nothing else ends such a wait."""
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size(group)
    failures: list[BaseException] = []
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def gather() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            dist.all_gather_object(values, value, group=group)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=gather, name="moegen-exchange", daemon=True)
    thread.start()
    if not until(lambda: not thread.is_alive(), seconds):
        raise WorldError(
            f"rank {dist.get_rank(group)} waited {seconds:g} s for all ranks to exchange {what}; which are missing is "
            f"not known, because their group has no store. {MissingRanksError.ADVICE}"
        )
    if failures:
        raise WorldError(f"the ranks could not exchange {what}: {_first_line(failures[0])}") from failures[0]
    return values


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
