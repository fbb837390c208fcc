# SPDX-License-Identifier: Apache-2.0
"""Gradients of dispatch and combine on this device."""

from support.functional_call_cases import *  # noqa: F403
from support.functional_cases import *  # noqa: F403
