# SPDX-License-Identifier: Apache-2.0
"""Kernels, right ones and ones with one order taken away, in one executable for a sanitizer.

Every kernel is an object of its own in which all but its entry is local: their helpers have one name and different
contents. Every rank then has a copy of the runtime and the kernels for itself: the runtime keeps its threads for later
launches, in one list behind one lock, and for a sanitizer that lock would order the ranks as no GPU does.
A driver includes `shape.hpp` and `variants.hpp`, which the families' *_kernels.py write.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from simt_harness import Toolchain, runtime_sources

from moegen.codegen.render import render
from moegen.kernels.params import ParamStruct
from moegen.kernels.spec import Spec

RANKS = 3
TOPK = 3
EXPERTS = 7  # no multiple of the ranks

JOBS = 2
FASTER = "-Og"
"""Compiling takes longer than running."""

KERNEL = ""
"""The file of an edit that is made in the kernel's text, and not in a header."""

PREFIX = "moegen_launch_"
WRAPPER = """#include "{name}.cu"
#include <moegen/entry.hpp>
MOEGEN_HOST_ENTRY_AS({entry}, {symbol}, Params);
"""


@dataclass(frozen=True)
class Edit:
    """The one place of a kernel's text, or of a header that it includes, that matches `pattern` becomes `new`."""

    file: str
    pattern: str
    new: str

    def applied(self, text: str) -> str:
        edited, places = re.subn(self.pattern, self.new, text, flags=re.DOTALL)
        if places != 1:
            raise ValueError(f"{self.pattern!r} matches {self.file or 'the kernel'} in {places} places; expected one")
        return edited


@dataclass(frozen=True)
class Kernel:
    """One object of the executable."""

    name: str
    spec: Spec
    edit: Edit | None = None

    @property
    def entry(self) -> str:
        return PREFIX + self.name

    @property
    def ranks(self) -> int:
        return int(getattr(self.spec, "num_ranks"))  # noqa: B009 - of every family here, not of every Spec


@dataclass(frozen=True)
class KernelSet:
    """Kernels that belong together; what the driver runs by name. A family's own has a field for each."""

    name: str

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if isinstance(value, Kernel))


AnySet = TypeVar("AnySet", bound=KernelSet)


def weakened(right: AnySet, op: str, name: str, edit: Edit) -> AnySet:
    """`right` with an edit in one of its kernels, that of field `op`."""
    kernel = Kernel(f"{op}_{name}", getattr(right, op).spec, edit)
    return replace(right, name=kernel.name, **{op: kernel})


def without(right: AnySet, op: str, *orders: Mapping[str, Edit]) -> list[AnySet]:
    """`right` without each of these orders in turn."""
    return [weakened(right, op, name, edit) for of_one_kind in orders for name, edit in of_one_kind.items()]


def kernels_of(sets: Sequence[KernelSet]) -> list[Kernel]:
    """Each kernel once."""
    return list({kernel.name: kernel for one in sets for kernel in one.kernels}.values())


# ---- what the driver includes ---------------------------------------------------------------------


