# SPDX-License-Identifier: Apache-2.0
"""Faults that the fuzz has to find, and cannot: moegen has none of them. They run in its process in place of a case."""

from __future__ import annotations

import os
import time

import moegen
from support.fuzz_cases import Case
from support.fuzz_troupe import Troupe


def crash(_: Troupe) -> str:
    os.abort()


def hang(_: Troupe) -> str:
    time.sleep(60)
    return ""


def err(troupe: Troupe) -> str:
    right = moegen.ExpertParallel.combine
    assert troupe(Case("experts-ipc", 1, seed=1)) == ""
    moegen.ExpertParallel.combine = lambda *given, **named: right(*given, **named).mul_(1.125)  # type: ignore[method-assign,assignment]
    try:
        return troupe(Case("experts-ipc", 1, seed=1))
    finally:
        moegen.ExpertParallel.combine = right  # type: ignore[method-assign,assignment]
