"""Teacher forcing: a prompt that is read once for all its answers gives what separate rows give."""

import math
from functools import partial

import pytest
import torch
from families import tiny_model

from kt.errors import WorkFailed
from kt.evaluation import evaluate
from kt.facts import Fact, Prompt
from kt.model.scoring import Row, answer_row, score, shared_prefixes, teacher_force, warn_of_joins

PROMPTS = ("The mother tongue of Danielle Darrieux is", "Marie Curie was born in", "Her")
QUESTIONS = [(p, a) for p in PROMPTS for a in ("French", "Rome, Italy", "Seattle", "Seattle.")] + [
    ("The capital", None), ("The capital", "of"), ("Tomas", "Brill"),
    ("Tomas works in", "Warsaw, Italy"), ("Tomas works in", "Warsaw, Poland"),
]  # fmt: skip


separately = partial(teacher_force, share_prefixes=False)


def rows_of(model):
    return [answer_row(model, question) for question in QUESTIONS]


def same(found, expected):
    assert found.keys() == expected.keys()
    for question, answer in expected.items():
        ours = found[question]
        assert (ours.target, ours.predicted) == (answer.target, answer.predicted), question
        assert ours.log_prob == pytest.approx(answer.log_prob, abs=1e-4), question


@pytest.mark.parametrize("batch_size", ["auto", 1, 2, 5])
def test_answers_on_a_shared_prompt_equal_separate_rows(model, batch_size):
    rows, settled = rows_of(model), []
    same(teacher_force(model, rows, batch_size, settled.append), separately(model, rows))
    assert sum(settled) == len(rows)


@pytest.mark.parametrize("changes", [{"sliding_window": 4}, {}], ids=["short window", "long window"])
def test_a_window_shorter_than_the_prompt_is_not_read_on_from(changes):
    model = tiny_model("gemma3_text", **changes)
    rows, heard = rows_of(model), []
    model.module.get_input_embeddings().register_forward_hook(lambda _m, ids, _out: heard.append(ids[0].numel()))
    found = teacher_force(model, rows)
    ours = sum(heard)
    heard.clear()
    same(found, separately(model, rows))
    assert (ours < sum(heard)) == (changes == {})


def test_a_head_ends_where_an_answer_is_due():
    read = [
        Row(("p", "a"), (5, 6, 7), (8,)),
        Row(("p", "b"), (5, 6, 7, 8), (8, 9)),
        Row(("p", "c"), (5, 6, 7, 1), (1, 2)),
    ]
    (family,) = shared_prefixes([*read, Row(("q", "a"), (5, 6), (3,))])
    assert family.head == (5, 6, 7) and family.tails == [(8,), (1,)]
    # An answer whose first token replaces the prompt's last: only what stands before it is common.
    (merged,) = shared_prefixes([read[0], Row(("p", "m"), (5, 6, 4), (4, 9))])
    assert merged.head == (5, 6) and merged.tails == [(7,), (4,)]
    # Answers that begin alike: their first token is still read off the head's end.
    (alike,) = shared_prefixes([Row(("p", "x"), (5, 6, 8), (8, 9)), Row(("p", "y"), (5, 6, 8, 2), (8, 2, 3))])
    assert alike.head == (5, 6) and alike.tails == [(8,), (8, 2)]
    assert shared_prefixes([Row(("p", "a"), (5,), (1,)), Row(("p", "b"), (6,), (1,))]) == []


def test_every_prompt_and_every_further_token_is_read_once():
    model, heard = tiny_model("gpt2"), []
    answers = ("French", "Rome, Italy")
    rows = [answer_row(model, (PROMPTS[0], answer)) for answer in answers]
    prompt = len(model.tokenizer(PROMPTS[0])["input_ids"])
    further = [len(row.read) - prompt for row in rows if len(row.read) > prompt]
    model.module.get_input_embeddings().register_forward_hook(lambda _m, ids, _out: heard.append(tuple(ids[0].shape)))
    teacher_force(model, rows)
    assert heard == [(1, prompt), (len(further), max(further))] and sum(len(r.read) for r in rows) > prompt * 2


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_no_forward_has_more_rows_than_the_batch_size(batch_size):
    model, heard = tiny_model("gpt2"), []
    model.module.get_input_embeddings().register_forward_hook(lambda _m, ids, _out: heard.append(len(ids[0])))
    teacher_force(model, rows_of(model), batch_size)
    assert max(heard) <= batch_size


