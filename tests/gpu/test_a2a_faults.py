# SPDX-License-Identifier: Apache-2.0
"""A fault at every wait site of `OneSided`, on this device."""

from support.a2a_fault_cases import *  # noqa: F403
