"""Views of tensors, drawn at random."""

import math

from hypothesis import strategies as st

from hvd_slowmo.wire.views import View


@st.composite
def views(draw, whole=False):
    shape = draw(st.lists(st.integers(1, 4), max_size=5))
    axes = draw(st.permutations(range(len(shape))))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(shape) - 1)), max_size=3))) if shape else []
    cuts = [c for c in cuts if 0 < c < len(shape)]
    extent = [math.prod(shape[a:b]) for a, b in zip([0, *cuts], [*cuts, len(shape)], strict=True)] if shape else []
    permuted = [shape[a] for a in axes]
    cut = draw(st.integers(0, len(shape)))
    wire = [math.prod(permuted[:cut]), *permuted[cut:]]
    if whole or draw(st.booleans()):
        return View(tuple(extent), tuple(shape), tuple(axes), tuple(wire))
    before = [draw(st.integers(0, 2)) for _ in extent]
    after = [draw(st.integers(0, 2)) for _ in extent]
    own = [b + n + a for b, n, a in zip(before, extent, after, strict=True)]
    part = tuple((b, b + n) for b, n in zip(before, extent, strict=True))
    return View(tuple(own), tuple(shape), tuple(axes), tuple(wire), part)
