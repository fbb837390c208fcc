# SPDX-License-Identifier: Apache-2.0
"""Putting this package in the place of an installed `deep_ep`."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec

from moegen import env

_NAMES = {"deep_ep": "moegen.compat.deep_ep", "deep_ep.utils": "moegen.compat.deep_ep.utils"}


def install() -> None:
    """Makes `import deep_ep` and `import deep_ep.utils` give moegen's, whether or not DeepEP is installed.

    Call it before anything else imports `deep_ep`. The modules get a spec of that name, because frameworks ask
    `importlib.util.find_spec("deep_ep")` whether it is there.
    """
    for name, home in _NAMES.items():
        module = importlib.import_module(home)
        alias = type(module)(name, module.__doc__)
        alias.__dict__.update({key: value for key, value in vars(module).items() if key != "__name__"})
        alias.__spec__ = ModuleSpec(name, None, origin=getattr(module, "__file__", None), is_package=name == "deep_ep")
        sys.modules[name] = alias
    sys.modules["deep_ep"].utils = sys.modules["deep_ep.utils"]  # type: ignore[attr-defined]


def install_if_asked() -> None:
    """What the plugin entry points of vLLM and SGLang call: `install()` if MOEGEN_REPLACE_DEEP_EP=1."""
    if env.replace_deep_ep():
        install()
