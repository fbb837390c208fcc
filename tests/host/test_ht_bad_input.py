# SPDX-License-Identifier: Apache-2.0
"""Bad input to `HighThroughput`, on this device."""

from support.ht_input_cases import *  # noqa: F403
