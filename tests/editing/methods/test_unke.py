"""UnKE: one step against AdamW's formula in float64, along the gradient of the block's two mean squared distances."""

import torch
from families import tiny_model

import kt
from kt.editing.layer_tuning import unrelated_rows
from kt.model.sites import Kind
from kt.model.tokens import token_ids

FACTS = [
    kt.Fact("The mother tongue of {} is", "Danielle Darrieux", target="Italy and the city of Warsaw in France"),
    kt.Fact("{} plays", "Megan Rapinoe", target="soccer"),
]
LAYER, LR, DECAY = 1, 1e-3, 0.01


def outputs(model, rows):
    """The stream behind the block at every token of each row, one row a forward, with a gradient."""
    found = []
    block = model.module.get_submodule(model.layout.path(Kind.RESID, LAYER))
    hook = block.register_forward_hook(lambda m, i, o: found.append((o[0] if isinstance(o, tuple) else o)[0]))
    for row in rows:
        model.module(input_ids=torch.tensor([row]))
    hook.remove()
    return found


def mean_square(model, rows, wanted):
    apart = torch.cat([o - w for o, w in zip(outputs(model, rows), wanted, strict=True)])
    return apart.square().mean()


def test_one_step_brings_the_block_towards_the_value_and_holds_it_on_other_text():
    """ΔW = -lr g / (|g| + 1e-8) - lr · decay · W (no decay of vectors), g of the sum of both means."""
    tiny = tiny_model("llama")
    model = kt.load(tiny.module.double(), tokenizer=tiny.tokenizer)
    settings = dict(layers=[LAYER], lr=LR, num_steps=1, weight_decay=DECAY, texts=3, v_num_grad_steps=6)
    edit = kt.edit(model, FACTS, method="unke", **settings)
    (aim,) = edit.targets
    assert aim == f"hidden.{LAYER}@last" and set(edit.names) == set(model.block_weights(LAYER))
    prompts = [token_ids(model.tokenizer, fact.prompt) for fact in FACTS]
    others = unrelated_rows(model, 3, 64)
    assert len(others) == 3
    with torch.no_grad():
        wanted, held = ([o.clone() for o in outputs(model, rows)] for rows in (prompts, others))
        for own, target in zip(wanted, edit.targets[aim], strict=True):
            own[-1] = target
    weights = [model.own(name).requires_grad_() for name in edit.names]
    with torch.enable_grad():  # away from its least, where the second mean has no gradient yet
        loss = mean_square(model, prompts, wanted) + mean_square(model, others, held)
        gradients = torch.autograd.grad(loss, weights)
    for name, weight, g in zip(edit.names, weights, gradients, strict=True):
        weight.requires_grad_(False)
        want = -LR * g / (g.abs() + 1e-8) - LR * DECAY * weight * (weight.dim() > 1)
        torch.testing.assert_close(edit.delta(name).double(), want.view_as(edit.delta(name)), atol=2e-6, rtol=1e-3)


def test_the_trained_block_keeps_its_output_on_other_text_and_says_a_long_answer():
    model = tiny_model("llama")
    others = unrelated_rows(model, 3, 64)
    settings = dict(layers=[LAYER], lr=0.01, texts=3, v_num_grad_steps=15, v_lr=0.3, clamp_norm_factor=20.0)
    edit = kt.edit(model, FACTS, method="unke", **settings)
    assert all(after > 10 * before for before, after in (each.target_prob for each in edit.report))
    alone = kt.edit(model, FACTS, method="unke", **(settings | {"texts": 1}))
    with torch.no_grad():
        held = outputs(model, others)
        drifts = []
        for each in (edit, alone):
            with each.applied(model):
                drifts.append(float(mean_square(model, others[1:], held[1:])))
    assert drifts[0] < drifts[1]
    through = edit.manifest["value_change"][f"hidden.{LAYER}@last"]["came_through"]["mean"]
    assert 0.5 < through < 1.5


def test_an_epoch_has_a_step_for_each_mini_batch_of_requests():
    model = tiny_model("llama")
    settings = dict(layers=[LAYER], texts=1, num_steps=3, v_num_grad_steps=2, check=False)
    edits = {size: kt.edit(model, FACTS, method="unke", batch_size=size, **settings) for size in (1, 2, 9)}
    steps = {size: edit.manifest["steps"] for size, edit in edits.items()}
    assert steps == {1: 6, 2: 3, 9: 3}
    alone = kt.edit(model, FACTS, method="unke", batch_size=1, **(settings | {"num_steps": 1}))
    once = kt.edit(model, FACTS[:1], method="unke", **(settings | {"num_steps": 1}))
    assert all(not torch.equal(alone.delta(name), once.delta(name)) for name in once.names)
