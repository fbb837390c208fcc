# SPDX-License-Identifier: Apache-2.0
"""`Spec`: the exact configuration that one kernel is rendered for, and the one place where its name is made.

The stem of a kernel is its family, its op and the Spec's tagged fields in order:
`ll_dispatch_bf16_expert_r8_h7168_k8_e256_ipc_w1x32_inline_whole`. File, symbol, cache folder, profiler range and error
text show that word. `Spec.parse(stem)` gives the Spec back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, cast

from moegen.errors import SpecError
from moegen.kernels.integers import settle_integers

SCHEMA = 2
"""Number of the naming scheme and of the kernels' parameter structs; caches and packs carry it."""

DTYPE_BYTES = {"bf16": 2, "fp8": 1, "fp8pow2": 1, "fp8ue8m0": 1}
MAX_RANKS = 64
MAX_EXPERTS = 1024
MAX_TOPK = 32
MAX_ROW_BYTES = 64 * 1024
WARP_SIZE = 32
MAX_BLOCK_WARPS = 32


@dataclass(frozen=True)
class WarpGroups:
    """`groups` teams of `warps` warps in a block; a team moves one row at a time."""

    groups: int
    warps: int

    def __post_init__(self) -> None:
        settle_integers(self, SpecError, "warp groups: ")

    def __str__(self) -> str:
        return f"{self.groups}x{self.warps}"

    @staticmethod
    def parse(text: str) -> WarpGroups:
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if match is None:
            raise SpecError(f"warp groups are written GROUPSxWARPS, e.g. 1x32; got {text!r}")
        return WarpGroups(int(match[1]), int(match[2]))


PARSED: dict[str, Callable[[str], object]] = {"WarpGroups": WarpGroups.parse}
"""Types of fields that are neither numbers nor words, and how their text is read."""


def tag(prefix: str = "", *, one_of: tuple[str, ...] = ()) -> Any:
    """Declares a Spec field that is part of the stem, written as `prefix` + value; words name their allowed values."""
    return field(metadata={"prefix": prefix, "one_of": one_of, "unsaid": False})


def rare(usual: str, *others: str) -> Any:
    """Declares a Spec field of one of these words, of which the usual one is not said: kernels keep their stems and
    texts when such a field is added.
    """
    return field(default=usual, kw_only=True, metadata={"prefix": "", "one_of": (usual, *others), "unsaid": True})


@dataclass(frozen=True)
class Spec:
    """Base of all kernel configurations. Subclasses are frozen dataclasses whose fields are all `tag()`s."""

    family: ClassVar[str] = ""
    op: ClassVar[str] = ""
    registry: ClassVar[dict[tuple[str, str], type[Spec]]] = {}

    def __init_subclass__(cls, *, family: str = "", op: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if family:
            cls.family, cls.op = family, op
            Spec.registry[(family, op)] = cls

    def __post_init__(self) -> None:
        settle_integers(self, SpecError, f"{self.family}_{self.op}: ")
        for f in fields(self):
            allowed = f.metadata["one_of"]
            value = getattr(self, f.name)
            if allowed and value not in allowed:
                self.reject(f"{f.name} is one of {', '.join(allowed)}; got {value!r}")
        self.validate()

    def validate(self) -> None:
        """Raises SpecError for a configuration that cannot exist."""

    def reject(self, why: str) -> None:
        raise SpecError(f"{self.family}_{self.op}: {why}")

    def require(self, holds: bool, why: str) -> None:
        if not holds:
            self.reject(why)

    @classmethod
    def words(cls, name: str) -> tuple[str, ...]:
        """The words that a field may be."""
        return next(cast("tuple[str, ...]", f.metadata["one_of"]) for f in fields(cls) if f.name == name)

    @property
    def said(self) -> list[Any]:
        """The fields that the stem tells: all but those that have their usual value."""
        return [f for f in fields(self) if not (f.metadata["unsaid"] and getattr(self, f.name) == f.default)]

    @property
    def stem(self) -> str:
        words = [f"{f.metadata['prefix']}{getattr(self, f.name)}" for f in self.said]
        return "_".join([self.family, self.op, *words])

    @property
    def description(self) -> str:
        """The class and the fields that the stem tells."""
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in self.said)})"

    @property
    def symbol(self) -> str:
        return f"moegen_{self.stem}"

    @property
    def template(self) -> str:
        return f"{self.family}_{self.op}.cu.jinja"

    @property
    def block_threads(self) -> int:
        """Threads of one block."""
        raise NotImplementedError

    @property
    def dynamic_shared_bytes(self) -> int:
        """Shared memory of a block that the launch asks for, beside what the text declares."""
        return 0

    @staticmethod
    def parse(stem: str) -> Spec:
        """The Spec that a stem names.

        Raises:
            SpecError: the word is no stem, with what was expected at the place where it went wrong.
        """
        family, _, rest = stem.partition("_")
        op, _, rest = rest.partition("_")
        cls = Spec.registry.get((family, op))
        if cls is None:
            known = ", ".join(sorted("_".join(key) for key in Spec.registry))
            raise SpecError(f"{stem!r} starts with no known kernel; a stem starts with one of: {known}")
        words = rest.split("_")
        told = [f for f in fields(cls) if not f.metadata["unsaid"] or set(f.metadata["one_of"][1:]) & set(words)]
        if len(words) != len(told):
            names = ", ".join(f.name for f in told)
            raise SpecError(f"{stem!r} has {len(words)} fields after {family}_{op}; expected {len(told)}: {names}")
        spec = cls(**{f.name: _parse_field(stem, f, word) for f, word in zip(told, words, strict=True)})
        if spec.stem != stem:
            raise SpecError(f"{stem!r} is not the canonical spelling; did you mean {spec.stem!r}?")
        return spec


def _parse_field(stem: str, f: Any, word: str) -> object:
    prefix = cast(str, f.metadata["prefix"])
    if not word.startswith(prefix):
        raise SpecError(f"{stem!r}: expected {f.name} written {prefix}..., got {word!r}")
    text = word[len(prefix) :]
    parse = PARSED.get(f.type)
    if parse is not None:
        return parse(text)
    if f.type == "int":
        if not text.isdecimal():
            raise SpecError(f"{stem!r}: {f.name} is a number after {prefix!r}, got {word!r}")
        return int(text)
    return text
