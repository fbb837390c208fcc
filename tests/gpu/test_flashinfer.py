# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's one-sided calls on this device."""

from support.flashinfer_cases import *  # noqa: F403
