# SPDX-License-Identifier: Apache-2.0
"""Family `bench`: kernels that the benchmark measures with, not for users.

`barrier` makes all ranks start an op together; `push` and `pull` move bytes between all ranks at once and show what
the link itself can do. The host half of `templates/bench_*.cu.jinja`. Importing this module makes the family known to
`Spec.parse`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moegen.kernels.params import Param, ParamStruct
from moegen.kernels.spec import MAX_BLOCK_WARPS, MAX_RANKS, WARP_SIZE, Spec, tag

BARRIER_PHASES = {"kArrival": "the arrival at the benchmark's barrier"}
VECTOR_BYTES = 16
"""What one thread moves at once."""

MAX_IN_FLIGHT = 32


@dataclass(frozen=True)
class BenchSpec(Spec):
    """What the kernels of this family have in common."""

    num_ranks: int = tag("r")

    def validate(self) -> None:
        self.require(1 <= self.num_ranks <= MAX_RANKS, f"num_ranks is 1..{MAX_RANKS}; got {self.num_ranks}")

    @property
    def peers_param(self) -> Param:
        return Param("uint8_t*", "peers", "symmetric memory of each rank, as mapped here", self.num_ranks)


@dataclass(frozen=True)
class BenchBarrier(BenchSpec, family="bench", op="barrier"):
    """One block: tells every rank that this one is here, and waits until all are."""

    @property
    def block_threads(self) -> int:
        return -(-self.num_ranks // WARP_SIZE) * WARP_SIZE

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(BARRIER_PHASES)

    @cached_property
    def params(self) -> ParamStruct:
        return ParamStruct(
            (
                self.peers_param,
                Param("Control*", "control", "this barrier's epoch"),
                Param("uint32_t*", "aborted", "the abort word"),
                Param("Failure*", "failure", "where the host reads what went wrong"),
                Param("uint64_t", "flags_offset", "[rank] u32: the last epoch at which that rank arrived"),
                Param("uint64_t", "timeout_ns", "how long one barrier may take"),
                Param("uint32_t", "rank", "this rank"),
            )
        )


@dataclass(frozen=True)
class LinkSpec(BenchSpec):
    """Moves bytes between all ranks at once: `threads` per block, `in_flight` 16-byte accesses per thread."""

    threads: int = tag("t")
    in_flight: int = tag("n")

    def validate(self) -> None:
        super().validate()
        most = MAX_BLOCK_WARPS * WARP_SIZE
        self.require(
            0 < self.threads <= most and self.threads % WARP_SIZE == 0,
            f"threads is a multiple of {WARP_SIZE} up to {most}; got {self.threads}",
        )
        self.require(1 <= self.in_flight <= MAX_IN_FLIGHT, f"in_flight is 1..{MAX_IN_FLIGHT}; got {self.in_flight}")

    @property
    def block_threads(self) -> int:
        return self.threads


@dataclass(frozen=True)
class BenchPush(LinkSpec, family="bench", op="push"):
    """Every rank writes a known pattern to every other rank."""

    @cached_property
    def params(self) -> ParamStruct:
        return ParamStruct(
            (
                self.peers_param,
                Param("uint64_t", "inbox_offset", "[source][vectors] uint4"),
                Param("uint64_t", "vectors", "16-byte vectors from each rank to each other"),
                Param("uint32_t", "rank", "this rank"),
            )
        )


@dataclass(frozen=True)
class BenchPull(LinkSpec, family="bench", op="pull"):
    """Every rank reads what it pushed to every other rank, and adds it up."""

    @cached_property
    def params(self) -> ParamStruct:
        return ParamStruct(
            (
                self.peers_param,
                Param("uint4*", "sums", "[blocks * threads]: what each thread read, added word by word"),
                Param("uint64_t", "inbox_offset", "[source][vectors] uint4"),
                Param("uint64_t", "vectors", "16-byte vectors from each rank to each other"),
                Param("uint32_t", "rank", "this rank"),
            )
        )
