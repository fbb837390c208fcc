# SPDX-License-Identifier: Apache-2.0
"""Arguments that must be equal on all ranks, on this device."""

from support.call_word_cases import *  # noqa: F403
