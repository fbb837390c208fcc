# SPDX-License-Identifier: Apache-2.0
"""Path `collective`: chunks that torch.distributed exchanges, and the kernels around them that families share."""
