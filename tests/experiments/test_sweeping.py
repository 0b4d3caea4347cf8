"""Sweeps on a tiny model: rescaled paths are solved paths, points are kept, a sweep goes on to the same rows."""

import html
import json
import random
import re
from dataclasses import replace

import pytest
import torch
from chat_templates import TEMPLATES, tokenizer_of
from families import TEXTS, tiny_model

import kt
from kt.editing import METHODS, key_statistics
from kt.errors import BadFile, KtError
from kt.experiments import Point, Sweep, alpha_points, edit_points, layer_points, module_points
from kt.experiments import sweep as running
from kt.experiments import sweep_result as show
from kt.experiments.sweep import sweep
from kt.experiments.sweep_solving import Solver
from kt.facts.corpus import Corpus
from kt.facts.fact import Fact, Prompt
from kt.model.sites import Kind, Site

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|of the wanted change)")
NEAR = (Prompt("The capital of Italy is", "Rome"),)
FACTS = [
    Fact("The mother tongue of {}", "Danielle Darrieux", "French", target="Italy", id="a", neighbours=NEAR),
    Fact("The city of the {}", "Space Needle", "Seattle", target="Warsaw", id="b", neighbours=NEAR),
    Fact("The profession of {}", "Marie Curie", "physicist", target="chemist", id="c", neighbours=NEAR),
]
FAST = dict(
    layers_mlp=(0, 1), layers_attn=(0, 1), v_num_grad_steps=6, v_lr=0.3, clamp_norm_factor=20.0,
    v_weight_decay=1e-4, mom2_update_weight=0.01,
)  # fmt: skip
OF_MLP = {name: value for name, value in FAST.items() if name != "layers_attn"}
SOME = (0.0, 0.4, 1.0)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def moments(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    drawn, words = random.Random(0), " ".join(TEXTS).split()
    (folder / "corpus.txt").write_text("\n".join(" ".join(drawn.choices(words, k=20)) for _ in range(100)))
    sites = [Site(k, layer) for k in (Kind.ATTN, Kind.MLP) for layer in range(model.n_layers)]
    return key_statistics(model, sites, Corpus.open(folder / "corpus.txt"), 1500, folder)


def swept(model, moments, points, **more):
    before = model.fingerprint()
    found = sweep(model, FACTS, points, **({"generate": False, "statistics": moments} | more))
    assert model.fingerprint() == before, "the sweep left a trace in the model"
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.85, 1.0])
def test_rescaled_paths_equal_a_solve_of_its_own(model, moments, alpha):
    points = alpha_points((0.5, alpha), **FAST)
    solver = Solver(model, [p.options for p in points], moments)
    solver.edit(FACTS, points[0].options, 0, None)
    solves = len(solver._paths)
    got = solver.edit(FACTS, points[1].options, 0, None)
    assert len(solver._paths) == solves == 2, "another α needs no other solve"
    want = kt.edit(model, FACTS, method="intattn", alpha=alpha, statistics=moments, **FAST)
    assert set(got.names) == set(want.names)
    for name in want.names:
        scale = want.delta(name).abs().max()
        assert (got.delta(name) - want.delta(name)).abs().max() <= 1e-6 * scale
    pair = (got.control(), want.control())
    assert (pair[0] is None) == (pair[1] is None) and (pair[0] is None or set(pair[0].names) == set(pair[1].names))


def test_a_rescaled_joint_edit_says_what_was_chosen_for_both_paths(model, moments):
    options = FAST | {"mom2_update_weight": "auto"}
    (point,) = alpha_points((0.3,), **options)
    got = Solver(model, [point.options], moments).edit(FACTS, point.options, 0, None)
    want = kt.edit(model, FACTS, method="intattn", alpha=0.3, statistics=moments, **options)
    assert got.manifest["chosen"] == want.manifest["chosen"] and set(got.manifest["chosen"]) == set(got.names)


@pytest.mark.parametrize("changes", [{"coupled": True}, {"joint_targets": True}, {"method": "intattn-rome"}])
def test_paths_that_see_each_other_are_solved_for_each_alpha(model, moments, changes):
    options = dict(method="intattn") | FAST | changes | {"alpha": 0.4}
    options = {n: v for n, v in options.items() if n in METHODS[options["method"]].settings() or n == "method"}
    solver = Solver(model, [options], moments)
    got = solver.edit(FACTS, options, 0, None)
    assert not solver._paths
    want = kt.edit(model, FACTS, statistics=moments, **options)
    assert all(torch.equal(got.delta(name), want.delta(name)) for name in want.names)


