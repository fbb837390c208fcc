# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine of `HighThroughput` with gradients: torch operators, for autograd and torch.compile.

    rows, row_topk_idx, row_weights, handle = functional.dispatch(layer, x, topk_idx, topk_weights)
    out = functional.combine(layer, experts(rows), handle)

The backward of one is the other, with the same handle, so each costs one launch. All ranks make the same calls forward
and build the same graph: then their backward passes make the same calls too, also on a rank that got no rows, and in
whatever order handles are used. Operators take tensors and numbers; the layer is named by its number and has to live
until the last backward. First derivatives only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moegen import admission, checks
from moegen.errors import HandleError, InputError
from moegen.high_throughput import HighThroughput, by_number
from moegen.row_checks import MAX_ROWS
from moegen.rows import RowsHandle
from moegen.runtime.row_memory import Numbers

_ROWS_AT_ONCE = 8192
"""Rows whose products with their gradients are formed in fp32 at a time."""


class Handle(NamedTuple):
    """A routing, for combine; any number may live. Its tensors are as in `DispatchedRows`.

    Attributes:
        layer: number of the `HighThroughput` that made it.
        num_tokens: rows of the token tensor that was dispatched.
        memory: the routing itself, opaque.
        row_weights: those that dispatch returned: combine's way to their gradients.
        counts: int32 [local experts], on the device: rows that select each expert.
        expert_starts: int32 [local experts + 1] in layout `packed`: first row of each expert; else None.
        source_starts: int32 [ranks + 1]: (token, rank) rows that came from lower ranks, and in the end from all.
        row_tokens: int32 [ranks * max_tokens_per_rank]: which of its source's tokens each of those is.
    """

    layer: int
    num_tokens: int
    memory: torch.Tensor
    row_weights: torch.Tensor
    counts: torch.Tensor
    expert_starts: torch.Tensor | None
    source_starts: torch.Tensor
    row_tokens: torch.Tensor


class Routed(NamedTuple):
    """What `dispatch` returns.

    Attributes:
        rows: [rows, hidden] bfloat16 in the order of `DispatchedRows.tokens`. Rows that nothing came for are zeros, and
            so are the gradients that combine gives them: experts may run over all rows.
        row_topk_idx: int64 [rows, topk] in layout `token`: the expert of each selection, counted among this rank's; -1
            where another rank holds it, and in rows that nothing came for. None in layout `packed`.
        row_weights: float32, [rows, topk] in layout `token` (zero where row_topk_idx is -1), [rows] in layout `packed`.
        handle: for combine.
    """

    rows: torch.Tensor
    row_topk_idx: torch.Tensor | None
    row_weights: torch.Tensor
    handle: Handle


def dispatch(
    layer: HighThroughput,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    *,
    max_rows: int | None = None,
) -> Routed:
    """Sends every token to the ranks that hold its experts; differentiable in `x` and `topk_weights`.

    Every rank calls it, also with zero tokens, and runs backward through it. The gradient of `x` is the sum of the
    gradients of a token's rows, formed as combine forms sums; that of `topk_weights` is exact.

    Args:
        layer: made for bfloat16 tokens that are sent as they are (`dtype` and `quantize` left alone).
        x: [T, hidden] bfloat16.
        topk_idx: [T, topk] int32 or int64, as for `HighThroughput.dispatch`.
        topk_weights: [T, topk] float32; None: ones.
        max_rows: as for `HighThroughput.dispatch`, in mode "capacity".

    Raises:
        InputError: the layer is for FP8, or as `HighThroughput.dispatch`, with its other errors.
    """
    _require_bfloat16(layer)
    if not torch.compiler.is_compiling():
        x, topk_idx = _operand(layer, "x", x), _operand(layer, "topk_idx", topk_idx)
        if topk_weights is not None:
            topk_weights = _operand(layer, "topk_weights", topk_weights)
        if max_rows is not None:
            max_rows = checks.in_range("max_rows", max_rows, 0, MAX_ROWS)
    if topk_weights is None:
        topk_weights = torch.ones(topk_idx.shape, dtype=torch.float32, device=x.device)
    room = -1 if max_rows is None else max_rows
    rows, ids, weights, memory = torch.ops.moegen.dispatch(x, topk_idx, topk_weights, layer.number, room)
    packed = layer.problem.layout == "packed"
    part = layer.row_memory.part
    handle = Handle(
        layer.number,
        x.shape[0],
        memory,
        weights,
        part(memory, "counts"),
        part(memory, "first_slots") if packed else None,
        part(memory, "first_rows"),
        part(memory, "row_tokens"),
    )
    return Routed(rows, None if packed else ids, weights, handle)


