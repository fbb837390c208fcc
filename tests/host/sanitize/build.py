# SPDX-License-Identifier: Apache-2.0
"""The low-latency kernels, right ones and ones with one order taken away, in one executable for a sanitizer.

Every kernel is an object of its own in which all but its entry is local: their helpers have one name and different
contents. Every rank then has a copy of the runtime and the kernels for itself: the runtime keeps its threads for later
launches, in one list behind one lock, and for a sanitizer that lock would order the ranks as no GPU does.
The driver includes `shape.hpp` and `variants.hpp`, which are written here.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from simt_harness import Toolchain, runtime_sources

from moegen.codegen.render import render
from moegen.kernels.ll import LowLatencyCombine, LowLatencyDispatch, LowLatencySpec, Regions, regions
from moegen.kernels.spec import WarpGroups

RANKS = 3
HIDDEN = 64
TOPK = 3
EXPERTS = 7  # no multiple of the ranks
MAX_TOKENS = 8
BLOCKS_PER_ROLE = 2

JOBS = 2

KERNEL = ""
LAUNCH = "moegen/launch.cuh"
SIGNAL = "moegen/signal.cuh"
"""What an edit is made in: the kernel's text or a header."""

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
    spec: LowLatencySpec
    edit: Edit | None = None

    @property
    def entry(self) -> str:
        return PREFIX + self.name


@dataclass(frozen=True)
class Variant:
    """A dispatch and a combine that belong together; what the driver runs by name."""

    name: str
    dispatch: Kernel
    combine: Kernel


def variant(wire: str, weights: str, groups: WarpGroups, peers: str = "required") -> Variant:
    """Unmodified kernels of one wire format."""
    common = ("bf16", "expert", RANKS, HIDDEN, TOPK, EXPERTS, "ipc", groups, wire, "whole")
    name = f"{wire}_{weights}_w{groups}_{peers}"
    dispatch = Kernel(f"dispatch_{name}", LowLatencyDispatch(*common, peers=peers))
    return Variant(name, dispatch, Kernel(f"combine_{name}", LowLatencyCombine(*common, weights, peers=peers)))


def weakened(right: Variant, op: str, name: str, edit: Edit) -> Variant:
    """`right` with an edit in one of its two kernels."""
    before = right.dispatch if op == "dispatch" else right.combine
    kernel = Kernel(f"{op}_{name}", before.spec, edit)
    if op == "dispatch":
        return Variant(kernel.name, kernel, right.combine)
    return Variant(kernel.name, right.dispatch, kernel)


# ---- what the driver includes ---------------------------------------------------------------------


def of_rank(symbol: str, rank: int) -> str:
    """The name that a symbol of a kernel has in one rank's copy."""
    return f"rank{rank}_{symbol}"


def _struct(name: str, spec: LowLatencyDispatch | LowLatencyCombine) -> str:
    members = "".join(f"    {declaration}\n" for declaration, _ in spec.params.declarations)
    return f"struct {name} {{\n{members}}};\nstatic_assert(sizeof({name}) == {spec.params.size});\n"


def _layout(at: Regions) -> str:
    return "{" + ", ".join(str(offset) for offset in astuple(at)) + "}"


def _row(variant: Variant) -> str:
    dispatch, combine = variant.dispatch.spec, variant.combine.spec
    assert isinstance(dispatch, LowLatencyDispatch) and isinstance(combine, LowLatencyCombine)
    dispatch_at = regions(dispatch, MAX_TOKENS, 0)
    combine_at = regions(combine, MAX_TOKENS, dispatch_at.end)
    late, masked = ("true" if holds else "false" for holds in (combine.weights == "atcombine", dispatch.masked))
    entries = ", ".join(
        "{" + ", ".join(of_rank(kernel.entry, rank) for rank in range(RANKS)) + "}"
        for kernel in (variant.dispatch, variant.combine)
    )
    sizes = ", ".join(f"{of_rank(kernel.entry, 0)}_params_bytes" for kernel in (variant.dispatch, variant.combine))
    layouts = f"{_layout(dispatch_at)}, {_layout(combine_at)}"
    return f'    {{"{variant.name}", {entries}, {sizes}, {dispatch.block_threads}, {late}, {masked}, {layouts}}},\n'


def shape_header() -> str:
    """`shape.hpp`: the one shape."""
    shape = {
        "kRanks": RANKS,
        "kHidden": HIDDEN,
        "kTopk": TOPK,
        "kExperts": EXPERTS,
        "kMaxTokens": MAX_TOKENS,
        "kBlocksPerRole": BLOCKS_PER_ROLE,
    }
    return "".join(f"constexpr unsigned {name} = {value};\n" for name, value in shape.items())


def variants_header(variants: Sequence[Variant]) -> str:
    """`variants.hpp`: the parameter structs and the table of kernels."""
    dispatch, combine = variants[0].dispatch.spec, variants[0].combine.spec
    assert isinstance(dispatch, LowLatencyDispatch) and isinstance(combine, LowLatencyCombine)
    assert not dispatch.masked
    entries = [of_rank(kernel.entry, rank) for kernel in kernels_of(variants) for rank in range(RANKS)]
    return "".join(
        [
            _struct("DispatchParams", dispatch),
            _struct("CombineParams", combine),
            _struct("MaskedDispatchParams", replace(dispatch, peers="masked")),
            _struct("MaskedCombineParams", replace(combine, peers="masked")),
            *(f'extern "C" moegen_host_entry {entry};\n' for entry in entries),
            *(f'extern "C" unsigned long {entry}_params_bytes();\n' for entry in entries),
            "constexpr Variant kVariants[] = {\n",
            *map(_row, variants),
            "};\n",
        ]
    )


# ---- compiling ------------------------------------------------------------------------------------


def kernels_of(variants: Sequence[Variant]) -> list[Kernel]:
    """Each kernel once."""
    return list(
        {kernel.name: kernel for variant in variants for kernel in (variant.dispatch, variant.combine)}.values()
    )


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
    return _merge(tools, [tools.compile(wrapper, option)], folder / "alone.o")


def _copy_for(rank: int, merged: Path, entries: Sequence[str]) -> Path:
    """The same code and, above all, other variables, for one rank."""
    names = merged.with_name(f"rank{rank}.txt")
    symbols = [name for entry in entries for name in (entry, f"{entry}_params_bytes")]
    names.write_text("".join(f"{symbol} {of_rank(symbol, rank)}\n" for symbol in symbols))
    target = merged.with_name(f"rank{rank}.o")
    subprocess.run(["objcopy", f"--redefine-syms={names}", merged, target], check=True)
    return target


def build(
    folder: Path, driver: Path, variants: Sequence[Variant], option: str, runtime_options: Sequence[str] = ()
) -> Path:
    """An executable of the driver and, for each rank, the runtime and the kernels."""
    tools = Toolchain(folder, ["-g1"])
    (folder / "include" / "shape.hpp").write_text(shape_header())
    (folder / "include" / "variants.hpp").write_text(variants_header(variants))
    kernels = kernels_of(variants)
    with ThreadPoolExecutor(JOBS) as pool:
        jobs = [pool.submit(_compile, kernel, folder / kernel.name, option) for kernel in kernels]
        jobs += [pool.submit(tools.compile, source, *runtime_options) for source in runtime_sources()]
        main = pool.submit(tools.compile, driver, option).result()
        merged = _merge(tools, [job.result() for job in jobs], folder / "merged.o")
    ranks = [_copy_for(rank, merged, [kernel.entry for kernel in kernels]) for rank in range(RANKS)]
    executable = folder / "driver"
    tools.run(option, main, *ranks, "-o", executable)
    return executable
