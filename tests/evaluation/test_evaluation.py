"""Scores: against a stub with known logits, against a plain Hugging Face loop, before and after a change."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from families import byte_level_tokenizer, sentencepiece_tokenizer, tiny_model

from kt.errors import BadFact, BadFile, WorkFailed
from kt.evaluation import METRICS, Scores, evaluate
from kt.evaluation import run as work
from kt.evaluation.text import room
from kt.facts import Fact, Prompt
from kt.model.scoring import answer_row, row_batches, teacher_force
from kt.model.sites import Kind, Site

TOKENIZERS = {"gpt2": byte_level_tokenizer, "llama": sentencepiece_tokenizer, "gemma2": sentencepiece_tokenizer}
FACTS = [
    Fact(
        "The mother tongue of {} is",
        "Danielle Darrieux",
        answer="French",
        target="Rome, Italy",
        id="one",
        rephrasings=("Danielle Darrieux was born in", "{} speaks"),
        neighbours=(Prompt("Marie Curie was born in", "Warsaw"), Prompt("The Space Needle is in the city of")),
        hops=(Prompt("Her profession is that of a", "physicist"), Prompt("without an answer")),
        generation=("Danielle Darrieux",),
    ),
    Fact("{} plays the sport of", "Megan Rapinoe", answer="soccer", foil="chemist", id="two"),
    Fact("{} works as a", "Tomas Brill", answer="chemist", target="physicist", id="three",
         neighbours=(Prompt("Marie Curie was born in", "Warsaw"),)),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def short_texts():
    """A quarter of the tokens: text takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "TEXT_TOKENS", 25)
        yield


@pytest.fixture(scope="module")
def gpt2():
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def before(gpt2, short_texts):
    return evaluate(gpt2, FACTS)


class Words:
    """A tokenizer of digits, which are its ids."""

    bos_token_id = eos_token_id = None
    pad_token_id = 0
    is_fast = True

    def __call__(self, text, **options):
        ids = [int(digit) for digit in text if digit.isdigit()]
        return {"input_ids": ids, "special_tokens_mask": [0] * len(ids)}


class Successor:
    """A model that knows one thing: after token n comes n + 1, with logit 2 against 0 for the other nine."""

    name, tokenizer, vocab_size = "successor", Words(), 10

    def why_unreadable(self, ids):
        return None

    def logits(self, batch, keep):
        following = (batch.ids[:, -keep:] + 1).clamp(max=9)
        return 2.0 * torch.nn.functional.one_hot(following, 10).float()


def test_token_accuracy_by_hand():
    rows = [answer_row(Successor(), q) for q in [("1 2", "3 4 5"), ("7 1", "2 9 5"), ("4", "6"), ("3 4", None)]]
    found = teacher_force(Successor(), rows)
    assert found["1 2", "3 4 5"].predicted == (3, 4, 5)
    assert found["7 1", "2 9 5"].predicted == (2, 3, 9)
    assert found["4", "6"].predicted == (5,) and found["4", "6"].target == (6,)
    assert found["3 4", None].predicted == (5,) and found["3 4", None].log_prob is None
    right, wrong = math.exp(2) / (math.exp(2) + 9), 1 / (math.exp(2) + 9)
    assert math.exp(found["1 2", "3 4 5"].log_prob) == pytest.approx(right**3)
    assert math.exp(found["7 1", "2 9 5"].log_prob) == pytest.approx(right * wrong**2)