def test_a_broken_model_is_named_by_its_prompt():
    model = tiny_model("llama")
    with torch.no_grad():
        model.module.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(WorkFailed, match="'The mother tongue of Danielle Darrieux is' are NaN"):
        teacher_force(model, [answer_row(model, (PROMPTS[0], a)) for a in ("French", "Rome, Italy")])


def test_scores_do_not_see_that_prompts_are_shared(monkeypatch):
    model = tiny_model("llama")
    fact = Fact("The mother tongue of {} is", "Danielle Darrieux", answer="French", target="Rome, Italy", id="one",
                rephrasings=("{} speaks",), neighbours=(Prompt("Marie Curie was born in", "Warsaw"),))  # fmt: skip
    asked = {"protocols": ("tf", "prob")}
    shared = evaluate(model, [fact], **asked)
    monkeypatch.setattr("kt.evaluation.run.teacher_force", separately)
    apart = evaluate(model, [fact], **asked)
    assert shared.values.keys() == apart.values.keys()
    for name, values in apart.values.items():
        assert shared.values[name] == pytest.approx(values, abs=1e-5), name


def test_ranks_count_the_tokens_above_and_ties_are_greedy():
    logits = torch.tensor([[0.0, 2.0, 2.0, 3.0], [5.0, 1.0, 5.0, 0.0]])
    row = Row(("p", "a"), (1, 2), (1, 2))
    found = score(logits, row, ranks=True)
    assert found.predicted == (3, 0) and found.first_rank == 1 and found.is_greedy is False
    assert found.token_log_probs == pytest.approx(logits.log_softmax(-1)[[0, 1], [1, 2]].tolist())
    assert found.log_prob == pytest.approx(sum(found.token_log_probs))
    tied = score(logits, row._replace(target=(3, 2)), ranks=True)
    assert tied.first_rank == 0 and tied.is_greedy is True and tied.predicted != tied.target
    assert score(logits, row).first_rank is None


def test_scores_of_nan_are_returned_where_they_are_allowed():
    model = tiny_model("llama")
    with torch.no_grad():
        model.module.get_output_embeddings().weight.fill_(torch.nan)
    found = teacher_force(
        model, [answer_row(model, (PROMPTS[0], a)) for a in ("French", "Rome, Italy")], allow_nan=True
    )
    assert all(answer.log_prob != answer.log_prob for answer in found.values())


def test_a_join_that_the_model_would_not_write_is_said_in_one_line():
    asked = {
        ("Paris is in", "France"): (math.log(1e-4), math.log(0.02)),
        ("Rome is in", "Italy"): (math.log(1e-3), math.log(0.02)),
        ("Who?", "Bo"): (math.log(1e-9), math.log(1e-5)),  # neither form is what the model would say
    }
    words = "after 'Paris is in' the model gives ' France' 0.005 times the probability of 'France'"
    with pytest.warns(UserWarning, match=f"1 of 3 answers .* {words}"):
        warn_of_joins(asked)


def test_an_answers_other_form_is_scored_from_the_same_logits():
    model = tiny_model("gpt2")
    row = answer_row(model, ("The capital of France is", "Paris"))
    other = answer_row(model, ("The capital of France is", "Paris", ""))
    assert row.other == other.target[0] and other.other is None
    alone = teacher_force(model, [other])[other.question].token_log_probs[0]
    assert teacher_force(model, [row])[row.question].other_log_prob == pytest.approx(alone, abs=1e-5)
