# SPDX-License-Identifier: Apache-2.0
"""Path collective of `OneSided` between virtual ranks of this device."""

from support.collective_cases import *  # noqa: F403
