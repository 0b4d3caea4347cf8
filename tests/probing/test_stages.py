"""The written rule on curves whose stages are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kt.probing.stages import chance, find_stages, no_stages, shortest_run

FACTS, LAYERS = 40, 20
SUBJECT, PREDICTION = 0, 1
ORIGINAL, TARGET = 0, 1


def curves(
    enriched=range(2, 6), extracted=range(8, 12), promoted=range(13, 17), noise=0.02, seed=0, target_enriched=False
):
    """Ranks and probabilities with gains in these layers only, and some noise."""
    rng = np.random.default_rng(seed)
    decades = np.full((FACTS, 2, LAYERS + 1, 2), 4.0)
    prob = np.full((FACTS, 2, LAYERS + 1, 2), 0.001)
    for layer in enriched:
        decades[:, SUBJECT, layer + 1 :, ORIGINAL] -= 0.3
        decades[:, SUBJECT, layer + 1 :, TARGET] -= 0.3 if target_enriched else 0.05
    for layer in extracted:
        decades[:, PREDICTION, layer + 1 :] -= 0.5
    for layer in promoted:
        prob[:, PREDICTION, layer + 1 :, ORIGINAL] += 0.1
    decades += rng.normal(0, noise, decades.shape)
    return np.round(10**decades).astype(np.int32), (prob + rng.normal(0, noise / 50, prob.shape)).astype(np.float32)


def test_the_stages_are_found_where_they_were_put():
    stages = find_stages(*curves())
    assert set(stages.enrichment.layers) <= {2, 3, 4, 5} and len(stages.enrichment.layers) == 4
    assert stages.extraction.layers == (8, 9, 10, 11)
    assert stages.promotion.layers == (13, 14, 15, 16)
    assert stages.enrichment.gain.mean == pytest.approx(4 * 0.25, abs=0.05)
    assert stages.extraction.gain.mean == pytest.approx(2.0, abs=0.05)
    assert stages.promotion.gain.mean == pytest.approx(0.4, abs=0.01)
    assert stages.layers_low is not None and len(stages.layers_low) == 4 and set(stages.layers_low) <= {2, 3, 4, 5}
    assert stages.layers_high is not None and len(stages.layers_high) == 2
    assert set(stages.layers_high) <= {13, 14, 15, 16}


def test_without_gains_there_are_no_stages_and_a_reason():
    stages = find_stages(*curves((), (), ()))
    for stage in stages[:3]:
        assert not stage.found and stage.layers == () and "not told apart from" in stage.reason
    assert stages.layers_low is None and stages.layers_high is None


def test_the_best_run_of_noise_is_no_stage_more_often_than_the_test_allows():
    found = [
        [stage.found for stage in find_stages(*curves((), (), (), seed=seed), n_boot=200)[:3]] for seed in range(60)
    ]
    assert np.mean(found, axis=0).max() <= 0.15  # 5% each, and the chance of 60 draws; without the test up to 75%


def test_chance_is_that_of_the_best_run_over_all_signs():
    gain = np.array([[1.0, 0.5, -0.2], [0.8, -0.1, 0.3], [0.2, 0.4, 0.1], [0.9, 0.1, -0.5]])
    runs = [(a, b) for a in range(3) for b in range(a + 1, 4)]

    def standing(values, run):
        sums = values[:, slice(*run)].sum(1)
        return sums.mean() / np.sqrt((sums**2).mean())

    flips = [np.array(signs)[:, None] * gain for signs in itertools.product([-1, 1], repeat=4)]
    for run in ((0, 2), (1, 2)):
        exact = np.mean([max(standing(f, r) for r in runs) >= standing(gain, run) - 1e-9 for f in flips])
        assert chance([gain], run, range(3)) == pytest.approx(exact, abs=0.03)


def test_small_steady_gains_are_found_beside_layers_where_facts_differ_widely():
    rank, prob = curves(enriched=())
    decades = np.random.default_rng(3).normal(0, 0.4, (FACTS, 1))
    rank[:, SUBJECT, 1:, TARGET] = rank[:, SUBJECT, 1:, TARGET] * 10**decades
    rank[:, SUBJECT, 6:, ORIGINAL] = rank[:, SUBJECT, 6:, ORIGINAL] // 2
    assert 5 in find_stages(rank, prob).enrichment.layers


def test_a_target_that_rises_as_well_is_no_enrichment():
    stages = find_stages(*curves(target_enriched=True))
    assert not stages.enrichment.found and stages.layers_low is None
    assert stages.promotion.found and stages.layers_high is not None


def test_a_target_that_falls_is_no_enrichment_of_the_original():
    rank, prob = curves(enriched=())
    rank[:, SUBJECT, 5:, TARGET] *= 10
    stage = find_stages(rank, prob).enrichment
    assert not stage.found and "original's own rise" in stage.reason


def test_enrichment_lies_in_the_lower_half():
    assert not find_stages(*curves(enriched=range(12, 16))).enrichment.found
    assert set(find_stages(*curves(enriched=range(7, 14))).enrichment.layers) <= {7, 8, 9}


def test_extraction_needs_both_answers():
    rank, prob = curves(extracted=())
    rank[:, PREDICTION, 9:, ORIGINAL] //= 10
    assert not find_stages(rank, prob).extraction.found


def test_promotion_does_not_begin_before_extraction():
    stages = find_stages(*curves(promoted=[3, 4, 14]))
    assert stages.promotion.layers == (14,)
    assert find_stages(*curves(extracted=(), promoted=[3, 4])).promotion.layers == (3, 4)


def test_high_layers_lie_above_the_low_ones():
    stages = find_stages(*curves(enriched=range(4, 8), extracted=range(2, 5), promoted=range(4, 9)))
    assert stages.layers_low is not None and stages.layers_high is not None
    assert min(stages.layers_high) > max(stages.layers_low)
    nothing = find_stages(*curves(enriched=range(4, 9), extracted=range(2, 4), promoted=range(4, 6)))
    assert nothing.promotion.found and nothing.layers_high is None


@pytest.mark.parametrize(
    ("gain", "among", "run"),
    [
        ([0, 1, 0, 0], range(4), (1, 2)),
        ([1, 0, 0, 1], range(4), (0, 4)),  # one alone has half of the best run's sum
        ([1, 0, 0, 1], range(1, 4), (3, 4)),
        ([1, 0, 0, 1], range(2), (0, 1)),
        ([5, 1, 5, -9, 7], range(5), (0, 3)),
        ([2, 2, 2, 2, 2], range(5), (0, 4)),  # four of five are exactly the share; the lowest of two
        ([3, -1, 3], range(3), (0, 3)),
        ([-1, 0, -2], range(3), None),
    ],
)
def test_the_shortest_run_with_its_share_of_the_best(gain, among, run):
    assert shortest_run(np.array(gain, dtype=float), among) == run


def test_stages_for_json():
    said = find_stages(*curves()).as_dict()
    assert said["extraction"]["layers"] == [8, 9, 10, 11] and said["extraction"]["gain"]["n"] == FACTS
    assert list(said) == ["enrichment", "extraction", "promotion", "layers_low", "layers_high"]
    empty = no_stages("why").as_dict()
    assert empty["promotion"] == {"layers": None, "gain": {"mean": None, "ci95": None, "n": 0}, "reason": "why"}


def test_the_same_curves_give_the_same_stages():
    assert find_stages(*curves()).as_dict() == find_stages(*curves()).as_dict()
