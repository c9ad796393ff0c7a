"""Views are bijections, and ranges of a view are slices of the whole."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_slowmo.wire.views import View
from support.views import views


def filled(shape):
    return np.arange(math.prod(shape), dtype=np.float64).reshape(shape)


@given(views())
def test_a_view_is_a_bijection(view):
    own = filled(view.own)
    wire = view.to_wire(own)
    assert wire.shape == view.wire
    assert len(np.unique(wire)) == view.size
    other = view.to_own(wire, np.full(view.own, -1.0))
    assert np.array_equal(view.to_wire(other), wire)
    assert (other == -1).sum() == other.size - view.size
    assert np.array_equal(view.to_own(wire, own), own)
    if view.identity:
        assert np.array_equal(wire.reshape(-1), own.reshape(-1))
    if view.offset is not None:
        assert np.array_equal(own.reshape(-1)[view.offset : view.offset + view.size], wire.reshape(-1))
    assert view.orientation


@pytest.mark.slow
@given(views(), st.data())
@settings(max_examples=300)
def test_a_stretch_is_a_slice_of_the_whole(view, data):
    start = data.draw(st.integers(0, view.size))
    stop = data.draw(st.integers(start, view.size))
    own = filled(view.own)
    flat = view.to_wire(own).reshape(-1)
    assert np.array_equal(view.read(own, start, stop), flat[start:stop])
    pieces = list(view.pieces(start, stop))
    assert sum(piece.size for piece in pieces) == stop - start
    assert len(pieces) <= 2 * len(view.shape) + 1
    if view.shape == view.extent:
        assert all(piece.whole for piece in pieces), "without split axes, nothing else is touched"
    view.write(own, start, stop, -1 - np.arange(stop - start))
    expected = flat.copy()
    expected[start:stop] = -1 - np.arange(stop - start)
    assert np.array_equal(own, view.to_own(expected.reshape(view.wire), filled(view.own)))


@given(views(whole=True))
def test_the_inverse_undoes_a_view(view):
    own = filled(view.own)
    assert np.array_equal(view.inverse().to_wire(view.to_wire(own)), own)
    both = view.then(view.inverse())
    assert both.identity
    assert both.wire == view.own


@pytest.mark.slow
@given(views(), st.data())
def test_views_compose(view, data):
    axes = data.draw(st.permutations(range(len(view.wire))))
    other = View.permute(view.wire, axes)
    own = filled(view.own)
    assert np.array_equal(view.then(other).to_wire(own), other.to_wire(view.to_wire(own)))


def test_a_flattened_feature_map_is_put_channels_first():
    kernel = filled((2 * 3 * 4, 5))  # Keras: (h w c, out)
    view = View.permute((24, 5), (1, 0)).split((2, 3, 4))
    expected = kernel.reshape(2, 3, 4, 5).transpose(3, 2, 0, 1).reshape(5, 24)
    assert np.array_equal(view.to_wire(kernel), expected)
    assert np.array_equal(View.same((24,)).split((2, 3, 4)).to_wire(kernel[:, 1]), expected[1])
    row = list(view.pieces(24, 36))  # half a row of the wire: c 0 and 1 of out 1
    assert [piece.box for piece in row] == [(slice(0, 24), slice(1, 2))], "one column is touched"
    assert [piece.whole for piece in row] == [False]


def test_rows_are_one_stretch():
    view = View.rows((6, 5), 2, 4)
    assert view.offset == 10
    assert view.orientation == "[2:4, :]"
    assert View.same((3,)).orientation == "same"
    assert View.permute((3, 2), (1, 0)).offset is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: View((6, 5), (15, 2), (0, 1), (15, 2)), "does not split the axes"),
        (lambda: View((6, 5), (6, 5), (0, 0), (6, 5)), "not a permutation"),
        (lambda: View((6, 5), (6, 5), (1, 0), (6, 6)), "different numbers"),
        (lambda: View((6, 5), (6, 5), (1, 0), (5, 6), ((0, 7), (0, 5))), "does not lie within"),
        (lambda: View.same((6, 5)).split((2, 2)), "not a flattened feature map"),
        (lambda: View.rows((6, 5), 0, 3).inverse(), "no inverse"),
        (lambda: View.rows((6, 5), 0, 3).to_own(np.zeros((3, 5))), "give `own`"),
        (lambda: View.same((6, 5)).to_wire(np.zeros((5, 6))), "must have shape"),
        (lambda: View.same((6, 5)).then(View.same((5, 6))), "can't follow"),
        (lambda: View((6,), (2, 3), (1, 0), (6,)).then(View((6,), (2, 3), (1, 0), (6,))), "no common refinement"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tensors_without_elements_and_without_axes():
    assert View.same(()).to_wire(np.array(2.0)).shape == ()
    assert View.same(()).read(np.array(2.0), 0, 1).tolist() == [2.0]
    assert View.permute((0, 3), (1, 0)).to_wire(np.zeros((0, 3))).shape == (3, 0)
    assert not list(View.permute((0, 3), (1, 0)).pieces(0, 0))
