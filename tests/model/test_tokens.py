"""Tokens: spans from offsets, answers from the joint tokenisation, BOS once, padding on the left."""

from copy import deepcopy

import pytest
from families import byte_level_tokenizer, sentencepiece_tokenizer
from tokenizers import pre_tokenizers, processors, trainers

from kt.errors import BadFact, SubjectNotFound
from kt.model.tokens import encode, joint_ids, subject_span, target_ids, template_span, token_ids

TOKENIZERS = pytest.mark.parametrize(
    "tokenizer", [byte_level_tokenizer(), sentencepiece_tokenizer()], ids=["bpe", "spm"]
)


@TOKENIZERS
@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The Space Needle is in the city of", "Space Needle"),
        ("Space Needle is in the city of", "Space Needle"),
        ("They saw the Space Needle", "Space Needle"),
        ("Łódź, seen from São Paulo,", "São Paulo"),
        ("The mayor of 東京 is", "東京"),
    ],
)
def test_span_covers_the_subject_and_nothing_beside_it(tokenizer, prompt, subject):
    span = subject_span(tokenizer, prompt, subject)
    ids = token_ids(tokenizer, prompt)
    text = tokenizer.decode(ids[span.start : span.stop]).strip()
    assert subject in text or tokenizer.unk_token_id in ids[span.start : span.stop]
    assert subject not in tokenizer.decode(ids[span.start + 1 : span.stop])
    assert subject not in tokenizer.decode(ids[span.start : span.stop - 1])


@TOKENIZERS
def test_last_occurrence_unless_the_template_says_which(tokenizer):
    prompt = "Paris is Paris and"
    assert subject_span(tokenizer, prompt, "Paris").start > template_span(tokenizer, "{} is Paris and", "Paris").start


@TOKENIZERS
def test_absent_subject_is_an_error_that_says_how(tokenizer):
    with pytest.raises(SubjectNotFound, match="write the template with"):
        subject_span(tokenizer, "The capital of France is", "Spain")
    with pytest.raises(SubjectNotFound):
        subject_span(tokenizer, "The capital of France is", "")


@TOKENIZERS
@pytest.mark.parametrize("answer", ["Paris", "a chemist in Brunmar", "東京", "Seattle."])
def test_answer_is_the_suffix_of_the_joint_tokenisation(tokenizer, answer):
    prompt = "The capital of France is"
    joint = token_ids(tokenizer, f"{prompt} {answer}")
    suffix = target_ids(tokenizer, prompt, answer)
    assert tuple(joint[len(joint) - len(suffix) :]) == suffix
    assert joint[: len(joint) - len(suffix)] == token_ids(tokenizer, prompt)
    assert target_ids(tokenizer, prompt + " ", answer) == suffix == target_ids(tokenizer, prompt, " " + answer)


@TOKENIZERS
def test_empty_answer_is_refused(tokenizer):
    with pytest.raises(BadFact, match="empty"):
        target_ids(tokenizer, "The capital of France is", "  ")


def test_bos_comes_once():
    tokenizer = sentencepiece_tokenizer()
    bos = tokenizer.bos_token_id
    assert token_ids(tokenizer, "Paris").count(bos) == 1
    assert token_ids(tokenizer, "<s>Paris").count(bos) == 1
    span = subject_span(tokenizer, "<s>The Space Needle", "Space Needle")
    ids = token_ids(tokenizer, "<s>The Space Needle")
    assert tokenizer.decode(ids[span.start : span.stop]).strip() == "Space Needle"
    assert bos not in target_ids(tokenizer, "The capital is", "Paris")


@TOKENIZERS
def test_padding_is_on_the_left_and_columns_follow_it(tokenizer):
    texts = ["The Space Needle is in the city of", "Paris"]
    batch = encode(tokenizer, texts)
    assert batch.mask[:, -1].tolist() == [1, 1] and batch.mask[1, 0] == 0
    assert batch.positions[1, -1] == batch.lengths[1] - 1
    for row, text in enumerate(texts):
        ids = token_ids(tokenizer, text)
        assert batch.ids[row, batch.columns([0, 0])[row] :].tolist() == ids


def closing(tokenizer, *added):
    """The tokenizer with these tokens put around every text: before it and behind it."""
    first, last = added
    core = tokenizer._tokenizer
    ids = [(token, core.token_to_id(token)) for token in {first, last}]
    core.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ids)
    return tokenizer


@pytest.mark.parametrize("around", [("</s>", "</s>"), ("</s>", "<pad>")], ids=["EOS that is BOS", "separator"])
def test_a_closing_special_token_is_in_no_prompt_and_no_answer(around):
    tokenizer = closing(deepcopy(byte_level_tokenizer()), *around)
    opening = tokenizer.convert_tokens_to_ids(around[0])
    plain = byte_level_tokenizer()
    assert token_ids(tokenizer, "The capital is") == [opening, *token_ids(plain, "The capital is")]
    assert target_ids(tokenizer, "The capital is", "Paris") == target_ids(plain, "The capital is", "Paris")
    span, whole = (subject_span(t, "The Space Needle is", "Space Needle") for t in (tokenizer, plain))
    assert span == (whole.start + 1, whole.stop + 1)
    # The text's own end token is text.
    assert token_ids(tokenizer, "Paris</s>")[-1] == tokenizer.convert_tokens_to_ids("</s>")


@TOKENIZERS
def test_a_line_end_is_kept_and_no_space_follows_it(tokenizer):
    prompt = "user\nThe capital?\nassistant\n"
    ids, answer = token_ids(tokenizer, prompt), target_ids(tokenizer, prompt, "Paris")
    assert [*ids, *answer] == token_ids(tokenizer, prompt + "Paris")
    assert tokenizer.decode(answer) == "Paris"


@TOKENIZERS
def test_a_join_of_the_facts_own_goes_before_kts(tokenizer):
    assert target_ids(tokenizer, "(", "Paris", " ") == target_ids(tokenizer, "is", "Paris")
    assert target_ids(tokenizer, "is", "Paris", "") == target_ids(tokenizer, "(", "Paris")


@pytest.mark.parametrize(("prompt", "answer"), [("born in 19", "45"), ("assistant\n\n", "Paris"), ("he does", "n't")])
def test_an_answer_stands_behind_the_prompts_own_tokens_where_both_together_would_be_others(prompt, answer):
    core = deepcopy(byte_level_tokenizer())
    core._tokenizer.train_from_iterator(
        ["born in 1945 ", "born in 19", "assistant\n\n", "he does", " doesn't "] * 9,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    assert token_ids(core, prompt) != token_ids(core, prompt + answer)[: len(token_ids(core, prompt))]
    ids, behind = joint_ids(core, prompt, answer)
    assert ids == token_ids(core, prompt) and core.decode([*ids, *behind]) == prompt + answer
    assert behind == target_ids(core, prompt, answer)
