# SPDX-License-Identifier: Apache-2.0
"""The command `moegen`: a table of verbs, each a module that is loaded when it is needed."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer
import typer.core
import typer.main

from moegen import env
from moegen.errors import MoegenError

VERBS = {
    "build": "moegen.cli.build",
    "generate": "moegen.cli.generate",
    "list": "moegen.cli.list_kernels",
    "show": "moegen.cli.show",
    "cache": "moegen.cli.cache",
    "doctor": "moegen.cli.doctor",
    "bench": "moegen.cli.bench",
    "demo": "moegen.cli.demo",
}
"""Verb -> module with a `typer.Typer` named `app`. Such a module imports typer at its top and the rest inside its
functions: `moegen --help` loads them all."""


class Verbs(typer.core.TyperGroup):
    """A group whose commands are the table's."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        command = typer.main.get_command(importlib.import_module(VERBS[cmd_name]).app)
        command.name = cmd_name
        return command


app = typer.Typer(cls=Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Mixture-of-Experts dispatch and combine: kernels rendered, compiled, cached."""


def main() -> None:
    """Runs the command line; an error that moegen raises on purpose is one message and status 1."""
    try:
        env.configure_logging()
        app()
    except MoegenError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
