# SPDX-License-Identifier: Apache-2.0
"""`HighThroughput`'s layout, streams and capacity on this device."""

from support.row_call_cases import *  # noqa: F403
