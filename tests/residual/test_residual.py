"""The residual score: its arithmetic on known ranks, and what it says of edits whose outcome is known."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import tiny_model

import kt
import kt.model.tokens
from kt.errors import BadFact, BadFile, WorkFailed
from kt.model.update import LowRank
from kt.probing import contrast_probe
from kt.probing.controls import Control
from kt.probing.lens import KINDS, POSITIONS, LensReading
from kt.probing.questions import ProbedFact
from kt.probing.stages import advantage, in_top, leading, mean_visibility, visibility
from kt.residual.attacks import MEASURES, PROMPT, Attacks
from kt.residual.run import NO_CONTROLS, residual_fact
from kt.residual.score import Residual
from kt.stats import bootstrap_ratio

VOCAB, LAYERS, N = 1000, 2, 12
RESID, ATTN, MLP = (KINDS.index(k) for k in ("resid", "attn", "mlp"))
PREDICTION = POSITIONS.index("prediction")


# The arithmetic --------------------------------------------------------------------------------------------------
def test_visibility_is_1_at_the_top_and_0_at_the_bottom():
    assert visibility(np.array([0, VOCAB - 1]), VOCAB).tolist() == pytest.approx([1, 0], abs=1e-12)
    assert visibility(np.array([9, -1]), VOCAB).tolist() == pytest.approx([2 / 3, np.nan], nan_ok=True)


def test_advantage_is_over_the_controls_that_there_are():
    rank = np.array([[0, 5, 9, 99, -1], [0, 5, -1, -1, -1]])
    assert advantage(rank, VOCAB).tolist() == pytest.approx([1 - (2 / 3 + 1 / 3) / 2, np.nan], nan_ok=True)
    assert np.isnan(mean_visibility(rank[1:, 2:], VOCAB)).all()


def test_cells_are_those_whose_interval_lies_above_zero():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(40, 1))
    values = np.concatenate([noise + 2, noise - noise.mean() + 0.05, noise - 2], 1)
    assert leading(values).tolist() == [True, False, False]
    assert leading(np.full((3, 1), np.nan)).tolist() == [False]
    assert leading(np.array([[0.1, -0.1]])).tolist() == [True, False]  # a single fact


def test_the_ratio_is_that_of_the_means_and_its_interval_resamples_pairs():
    rng = np.random.default_rng(1)
    bottom = rng.uniform(1, 9, 30)
    assert bootstrap_ratio(bottom / 2, bottom) == pytest.approx((0.5, 0.5, 0.5, 30))
    found = bootstrap_ratio(bottom + rng.normal(size=30), bottom)
    assert found.low < found.mean < found.high
    assert found.high - found.low < 0.3
    assert bootstrap_ratio(np.array([1.0, np.nan, 3]), np.array([2.0, 2, np.nan])).n == 1


def test_a_ratio_to_what_may_be_nothing_has_no_interval():
    shaky = bootstrap_ratio(np.ones(4), np.array([5.0, -4, 3, -3]))
    assert np.isfinite(shaky.mean)
    assert shaky.ci95 is None
    assert np.isnan(bootstrap_ratio(np.ones(2), np.array([1.0, -2])).mean)
    assert bootstrap_ratio(np.ones(0), np.ones(0)).n == 0


def test_the_top_ten_in_any_layer_counts_controls_as_a_share():
    rank = np.full((1, 2, 3, LAYERS, 5), 500)
    rank[..., 4] = -1
    rank[0, 0, 0, 1, 0] = 9
    rank[0, 0, 0, 0, 1] = 10
    rank[0, 0, 0, 1, 2] = 0
    assert in_top(rank)[0, 0, 0].tolist() == [1, 0, 0.5]
    assert in_top(rank)[0, 1, 2].tolist() == [0, 0, 0]


# A residual made of known ranks ----------------------------------------------------------------------------------
def made(after, n=N, controls=2, seed=0):
    """Old answers of rank 9 at the prediction position (99 elsewhere, like their controls); `after` changes them."""
    rng = np.random.default_rng(seed)
    before = np.full((n, 2, 3, LAYERS, 10), 99, dtype=np.int32)
    before[..., 2 + controls :] = -1
    before[:, PREDICTION, :, 1, 0] = rng.integers(8, 11, size=(n, 3))
    now = before.copy()
    after(now)
    readings = {s: _reading(rank) for s, rank in (("before", before), ("after", now))}
    facts = tuple(
        ProbedFact(i, f"f{i}", "r", f"prompt {i} {seed}", "s", "old", 5, "given", "new", 6, "target") for i in range(n)
    )
    attacks = np.zeros((n, 1, 2, len(MEASURES)))
    about = {
        "model": "made",
        "vocab": VOCAB,
        "n_layers": LAYERS,
        "seed": 0,
        "n_boot": 500,
        "n_given": n,
        "warnings": [],
    }
    names = tuple((Control("c", 7), Control("d", 8)) for _ in facts)
    elsewhere = np.zeros((n, 2, 3, LAYERS))
    return Residual(facts, names, (0, 1), readings, elsewhere, Attacks((PROMPT,), attacks, attacks), (), about)


def _reading(rank):
    start = rank[:, :, 0, 0]
    prob = np.where(rank < 0, np.nan, 1 / (2.0 + rank)).astype(np.float32)
    return LensReading(prob, rank, prob[:, :, 0, 0], start, None)


def unchanged(rank):
    """An edit that does nothing."""


def to_controls(rank):
    rank[:, PREDICTION, :, 1, 0] = 99


def halfway(rank):
    """From visibility about 2/3 to 1/2, where the controls have 1/3."""
    rank[:, PREDICTION, :, 1, 0] = 31


def below(rank):
    rank[:, PREDICTION, RESID, 1, 0] = 999


def attention_keeps(rank):
    rank[:, PREDICTION, (RESID, MLP), 1, 0] = 99


def test_an_edit_that_changes_nothing_leaves_1_and_one_that_levels_the_old_answer_leaves_0():
    assert made(unchanged).score == pytest.approx((1, 1, 1, N))
    assert made(to_controls).score == pytest.approx((0, 0, 0, N), abs=1e-12)
    assert made(halfway).score.mean == pytest.approx(0.5, abs=0.03)
    assert made(below).score.mean == pytest.approx(-1, abs=0.05)


def test_only_cells_where_the_unedited_old_answer_leads_count():
    def lead_elsewhere(rank):
        halfway(rank)
        rank[:, :, :, 0, 0] = 0

    assert made(lead_elsewhere).score == made(halfway).score
    assert made(halfway).by_kind["resid"]["both"].cells == (("prediction", 1),)
    assert made(halfway).by_kind["resid"]["subject_last"].cells == ()
    assert np.isnan(made(halfway).by_kind["resid"]["subject_last"].score.mean)


def test_without_any_lead_before_there_is_no_score():
    blank = made(unchanged)
    flat = replace(blank, readings={s: _reading(np.where(r.rank < 0, -1, 99)) for s, r in blank.readings.items()})
    assert np.isnan(flat.score.mean)
    assert flat.score.n == N
    assert flat.carrier is None
    assert flat.as_dict()["residual_score"]["mean"] is None


def test_the_carrier_is_the_module_with_the_most_that_is_left():
    carrier = made(attention_keeps).carrier
    assert (carrier.kind, carrier.position) == ("attn", "prediction")
    assert carrier.remaining.mean == pytest.approx(1 / 3, abs=0.02)
    assert carrier.lead.mean == pytest.approx(carrier.remaining.mean)
    assert carrier.lead.low > 0
    kinds = made(attention_keeps).by_kind
    assert [kinds[k]["both"].score.mean for k in ("attn", "mlp")] == pytest.approx([1, 0], abs=1e-12)


def test_the_floor_reads_the_same_cells_where_the_prompt_is_about_others():
    residual = made(unchanged)
    lead = residual.advantages["before"]
    assert replace(residual, elsewhere=0.25 * lead).floor.mean == pytest.approx(0.25)
    assert replace(residual, elsewhere=0.25 * lead).above_floor == pytest.approx((0.75, 0.75, 0.75, N))
    missing = np.where(np.arange(N)[:, None, None, None] < 2, np.nan, 0.25 * lead)
    assert replace(residual, elsewhere=missing).floor.n == N - 2
    assert np.isnan(replace(residual, elsewhere=np.full_like(lead, np.nan)).floor.mean)


def test_the_difference_of_scores_is_paired():
    kept, gone, half = made(unchanged), made(to_controls), made(halfway)
    assert kept.difference(gone) == pytest.approx((1, 1, 1, N))
    assert half.difference(half) == pytest.approx((0, 0, 0, N))
    found = half.difference(gone)
    assert found.mean == pytest.approx(half.score.mean - gone.score.mean)
    assert found.high - found.low < 0.1
    assert made(attention_keeps).difference(gone, "attn").mean == pytest.approx(1)
    assert made(attention_keeps).difference(gone, "mlp").mean == pytest.approx(0)
    with pytest.raises(BadFact, match="unknown"):
        kept.difference(gone, "hidden")
    with pytest.raises(BadFact, match="same facts"):
        kept.difference(made(unchanged, seed=1))


def test_a_fact_that_stands_twice_or_cannot_be_told_apart_counts_once_or_not():
    residual = made(halfway)
    facts = list(residual.facts)
    facts[1] = replace(facts[0], index=1)
    facts[2] = replace(facts[2], target_id=facts[2].original_id)
    controls = (*residual.controls[:-1], ())
    changed = replace(residual, facts=tuple(facts), controls=controls)
    assert changed.score.n == N - 3
    assert changed.in_top["resid"]["prediction"]["before"]["original"].n == N - 2


def test_in_top_has_old_new_and_controls_before_and_after():
    found = made(to_controls).in_top["resid"]["prediction"]
    expected = float((made(to_controls).readings["before"].rank[:, PREDICTION, RESID, 1, 0] < 10).mean())
    assert 0 < expected < 1
    assert found["before"]["original"].mean == pytest.approx(expected)
    assert found["after"]["original"].mean == 0
    assert found["before"]["control"].mean == 0


def test_residuals_of_different_facts_join_and_those_of_the_same_do_not():
    a, b = made(halfway), made(to_controls, seed=1)
    both = Residual.joined([a, b])
    assert both.score.n == 2 * N
    assert [f.index for f in both.facts] == list(range(2 * N))
    assert a.score.mean > both.score.mean > b.score.mean
    with pytest.raises(BadFact, match="twice"):
        Residual.joined([a, a])
    with pytest.raises(BadFact, match="seed"):
        Residual.joined([a, replace(b, metadata=b.metadata | {"seed": 1})])
    with pytest.raises(BadFact, match="at least one"):
        Residual.joined([])


def test_a_saved_residual_says_the_same_and_its_bytes_are_the_same(tmp_path):
    residual = made(halfway)
    path = residual.save(tmp_path / "residual.safetensors")
    loaded = Residual.load(path)
    assert loaded.as_dict() == residual.as_dict()
    assert loaded.facts == residual.facts
    assert loaded.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_file_that_is_no_whole_residual_is_one_line(tmp_path):
    from kt._util.data import load_arrays, save_arrays

    path = made(halfway).save(tmp_path / "residual.safetensors")
    arrays, header = load_arrays(path)
    torn = save_arrays(tmp_path / "torn", {n: a for n, a in arrays.items() if n != "after.rank"}, header)
    short = save_arrays(tmp_path / "short", arrays | {"after.rank": arrays["after.rank"][:3]}, header)
    foreign = save_arrays(tmp_path / "foreign", arrays, header | {"kind": "trace"})
    (tmp_path / "cut").write_bytes(path.read_bytes()[:99])
    for bad in (torn, short, foreign, tmp_path / "cut", tmp_path / "absent"):
        with pytest.raises(BadFile) as error:
            Residual.load(bad)
        assert "\n" not in str(error.value)


def test_the_table_has_a_row_per_cell_and_the_advantage_follows_from_it():
    residual = made(halfway)
    frame = residual.to_dataframe()
    assert list(frame) == ["fact", "kind", "position", "layer", "state", "answer", "prob", "rank"]
    assert len(frame) == N * 3 * 2 * LAYERS * 2 * 3
    assert not frame.duplicated(["fact", "kind", "position", "layer", "state", "answer"]).any()
    cell = frame.query("fact == 3 and kind == 'resid' and position == 'prediction' and layer == 1 and state == 'after'")
    rank = dict(zip(cell["answer"], cell["rank"], strict=True))
    lead = visibility(np.array(rank["original"]), VOCAB) - visibility(np.array(rank["control"]), VOCAB)
    assert lead == pytest.approx(residual.advantages["after"][3, PREDICTION, RESID, 1])
    assert rank["original"] == pytest.approx(31)


@pytest.mark.parametrize("metric", ["rank", "prob"])
def test_the_figure_stands_before_beside_after_and_says_the_score(metric):
    figure = made(halfway).figure(metric=metric)
    text = figure.to_json()
    assert "before the edit" in text
    assert "after the edit" in text
    assert f"{made(halfway).score.mean:.3f}" in text
    with pytest.raises(BadFact, match="choose among"):
        made(halfway).figure("nowhere")


def test_the_lines_intervals_enclose_their_means_on_the_rank_scale_too():
    from kt.residual.score import _lines

    old = _lines(made(halfway), "before", "resid", "prediction", "rank")[0]
    assert (old.low < old.mean).tolist() == (old.mean < old.high).tolist() == [False, True]
    assert old.mean[1] == pytest.approx(9, abs=1)


def test_the_notebook_summary_escapes_what_it_quotes():
    residual = made(halfway)
    shown = replace(residual, metadata=residual.metadata | {"model": "<b>", "prefixes": []})._repr_html_()
    assert "<b>" not in shown
    assert "&lt;b&gt;" in shown


def facts_of(*pairs, relation="capital"):
    return [kt.Fact("The {} is", s, answer=a, target=t, relation=relation, id=s) for s, a, t in pairs]


CAPITALS = facts_of(("France", "Paris", "Rome"), ("Italy", "Rome", "Warsaw"), ("Poland", "Warsaw", "Seattle"))
POOL = facts_of(
    ("Needle", "Seattle", None), ("Curie", "Danielle", None), ("Space", "Megan", None), ("Łódź", "Tomas", None)
)


# On models -------------------------------------------------------------------------------------------------------
def nudge(model, size=0.5, name=None):
    """An edit that solves nothing, but moves every answer."""
    torch.manual_seed(1)
    name = name or model.weight_name(kt.Site(kt.Kind.MLP, 1))
    d_out, d_in = model.weight(name).shape
    return kt.Edit({name: LowRank(size * torch.randn(d_out, 2), torch.randn(2, d_in))}, {"method": "nudge"})


def measured(model, facts=CAPITALS, edit=None, **options):
    return residual_fact(model, edit or nudge(model), facts, pool=POOL, neutral=False, n_boot=200, **options)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gptj", "opt"])
def test_the_probes_are_those_of_the_unedited_and_the_edited_model_which_is_left_as_it_was(family):
    model = tiny_model(family)
    bytes_before = model.fingerprint()
    residual = measured(model)
    assert model.fingerprint() == bytes_before
    plain = contrast_probe(model, CAPITALS)
    assert np.allclose(residual.before.reading.prob, plain.reading.prob, atol=1e-5)
    with nudge(model).applied(model):
        changed = contrast_probe(model, CAPITALS)
    assert np.allclose(residual.after.reading.prob, changed.reading.prob, atol=1e-5)
    assert np.abs(changed.reading.prob - plain.reading.prob).max() > 1e-3
    assert residual.metadata["edited"] == {"mlp": [1]}


def test_the_probes_see_an_adapter_at_its_own_site_which_counts_as_edited():
    model = tiny_model("qwen2")
    edit = kt.edit(model, CAPITALS[:2], "grace", layers_mlp=(1,), v_num_grad_steps=10, v_lr=0.5)
    residual = measured(model, CAPITALS[:2], edit)
    before, after = (residual.readings[state].prob[:, PREDICTION, MLP] for state in ("before", "after"))
    assert np.array_equal(before[:, 0], after[:, 0], equal_nan=True), "the layer below"
    assert np.nanmax(np.abs(before[:, 1] - after[:, 1])) > 1e-3, "the layer of the adapter"
    assert residual.metadata["edited"] == {"mlp": [1]}
    assert kt.residual_fact(model, kt.EditStack([edit]), CAPITALS[:2], neutral=False).metadata["edited"] == {"mlp": [1]}


def test_the_exact_bytes_come_back_also_when_measuring_fails(monkeypatch):
    model = tiny_model("qwen2")
    bytes_before = model.fingerprint()
    broken = nudge(model, size=float("inf"))
    with pytest.raises(WorkFailed, match="not finite"):
        measured(model, edit=broken)
    assert model.fingerprint() == bytes_before


def test_an_edit_that_changes_nothing_leaves_all_of_it_on_a_model_too():
    model = tiny_model("qwen2")
    residual = measured(model, edit=nudge(model, size=0.0))
    assert np.array_equal(residual.readings["before"].rank, residual.readings["after"].rank)
    assert np.allclose(residual.attacks.before, residual.attacks.after, equal_nan=True)
    assert np.isnan(residual.score.mean) or residual.score.mean == pytest.approx(1)


def test_neither_batches_nor_the_order_of_the_facts_change_a_number():
    model = tiny_model("qwen2")
    one, two = measured(model, batch_size=1), measured(model, CAPITALS[::-1])
    for state in ("before", "after"):
        assert np.allclose(one.readings[state].prob, two.readings[state].prob[::-1], atol=1e-5, equal_nan=True)
        # Two tokens whose logits differ by rounding only may change places.
        assert np.abs(one.readings[state].rank - two.readings[state].rank[::-1]).max() <= 1
    assert np.allclose(one.elsewhere, two.elsewhere[::-1], atol=0.02, equal_nan=True)
    assert np.allclose(one.attacks.after, two.attacks.after[::-1], atol=1e-4, equal_nan=True)


def test_an_earlier_result_stands_in_for_the_unedited_model_and_is_refused_for_other_facts():
    model = tiny_model("qwen2")
    first, other = measured(model), nudge(model, name=model.weight_name(kt.Site(kt.Kind.ATTN, 0)))
    again = measured(model, edit=other, before=first)
    assert again.as_dict() == measured(model, edit=other).as_dict()
    for changes in ({"facts": CAPITALS[:2]}, {"final_norm": False}, {"prefixes": ["{old}! "]}, {"seed": 3}):
        with pytest.raises(BadFact, match="before="):
            measured(model, before=first, **changes)


def test_elsewhere_is_the_mean_lead_over_the_other_subjects_prompts():
    model = tiny_model("qwen2")
    pool = POOL[:1]
    with pytest.warns(UserWarning, match="single fact"):
        residual = residual_fact(model, nudge(model), CAPITALS[:1], pool=pool, neutral=False, n_boot=50)
    tokens = [residual.facts[0].original_id, *(c.token for c in residual.controls[0])]
    true = kt.model.tokens.target_ids(model.tokenizer, "The Needle is", "Seattle")[0]
    assert tokens[1:] == [true]  # Seattle is the only control, and no control where it is true
    assert np.isnan(residual.elsewhere).all()
    with pytest.warns(UserWarning, match="single fact"):
        residual = residual_fact(model, nudge(model), CAPITALS[:1], pool=POOL[:2], neutral=False, n_boot=50)
    seen = []
    for subject, answer in (("Needle", "Seattle"), ("Curie", "Danielle")):
        true = kt.model.tokens.target_ids(model.tokenizer, f"The {subject} is", answer)[0]
        controls = [c.token for c in residual.controls[0] if c.token != true]
        logits = model.logits(model.encode([f"The {subject} is"]))[0, -1]
        rank = np.array([int((logits > logits[t]).sum()) for t in [residual.facts[0].original_id, 0, *controls]])
        seen.append(advantage(rank[None], model.vocab_size)[0])
    assert residual.elsewhere[0, PREDICTION, RESID, -1] == pytest.approx(np.mean(seen), abs=1e-6)


def test_progress_ends_where_it_said_it_would():
    told = []
    measured(tiny_model("qwen2"), progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]
    assert len({total for _, total in told}) == 1


def test_facts_that_say_nothing_are_counted_with_their_reason_and_said_in_one_line_each():
    model = tiny_model("qwen2")
    odd = [
        *CAPITALS,
        kt.Fact("The {} of", "France", answer="Paris", target="Paris", relation="capital", id="same"),
        kt.Fact("The sport of {} is", "Megan", answer="soccer", target="French", relation="sport", id="alone"),
        kt.Fact("The {} is", "Seattle", answer="Rome", relation="capital", id="no target"),
    ]
    with pytest.warns(UserWarning) as caught:
        residual = measured(model, odd, edit=replace_requests(nudge(model), CAPITALS))
    assert {f.id: f.reason for f in residual.left_out}["alone"] == NO_CONTROLS
    assert {f.id for f in residual.left_out} == {"same", "alone", "no target"}
    assert residual.score.n == 3
    assert np.isnan(residual.attacks.after[3]).all()
    said = [str(w.message) for w in caught]
    assert said == residual.metadata["warnings"]
    assert all("\n" not in text for text in said)
    assert [text.split()[0] for text in said] == ["1", "1", "2"]


def test_flat_records_find_rivals_in_a_file_and_without_them_the_warning_says_how(tmp_path):
    model = tiny_model("qwen2")
    rows = [{"prompt": f.prompt, "subject": f.subject, "target_new": "Rome", "ground_truth": f.answer} for f in POOL]
    pool = tmp_path / "all.json"
    pool.write_text(json.dumps(rows))
    flat = [replace(fact, relation="") for fact in CAPITALS[:1]]
    options = dict(neutral=False, n_boot=50)
    with pytest.warns(UserWarning, match=r"'The France is'.*--pool FILE, pool= in Python"):
        assert np.isnan(residual_fact(model, nudge(model), flat, **options).score.mean)
    with pytest.warns(UserWarning, match="single fact"):
        found = residual_fact(model, nudge(model), flat, pool=pool, **options)
    assert {c.text for c in found.controls[0]} == {f.answer for f in POOL}


def replace_requests(edit, facts):
    from kt.editing.package import about_requests

    return kt.Edit(edit.updates, edit.manifest | about_requests([f.as_request() for f in facts]))


def test_requests_of_the_edit_are_recognised():
    model = tiny_model("qwen2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured(model, edit=replace_requests(nudge(model), CAPITALS))
        measured(model)  # an edit that names no requests says nothing about them


def test_no_facts_and_no_targets_are_one_line():
    model = tiny_model("qwen2")
    with pytest.raises(BadFact, match="no facts"):
        measured(model, [])
    with pytest.raises(BadFact, match="target or a foil"):
        measured(model, [kt.Fact("The {} is", "France", answer="Paris")])


def test_a_real_edit_takes_the_answer_but_not_all_of_its_lead():
    model, facts = kt.load("demo"), kt.load_facts("demo")
    asked = [f for f in facts if f.relation == "capital"][5:8]
    edit = kt.edit(model, asked, method="memit", max_tokens=3000)
    residual = residual_fact(model, edit, asked, pool=facts)
    assert residual.attacks.row(PROMPT, state="before").old.mean == 1
    assert residual.attacks.row(PROMPT, state="after").old.mean == 0
    assert residual.score.mean < 0.9
    assert abs(residual.floor.mean) < 0.5
    assert residual.in_top["resid"]["prediction"]["before"]["original"].mean == 1
    assert len(residual.metadata["neutral"]) == 5
