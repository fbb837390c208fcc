# SPDX-License-Identifier: Apache-2.0
"""`ExpertParallel`: the object that users hold. One per MoE layer shape and process group; many layers may share it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch

from moegen import checks
from moegen.codegen.render import render
from moegen.errors import DestroyedError, MoegenError, PeerTimeoutError, WorldError
from moegen.handle import Dispatched, Handle
from moegen.kernels.ll import MAX_TOKENS_PER_RANK
from moegen.kernels.problem import Problem
from moegen.runtime.kernel import LoadedKernel, load
from moegen.runtime.low_latency import FIRST_EPOCH, LowLatency
from moegen.runtime.worlds import RankWorld, as_rank_world
from moegen.select import Selection, select

log = logging.getLogger(__name__)

T = TypeVar("T")

_DTYPES = {torch.bfloat16: "bf16"}


class ExpertParallel:
    """Expert-parallel dispatch and combine for one shape of MoE layer. Making one is collective.

    All ranks make the same calls in the same order. Calls that may overlap on a GPU (two streams, two objects) need an
    order that is the same on all ranks, or a `num_sms` that leaves room for both: a launch may take the whole device.

    Args:
        group_or_world: a torch process group (gloo or nccl; None: the default one), or the rank_world that
            `LocalWorld.run` passes to its function.
        num_experts: experts of all ranks together; rank r holds a contiguous share, the first `num_experts % ranks`
            ranks one more than the others.
        num_topk: experts that a token selects.
        hidden: elements of a token; a token is a multiple of 16 bytes.
        max_tokens_per_rank: capacity: tokens that a rank may dispatch in one call. Sizes the buffers.
        dtype: of the tokens: torch.bfloat16.
        layout: of what dispatch returns: "expert".
        mode: "capacity": counts stay on the device and nothing waits for the host.
        family: "ll" (low latency), or "auto".
        path: "ipc" (peers' memory is mapped), or "auto".
        wire: how rows cross the link: "inline" (every 16 bytes carry their epoch), "row" (a tag per row), or "auto".
        warp_groups: teams and warps per team of a block, e.g. "2x16"; None: from the table in `moegen.select`.
        num_sms: thread blocks per launch at most; None: as many as are useful.
        timeout: seconds that one call may wait for other ranks before it fails with PeerTimeoutError.
        device: where a process group's tensors are; None: the current GPU, else the CPU.

    All arguments but `num_sms` and `device` must be equal on all ranks.

    Raises:
        InputError, SpecError: an argument that cannot be; the text says what is allowed.
        WorldError: ranks gave different arguments, or run different versions of moegen.
        UnsupportedPlatformError: the ranks cannot map each other's memory, or there is no compiler for the kernels.
        CapacityError: no room for the buffers.
        CompileError: a kernel does not compile.
    """

    def __init__(
        self,
        group_or_world: Any = None,
        *,
        num_experts: int,
        num_topk: int,
        hidden: int,
        max_tokens_per_rank: int,
        dtype: torch.dtype = torch.bfloat16,
        layout: str = "expert",
        mode: str = "capacity",
        family: str = "auto",
        path: str = "auto",
        wire: str = "auto",
        warp_groups: str | None = None,
        num_sms: int | None = None,
        timeout: float = 30.0,
        device: str | torch.device | None = None,
        first_epoch: int = FIRST_EPOCH,
    ) -> None:
        checks.one_of("layout", layout, ("expert",))
        checks.one_of("mode", mode, ("capacity",))
        checks.one_of("family", family, ("auto", "ll"))
        checks.one_of("path", path, ("auto", "ipc"))
        checks.one_of("wire", wire, ("auto", "inline", "row"))
        checks.one_of("dtype", dtype, tuple(_DTYPES))
        checks.in_range("max_tokens_per_rank", max_tokens_per_rank, 1, MAX_TOKENS_PER_RANK)
        checks.in_range("first_epoch", first_epoch, FIRST_EPOCH, 2**32 - 1)
        if num_sms is not None:
            checks.in_range("num_sms", num_sms, 1, 1024)
        checks.seconds("timeout", timeout)
        self.world: RankWorld = as_rank_world(group_or_world, device)
        self.problem = Problem(
            num_ranks=self.world.size,
            num_experts=num_experts,
            num_topk=num_topk,
            hidden=hidden,
            max_tokens=max_tokens_per_rank,
            dtype=_DTYPES[dtype],
            layout=layout,
            on_host=self.world.device.type == "cpu",
            wire=wire,
            warp_groups=warp_groups,
        )
        self.dtype = dtype
        self.device = self.world.device
        self.selection, self.kernels = _load_on_all_ranks(self.world, self.problem, (timeout, first_epoch))
        self._poison: MoegenError | None = None
        self._ops: LowLatency | None = None
        failure: Exception | None = None
        try:
            self._ops = LowLatency(
                self.world,
                self.problem,
                self.selection,
                self.kernels,
                timeout=timeout,
                num_sms=num_sms,
                first_epoch=first_epoch,
            )
            self._synchronize_device()
        except Exception as error:  # told to the other ranks below
            failure = error
        _raise_on_all_ranks(self.world, failure, "could not make its buffers")
        log.info(
            "rank %d of %s: family ll, path ipc, %s",
            self.world.rank,
            self.world.description,
            self.selection.dispatch.stem,
        )

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def num_ranks(self) -> int:
        return self.world.size

    @property
    def local_experts(self) -> range:
        """The expert ids that this rank holds."""
        return self.problem.local_experts(self.rank)

    @property
    def buffer_bytes(self) -> int:
        """Symmetric memory that this object holds on each rank."""
        return self._alive().buffer_bytes

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        *,
        num_tokens: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> Dispatched:
        """Sends every token to the ranks that hold its experts. Every rank calls it, also with zero tokens.

        Args:
            x: [T, hidden], 0 <= T <= max_tokens_per_rank; T may differ between ranks and calls.
            topk_idx: [T, topk], int32 or int64, ids in [-1, num_experts); -1 selects nothing. The same expert twice
                in one row is two selections that share one row of the result.
            topk_weights: [T, topk] float32; they travel with the tokens and are combine's default. None: ones.
            num_tokens: int32 [1] on the device: how many of the T tokens count, read when the kernel runs, so that
                one captured graph serves every batch size.
            out: the tensor for `Dispatched.tokens`, [local experts, ranks * max_tokens_per_rank, hidden].

        Raises:
            InputError: an argument does not fit; nothing was launched.
            PeerTimeoutError: this or an earlier call waited for a rank in vain.
            InvalidRoutingError: an earlier call on a GPU met an id that names no expert (on the CPU ids are checked
                before anything is launched). This call was not launched: make it again, the other ranks wait for it.
            LaunchError: the driver refused the launch.
            DestroyedError: after `destroy()`.
        """
        ops = self._alive()
        self.check()
        x = checks.tokens(self, x)
        checks.num_tokens(self, num_tokens)
        topk_idx = checks.topk_idx(self, topk_idx, x.shape[0], num_tokens)
        topk_weights = checks.topk_weights(self, topk_weights, x.shape[0])
        checks.out(self, out, (ops.local_experts, ops.expert_rows, self.problem.hidden))
        return self._launch(ops.dispatch, x, topk_idx, topk_weights, num_tokens, out, self)

    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Brings the experts' outputs back and adds them: sum over a token's selections of weight * output.

        Partial sums over a rank's experts are formed in fp32 and cross the link once, rounded once to the dtype; the
        owner adds them in rank order. A token with no selection gets zeros. Every rank calls it.

        Args:
            y: [local experts, ranks * max_tokens_per_rank, hidden], rows where dispatch put them.
            handle: of the dispatch; may be used more than once.
            topk_weights: [T, topk] float32, in place of those given to dispatch. All ranks give them, or none does.
            out: the tensor for the result.

        Returns:
            [T, hidden], T as given to dispatch; rows from `num_tokens` on are undefined.

        Raises:
            HandleError: the handle is another object's.
            InputError, PeerTimeoutError, DestroyedError: as `dispatch`.
        """
        ops = self._alive()
        self.check()
        checks.handle(self, handle)
        y = checks.expert_outputs(self, y, (ops.local_experts, ops.expert_rows, self.problem.hidden))
        topk_weights = checks.topk_weights(self, topk_weights, handle.num_tokens)
        shape = (handle.num_tokens, self.problem.hidden)
        checks.out(self, out, shape)
        if out is None:
            out = y.new_empty(shape)
        self._launch(ops.combine, y, handle, topk_weights, out)
        return out

    def warmup(self) -> None:
        """Runs each kernel once with zero tokens, so that the first real call pays for nothing. Collective."""
        x = torch.empty(0, self.problem.hidden, dtype=self.dtype, device=self.device)
        ids = torch.empty(0, self.problem.num_topk, dtype=torch.int64, device=self.device)
        weights = torch.empty(0, self.problem.num_topk, device=self.device)
        received = self.dispatch(x, ids)
        self.combine(received.tokens, received.handle)
        self.combine(received.tokens, received.handle, weights)
        self.synchronize()

    def check(self) -> None:
        """Raises what the kernels have reported so far, without waiting for those under way.

        Raises:
            PeerTimeoutError: a call waited for a rank in vain; from then on every call raises it until `destroy()`.
            InvalidRoutingError: a call met an id that names no expert.
            DestroyedError: after `destroy()`.
        """
        ops = self._alive()
        if self._poison is not None:
            raise copy.copy(self._poison)
        try:
            ops.raise_what_happened()
        except PeerTimeoutError as error:
            self._poison = error
            raise

    def synchronize(self) -> None:
        """Waits for the current stream and raises what went wrong, which `torch.cuda.synchronize` alone does not."""
        self._synchronize_device()
        self.check()

    def destroy(self) -> None:
        """Gives the buffers back once all that was launched on the device is over. Not collective; may be called again.

        A graph that holds calls of this object must not be replayed afterwards.
        """
        ops, self._ops = self._ops, None
        if ops is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # calls may have gone to any stream
            ops.memory.release()

    def __enter__(self) -> ExpertParallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    def _alive(self) -> LowLatency:
        if self._ops is None:
            raise DestroyedError("this ExpertParallel was destroyed; make a new one")
        return self._ops

    def _synchronize_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _launch(self, op: Callable[..., T], *arguments: Any) -> T:
        """A launch that fails leaves this rank one epoch behind: the object is poisoned. On the host a launch is over
        when it returns, so what it reported is raised at once.
        """
        try:
            result = op(*arguments)
        except MoegenError as error:
            self._poison = error
            raise
        if self.device.type == "cpu":
            self.check()
        return result


def _load_on_all_ranks(
    world: RankWorld, problem: Problem, settings: tuple[object, ...]
) -> tuple[Selection, tuple[LoadedKernel, ...]]:
    """Loads every kernel that calls may need, on all ranks before any may launch, and compares what they load.

    A rank that compiles while others run looks like a hang to them.
    """
    failure: Exception | None = None
    digests: tuple[str, ...] = ()
    try:
        selection = select(problem)
        kernels = tuple(load(spec, world.device) for spec in selection.specs)
        digests = tuple(render(spec).digest for spec in selection.specs)
    except Exception as error:  # whatever it was, the other ranks must not wait for this one
        failure = error
    _raise_on_all_ranks(world, failure, "could not load its kernels")
    answers = world.exchange((problem, settings, digests))
    for rank, answer in enumerate(answers):
        _compare("arguments", answers[0][:2], answer[:2], rank)
        _compare("kernel texts (two versions of moegen?)", answers[0][2], answer[2], rank)
    return selection, kernels


def _raise_on_all_ranks(world: RankWorld, failure: Exception | None, what: str) -> None:
    """No rank goes on if one has failed: it would wait for that one. Collective."""
    answers = world.exchange(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, failed in enumerate(answers):
        if failed is not None:
            raise WorldError(f"rank {rank} {what}: {failed}")


def _compare(what: str, first: object, other: object, rank: int) -> None:
    if first != other:
        raise WorldError(f"rank {rank} and rank 0 have different {what}: {other} and {first}")
