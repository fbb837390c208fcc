# SPDX-License-Identifier: Apache-2.0
"""MSCCL++ EP's interface (`mscclpp.ext.ep`) on moegen: `Buffer` with its low-latency and intranode calls, and `Config`.

What differs from DeepEP's: results come one by one, combine takes `src_info` and `layout_range` in place of a handle,
and dispatch writes into tensors that the caller may give. The internode calls are not there.
"""

from moegen.compat.deep_ep.config import Config
from moegen.compat.mscclpp.buffer import Buffer

__all__ = ["Buffer", "Config"]
