# SPDX-License-Identifier: Apache-2.0
"""placeholder"""

from __future__ import annotations

from moegen.codegen.render import Source
from moegen.compile.nvrtc import Compiled
from moegen.compile.recipe import Recipe
from moegen.compile.target import Target
from moegen.errors import UnsupportedPlatformError


def headers(source: Source) -> tuple[tuple[str, bytes], ...]:
    raise UnsupportedPlatformError("host target: not yet")


def recipe(source: Source, target: Target) -> Recipe:
    raise UnsupportedPlatformError("host target: not yet")


def compile(recipe: Recipe) -> Compiled:
    raise UnsupportedPlatformError("host target: not yet")


def identity() -> str:
    raise UnsupportedPlatformError("host target: not yet")


def runtime_source() -> Source:
    raise UnsupportedPlatformError("host target: not yet")
