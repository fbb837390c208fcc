# SPDX-License-Identifier: Apache-2.0
"""Ranks that are missing, on this device."""

from support.mask_call_cases import *  # noqa: F403
from support.mask_cases import *  # noqa: F403
from support.mask_life_cases import *  # noqa: F403
from support.mask_word_cases import *  # noqa: F403
