# SPDX-License-Identifier: Apache-2.0
"""Path collective of `ExpertParallel` between virtual ranks of this device."""

from support.collective_experts_cases import *  # noqa: F403
