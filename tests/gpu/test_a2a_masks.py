# SPDX-License-Identifier: Apache-2.0
"""`OneSided` when ranks take no part, on this device."""

from support.a2a_mask_cases import *  # noqa: F403
