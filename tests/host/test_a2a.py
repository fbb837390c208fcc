# SPDX-License-Identifier: Apache-2.0
"""`OneSided` on this device: the cases that all devices share."""

from support.a2a_cases import *  # noqa: F403
