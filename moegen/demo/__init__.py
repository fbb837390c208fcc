# SPDX-License-Identifier: Apache-2.0
"""The demo: one real MoE layer across ranks, compared with the same layer computed densely in one process."""
