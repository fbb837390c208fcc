# SPDX-License-Identifier: Apache-2.0
"""`OneSided` back to back, on this device."""

from support.a2a_soak_cases import *  # noqa: F403
