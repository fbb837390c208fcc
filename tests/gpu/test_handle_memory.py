# SPDX-License-Identifier: Apache-2.0
"""Handles from slices of larger tensors, on this device."""

from support.handle_memory_cases import *  # noqa: F403
