# SPDX-License-Identifier: Apache-2.0
"""Arguments that share memory, on this device."""

from support.aliasing_cases import *  # noqa: F403
