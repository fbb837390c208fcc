# SPDX-License-Identifier: Apache-2.0
"""DeepEP's interface on moegen: `Buffer` of 1.2.1 with its low-latency calls and its normal mode, `ElasticBuffer` of
2.1 with dispatch and combine, events and `Config`.

`import moegen.compat.deep_ep as deep_ep`, or `install()` before anything imports `deep_ep`; with
MOEGEN_REPLACE_DEEP_EP=1 the plugin entry points of vLLM and SGLang do the latter. Calls between nodes are not there.
"""

from moegen.compat.deep_ep.buffer import Buffer
from moegen.compat.deep_ep.config import Config
from moegen.compat.deep_ep.elastic import ElasticBuffer
from moegen.compat.deep_ep.elastic_handle import EPHandle
from moegen.compat.deep_ep.installed import install, install_if_asked
from moegen.compat.deep_ep.utils import EventHandle, EventOverlap, topk_idx_t

__version__ = "1.2.1+moegen"

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "install",
    "install_if_asked",
    "topk_idx_t",
]
