# SPDX-License-Identifier: Apache-2.0
"""What measured figures stand beside: those of other libraries, and what is aimed at. Hidden 7168, top-8 of 256
experts, uniform routing, one host; a figure is for the number of ranks that it was measured with.
"""

from __future__ import annotations

from dataclasses import dataclass

SHAPE = {"hidden": 7168, "num_topk": 8, "num_experts": 256}


@dataclass(frozen=True)
class Op:
    """What a figure is about.

    Attributes:
        ranks: how many, one per GPU.
        layout: "expert" (family ll), "token" or "packed" (ht), "rank" (a2a).
        sent: how dispatch's tokens travel: "bf16" or "fp8"; combine sends bfloat16.
        op: as families name it.
        tokens: per rank.
    """

    ranks: int
    layout: str
    sent: str
    op: str
    tokens: int


@dataclass(frozen=True)
class Published:
    """Microseconds that somebody else stated, and who, on which GPUs."""

    of: Op
    us: float
    who: str


@dataclass(frozen=True)
class Target:
    """What is aimed at: at most so many microseconds, or at least such a share of the link's limit."""

    of: Op
    us: float | None = None
    share: float | None = None


NCCL_EP, PPLX, UCCL_EP = "NCCL EP, H100", "pplx, H100", "UCCL-EP, H200"
"""By their own pages."""
DEEPEP_V1, DEEPEP_V2 = "DeepEP V1, H200", "DeepEP V2, H200"
"""1.2.1, with 24 SMs and without its layout kernel; 2.1.0, with 64, its epilogue included. Measured on two
H200, 2026-11-23.
"""
FLASHINFER = "FlashInfer fb28d72, H200"
"""The commit of 2026-08-22, measured on two H200, 2026-11-23. Its release 0.7.4 has other kernels, of which no figures
between two GPUs are known. Its combine takes rows from its own workspace: `combine_in_place`, `pair_in_place`. In a
`pair` they are first copied there.
"""

PUBLISHED = (
    Published(Op(8, "expert", "bf16", "dispatch", 128), 65.0, NCCL_EP),
    Published(Op(8, "expert", "bf16", "combine", 128), 79.0, NCCL_EP),
    Published(Op(8, "expert", "fp8", "dispatch", 128), 84.0, PPLX),
    Published(Op(8, "expert", "fp8", "combine", 128), 102.0, PPLX),
    Published(Op(8, "token", "fp8", "dispatch", 4096), 500.0, UCCL_EP),
    Published(Op(8, "token", "bf16", "combine", 4096), 973.0, UCCL_EP),
    Published(Op(2, "expert", "fp8", "pair", 128), 74.5, DEEPEP_V1),
    Published(Op(2, "token", "bf16", "dispatch", 4096), 355.0, DEEPEP_V1),
    Published(Op(2, "token", "fp8", "dispatch", 4096), 259.0, DEEPEP_V1),
    Published(Op(2, "token", "bf16", "combine", 4096), 419.0, DEEPEP_V1),
    Published(Op(2, "token", "fp8", "dispatch", 4096), 136.0, DEEPEP_V2),
    Published(Op(2, "packed", "fp8", "dispatch", 4096), 225.0, DEEPEP_V2),
    Published(Op(2, "token", "bf16", "combine", 4096), 237.0, DEEPEP_V2),
    Published(Op(2, "packed", "bf16", "combine", 4096), 272.0, DEEPEP_V2),
    Published(Op(2, "rank", "bf16", "pair_in_place", 1), 15.2, FLASHINFER),
    Published(Op(2, "rank", "bf16", "pair_in_place", 16), 17.1, FLASHINFER),
    Published(Op(2, "rank", "bf16", "pair_in_place", 64), 17.2, FLASHINFER),
    Published(Op(2, "rank", "bf16", "pair_in_place", 128), 20.8, FLASHINFER),
    Published(Op(2, "rank", "bf16", "pair_in_place", 512), 54.1, FLASHINFER),
    Published(Op(2, "rank", "bf16", "pair_in_place", 2048), 193.5, FLASHINFER),
    Published(Op(2, "rank", "bf16", "pair_in_place", 4096), 365.0, FLASHINFER),
    Published(Op(2, "rank", "bf16", "pair", 1), 16.1, FLASHINFER),
    Published(Op(2, "rank", "bf16", "pair", 16), 18.4, FLASHINFER),
    Published(Op(2, "rank", "bf16", "pair", 64), 18.1, FLASHINFER),
    Published(Op(2, "rank", "bf16", "pair", 128), 22.4, FLASHINFER),
    Published(Op(2, "rank", "bf16", "pair", 512), 62.6, FLASHINFER),
    Published(Op(2, "rank", "bf16", "pair", 2048), 221.9, FLASHINFER),
    Published(Op(2, "rank", "bf16", "pair", 4096), 423.0, FLASHINFER),
    Published(Op(2, "rank", "bf16", "dispatch", 4096), 167.3, FLASHINFER),
    Published(Op(2, "rank", "bf16", "combine_in_place", 4096), 200.1, FLASHINFER),
)

