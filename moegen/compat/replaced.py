# SPDX-License-Identifier: Apache-2.0
"""Putting modules of this package in the place of others."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_OF_THE_NAME = ("__name__", "__spec__")


def put_in_place(homes: Mapping[str, str]) -> None:
    """Makes each name import the module at its home, whether or not there is one of that name installed. Modules get a
    spec of their new name, because frameworks ask `importlib.util.find_spec` whether they are there.
    """
    parents = {name: name.rpartition(".")[0] for name in homes}
    for name, home in homes.items():
        module = importlib.import_module(home)
        alias = _module(name, module.__doc__, is_package=name in parents.values())
        alias.__dict__.update({key: value for key, value in vars(module).items() if key not in _OF_THE_NAME})
        sys.modules[name] = alias
    for name, parent in parents.items():
        if parent and parent not in sys.modules and find_spec(parent) is None:
            sys.modules[parent] = _module(parent, None, is_package=True)
        if parent:
            setattr(importlib.import_module(parent), name.rpartition(".")[2], sys.modules[name])


def _module(name: str, doc: str | None, *, is_package: bool) -> ModuleType:
    module = ModuleType(name, doc)
    module.__spec__ = ModuleSpec(name, None, is_package=is_package)
    if is_package:
        module.__path__ = []
    return module
