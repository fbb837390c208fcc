# SPDX-License-Identifier: Apache-2.0
"""What a call that was not refused must have done: by `moegen.reference`, from its arguments as torch sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moegen import reference, reference_payloads, reference_rows

Tensor = torch.Tensor
HUGE = 1e36
"""Where sums may have left the range of fp32 on the way, only whether they are numbers at all is not known."""


class Unseen:
    """What has no values that torch could read."""


@dataclass
class Done:
    """One rank's call.

    Attributes:
        seen: its arguments before the call; those that are tensors as plain ones, or `Unseen`.
        result: what it returned.
        after: tensors that it was given to write into, as they are now.
    """

    seen: dict[str, Any]
    result: Any
    after: dict[str, Tensor]


@dataclass
class Trip:
    """What the judges of a case's calls know of the earlier ones."""

    experts: int
    topk: int
    max_tokens: int
    expected: Any = None
    ids: list[Tensor] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    slots: int = 0


def same(what: str, got: Tensor, want: Tensor) -> None:
    """Bit for bit."""
    assert got.shape == want.shape, f"{what} has shape {list(got.shape)}, not {list(want.shape)}"
    assert got.dtype == want.dtype, f"{what} is {got.dtype}, not {want.dtype}"
    left, right = (part.detach().contiguous().flatten().view(torch.uint8) for part in (got, want))
    assert torch.equal(left, right), f"{what} is wrong:\n{got}\nnot\n{want}"


def near(what: str, got: Tensor, want: reference.Combined, rows: int) -> None:
    assert got.shape == want.exact.shape, f"{what} has shape {list(got.shape)}, not {list(want.exact.shape)}"
    got, exact, bound = got.detach()[:rows].double(), want.exact[:rows], want.bound[:rows]
    fits = (got - exact).abs() <= bound
    fits |= exact.isnan() & got.isnan()
    fits |= exact.isinf() & ((got == exact) | got.isnan())
    fits |= exact.isfinite() & (bound.isnan() | (bound > HUGE))
    assert fits.all(), f"{what} is wrong in {int((~fits).sum())} places:\n{got[~fits]}\nnot\n{exact[~fits]}"


def counted(done: Done, tokens: int, name: str = "num_tokens") -> int:
    given = done.seen.get(name)
    return tokens if given is None else min(tokens, max(0, int(given.reshape(-1)[0])))


def weights_or_ones(given: Any, ids: Tensor) -> Tensor:
    return torch.ones(ids.shape, dtype=torch.float32, device="cpu") if given is None else given


def routing(
    trip: Trip, calls: Sequence[Done], x: str = "x", ids: str = "topk_idx", weights: str = "topk_weights"
) -> list[Tensor]:
    """Notes the routing of a dispatch; returns the tokens that count."""
    given = [call.seen[x] for call in calls]
    trip.tokens = [len(part) for part in given]
    trip.counted = [counted(call, len(call.seen[x])) for call in calls]
    trip.ids = [call.seen[ids][:number] for call, number in zip(calls, trip.counted, strict=True)]
    trip.weights = [
        weights_or_ones(call.seen.get(weights), call.seen[ids])[:number]
        for call, number in zip(calls, trip.counted, strict=True)
    ]
    return [part[:number] for part, number in zip(given, trip.counted, strict=True)]


def totals(calls: Sequence[Done], counts: Sequence[Tensor], name: str = "total_counts") -> None:
    for call, own in zip(calls, counts, strict=True):
        if call.seen.get(name) is not None:
            same(name, call.after[name], call.seen[name] + own)


