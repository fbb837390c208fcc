# SPDX-License-Identifier: Apache-2.0
"""Trains a small byte-level language model with a Mixture-of-Experts layer in each block, on Python's own help pages.

python examples/train_moe_lm.py                                            # one process
torchrun --nproc-per-node 4 examples/train_moe_lm.py --check               # four, on CPUs; or on as many GPUs

Experts are spread over the ranks; everything else is data-parallel. `--check` also trains the same model on the same
batches in one process and compares the losses. Writes both curves to `--out`: losses.png (with matplotlib), losses.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.nn import functional as F  # noqa: N812

import moegen
from moegen import functional

BYTES, CONTEXT, HIDDEN, INNER, HEADS, BLOCKS, EXPERTS, TOPK = 256, 64, 64, 128, 4, 2, 8, 2
RATE = 3e-3
ALLOWED_DIFFERENCE = 0.02
"""Of a loss, in nats: sums are rounded to bf16 once per rank, and a router that is undecided may decide otherwise."""

console = Console()


class MixtureOfExperts(nn.Module):
    """This rank's experts, and the router that all ranks share."""

    def __init__(self, ep: moegen.HighThroughput) -> None:
        super().__init__()
        self.ep = ep
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        # Every rank draws the weights of all experts, so that they do not depend on the number of ranks.
        held = slice(ep.local_experts.start, ep.local_experts.stop)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER)[held] / HIDDEN**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN)[held] / INNER**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weights, ids = self.router(tokens).softmax(dim=1).topk(TOPK, dim=1)
        rows, _, _, handle = functional.dispatch(self.ep, tokens.bfloat16(), ids, weights)
        parts = rows.float().split(handle.counts.tolist())  # mode "exact": as many rows as came, expert by expert
        outputs = [F.gelu(part @ up) @ down for part, up, down in zip(parts, self.up, self.down, strict=True)]
        return functional.combine(self.ep, torch.cat(outputs).bfloat16(), handle).to(x.dtype).view_as(x)


class Block(nn.Module):
    def __init__(self, ep: moegen.HighThroughput) -> None:
        super().__init__()
        self.before_attention, self.before_experts = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attention_in = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.attention_out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.experts = MixtureOfExperts(ep)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.attention_in(self.before_attention(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.attention_out(seen.transpose(1, 2).flatten(2))
        return x + self.experts(self.before_experts(x))


class LanguageModel(nn.Module):
    """[batch, context] bytes -> [batch, context, 256] logits of the next byte."""

    def __init__(self, ep: moegen.HighThroughput) -> None:
        super().__init__()
        self.byte, self.place = nn.Embedding(BYTES, HIDDEN), nn.Embedding(CONTEXT, HIDDEN)
        self.blocks = nn.Sequential(*(Block(ep) for _ in range(BLOCKS)))
        self.last = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, BYTES))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.blocks(self.byte(text) + self.place.weight))
        return logits

    def shared(self) -> list[nn.Parameter]:
        """What every rank has a copy of: all but the experts."""
        return [value for name, value in self.named_parameters() if not name.endswith(("experts.up", "experts.down"))]


def train(group: Any, device: torch.device, steps: int, batch: int, name: str) -> list[float]:
    """Returns the loss of each step over the whole batch, which is the same whatever the number of ranks."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    text = torch.frombuffer(bytearray("\n".join(topics[key] for key in sorted(topics)).encode()), dtype=torch.uint8)
    with moegen.HighThroughput(
        group,
        num_experts=EXPERTS,
        num_topk=TOPK,
        hidden=HIDDEN,
        max_tokens_per_rank=-(-batch // ranks) * CONTEXT,
        layout="packed",
        mode="exact",
        device=device,
    ) as ep:
        torch.manual_seed(0)
        model = LanguageModel(ep).to(device)
        shared = model.shared()
        optimizer = torch.optim.AdamW(model.parameters(), RATE)
        choose = torch.Generator().manual_seed(1)
        losses = []
        for _ in track(range(steps), name, console=console, disable=rank != 0):
            starts = torch.randint(len(text) - CONTEXT, (batch,), generator=choose)
            mine = starts.tensor_split(ranks)[rank]
            window = text[mine.unsqueeze(1) + torch.arange(CONTEXT + 1)].long().to(device)
            logits = model(window[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum") / (batch * CONTEXT)
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            # Experts have seen the tokens of all ranks; of the rest each rank has a part of the gradient.
            parts = [loss.detach().view(1)]
            parts += [torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1) for p in shared]
            summed = torch.cat(parts)
            dist.all_reduce(summed, group=group)
            for parameter, part in zip(shared, summed[1:].split([p.numel() for p in shared]), strict=True):
                parameter.grad = part.view_as(parameter)
            optimizer.step()
            losses.append(float(summed[0]))
        ep.synchronize()
    return losses


def write(curves: dict[str, list[float]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "losses.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", *curves])
        rows.writerows([step, *values] for step, values in enumerate(zip(*curves.values(), strict=True), 1))
    try:
        import matplotlib as mpl
    except ImportError:
        console.print(f"wrote {folder / 'losses.csv'}; for a picture: pip install 'moegen\\[plot]'", soft_wrap=True)
        return
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=False):
        axes.plot(range(1, len(losses) + 1), losses, style, label=name)
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    axes.legend()
    figure.savefig(folder / "losses.png", dpi=150, bbox_inches="tight")
    console.print(f"wrote {folder / 'losses.png'} and losses.csv", soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="sequences of all ranks together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check", action="store_true", help="also train in one process, and compare")
    parser.add_argument("--out", type=Path, default=Path("moe_lm"))
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ranks = dist.get_world_size()
    name = f"{ranks} rank{'s' * (ranks > 1)}"
    curves = {name: train(dist.group.WORLD, device, chosen.steps, chosen.batch, name)}
    alone = dist.new_group([0])
    if dist.get_rank() == 0:
        if chosen.check:
            curves["one process"] = train(alone, device, chosen.steps, chosen.batch, "one process")
        write(curves, chosen.out)
        first, last = curves[name][0], curves[name][-1]
        console.print(f"loss of {name}: {first:.4f} at first, {last:.4f} at step {chosen.steps}")
    difference = max(abs(a - b) for a, b in zip(curves[name], curves.get("one process", curves[name]), strict=True))
    if dist.get_rank() == 0 and chosen.check:
        console.print(f"largest difference to one process: {difference:.2e}")
    dist.barrier()
    dist.destroy_process_group()
    if difference > ALLOWED_DIFFERENCE:
        raise SystemExit(f"the losses differ by more than {ALLOWED_DIFFERENCE}")


if __name__ == "__main__":
    main()