def test_scores_of_the_stub_by_hand():
    facts = [
        Fact("{} 2", "1", answer="8", target="3 4 5", rephrasings=("{}", "3 {}"), hops=(Prompt("7 1", "2 9 5"),)),
        Fact("{} 2", "9", target="3 9", neighbours=(Prompt("5", "6"), Prompt("5", "7"))),
    ]
    means = {name: metric.mean for name, metric in evaluate(Successor(), facts, generate=False).metrics.items()}
    assert means["edit_success_tf_token"] == pytest.approx((1 + 1 / 2) / 2)
    assert means["edit_success_tf_exact"] == 0.5
    assert means["paraphrase_tf_token"] == pytest.approx(2 / 3)  # after 1: 2 4 5 for 3 4 5, twice
    assert means["portability_tf_token"] == pytest.approx(1 / 3)
    assert means["neighbourhood_tf_exact"] == 0.5
    assert not any("gen" in name or "same" in name for name in means)


def test_rows_of_like_length_share_a_batch_and_budgets_hold():
    rows = [answer_row(Successor(), (" ".join("1" * n), "2")) for n in (5, 1, 3, 1, 4)]
    sizes = [[len(row.read) for row in batch] for batch in row_batches(rows, 2, 10)]
    assert sizes == [[1, 1], [3, 4], [5]]
    many = rows[:1] * 2000
    assert max(len(batch) * 5 for batch in row_batches(many, "auto", 10)) <= 4096
    assert all(len(batch) == 1 for batch in row_batches(rows, "auto", 2**26))


def plain_answer(model, prompt, answer):
    """The answer's argmaxes and log probability in one unpadded forward of the bare module."""
    ids = model.tokenizer(f"{prompt} {answer}")["input_ids"]
    start = len(model.tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logits = model.module(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].double()
    log_prob = logits.log_softmax(-1).gather(-1, torch.tensor(ids[start:])[:, None]).sum().item()
    return tuple(ids[start:]), tuple(logits.argmax(-1).tolist()), log_prob


def plain_greedy(model, prompt, n):
    ids = model.tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(n):
        with torch.no_grad():
            ids = [*ids, model.module(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()]
        if ids[-1] == model.tokenizer.eos_token_id:
            break
    head, whole = (model.tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], ids))
    return whole.removeprefix(head)  # decoded alone, SentencePiece drops the first word's space


@pytest.mark.parametrize("family", TOKENIZERS)
def test_a_plain_loop_without_padding_agrees(family):
    model = tiny_model(family, tokenizer=TOKENIZERS[family]())
    scores = evaluate(model, FACTS)
    checked = 0
    for sample in scores.samples:
        if sample.role == "generation" or sample.answer is None:
            continue
        target, predicted, log_prob = plain_answer(model, sample.prompt, sample.answer)
        assert (sample.target_ids, sample.predicted_ids) == (target, predicted)
        assert sample.log_prob == pytest.approx(log_prob, abs=1e-4)
        if sample.role != "answer":
            assert sample.exact_text == plain_greedy(model, sample.prompt, len(target))
            assert sample.text == plain_greedy(model, sample.prompt, max(10, len(target)))
            checked += 1
    assert checked == 8


def test_records_are_means_over_prompts_and_metrics_means_over_records(before):
    samples = [s for s in before.samples if s.role == "paraphrase"]
    assert [s.record for s in samples] == ["one", "one"]
    right = [sum(a == b for a, b in zip(s.predicted_ids, s.target_ids, strict=True)) for s in samples]
    expected = sum(r / len(s.target_ids) for r, s in zip(right, samples, strict=True)) / 2
    assert before.values["paraphrase_tf_token"] == {"one": pytest.approx(expected)}
    assert before.metrics["paraphrase_tf_token"].n == 1 and before.metrics["paraphrase_tf_token"].ci95 is None
    metric = before.metrics["target_prob_tf"]
    assert metric.n == 3 and metric.ci95[0] <= metric.mean <= metric.ci95[1]
    assert metric.mean == pytest.approx(sum(before.values["target_prob_tf"].values()) / 3)


