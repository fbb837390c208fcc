# SPDX-License-Identifier: Apache-2.0
"""Which registers of a PTX hold addresses in the kernel's parameter struct, in the entry and in what it calls."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

STRUCT = "*_param_0"
"""The entry's parameter; a star stands for the entry's name."""

REGISTER = re.compile(r"%(?:rd|rs|rq|r|fd|f|p|b)\d+\b")
LOAD = re.compile(
    r"ld(?:\.param)?(?:\.v[24])?\.(?P<kind>[bsuf])(?P<bits>\d+) (?P<to>\{[^}]*\}|%\w+), \[(?P<at>[^\]]+)\];"
)
STEP = re.compile(r"(?:add\.[su]64|mov\.[bu]64|cvta(?:\.to)?\.param\.u64) (%rd\d+), ([^,;]+)(?:, ([^;]+))?;")
_WRITTEN = re.compile(r"(?:@!?%p\d+ )?[a-z][\w.:]* (\{[^}]*\}|%\w+(?:\|%\w+)?)")
_HEAD = re.compile(r"(?:\.\w+ )*\.(?:entry|func) (?:\([^)]*\) )?([\w$*]+) ?\(?")
_GIVEN = re.compile(r"st\.param\.[bu]64 \[(\w+)(?:\+(\d+))?\], (%rd\d+);")
_CALL = re.compile(r"call(?:\.uni)? (?:\([^)]*\), )?([\w$]+), \( ?([^)]*?) ?\);")


@dataclass(frozen=True)
class Pointer:
    """An address in the struct. `exact`: its offset is all there is; else something is added that is no constant."""

    offset: int
    exact: bool = True
    steady: bool = True
    """Whether all that is written to the register has that offset."""


Facts = dict[str, Pointer | None]
"""What functions are given where, as `name_param_0+8`; None: not always the same."""


@dataclass
class Function:
    """The lines of one, from its head on."""

    lines: list[str]
    name: str = ""
    pointers: dict[str, Pointer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        heads = [match[1] for line in self.lines if (match := _HEAD.match(line))]
        self.name = heads[-1] if heads else ""  # the ones before are declared only

    def find_pointers(self, facts: Mapping[str, Pointer | None]) -> None:
        writes: dict[str, list[str]] = {}
        for line in self.lines:
            for register in written(line):
                writes.setdefault(register, []).append(line)
        known: dict[str, Pointer] = {}
        while more := self._more(writes, known, facts):
            known.update(more)
        self.pointers = {register: found for register, found in known.items() if found.offset >= 0}

    def _more(
        self, writes: Mapping[str, list[str]], known: Mapping[str, Pointer], facts: Mapping[str, Pointer | None]
    ) -> dict[str, Pointer]:
        """What follows from what is known. A register with a write that is no address at all is none."""
        more = {}
        for register, lines in writes.items():
            values = [value_of(line, known, facts) for line in lines]
            found = [value for value in values if value is not None]
            if found and all(_may_be_address(line) for line in lines):
                made = _joined(found)
                if known.get(register) != made and (register not in known or known[register].steady):
                    more[register] = made
        return more

    def calls(self) -> Iterator[tuple[str, Pointer]]:
        """Addresses that are given to functions: where these find them, and what they are."""
        given: list[tuple[str, str, str]] = []
        lines = iter(self.lines)
        for line in lines:
            if line == "{":
                given = []
            elif (store := _GIVEN.fullmatch(line)) is not None:
                given.append((store[1], store[2] or "0", store[3]))
            elif line.startswith("call"):
                while not line.endswith(";"):
                    line += " " + next(lines)
                if (call := _CALL.fullmatch(line)) is not None:
                    places = {word.strip(): index for index, word in enumerate(call[2].split(","))}
                    for word, offset, register in given:
                        if register in self.pointers and word in places:
                            yield f"{call[1]}_param_{places[word]}+{offset}", self.pointers[register]


def find_pointers(functions: list[Function]) -> Facts:
    """Fills in every function's pointers; what the functions are given comes from their calls."""
    facts: Facts = {f"{STRUCT}+0": Pointer(0)}
    before = None
    while before != facts:
        before = dict(facts)
        for function in functions:
            function.find_pointers(facts)
        for where, pointer in [pair for function in functions for pair in function.calls()]:
            facts[where] = pointer if facts.get(where, pointer) == pointer else None
    return facts


def written(line: str) -> list[str]:
    """The registers that an instruction writes."""
    found = _WRITTEN.match(line)
    return REGISTER.findall(found[1]) if found else []


def split(address: str) -> tuple[str, int]:
    """Base and offset of what stands between brackets."""
    base, _, offset = address.partition("+")
    return base, int(offset or 0)


def value_of(line: str, known: Mapping[str, Pointer], facts: Mapping[str, Pointer | None]) -> Pointer | None:
    """The address that an instruction writes."""
    load = LOAD.fullmatch(line)
    if load is not None:
        base, offset = split(load["at"])
        return facts.get(f"{base}+{offset}") if base != STRUCT and load["bits"] == "64" else None
    step = STEP.fullmatch(line)
    if step is None:
        return None
    _, one, two = step.groups()
    if one == STRUCT and two is None:
        return Pointer(0)
    if one not in known and two in known:
        one, two = two, one
    if one not in known:
        return None
    pointer = known[one]
    if two is None:
        return pointer
    number = _number(two)
    return Pointer(pointer.offset, exact=False) if number is None else Pointer(pointer.offset + number, pointer.exact)


def _may_be_address(line: str) -> bool:
    load = LOAD.fullmatch(line)
    return STEP.fullmatch(line) is not None or (load is not None and "_param_" in load["at"])


def _joined(found: list[Pointer]) -> Pointer:
    if all(pointer == found[0] for pointer in found):
        return found[0]
    return Pointer(found[0].offset, exact=False, steady=False)


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text) else None
