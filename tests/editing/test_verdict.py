"""What an edit's read-back says of it: numbers against plain forwards, limits, the line, the file and the command."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from editing_help import REQUESTS, fast, solve, statistics

import kt
from kt.editing.request_report import RequestReport
from kt.experiments.sweep_solving import Solver

GOOD = {
    "method": "memit",
    "norm_ratios": {"a.weight": 1.2, "b.weight": 1.0},
    "value_change": {"hidden.4": {"came_through": {"mean": 0.97, "n": 1}, "left": {"mean": 0.1, "n": 1}}},
    "neighbours": {"kept": 49, "n": 50},
    "perplexity": {"before": 23.3, "after": 23.4, "text": "t", "tokens": 1000},
}


def reported(rank=0, before=0.1, after=0.9):
    return RequestReport("7", "Qatar pays with the", "Qatar", "krone", None, (before, after), (40, rank), None, None)


def verdict_of(report=None, **changes):
    return kt.Edit({}, GOOD | changes, (report or reported(),)).verdict


def test_the_line_and_no_warning_where_every_number_is_within_its_limit():
    verdict = verdict_of(norm_ratios={"a": 1.5, "b": 1 / 1.5}, perplexity=GOOD["perplexity"] | {"after": 23.3 * 1.1})
    assert verdict.warnings == ()
    verdict = verdict_of()
    assert str(verdict) == "1 of 1 changed; 98% of neighbours kept; perplexity 23.3 -> 23.4"
    assert verdict.as_dict()["text"] == str(verdict) and verdict.as_dict()["neighbours"] == {"kept": 49, "n": 50}


@pytest.mark.parametrize(
    ("report", "changes", "said"),
    [
        (reported(rank=4), {}, ("'Qatar' -> 'krone' (7): rank 4", "raise clamp_norm_factor or v_num_grad_steps")),
        (
            reported(after=0.05),
            {},
            ("'Qatar' -> 'krone' (7): 0.1 -> 0.05", "less likely than before; the layers do not"),
        ),
        (
            None,
            {"norm_ratios": {"a.weight": 1.51, "b.weight": 1.0}},
            ("1 of 2 weights (a.weight: x 1.51)", "raise mom2"),
        ),
        (None, {"norm_ratios": {"a.weight": 0.66}}, ("a.weight: x 0.66",)),
        (None, {"perplexity": GOOD["perplexity"] | {"after": 25.7}}, ("23.3 -> 25.7", "a.weight changed most: x 1.20")),
        (None, {"perplexity": GOOD["perplexity"] | {"after": None}}, ("23.3 -> not a number",)),
    ],
)
def test_each_limit_is_a_warning_with_its_number_and_a_remedy(report, changes, said):
    (line,) = verdict_of(report, **changes).warnings
    assert all(part in line for part in said) and "; " in line


def test_more_that_is_missing_than_was_wanted_names_the_aim():
    change = {"came_through": {"mean": -0.1, "n": 1}, "left": {"mean": 1.3, "n": 1}}
    (line,) = verdict_of(value_change={"hidden.8": change, **GOOD["value_change"]}).warnings
    assert "1 of 2 aims (hidden.8: 1.30)" in line


def test_an_aim_that_nothing_is_written_for_is_not_judged():
    change = {"came_through": {"mean": -0.1, "n": 1}, "left": {"mean": 1.3, "n": 1}}
    change = {"attn.8": change, **GOOD["value_change"]}
    verdict = verdict_of(value_change=change, written_aims=["hidden.4"])
    assert verdict.warnings == () and set(verdict.missing) == {"hidden.4"}


def test_what_was_held_back_is_set_free_and_not_searched_for_longer():
    change = {"came_through": {"mean": 0.2, "n": 1}, "left": {"mean": 0.8, "n": 1}}
    (line,) = verdict_of(reported(rank=1), value_change={"hidden.8": change}).warnings
    assert "20% of the wanted change was written: lower mom2_update_weight" in line


@pytest.mark.parametrize(
    "harm", [{"norm_ratios": {"a.weight": 3.0}}, {"perplexity": GOOD["perplexity"] | {"after": 40.0}}]
)
def test_where_the_model_changed_too_much_no_line_asks_for_a_stronger_edit(harm):
    """One line asked for a smaller ridge, and the next for a larger one."""
    change = {"hidden.4": {"came_through": {"mean": 0.2, "n": 1}, "left": {"mean": 0.8, "n": 1}}}
    took, grew = verdict_of(reported(rank=9), value_change=change, **harm).warnings
    assert "the layers do not reach: take other layers" in took and "raise mom2_update_weight" in grew
    took, _ = kt.Edit({}, GOOD | harm, (reported(rank=9), reported())).verdict.warnings
    assert "edit fewer at once, or take other layers" in took


def test_remedies_are_the_methods_own_settings():
    ft = verdict_of(method="ft", value_change={}, norm_ratios={"a.weight": 3.0})
    assert "lower lr or num_steps" in ft.warnings[0] or "lower v_num_grad_steps" in ft.warnings[0], ft.warnings
    assert "mom2_update_weight" not in ft.warnings[0]


def test_many_requests_are_counted_and_three_of_them_named():
    report = tuple(reported(rank=n) for n in (0, 1, 2, 3, 4))
    (line,) = kt.Edit({}, GOOD, report).verdict.warnings
    assert line.startswith("4 of 5 requests (") and line.count("rank") == 3 and " and 1 more) do not" in line


def test_an_edit_that_was_not_read_back_has_no_verdict():
    assert kt.Edit({}, GOOD).verdict is None


@pytest.fixture(scope="module")
def model():
    return kt.load("demo")


@pytest.fixture(scope="module")
def facts():
    return [fact.as_request() for fact in kt.load_facts("demo")[:2]]


@pytest.fixture(scope="module")
def edit(model, facts):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("default", message="second moments")
        return kt.edit(model, facts, "memit", max_tokens=20_000)


def perplexity(model, most=1000):
    """By plain forwards, a document at a time."""
    from kt.facts.corpus import Corpus

    nll = count = 0
    for line in Corpus.heldout("demo").texts():
        ids = torch.tensor([model.tokenizer(line.strip())["input_ids"]])
        if ids.shape[1] < 2:
            continue
        with torch.no_grad():
            logits = model.module(input_ids=ids).logits[0, :-1]
        nll -= float(logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
        if count >= most:
            break
    return math.exp(nll / count), count


def next_token(model, prompt):
    with torch.no_grad():
        return int(model.module(**model.tokenizer(prompt, return_tensors="pt")).logits[0, -1].argmax())


def test_the_numbers_are_those_of_plain_forwards(model, facts, edit):
    prompts = {near.prompt.rstrip() for fact in facts for near in fact.neighbours}
    before, (old, count) = {p: next_token(model, p) for p in prompts}, perplexity(model)
    with edit.applied(model):
        kept, (new, _) = sum(next_token(model, p) == before[p] for p in prompts), perplexity(model)
    verdict = edit.verdict
    assert (verdict.requests, verdict.changed) == (2, 2)
    assert verdict.neighbours == (kept, len(prompts))
    assert verdict.perplexity == pytest.approx((old, new), rel=1e-5)
    assert edit.manifest["perplexity"]["tokens"] == count


def test_a_file_keeps_the_verdict_and_the_pages_show_it(edit, tmp_path):
    again = kt.Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert again.verdict == edit.verdict and again.digest == edit.digest
    assert [[edit.verdict.text]] in [table.rows for table in again.tables()]
    assert again.as_dict()["verdict"]["changed"] == 2


def test_files_from_before_have_the_verdict_that_they_can_have():
    old = Path(__file__).parents[1] / "fixtures" / "before_moves" / "apply-edit" / "edit.safetensors"
    verdict = kt.Edit.load(old).verdict
    assert verdict.requests == 2 and verdict.perplexity is None and verdict.neighbours is None


def solved(setting, **more):
    model, corpus, cache = setting
    return {"method": "memit", "statistics": statistics(model, corpus, cache)} | fast("memit") | more


def test_a_run_in_steps_is_judged_by_its_last_model(setting):
    model = setting[0]
    run = kt.run_edits(model, REQUESTS, "sequential", evaluate="none", **solved(setting))
    assert run.verdict == run.edit.verdict and run.verdict.requests == 2
    before = run.edit.manifest["perplexity"]["before"]
    single = kt.run_edits(model, REQUESTS, "single", evaluate="none", **solved(setting))
    pairs = [each.verdict.perplexity for each in single.edits]
    assert [old for old, _ in pairs] == pytest.approx([before, before])
    assert single.verdict.perplexity == max(pairs, key=lambda pair: pair[1])
    assert single.verdict.requests == 2
    assert single.verdict.warnings == tuple(dict.fromkeys(w for e in single.edits for w in e.verdict.warnings))
    assert single.as_dict()["verdict"] == single.verdict.as_dict()


def test_the_text_is_read_once_before_and_once_after_each_edit_of_a_session(setting, monkeypatch):
    reads = []
    plain = kt.editing.verdict.check_losses
    monkeypatch.setattr("kt.editing.verdict.check_losses", lambda model: reads.append(1) or plain(model))
    with kt.EditSession(setting[0], **solved(setting)) as session:
        first, second = (session.edit([request]) for request in REQUESTS)
        assert len(reads) == 3
        assert second.verdict.perplexity[0] == first.verdict.perplexity[1] != first.verdict.perplexity[0]
        session.revert()
        assert session.edit(REQUESTS[:1]).verdict.perplexity == first.verdict.perplexity
    assert len(reads) == 4


def test_python_is_warned_and_a_sweep_is_not(setting, tmp_path):
    model, corpus, cache = setting
    weak = {"v_num_grad_steps": 1}
    with pytest.warns(UserWarning, match="do not give the target first"):
        edit = solve(model, corpus, cache, "memit", check=True, **weak)
    assert edit.verdict.warnings
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*give the target first.*")
        point = solved(setting, **weak)
        swept = Solver(model, [point]).edit(REQUESTS, point, 0, None)
    assert "perplexity" not in swept.manifest


def test_logits_that_are_not_numbers_are_no_success():
    """Their rank is 0, since no logit is above them."""
    verdict = verdict_of(reported(after=math.nan))
    assert verdict.changed == 0 and any("less likely" in line and "nan" in line for line in verdict.warnings)


def test_an_unedited_model_without_a_perplexity_is_not_blamed_on_the_edit():
    (line,) = verdict_of(perplexity={"before": None, "after": None, "text": "t", "tokens": 9}).warnings
    assert "already in the unedited model" in line and "float32" in line
