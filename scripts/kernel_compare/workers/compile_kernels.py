# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels of the moegen that PYTHONPATH names, and tells what they are.

`python -m kernel_compare.workers.compile_kernels FOLDER ARCH cubin|ptx`, stems on stdin: writes FOLDER/<stem>.cubin or
.ptx, and FOLDER/kernels.json.
It runs with old revisions too, so it knows of moegen no more than it must.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

from kernel_compare.workers.homes import home, homes


def main() -> None:
    folder, arch, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    homes(r"^class \w+\([^)]*\bfamily=")  # so that Spec.parse knows every family
    spec_class = home(r"^class Spec\b").Spec
    nvrtc = home(r"^def ptx\(")
    kernels = {stem: _compile(spec_class.parse(stem), folder, arch, kind, nvrtc) for stem in sys.stdin.read().split()}
    made = {"compiler": nvrtc.identity(), "kernels": kernels}
    (folder / "kernels.json").write_text(json.dumps(made))


def _compile(spec: Any, folder: Path, arch: str, kind: str, nvrtc: Any) -> dict[str, Any]:
    source = home(r"^def render\(").render(spec)
    recipe = nvrtc.recipe(source, home(r"^class Target\b", "sm_90a").Target(arch))
    told = {
        "symbol": spec.symbol,
        "text": hashlib.sha256(source.text.encode()).hexdigest(),
        "members": _members(spec.params),
        "launch": [spec.block_threads, spec.dynamic_shared_bytes],
    }
    if kind == "ptx":
        (folder / f"{spec.stem}.ptx").write_text(nvrtc.ptx(recipe))
        return told
    compiled = nvrtc.compile(recipe)
    (folder / f"{spec.stem}.cubin").write_bytes(compiled.content)
    return {**told, "resources": compiled.resources.to_json()}


def _members(params: Any) -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of each member of the parameter struct."""
    members = []
    end = 0
    for member in params.members:
        size = struct.calcsize("=" + member.format) * (member.length or 1)
        members.append((member.name, end, size))
        end += size
    return members


if __name__ == "__main__":
    main()
