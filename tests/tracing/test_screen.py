"""The screen patches what the estimate ranks highest, and says how well the estimate ranks."""

import numpy as np
import pytest
from tracing_help import draws

import kt
from kt.errors import BadFact
from kt.tracing.screen import Screen, ranks_from_largest, screen, spearman

pytestmark = pytest.mark.filterwarnings("ignore:traced all the same")


@pytest.fixture(scope="module")
def demo():
    return kt.load("demo")


@pytest.fixture(scope="module")
def demo_screens(demo):
    """Five demo facts in both directions, with the whole exact map."""
    facts = kt.load_facts("demo", limit=5)
    return {way: screen(demo, facts, check=True, samples=3, direction=way) for way in ("denoise", "noise")}


def small(model, facts, **options):
    return screen(model, facts, noise=draws(model, facts), keep="all", **options)


def test_the_top_cells_hold_the_exact_numbers_and_the_others_none(qwen2, facts):
    found = small(qwen2, facts, top=4, kinds=("mlp", "hidden", "attn.h1"))
    exact = kt.causal_trace(qwen2, facts, kinds=found.estimate.kinds, noise=draws(qwen2, facts), keep="all")
    assert found.exact.n_facts == len(facts)
    for guess, held, truth in zip(found.estimate.facts, found.exact.facts, exact.facts, strict=True):
        patched = 0
        for kind in found.estimate.kinds:
            effect = held.effect(kind, "logit_diff")
            there = np.isfinite(effect)
            patched += there.sum()
            assert np.allclose(effect[there], truth.effect(kind, "logit_diff")[there], atol=1e-4)
        assert patched == 4
        sizes = np.concatenate([np.abs(guess.effect(k, "logit_diff")).ravel() for k in found.estimate.kinds])
        mine = found.checked[found.checked["fact"] == guess.index]
        assert np.allclose(np.sort(mine["estimate"].abs()), np.sort(sizes)[-4:])
        assert list(mine["rank"]) == [1, 2, 3, 4] and mine["exact"].notna().all()


def test_the_table_has_every_cell_once_in_its_place(qwen2, facts):
    found = small(qwen2, facts, top=3, check=True)
    table = found.to_dataframe()
    assert not table.duplicated(["fact", "kind", "layer", "token"]).any() and table["exact"].notna().all()
    for fact in found.exact.facts:
        for kind in found.exact.kinds:
            rows = table[(table["fact"] == fact.index) & (table["kind"] == kind)].set_index(["layer", "token"])
            for (layer, token), row in rows.iterrows():
                assert row["exact"] == fact.effect(kind, "logit_diff")[layer, token]
                assert row["role"] == fact.roles[token]


def test_the_metric_decides_what_is_patched(qwen2, facts):
    by_prob, by_logit = (small(qwen2, facts, top=2, metric=m).checked for m in ("prob", "logit_diff"))
    places = ["fact", "kind", "layer", "token"]
    assert set(by_prob["metric"]) == {"prob"}
    assert not by_prob[places].equals(by_logit[places])


def test_facts_left_out_by_the_estimate_are_left_out_by_the_patching(demo):
    facts = kt.load_facts("demo", limit=3)
    unknown = kt.Fact(facts[0].template, "Nobody At All", answer="zebra", foil="of")
    found = screen(demo, [unknown, *facts], top=2, samples=2)
    assert [f.index for f in found.estimate.facts] == [f.index for f in found.exact.facts] == [1, 2, 3]
    assert found.estimate.left_out == found.exact.left_out != ()


def test_estimates_on_the_demo_model_rank_cells_as_patching_does(demo_screens):
    """Measured: 0.98 denoising and about 0.8 noising, where the clean run is saturated."""
    denoise, noise = (demo_screens[way].correlation for way in ("denoise", "noise"))
    assert denoise.n == noise.n == 5
    assert denoise.mean > 0.9 and noise.mean > 0.5
    assert denoise.low <= denoise.mean <= denoise.high
    assert demo_screens["denoise"].recall.mean > 0.8


def test_the_estimate_is_cheaper_than_patching(demo_screens):
    for found in demo_screens.values():
        assert 0 < found.seconds["estimate"] < found.seconds["exact"]
        assert found.seconds["exact_top"] > 0


