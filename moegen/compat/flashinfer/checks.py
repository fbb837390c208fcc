# SPDX-License-Identifier: Apache-2.0
"""What the calls' arguments must be, told before anything is compiled or launched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from moegen import admission
from moegen.errors import InputError
from moegen.kernels.integers import as_int

Tensor = torch.Tensor

MAX_PAYLOADS = 16
COMBINE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RANK_MASK_WORDS = 1
"""64-bit words of a rank mask: there are no more than 64 ranks."""


class CallError(InputError, RuntimeError, AssertionError):
    """A call that cannot be; nothing was launched. FlashInfer raises a ValueError for some, a RuntimeError or an
    AssertionError for others: this is all of them.
    """


def one_of_the_backends(backend: str) -> None:
    if backend not in ("trtllm", "cake"):
        raise CallError(f"backend is 'trtllm' or 'cake' (both mean moegen's kernels here); got {backend!r}")


def positive(name: str, value: object) -> int:
    """The value as Python's own integer."""
    number = as_int(value)
    if number is None or number <= 0:
        raise CallError(f"{name} is an integer, 1 or more; got {value!r}")
    return number


def at_least_zero(name: str, value: object) -> int:
    number = as_int(value)
    if number is None or number < 0:
        raise CallError(f"{name} is an integer, 0 or more; got {value!r}")
    return number


def ranks(ep_rank: object, ep_size: object) -> tuple[int, int]:
    rank, size = as_int(ep_rank), positive("ep_size", ep_size)
    if rank is None or not 0 <= rank < size:
        raise CallError(f"ep_rank is 0..{size - 1}; got {ep_rank!r}")
    return rank, size


def runtime_max(value: int, max_num_tokens: int) -> int:
    """The slots per source of one call."""
    value = positive("runtime_max_tokens_per_rank", value)
    if value > max_num_tokens:
        raise CallError(
            f"runtime_max_tokens_per_rank exceeds max_num_tokens: {value} > {max_num_tokens}; make the workspace with "
            f"max_num_tokens={value} or dispatch in parts"
        )
    return value


