# SPDX-License-Identifier: Apache-2.0
"""All objects that the fuzz calls, in one process."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import torch

from support.fuzz_cases import Case, FaultError, Stage, run
from support.fuzz_compat import COMPAT
from support.fuzz_lives import Life, live
from support.fuzz_surfaces import CORE, Surface

SURFACES: dict[str, Surface] = {surface.name: surface for surface in (*CORE, *COMPAT)}


class Troupe:
    """Objects are made when a case first needs them. Kernels are compiled for those alone: what hostile arguments ask
    for is refused where it would need another.
    """

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._stages: dict[tuple[str, int], Stage] = {}

    def __call__(self, case: Case | Life | Callable[[Troupe], str]) -> str:
        if isinstance(case, Case):
            return self._case(case)
        return self._life(case) if isinstance(case, Life) else case(self)

    def _life(self, life: Life) -> str:
        os.environ["MOEGEN_JIT"] = "off"
        try:
            live(life, SURFACES)
        except FaultError as fault:
            return str(fault)
        except Exception:
            return f"the fuzz itself fails: {traceback.format_exc()}\n{life}"
        finally:
            os.environ["MOEGEN_JIT"] = "on"
        return ""

    def _case(self, case: Case) -> str:
        try:
            stage = self._stage(case.surface, case.ranks)
            others = [of.handles[-1][0][0] for of in self._stages.values() if of is not stage and of.handles]
            os.environ["MOEGEN_JIT"] = "off"
            again = run(stage, case, others)
        except FaultError as fault:
            self._forget(case)
            return str(fault)
        except Exception:
            self._forget(case)
            return f"the fuzz itself fails: {traceback.format_exc()}\n{case}"
        finally:
            os.environ["MOEGEN_JIT"] = "on"
        if again:
            self._forget(case)
        return ""

    def _stage(self, surface: str, ranks: int) -> Stage:
        if (surface, ranks) not in self._stages:
            self._stages[surface, ranks] = Stage.of(SURFACES[surface], ranks)
        return self._stages[surface, ranks]

    def _forget(self, case: Case) -> None:
        stage = self._stages.pop((case.surface, case.ranks), None)
        if stage is not None:
            stage.end()
