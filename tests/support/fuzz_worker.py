# SPDX-License-Identifier: Apache-2.0
"""Cases of the fuzz run in a process of their own, so that a crash and a hang are answers too."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

from support import forked

SECONDS = 20.0
"""Of a case. The longest wait of an object is 2 s, and several calls may wait."""


class Worker:
    """Answers what is wrong with a case, or "". A process that a case has ended is followed by a new one."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="moegen-fuzz-")
        self._process: Any = None
        self._pipe: Any = None
        self.started = 0

    def __call__(self, case: Any, seconds: float = SECONDS) -> str:
        if self._process is None:
            self._start()
        log = Path(self._folder.name) / "stderr"
        try:
            self._pipe.send(case)
            if self._pipe.poll(seconds):
                return str(self._pipe.recv())
            os.kill(self._process.pid, signal.SIGUSR1)
            self._process.join(1)
            return f"no end in {seconds:.0f} s: {case}\n{self._ended()}{_tail(log)}"
        except (EOFError, ConnectionResetError, BrokenPipeError):
            self._process.join(5)
            return f"the process ended with {self._process.exitcode}: {case}\n{self._ended()}{_tail(log)}"

    def close(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.join(5)
            self._ended()
        self._folder.cleanup()

    def _start(self) -> None:
        ours, theirs = forked.context.Pipe()
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        self._process = forked.context.Process(target=_serve, args=(theirs, self._folder.name, environment))
        self._process.start()
        theirs.close()
        self._pipe = ours
        self.started += 1
        if not ours.poll(120):
            raise TimeoutError("the fuzz's objects were not made within 120 s")
        ours.recv()

    def _ended(self) -> str:
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self._process = None
        return ""


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-6000:]


def _serve(pipe: Any, folder: str, environment: dict[str, str]) -> None:
    forked.take_environment(environment)
    os.dup2(os.open(Path(folder) / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    warnings.simplefilter("ignore")
    from support.fuzz_troupe import Troupe

    troupe = Troupe()
    pipe.send("")
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            os._exit(0)  # nothing here is worth an orderly end
        pipe.send(troupe(case))