def test_other_attention_layers_do_not_solve_the_mlp_again(model, moments):
    points = layer_points(((0,), (1,), (0, 1)), alpha=0.5, **OF_MLP)
    solver = Solver(model, [p.options for p in points], moments)
    edits = [solver.edit(FACTS, p.options, 0, None) for p in points]
    assert len(solver._paths) == 4, "one MLP path and three of attention"
    mlp = [n for n in edits[0].names if "mlp" in n]
    assert all(torch.equal(edits[0].delta(n), edit.delta(n)) for edit in edits for n in mlp)
    assert [len(edit.names) - len(mlp) for edit in edits] == [1, 1, 2]


def test_a_row_is_the_score_of_its_edit(model, moments):
    found = swept(model, moments, alpha_points(SOME, **FAST), kind="alpha")
    before = kt.evaluate(model, FACTS, generate=False)
    edit = kt.edit(model, FACTS, method="intattn", alpha=0.4, statistics=moments, **FAST)
    with edit.applied(model):
        after = kt.evaluate(model, FACTS, before=before, generate=False)
    row = found.row("0.4")
    for name, values in after.values.items():
        assert row.values[name] == pytest.approx(values, abs=1e-5), name
    assert row.metrics["target_prob_tf"]["n"] == row.n == row.edits == 3
    assert row.metrics["target_prob_tf"]["ci95"] is not None
    assert "neighbourhood_same_argmax" in found.about["protocol"]
    assert found.before["target_prob_tf"]["mean"] != row.metrics["target_prob_tf"]["mean"]


def test_a_point_takes_the_first_facts_only(model, moments):
    found = swept(model, moments, edit_points((1, 3), ["memit"], OF_MLP), kind="edits")
    assert [list(row.values["target_prob_tf"]) for row in found.rows] == [["a"], ["a", "b", "c"]]
    with pytest.raises(KtError, match="edits 9 facts, and there are 3"):
        swept(model, moments, edit_points((9,), ["memit"], OF_MLP))


def test_an_interrupted_sweep_goes_on_to_the_same_rows(model, moments, tmp_path, monkeypatch):
    points = alpha_points(SOME, **FAST)
    whole = swept(model, moments, points, kind="alpha", folder=tmp_path / "whole")
    measure, calls = running._measure, []

    def dies(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(running, "_measure", dies)
    with pytest.raises(KeyboardInterrupt):
        swept(model, moments, points, kind="alpha", folder=tmp_path / "cut")
    assert len(list((tmp_path / "cut" / "points").iterdir())) == 2
    again = swept(model, moments, points, kind="alpha", folder=tmp_path / "cut", resume=True)
    assert len(calls) == 4, "finished points are not solved again"
    assert again.rows == whole.rows and again.before == whole.before
    kept = [sorted((tmp_path / name / "points").iterdir()) for name in ("whole", "cut")]
    for one, other in zip(*kept, strict=True):
        assert _without_seconds(one) == _without_seconds(other)


def _without_seconds(path):
    return {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": (1,)}, r"begun with seeds \[0\], now it is \[1\]"),
        ({"kind": "clamp"}, "begun with kind alpha, now it is clamp"),
        ({"points": alpha_points((0.0, 0.5), **FAST)}, "begun with points"),
    ],
)
def test_a_changed_setting_is_refused_in_one_line(model, moments, tmp_path, changes, words):
    given = {"points": alpha_points((0.0, 0.4), **FAST), "kind": "alpha", "folder": tmp_path / "run"}
    swept(model, moments, **given)
    with pytest.raises(KtError, match=words) as error:
        swept(model, moments, **(given | {"resume": True} | changes))
    assert "\n" not in str(error.value)


def test_other_facts_are_refused_and_so_is_a_folder_in_use(model, moments, tmp_path):
    points = alpha_points((0.0,), **FAST)
    swept(model, moments, points, folder=tmp_path / "run")
    with pytest.raises(KtError, match="holds a sweep already"):
        swept(model, moments, points, folder=tmp_path / "run")
    with pytest.raises(KtError, match="begun with facts"):
        sweep(model, FACTS[:2], points, statistics=moments, generate=False, folder=tmp_path / "run", resume=True)
    with pytest.raises(KtError, match="no sweep to go on with"):
        swept(model, moments, points, folder=tmp_path / "nothing", resume=True)


