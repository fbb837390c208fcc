# SPDX-License-Identifier: Apache-2.0
"""The part of what users hold that says how long the stages of its calls take."""

from __future__ import annotations

from typing import Any

from moegen.errors import InputError
from moegen.runtime.stages import Stages


class Staged:
    """Of objects whose calls may have stages: launches with all-to-alls of torch.distributed in between."""

    def _alive(self) -> Any:
        raise NotImplementedError

    def time_stages(self, on: bool = True) -> None:
        """Has this rank note from now on when the stages of its calls begin and end, or stop that. On a GPU these are
        events on the stream of the call, which cost the host a few microseconds each; calls that are captured are not
        noted.

        Raises:
            InputError: the object's path is not "collective".
        """
        self._stages().on = on

    def stage_seconds(self) -> dict[str, list[float]]:
        """Seconds of every stage noted since this was last asked, in the order of the calls. Waits for the noted
        events, not for the device.

        Returns:
            By name: "dispatch_pack" (rows to where they are sent from), "dispatch_collective", "dispatch_compact"
            (headers read; exact: rows to where the user reads them), "combine_collective", "combine_reduce" (sums).
            Exact calls also have "dispatch_counts" (counted, exchanged, and the host's wait for them) and
            "combine_pack"; padded ones send `y` as it lies. Layouts `token`, `packed` and `expert` have "_pack",
            "_collective" and "_compact" of "dispatch", of "plan" (what mode "exact" exchanges first) and of "weights"
            (given to combine), and "combine_pack". What was not noted has no name.

        Raises:
            InputError: as `time_stages`.
        """
        return self._stages().seconds()

    def _stages(self) -> Stages:
        stages: Stages | None = getattr(self._alive(), "stages", None)
        if stages is None:
            raise InputError('a call has stages on path "collective"; this object\'s calls are single launches')
        return stages
