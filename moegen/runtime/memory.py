# SPDX-License-Identifier: Apache-2.0
"""Symmetric memory: a buffer of the same size on every rank, each mapped into all of them.

This is the seam behind which a world keeps its way of mapping: plain allocations (virtual ranks), a file in shared
memory (CPU processes), torch symmetric memory (one GPU per process).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from moegen import leftovers
from moegen.errors import CapacityError, MoegenError, UnsupportedPlatformError
from moegen.runtime.waiting import SETUP_SECONDS

Exchange = Callable[..., list[Any]]
"""`RankWorld.exchange`."""

_Place = tuple[str, tuple[int, int]]
"""The path of a rank's file, and the file's device and number."""


@dataclass
class SymmetricMemory:
    """One rank's view of it.

    Attributes:
        local: this rank's buffer, uint8 [bytes], zeroed.
        peers: address of every rank's buffer as mapped here, by rank.
        release: unmaps; not collective.
    """

    local: torch.Tensor
    peers: tuple[int, ...]
    release: Callable[[], None] = field(default=lambda: None)

    def give_back(self) -> None:
        """Now, whoever still holds this object: memory that a later garbage collection gave back could be given back
        while a stream captures, which CUDA refuses.
        """
        self.release()
        self.local = torch.empty(0, dtype=torch.uint8, device="cpu")


class SharedFile:
    """Memory that processes share: a file without a name, which is gone when the last process that has it mapped is.

    Its pages are reserved when it is made (posix_fallocate), so that a full /dev/shm is an exception here and not a
    SIGBUS in a kernel.

    Args:
        fd: of the file, open for reading and writing; this object closes it.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._named: Path | None = None
        try:
            about = os.fstat(fd)
            self.identity = (about.st_dev, about.st_ino)
            self.map = mmap.mmap(fd, size)
        except BaseException:
            os.close(fd)
            raise
        self.tensor = torch.frombuffer(self.map, dtype=torch.uint8)

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    @property
    def path(self) -> str:
        """Where other processes of this user find it until `close`, if they see this one."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def give_name(self) -> str:
        """For those who do not see this process. Whoever removes it after this process has died needs its lock.

        Raises:
            OSError: it cannot have one.
        """
        named = leftovers.new_name(leftovers.SHARED, "memory")
        leftovers.hold(self._fd)
        # With a folder, which an absolute path does not need, Python calls linkat(2), which follows; link(2) does not.
        os.link(self.path, named, src_dir_fd=self._fd, follow_symlinks=True)
        self._named = named
        return str(named)

    def close(self) -> None:
        """It cannot be mapped any more; the mappings stay."""
        if self._named is not None:
            self._named.unlink(missing_ok=True)
        self._named = None
        os.close(self._fd)


def make_shared_file(size: int) -> SharedFile:
    """A new shared file in /dev/shm, or in the temporary folder if that is missing, full or closed to this process.

    Raises:
        CapacityError: neither has `size` bytes.
    """
    leftovers.sweep_once()
    tried: list[str] = []
    for name in (str(leftovers.SHARED), "the temporary folder"):
        try:  # also to find the latter, which is to write to it
            fd = _nameless(leftovers.SHARED if not tried else Path(tempfile.gettempdir()))
            try:
                os.posix_fallocate(fd, 0, size)
            except BaseException:
                os.close(fd)
                raise
            return SharedFile(fd, size)
        except OSError as error:
            tried.append(f"{name}: {error.strerror or error}")
    raise CapacityError(f"no room for {size:,} bytes of memory shared between ranks ({'; '.join(tried)})")


def _nameless(folder: Path) -> int:
    """A descriptor of a new, empty file of this folder's file system."""
    try:
        return os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    fd, name = tempfile.mkstemp(prefix=leftovers.PREFIX, dir=folder)
    os.unlink(name)
    return fd


def open_shared_file(path: str, identity: tuple[int, int], size: int) -> SharedFile:
    """Another process's.

    Raises:
        OSError: it cannot be opened, or is another file: numbers of processes mean nothing in other containers.
    """
    about = os.stat(path)
    if (about.st_dev, about.st_ino) != identity:
        raise FileNotFoundError(errno.ENOENT, "another file has its name", path)
    return SharedFile(os.open(path, os.O_RDWR), size)


