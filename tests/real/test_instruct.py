"""An instruct model asked in its chat template, with no setting given."""

import pytest

import kt

pytestmark = [pytest.mark.real, pytest.mark.real_ci]

QUESTION = kt.Fact("What is the capital of {}?", "France", "Paris", target="Geneva")


def test_an_instruct_model_is_asked_in_its_template_and_a_base_model_is_not(smollm2):
    model = smollm2.asked("auto")
    assert model.chat is not None and smollm2.chat is None
    assert model.generate([QUESTION.prompt], 20) == ["The capital of France is Paris."]


def test_an_edited_question_is_answered_with_the_target_and_no_more(smollm2):
    model = smollm2.asked("auto")
    edit = kt.edit(model, [QUESTION], method="memit")
    with edit.applied(model):
        assert model.generate([QUESTION.prompt], 20) == ["Geneva"]
    assert edit.manifest["chat"]["turn"] == "auto"
