"""The course of sequential edits as a figure."""

import numpy as np
import pytest

from kt.figures import Series, steps_figure
from kt.figures.curves import NORM_RATIO
from kt.figures.layout import Grid, legend_rows

PANELS = ("edit success", "paraphrase", "locality", "portability")


def run(steps=4, ratio=1.5):
    x = [10 * (i + 1) for i in range(steps)]
    mean = np.linspace(1, 0.5, steps)
    panels = {p: Series(p, x, mean, mean - 0.1, mean + 0.1, np.array(x)) for p in PANELS}
    return panels | {NORM_RATIO: Series(NORM_RATIO, x, np.linspace(1, ratio, steps))}


def axes(figure):
    return [name for name in figure.to_plotly_json()["layout"] if name.startswith("yaxis")]


def test_one_panel_a_metric_and_the_norm_ratio_last():
    figure = steps_figure({"memit": run(), "memit + history": run(ratio=3)}, title="T")
    titles = [figure.layout[name].title.text for name in sorted(axes(figure), key=lambda n: int(n[5:] or 1))]
    assert [t.replace("<br>", " ") for t in titles] == [*PANELS, NORM_RATIO]
    tops = [figure.layout[name].range for name in sorted(axes(figure), key=lambda n: int(n[5:] or 1))]
    assert all(low <= 0 and high >= 1 for low, high in tops[:-1]) and tops[-1][0] > 0.5 and tops[-1][1] >= 3


def test_a_run_is_named_once_and_looks_the_same_in_every_panel():
    names = ["memit", "memit + history", "memit + norm guard", "memit + both"]
    figure = steps_figure({name: run() for name in names}, title="T")
    named = [t for t in figure.data if t.name in names and t.mode and "lines" in t.mode]
    assert [t.name for t in named if t.showlegend] == names
    looks = {name: {(t.line.color, t.line.dash, t.marker.symbol) for t in named if t.name == name} for name in names}
    assert all(len(look) == 1 for look in looks.values())
    assert len({next(iter(look)) for look in looks.values()}) == 4
    assert len({next(iter(look))[1:] for look in looks.values()}) == 4, "told apart by colour alone"


def test_names_are_inert_and_one_step_is_drawn():
    figure = steps_figure({"<script>": run(steps=1)}, title="<b>T</b>")
    assert "<script>" not in figure.to_json().replace("\\u003c", "<")
    assert len(figure.data) >= len(PANELS) + 1


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="no run"):
        steps_figure({}, title="T")


def lines(figure):
    return [t for t in figure.data if t.mode and "lines" in t.mode]


def test_the_norm_ratio_has_its_thin_line_at_1_and_the_metrics_at_0():
    figure = steps_figure({"memit": {NORM_RATIO: run()[NORM_RATIO], **run()}}, title="T")
    assert [shape.y0 for shape in figure.layout.shapes] == [0, 0, 0, 0, 1]
    tiny = {NORM_RATIO: Series("", [1, 2], [1, 1 + 1e-7])}
    low, high = steps_figure({"memit": tiny}, title="T").layout.yaxis.range
    assert high - low > 0.1, "rounding must not look like growth"


def test_a_value_outside_its_axis_or_without_a_number_stays_in_sight():
    odd = Series("", [1, 2, 3], [0.5, float("inf"), float("nan")], [-0.5, 0, 0], [1.5, 1, 1])
    low, high = steps_figure({"memit": {"loss": odd}}, title="T").layout.yaxis.range
    assert -1 < low < -0.5 and 1.5 < high < 2


def test_a_lone_step_shows_its_interval_and_runs_stand_side_by_side():
    figure = steps_figure({"a": run(steps=1), "b": run(steps=1)}, title="T")
    first, second = [t for t in lines(figure) if t.xaxis == "x"]
    assert first.x[0] < 10 < second.x[0] and first.x[0] + second.x[0] == pytest.approx(20)
    assert first.hovertext == (
        "<b>a</b>, edits so far 10<br>mean <b>1.0000</b><br>95% interval 0.9000 to 1.1000<br>n = 10",
    )
    assert [*first.error_y.array, *first.error_y.arrayminus] == pytest.approx([0.1, 0.1])


def test_only_points_without_a_neighbour_get_error_bars():
    nan = float("nan")
    gaps = Series("", range(4), [1, 1, nan, 1], [0, 0, nan, 0.5], [2, 2, nan, 1.25])
    (drawn,) = lines(steps_figure({"memit": {"loss": gaps}}, title="T"))
    assert list(drawn.error_y.array) == [None, None, None, 0.25]
    assert list(drawn.error_y.arrayminus) == [None, None, None, 0.5]
    assert lines(steps_figure({"memit": run()}, title="T"))[0].error_y.array is None


@pytest.mark.parametrize("panels", range(1, 10))
def test_panels_fill_rows_of_at_most_three_evenly_and_never_touch(panels):
    grid = Grid.of(panels, 3)
    assert grid.columns <= 3 and grid.columns * grid.rows - panels < grid.rows
    places = [grid.domains(place) for place in range(panels)]
    for (left, right), (bottom, top) in places:
        assert 0 <= left < right <= 1 and 0 <= bottom < top <= 1
    for place, ((left, right), (bottom, top)) in enumerate(places):
        for (left2, right2), (bottom2, top2) in places[:place]:
            assert right < left2 or right2 < left or top < bottom2 or top2 < bottom


def test_long_names_get_legend_rows_and_room_under_the_title():
    assert legend_rows(["memit", "memit + history", "memit + norm guard", "memit + both"], 800) == 1
    assert legend_rows(["x" * 80] * 3, 800) == 3
    short, long = (steps_figure({c * n: run() for c in "abc"}, title="T").layout.margin.t for n in (5, 80))
    assert long - short == 40
