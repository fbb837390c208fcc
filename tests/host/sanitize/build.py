# SPDX-License-Identifier: Apache-2.0
"""The low-latency kernels, right ones and ones with one order taken away, in one executable for a sanitizer.

Every kernel is an object of its own in which all but its entry is local: their helpers have one name and different
contents. `variants.hpp`, which the driver includes, lists the kernels and declares their parameter structs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
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
BLOCKS = 2

JOBS = 2

KERNEL = ""
SIGNAL = "moegen/signal.cuh"
"""What an edit is made in: the kernel's text or a header."""

PREFIX = "moegen_launch_"
WRAPPER = """#include "{name}.cu"
#include <moegen/entry.hpp>
MOEGEN_HOST_ENTRY_AS({entry}, {symbol}, Params);
"""


@dataclass(frozen=True)
class Edit:
    """One place of a kernel's text, or of a header that it includes, that becomes another."""

    file: str
    old: str
    new: str

    def applied(self, text: str) -> str:
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"{self.old!r} occurs {found} times in {self.file or 'the kernel'}; expected once")
        return text.replace(self.old, self.new)


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


def variant(wire: str, weights: str, groups: WarpGroups) -> Variant:
    """Unmodified kernels of one wire format."""
    common = ("bf16", "expert", RANKS, HIDDEN, TOPK, EXPERTS, "ipc", groups, wire)
    name = f"{wire}_{weights}_w{groups}"
    dispatch = Kernel(f"dispatch_{name}", LowLatencyDispatch(*common))
    return Variant(name, dispatch, Kernel(f"combine_{name}", LowLatencyCombine(*common, weights)))


def weakened(right: Variant, op: str, name: str, edit: Edit) -> Variant:
    """`right` with an edit in one of its two kernels."""
    before = right.dispatch if op == "dispatch" else right.combine
    kernel = Kernel(f"{op}_{name}", before.spec, edit)
    if op == "dispatch":
        return Variant(kernel.name, kernel, right.combine)
    return Variant(kernel.name, right.dispatch, kernel)


# ---- what the driver includes ---------------------------------------------------------------------


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
    late = "true" if combine.weights == "atcombine" else "false"
    entries = ", ".join(
        f"{kernel.entry}, {kernel.entry}_params_bytes" for kernel in (variant.dispatch, variant.combine)
    )
    layouts = f"{_layout(dispatch_at)}, {_layout(combine_at)}"
    return f'    {{"{variant.name}", {entries}, {dispatch.block_threads}, {late}, {layouts}}},\n'


def header(variants: Sequence[Variant]) -> str:
    """`variants.hpp`: the one shape, the parameter structs and the table of kernels."""
    dispatch, combine = variants[0].dispatch.spec, variants[0].combine.spec
    assert isinstance(dispatch, LowLatencyDispatch) and isinstance(combine, LowLatencyCombine)
    shape = {
        "kRanks": RANKS,
        "kHidden": HIDDEN,
        "kTopk": TOPK,
        "kExperts": EXPERTS,
        "kMaxTokens": MAX_TOKENS,
        "kBlocks": BLOCKS,
    }
    entries = sorted(kernel.entry for kernel in kernels_of(variants))
    return "".join(
        [
            *(f"constexpr uint32_t {name} = {value};\n" for name, value in shape.items()),
            _struct("DispatchParams", dispatch),
            _struct("CombineParams", combine),
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
    return list({kernel.name: kernel for variant in variants for kernel in (variant.dispatch, variant.combine)}.values())


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
    made, alone = tools.compile(wrapper, option), folder / "alone.o"
    tools.run("-r", "-nostdlib", "-Wl,--force-group-allocation", made, "-o", alone)
    subprocess.run(["objcopy", "--wildcard", f"--keep-global-symbol={PREFIX}*", str(alone)], check=True)
    return alone


def build(
    folder: Path, driver: Path, variants: Sequence[Variant], option: str, runtime_options: Sequence[str] = ()
) -> Path:
    """An executable of runtime, driver and kernels; the latter two are compiled with `option`."""
    tools = Toolchain(folder, ["-g1"])
    (folder / "include" / "variants.hpp").write_text(header(variants))
    with ThreadPoolExecutor(JOBS) as pool:
        kernels = [pool.submit(_compile, kernel, folder / kernel.name, option) for kernel in kernels_of(variants)]
        runtime = [pool.submit(tools.compile, source, *runtime_options) for source in runtime_sources()]
        main = pool.submit(tools.compile, driver, option)
        parts = [part.result() for part in (main, *runtime, *kernels)]
    executable = folder / "driver"
    tools.run(option, *parts, "-o", executable)
    return executable
