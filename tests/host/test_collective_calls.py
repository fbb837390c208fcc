# SPDX-License-Identifier: Apache-2.0
"""What calls can do, on path collective: cases of path ipc, all but what only that has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.functional_cases import (  # noqa: F401
    test_a_rank_without_rows_keeps_in_step,
    test_gradients_are_those_of_the_dense_layer,
    test_rows_that_nothing_came_for,
)
from support.ht_call_cases import *  # noqa: F403
from support.ht_cases import layers  # noqa: F401
from support.mode_cases import (  # noqa: F401
    test_async_finish,
    test_few_blocks_have_several_roles,
    test_fp8_then_combine,
    test_handles_that_nothing_was_dispatched_into,
    test_hooks_need_slots,
    test_nothing_is_allocated_with_out,
    test_one_hook_too_many,
    test_two_micro_batches_100,
)
from support.row_call_cases import *  # noqa: F403


@pytest.fixture(scope="module", autouse=True)
def no_peer_access() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEGEN_PEER_ACCESS", "0")
        yield
