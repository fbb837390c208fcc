# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's `MoeAlltoAll`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, NoReturn

import torch

from moegen.compat.flashinfer import checks, communicators, mnnvl, sizes, tables
from moegen.compat.flashinfer.checks import CallError
from moegen.compat.flashinfer.layers import Routed
from moegen.compat.flashinfer.workspace import Sent, Workspace
from moegen.runtime.ownership import Exclusive, exclusive

Tensor = torch.Tensor


class MoeAlltoAll(Exclusive):
    """Dispatch and combine of one MoE layer. Objects of the same sizes and ranks share a workspace, which lives until
    `destroy` or `_reset_workspace`. Making one allocates nothing: the first dispatch does, which is collective and
    compiles; so does the first combine of a length or dtype of rows.

    Args:
        mapping: has `moe_ep_rank` and `moe_ep_size`.
        max_num_tokens: the most that a rank may have in a call.
        top_k, num_experts: of the layer; any number of experts, of which the first ranks hold one more if need be.
        workspace_size_per_rank: bytes, by `moe_a2a_get_workspace_size_per_rank`; None: for 16-bit tokens of
            `hidden_size`.
        hidden_size: elements of combine's rows; None: guessed from the workspace's size and the first payloads.
        mnnvl_config: how ranks find each other, see `MnnvlConfig`; a group or a rank_world may stand in its place.
            None: what `MnnvlMemory.set_comm_from_config` said.
        eplb_stats_num_experts: length of the statistics that dispatch gathers; 0: none.
        enable_rank_mask: whether calls may have an `active_rank_mask`.
        backend: "trtllm" or "cake"; changes nothing here.

    Attributes:
        timeout: not FlashInfer's: seconds that a call may wait for a rank; None: 30.

    Raises:
        CallError: arguments that do not fit.
    """

    _METAINFO_INDEX: ClassVar[dict[str, int]] = sizes.METAINFO_INDEX
    _WORKSPACE_CACHE: ClassVar[dict[tuple[Hashable, ...], Workspace]] = {}

    timeout: float | None = None

    def __init__(
        self,
        mapping: Any,
        max_num_tokens: int,
        top_k: int,
        num_experts: int,
        workspace_size_per_rank: int | None = None,
        hidden_size: int | None = None,
        mnnvl_config: Any = None,
        eplb_stats_num_experts: int = 0,
        enable_rank_mask: bool = False,
        *,
        backend: str = "trtllm",
    ) -> None:
        checks.one_of_the_backends(backend)
        max_num_tokens, top_k = checks.positive("max_num_tokens", max_num_tokens), checks.positive("top_k", top_k)
        num_experts = checks.positive("num_experts", num_experts)
        eplb_stats_num_experts = checks.at_least_zero("eplb_stats_num_experts", eplb_stats_num_experts)
        hidden_size = None if hidden_size is None else checks.positive("hidden_size", hidden_size)
        self.ep_rank, self.ep_size = checks.ranks(mapping.moe_ep_rank, mapping.moe_ep_size)
        self.max_num_tokens, self.top_k, self.num_experts = max_num_tokens, top_k, num_experts
        self.eplb_stats_num_experts, self.enable_eplb = eplb_stats_num_experts, eplb_stats_num_experts > 0
        self.enable_rank_mask = enable_rank_mask
        if workspace_size_per_rank is None:
            if hidden_size is None:
                raise CallError("hidden_size must be provided if workspace_size_per_rank is not provided")
            workspace_size_per_rank = sizes.model_bytes(
                self.ep_size, top_k, max_num_tokens, hidden_size, 0, eplb_stats_num_experts
            )
        workspace_size_per_rank = checks.positive("workspace_size_per_rank", workspace_size_per_rank)
        self.workspace_size_per_rank = workspace_size_per_rank
        if mnnvl_config is not None:
            mnnvl.MnnvlMemory.set_comm_from_config(mapping, mnnvl_config)
        communicator = mnnvl.MnnvlMemory.get_comm(mapping)
        shape = (workspace_size_per_rank, self.ep_rank, self.ep_size, max_num_tokens, eplb_stats_num_experts)
        self._key = (*shape, communicators.identity(communicator))
        self._hidden = hidden_size
        self._behind = self._shared_workspace(communicator)
        self.metainfo = torch.tensor(self._behind.offsets, dtype=torch.int64, device="cpu")
        self._phase = "idle"
        self._sent: Sent | None = None

    def _shared_workspace(self, communicator: Any) -> Workspace:
        kept = self._WORKSPACE_CACHE.get(self._key)
        if kept is None:
            kept = Workspace(communicator, self.ep_rank, self.ep_size, self.workspace_size_per_rank)
            kept.lay_out(self.max_num_tokens, self.eplb_stats_num_experts)
            self._WORKSPACE_CACHE[self._key] = kept
        return kept

    @staticmethod
    def get_moe_workspace_size_per_rank(
        ep_size: int,
        top_k: int,
        max_num_tokens: int,
        hidden_size: int,
        extra_payload_bytes_per_token: int = 0,
        eplb_stats_num_experts: int = 0,
        *,
        backend: str = "trtllm",
    ) -> int:
        """Bytes of a rank's row for 16-bit tokens that travel with their ids and 32-bit weights."""
        checks.one_of_the_backends(backend)
        extra = extra_payload_bytes_per_token
        return sizes.model_bytes(ep_size, top_k, max_num_tokens, hidden_size, extra, eplb_stats_num_experts)

    @property
    def workspace(self) -> Tensor:
        """uint8 [ep_size, workspace_size_per_rank], all rows this rank's own. Memory is taken when it is first read,
        and after a dispatch its counters and tables are written each time, for those who look.
        """
        tensor = self._behind.tensor
        if self._sent is not None:
            tables.write(self._behind, self._sent)
        return tensor

    @property
    def eplb_gathered_stats(self) -> Tensor | None:
        """int32 [ep_size, eplb_stats_num_experts] of the last dispatch, until its combine."""
        return None if self._sent is None else self._sent.received.stats

    @exclusive
    def dispatch(
        self,
        token_selected_experts: Tensor,
        input_payloads: Sequence[Tensor],
        runtime_max_tokens_per_rank: int,
        invalid_token_expert_id: int | None = None,
        expert_id_payload_index: int | None = None,
        eplb_local_stats: Tensor | None = None,
        active_rank_mask: Tensor | None = None,
        enable_pdl: bool | None = None,
        *,
        output_payload_layouts: Sequence[Any] | None = None,
    ) -> list[Tensor]:
        """Sends each token's payloads once to every rank that holds one of its experts.

        Args:
            invalid_token_expert_id: what slots of payload `expert_id_payload_index` (int32) hold that nothing came for;
                None: they are left as they are.
            The others as `moe_a2a_dispatch`.

        Returns:
            For each payload [ep_size, runtime_max_tokens_per_rank, n], as `moe_a2a_dispatch`.

        Raises:
            CallError: arguments that do not fit, or the last dispatch has had no combine; nothing was launched.
        """
        if output_payload_layouts is not None:
            raise NotImplementedError("moegen.compat.flashinfer has no output_payload_layouts: payloads are linear")
        if self._phase != "idle":
            raise CallError(self._told("dispatch called twice without combine: call combine first"))
        ids = token_selected_experts
        sent = self._behind.dispatch(
            Routed(self.num_experts, self.top_k),
            ids,
            input_payloads,
            runtime_max_tokens_per_rank,
            hidden=self._hidden,
            unused_ids=checks.expert_id_payload(expert_id_payload_index, invalid_token_expert_id, input_payloads),
            stats=checks.eplb_stats(eplb_local_stats, self.eplb_stats_num_experts),
            active_ranks=self._mask(active_rank_mask),
            timeout=self.timeout,
        )
        self._sent, self._phase = sent, "dispatched"
        return list(sent.received.payloads)

    @exclusive
    def combine(
        self,
        payload: Tensor,
        runtime_max_tokens_per_rank: int,
        payload_in_workspace: bool = False,
        output_dtype: torch.dtype | None = None,
        output_scales: Tensor | None = None,
        output_scalar_scale: float = 1.0,
        sf_layout: Any = None,
        output: Tensor | None = None,
        *,
        use_low_precision: bool = False,
        active_rank_mask: Tensor | None = None,
        enable_pdl: bool | None = None,
    ) -> Tensor:
        """Brings rows back to their tokens' owners, who add them; arguments and result as `moe_a2a_combine`.

        Raises:
            CallError: arguments that do not fit, or there was no dispatch; nothing was launched.
            NotImplementedError: quantised results.
        """
        sent = self._dispatched("combine")
        checks.output_dtype(output_dtype, output_scales)
        self._check_slots(sent, runtime_max_tokens_per_rank)
        combined = self._behind.combine(
            sent,
            payload,
            in_workspace=payload_in_workspace,
            output_dtype=output_dtype,
            output=output,
            low_precision=use_low_precision,
            active_ranks=self._mask(active_rank_mask),
            timeout=self.timeout,
        )
        self._sent, self._phase = None, "idle"
        return combined

    @exclusive
    def get_combine_payload_tensor_in_workspace(
        self, runtime_max_tokens_per_rank: int, hidden_size: int, dtype: torch.dtype
    ) -> Tensor:
        """[ep_size, runtime_max_tokens_per_rank, hidden_size]: rows into which experts may write, for a combine with
        payload_in_workspace=True.

        Raises:
            CallError: there was no dispatch, or the workspace is too small.
        """
        sent = self._dispatched("get_combine_payload_tensor_in_workspace")
        self._check_slots(sent, runtime_max_tokens_per_rank)
        return self._behind.combine_rows(sent, runtime_max_tokens_per_rank, hidden_size, dtype)

    @exclusive
    def destroy(self) -> None:
        """Not FlashInfer's: gives the memory of the workspace back, also for objects that share it. Not collective."""
        if self._WORKSPACE_CACHE.get(self._key) is self._behind:
            del self._WORKSPACE_CACHE[self._key]
        self._behind.destroy()
        self._sent, self._phase = None, "deleted"

    def _reset_workspace(self) -> None:
        """FlashInfer's name for `destroy`."""
        self.destroy()

    def checkpoint_prepare(self) -> NoReturn:
        raise NotImplementedError("moegen.compat.flashinfer has no checkpoint_prepare: memory cannot be unmapped")

    def checkpoint_restore(self, comm_backend: Any) -> NoReturn:
        raise NotImplementedError("moegen.compat.flashinfer has no checkpoint_restore: memory cannot be unmapped")

    def _mask(self, mask: Tensor | None) -> int | None:
        return checks.mask_bits(mask, self.enable_rank_mask, self.ep_rank, self.ep_size)

    def _dispatched(self, call: str) -> Sent:
        if self._sent is None:
            raise CallError(self._told(f"{call} called before successful dispatch: call dispatch first"))
        return self._sent

    def _told(self, what: str) -> str:
        return "this MoeAlltoAll was destroyed; make a new one" if self._phase == "deleted" else what

    def _check_slots(self, sent: Sent, slots: int) -> None:
        checks.runtime_max(slots, self.max_num_tokens)
        if slots != sent.slots:
            raise CallError(f"the dispatch had runtime_max_tokens_per_rank={sent.slots}; got {slots}: give the same")