def initialiser(values: Iterable[object]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"


def flag(holds: bool) -> str:
    return str(holds).lower()


def of_rank(symbol: str, rank: int) -> str:
    """The name that a symbol of a kernel has in one rank's copy."""
    return f"rank{rank}_{symbol}"


def entries_of(kernel: Kernel) -> str:
    """The kernel's entry for each rank, as an initialiser."""
    return initialiser(of_rank(kernel.entry, rank) for rank in range(kernel.ranks))


def params_bytes_of(kernel: Kernel) -> str:
    """The function that says how large the kernel's parameters are."""
    return f"{of_rank(kernel.entry, 0)}_params_bytes"


def shape_header(ranks: int = RANKS, **more: int) -> str:
    """`shape.hpp`: the one shape."""
    shape = {"kRanks": ranks, "kTopk": TOPK, "kExperts": EXPERTS, **more}
    return "".join(f"constexpr unsigned {name} = {value};\n" for name, value in shape.items())


def struct(name: str, params: ParamStruct) -> str:
    """A kernel's parameters, as the driver fills them in."""
    members = "".join(f"    {declaration}\n" for declaration, _ in params.declarations)
    return f"struct {name} {{\n{members}}};\nstatic_assert(sizeof({name}) == {params.size});\n"


def variants_header(structs: Sequence[str], kernels: Sequence[Kernel], rows: Sequence[str]) -> str:
    """`variants.hpp`: the parameter structs and the table of variants, each an initialiser."""
    entries = [of_rank(kernel.entry, rank) for kernel in kernels for rank in range(kernel.ranks)]
    return "".join(
        [
            *structs,
            *(f'extern "C" moegen_host_entry {entry};\n' for entry in entries),
            *(f'extern "C" unsigned long {entry}_params_bytes();\n' for entry in entries),
            "constexpr Variant kVariants[] = {\n",
            *(f"    {{{row}}},\n" for row in rows),
            "};\n",
        ]
    )


# ---- compiling ------------------------------------------------------------------------------------


def _merge(tools: Toolchain, parts: Sequence[Path], target: Path) -> Path:
    """One object of several, of whose symbols only the kernels' entries stay visible."""
    tools.run("-r", "-nostdlib", "-Wl,--force-group-allocation", *parts, "-o", target)
    subprocess.run(["objcopy", "--wildcard", f"--keep-global-symbol={PREFIX}*", target], check=True)
    return target


def _compile(kernel: Kernel, folder: Path, option: str) -> Path:
    """The kernel's object, made in a folder of its own from its own copy of the headers."""
    tools = Toolchain(folder, ["-g1"])
    text, edit = render(kernel.spec).text, kernel.edit
    if edit is not None and edit.file == KERNEL:
        text = edit.applied(text)
    elif edit is not None:
        copy = folder / "include" / edit.file
        copy.write_text(edit.applied(copy.read_text()))
    (folder / f"{kernel.name}.cu").write_text(text)
    wrapper = folder / f"{kernel.name}.cpp"
    wrapper.write_text(WRAPPER.format(name=kernel.name, entry=kernel.entry, symbol=kernel.spec.symbol))
    return _merge(tools, [tools.compile(wrapper, option, FASTER)], folder / "alone.o")


def _copy_for(rank: int, merged: Path, entries: Sequence[str]) -> Path:
    """The same code and, above all, other variables, for one rank."""
    names = merged.with_name(f"rank{rank}.txt")
    symbols = [name for entry in entries for name in (entry, f"{entry}_params_bytes")]
    names.write_text("".join(f"{symbol} {of_rank(symbol, rank)}\n" for symbol in symbols))
    target = merged.with_name(f"rank{rank}.o")
    subprocess.run(["objcopy", f"--redefine-syms={names}", merged, target], check=True)
    return target


def build_runtime(folder: Path, options: Sequence[str]) -> list[Path]:
    """The runtime's objects, which every executable for one sanitizer may have."""
    tools = Toolchain(folder, ["-g1"])
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(lambda source: tools.compile(source, *options, FASTER), runtime_sources()))


def build(
    folder: Path,
    driver: Path,
    headers: Mapping[str, str],
    kernels: Sequence[Kernel],
    runtime: Sequence[Path],
    option: str,
) -> Path:
    """An executable of the driver and, for each rank, the runtime and the kernels."""
    tools = Toolchain(folder, ["-g1"])
    for name, text in headers.items():
        (folder / "include" / name).write_text(text)
    with ThreadPoolExecutor(JOBS) as pool:
        main = pool.submit(tools.compile, driver, option, FASTER)
        jobs = [pool.submit(_compile, kernel, folder / kernel.name, option) for kernel in kernels]
        merged = _merge(tools, [*runtime, *(job.result() for job in jobs)], folder / "merged.o")
    ranks = [_copy_for(rank, merged, [kernel.entry for kernel in kernels]) for rank in range(kernels[0].ranks)]
    executable = folder / "driver"
    tools.run(option, main.result(), *ranks, "-o", executable)
    return executable
