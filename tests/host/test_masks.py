# SPDX-License-Identifier: Apache-2.0
"""Ranks that are missing, on this device."""

from support.mask_cases import *  # noqa: F403
