# SPDX-License-Identifier: Apache-2.0
"""Views that dispatch of `OneSided` returns, on this device."""

from support.a2a_view_cases import *  # noqa: F403
