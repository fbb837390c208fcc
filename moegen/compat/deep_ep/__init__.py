# SPDX-License-Identifier: Apache-2.0
"""DeepEP's interface (`deep_ep` 1.2.1) on moegen: `Buffer` with its low-latency calls, events and `Config`.

`import moegen.compat.deep_ep as deep_ep`, or `install()` before anything imports `deep_ep`; with
MOEGEN_REPLACE_DEEP_EP=1 the plugin entry points of vLLM and SGLang do the latter. The normal mode and `ElasticBuffer`
are not there yet.
"""

from moegen.compat.deep_ep.buffer import Buffer
from moegen.compat.deep_ep.config import Config
from moegen.compat.deep_ep.installed import install, install_if_asked
from moegen.compat.deep_ep.utils import EventHandle, EventOverlap, topk_idx_t

__version__ = "1.2.1+moegen"

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "install", "install_if_asked", "topk_idx_t"]
