# SPDX-License-Identifier: Apache-2.0
"""Putting this package in the place of an installed `deep_ep`."""

from __future__ import annotations

from moegen import env
from moegen.compat.replaced import put_in_place


def install() -> None:
    """Makes `import deep_ep` and `import deep_ep.utils` give moegen's, whether or not DeepEP is installed.

    Call it before anything else imports `deep_ep`.
    """
    put_in_place({"deep_ep": "moegen.compat.deep_ep", "deep_ep.utils": "moegen.compat.deep_ep.utils"})


def install_if_asked() -> None:
    """What the plugin entry points of vLLM and SGLang call: `install()` if MOEGEN_REPLACE_DEEP_EP=1."""
    if env.replace_deep_ep():
        install()
