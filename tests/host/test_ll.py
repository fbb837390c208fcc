# SPDX-License-Identifier: Apache-2.0
"""Family `ll` on this device: the cases that all devices share."""

from support.ll_cases import *  # noqa: F403