def combine(layer: HighThroughput, y: torch.Tensor, handle: Handle, *, weighted: bool = True) -> torch.Tensor:
    """Brings rows back to their tokens' owners and adds them up; differentiable in `y` and in dispatch's topk_weights.

    From layout `token` the plain sum: experts' outputs are weighted before, with `row_weights`. From layout `packed`
    the sum of weight * row with the weights given to dispatch, or the plain one. Every rank calls it.

    Args:
        y: [rows, hidden] bfloat16, rows where dispatch put them.
        handle: of the dispatch; may be used more than once.
        weighted: False: layout `packed` adds rows up without their weights.

    Returns:
        [T, hidden] bfloat16, T as given to dispatch.

    Raises:
        HandleError: the handle is another layer's.
        InputError and others: as `HighThroughput.combine`.
    """
    _require_bfloat16(layer)
    if not isinstance(handle, Handle):
        raise HandleError(f"combine takes the handle of functional.dispatch; got {type(handle).__name__}")
    if handle.layer != layer.number:
        raise HandleError("this handle comes from another layer; give it to that one")
    if not torch.compiler.is_compiling():
        y, weighted = _operand(layer, "y", y), checks.flag("weighted", weighted)
        for name, part in (("row_weights", handle.row_weights), ("memory", handle.memory)):
            _operand(layer, f"the handle's {name}", part)
    weighted = weighted and layer.problem.layout == "packed"
    summed: torch.Tensor = torch.ops.moegen.combine(
        y, handle.row_weights, handle.memory, handle.layer, handle.num_tokens, weighted
    )
    return summed


def _require_bfloat16(layer: HighThroughput) -> None:
    if not isinstance(layer, HighThroughput):
        raise InputError(f"layer is a moegen.HighThroughput; got {type(layer).__name__}")
    if layer.problem.dtype != "bf16":
        raise InputError(
            "gradients are for bfloat16 tokens, sent as they are: make the layer without dtype= and quantize="
        )


