# SPDX-License-Identifier: Apache-2.0
"""Every environment variable that moegen reads, typed, in one table; `docs/environment.md` is written from it.

The variables are read when they are needed, not at import. A value that is not allowed raises `InputError`.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from moegen.errors import InputError


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes:
        name: as it stands in the environment.
        kind: what a value looks like, in words.
        default: the value that is used when it is unset or empty, in words.
        meaning: what it does.
        one_of: the words that are allowed, if it is a choice.
    """

    name: str
    kind: str
    default: str
    meaning: str
    one_of: tuple[str, ...] = ()


VARIABLES: dict[str, Variable] = {
    variable.name: variable
    for variable in (
        Variable(
            "MOEGEN_CACHE_DIR",
            "folder",
            "~/.cache/moegen ($XDG_CACHE_HOME/moegen if that is set)",
            "Where compiled kernels are kept. Its content is executed: it must be yours alone.",
        ),
        Variable(
            "MOEGEN_CACHE_TRUST",
            "0 or 1",
            "0",
            "1 takes the owner and permissions of the cache and of packs as they are, for a shared read-only one.",
            ("0", "1"),
        ),
        Variable(
            "MOEGEN_PACK",
            f"files, separated by {os.pathsep!r}",
            "none",
            "Packs made by `moegen build --out`, asked in order before the cache. A pack is code: it must be yours.",
        ),
        Variable(
            "MOEGEN_JIT",
            "on or off",
            "on",
            "off forbids compiling: a kernel that is in no pack and not in the cache raises MissingKernelError.",
            ("on", "off"),
        ),
        Variable("MOEGEN_CXX", "program", "c++, else g++, else clang++", "The C++20 compiler of the host target."),
        Variable(
            "MOEGEN_NVRTC_LINEINFO",
            "0 or 1",
            "0",
            "1 compiles with line numbers for profilers and compute-sanitizer; such kernels have their own cache key.",
            ("0", "1"),
        ),
        Variable(
            "MOEGEN_HOST_SEED",
            "an integer",
            "0",
            "Host target: other than 0, threads run in a seeded random order, with pauses before signals.",
        ),
        Variable(
            "MOEGEN_REPLACE_DEEP_EP",
            "0 or 1",
            "0",
            "1 puts moegen.compat.deep_ep in the place of `deep_ep` when vLLM or SGLang load their plugins.",
            ("0", "1"),
        ),
        Variable(
            "MOEGEN_REPLACE_MOONCAKE_EP",
            "0 or 1",
            "0",
            "1 puts moegen.compat.mooncake in the place of `mooncake.mooncake_ep_buffer`, likewise.",
            ("0", "1"),
        ),
        Variable(
            "MOONCAKE_EP_USE_TORCH_ALLTOALL",
            "1, ON, TRUE or YES",
            "no",
            "Mooncake's own switch: moegen.compat.mooncake exchanges by torch.distributed. Other values mean no.",
        ),
        Variable(
            "MOEGEN_PEER_ACCESS",
            "0 or 1",
            "1",
            "0 takes other ranks' memory for one that cannot be mapped: path auto then takes collectives.",
            ("0", "1"),
        ),
        Variable(
            "MOEGEN_LOG",
            "debug, info, warning or error",
            "warning",
            "The level of the command line's log, on stderr. A library user configures the logger `moegen` instead.",
            ("debug", "info", "warning", "error"),
        ),
    )
}


def raw(name: str) -> str:
    """The value of a variable of the table, checked against its allowed words; "" if it is unset.

    Raises:
        InputError: the value is not allowed.
    """
    variable = VARIABLES[name]
    value = os.environ.get(name, "").strip()
    if value and variable.one_of and value not in variable.one_of:
        raise InputError(f"{name}={value!r} is not allowed; use one of: {', '.join(variable.one_of)}")
    return value


def cache_dir() -> Path:
    """The root of the kernel cache."""
    value = raw("MOEGEN_CACHE_DIR")
    if value:
        return Path(value).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules say that a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "moegen"


def cache_trust() -> bool:
    """Whether the owner and permissions of cache and packs are taken as they are."""
    return raw("MOEGEN_CACHE_TRUST") == "1"


def replace_deep_ep() -> bool:
    """Whether frameworks get moegen where they import `deep_ep`."""
    return raw("MOEGEN_REPLACE_DEEP_EP") == "1"


def replace_mooncake_ep() -> bool:
    """Whether frameworks get moegen where they import `mooncake.mooncake_ep_buffer`."""
    return raw("MOEGEN_REPLACE_MOONCAKE_EP") == "1"


def mooncake_uses_alltoall() -> bool:
    """Whether `moegen.compat.mooncake` takes path collective."""
    return raw("MOONCAKE_EP_USE_TORCH_ALLTOALL").upper() in ("1", "ON", "TRUE", "YES")


def packs() -> tuple[Path, ...]:
    """The packs to look into, in order."""
    return tuple(Path(part).expanduser().absolute() for part in raw("MOEGEN_PACK").split(os.pathsep) if part)


def jit() -> bool:
    """Whether kernels may be compiled when they are needed."""
    return raw("MOEGEN_JIT") != "off"


def cxx() -> str:
    """The C++ compiler that was asked for, or ""."""
    return raw("MOEGEN_CXX")


def lineinfo() -> bool:
    """Whether GPU kernels carry line numbers."""
    return raw("MOEGEN_NVRTC_LINEINFO") == "1"


def peer_access() -> bool:
    """Whether other ranks' memory may be mapped."""
    return raw("MOEGEN_PEER_ACCESS") != "0"


def configure_logging() -> None:
    """Sends what the command line and the processes that it starts log to stderr, from MOEGEN_LOG's level on."""
    level = (raw("MOEGEN_LOG") or "warning").upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def host_seed() -> int:
    """The seed of the host target's scheduler; 0 for a fixed order.

    Raises:
        InputError: it is no integer.
    """
    value = raw("MOEGEN_HOST_SEED") or "0"
    if not value.isdecimal():
        raise InputError(f"MOEGEN_HOST_SEED is an integer, 0 or more; got {value!r}")
    return int(value)


def markdown() -> str:
    """The table as Markdown: the text of docs/environment.md."""
    rows = [f"| `{v.name}` | {v.kind} | {v.default} | {v.meaning} |" for v in VARIABLES.values()]
    head = ["# Environment variables", "", "| variable | value | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])
