# SPDX-License-Identifier: Apache-2.0
"""What `scripts/compare_kernels.py` is made of."""
