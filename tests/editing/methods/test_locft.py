"""LocFT-BF: its steps against Adam's formula in float64, over batches that each epoch draws anew."""

import copy
from random import Random

import pytest
import torch
from families import tiny_model

import kt
from kt.errors import KtError
from kt.model.sites import Kind, Site
from kt.model.tokens import target_ids, token_ids

FACTS = [
    kt.Fact("The mother tongue of {} is", "Danielle Darrieux", target="soccer player"),
    kt.Fact("The {} is in the city of", "Space Needle", target="Warsaw"),
    kt.Fact("{} plays the sport of", "Megan Rapinoe", target="Paris"),
]
LR, EPOCHS = 1e-3, 3


def steps_of_adam(model, weight, batches):
    """Adam's steps (Kingma and Ba 2015) along the mean -log p of each target's tokens and the end of sequence."""
    tokenizer, start = model.tokenizer, weight.detach().clone()
    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    for t, batch in enumerate(batches, start=1):
        weight.requires_grad_()
        losses = []
        for fact in batch:
            answer = [*target_ids(tokenizer, fact.prompt, fact.target), tokenizer.eos_token_id]
            ids = torch.tensor([[*token_ids(tokenizer, fact.prompt), *answer[:-1]]])
            log_p = model.module(input_ids=ids).logits[0, -len(answer) :].log_softmax(-1)
            losses.append(-log_p[range(len(answer)), answer].mean())
        (g,) = torch.autograd.grad(torch.stack(losses).mean(), weight)
        weight.requires_grad_(False)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        weight -= LR * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
    change = weight.detach() - start
    weight.copy_(start)
    return change


def test_epochs_over_shuffled_batches_with_the_end_of_sequence():
    """One step a mini-batch in each epoch (breadth first), each epoch's order the next of the seed's draws."""
    tiny = tiny_model("llama")
    model = kt.load(tiny.module.double(), tokenizer=tiny.tokenizer)
    draw = Random(5)
    epochs = [draw.sample(FACTS, len(FACTS)) for _ in range(EPOCHS)]
    assert len({tuple(f.subject for f in epoch) for epoch in epochs}) > 1, "the order stays the same"
    settings = dict(layers=[1], lr=LR, num_steps=EPOCHS, batch_size=2, stop_loss=0.0)
    edit = kt.edit(model, FACTS, method="locft", seed=5, **settings)
    (name,) = edit.names
    batches = [part for epoch in epochs for part in (epoch[:2], epoch[2:])]
    want = steps_of_adam(model, model.own(Site(Kind.MLP, 1)), batches)
    torch.testing.assert_close(edit.delta(name).double(), want, atol=1e-7, rtol=1e-4)
    other = kt.edit(model, FACTS, method="locft", seed=6, **settings)
    assert not torch.allclose(edit.delta(name), other.delta(name), rtol=1e-2)


def test_a_tokenizer_without_an_end_of_sequence_is_one_line():
    model = tiny_model("llama")
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.eos_token = None
    bare = kt.load(model.module, tokenizer=tokenizer)
    with pytest.raises(KtError, match="eos=false"):
        kt.edit(bare, FACTS, method="locft", layers=[1], num_steps=1)
    kt.edit(bare, FACTS, method="locft", layers=[1], num_steps=1, eos=False)
