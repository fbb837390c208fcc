# SPDX-License-Identifier: Apache-2.0
"""Binary -> launch: the table of loaded kernels, and the two ways to start one."""

from __future__ import annotations

import ctypes
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from moegen import env
from moegen.codegen.render import render
from moegen.compile import binary
from moegen.compile.target import Target
from moegen.errors import KernelFaultError, LaunchError, MissingKernelError, UnsupportedPlatformError
from moegen.kernels.spec import Spec
from moegen.runtime.streams import current_stream
from moegen.runtime.waiting import SLICE_SECONDS, raise_if_pointless

log = logging.getLogger(__name__)

HOST_NUM_SMS = 2
"""Blocks per rank on the host by default: the smallest number at which a race between blocks can show."""

HOST_MAX_BLOCKS = 32
"""Blocks per rank on the host at most: each is a thread of the operating system, and more only add switches."""


class LoadedKernel(ABC):
    """A kernel ready to launch on one device."""

    def __init__(self, spec: Spec, origin: str) -> None:
        self.spec = spec
        self.origin = origin

    @abstractmethod
    def blocks(self, ranks_per_device: int, num_sms: int | None) -> int:
        """Blocks that one of `ranks_per_device` ranks may launch and have run at the same time, `num_sms` at most."""

    @abstractmethod
    def launcher(self, params: ctypes.Array[ctypes.c_char], blocks: int) -> Callable[[], None]:
        """What starts it with these parameters: on the current stream (a GPU), or to its end (the host).

        `params` may be changed between starts, and at once after one. The launcher raises:
            KernelFaultError: on the host, a rule of the machine was broken.
            LaunchError: the driver refused the launch.
        """


class _HostLaunch(ctypes.Structure):
    """moegen_host_launch in `templates/host/simt.hpp`."""

    _fields_ = (
        ("params", ctypes.c_void_p),
        ("grid", ctypes.c_uint),
        ("block", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("wait_ms", ctypes.c_uint),
        ("seed", ctypes.c_ulonglong),
        ("running", ctypes.c_void_p),
    )


class HostKernel(LoadedKernel):
    """A kernel of the host target: a shared library. ctypes releases the GIL while it runs."""

    _ERROR_BYTES = 8192
    _RUNS_ON = 2
    """What the entry returns in place of 0 or 1 when the kernel is not over yet."""

    def __init__(self, spec: Spec) -> None:
        self._runtime = _host_runtime()
        built = binary.obtain(render(spec), Target("host"))
        super().__init__(spec, built.origin)
        self._library = ctypes.CDLL(str(built.path))
        self._entry = self._library.moegen_launch
        self._entry.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong)
        self._entry.restype = ctypes.c_int
        self._seed = env.host_seed()

    def blocks(self, ranks_per_device: int, num_sms: int | None) -> int:
        return HOST_NUM_SMS if num_sms is None else min(num_sms, HOST_MAX_BLOCKS)

    def launcher(self, params: ctypes.Array[ctypes.c_char], blocks: int) -> Callable[[], None]:
        """Python gets its turn between slices of a longer launch: for signals, and to see whether it is worth it."""
        spec = self.spec
        slice_ms = int(1e3 * SLICE_SECONDS)
        running = ctypes.c_void_p()
        size = (blocks, spec.block_threads, spec.dynamic_shared_bytes)
        launch = _HostLaunch(ctypes.addressof(params), *size, slice_ms, self._seed, ctypes.addressof(running))
        text = ctypes.create_string_buffer(self._ERROR_BYTES)
        error = (text, self._ERROR_BYTES)
        wait = self._runtime.moegen_host_wait

        def start() -> None:
            try:
                status = self._entry(ctypes.addressof(launch), *error)
                while status == self._RUNS_ON:
                    raise_if_pointless()
                    status = wait(running, slice_ms, *error)
            except BaseException:
                if running:  # its memory is in use until it is over
                    self._runtime.moegen_host_stop(running)
                    while running:
                        wait(running, slice_ms, *error)
                raise
            if status != 0:
                raise KernelFaultError(f"{spec.stem}: {text.value.decode(errors='replace')}")

        return start


