# SPDX-License-Identifier: Apache-2.0
"""Family `ll`: FP8, hooks, streams and reused outputs on this device."""

from support.mode_cases import *  # noqa: F403
