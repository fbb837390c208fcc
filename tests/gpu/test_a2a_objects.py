# SPDX-License-Identifier: Apache-2.0
"""Objects of `OneSided` on this device: many of them, and at the far ends of the domain."""

from support.a2a_object_cases import *  # noqa: F403