def routing(ids: Tensor, top_k: int, slots: int) -> None:
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != top_k:
        raise CallError(f"token_selected_experts is [tokens, {top_k}]; got {_shape(ids)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise CallError(f"token_selected_experts is int32 (int64 will do); got {ids.dtype}")
    if ids.shape[0] > slots:
        raise CallError(
            f"this rank has {ids.shape[0]} tokens and runtime_max_tokens_per_rank={slots}: give all ranks the most "
            f"that any of them has"
        )


def payloads(given: Sequence[Tensor], ids: Tensor) -> None:
    if not 1 <= len(given) <= MAX_PAYLOADS:
        raise CallError(f"input_payloads are 1..{MAX_PAYLOADS} tensors; got {len(given)}")
    for index, payload in enumerate(given):
        if not isinstance(payload, torch.Tensor) or payload.dim() != 2 or payload.shape[0] != ids.shape[0]:
            raise CallError(
                f"payload {index} is [{ids.shape[0]}, elements], a row per token; got {_shape(payload)} (a vector v of "
                f"one number per token goes as v[:, None])"
            )
        if payload.device != ids.device:
            raise CallError(f"payload {index} is on {payload.device} and token_selected_experts on {ids.device}")


def expert_id_payload(index: int | None, invalid_id: int | None, given: Sequence[Tensor]) -> tuple[int, int] | None:
    """Which payload's unused slots get which id; None: none does."""
    if invalid_id is None:
        return None
    if index is None:
        raise CallError("expert_id_payload_index required when invalid_token_expert_id is set: which payload has ids?")
    number, invalid = as_int(index), as_int(invalid_id)
    if number is None or not 0 <= number < len(given):
        raise CallError(f"expert_id_payload_index is 0..{len(given) - 1}, one of the payloads; got {index!r}")
    if invalid is None:
        raise CallError(f"invalid_token_expert_id is an integer; got {invalid_id!r}")
    index = number
    if given[index].dtype != torch.int32:
        raise CallError(f"payload {index} holds expert ids and is int32; got {given[index].dtype}")
    return index, invalid


def eplb_stats(stats: Tensor | None, experts: int) -> Tensor | None:
    if stats is None:
        return None
    if experts == 0:
        raise CallError("eplb_local_stats need a workspace made with eplb_stats_num_experts; it was made with 0")
    if stats.dtype != torch.int32 or tuple(stats.shape) != (experts,):
        raise CallError(f"eplb_local_stats is int32 [{experts}]; got {stats.dtype} {_shape(stats)}")
    return stats


def room(needed: int, size: int, what: str, remedy: str) -> None:
    """Of a workspace row."""
    if needed > size:
        raise CallError(f"workspace size per rank insufficient for {what}: need {needed} bytes, has {size}; {remedy}")


def rank_mask(active: Iterable[int], ep_size: int) -> Tensor:
    """uint64 [1] on the CPU, bit r for each rank that is active."""
    bits = 0
    for rank in active:
        if not 0 <= int(rank) < ep_size:
            raise CallError(f"active ranks are 0..{ep_size - 1}; got {int(rank)}")
        bits |= 1 << int(rank)
    return torch.tensor([bits], dtype=torch.uint64, device="cpu")


def mask_bits(mask: Tensor | None, enabled: bool, ep_rank: int, ep_size: int) -> int | None:
    """What such a tensor says; None: all ranks are active."""
    if mask is None:
        return None
    if not enabled:
        raise CallError("active_rank_mask requires enable_rank_mask=True")
    if mask.dtype != torch.uint64 or mask.device.type != "cpu" or tuple(mask.shape) != (RANK_MASK_WORDS,):
        raise CallError(
            f"active_rank_mask is uint64 [{RANK_MASK_WORDS}] on the CPU, as moe_a2a_active_rank_mask makes it; got "
            f"{mask.dtype} {_shape(mask)} on {mask.device}"
        )
    bits = int(admission.read("active_rank_mask", mask).item()) & ((1 << ep_size) - 1)
    if not bits >> ep_rank & 1:
        raise CallError(f"active_rank_mask leaves out rank {ep_rank}, which makes this call: its own bit is always set")
    return bits


def combine_payload(payload: Tensor, ep_size: int, slots: int) -> None:
    if payload.dim() != 3 or tuple(payload.shape[:2]) != (ep_size, slots):
        raise CallError(f"payload is [{ep_size}, {slots}, hidden], as the dispatch's results; got {_shape(payload)}")
    if payload.dtype not in COMBINE_DTYPES:
        raise CallError(f"payload is {' or '.join(map(str, COMBINE_DTYPES))}; got {payload.dtype}")
    admission.read("payload", payload)


def output_dtype(wanted: torch.dtype | None, scales: Tensor | None) -> None:
    if scales is not None:
        raise NotImplementedError("moegen.compat.flashinfer has no output_scales: combine's results are not quantised")
    if wanted is not None and wanted not in OUTPUT_DTYPES:
        raise NotImplementedError(
            f"moegen.compat.flashinfer has no output_dtype={wanted}: it is {' or '.join(map(str, OUTPUT_DTYPES))}"
        )


def output(tensor: Tensor | None, payload: Tensor, tokens: int, dtype: torch.dtype) -> None:
    if tensor is None:
        return
    if tensor.device != payload.device:
        raise CallError(f"output must be on {payload.device}, where payload is, got device={tensor.device}")
    if not tensor.is_contiguous():
        raise CallError(f"output must be contiguous, got stride={tensor.stride()}")
    if tuple(tensor.shape) != (tokens, payload.shape[2]) or tensor.dtype != dtype:
        raise CallError(
            f"output is {dtype} [{tokens}, {payload.shape[2]}], a row per token; got {tensor.dtype} {_shape(tensor)}"
        )


def expert_ids(ids: Tensor, ep_size: int, slots: int) -> None:
    if ids.dtype != torch.int32 or ids.dim() != 3 or tuple(ids.shape[:2]) != (ep_size, slots):
        raise CallError(f"expert_ids is int32 [{ep_size}, {slots}, top_k], as received; got {ids.dtype} {_shape(ids)}")


def _shape(value: object) -> object:
    return list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
