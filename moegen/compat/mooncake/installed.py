# SPDX-License-Identifier: Apache-2.0
"""Putting this package in the place of an installed Mooncake EP."""

from __future__ import annotations

from moegen import env
from moegen.compat.replaced import put_in_place


def install() -> None:
    """Makes `from mooncake.mooncake_ep_buffer import Buffer` give moegen's, whether or not Mooncake is installed. Its
    other modules stay as they are.

    Call it before anything else imports `mooncake.mooncake_ep_buffer`.
    """
    put_in_place({"mooncake.mooncake_ep_buffer": "moegen.compat.mooncake"})


def install_if_asked() -> None:
    """What the plugin entry points of vLLM and SGLang call: `install()` if MOEGEN_REPLACE_MOONCAKE_EP=1."""
    if env.replace_mooncake_ep():
        install()