def test_a_sweep_that_fails_at_once_leaves_nothing(model, moments, tmp_path):
    with pytest.raises(KtError, match="unknown"):
        swept(model, moments, [Point("x", 0, {"method": "memit", "nonsense": 1})], folder=tmp_path / "run")
    with pytest.raises(KtError, match="the grid is empty"):
        swept(model, moments, [], folder=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_seeds_are_averaged_within_records(model, moments):
    point = [Point("x", 0, {"method": "memit", **OF_MLP}, "memit")]
    one, two = (swept(model, moments, point, seeds=(seed,)).rows[0] for seed in (0, 1))
    both = swept(model, moments, point, seeds=(0, 1)).rows[0]
    name = "target_prob_tf"
    assert one.values[name] != two.values[name], "the prefixes come from the seed"
    for record in "abc":
        mean = (one.values[name][record] + two.values[name][record]) / 2
        assert both.values[name][record] == pytest.approx(mean, abs=1e-6)
    assert both.metrics[name]["n"] == 3


ALL = ("tf", "gen", "prob", "wild", "ppl")


def test_a_sweep_asks_under_the_protocols_that_it_is_given(model, moments, tmp_path):
    text = tmp_path / "heldout.txt"
    text.write_text("The capital of Italy is Rome.\nMarie Curie was a physicist.\n")
    point = [Point("x", 0, {"method": "memit", **OF_MLP}, "memit")]
    found = swept(model, moments, point, protocols=ALL, heldout=text)
    shown = show.columns(found)
    assert set(shown) >= {"edit success", "P(new) > P(old)", "free answer", "perplexity", "fluency (bits)"}
    titles = {html.unescape(axis.title.text).replace("<br>", " ") for axis in found.figure().select_yaxes()}
    assert titles == set(shown)
    said = " ".join(re.sub("<[^>]+>", " ", found.figure().layout.title.text).split())
    assert "portability: teacher-forced; perplexity: over documents" in said
    parts = [table.headers[2:-2] for table in found.tables()]
    assert {name for part in parts for name in part} == set(shown) and max(map(len, parts)) <= 5
    edit = kt.edit(model, FACTS, statistics=moments, **point[0].options)
    with edit.applied(model):
        ppl = kt.evaluate(model, FACTS, protocols=("ppl",), heldout=text).metrics["perplexity_heldout"]
    row = found.rows[0].metrics["perplexity_heldout"]
    assert row["mean"] == pytest.approx(ppl.mean, rel=1e-4) and row["n"] == 2


@pytest.mark.parametrize(
    ("protocols", "panels"),
    [
        (("tf", "gen"), {"edit success", "paraphrase", "locality", "fluency (bits)"}),
        (("tf",), {"edit success", "paraphrase", "locality"}),
        (("gen",), {"greedy text", "greedy text, rephrased", "fluency (bits)"}),
        (("prob",), {"P(new) > P(old)", "P(new) > P(old), rephrased", "P(own) > P(new), neighbours"}),
    ],
)
def test_the_panels_are_those_of_the_protocols(model, moments, protocols, panels):
    facts = [replace(fact, rephrasings=("They say of {} that",)) for fact in FACTS]
    point = [Point("x", 0, {"method": "memit", **OF_MLP}, "memit")]
    found = sweep(model, facts, point, protocols=protocols, statistics=moments)
    assert set(show.columns(found)) == panels
    assert ("teacher-forced" in found.figure().layout.title.text) == ("tf" in protocols or panels <= set(show.SHOWN))


def test_points_solved_with_a_fixed_ridge_are_not_gone_on_with_under_an_automatic_one(model, moments, tmp_path):
    given = {"points": alpha_points((0.0,), **FAST | {"mom2_update_weight": "auto"}), "folder": tmp_path / "run"}
    first = swept(model, moments, **given)
    assert swept(model, moments, **given, resume=True).rows == first.rows
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings.pop("ridges") == "auto"
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))  # as a kt without automatic ones wrote it
    with pytest.raises(KtError, match="begun with ridges None, now it is auto"):
        swept(model, moments, **given, resume=True)


