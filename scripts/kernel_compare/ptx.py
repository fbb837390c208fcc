# SPDX-License-Identifier: Apache-2.0
"""PTX without where the members of a kernel's parameter struct lie.

`places` gives a text in which each parameter that is loaded is called by its C name, in which the struct has no size,
and in which registers and labels are numbered as they come. `reads` leaves out also where and how parameters are
loaded: each use of a loaded register is the parameter's name. (A struct whose members move lets the compiler load other
pairs of them at once; parameters do not change while a kernel runs, so that is the same program.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kernel_compare.cubin import plain
from kernel_compare.ptx_pointers import LOAD, REGISTER, STEP, STRUCT, Function, Pointer, find_pointers, split, written

_NUMBERED = re.compile(r"%(?P<kind>rd|rs|rq|r|fd|f|p|b)\d+\b|\$L_\w+")
_ADDRESS = re.compile(r"\[([^\]]+)\]")
_DECLARED = re.compile(r"\.param \.align \d+ \.b8 \*_param_0\[\d+\]")
_RESIZED = re.compile(r"cvt\.(?:u64\.u32|u32\.u64) (%rd?\d+), (<[^<>]*: [bu]32>);")
_EQUALS = re.compile(r"setp\.(eq|ne)\.s64 (%p\d+), (<[^<>]*: [bu]32>), (\d+);")
_READ_IN_PART = '.pragma "used_bytes_mask'


@dataclass(frozen=True)
class Member:
    """One of a parameter struct: where it lies, and its bytes, those of all elements."""

    name: str
    offset: int
    size: int


def places(text: str, symbol: str, members: Sequence[Member]) -> list[str]:
    """The lines of a PTX, with parameters by name."""
    functions = list(_functions(text, symbol))
    find_pointers(functions)
    return [line for function in functions for line in _numbered(_named(function.lines, function.pointers, members))]


def reads(text: str, symbol: str, members: Sequence[Member]) -> list[str]:
    """The same, with each loaded parameter put where it is used."""
    functions = list(_functions(text, symbol))
    facts = find_pointers(functions)
    lines = []
    for function in functions:
        given = {where for where in facts if where.startswith(f"{function.name}_param_")}
        lines += _numbered(_named(_folded(function, given, members), function.pointers, members))
    return lines


def _functions(text: str, symbol: str) -> Iterator[Function]:
    """Lines up to each function's end, without comments and without how many registers there are."""
    lines: list[str] = []
    for raw in text.splitlines():
        line = " ".join(plain(raw.partition("//")[0], symbol).split())
        if line and not line.startswith(".reg "):
            lines.append(line)
        if raw.startswith("}"):
            yield Function(lines)
            lines = []
    yield Function(lines)


def _named(lines: Sequence[str], pointers: dict[str, Pointer], members: Sequence[Member]) -> list[str]:
    def address(found: re.Match[str]) -> str:
        base, _, _ = found[1].partition("+")
        if base != STRUCT and base not in pointers:
            return found[0]
        start = 0 if base == STRUCT else pointers[base].offset
        return f"[{base} <{_name(start + split(found[1])[1], members)}>]"

    return [_DECLARED.sub(STRUCT, _ADDRESS.sub(address, _step(line, pointers, members))) for line in lines]


def _step(line: str, pointers: dict[str, Pointer], members: Sequence[Member]) -> str:
    """An instruction, with the name of what it comes to if it adds a number to an address in the struct."""
    step = STEP.fullmatch(line)
    if step is None or not re.fullmatch(r"-?\d+", step[3] or ""):
        return line
    to = pointers.get(step[1])
    if to is None or not to.steady or step[2] not in pointers:
        return line
    return line.replace(f", {step[3]};", f", <{_name(to.offset, members)}>;")


def _name(offset: int, members: Sequence[Member]) -> str:
    for member in members:
        within = offset - member.offset
        if 0 <= within < member.size:
            return f"{member.name}+{within}" if within else member.name
    return f"beyond+{offset}"


def _folded(function: Function, given: set[str], members: Sequence[Member]) -> list[str]:
    """Without the loads of parameters and what makes their addresses. A register that is written in several places gets
    its values where it did.
    """
    counts = Counter(register for line in function.lines for register in written(line))
    exact = {register for register, pointer in function.pointers.items() if pointer.exact}
    held = {register: f"<at {_name(function.pointers[register].offset, members)}>" for register in exact}
    kept = []
    for line in function.lines:
        if line.startswith(_READ_IN_PART) or (exact & set(written(line))):
            continue
        loaded = dict(_loaded(line, function.pointers, members))
        kept += [f"mov {register}, {value};" for register, value in loaded.items() if counts[register] > 1]
        held |= {register: value for register, value in loaded.items() if counts[register] == 1}
        if not loaded:
            kept.append(line)
    lines = [_put(line, held) for line in kept]
    while resized := _resized(lines, counts):
        lines = [_put(line, resized) for line in lines if not (resized.keys() & set(written(line)))]
    return [_EQUALS.sub(r"setp.\1.s32 \2, \3, \4;", line) for line in lines]


def _resized(lines: list[str], counts: Counter[str]) -> dict[str, str]:
    """Registers that hold a parameter of 32 bits in 64, or the reverse; loads may do that too."""
    return {match[1]: match[2] for line in lines if (match := _RESIZED.fullmatch(line)) and counts[match[1]] == 1}


def _loaded(line: str, pointers: dict[str, Pointer], members: Sequence[Member]) -> Iterator[tuple[str, str]]:
    """(register, parameter) of each that an instruction loads."""
    load = LOAD.fullmatch(line)
    if load is None:
        return
    base, offset = split(load["at"])
    pointer = Pointer(0) if base == STRUCT else pointers.get(base)
    if pointer is None or not pointer.exact:
        return
    for lane, register in enumerate(REGISTER.findall(load["to"])):
        where = pointer.offset + offset + lane * int(load["bits"]) // 8
        yield register, f"<{_name(where, members)}: {load['kind']}{load['bits']}>"


def _put(line: str, held: dict[str, str]) -> str:
    return REGISTER.sub(lambda found: held.get(found[0], found[0]), line)


def _numbered(lines: list[str]) -> list[str]:
    """Registers of each class, and labels, in the order in which they come."""
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()

    def named(found: re.Match[str]) -> str:
        word = found[0]
        if word not in names:
            kind = found["kind"] or "L"
            counts[kind] += 1
            names[word] = f"%{kind}:{counts[kind]}"
        return names[word]

    return [_NUMBERED.sub(named, line) for line in lines]
