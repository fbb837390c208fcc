# SPDX-License-Identifier: Apache-2.0
"""moegen: expert-parallel dispatch and combine, rendered and compiled for exactly one shape.

Importing it does no work: names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from moegen.expert_parallel import ExpertParallel as ExpertParallel
    from moegen.handle import Dispatched as Dispatched
    from moegen.handle import Handle as Handle
    from moegen.high_throughput import HighThroughput as HighThroughput
    from moegen.one_sided import OneSided as OneSided
    from moegen.payloads import DispatchedPayloads as DispatchedPayloads
    from moegen.payloads import PayloadsHandle as PayloadsHandle
    from moegen.payloads import Quantised as Quantised
    from moegen.rows import DispatchedRows as DispatchedRows
    from moegen.rows import RowsHandle as RowsHandle
    from moegen.runtime.worlds import GroupWorld as GroupWorld
    from moegen.runtime.worlds import LocalWorld as LocalWorld

_HOMES = {
    "ExpertParallel": "moegen.expert_parallel",
    "Dispatched": "moegen.handle",
    "Handle": "moegen.handle",
    "HighThroughput": "moegen.high_throughput",
    "OneSided": "moegen.one_sided",
    "DispatchedPayloads": "moegen.payloads",
    "PayloadsHandle": "moegen.payloads",
    "Quantised": "moegen.payloads",
    "DispatchedRows": "moegen.rows",
    "RowsHandle": "moegen.rows",
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
