"""Both models know what they are said to know, and are traced as plain hooks trace them; too long for every commit."""

import pytest
from real_help import assert_trace_equals_plain_hooks, first_probability

import kt

pytestmark = pytest.mark.real


def test_smollm2_knows_the_twenty_facts(smollm2, facts):
    known = [first_probability(smollm2, fact.prompt, fact.answer)[1] for fact in facts]
    assert len(known) == 20 and all(known)


@pytest.mark.parametrize(
    ("prompt", "answer", "probability"),
    [("Microsoft was founded by Bill", "Gates", 0.978), ("The mother tongue of Danielle Darrieux is", "French", 0.336)],
)
def test_gemma3_says_what_the_published_model_says(gemma3, prompt, answer, probability):
    found, first = first_probability(gemma3, prompt, answer)
    assert first and found == pytest.approx(probability, abs=2e-3)


def test_a_trace_of_gemma3_equals_plain_hooks(gemma3):
    fact = kt.Fact("The capital of {} is", "France", answer="Paris", foil="Rome", id="france")
    modules = {"mlp": "post_feedforward_layernorm", "attn": "post_attention_layernorm"}
    assert_trace_equals_plain_hooks(gemma3, fact, modules, tolerance=1e-4)
