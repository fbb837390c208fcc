# SPDX-License-Identifier: Apache-2.0
"""`HighThroughput` again and again, on this device."""

from support.ht_cases import one_thread_per_rank  # noqa: F401
from support.ht_soak_cases import *  # noqa: F403
