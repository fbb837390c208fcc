# SPDX-License-Identifier: Apache-2.0
"""moegen: expert-parallel dispatch and combine, rendered and compiled for exactly one shape.

Importing it does no work: names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from moegen.high_throughput.api import HighThroughput as HighThroughput
    from moegen.high_throughput.results import DispatchedRows as DispatchedRows
    from moegen.high_throughput.results import RowsHandle as RowsHandle
    from moegen.low_latency.api import ExpertParallel as ExpertParallel
    from moegen.low_latency.results import Dispatched as Dispatched
    from moegen.low_latency.results import Handle as Handle
    from moegen.one_sided.api import OneSided as OneSided
    from moegen.one_sided.results import DispatchedPayloads as DispatchedPayloads
    from moegen.one_sided.results import PayloadsHandle as PayloadsHandle
    from moegen.one_sided.results import Quantised as Quantised
    from moegen.runtime.worlds import GroupWorld as GroupWorld
    from moegen.runtime.worlds import LocalWorld as LocalWorld

_HOMES = {
    "ExpertParallel": "moegen.low_latency.api",
    "Dispatched": "moegen.low_latency.results",
    "Handle": "moegen.low_latency.results",
    "HighThroughput": "moegen.high_throughput.api",
    "OneSided": "moegen.one_sided.api",
    "DispatchedPayloads": "moegen.one_sided.results",
    "PayloadsHandle": "moegen.one_sided.results",
    "Quantised": "moegen.one_sided.results",
    "DispatchedRows": "moegen.high_throughput.results",
    "RowsHandle": "moegen.high_throughput.results",
    "LocalWorld": "moegen.runtime.worlds",
    "GroupWorld": "moegen.runtime.worlds",
    "errors": "moegen.errors",
    "functional": "moegen.functional",
    "reference": "moegen.reference",
}

__all__ = [
    "Dispatched",
    "DispatchedPayloads",
    "DispatchedRows",
    "ExpertParallel",
    "GroupWorld",
    "Handle",
    "HighThroughput",
    "LocalWorld",
    "OneSided",
    "PayloadsHandle",
    "Quantised",
    "RowsHandle",
    "errors",
    "functional",
    "reference",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'moegen' has no attribute {name!r}")
    module = importlib.import_module(home)
    value = module if home == f"moegen.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
