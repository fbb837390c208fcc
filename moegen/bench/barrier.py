# SPDX-License-Identifier: Apache-2.0
"""The benchmark's barrier on the device: a launch that ends when every rank has reached it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moegen.bench.timing import meet
from moegen.kernels.bench import BARRIER_PHASES, BenchBarrier
from moegen.runtime.bound import BoundKernel
from moegen.runtime.kernel import load
from moegen.runtime.watchdog import Watchdog
from moegen.runtime.worlds import RankWorld

_CONTROL_WORDS = 32
"""32-bit words of struct Control, on a 128-byte line of its own."""

_FLAG_BYTES = 4


class DeviceBarrier:
    """Calling it launches the barrier on the current stream. Collective to make.

    Args:
        timeout: seconds that one barrier may take.
    """

    def __init__(self, world: RankWorld, timeout: float) -> None:
        spec = BenchBarrier(world.size)
        kernel = load(spec, world.device)
        self.spec = spec
        self._memory = world.allocate(world.size * _FLAG_BYTES)
        self._control = torch.zeros(_CONTROL_WORDS, dtype=torch.int32, device=world.device)
        self._control[0] = 1
        self._watchdog = Watchdog([spec.stem], BARRIER_PHASES, timeout, pinned=world.device.type == "cuda")
        fixed: dict[str, int | Sequence[int]] = {
            "peers": self._memory.peers,
            "control": self._control.data_ptr(),
            "aborted": self._control.data_ptr() + 4 * (_CONTROL_WORDS - 1),
            "failure": self._watchdog.address(0),
            "flags_offset": 0,
            "timeout_ns": int(timeout * 1e9),
            "rank": world.rank,
        }
        self._launch = BoundKernel(kernel, spec.params, 1, fixed, ())
        meet(world)

    def __call__(self) -> None:
        self._launch()

    def check(self) -> None:
        """Raises PeerTimeoutError if a barrier that is over had waited in vain."""
        self._watchdog.raise_what_happened()

    def destroy(self) -> None:
        self._memory.release()
