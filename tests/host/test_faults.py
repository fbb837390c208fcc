# SPDX-License-Identifier: Apache-2.0
"""A fault at every wait site, on this device."""

from support.fault_cases import *  # noqa: F403
