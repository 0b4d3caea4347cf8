"""SADR's term: what it adds to a search's loss, by its formula with PyTorch alone, and what it does to attention."""

import pytest
import torch
from families import tiny_model

import kt
from kt.editing.closed_form.aims import Position, TargetSite
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.objective import KL, NLL, AttentionDrift, Objective
from kt.editing.closed_form.targets import find_targets
from kt.editing.methods.memit import MEMIT
from kt.model.sites import Kind, Site
from kt.model.tokens import target_ids, template_span, token_ids

FACT = kt.Fact("The mother tongue of {} is", "Danielle Darrieux", target="Italy and the")
LAYER, FACTOR = 0, 2e4
CONTEXTS = Contexts((("{}",), ("Therefore. {}", "Because I. {}")))
AIM = TargetSite(Site(Kind.RESID, LAYER), Position.SUBJECT_LAST)


def run(model, template, shift=None):
    """A row's attention at the prompt's last token, (layer, head, key), and the mean -log p of the target."""
    fact = FACT.template if template is None else template
    prompt = token_ids(model.tokenizer, fact.replace("{}", FACT.subject))
    subject = template_span(model.tokenizer, fact, FACT.subject).last
    answer = target_ids(model.tokenizer, FACT.prompt, FACT.target)

    def behind(module, inputs, output):
        if shift is not None:
            (output[0] if isinstance(output, tuple) else output)[0, subject] += shift

    hook = model.module.get_submodule(model.layout.path(Kind.RESID, LAYER)).register_forward_hook(behind)
    with torch.no_grad():
        out = model.module(input_ids=torch.tensor([[*prompt, *answer[:-1]]]), output_attentions=True)
    hook.remove()
    weights = torch.stack([layer[0, :, len(prompt) - 1] for layer in out.attentions]).double()
    log_p = out.logits[0, -len(answer) :].double().log_softmax(-1)
    return weights, -log_p[range(len(answer)), list(answer)].mean(), subject


def by_hand(model, shift):
    """(nll, Σ over layers of Σ over heads H of KL(before ‖ now), a mean over rows): H by the subject's weight."""
    model.module.set_attn_implementation("eager")
    losses, drifts = [], []
    for template in CONTEXTS.templates(FACT, model.tokenizer):
        before, _, subject = run(model, template)
        now, loss, _ = run(model, template, shift)
        p, q = before + 1e-8, now + 1e-8
        total = 0.0
        for layer in range(LAYER + 1, model.n_layers):
            for head in range(p.shape[1]):
                if q[layer, head, subject] > p[layer, :, subject].max():
                    total += float((p[layer, head] * (p[layer, head] / q[layer, head]).log()).sum())
        losses.append(float(loss))
        drifts.append(total)
    model.module.set_attn_implementation("sdpa")
    return sum(losses) / len(losses), sum(drifts) / len(drifts)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("essence", [False, True])
def test_the_loss_is_the_nll_and_the_drift_of_the_heads_that_look_at_the_subject_more(family, essence):
    model = tiny_model(family)
    terms = (NLL(), AttentionDrift(FACTOR), *([KL(0.0)] if not essence else [KL(1e-12)]))
    found = find_targets(model, [FACT], [AIM], CONTEXTS, Objective(terms, steps=4, lr=0.5))
    nll, drift = by_hand(model, found.wanted[AIM][0] - found.before[AIM][0])
    assert drift > 0, "no head looks at the subject more than any did"
    assert float(found.loss[0]) == pytest.approx(nll + FACTOR * 1e-4 * drift, rel=1e-3)


def test_the_term_holds_attention_back_and_leaves_the_model_as_it_was():
    model = tiny_model("gpt2")
    kind = model.module.config._attn_implementation
    drifts = []
    for terms in ((NLL(),), (NLL(), AttentionDrift(FACTOR))):
        found = find_targets(model, [FACT, FACT], [AIM], CONTEXTS, Objective(terms, steps=10, lr=0.5))
        assert torch.allclose(found.loss[0], found.loss[1], rtol=1e-4)
        drifts.append(by_hand(model, found.wanted[AIM][0] - found.before[AIM][0])[1])
    assert drifts[1] < 0.7 * drifts[0]
    assert model.module.config._attn_implementation == kind
    assert AttentionDrift(50.0) in MEMIT(layers_mlp=(1,), attention_drift=50.0).objective.terms
    assert not MEMIT(layers_mlp=(1,)).objective.reads_attention
