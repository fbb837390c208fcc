# SPDX-License-Identifier: Apache-2.0
"""Path collective of `HighThroughput` between virtual ranks of this device."""

from support.collective_rows_cases import *  # noqa: F403
