"""IntAttn-Edit: two paths, scaled α and 1 - α, that know of each other only where they are told to."""

import pytest
import torch
from editing_help import REQUESTS, solve
from families import tiny_model

import kt
from kt.editing.methods.intattn import IntAttn
from kt.editing.resolve import resolve
from kt.errors import KtError
from kt.model.sites import Kind

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")


def test_alpha_zero_equals_memit(setting):
    joint, memit = solve(*setting, alpha=0.0), solve(*setting, method="memit")
    assert joint.names == memit.names
    assert all(torch.equal(joint.delta(n), memit.delta(n)) for n in memit.names)


def test_alpha_one_writes_attention_only(setting):
    edit = solve(*setting, alpha=1.0)
    assert {setting[0].site_of(n).kind for n in edit.names} == {Kind.ATTN}


def test_each_update_is_the_full_one_scaled(setting):
    part, mlp, attn = solve(*setting, alpha=0.25), solve(*setting, alpha=0.0), solve(*setting, alpha=1.0)
    for name in part.names:
        full, share = (mlp, 0.75) if name in mlp.names else (attn, 0.25)
        torch.testing.assert_close(part.delta(name), share * full.delta(name), atol=1e-6, rtol=1e-4)


def test_coupled_paths_see_each_other(setting):
    apart, coupled = solve(*setting), solve(*setting, coupled=True)
    assert all(torch.equal(apart.delta(n), coupled.delta(n)) for n in apart.names if "o_proj" in n)
    assert any(not torch.allclose(apart.delta(n), coupled.delta(n), rtol=1e-2) for n in apart.names if "down" in n)


def test_joint_targets_and_hidden_aim_are_options(setting):
    base = solve(*setting)
    for changes, aim in (
        ({"joint_targets": True, "layers_attn": (0,)}, "hidden.0"),
        ({"attn_aim": "attn"}, "attn.1"),
    ):
        other = solve(*setting, **changes)
        assert aim in other.targets
        assert any(not torch.allclose(base.delta(n), other.delta(n), rtol=1e-3) for n in base.names)


def test_same_seed_same_bytes_and_order_does_not_matter(setting, tmp_path):
    one, two = solve(*setting), solve(*setting)
    assert one.save(tmp_path / "a").read_bytes() == two.save(tmp_path / "b").read_bytes()
    turned = solve(*setting, requests=REQUESTS[::-1])
    for name in one.names:
        torch.testing.assert_close(one.delta(name), turned.delta(name), atol=1e-5, rtol=1e-3)


def test_own_lambda_for_attention(setting):
    one = {"layers_attn": (0,)}  # of several, the later would make up for what the earlier held back
    base, tight = solve(*setting, **one), solve(*setting, **one, mom2_update_weight_attn=10.0)
    for name in base.names:
        smaller = float(tight.delta(name).norm()) < 0.9 * float(base.delta(name).norm())
        assert smaller == ("o_proj" in name)


def test_batched_targets_equal_single_ones(setting):
    both = solve(*setting)
    for row, request in enumerate(REQUESTS):
        one = solve(*setting, requests=[request])
        for aim in both.targets:
            torch.testing.assert_close(both.targets[aim][row], one.targets[aim][0], atol=2e-4, rtol=1e-3)


def test_half_precision_model(setting):
    model, corpus, cache = setting
    half = kt.load(tiny_model("qwen3").module.to(torch.bfloat16), tokenizer=model.tokenizer)
    before = half.fingerprint()
    edit = solve(half, corpus, cache)
    assert half.fingerprint() == before and edit.report[0].target_prob[1] > edit.report[0].target_prob[0]


@pytest.mark.parametrize("alpha", [1.5, -0.1, "lots", float("nan"), (0.5, 2.0)])
def test_an_alpha_that_cannot_be_has_one_wording(alpha):
    with pytest.raises(KtError, match=r"alpha .* must be auto, per-fact, or lie between 0 \(MLP only\) and 1"):
        IntAttn(alpha=alpha)


def test_a_plan_needs_an_alpha_that_is_a_number():
    with pytest.raises(KtError, match="alpha is still 'auto'"):
        IntAttn(layers_mlp=(1,), layers_attn=(0,)).plan()


def test_a_number_typed_as_text_is_a_number(setting):
    config = IntAttn(layers_mlp=(1,), layers_attn=(0,), alpha="0.25")
    assert config.fixed_alpha == 0.25
    assert resolve(config, setting[0], [])[0].plan().paths[0].scale == 0.25
