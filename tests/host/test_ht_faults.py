# SPDX-License-Identifier: Apache-2.0
"""A fault at every wait site of `HighThroughput`, on this device."""

from support.ht_fault_cases import *  # noqa: F403
