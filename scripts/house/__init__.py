# SPDX-License-Identifier: Apache-2.0
"""Measures the state of the code base: dead text in kernels, doubles in templates, cycles of imports and the like.

In the source tree's root:

    python -m scripts.house                a table of all measures
    python -m scripts.house --markdown     the same for docs
    python -m scripts.house --json         the same for programs
    python -m scripts.house --list NAME    every finding of one measure, with its place
    python -m scripts.house --check        fails where a measure is above its limit in limits.py

Nothing is compiled. C++ is read by its tokens: overloads count as one name, and what an assertion mentions as used.
"""
