# SPDX-License-Identifier: Apache-2.0
"""DeepEP's normal mode on this device."""

from support.deep_ep_normal_cases import *  # noqa: F403
