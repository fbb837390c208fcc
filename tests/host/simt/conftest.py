# SPDX-License-Identifier: Apache-2.0
"""The kernels of these tests, built once per session."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from simt_harness import KERNELS, Kernels, Toolchain, runtime_sources


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    tools = Toolchain(tmp_path_factory.mktemp("simt"))
    wrapper = tools.wrapper("kernels", KERNELS)
    with ThreadPoolExecutor(2) as pool:
        *parts, kernels_part = pool.map(tools.compile, [*runtime_sources(), wrapper])
    runtime, library = tools.folder / "libruntime.so", tools.folder / "kernels.so"
    tools.run("-shared", *parts, "-o", runtime)
    tools.run("-shared", kernels_part, "-o", library)
    return Kernels(runtime, library)
