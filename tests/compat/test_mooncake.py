# SPDX-License-Identifier: Apache-2.0
"""Mooncake EP's calls on this device."""

from support.mooncake_cases import *  # noqa: F403