def test_protocols_are_settings_in_any_order_and_text_is_one_by_its_bytes(model, moments, tmp_path):
    text = tmp_path / "heldout.txt"
    text.write_text("The capital of Italy is Rome.\n")
    given = {"points": alpha_points((0.0,), **FAST), "folder": tmp_path / "run", "heldout": text}
    first = swept(model, moments, **given, protocols=("tf", "ppl"))
    assert swept(model, moments, **given, protocols=("ppl", "tf", "tf"), resume=True).rows == first.rows
    with pytest.raises(KtError, match=r"begun with protocols \['tf', 'ppl'\], now it is \['tf', 'prob', 'ppl'\]"):
        swept(model, moments, **given, protocols=("tf", "ppl", "prob"), resume=True)
    text.write_text("The capital of Italy is Milan.\n")
    with pytest.raises(KtError, match="begun with heldout"):
        swept(model, moments, **given, protocols=("tf", "ppl"), resume=True)


def test_an_unknown_protocol_leaves_nothing(model, moments, tmp_path):
    for protocols in (("tf", "x"), ()):
        with pytest.raises(KtError, match="choose among tf, gen, prob, wild, mello, ppl"):
            swept(model, moments, alpha_points((0.0,), **FAST), protocols=protocols, folder=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_documents_loss_is_its_mean_over_seeds(model, moments, tmp_path):
    text = tmp_path / "heldout.txt"
    text.write_text("The capital of Italy is Rome.\n")
    point = [Point("x", 0, {"method": "memit", **OF_MLP}, "memit")]
    ask = {"protocols": ("ppl",), "heldout": text}
    means = [swept(model, moments, point, seeds=s, **ask).rows[0].metrics for s in ((0,), (1,), (0, 1))]
    one, two, both = (metrics["perplexity_heldout"]["mean"] for metrics in means)
    assert one != two and both == pytest.approx((one * two) ** 0.5, rel=1e-6)


def test_modules_carry_paired_differences_with_n(model, moments):
    found = swept(model, moments, module_points(0.4, **FAST), kind="modules")
    difference = found.differences()["joint - MLP only"]["target_prob_tf"]
    means = [found.row(name).metrics["target_prob_tf"]["mean"] for name in ("joint", "MLP only")]
    assert difference.mean == pytest.approx(means[0] - means[1]) and difference.n == 3 and difference.ci95 is not None
    part = found.row("MLP part of joint").metrics["target_prob_tf"]["mean"]
    assert part != means[0] and part != means[1]
    assert set(found.differences()) == {"joint - MLP only", "joint - attention only", "joint - MLP part of joint"}


def test_a_sweep_is_drawn_tabled_and_kept(model, moments, tmp_path):
    points = edit_points((1, 3), ["memit", "jeep"], OF_MLP | {"layers_high": (2,)})
    found = swept(model, moments, points, kind="edits")
    again = Sweep.load(found.save(tmp_path / "sweep.json"))
    assert again.rows == found.rows and again.as_dict() == found.as_dict()
    frame = found.to_dataframe()
    assert set(frame["series"]) == {"memit", "jeep"} and set(frame["x"]) == {1, 3}
    assert {t.name for t in again.figure().data if t.name} >= {"memit", "jeep"}
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(BadFile, match="not a sweep"):
        Sweep.load(tmp_path / "x.json")
    with pytest.raises(KtError, match="has no point '7'"):
        found.row("7")


def test_points_of_an_older_kt_are_not_gone_on_with_where_a_question_lacks_its_mark_in_a_chat_template():
    plain = tiny_model("llama", tokenizer=tokenizer_of(TEMPLATES["qwen 2.5"]), vocab_size=512)
    asking, others = Fact("Which city is the capital of {}", "Chile"), Fact("Which city is {}?", "Oslo")
    about = (others, Fact("The capital of {} is", "Peru", rephrasings=("{}: which city?",)))

    def noted(model, *facts):
        return set(running.identity_of(model, facts, [0], None, "auto", None))

    chatting = plain.asked("always")
    assert noted(plain, asking) == noted(plain, *about)
    assert noted(chatting, *about) < noted(chatting, asking, *about)
    assert noted(chatting, *about) < noted(chatting, replace(others, rephrasings=("Which city is {}",)))
