"""A record that the model cannot read is counted and left out, by scores and by edits."""

from __future__ import annotations

import pytest
from editing_help import fast
from families import tiny_model

import kt
from kt.errors import BadFact

SHORT = {"prompt": "The city of {} is", "subject": "Rome", "target_new": "Italy", "target_true": "French"}
LONG = SHORT | {"id": "long", "prompt": "so " * 400 + SHORT["prompt"]}


@pytest.fixture(scope="module")
def model():
    model = tiny_model("gpt2")
    assert model.module.config.max_position_embeddings < 400
    return model


def test_scores_are_those_of_the_other_records(model):
    in_paraphrase = SHORT | {"id": "paraphrase", "paraphrase_prompts": [LONG["prompt"].format("Rome")]}
    says = r"^2 of 3 records left out, .* \(long: the prompt has \d+ tokens, and the"
    with pytest.warns(UserWarning, match=says) as warned:
        scores = kt.evaluate(model, [SHORT, LONG, in_paraphrase])
    assert [w.filename for w in warned] == [__file__]  # the user's line, not one of kt's
    assert len(scores.records) == 1 and scores.protocol["left out"].startswith("2 records")
    with pytest.raises(BadFact, match="can read none of the 1 record"):
        kt.evaluate(model, [LONG])


def test_an_edit_is_of_the_other_requests(model):
    with pytest.warns(UserWarning, match="^1 of 2 records left out") as warned:
        edit = kt.edit(model, [LONG, SHORT], method="ft", **fast("ft", layers_mlp=[0]))
    assert len(edit.requests) == 1 and {w.filename for w in warned} == {__file__}


def test_room_for_the_text_behind_a_prompt_counts(model):
    limit = model.module.config.max_position_embeddings
    prompt = SHORT["prompt"]
    while len(model.tokenizer(prompt.format("Rome"))["input_ids"]) < limit - 6:
        prompt = f"x{prompt}"
    full = SHORT | {"id": "full", "prompt": prompt}
    with pytest.warns(UserWarning, match="1 of 2 records left out"):
        kt.evaluate(model, [SHORT, full])
    assert len(kt.evaluate(model, [SHORT, full], generate=False).records) == 2
