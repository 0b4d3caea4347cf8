"""CrispEdit: the projection and one step of Adam against their formulas in float64, with PyTorch alone."""

import pytest
import torch
from editing_help import statistics
from families import tiny_model

import kt
from kt.editing.layer_tuning import unrelated_rows
from kt.errors import KtError
from kt.model.sites import Kind, Site
from kt.model.tokens import target_ids, token_ids

FACT = kt.Fact("The mother tongue of {} is", "Danielle Darrieux", target="soccer player")
SITE, LR, ENERGY, TEXTS = Site(Kind.MLP, 1), 1e-3, 0.9, 5


def gradient_moment(model):
    """Mean g gᵀ over the texts' tokens, of the summed -log p of their next tokens, one text a forward."""
    linear, seen, total, count = model.linear(SITE), [], 0.0, 0

    def keep(module, inputs, output):
        output.requires_grad_().retain_grad()
        seen.append(output)

    hook = linear.register_forward_hook(keep)
    with torch.enable_grad():
        for row in unrelated_rows(model, TEXTS, 64):
            log_p = model.module(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1)
            (-log_p[range(len(row) - 1), row[1:]].sum()).backward()
            g = seen[-1].grad[0, :-1]
            total, count = total + g.T @ g, count + len(g)
    hook.remove()
    return total / count


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_step_follows_the_projected_gradient(family, corpus, tmp_path):
    """G ← U_B ((U_Bᵀ G U_A) ⊙ M) U_Aᵀ; ΔW = -lr G / (|G| + 1e-8). gpt2's weight is stored turned."""
    tiny = tiny_model(family)
    moments = statistics(tiny, corpus, tmp_path)
    model = kt.load(tiny.module.double(), tokenizer=tiny.tokenizer)
    answer = target_ids(model.tokenizer, FACT.prompt, FACT.target)
    ids = torch.tensor([[*token_ids(model.tokenizer, FACT.prompt), *answer[:-1]]])
    own = model.own(SITE).requires_grad_()
    with torch.enable_grad():
        log_p = model.module(input_ids=ids).logits[0, -len(answer) :].log_softmax(-1)
        (gradient,) = torch.autograd.grad(-log_p[range(len(answer)), list(answer)].mean(), own)
    own.requires_grad_(False)
    gradient = gradient.T if family == "gpt2" else gradient
    a, u_a = torch.linalg.eigh(moments.moment_of(model.weight_name(SITE)).matrix())
    b, u_b = torch.linalg.eigh(gradient_moment(model))
    products = sorted((x * y, i, j) for i, y in enumerate(b.clamp(min=0).tolist()) for j, x in enumerate(a.tolist()))
    kept, left, whole = torch.ones(len(b), len(a)), 0.0, sum(each for each, *_ in products)
    for product, i, j in reversed(products):
        kept[i, j] = 0
        left += product
        if left >= ENERGY * whole:
            break
    assert 0 < kept.sum() < kept.numel()
    projected = u_b @ ((u_b.T @ gradient @ u_a) * kept) @ u_a.T
    settings = dict(statistics=moments, layers=[1], num_steps=1, lr=LR, energy=ENERGY, texts=TEXTS)
    edit = kt.edit(model, [FACT], method="crispedit", **settings)
    want = -LR * projected / (projected.abs() + 1e-8)
    torch.testing.assert_close(edit.delta(edit.names[0]).double(), want, atol=1e-5, rtol=1e-3)
    assert float((gradient - projected).norm()) > 0.01 * float(gradient.norm())


@pytest.mark.parametrize(("given", "words"), [({"energy": 1.0}, "below 1"), ({"modules": "block"}, "whole block")])
def test_what_cannot_be_projected_is_one_line(given, words):
    with pytest.raises(KtError, match=words):
        kt.edit(tiny_model("llama"), [FACT], method="crispedit", layers=[1], **given)
