# SPDX-License-Identifier: Apache-2.0
"""How many bytes a routing moves, counted three ways, because published figures differ in which one they state.

All functions are pure. Bytes are those of the tokens' payload; headers, tags and counts are not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from moegen.bench.stats import gigabytes_per_second
from moegen.reference import expert_ranges


@dataclass(frozen=True)
class Matrices:
    """What every rank sends to every rank in a dispatch: [source][destination], in rows.

    Attributes:
        rows: a token counts once for each rank that holds one of its experts.
        selections: a token counts once for each (token, expert) selection.
    """

    rows: tuple[tuple[int, ...], ...]
    selections: tuple[tuple[int, ...], ...]


def matrices(topk_idx: Sequence[torch.Tensor], num_experts: int) -> Matrices:
    """Counts a routing.

    Args:
        topk_idx: per rank [tokens, topk], ids in [-1, num_experts); -1 selects nothing; the same expert twice in one
            row is two selections and one row.
    """
    holders = expert_ranges(num_experts, len(topk_idx))
    rows: list[tuple[int, ...]] = []
    selections: list[tuple[int, ...]] = []
    for ids in topk_idx:
        held = [(ids >= experts.start) & (ids < experts.stop) for experts in holders]
        rows.append(tuple(int(here.any(dim=1).sum()) for here in held))
        selections.append(tuple(int(here.sum()) for here in held))
    return Matrices(tuple(rows), tuple(selections))


@dataclass(frozen=True)
class Bytes:
    """Bytes of one direction of one rank.

    Attributes:
        unique_remote: each token once per other rank: what crosses the link.
        unique_with_self: the same, and those that stay on this rank.
        selections: one row for each (token, expert) selection, whichever rank holds the expert.
        same_node, cross_node: unique_remote, split by where the other rank is.
    """

    unique_remote: int
    unique_with_self: int
    selections: int
    same_node: int
    cross_node: int

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Traffic:
    """What one rank sends and receives in one op."""

    send: Bytes
    receive: Bytes

    def unpacked(self) -> Traffic:
        """A receiving half: what has come is read from this rank's memory, and nothing crosses a link."""
        come = self.receive
        return Traffic(Bytes(0, 0, 0, 0, 0), Bytes(0, come.unique_with_self, come.selections, 0, 0))

    def swapped(self) -> Traffic:
        """Combine sends back what dispatch brought."""
        return Traffic(self.receive, self.send)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.send + other.send, self.receive + other.receive)


def dispatch_traffic(moved: Matrices, row_bytes: int, nodes: Sequence[int]) -> list[Traffic]:
    """Each rank's bytes in a dispatch; `nodes` says which node each rank is on."""
    ranks = range(len(nodes))
    return [
        Traffic(
            _one_direction(rank, list(moved.rows[rank]), list(moved.selections[rank]), row_bytes, nodes),
            _one_direction(
                rank,
                [moved.rows[source][rank] for source in ranks],
                [moved.selections[source][rank] for source in ranks],
                row_bytes,
                nodes,
            ),
        )
        for rank in ranks
    ]


def traffic_of(
    op: str, moved: Matrices, dispatch_row_bytes: int, combine_row_bytes: int, nodes: Sequence[int]
) -> list[Traffic]:
    """Each rank's bytes in an op of `moegen.bench.ll`: a dispatch, a combine, the pair, or a half. A sending half
    moves over the link what the whole op moves, a receiving half nothing.
    """
    if op.endswith("_receive"):
        whole = op.removesuffix("_receive")
        return [one.unpacked() for one in traffic_of(whole, moved, dispatch_row_bytes, combine_row_bytes, nodes)]
    op = op.removesuffix("_send").removesuffix("_in_place").removesuffix("_of_exchanges")
    there = dispatch_traffic(moved, dispatch_row_bytes, nodes)
    if op == "dispatch":
        return there
    back = [one.swapped() for one in dispatch_traffic(moved, combine_row_bytes, nodes)]
    return [a + b for a, b in zip(there, back, strict=True)] if op == "pair" else back


def bandwidths(traffic: list[Traffic], us: dict[str, float]) -> dict[str, float]:
    """GB/s of unique remote rows.

    Returns:
        `from_avg`, `from_max`: what a rank sends on average, over the average and the longest of the ranks' times.
        `aggregate`: what all ranks send together, over the longest.
        `busiest`: the largest of any rank's sent or received bytes, over the longest: what the link's limit bounds.
    """
    sent = [own.send.unique_remote for own in traffic]
    busiest = max(max(own.send.unique_remote, own.receive.unique_remote) for own in traffic)
    mean = sum(sent) / len(sent)
    return {
        "from_avg": gigabytes_per_second(mean, us["avg"]),
        "from_max": gigabytes_per_second(mean, us["max"]),
        "aggregate": gigabytes_per_second(sum(sent), us["max"]),
        "busiest": gigabytes_per_second(busiest, us["max"]),
    }


def byte_summary(traffic: list[Traffic]) -> dict[str, float]:
    """What a rank sends on average, three ways, and the most that any rank sends or receives over the link."""
    sent = [asdict(own.send) for own in traffic]
    busiest = max(max(own.send.unique_remote, own.receive.unique_remote) for own in traffic)
    return {name: sum(own[name] for own in sent) / len(sent) for name in sent[0]} | {"busiest": busiest}


def _one_direction(rank: int, rows: list[int], selections: list[int], row_bytes: int, nodes: Sequence[int]) -> Bytes:
    others = [peer for peer in range(len(nodes)) if peer != rank]
    same = sum(rows[peer] for peer in others if nodes[peer] == nodes[rank])
    cross = sum(rows[peer] for peer in others if nodes[peer] != nodes[rank])
    counts = (same + cross, same + cross + rows[rank], sum(selections), same, cross)
    return Bytes(*(count * row_bytes for count in counts))
