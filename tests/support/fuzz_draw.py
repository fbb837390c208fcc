# SPDX-License-Identifier: Apache-2.0
"""Cases of the fuzz, as hypothesis draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from support import fuzz_modes, fuzz_values
from support.fuzz_cases import Case
from support.fuzz_compat import COMPAT
from support.fuzz_lives import ENDS, MAKINGS, Life
from support.fuzz_surfaces import CORE
from support.fuzz_troupe import SURFACES

USUAL = (*((surface.name, 1) for surface in CORE), *((surface.name, 2) for surface in COMPAT))
"""With these numbers of ranks, whose kernels other tests compile too."""
ALL = tuple((name, ranks) for name in SURFACES for ranks in (1, 2))

_SEEDS = st.integers(0, 2**20)
_MODES = st.sampled_from(("none",) * len(fuzz_modes.NAMES) + fuzz_modes.NAMES)
_LIVES_OF = 6
"""One in so many cases is of a constructor."""


@st.composite
def cases(draw: Any, where: Sequence[tuple[str, int]]) -> Case | Life:
    if draw(st.integers(0, _LIVES_OF - 1)) == _LIVES_OF - 1:
        return _life(draw)
    name, ranks = draw(st.sampled_from(where))
    surface = SURFACES[name]
    arguments = [(number, of) for number, step in enumerate(surface.steps) for of in step.params]
    changed = draw(st.lists(st.sampled_from(arguments), max_size=3, unique=True))
    kinds = [surface.steps[number].params[argument].kind for number, argument in changed]
    variants = [draw(st.sampled_from(fuzz_values.names(kind))) for kind in kinds]
    optional = [(number, of) for number, of in arguments if surface.steps[number].params[of].optional]
    present = draw(st.lists(st.sampled_from(optional), max_size=2, unique=True)) if optional else []
    return Case(
        name,
        ranks,
        draw(_SEEDS),
        tuple((*place, variant) for place, variant in zip(changed, variants, strict=True)),
        tuple(present),
        draw(_MODES),
        draw(st.sampled_from(("once", "once", "twice", "late"))),
        draw(st.integers(0, 19)) == 19,
    )


def _life(draw: Any) -> Life:
    name = draw(st.sampled_from(sorted(MAKINGS)))
    arguments = MAKINGS[name].arguments
    changed = draw(st.lists(st.sampled_from(sorted(arguments)), max_size=2, unique=True))
    changes = tuple((each, draw(st.sampled_from(fuzz_values.names(arguments[each][0])))) for each in changed)
    return Life(
        name, draw(st.sampled_from((1, 1, 2))), draw(_SEEDS), changes, draw(_MODES), draw(st.sampled_from(ENDS))
    )
