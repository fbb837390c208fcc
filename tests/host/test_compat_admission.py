# SPDX-License-Identifier: Apache-2.0
"""Which tensors calls take, on this device."""

from support.compat_admission_cases import *  # noqa: F403
