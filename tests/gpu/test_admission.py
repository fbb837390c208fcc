# SPDX-License-Identifier: Apache-2.0
"""Which tensors calls take, on this device."""

from support.admission_cases import *  # noqa: F403
