# SPDX-License-Identifier: Apache-2.0
"""Rules of every object that users hold, on this device."""

from support.object_cases import *  # noqa: F403
