# SPDX-License-Identifier: Apache-2.0
"""Handles whose memory was overwritten, on this device."""

from support.handle_bounds_cases import *  # noqa: F403
