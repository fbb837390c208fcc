# SPDX-License-Identifier: Apache-2.0
"""What a kernel is compiled for: a GPU architecture or the host."""

from __future__ import annotations

from dataclasses import dataclass

from moegen.errors import InputError, UnsupportedPlatformError

# The "a" targets have instructions that their successors lack; their cubins run on exactly that architecture.
_ARCHS = {"sm80": "sm_80", "sm89": "sm_89", "sm90": "sm_90a", "sm100": "sm_100a", "sm120": "sm_120", "host": "host"}
# A plain cubin runs on every later minor version of its major one (CUDA programming guide, binary compatibility).
_CAPABILITIES = {(8, 0): "sm80", (8, 6): "sm80", (8, 7): "sm80", (8, 9): "sm89", (9, 0): "sm90", (10, 0): "sm100"}
_CAPABILITIES |= {(12, 0): "sm120", (12, 1): "sm120"}


@dataclass(frozen=True)
class Target:
    """One of `sm80 sm89 sm90 sm100 sm120 host`."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in _ARCHS:
            raise InputError(f"no target {self.name!r}; there are: {', '.join(_ARCHS)}")

    def __str__(self) -> str:
        return self.name

    @property
    def is_host(self) -> bool:
        return self.name == "host"

    @property
    def arch(self) -> str:
        """The compiler's word for it, e.g. `sm_90a`; `host` for the host."""
        return _ARCHS[self.name]

    @property
    def suffix(self) -> str:
        """The file extension of its binaries."""
        return "so" if self.is_host else "cubin"

    @staticmethod
    def parse(name: str) -> Target:
        """The target of that name.

        Raises:
            InputError: there is none; the text lists the names.
        """
        return Target(name.strip().lower())

    @staticmethod
    def for_capability(major: int, minor: int) -> Target:
        """The target whose binaries a GPU of this compute capability runs.

        Raises:
            UnsupportedPlatformError: there is none.
        """
        name = _CAPABILITIES.get((major, minor))
        if name is None:
            known = ", ".join(f"{a}.{b}" for a, b in _CAPABILITIES)
            raise UnsupportedPlatformError(f"no kernels for compute capability {major}.{minor}; there are for: {known}")
        return Target(name)


TARGETS: tuple[str, ...] = tuple(_ARCHS)
"""The names of all targets."""
