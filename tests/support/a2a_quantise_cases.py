# SPDX-License-Identifier: Apache-2.0
"""Sums of `OneSided` that are quantised, bit by bit, on every device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import moegen
from moegen import errors, reference_quantise
from moegen.reference import expert_ranges
from moegen.runtime.worlds import RankWorld

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "e4m3": torch.float8_e4m3fn}
EXPERTS, TOPK, SLOTS = 7, 3, 21
TOKENS = (17, 0, 21)
"""Of each rank."""

OUTPUT_SCALE = 3.7


@dataclass(frozen=True)
class QuantisedShape:
    ranks: int
    hidden: int
    dtype: str
    warp_groups: str | None = None
    pulls: bool = False
    path: str = "ipc"

    def __str__(self) -> str:
        words = [f"r{self.ranks}", f"h{self.hidden}", self.dtype, self.path, self.warp_groups]
        return "-".join([*filter(None, words), *["pulled"] * self.pulls])

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of quantised results that this hidden allows."""
        return ("mxfp8", "nvfp4") if self.hidden % reference_quantise.MXFP8_GROUP == 0 else ("nvfp4",)


SHAPES = (
    QuantisedShape(1, 32, "bf16"),
    QuantisedShape(1, 64, "fp32", "1x2"),
    QuantisedShape(2, 2880, "bf16"),
    QuantisedShape(2, 48, "bf16"),
    QuantisedShape(2, 96, "fp16", "3x2"),
    QuantisedShape(3, 2880, "fp32"),
    QuantisedShape(3, 352, "fp16"),
    QuantisedShape(3, 160, "e4m3"),
    QuantisedShape(3, 7168, "bf16", "1x7"),
    QuantisedShape(2, 512, "bf16", pulls=True),
    QuantisedShape(3, 288, "bf16", path="collective"),
)
"""Rows of whole warps and of none, scales in whole tiles and not, one and two parts of a row."""

VALUES = ("usual", "huge", "tiny", "bits", "edges")


# ---- what experts make, and what that becomes --------------------------------------------------------


def random_ids(tokens: int, seed: int) -> torch.Tensor:
    """Selections, none among them; the first token goes nowhere."""
    ids = torch.randint(-1, EXPERTS, (tokens, TOPK), generator=torch.Generator().manual_seed(seed))
    ids[:1] = -1
    return ids


def rows(shape: QuantisedShape, values: str, seed: int) -> torch.Tensor:
    """[ranks, slots, hidden]: `y` of one rank."""
    generator = torch.Generator().manual_seed(seed)
    dtype, size = DTYPES[shape.dtype], (shape.ranks, SLOTS, shape.hidden)
    if values == "bits":
        stored = (*size[:2], shape.hidden * dtype.itemsize)
        return torch.randint(0, 256, stored, dtype=torch.uint8, generator=generator).view(dtype)
    y = torch.randn(size, generator=generator)
    if values == "edges":
        return edges(y, generator).to(dtype)
    largest = torch.finfo(dtype).max / 16
    smallest = torch.finfo(dtype).smallest_normal
    factor = {"huge": largest, "tiny": smallest, "usual": 1.0}[values]
    exponents = torch.randint(-6, 3, (*size[:2], 1), generator=generator)
    return (y * factor * torch.pow(2.0, exponents)).clamp(-largest, largest).to(dtype)


