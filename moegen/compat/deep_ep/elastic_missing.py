# SPDX-License-Identifier: Apache-2.0
"""The parts of DeepEP V2's `ElasticBuffer` that are no expert parallelism: each raises and says its name."""

from __future__ import annotations

from typing import Any, NoReturn


def _refuse(name: str) -> NoReturn:
    raise NotImplementedError(f"moegen.compat.deep_ep has no ElasticBuffer.{name}: only dispatch and combine are there")


class NotThere:
    """Remote caches (engram), pipeline parallelism (pp), and all-gather with reduce-scatter (agrs)."""

    def engram_write(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("engram_write")

    def engram_fetch(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("engram_fetch")

    @staticmethod
    def get_engram_storage_size_hint(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse("get_engram_storage_size_hint")

    def pp_set_config(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("pp_set_config")

    def pp_send(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("pp_send")

    def pp_recv(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("pp_recv")

    @staticmethod
    def get_pp_buffer_size_hint(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse("get_pp_buffer_size_hint")

    def create_agrs_session(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("create_agrs_session")

    def destroy_agrs_session(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("destroy_agrs_session")

    def agrs_new_session(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("agrs_new_session")

    def agrs_set_config(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("agrs_set_config")

    def agrs_get_inplace_tensor(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("agrs_get_inplace_tensor")

    def all_gather(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("all_gather")

    @staticmethod
    def get_agrs_num_max_session_bytes(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse("get_agrs_num_max_session_bytes")

    @staticmethod
    def get_agrs_buffer_size_hint(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse("get_agrs_buffer_size_hint")
