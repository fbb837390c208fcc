# SPDX-License-Identifier: Apache-2.0
"""Calls of `HighThroughput` with all that they take, on this device."""

from support.ht_call_cases import *  # noqa: F403
from support.ht_cases import layers, one_thread_per_rank  # noqa: F401
