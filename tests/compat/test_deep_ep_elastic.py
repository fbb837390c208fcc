# SPDX-License-Identifier: Apache-2.0
"""DeepEP V2's `ElasticBuffer` on this device."""

from support.deep_ep_elastic_cases import *  # noqa: F403
