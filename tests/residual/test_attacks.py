"""Attacks: prompts are filled as said, calibrated by third answers, and measured as the model's own logits say."""

import numpy as np
import pytest
import torch
from chat_templates import TEMPLATES, tokenizer_of
from families import byte_level_tokenizer, tiny_model

import kt
from kt.errors import BadFact, WorkFailed
from kt.model.tokens import target_ids
from kt.residual.attacks import (
    ANY,
    NEUTRAL,
    PARAPHRASES,
    PREFIXES,
    PROMPT,
    Ask,
    AttackPrompt,
    Attacks,
    ask_model,
    asks,
    attack_names,
    checked_prefixes,
    prepare,
    shares,
)

CONTEST = AttackPrompt(
    "The capital of France is", "France", "Paris", "Rome", ("Warsaw", "Seattle"), ("Capital of France:",)
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2")


def of(attack, who, questions):
    return [q for q in questions if q.attack == attack and q.who == who]


def test_a_prefix_names_the_old_answer_and_then_each_third_one_in_its_place():
    questions = asks([CONTEST], ["{old}. "], [])
    prompts = [(q.prompt, q.answer) for who in range(3) for q in of("{old}. ", who, questions)]
    assert prompts == [
        ("Paris. The capital of France is", "Paris"),
        ("Warsaw. The capital of France is", "Warsaw"),
        ("Seattle. The capital of France is", "Seattle"),
    ]
    assert {q.new for q in questions} == {"Rome"}


def test_every_slot_is_filled_and_a_named_third_answer_is_never_the_one_that_is_held_against_the_new():
    questions = asks([CONTEST], ["{subject}, {third}, {new}: "], [])
    prompts = [of("{subject}, {third}, {new}: ", who, questions)[0].prompt for who in range(3)]
    assert [p.removesuffix(CONTEST.prompt) for p in prompts] == [
        "France, Warsaw, Rome: ",
        "France, Seattle, Rome: ",
        "France, Paris, Rome: ",
    ]


def test_braces_in_an_answer_stay_text():
    questions = asks([CONTEST._replace(old="{new}")], ["{old}! "], [])
    assert of("{old}! ", 0, questions)[0].prompt == "{new}! The capital of France is"


def test_prompts_paraphrases_and_neutral_texts_are_asked_about_all_answers():
    questions = asks([CONTEST], [], ["It rained. {}", "I. {}"])
    for who in range(3):
        assert [q.prompt for q in of(PROMPT, who, questions)] == ["The capital of France is"]
        assert [q.prompt for q in of(PARAPHRASES, who, questions)] == ["Capital of France:"]
        assert [q.prompt for q in of(NEUTRAL, who, questions)] == [
            "It rained. The capital of France is",
            "I. The capital of France is",
        ]


def test_a_third_answer_that_there_is_not_is_not_named():
    questions = asks([CONTEST._replace(distractors=())], ["{third}. ", "{old}. "], [])
    assert {(q.attack, q.who) for q in questions} == {(PROMPT, 0), (PARAPHRASES, 0), ("{old}. ", 0)}


@pytest.mark.parametrize("wrong", [["{answer}. "], [""], ["  "], [3], "{old}. ", [PROMPT], [ANY]])
def test_a_wrong_prefix_is_one_line(wrong):
    with pytest.raises(BadFact) as error:
        checked_prefixes(wrong)
    assert "\n" not in str(error.value)


def test_the_shipped_prefixes_are_well_formed_and_a_repeated_one_counts_once():
    assert checked_prefixes(PREFIXES) == PREFIXES
    assert checked_prefixes(["{old}. ", "{old}. "]) == ("{old}. ",)


def test_names_leave_out_what_is_not_asked():
    assert attack_names([], []) == (PROMPT, PARAPHRASES)
    assert attack_names(["{old}. "], ["x {}"]) == (PROMPT, PARAPHRASES, "{old}. ", NEUTRAL, ANY)


def test_measures_are_those_of_the_models_own_logits(model):
    questions = asks([CONTEST], ["{old}. "], ["It. {}"])
    prepared = prepare(model, questions)
    found = ask_model(model, prepared, batch_size=3)
    assert np.allclose(found, ask_model(model, prepared, batch_size="auto"), atol=1e-5)
    for question, values in zip(questions, found, strict=True):
        logits = model.logits(model.encode([question.prompt]))[0, -1]
        a, b = (target_ids(model.tokenizer, question.prompt, text)[0] for text in (question.answer, question.new))
        assert values[0] == float(logits[a] > logits[b])
        assert values[1] == float(logits.argmax() == a)
        assert values[2] == pytest.approx(float(logits[a] - logits[b]), abs=1e-5)
    assert len({row.question for row in prepared.rows}) == len(prepared.rows) < len(questions)


def test_an_answers_first_token_is_taken_where_it_stands(model):
    joined = Ask(0, "x", 0, "The city (", "Paris", "Rome")
    apart = Ask(0, "x", 0, "The city is", "Paris", "Rome")
    tokens = prepare(model, [joined, apart]).tokens
    assert tokens[0, 0] == target_ids(byte_level_tokenizer(), "The city (", "Paris")[0]
    assert tokens[0, 0] != tokens[1, 0]


def test_a_model_that_breaks_is_an_error_and_no_share():
    broken = tiny_model("gpt2")
    with torch.no_grad():
        broken.module.get_output_embeddings().weight[5, 0] = torch.nan
    with pytest.raises(WorkFailed, match="not finite"):
        ask_model(broken, prepare(broken, asks([CONTEST], [], [])))


def test_shares_average_a_facts_prompts_first_and_then_its_thirds():
    questions = [
        Ask(0, PARAPHRASES, 0, "a", "o", "n"),
        Ask(0, PARAPHRASES, 0, "b", "o", "n"),
        Ask(0, PARAPHRASES, 1, "a", "t", "n"),
        Ask(0, PARAPHRASES, 1, "b", "t", "n"),
        Ask(0, PARAPHRASES, 2, "a", "u", "n"),
        Ask(0, "{old}. ", 0, "c", "o", "n"),
        Ask(0, NEUTRAL, 0, "d", "o", "n"),
        Ask(0, "{old}. ", 1, "e", "t", "n"),
        Ask(0, NEUTRAL, 1, "d", "t", "n"),
        Ask(0, "{old}. ", 2, "f", "u", "n"),
    ]
    beats = [1, 0, 1, 1, 0, 0, 1, 0, 0, 1]
    ratios = [2.0, 0, 0, 0, 0, -1, 3, -2, -5, 4]
    names = (PROMPT, PARAPHRASES, "{old}. ", NEUTRAL, ANY)
    found = shares(questions, np.array([beats, [0.0] * 10, ratios]).T, names, 2)
    assert found[0, 1, :, 0].tolist() == [0.5, 0.5]
    assert found[0, 1, 0, 2] == 1
    assert found[0, 4, :, 0].tolist() == [1, 0.5]  # one prefix of two is enough; of the thirds, one of two
    assert found[0, 4, :, 2].tolist() == [3, 1]  # -2 and 4
    assert np.isnan(found[1]).all()
    assert np.isnan(found[0, 0]).all()


def test_the_excess_is_paired_over_the_facts_that_have_a_third_answer():
    after = np.full((3, 1, 2, 3), np.nan)
    after[:, 0, 0, 0] = [1, 0.5, 1]
    after[:2, 0, 1, 0] = [0, 0.5]
    row = Attacks((PROMPT,), after, after).row(PROMPT)
    assert (row.old.mean, row.old.n) == (pytest.approx(2.5 / 3), 3)
    assert (row.third.mean, row.third.n) == (0.25, 2)
    assert (row.excess.mean, row.excess.n) == (0.5, 2)


@pytest.mark.parametrize("asked", [("nothing",), (PROMPT, "nothing"), (PROMPT, "said", "nothing")])
def test_a_row_that_was_not_measured_is_an_error_that_names_the_others(asked):
    with pytest.raises(BadFact, match="choose among"):
        Attacks((PROMPT,), np.zeros((1, 1, 2, 3)), np.zeros((1, 1, 2, 3))).row(*asked)


def test_attacks_and_remainders_print_a_line():
    demo = kt.load("demo")
    facts = kt.load_facts("demo", limit=12)
    edit = kt.edit(demo, facts[:2], method="memit", max_tokens=2000)
    left = kt.residual_fact(demo, edit, facts[:2], pool=facts)
    assert repr(left.attacks).startswith("Attacks(of 2 facts, how often the old answer beats the new: 'prompt' ")
    assert len(repr(left.attacks)) < 400 and "array" not in repr(left.attacks)
    assert all(repr(part).startswith("Remainder(") and len(repr(part)) < 100 for part in left.by_kind["resid"].values())


def test_in_a_chat_template_a_prefix_stands_in_the_prompts_turn():
    tokenizer = tokenizer_of(TEMPLATES["qwen 2.5"])
    model = tiny_model("llama", tokenizer=tokenizer, vocab_size=512).asked("always")
    contest = CONTEST._replace(prompt="Which city is the capital of France", paraphrases=())
    prepared = prepare(model, asks([contest], ["{old}. "], ["It is old. {}"]))
    texts = {question.prompt for question in prepared.questions}
    assert "Paris. Which city is the capital of France" in texts and len(texts) == 5
    for row in prepared.rows:
        whole = TEMPLATES["qwen 2.5"].asked.replace("QUESTION", row.question[0])
        assert list(row.read) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    rome = tokenizer(f"{whole}Rome", add_special_tokens=False)["input_ids"][len(row.read)]
    assert set(prepared.tokens[:, 1].tolist()) == {rome}