TARGETS = (
    Target(Op(8, "expert", "fp8", "pair", 128), us=55.0),
    Target(Op(8, "token", "fp8", "dispatch", 4096), share=0.9),
    Target(Op(8, "packed", "fp8", "dispatch", 4096), share=0.9),
    Target(Op(8, "token", "bf16", "combine", 4096), share=0.9),
    Target(Op(8, "packed", "bf16", "combine", 4096), share=0.9),
    Target(Op(2, "expert", "fp8", "dispatch", 128), us=10.0),
    Target(Op(2, "expert", "bf16", "dispatch", 128), us=12.0),
    Target(Op(2, "expert", "bf16", "combine", 128), us=12.0),
    Target(Op(2, "expert", "bf16", "combine_weighted", 128), us=14.0),
    Target(Op(2, "expert", "fp8", "pair", 128), us=22.0),
    Target(Op(2, "expert", "fp8", "pair", 1), us=8.5),
    Target(Op(2, "expert", "fp8", "dispatch_send", 128), us=7.0),
    Target(Op(2, "expert", "bf16", "dispatch_send", 128), us=9.5),
    Target(Op(2, "expert", "bf16", "combine_send", 128), us=9.5),
    Target(Op(2, "expert", "bf16", "combine_weighted_send", 128), us=11.5),
    Target(Op(2, "expert", "fp8", "dispatch_receive", 128), us=4.0),
    Target(Op(2, "expert", "bf16", "combine_receive", 128), us=4.0),
    Target(Op(2, "token", "bf16", "dispatch", 4096), us=172.0),
    Target(Op(2, "token", "fp8", "dispatch", 4096), us=95.0),
    Target(Op(2, "packed", "fp8", "dispatch", 4096), us=118.0),
    Target(Op(2, "token", "bf16", "combine", 4096), us=176.0),
    Target(Op(2, "packed", "bf16", "combine", 4096), us=215.0),
    Target(Op(2, "rank", "bf16", "pair", 1), us=7.5),
    Target(Op(2, "rank", "bf16", "pair", 16), us=9.5),
    Target(Op(2, "rank", "bf16", "pair", 64), us=13.0),
    Target(Op(2, "rank", "bf16", "pair", 128), us=18.0),
    Target(Op(2, "rank", "bf16", "pair", 512), us=50.0),
    Target(Op(2, "rank", "bf16", "pair", 2048), us=178.0),
    Target(Op(2, "rank", "bf16", "pair", 4096), us=342.0),
)


FEW_EXPERTS_FLASHINFER = {"pair_in_place": 15.5, "pair": 16.9}
FEW_EXPERTS_TARGET = 10.5
"""A pair of 64 tokens of 16 experts, top-4, between two ranks."""
HOST_CALL_TARGET = 2.0
"""Host time of a call, dispatch and combine alike, in those of one small torch op."""
FEW_BLOCKS_TARGETS = {"token": 0.1, "packed": 0.4}
"""How much longer an op may take with 24 blocks than with all, by layout."""
COLLECTIVE_FACTOR, COLLECTIVE_US = 1.25, 20.0
"""A padded pair of 64 tokens may take so many times the bare exchanges, and so much more."""


def published(op: Op) -> list[Published]:
    """What others state for that op."""
    return [one for one in PUBLISHED if one.of == op]


def target(op: Op) -> Target | None:
    """What is aimed at for that op."""
    return next((one for one in TARGETS if one.of == op), None)


def stated_us(op: Op, who: str) -> float:
    """Microseconds that `who` needs."""
    return next(one.us for one in published(op) if one.who == who)


def target_us(op: Op) -> float:
    """Microseconds that are aimed at."""
    return next(one.us for one in TARGETS if one.of == op and one.us is not None)