class CudaKernel(LoadedKernel):
    """A cubin in the current context. Launched cooperatively: its blocks wait for other ranks' and for each other. From
    sm_90 on also as soon as the blocks of the launch before are over: it waits itself until their writes are seen
    (programmatic dependent launch). It asks for no earlier start: blocks that only wait would take the room of another
    stream's launch, for which the launch before may be waiting.
    """

    def __init__(self, spec: Spec, device: torch.device) -> None:
        from cuda.bindings import driver

        torch.cuda.current_stream(device).synchronize()  # makes torch's context current
        target = Target.for_capability(*torch.cuda.get_device_capability(device))
        built = binary.obtain(render(spec), target)
        super().__init__(spec, built.origin)
        self._driver = driver
        self._device = device
        self._module = _check(driver.cuModuleLoadData(binary.read(built)))
        self._function = _check(driver.cuModuleGetFunction(self._module, spec.symbol.encode()))
        # Under lazy loading the first launch would load it, and loading waits for kernels that may wait for this one.
        _check(driver.cuFuncLoad(self._function))
        if spec.dynamic_shared_bytes:
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(self._function, most, spec.dynamic_shared_bytes))
        size = (spec.block_threads, spec.dynamic_shared_bytes)
        blocks = _check(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, *size))
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._resident = int(blocks) * self._multiprocessors
        self._threads = spec.block_threads
        self._overlaps = torch.cuda.get_device_capability(device) >= (9, 0)

    def blocks(self, ranks_per_device: int, num_sms: int | None) -> int:
        share = self._resident
        if ranks_per_device > 1:
            # While ranks wait for each other, a quarter of the multiprocessors stays idle for what torch runs: one that
            # splits its cache and shared memory otherwise than torch's kernel needs takes none before its blocks end.
            share = max(1, self._multiprocessors * 3 // (4 * ranks_per_device))
        return share if num_sms is None else min(share, num_sms)

    def launcher(self, params: ctypes.Array[ctypes.c_char], blocks: int) -> Callable[[], None]:
        """Everything that does not change is looked up here: a start is on the hot path."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        address = ctypes.addressof(pointers)
        launch, function, config = self._driver.cuLaunchKernelEx, self._function, self._configuration(blocks)
        device, index = self._device, self._device.index

        def start(_kept: object = pointers) -> None:
            config.hStream = current_stream(device)
            if torch._C._cuda_getDevice() == index:
                status = launch(config, function, address, 0)[0]
            else:
                with torch.cuda.device(device):
                    status = launch(config, function, address, 0)[0]
            if status:
                size = f"{blocks} x {self._threads}"
                raise LaunchError(f"{self.spec.stem}: {size} threads were not launched: {status.name}")

        return start

    def _configuration(self, blocks: int) -> Any:
        """Everything of a launch but its stream."""
        driver, kinds = self._driver, self._driver.CUlaunchAttributeID
        config, cooperative, overlap = driver.CUlaunchConfig(), driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes = self.spec.dynamic_shared_bytes
        cooperative.id = kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        cooperative.value.cooperative = 1
        overlap.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        overlap.value.programmaticStreamSerializationAllowed = 1
        attributes = [cooperative, overlap] if self._overlaps else [cooperative]
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config


_loaded: dict[tuple[Spec, torch.device], LoadedKernel] = {}
_loading = threading.Lock()


def load(spec: Spec, device: torch.device) -> LoadedKernel:
    """The kernel, from the table of loaded ones or made now (see `moegen.compile.binary.obtain`).

    Raises:
        MissingKernelError: it would have to be loaded while a CUDA stream captures.
        CompileError, CacheError, UnsupportedPlatformError: as `obtain`.
    """
    kernel = _loaded.get((spec, device))
    if kernel is not None:
        return kernel
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise MissingKernelError(f"{spec.stem} is not loaded, and a stream is capturing: call warmup() before capture")
    with _loading:
        kernel = _loaded.get((spec, device))
        if kernel is None:
            if device.type == "cpu":
                kernel = HostKernel(spec)
            else:
                with torch.cuda.device(device):
                    kernel = CudaKernel(spec, device)
            _loaded[(spec, device)] = kernel
    return kernel


def _check(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status:
        raise UnsupportedPlatformError(f"the CUDA driver refused a kernel: {status.name}")
    return values[0] if values else None


@cache
def _host_runtime() -> ctypes.CDLL:
    """The host target's runtime, whose symbols every kernel library uses."""
    runtime = ctypes.CDLL(str(binary.host_runtime()), mode=ctypes.RTLD_GLOBAL)
    runtime.moegen_host_wait.argtypes = (ctypes.c_void_p, ctypes.c_uint, ctypes.c_char_p, ctypes.c_ulong)
    runtime.moegen_host_stop.argtypes = (ctypes.c_void_p,)
    runtime.moegen_host_stop.restype = None
    return runtime
