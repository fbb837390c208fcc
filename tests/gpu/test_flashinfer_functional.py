# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's functional one-sided calls on this device."""

from support.flashinfer_functional_cases import *  # noqa: F403