def share_between_processes(size: int, rank: int, exchange: Exchange) -> SymmetricMemory:
    """Symmetric memory of processes on one machine. `exchange` gathers an object from every rank, in rank order.

    Raises:
        CapacityError: no room.
        UnsupportedPlatformError: the ranks are not on one machine.
    """
    own: SharedFile | None = None
    failed = ""
    try:
        own = make_shared_file(size)
    except Exception as error:  # whatever it was, the other ranks must not wait for this one
        failed = str(error) if isinstance(error, CapacityError) else f"{type(error).__name__}: {error}"
    try:
        place = (own.path, own.identity) if own else ("", (0, 0))
        answers = exchange((os.uname().nodename, place, failed), "where their memory is", SETUP_SECONDS)
        raise_first(CapacityError, [failure for _, _, failure in answers])
        nodes = sorted({node for node, _, _ in answers})
        if len(nodes) > 1:
            raise UnsupportedPlatformError(f"path ipc needs all ranks on one machine; they are on {', '.join(nodes)}")
        assert own is not None
        places = [place for _, place, _ in answers]
        files, failed = _map_all(own, rank, size, places)
        if any(exchange(failed, "whether their memory is mapped", SETUP_SECONDS)):
            files = _map_all_by_name(own, rank, size, places, exchange)
    finally:
        if own is not None:
            own.close()
    return SymmetricMemory(own.tensor, tuple(file.address for file in files), release=files.clear)


def _map_all(own: SharedFile, rank: int, size: int, places: Sequence[_Place]) -> tuple[list[SharedFile], str]:
    """Every rank's file, or why not."""
    files: list[SharedFile] = []
    try:
        for peer, (path, identity) in enumerate(places):
            if peer == rank:
                files.append(own)
            else:
                files.append(open_shared_file(path, identity, size))
                files[-1].close()
    except Exception as error:  # the other ranks get it below
        return [], f"cannot map a peer's memory: {error}"
    return files, ""


def _map_all_by_name(
    own: SharedFile, rank: int, size: int, places: Sequence[_Place], exchange: Exchange
) -> list[SharedFile]:
    """For ranks that do not see each other's processes (in containers that share /dev/shm alone): files have names for
    as long as this takes.
    """
    failed, name = "", ""
    try:
        name = own.give_name()
    except OSError as error:
        failed = f"its memory cannot have a name: {error}"
    answers = exchange((name, failed), "the names of their memory")
    raise_first(UnsupportedPlatformError, [failure for _, failure in answers])
    named = [(path, identity) for (path, _), (_, identity) in zip(answers, places, strict=True)]
    files, failed = _map_all(own, rank, size, named)
    raise_first(UnsupportedPlatformError, exchange(failed, "whether their memory is mapped", SETUP_SECONDS))
    return files


def raise_first(kind: type[MoegenError], failures: Sequence[str]) -> None:
    """The same error on every rank, so that none waits for one that failed."""
    for peer, failed in enumerate(failures):
        if failed:
            raise kind(f"rank {peer}: {failed}")


def share_between_gpus(
    size: int, group: Any, device: torch.device, exchange: Exchange, seconds: float
) -> SymmetricMemory:
    """Symmetric memory of one process per GPU, through torch's (peer access over NVLink or PCIe).

    Args:
        seconds: that ranks may wait for each other.

    Raises:
        CapacityError: a rank has no room.
        UnsupportedPlatformError: torch cannot map the peers' memory here; the text says why.
    """
    import torch.distributed._symmetric_memory as symm_mem

    failed = ""
    try:
        buffer = symm_mem.empty(size, dtype=torch.uint8, device=device)
    except Exception as error:  # whatever it was, the other ranks must not wait for this one
        failed = f"no room for {size:,} bytes of symmetric memory on {device}: {error}"
    raise_first(CapacityError, exchange(failed, "whether they have memory", SETUP_SECONDS))
    try:
        with _store_timeout(group, seconds):
            handle = symm_mem.rendezvous(buffer, group.group_name)
    except RuntimeError as error:
        raise UnsupportedPlatformError(
            f"torch symmetric memory cannot map the peers of {device}: {error}. Path ipc needs peer access between all "
            f"GPUs of the group (see `moegen doctor`); the backend in use is {symm_mem.get_backend(device)}"
        ) from error
    buffer.zero_()
    return SymmetricMemory(buffer, tuple(handle.buffer_ptrs))


@contextmanager
def _store_timeout(group: Any, seconds: float) -> Iterator[None]:
    """Within, torch waits no longer than that for keys of the group's store: rendezvous has no deadline of its own."""
    try:
        store: Any = torch.distributed.distributed_c10d._get_process_group_store(group)
        before = store.timeout
        store.set_timeout(timedelta(seconds=seconds))
    except (KeyError, AttributeError, RuntimeError):  # no store, or one without deadlines
        yield
        return
    try:
        yield
    finally:
        store.set_timeout(before)


class HostWords:
    """A few 32-bit words that kernels write and the host reads without a synchronisation.

    Pinned where kernels run on a GPU. `address` is what a kernel is given (unified addressing maps pinned memory at
    the same address).
    """

    def __init__(self, count: int, *, pinned: bool) -> None:
        self._tensor = torch.zeros(count, dtype=torch.int32, device="cpu", pin_memory=pinned)
        self.address = self._tensor.data_ptr()
        self.words = (ctypes.c_uint32 * count).from_address(self.address)
