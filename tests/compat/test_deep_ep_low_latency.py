# SPDX-License-Identifier: Apache-2.0
"""DeepEP's low-latency calls on this device."""

from support.deep_ep_cases import *  # noqa: F403
from support.deep_ep_table import test_every_mode  # noqa: F401
