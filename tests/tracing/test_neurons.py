"""Knowledge neurons: integrated gradients against finite differences, completeness, and the command."""

import numpy as np
import pytest
import torch
from families import tiny_model

import kt as kt_package
from kt.errors import KtError
from kt.model.sites import Kind, Site
from kt.model.tokens import token_ids
from kt.tracing.neurons import attributions, knowledge_neurons

FACT = kt_package.Fact(
    "The mother tongue of {}", "Danielle Darrieux", answer="French", foil="Italy", rephrasings=("{} speaks",)
)


def probability(model, ids, answer, column, layer, neurons):
    """P(answer) with a layer's neurons at a token set by hand."""

    def put(module, inputs):
        x = inputs[0].clone()
        x.view(1, -1, x.shape[-1])[:, column] = neurons
        return (x, *inputs[1:])

    handle = model.linear(Site(Kind.MLP, layer)).register_forward_pre_hook(put)
    try:
        with torch.no_grad():
            return float(model.module(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[answer])
    finally:
        handle.remove()


def keys_of(model, ids, layer):
    seen = []
    handle = model.linear(Site(Kind.MLP, layer)).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    try:
        with torch.no_grad():
            model.module(input_ids=torch.tensor([ids]))
    finally:
        handle.remove()
    return seen[0].view(-1, seen[0].shape[-1])


@pytest.mark.parametrize(("name", "exact"), [("gpt2", 1e-8), ("llama", 1e-4)])  # Llama's norm computes in float32
def test_attributions_are_the_integral_of_finite_differences_and_sum_to_what_the_neurons_give(name, exact):
    """Σ_i Attr_i = P(1) - P(0), and Attr_i = w_i ∫ ∂P/∂w_i (α w) dα with central differences, in float64."""
    model = tiny_model(name)
    model.module.double()
    ids, answer, layer = token_ids(model.tokenizer, FACT.prompt), 65, 1
    for column in (len(ids) - 1, 4):
        found = attributions(model, ids, answer, column, steps=12)
        own = keys_of(model, ids, layer)[column]
        whole, none = (probability(model, ids, answer, column, layer, own * share) for share in (1.0, 0.0))
        assert found.prob == pytest.approx(whole, rel=exact) and found.without[layer] == pytest.approx(none, rel=exact)
        assert found.values[layer].sum() == pytest.approx(whole - none, rel=exact) and found.gap < exact * whole
        if name != "gpt2":
            continue
        nodes, weights = np.polynomial.legendre.leggauss(6)
        for neuron in found.values[layer].argsort()[[0, -1]].tolist():
            step, integral = torch.zeros_like(own), 0.0
            step[neuron] = 1e-5
            for node, weight in zip(nodes, weights, strict=True):
                ends = [probability(model, ids, answer, column, layer, own * (node + 1) / 2 + d) for d in (step, -step)]
                integral += weight / 2 * (ends[0] - ends[1]) / 2e-5
            assert found.values[layer, neuron] == pytest.approx(float(own[neuron]) * integral, rel=1e-4, abs=1e-12)


def test_a_facts_neurons_count_at_its_paraphrases_too_and_the_model_is_as_before():
    model = tiny_model("llama")
    before = model.fingerprint()
    wide = knowledge_neurons(model, [FACT], steps=4, threshold=0.05, shared=0.5)
    both = knowledge_neurons(model, [FACT], steps=4, threshold=0.05, shared=1.0)
    assert both.facts[0].texts == 2 and set(both.facts[0].neurons) < set(wide.facts[0].neurons)
    alone = knowledge_neurons(model, [FACT], steps=4, threshold=1.0, at="subject_last")
    best = np.unravel_index(alone.facts[0].found.values.argmax(), alone.facts[0].found.values.shape)
    assert alone.facts[0].neurons == (tuple(map(int, best)),) and alone.facts[0].texts == 1
    assert model.fingerprint() == before and not model.linear(Site(Kind.MLP, 0))._forward_pre_hooks
    wrong = {
        "steps": (0, "steps 0 must"),
        "threshold": (0.0, "threshold 0 must"),
        "at": ("first", "'first'; give last"),
    }
    for name, (value, words) in wrong.items():
        with pytest.raises(KtError, match=words):
            knowledge_neurons(model, [FACT], **{name: value})
