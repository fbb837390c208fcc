# SPDX-License-Identifier: Apache-2.0
"""Programs that run with a revision's moegen: they import nothing else of this folder."""
