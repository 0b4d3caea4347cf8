"""FT-M: one step against Adam's formula in float64, and the original code's update."""

import json
from pathlib import Path

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file

import kt
from kt.model.sites import Kind, Site
from kt.model.tokens import target_ids, token_ids

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "edit"
REQUEST = {"prompt": "The mother tongue of {} is", "subject": "Danielle Darrieux", "target_new": "soccer player"}


def test_one_step_is_adams_first_step_along_the_teacher_forced_gradient():
    """ΔW = -lr · g / (|g| + 1e-8), g the gradient of the mean -log p of each target token after those before it."""
    tiny = tiny_model("llama")
    model = kt.load(tiny.module.double(), tokenizer=tiny.tokenizer)
    fact = kt.Fact(REQUEST["prompt"], REQUEST["subject"], target=REQUEST["target_new"])
    answer = target_ids(model.tokenizer, fact.prompt, fact.target)
    assert len(answer) > 1, "with one token both losses are the same"
    ids = torch.tensor([[*token_ids(model.tokenizer, fact.prompt), *answer[:-1]]])
    weight = model.own(Site(Kind.MLP, 1)).requires_grad_()
    log_p = model.module(input_ids=ids).logits[0, -len(answer) :].log_softmax(-1)
    (gradient,) = torch.autograd.grad(-log_p[range(len(answer)), list(answer)].mean(), weight)
    weight.requires_grad_(False)
    edit = kt.edit(model, [fact], method="ft-m", layers=[1], num_steps=1, lr=1e-3)
    (name,) = edit.names
    torch.testing.assert_close(
        edit.delta(name).double(), -1e-3 * gradient / (gradient.abs() + 1e-8), atol=1e-9, rtol=1e-5
    )
    other = kt.edit(model, [fact], method="ft", layers=[1], num_steps=1, lr=1e-3)
    assert not torch.allclose(edit.delta(name), other.delta(name), rtol=1e-2)


@pytest.mark.skipif(not GOLDEN.exists(), reason="the reference results are not beside the checkout")
def test_lands_on_the_original_codes_update():
    model = kt.load(str(GOLDEN / "model"), dtype="float32", device="cpu")
    data = json.loads((GOLDEN / "qwen2.ft_m.json").read_text())
    names = ("layers", "num_steps", "lr", "weight_decay", "norm_constraint", "batch_size")
    edit = kt.edit(
        model, data["requests"], method="ft-m", **{n: data["hparams"][n] for n in names if n in data["hparams"]}
    )
    updates = load_file(GOLDEN / "qwen2.ft_m.safetensors")
    assert {f"dW.{name}" for name in edit.names} == set(updates)
    for name in edit.names:
        want = updates[f"dW.{name}"]
        assert float((edit.delta(name) - want).norm() / want.norm()) < 2e-5