def edges(y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Numbers on and beside those at which rounding changes its mind, of groups that have the scale 1, or nearly."""
    ties = torch.tensor([0.25, 0.5, 0.75, 1.0, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 2.0**-10, 0.0, 447.0])
    near = torch.cat((ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(1e9))))
    picked = near[torch.randint(0, len(near), y.shape, generator=generator)] * y.sign()
    fours = picked.where(picked.abs() < 7, 0.0)
    largest = torch.tensor([448.0, 6.0, 6.375, 224.0])[torch.randint(0, 4, y.shape[:2], generator=generator)]
    picked = torch.where(largest[..., None] < 7, fours, picked)
    group = torch.arange(y.shape[2]) % reference_quantise.NVFP4_GROUP == 0
    beside = torch.tensor([0.0, 1e9])[torch.randint(0, 2, y.shape[:2], generator=generator)]
    first = torch.where(torch.rand(y.shape[:2], generator=generator) < 0.5, largest, largest.nextafter(beside))
    return torch.where(group, first[..., None], picked)


def sums(shape: QuantisedShape, ids: list[torch.Tensor], y: list[torch.Tensor], owner: int) -> torch.Tensor:
    """float32 [T, hidden]: in the order of the ranks."""
    total = torch.zeros(len(ids[owner]), shape.hidden)
    for rank, experts in enumerate(expert_ranges(EXPERTS, shape.ranks)):
        goes = ((ids[owner] >= experts.start) & (ids[owner] < experts.stop)).any(dim=1)
        total[goes] += y[rank][owner, : int(goes.sum())].float()
    return total


def quantise(kind: str, total: torch.Tensor, output_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "mxfp8":
        return reference_quantise.quantise_mxfp8(total)
    return reference_quantise.quantise_nvfp4(total, output_scale)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().view(torch.uint8)


def verify(kind: str, layout: str, got: moegen.Quantised, total: torch.Tensor, output_scale: float) -> None:
    data, scales = quantise(kind, total, output_scale)
    assert got.data.dtype == data.dtype
    assert torch.equal(bits(got.data), bits(data))
    if layout == "linear":
        assert got.scales.dtype == scales.dtype
        assert torch.equal(bits(got.scales), bits(scales))
        return
    in_rows = torch.ones(len(scales), -(-scales.shape[1] // 4) * 4, dtype=torch.uint8)
    said = reference_quantise.in_tiles(in_rows) == 1
    wanted = bits(reference_quantise.in_tiles(scales))
    assert got.scales.shape == wanted.shape
    assert torch.equal(bits(got.scales)[said], wanted[said])


# ---- objects ------------------------------------------------------------------------------------------


def make(world: RankWorld, shape: QuantisedShape) -> moegen.OneSided:
    return moegen.OneSided(
        world,
        num_experts=EXPERTS,
        num_topk=TOPK,
        max_tokens_per_rank=SLOTS,
        payload_bytes=4,
        hidden=shape.hidden,
        dtype=DTYPES[shape.dtype],
        path=shape.path,
        expert_rows=shape.pulls,
        warp_groups=shape.warp_groups,
    )


class Rank:
    """One rank, whose calls begin when all are there: on a GPU what torch does must not queue up behind a kernel that
    waits for a rank whose torch is queued up behind it.
    """

    def __init__(self, world: RankWorld, shape: QuantisedShape) -> None:
        self.world, self.shape = world, shape
        self.layer = make(world, shape)

    def step(self) -> None:
        self.layer.synchronize()
        self.world.barrier()

    def dispatch(self, ids: torch.Tensor) -> moegen.PayloadsHandle:
        given = ids.to(self.layer.device), torch.zeros(len(ids), 1, dtype=torch.int32, device=self.layer.device)
        self.step()
        return self.layer.dispatch(given[0], [given[1]]).handle

    def combine(self, y: torch.Tensor, handle: moegen.PayloadsHandle, **options: Any) -> Any:
        self.step()  # nobody reads the last combine's rows any more
        y = self.layer.expert_rows().copy_(y) if self.shape.pulls else y.to(self.layer.device)
        self.step()
        made = self.layer.combine(y, handle, **options)
        self.layer.synchronize()
        return made


def forms(shape: QuantisedShape, seed: int) -> Iterator[tuple[str, str, float | None]]:
    """Kinds with each layout, with and without a scale of the user."""
    for kind in shape.kinds:
        for number, layout in enumerate(("linear", "128x4")):
            yield kind, layout, OUTPUT_SCALE if kind == "nvfp4" and (seed + number) % 2 else None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_quantised_as_the_reference_does(shape: QuantisedShape, device: str) -> None:
    rounds = []
    for seed, values in enumerate(VALUES):
        ids = [random_ids(TOKENS[rank], 100 * seed + rank) for rank in range(shape.ranks)]
        y = [rows(shape, values, 100 * seed + 10 + rank) for rank in range(shape.ranks)]
        rounds.append((seed, ids, y))

    def work(world: RankWorld) -> None:
        rank = Rank(world, shape)
        for seed, ids, y in rounds:
            handle = rank.dispatch(ids[world.rank])
            total = sums(shape, ids, y, world.rank)
            for kind, layout, scale in forms(shape, seed):
                given = None if scale is None else torch.tensor([scale], device=device)
                options = {"quantize": kind, "scale_layout": layout, "output_scale": given}
                made = rank.combine(y[world.rank], handle, **options)
                verify(kind, layout, made, total, 1.0 if scale is None else scale)
        rank.step()
        rank.layer.destroy()

    moegen.LocalWorld(shape.ranks, device).run(work)


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
def test_given_memory_of_several_tiles(kind: str, device: str) -> None:
    """The result is what was given; scales of rows beyond T are left alone, those beyond a row's groups are zero."""
    shape, tokens, untouched = QuantisedShape(1, 96, "bf16"), 300, 0xA5
    y = torch.randn(1, tokens, shape.hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted, scales = quantise(kind, y[0].float(), 1.0)
    padded = -(-scales.shape[1] // 4) * 4
    beyond = reference_quantise.in_tiles(torch.ones(tokens, padded, dtype=torch.uint8)) == 0

    def work(world: RankWorld) -> None:
        sizes = {"num_experts": 2, "num_topk": 1, "max_tokens_per_rank": tokens, "payload_bytes": 4}
        layer = moegen.OneSided(world, hidden=shape.hidden, **sizes)
        ids = torch.zeros(tokens, 1, dtype=torch.int32, device=device)
        handle = layer.dispatch(ids, [ids]).handle
        room = torch.full((384, padded), untouched, dtype=torch.uint8, device=device)
        given = moegen.Quantised(torch.zeros_like(wanted, device=device), room)
        made = layer.combine(y.to(device), handle, out=given, quantize=kind, scale_layout="128x4")
        layer.synchronize()
        assert made is given
        assert torch.equal(bits(made.data), bits(wanted))
        expected = bits(reference_quantise.in_tiles(scales)).masked_fill(beyond, untouched)
        assert torch.equal(bits(made.scales), expected)
        layer.destroy()

    moegen.LocalWorld(1, device).run(work)


def test_no_tokens_anywhere(device: str) -> None:
    shape = QuantisedShape(2, 64, "bf16")

    def work(world: RankWorld) -> None:
        rank = Rank(world, shape)
        handle = rank.dispatch(random_ids(0, 0))
        y = torch.full((2, SLOTS, 64), float("nan"), dtype=torch.bfloat16)
        for kind, layout, _ in forms(shape, 0):
            made = rank.combine(y, handle, quantize=kind, scale_layout=layout)
            assert made.data.shape[0] == 0
            assert made.scales.shape == (0, 64 // (32 if kind == "mxfp8" and layout == "linear" else 16))
        rank.step()
        rank.layer.destroy()

    moegen.LocalWorld(2, device).run(work)


def test_what_cannot_be_quantised(device: str) -> None:
    shape = QuantisedShape(1, 48, "bf16")

    def work(world: RankWorld) -> None:
        layer = make(world, shape)
        handle = layer.dispatch(
            torch.zeros(2, TOPK, dtype=torch.int32, device=device),
            [torch.zeros(2, 1, dtype=torch.int32, device=device)],
        ).handle
        y = torch.zeros(1, SLOTS, 48, dtype=torch.bfloat16, device=device)
        one = torch.ones(1, device=device)
        data = torch.zeros(2, 24, dtype=torch.uint8, device=device)
        scales = torch.zeros(2, 3, dtype=torch.uint8, device=device)
        for more, match in (
            ({"quantize": "fp8"}, "quantize is one of"),
            ({"quantize": "mxfp8"}, "every 32 elements"),
            ({"quantize": "nvfp4", "scale_layout": "8x4"}, "scale_layout is one of"),
            ({"quantize": "nvfp4", "out_dtype": torch.bfloat16}, "out_dtype"),
            ({"quantize": "nvfp4", "output_scale": 1.0}, "output_scale is a torch tensor"),
            ({"quantize": "nvfp4", "output_scale": torch.ones(2, device=device)}, "one float32"),
            ({"quantize": "nvfp4", "out": data}, "Quantised"),
            ({"quantize": "nvfp4", "out": moegen.Quantised(data, scales[:1])}, "out.scales is"),
            ({"quantize": "nvfp4", "out": moegen.Quantised(data[:, :8], scales)}, "out.data is"),
            ({"quantize": "nvfp4", "out": moegen.Quantised(data, scales.T.contiguous().T)}, "contiguous"),
            ({"output_scale": one}, "quantize="),
            ({"scale_layout": "128x4"}, "quantize="),
            ({"out": moegen.Quantised(data, scales)}, "quantize="),
        ):
            with pytest.raises(errors.InputError, match=match):
                layer.combine(y, handle, **more)
        layer.destroy()
        wide = make(world, QuantisedShape(1, 64, "bf16"))
        ids = torch.zeros(0, TOPK, dtype=torch.int32, device=device)
        handle = wide.dispatch(ids, [ids[:, :1]]).handle
        rows = torch.zeros(1, SLOTS, 64, dtype=torch.bfloat16, device=device)
        with pytest.raises(errors.InputError, match="no output_scale"):
            wide.combine(rows, handle, quantize="mxfp8", output_scale=one)
        wide.destroy()

    moegen.LocalWorld(1, device).run(work)
