# SPDX-License-Identifier: Apache-2.0
"""`HighThroughput` on this device: the cases that all devices share."""

from support.ht_cases import *  # noqa: F403
