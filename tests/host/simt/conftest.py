# SPDX-License-Identifier: Apache-2.0
"""The kernels of these tests, built once per session."""

from __future__ import annotations

import pytest
from simt_harness import KERNELS, Kernels, Toolchain

from moegen.compile import binary


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    tools = Toolchain(tmp_path_factory.mktemp("simt"))
    library = tools.folder / "kernels.so"
    tools.run("-shared", tools.wrapper("kernels", KERNELS), "-o", library)
    return Kernels(binary.host_runtime(), library)