def experts_dispatched(trip: Trip, calls: Sequence[Done], received: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """`received`: tokens, counts and row_tokens of each rank."""
    x = routing(trip, calls)
    trip.expected = reference.dispatch(x, trip.ids, trip.experts, trip.max_tokens)
    for (tokens, counts, row_tokens), want in zip(received, trip.expected, strict=True):
        same("counts", counts, want.counts)
        for expert, number in enumerate(want.counts.tolist()):
            same(f"tokens of expert {expert}", tokens[expert, :number], want.tokens[expert, :number])
            sources = torch.tensor([token for _, token in want.sources[expert]], dtype=torch.int32, device="cpu")
            same(f"row_tokens of expert {expert}", row_tokens[expert, :number], sources)


def experts_combined(trip: Trip, calls: Sequence[Done], y: str = "y") -> None:
    weights = [
        before if call.seen.get("topk_weights") is None else call.seen["topk_weights"][: len(before)]
        for call, before in zip(calls, trip.weights, strict=True)
    ]
    halves = bool(calls[0].seen.get("return_recv_hook"))
    outputs = [call.seen[y] for call in calls]
    sums = reference.combine(outputs, trip.expected, trip.ids, weights, trip.experts, in_halves=halves)
    _check_sums(trip, calls, [call.result for call in calls], sums)


def _check_sums(
    trip: Trip, calls: Sequence[Done], results: Sequence[Tensor], sums: Sequence[reference.Combined]
) -> None:
    for tokens, number, got, want in zip(trip.tokens, trip.counted, results, sums, strict=True):
        assert len(got) == tokens, f"the result has {len(got)} rows for {tokens} tokens"
        near("the result", got[:number], want, number)


def rows_dispatched(
    trip: Trip,
    calls: Sequence[Done],
    received: Sequence[dict[str, Any]],
    layout: str,
    alignment: int = 1,
    again: bool = False,
) -> None:
    """`received`: by names as in `ExpectedRows`; None is not looked at. Rows beyond the room are left out."""
    if again:
        x = [call.seen["x"][:number] for call, number in zip(calls, trip.counted, strict=True)]
    else:
        x = routing(trip, calls)
    trip.expected = reference_rows.dispatch_rows(
        x, trip.ids, trip.weights, trip.experts, layout=layout, alignment=alignment
    )
    for got, want in zip(received, trip.expected, strict=True):
        if got.get("counts") is not None:
            same("counts", got["counts"], want.counts)
        used = torch.zeros(len(want.tokens), dtype=torch.bool, device="cpu")
        used[want.rows[want.rows >= 0]] = True
        room = min(len(got["tokens"]), len(used))
        used = used[:room]
        for name in ("tokens", "topk_idx", "topk_weights"):
            if got.get(name) is not None:
                same(name, got[name][:room][used], getattr(want, name)[:room][used])


def rows_combined(
    trip: Trip, calls: Sequence[Done], results: Sequence[Any], weighted: bool = True, y: str = "y"
) -> None:
    """`results`: sums, and those of weights or None."""
    biases = []
    for call, number in zip(calls, trip.counted, strict=True):
        given = call.seen.get("bias")
        several = [] if given is None else [given] if isinstance(given, Tensor) else list(given)
        biases.append([bias[:number] for bias in several])
    expected = trip.expected
    if not weighted:
        expected = [_unweighted(one) for one in expected]
    outputs = [call.seen[y] for call in calls]
    sums = reference_rows.combine_rows(outputs, expected, trip.counted, trip.topk, biases=biases)
    _check_sums(trip, calls, [result[0] for result in results], sums)
    if calls[0].seen.get("topk_weights") is not None and expected[0].expert_starts is None:
        given = [call.seen["topk_weights"] for call in calls]
        for number, result, want in zip(
            trip.counted, results, reference_rows.sum_weights(given, expected, trip.counted), strict=True
        ):
            near("the sums of weights", result[1][:number], want, number)


def _unweighted(rows: reference_rows.ExpectedRows) -> reference_rows.ExpectedRows:
    """Each row once, also where a token selects an expert twice."""
    if rows.expert_starts is None:
        return rows
    factors = torch.ones_like(rows.weights)
    for k in range(1, factors.shape[1]):
        repeated = (rows.rows[:, :k] == rows.rows[:, k : k + 1]).any(dim=1)
        factors[repeated, k] = 0
    return type(rows)(**{**vars(rows), "weights": factors})


def payloads_dispatched(
    trip: Trip,
    calls: Sequence[Done],
    received: Sequence[Sequence[Tensor]],
    counts: Sequence[Tensor] | None,
    stats: Sequence[Tensor | None] | None,
    names: Sequence[str] = ("topk_idx", "payloads", "max_tokens", "stats"),
) -> None:
    ids, parts, most, numbers = names
    trip.slots = int(calls[0].seen.get(most) or trip.max_tokens)
    trip.tokens = [len(call.seen[ids]) for call in calls]
    trip.counted = [counted(call, tokens) for call, tokens in zip(calls, trip.tokens, strict=True)]
    trip.ids = [call.seen[ids][:number].long() for call, number in zip(calls, trip.counted, strict=True)]
    given = [[part[:number] for part in call.seen[parts]] for call, number in zip(calls, trip.counted, strict=True)]
    own = [call.seen.get(numbers) for call in calls]
    trip.expected = reference_payloads.dispatch_payloads(
        [[part.contiguous().view(torch.uint8) for part in of] for of in given],
        trip.ids,
        trip.experts,
        trip.slots,
        stats=None if own[0] is None else own,
    )
    for rank, want in enumerate(trip.expected):
        if counts is not None:
            same("counts", counts[rank], want.counts)
        if stats is not None and want.stats is not None:
            same("stats", stats[rank], want.stats)
        for index, (got, plane) in enumerate(zip(received[rank], want.payloads, strict=True)):
            assert got.dtype == given[rank][index].dtype, f"payload {index} is {got.dtype}"
            same(f"payload {index}", _bytes(got)[want.used], plane[want.used])


def _bytes(part: Tensor) -> Tensor:
    return part.contiguous().view(torch.uint8).view(*part.shape[:2], -1)


def payloads_combined(trip: Trip, calls: Sequence[Done], y: str = "y", dtype: str = "out_dtype") -> None:
    made = calls[0].result
    sums = reference_payloads.combine_payloads(
        [call.seen[y] for call in calls], trip.expected, trip.counted, out_dtype=made.dtype
    )
    wanted = calls[0].seen.get(dtype)
    assert wanted is None or made.dtype == wanted, f"the result is {made.dtype}, not {wanted}"
    _check_sums(trip, calls, [call.result for call in calls], sums)
