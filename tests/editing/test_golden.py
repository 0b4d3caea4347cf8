"""The same ΔW as the original code, given the same inputs (../shared/golden; skipped where it is not there)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kt

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "edit"
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="the reference results are not beside the checkout")


def relative(a, b):
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def model():
    return kt.load(str(GOLDEN / "model"), dtype="float32", device="cpu")


def run(model, name, **changes):
    data = json.loads((GOLDEN / f"qwen2.{name}.json").read_text())
    hp = data["hparams"]
    keep = (
        "layers",
        "v_lr",
        "v_num_grad_steps",
        "v_weight_decay",
        "kl_factor",
        "clamp_norm_factor",
        "mom2_update_weight",
    )
    arguments = {k: hp[k] for k in keep} | changes
    edit = kt.edit(
        model, data["requests"], method=data["method"], statistics=GOLDEN / "second_moments.safetensors",
        context_templates=data["context_templates"], **arguments,
    )  # fmt: skip
    return edit, load_file(GOLDEN / f"qwen2.{name}.safetensors"), hp


def test_memit_lands_on_the_original_codes_update(model):
    before = model.fingerprint()
    edit, want, hp = run(model, "memit")
    assert model.fingerprint() == before
    aim = f"hidden.{hp['layers'][-1]}"
    assert relative(edit.targets[aim], want["z"]) < 1e-4
    for layer in hp["layers"]:
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert relative(edit.keys[name], want[f"keys.{layer}"]) < 1e-4
        assert relative(edit.delta(name), want[f"dW.{name}"]) < 1e-3


def test_a_deliberate_mistake_is_seen(model):
    edit, want, hp = run(model, "memit", kl_factor=0.2)
    name = f"model.layers.{hp['layers'][0]}.mlp.down_proj.weight"
    assert relative(edit.delta(name), want[f"dW.{name}"]) > 1e-2
