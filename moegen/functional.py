# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine of layouts `token` and `packed` as operators of torch, with gradients."""

from __future__ import annotations

from moegen.high_throughput.functional import Handle, Routed, combine, dispatch

__all__ = ["Handle", "Routed", "combine", "dispatch"]
