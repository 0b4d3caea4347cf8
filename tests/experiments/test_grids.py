"""The grids are those of the papers, and refuse what makes no sense."""

import pytest

from kt.errors import KtError
from kt.experiments import alpha_points, clamp_points, distinct, edit_counts, edit_points, layer_points, module_points
from kt.facts.fact import Fact


def test_the_number_of_edits_follows_jeeps_log_scale():
    """003, footnote 1: m_i = exp(ln(10,000) i / 16)."""
    assert edit_counts(10_000) == (
        1, 2, 3, 6, 10, 18, 32, 56, 100, 178, 316, 562, 1000, 1778, 3162, 5623, 10_000
    )  # fmt: skip


def test_a_short_scale_names_each_number_once():
    assert edit_counts(3) == (1, 2, 3)
    assert edit_counts(1) == (1,)


def test_the_sets_of_attention_layers_are_those_of_the_ablation():
    assert [p.options["layers_attn"] for p in layer_points()] == [(1, 2), (2, 3), (3, 4), (2, 3, 4), (1, 2, 3, 4, 5)]
    assert [p.label for p in layer_points()] == ["1-2", "2-3", "3-4", "2-4", "1-5"]


def test_the_high_region_is_jeeps_and_the_low_one_everybodys():
    assert clamp_points((0.5,))[0].options == {"method": "jeep", "clamp_norm_factor_high": 0.5}
    assert clamp_points((0.5,), "memit", "low")[0].options == {"method": "memit", "clamp_norm_factor": 0.5}


def test_modules_are_both_ends_the_joint_edit_and_its_control():
    points = module_points(0.3)
    assert [(p.label, p.options["alpha"], p.control) for p in points] == [
        ("MLP only", 0.0, False),
        ("attention only", 1.0, False),
        ("joint", 0.3, False),
        ("MLP part of joint", 0.3, True),
    ]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: alpha_points((0.5, 1.2)), "1.2 must lie between 0"),
        (lambda: alpha_points((0.5, 0.5)), "names 0.5 twice"),
        (lambda: layer_points(((1, 2), ())), "empty"),
        (lambda: layer_points(((1, 2),), "embedding"), "choose attn or mlp"),
        (lambda: edit_points((0,), ["memit"]), "0 edits"),
        (lambda: edit_counts(0), "at least 1"),
        (lambda: clamp_points((0.0,)), "above 0"),
        (lambda: clamp_points((0.5,), "memit", "high"), "memit has no high region"),
        (lambda: clamp_points((0.5,), region="middle"), "choose low or high"),
        (lambda: module_points(0.0), "leaves one module out"),
    ],
)
def test_a_grid_without_sense_is_one_line(make, words):
    with pytest.raises(KtError, match=words):
        make()


def test_what_cannot_stand_in_one_batch_is_left_out_and_counted():
    facts = [
        Fact("The capital of {} is", "France", "Paris", target="Rome", id="a"),
        Fact("The capital  of {} is", "France", "Paris", target="Bonn", id="b"),
        Fact("The capital of {} is", "Italy", "Rome", id="c"),
        Fact("The capital of {} is", "Spain", "Madrid", foil="Oslo", id="d"),
    ]
    with pytest.warns(UserWarning, match="2 of 4 records are left out: 1 without a new target, 1 with the prompt"):
        kept = distinct(facts)
    assert [(f.id, f.target) for f in kept] == [("a", "Rome"), ("d", "Oslo")]
    with pytest.raises(KtError, match="no record can be edited"), pytest.warns(UserWarning):
        distinct(facts[2:3])
