# SPDX-License-Identifier: Apache-2.0
"""What the public classes of all families stand on: life cycle, membership, construction, argument checks."""
