# SPDX-License-Identifier: Apache-2.0
"""Symmetric memory: a buffer of the same size on every rank, each mapped into all of them.

This is the seam behind which a world keeps its way of mapping: plain allocations (virtual ranks), a file in shared
memory (CPU processes), torch symmetric memory (one GPU per process).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moegen.errors import CapacityError, MoegenError, UnsupportedPlatformError


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
    """A file in shared memory that this process made or found, mapped read-write.

    The pages are reserved when it is made (posix_fallocate), so that a full /dev/shm is an exception here and not a
    SIGBUS in a kernel.
    """

    def __init__(self, path: Path, size: int, *, create: bool) -> None:
        self.path = path
        self._owned = create
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        fd = os.open(path, flags, 0o600)
        try:
            if create:
                os.posix_fallocate(fd, 0, size)
            self.map = mmap.mmap(fd, size)
        except OSError:
            if create:
                path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        self.tensor = torch.frombuffer(self.map, dtype=torch.uint8)

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    def unlink(self) -> None:
        """Removes the name; the mappings stay."""
        if self._owned:
            self.path.unlink(missing_ok=True)


def make_shared_file(size: int) -> SharedFile:
    """A new shared file in /dev/shm, or in the temporary folder if that is missing or full.

    Raises:
        CapacityError: neither has `size` bytes.
    """
    tried = []
    for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if not folder.is_dir():
            continue
        fd, name = tempfile.mkstemp(prefix="moegen-", dir=folder)
        os.close(fd)
        os.unlink(name)
        try:
            return SharedFile(Path(name), size, create=True)
        except OSError as error:
            tried.append(f"{folder}: {error.strerror}")
    raise CapacityError(f"no room for {size:,} bytes of memory shared between ranks ({'; '.join(tried)})")


def share_between_processes(size: int, rank: int, exchange: Callable[[Any], list[Any]]) -> SymmetricMemory:
    """Symmetric memory of processes on one machine. `exchange` gathers an object from every rank, in rank order.

    Raises:
        CapacityError: no room.
        UnsupportedPlatformError: the ranks are not on one machine.
    """
    own: SharedFile | None = None
    failed = ""
    try:
        own = make_shared_file(size)
    except CapacityError as error:
        failed = str(error)
    files: list[SharedFile] = []
    try:
        answers = exchange((os.uname().nodename, str(own.path) if own else "", failed))
        raise_first(CapacityError, [failure for _, _, failure in answers])
        nodes = sorted({node for node, _, _ in answers})
        if len(nodes) > 1:
            raise UnsupportedPlatformError(f"path ipc needs all ranks on one machine; they are on {', '.join(nodes)}")
        assert own is not None
        try:
            for peer, (_, path, _) in enumerate(answers):
                files.append(own if peer == rank else SharedFile(Path(path), size, create=False))
        except OSError as error:
            failed = f"cannot map a peer's memory: {error}"
        raise_first(UnsupportedPlatformError, exchange(failed))  # everybody has mapped everything: the names can go
    finally:
        if own is not None:
            own.unlink()
    return SymmetricMemory(own.tensor, tuple(file.address for file in files), release=files.clear)


def raise_first(kind: type[MoegenError], failures: Sequence[str]) -> None:
    """The same error on every rank, so that none waits for one that failed."""
    for peer, failed in enumerate(failures):
        if failed:
            raise kind(f"rank {peer}: {failed}")


def share_between_gpus(
    size: int, group: Any, device: torch.device, exchange: Callable[[Any], list[Any]]
) -> SymmetricMemory:
    """Symmetric memory of one process per GPU, through torch's (peer access over NVLink or PCIe).

    Raises:
        CapacityError: a rank has no room.
        UnsupportedPlatformError: torch cannot map the peers' memory here; the text says why.
    """
    import torch.distributed._symmetric_memory as symm_mem

    failed = ""
    try:
        buffer = symm_mem.empty(size, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        failed = f"no room for {size:,} bytes of symmetric memory on {device}: {error}"
    raise_first(CapacityError, exchange(failed))
    try:
        handle = symm_mem.rendezvous(buffer, group.group_name)
    except RuntimeError as error:
        raise UnsupportedPlatformError(
            f"torch symmetric memory cannot map the peers of {device}: {error}. Path ipc needs peer access between all "
            f"GPUs of the group (see `moegen doctor`); the backend in use is {symm_mem.get_backend(device)}"
        ) from error
    buffer.zero_()
    return SymmetricMemory(buffer, tuple(handle.buffer_ptrs))


class HostWords:
    """A few 32-bit words that kernels write and the host reads without a synchronisation.

    Pinned where kernels run on a GPU. `address` is what a kernel is given (unified addressing maps pinned memory at
    the same address).
    """

    def __init__(self, count: int, *, pinned: bool) -> None:
        self._tensor = torch.zeros(count, dtype=torch.int32, device="cpu", pin_memory=pinned)
        self.address = self._tensor.data_ptr()
        self.words = (ctypes.c_uint32 * count).from_address(self.address)
