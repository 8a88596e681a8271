"""Plans are pure data: what is chosen for which shape, without running anything."""

import itertools
import math

import pytest
from llvmlite import binding

from fastxent._abi.argument_block import PLANNED
from fastxent._abi.dtypes import ITEMSIZE
from fastxent._abi.tasks import TASKS
from fastxent._abi.variant import (
    CHECKED,
    CHECKS,
    CHUNK,
    FEW_CLASSES,
    LANES,
    MOST_TILED,
    MOST_TILED_LARGE,
    PANEL,
    Layout,
    Schedule,
    Storage,
)
from fastxent._kernels import tasks
from fastxent._runtime.plan import FEW_ROWS, make_plan, row_axes, traits_of
from fastxent._runtime.strategies import LEGAL
from fastxent._simd import host, vector

pytestmark = pytest.mark.core


def c_strides(shape, itemsize=4):
    strides = [itemsize]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * n)
    return tuple(strides)


def plan(shape, axis=1, strides=None, task="value_and_grad", **more):
    s = strides or c_strides(shape)
    return make_plan(task, shape, (s, s, s), axis, "f32", labelled=True, **more)


def planned(p):
    return dict(zip((name for name, _ in PLANNED), p.planned, strict=True))


def test_axes_are_merged_where_all_operands_allow_it():
    shape = (2, 3, 4, 5)
    s = c_strides(shape)
    assert [a.extent for a in row_axes(shape, (s, s, s), 3)] == [24]
    assert [a.extent for a in row_axes(shape, (s, s, s), 1)] == [20, 2]
    sliced = (s[0] * 2, *s[1:])
    assert [a.extent for a in row_axes(shape, (s, sliced, s), 3)] == [12, 2]


@pytest.mark.parametrize(
    ("shape", "axis", "class_lanes", "contiguous_lanes"),
    [
        pytest.param((100, MOST_TILED + 1), 1, True, True, id="many classes, side by side"),
        pytest.param((15, FEW_CLASSES + 1), 1, True, True, id="too few rows to fill the lanes"),
        pytest.param((100, MOST_TILED), 1, False, False, id="few classes: rows in lanes, gathered"),
        pytest.param((16, 150, 128, 128), 1, False, True, id="channels first: rows side by side"),
        pytest.param((5, 7), 0, False, True, id="classes first"),
    ],
)
def test_direction(shape, axis, class_lanes, contiguous_lanes):
    layout = plan(shape, axis).variant.layout
    assert (layout == Layout.CLASS_LANES) == class_lanes
    assert (layout in (Layout.CLASS_LANES, Layout.ROW_LANES, Layout.PANEL)) == contiguous_lanes


@pytest.mark.parametrize(
    "shape",
    [(1, 10), (33, 10), (1000, 3), (7, 1000), (100, 40000), (FEW_ROWS, 40000), (2, 5, 3, 17), (2, 5, 30, 40), (3, 300, 20, 20)],
)
def test_units_cover_all_rows_once(shape):
    p = plan(shape)
    now = planned(p)
    rows = math.prod(shape) // shape[1]
    assert (now["n_rows"], now["n_classes"]) == (rows, shape[1])
    assert (p.n_chunks - 1) * now["chunk"] < p.n_units <= p.n_chunks * now["chunk"]
    if p.variant.layout == Layout.CLASS_LANES:
        assert p.n_units == rows * now["n_segments"]
        assert (now["n_vectors"] - 1) * LANES < shape[1] <= now["n_vectors"] * LANES
    else:
        inner, panel = p.axes[0].extent, now["panel"]
        assert (now["units_per_line"] - panel) * LANES < inner <= now["units_per_line"] * LANES
        assert p.n_units == now["units_per_line"] * (rows // inner)
        assert now["units_per_line"] % panel == 0 and now["chunk"] % panel == 0


def test_rows_side_by_side_with_few_classes_are_packed_in_panels():
    assert planned(plan((16, 150, 128, 128)))["panel"] == PANEL
    assert planned(plan((16, 150, 5, 5)))["panel"] == 2
    assert planned(plan((16, MOST_TILED_LARGE + 1, 128, 128)))["panel"] == 1
    assert planned(plan((1000, 10)))["panel"] == 1


def test_few_long_rows_are_split():
    assert plan((FEW_ROWS - 1, 40000)).variant.schedule == Schedule.SPLIT
    assert plan((FEW_ROWS, 40000)).variant.schedule != Schedule.SPLIT
    assert plan((1, 1000)).variant.schedule != Schedule.SPLIT
    assert plan((1, 40000), task="stats").variant.schedule != Schedule.SPLIT
    longest = planned(plan((1, 1 << 30)))
    assert longest["segment"] * longest["n_segments"] * LANES >= 1 << 30
    assert longest["n_segments"] <= 64


def test_a_chunk_is_worth_its_hand_out():
    assert planned(plan((1 << 18, 10)))["chunk"] * LANES * 10 == pytest.approx(CHUNK, rel=0.1)


def test_there_is_room_for_the_chunks_of_every_phase():
    few = plan((100, 10))
    assert few.most_chunks == few.n_chunks == 1
    many = plan((1 << 22, 1))
    assert many.most_chunks == (1 << 22) // (CHECKED * CHECKS) > many.n_chunks


def strategies():
    """Of all tasks, over the borders between shapes, in C order, with the classes first, apart, and where strides disagree."""
    for task, logits in itertools.product(TASKS, ITEMSIZE):
        for shape in itertools.product((1, 17, 63, 300, 50_000), (3, 10, 100, 300, 1000, 40_000, 300_000)):
            size = ITEMSIZE[logits]
            c_order, classes_first = c_strides(shape, size), (size, shape[0] * size)
            apart = tuple(3 * s for s in c_order)
            for x, g in ((c_order,) * 2, (classes_first,) * 2, (apart,) * 2, (classes_first, c_order)):
                for capped in (False, True):
                    v = make_plan(task, shape, (x, g, x), 1, logits, labelled=True, capped=capped).variant
                    yield (v.layout, v.schedule, v.storage), (task, shape, x, g, logits, capped)


@pytest.mark.parametrize("wide", [True, False], ids=["AVX-512", "narrow registers"])
def test_the_table_of_strategies_holds_all_and_no_more(wide, monkeypatch):
    monkeypatch.setattr(host, "is_wide", lambda binding: wide)
    for function in (make_plan, traits_of):
        function.cache_clear()
    reached = {}
    for strategy, call in strategies():
        assert strategy in LEGAL, call
        reached.setdefault(strategy, call)
    for function in (make_plan, traits_of):
        function.cache_clear()
    assert set(LEGAL) == set(reached)


def test_kernels_have_numbers_of_their_own():
    assert len(Layout) <= 8 and len(Schedule) <= 8 and len(Storage) <= 4  # see plan.number_of


def test_the_host_is_what_numba_compiles_for():
    assert host.is_wide(binding) == vector.WIDE


def test_every_task_computes_something():
    computed = {*tasks.LOSSES, *tasks.VISITS, *tasks.POINTWISE} - {"save_segment"}
    assert computed == set(TASKS)
    assert {s for _, s, _ in LEGAL} - {Schedule.ONE_BY_ONE, Schedule.SPLIT} == set(tasks.SCHEDULES)