def _operand(layer: HighThroughput, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What an operator may be given: while torch traces, it need not have memory."""
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{name} is a torch tensor; got {type(tensor).__name__}")
    _require_there(layer, name, tensor)
    return admission.operand(name, tensor)


def _require_there(layer: HighThroughput, name: str, tensor: torch.Tensor) -> None:
    """Also where only shapes are asked for: torch does that for the whole call if one of its tensors has no memory."""
    if tensor.device != layer.device:
        raise InputError(f"{name} is on {tensor.device} and the layer on {layer.device}")


def _room(layer: HighThroughput, max_rows: int) -> int:
    """Rows of a result in mode "capacity"; -1: the caller has not said."""
    return layer.max_rows if max_rows == -1 else checks.in_range("max_rows", max_rows, 0, MAX_ROWS)


# The operators. They know nothing of each other's gradients: what torch differentiates is registered below.


@torch.library.custom_op(
    "moegen::dispatch",
    mutates_args=(),
    schema="(Tensor x, Tensor topk_idx, Tensor topk_weights, int layer, int max_rows) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _dispatch(
    x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, layer: int, max_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, ids of layout `token` (else empty), weights, and the handle's memory. max_rows -1: not given."""
    made = by_number(layer)
    out = None
    if made.mode != "exact":
        shape = (_room(made, max_rows), made.problem.hidden)
        out = torch.zeros(shape, dtype=torch.bfloat16, device=made.device)
    room = None if max_rows == -1 else max_rows
    received = made.dispatch(x, topk_idx, topk_weights, max_rows=room, out=out)
    came = _came(made, received.handle)
    if out is None and made.alignment > 1:
        received.tokens.masked_fill_(~came.unsqueeze(1), 0)
    weights = received.topk_weights
    ids = received.topk_idx
    assert weights is not None
    weights.masked_fill_(~came.view(-1, *[1] * (weights.dim() - 1)), 0)
    ids = topk_idx.new_empty(0, dtype=torch.int64) if ids is None else ids
    return received.tokens, ids, weights, received.handle.memory


def _came(layer: HighThroughput, handle: RowsHandle) -> torch.Tensor:
    """Which rows of the result something came for: bool [rows]."""
    numbers: Numbers = handle.numbers
    row = torch.arange(handle.rows, dtype=torch.int32, device=layer.device)
    if layer.problem.layout == "token":
        return row.lt(numbers.first_rows[-1])
    expert = torch.searchsorted(numbers.first_slots[1:], row, right=True).clamp_(max=numbers.counts.numel() - 1)
    return (row - numbers.first_slots[expert]).lt(numbers.counts[expert])


@torch.library.custom_op(
    "moegen::combine",
    mutates_args=(),
    schema="(Tensor y, Tensor row_weights, Tensor memory, int layer, SymInt num_tokens, bool weighted) -> Tensor",
)
def _combine(
    y: torch.Tensor, row_weights: torch.Tensor, memory: torch.Tensor, layer: int, num_tokens: int, weighted: bool
) -> torch.Tensor:
    """`row_weights` are in the memory too; as an argument they are what has a gradient. They also lead every rank's
    backward from here to dispatch, even where no row came and `y` depends on nothing.
    """
    made = by_number(layer)
    return made.combine(y, made.handle_of(memory, num_tokens, row_weights.shape[0]), weighted=weighted)[0]


@torch.library.custom_op(
    "moegen::dispatch_backward",
    mutates_args=(),
    schema="(Tensor grad_rows, Tensor? grad_weights, Tensor ids, Tensor memory, int layer, SymInt num_tokens) "
    "-> (Tensor, Tensor)",
)
def _dispatch_backward(
    grad_rows: torch.Tensor,
    grad_weights: torch.Tensor | None,
    ids: torch.Tensor,
    memory: torch.Tensor,
    layer: int,
    num_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both gradients return in one combine: that of each row once, and a number for each selection beside it."""
    made = by_number(layer)
    handle = made.handle_of(memory, num_tokens, grad_rows.shape[0])
    if grad_weights is not None and made.problem.layout == "token":
        grad_weights = grad_weights.masked_fill(ids < 0, 0)
    grad_x, sums = made.combine(grad_rows, handle, grad_weights, weighted=False)
    return grad_x, memory.new_empty(0, dtype=torch.float32) if sums is None else sums


@torch.library.custom_op(
    "moegen::combine_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? y, Tensor? row_weights, Tensor memory, int layer, SymInt rows) -> (Tensor, Tensor)",
)
def _combine_backward(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    row_weights: torch.Tensor | None,
    memory: torch.Tensor,
    layer: int,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of each row of `y`, and of its weight: the product of both rows. `y` None: there are no weights."""
    made = by_number(layer)
    handle = made.handle_of(memory, grad.shape[0], rows)
    grad_y = made.dispatch(grad, handle=handle, out=grad.new_zeros(rows, made.problem.hidden)).tokens
    if y is None or row_weights is None:
        return grad_y, memory.new_empty(0, dtype=torch.float32)
    products = torch.empty_like(row_weights)
    for first in range(0, rows, _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        wide = grad_y[some].float()
        torch.sum(wide * y[some], dim=1, out=products[some])
        grad_y[some] = wide.mul_(row_weights[some].unsqueeze(1))
    return grad_y, products.masked_fill_(~_came(made, handle), 0)  # y is anything in rows that nothing came for


# What torch.compile needs to know: shapes.


@_dispatch.register_fake
def _(
    x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, layer: int, max_rows: int
) -> tuple[torch.Tensor, ...]:
    made = by_number(layer)
    for name, tensor in (("x", x), ("topk_idx", topk_idx), ("topk_weights", topk_weights)):
        _require_there(made, name, tensor)
    number: Any = _room(made, max_rows)
    if made.mode == "exact":
        number = torch.library.get_ctx().new_dynamic_size()
    packed, topk = made.problem.layout == "packed", made.problem.num_topk
    return (
        x.new_empty(number, made.problem.hidden),
        x.new_empty((0,) if packed else (number, topk), dtype=torch.int64),
        x.new_empty((number,) if packed else (number, topk), dtype=torch.float32),
        x.new_empty(made.row_memory.words, dtype=torch.int32),
    )


@_combine.register_fake
def _(
    y: torch.Tensor, row_weights: torch.Tensor, memory: torch.Tensor, layer: int, num_tokens: int, weighted: bool
) -> torch.Tensor:
    for name, tensor in (("y", y), ("row_weights", row_weights), ("memory", memory)):
        _require_there(by_number(layer), name, tensor)
    return y.new_empty(num_tokens, y.shape[1])


@_dispatch_backward.register_fake
def _(
    grad_rows: torch.Tensor,
    grad_weights: torch.Tensor | None,
    ids: torch.Tensor,
    memory: torch.Tensor,
    layer: int,
    num_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (0,) if grad_weights is None else (num_tokens, by_number(layer).problem.num_topk)
    return grad_rows.new_empty(num_tokens, grad_rows.shape[1]), grad_rows.new_empty(shape, dtype=torch.float32)


@_combine_backward.register_fake
def _(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    row_weights: torch.Tensor | None,
    memory: torch.Tensor,
    layer: int,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return grad.new_empty(rows, grad.shape[1]), grad.new_empty(0 if y is None else rows, dtype=torch.float32)


# Gradients.


def _save_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, _, _, ctx.layer, _ = inputs
    _, ids, _, memory = output
    ctx.num_tokens = x.shape[0]
    ctx.save_for_backward(ids, memory)


def _differentiate_dispatch(ctx: Any, grad_rows: Any, _: Any, grad_weights: Any, __: Any) -> tuple[Any, ...]:
    ids, memory = ctx.saved_tensors
    wanted = ctx.needs_input_grad[2]
    grad_x, sums = torch.ops.moegen.dispatch_backward(
        grad_rows, grad_weights if wanted else None, ids, memory, ctx.layer, ctx.num_tokens
    )
    return grad_x, None, sums if wanted else None, None, None


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    y, row_weights, memory, ctx.layer, _, ctx.weighted = inputs
    ctx.rows = row_weights.shape[0]
    ctx.save_for_backward(*((y, row_weights, memory) if ctx.weighted else (memory,)))


def _differentiate_combine(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    y, row_weights, memory = ctx.saved_tensors if ctx.weighted else (None, None, *ctx.saved_tensors)
    grad_y, products = torch.ops.moegen.combine_backward(grad, y, row_weights, memory, ctx.layer, ctx.rows)
    return grad_y, products if ctx.weighted else None, None, None, None, None


torch.library.register_autograd("moegen::dispatch", _differentiate_dispatch, setup_context=_save_dispatch)
torch.library.register_autograd("moegen::combine", _differentiate_combine, setup_context=_save_combine)
