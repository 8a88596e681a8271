"""Plans are pure data: what is chosen for which shape, without running anything."""

import math

import pytest

from fastxent._plan import CHUNK, FEW_CLASSES, FEW_ROWS, LANES, MOST_TILED, check_plan, make_plan, row_axes


def c_strides(shape, itemsize=4):
    strides = [itemsize]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * n)
    return tuple(strides)


def plan(shape, axis=1, strides=None, **more):
    s = strides or c_strides(shape)
    return make_plan(shape, (s, s, s), axis, "f32", labelled=True, **more)


def test_axes_are_merged_where_all_operands_allow_it():
    shape = (2, 3, 4, 5)
    s = c_strides(shape)
    assert [a.extent for a in row_axes(shape, (s, s, s), 3)] == [24]
    assert [a.extent for a in row_axes(shape, (s, s, s), 1)] == [20, 2]
    sliced = (s[0] * 2, *s[1:])
    assert [a.extent for a in row_axes(shape, (s, sliced, s), 3)] == [12, 2]


@pytest.mark.parametrize(
    ("shape", "axis", "across", "neighbours"),
    [
        pytest.param((100, MOST_TILED + 1), 1, True, True, id="many classes, side by side"),
        pytest.param((15, FEW_CLASSES + 1), 1, True, True, id="too few rows to fill the lanes"),
        pytest.param((100, MOST_TILED), 1, False, False, id="few classes: rows in lanes, gathered"),
        pytest.param((16, 150, 128, 128), 1, False, True, id="channels first: rows side by side"),
        pytest.param((5, 7), 0, False, True, id="classes first"),
    ],
)
def test_direction(shape, axis, across, neighbours):
    variant = plan(shape, axis).variant
    assert (variant.across, variant.neighbours) == (across, neighbours)


@pytest.mark.parametrize("shape", [(1, 10), (33, 10), (1000, 3), (7, 1000), (100, 40000), (FEW_ROWS, 40000), (2, 5, 3, 17)])
def test_units_cover_all_rows_once(shape):
    p = plan(shape)
    rows = math.prod(shape) // shape[1]
    n_rows, n_classes, n_vectors, n_units, units_per_line, chunk, n_chunks = p.planned[:7]
    assert (n_rows, n_classes) == (rows, shape[1])
    assert (n_chunks - 1) * chunk < n_units <= n_chunks * chunk
    if p.variant.across:
        assert n_units == rows * p.planned[8]
        assert (n_vectors - 1) * LANES < n_classes <= n_vectors * LANES
    else:
        inner = p.axes[0]
        assert (units_per_line - 1) * LANES < inner <= units_per_line * LANES
        assert n_units == units_per_line * (rows // inner)


def test_few_long_rows_are_split():
    assert plan((FEW_ROWS - 1, 40000)).variant.split
    assert not plan((FEW_ROWS, 40000)).variant.split
    assert not plan((1, 1000)).variant.split
    assert not plan((1, 40000), may_split=False).variant.split
    *_, segment, n_segments, _, _, _, _ = plan((1, 1 << 30)).planned
    assert segment * n_segments * LANES >= 1 << 30
    assert n_segments <= 64


def test_a_chunk_is_worth_its_hand_out():
    assert plan((1 << 20, 10)).planned[5] * LANES * 10 == pytest.approx(CHUNK, rel=0.1)
    assert check_plan(1 << 20, 10).n_chunks == (1 << 20) // CHUNK
