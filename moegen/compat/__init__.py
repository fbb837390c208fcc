# SPDX-License-Identifier: Apache-2.0
"""Other libraries' interfaces on moegen: thin, they only translate. See NOTICE for the projects they follow."""
