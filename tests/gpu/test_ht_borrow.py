# SPDX-License-Identifier: Apache-2.0
"""Borrowed rows on this device."""

from support.ht_borrow_cases import *  # noqa: F403
