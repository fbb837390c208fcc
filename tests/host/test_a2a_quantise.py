# SPDX-License-Identifier: Apache-2.0
"""Quantised sums of `OneSided` on this device."""

from support.a2a_quantise_cases import *  # noqa: F403