def test_noising_estimates_shrink_where_the_clean_run_is_sure(demo_screens):
    """Saturation: at the clean run the answer is certain, so its slope says less than what patching takes away."""
    table = demo_screens["noise"].to_dataframe()
    large = table[(table["kind"] == "attn") & (table["exact"] > 0.5)]
    assert len(large) >= 3
    assert (large["estimate"].abs() < 0.5 * large["exact"]).all()


def test_without_a_check_there_is_no_whole_map_to_correlate_with(qwen2, facts):
    found = small(qwen2, facts, top=5)
    assert found.correlation is None and found.recall is None and found.seconds["exact"] is None
    assert found.correlation_checked.n == len(facts)
    assert "exact map not asked for" in repr(found)


def test_correlations_are_those_of_the_ranks(demo_screens):
    table = demo_screens["denoise"].to_dataframe()
    means = []
    for _, one in table.groupby("fact"):
        one = one[(one["estimate"] != 0) | (one["exact"] != 0)]
        means.append(np.corrcoef(one["estimate"].rank(), one["exact"].rank())[0, 1])
    assert demo_screens["denoise"].correlation.mean == pytest.approx(np.mean(means), abs=1e-12)
    by_kind = {kind: demo_screens["denoise"].correlation_of(kind) for kind in ("mlp", "attn")}
    assert all(found.n == 5 for found in by_kind.values())


def test_spearman_leaves_out_cells_that_are_zero_or_missing_in_both():
    nan = float("nan")
    assert spearman(np.array([0, 0, 0, 1, 2, 3.0]), np.array([0, 0, 0, 3, 2, 1.0])) == pytest.approx(-1)
    assert spearman(np.array([5, 1, 2, 3.0]), np.array([nan, 1, 4, 9.0])) == pytest.approx(1)
    assert spearman(np.array([1, 1, 2.0]), np.array([1, 2, 2.0])) == pytest.approx(0.5)
    assert np.isnan(spearman(np.array([1, 1, 1.0]), np.array([1, 2, 3.0])))
    assert np.isnan(spearman(np.array([1, 2.0]), np.array([1, 2.0])))


def test_ranks_begin_with_the_largest_size_and_keep_ties_in_order():
    assert list(ranks_from_largest(np.array([0.5, -3, 0.5, 1]))) == [3, 1, 4, 2]


def test_the_same_seed_gives_the_same_screen(demo):
    facts = kt.load_facts("demo", limit=2)
    one, two = (screen(demo, facts, top=3, samples=2, seed=7) for _ in range(2))
    assert one.to_dataframe().equals(two.to_dataframe())


def test_the_figure_shows_every_cell_that_was_patched_and_the_diagonal(demo_screens):
    found = demo_screens["denoise"]
    figure = found.figure()
    table = found.to_dataframe()
    moved = table[(table["estimate"] != 0) | (table["exact"] != 0)]
    diagonal, *kinds = figure.data
    assert diagonal.x == diagonal.y
    assert sum(len(trace.x) for trace in kinds) == len(moved)
    mlp = moved[moved["kind"] == "mlp"]
    assert np.allclose(kinds[0].x, mlp["exact"]) and np.allclose(kinds[0].y, mlp["estimate"])
    assert "Spearman over all cells 0.9" in figure.layout.title.text
    assert "<p>Screen(demo" in found._repr_html_()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top is 0; give at least 1"),
        ({"metric": "rank"}, "choose among prob, logit_diff"),
        ({"method": "exact"}, "screen sets method itself"),
        ({"only": []}, "screen sets only itself"),
        ({"kinds": ("hidden-no-attn",)}, "severed"),
        ({"kinds": ("attn.h9",)}, "heads 0 to 3"),
        ({"direction": "up"}, "choose among denoise, noise"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(qwen2, facts, options, message):
    with pytest.raises(kt.KtError, match=message) as caught:
        screen(qwen2, facts, keep="all", **options)
    assert "\n" not in str(caught.value)


def test_a_screen_is_frozen(demo_screens):
    assert isinstance(demo_screens["noise"], Screen)
    with pytest.raises(AttributeError):
        demo_screens["noise"].top = 3
    with pytest.raises(BadFact, match="trace again"):
        demo_screens["noise"].correlation_of("hidden")
