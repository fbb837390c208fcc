# SPDX-License-Identifier: Apache-2.0
"""Mooncake EP's interface (`mooncake.mooncake_ep_buffer`) on moegen: `Buffer` with dispatch and combine for ranks that
may be missing, and `EventOverlap`.

`from moegen.compat.mooncake import Buffer`, or `install()` before anything imports `mooncake.mooncake_ep_buffer`; with
MOEGEN_REPLACE_MOONCAKE_EP=1 the plugin entry points of vLLM and SGLang do the latter. `ElasticBuffer` is not there.
"""

from moegen.compat.deep_ep.utils import EventOverlap
from moegen.compat.mooncake.buffer import Buffer
from moegen.compat.mooncake.installed import install, install_if_asked

__all__ = ["Buffer", "EventOverlap", "install", "install_if_asked"]
