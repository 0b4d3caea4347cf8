"""The course of sequential edits as a figure."""

import numpy as np
import pytest

from kt.figures import Series, steps_figure
from kt.figures.steps import NORM_RATIO

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
