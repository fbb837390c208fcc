# SPDX-License-Identifier: Apache-2.0
"""Bad input to `OneSided`, on this device."""

from support.a2a_input_cases import *  # noqa: F403