def test_the_foil_is_the_target_of_a_fact_without_one(before):
    assert [s.answer for s in before.samples if s.role == "edit"] == ["Rome, Italy", "chemist", "physicist"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_changes_nothing(gpt2, before, batch_size):
    other = evaluate(gpt2, FACTS, batch_size=batch_size)
    for one, two in zip(before.samples, other.samples, strict=True):
        assert replace(one, log_prob=None) == replace(two, log_prob=None)
        assert (one.log_prob or 0) == pytest.approx(two.log_prob or 0, abs=1e-4)


def test_same_seed_same_scores_and_another_seed_other_texts(gpt2, before):
    assert evaluate(gpt2, FACTS).samples == before.samples
    texts = [s.text for s in evaluate(gpt2, FACTS, seed=1).samples if s.role == "generation"]
    assert texts != [s.text for s in before.samples if s.role == "generation"]


def test_locality_needs_the_unedited_model(before):
    assert not any("same" in name for name in before.metrics)
    assert before.protocol["locality"].startswith("absent")


def test_locality_is_one_for_the_unedited_model_and_less_after_a_weight_is_randomised(gpt2, before):
    names = ["neighbourhood_same_argmax", "neighbourhood_same_tf_token", "neighbourhood_gen_same"]
    same = evaluate(gpt2, FACTS, before=before)
    assert [same.metrics[name].mean for name in names] == [1.0] * 3 and same.metrics[names[0]].n == 2
    site = Site(Kind.MLP, 1)
    with gpt2.restored([site]):
        gpt2.write(site, 5 * torch.randn(gpt2.weight(site).shape, generator=torch.Generator().manual_seed(0)))
        after = evaluate(gpt2, FACTS, before=before)
    assert all(after.metrics[name].mean < 1 for name in names)
    assert gpt2.name in after.protocol["locality"]


def test_a_before_that_does_not_fit_is_refused(gpt2, before):
    other = [replace(FACTS[0], neighbours=(Prompt("Paris is in", "France"),))]
    with pytest.raises(BadFact, match="lacks 1 of 1 neighbourhood prompts, the first 'Paris is in'"):
        evaluate(gpt2, other, before=before, generate=False)
    with pytest.raises(BadFact, match="unedited model"):
        evaluate(gpt2, FACTS, before=evaluate(gpt2, FACTS, before=before, generate=False), generate=False)
    foreign = replace(before, samples=tuple(replace(s, target_ids=(1,)) for s in before.samples))
    with pytest.raises(BadFact, match="another tokenizer"):
        evaluate(gpt2, FACTS, before=foreign, generate=False)


def test_a_subset_may_be_compared_with_scores_of_more_facts(gpt2, before):
    part = evaluate(gpt2, FACTS[2:], before=before, generate=False)
    assert part.metrics["neighbourhood_same_argmax"] == (1.0, *[pytest.approx(float("nan"), nan_ok=True)] * 2, 1)


def test_without_generation_only_forced_metrics_are_there(gpt2, before):
    forced = evaluate(gpt2, FACTS, generate=False)
    assert set(forced.metrics) == {name for name in before.metrics if "_gen" not in name}
    assert forced.protocol["generation"] == "off"


def test_every_metric_is_explained(before, gpt2):
    after = evaluate(gpt2, FACTS, before=before)
    assert set(after.values) == {name for name, metric in METRICS.items() if metric.protocol in ("tf", "gen")}
    assert set(after.metrics) == {*after.values, "score_tf_token"}
    assert all(after.protocol[name] for name in after.metrics)
    for word in ("padding", "answers", "aliases", "generation", "intervals", "words", "normalisation", "records"):
        assert after.protocol[word]


def test_fluency_reads_prompt_and_text_up_to_the_models_length(gpt2, before):
    texts = [s for s in before.samples if s.role == "generation"]
    assert [s.prompt for s in texts] == [
        "Danielle Darrieux",
        "Megan Rapinoe plays the sport of",
        "Tomas Brill works as a",
    ]
    assert room(gpt2, "Paris", 10**6) == 120 and room(gpt2, "Paris " * 200, 100) == 0
    assert before.metrics["fluency_ngram_entropy_gen"].mean > 0


def test_a_fact_with_neither_target_nor_foil_is_scored_on_its_answer(gpt2):
    scores = evaluate(gpt2, [Fact("{} works as a", "Tomas Brill", answer="chemist")], generate=False)
    assert list(scores.metrics) == ["answer_prob_tf"]


def test_requests_may_be_records_as_they_stand_in_a_file(gpt2):
    request = {"prompt": "{} works as a", "subject": "Tomas Brill", "target_new": {"str": "chemist"}}
    assert evaluate(gpt2, [request, request | {"subject": "Marie Curie"}], generate=False).records == ("0", "1")


def test_wrong_requests(gpt2):
    with pytest.raises(BadFact, match="no requests"):
        evaluate(gpt2, [])
    with pytest.raises(BadFact, match="is the old answer"):
        evaluate(gpt2, [Fact("{} is", "Rome", answer="a", target="a ")])
    with pytest.raises(BadFact, match="batch size 0"):
        evaluate(gpt2, FACTS, batch_size=0)


def test_a_broken_weight_is_not_taken_for_a_wrong_answer():
    model = tiny_model("gpt2", seed=1)
    with torch.no_grad():
        model.weight(Site(Kind.MLP, 0))[0, 0] = float("nan")
    with pytest.raises(WorkFailed, match="NaN"):
        evaluate(model, FACTS)


def test_progress_ends_at_its_total(gpt2):
    heard = []
    evaluate(gpt2, FACTS, batch_size=4, progress=lambda done, total: heard.append((done, total)))
    assert len({total for _, total in heard}) == 1 and heard[-1][0] == heard[-1][1]
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_scores_survive_a_file(gpt2, before, tmp_path):
    scores = evaluate(gpt2, FACTS, before=before)
    path = scores.save(tmp_path / "scores.json")
    again = Scores.load(path)
    assert again == scores and list(again.metrics) == list(scores.metrics)
    assert again.to_dataframe().equals(scores.to_dataframe())
    content = json.loads(path.read_text())
    assert content["schema_version"] == 1 and content["metrics"]["target_prob_tf"]["n"] == 3
    assert content["metrics"]["paraphrase_tf_exact"]["ci95"] is None
    assert evaluate(gpt2, FACTS, before=Scores.load(before.save(tmp_path / "before.json"))) == scores


@pytest.mark.parametrize("change", [{"kind": "trace"}, {"schema_version": 2}, {"samples": [{}]}, {"values": 3}])
def test_a_file_that_holds_no_scores_is_refused(before, tmp_path, change):
    path = before.save(tmp_path / "scores.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadFile, match=r"scores\.json"):
        Scores.load(path)


def test_dataframe_and_table(before):
    frame = before.to_dataframe()
    assert list(frame.columns) == ["record", "metric", "value"]
    assert not frame.duplicated(["record", "metric"]).any() and frame.value.notna().all()
    means = frame.groupby("metric").value.mean()
    pd.testing.assert_series_equal(
        means, pd.Series({n: before.metrics[n].mean for n in before.values}), check_names=False, check_like=True
    )
    rows = before.tables()[0].rows
    assert [row[0] for row in rows] == list(before.metrics)
    assert {name: mean.ci95 for name, mean, _ in rows}["paraphrase_tf_exact"] is None
    samples = before.samples_dataframe()
    assert len(samples) == len(before.samples) and {"role", "kind", "prompt", "log_prob"} <= set(samples.columns)
    assert samples.answer[0] == "Rome, Italy"


def test_html_is_escaped(before):
    values = {**before.values, "<i>": {"one": 1.0}}
    bad = replace(before, model="<script>alert(1)</script>", protocol={"target_prob_tf": '"><b>'}, values=values)
    assert not any(tag in bad._repr_html_() for tag in ("<script>", "<b>", "<i>"))
    assert "&lt;script&gt;" in bad._repr_html_()
