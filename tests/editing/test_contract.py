"""What every method keeps to on every family."""

import pytest
import torch
from editing_help import ATTENTION, FAST, REQUESTS, solve, statistics
from families import tiny_model

import kt
from kt.editing import METHODS, Statistics
from kt.errors import BadFact, BadFile, KtError, SubjectNotFound, UnknownSite, WorkFailed
from kt.model.sites import Kind


@pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_family(family, method, corpus, tmp_path):
    model = tiny_model(family)
    before = model.fingerprint()
    edit = solve(model, corpus, tmp_path, method)
    assert model.fingerprint() == before, "solving left a trace in the model"
    if method not in ("ft", "ft-l", "ft-wd", "lora", "ultraedit"):  # closed forms: one column a request
        assert all(u.rank <= len(REQUESTS) for u in edit.updates.values())
    gains = [after - start for start, after in (r.target_prob for r in edit.report)]
    assert min(gains) > 0, gains
    if method == "ft-wd":
        assert set(edit.names) == {name for layer in (0, 1) for name in model.block_weights(layer)}
    else:
        kinds = {Kind.MLP, Kind.ATTN} if METHODS[method].writes_attention else {Kind.MLP}
        assert {model.site_of(n).kind for n in edit.names} == kinds
    untouched = {n: w.clone() for n, w in model.module.state_dict().items() if n not in edit.names}
    with edit.applied(model):
        assert model.fingerprint() != before
        now = model.module.state_dict()
        assert all(torch.equal(w, now[n]) for n, w in untouched.items())
        for name in edit.names:
            assert edit.delta(name).shape == model.weight(name).shape
    assert model.fingerprint() == before
    edit.apply_(model)
    with pytest.raises(KtError, match="already applied"):
        edit.apply_(model)
    edit.revert_(model)
    assert model.fingerprint() == before
    path = edit.save(tmp_path / "edit.safetensors")
    loaded = kt.Edit.load(path)
    assert all(torch.equal(loaded.delta(n), edit.delta(n)) for n in edit.names)
    assert loaded.report == edit.report and loaded.manifest["alpha"] == edit.alpha


@pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")
class TestBalance:
    def test_alpha_zero_equals_memit(self, setting):
        joint, memit = solve(*setting, alpha=0.0), solve(*setting, method="memit")
        assert joint.names == memit.names
        assert all(torch.equal(joint.delta(n), memit.delta(n)) for n in memit.names)

    def test_alpha_one_writes_attention_only(self, setting):
        edit = solve(*setting, alpha=1.0)
        assert {setting[0].site_of(n).kind for n in edit.names} == {Kind.ATTN}

    def test_each_update_is_the_full_one_scaled(self, setting):
        part, mlp, attn = solve(*setting, alpha=0.25), solve(*setting, alpha=0.0), solve(*setting, alpha=1.0)
        for name in part.names:
            full, share = (mlp, 0.75) if name in mlp.names else (attn, 0.25)
            torch.testing.assert_close(part.delta(name), share * full.delta(name), atol=1e-6, rtol=1e-4)

    def test_coupled_paths_see_each_other(self, setting):
        apart, coupled = solve(*setting), solve(*setting, coupled=True)
        assert all(torch.equal(apart.delta(n), coupled.delta(n)) for n in apart.names if "o_proj" in n)
        assert any(not torch.allclose(apart.delta(n), coupled.delta(n), rtol=1e-2) for n in apart.names if "down" in n)

    def test_joint_targets_and_hidden_aim_are_options(self, setting):
        base = solve(*setting)
        for changes, aim in (
            ({"joint_targets": True, "layers_attn": (0,)}, "hidden.0"),
            ({"attn_aim": "attn"}, "attn.1"),
        ):
            other = solve(*setting, **changes)
            assert aim in other.targets
            assert any(not torch.allclose(base.delta(n), other.delta(n), rtol=1e-3) for n in base.names)

    def test_same_seed_same_bytes_and_order_does_not_matter(self, setting, tmp_path):
        one, two = solve(*setting), solve(*setting)
        assert one.save(tmp_path / "a").read_bytes() == two.save(tmp_path / "b").read_bytes()
        turned = solve(*setting, requests=REQUESTS[::-1])
        for name in one.names:
            torch.testing.assert_close(one.delta(name), turned.delta(name), atol=1e-5, rtol=1e-3)

    def test_own_lambda_for_attention(self, setting):
        one = {"layers_attn": (0,)}  # of several, the later would make up for what the earlier held back
        base, tight = solve(*setting, **one), solve(*setting, **one, mom2_update_weight_attn=10.0)
        for name in base.names:
            smaller = float(tight.delta(name).norm()) < 0.9 * float(base.delta(name).norm())
            assert smaller == ("o_proj" in name)

    def test_batched_targets_equal_single_ones(self, setting):
        both = solve(*setting)
        for row, request in enumerate(REQUESTS):
            one = solve(*setting, requests=[request])
            for aim in both.targets:
                torch.testing.assert_close(both.targets[aim][row], one.targets[aim][0], atol=2e-4, rtol=1e-3)

    def test_half_precision_model(self, setting):
        model, corpus, cache = setting
        half = kt.load(tiny_model("qwen3").module.to(torch.bfloat16), tokenizer=model.tokenizer)
        before = half.fingerprint()
        edit = solve(half, corpus, cache)
        assert half.fingerprint() == before and edit.report[0].target_prob[1] > edit.report[0].target_prob[0]


def test_solving_leaves_the_model_alone_when_it_raises(corpus, tmp_path, monkeypatch):
    model = tiny_model("llama")
    before = model.fingerprint()
    stats = statistics(model, corpus, tmp_path)
    broken = Statistics({n: f for n, f in stats.files.items() if "layers.1" not in n})
    with pytest.raises(BadFile, match="no second moment"):  # layer 0 is written before layer 1 is asked for
        kt.edit(model, REQUESTS, method="memit", statistics=broken, **FAST)
    assert model.fingerprint() == before


def test_wrong_requests_are_one_line(corpus, tmp_path):
    model = tiny_model("gpt2")
    one = REQUESTS[0]
    for changes, error, words in (
        ({"requests": []}, KtError, "no requests"),
        ({"requests": [one | {"target_new": " "}]}, BadFact, "empty"),
        ({"requests": [one | {"target_new": "French"}]}, BadFact, "old answer"),
        ({"requests": [one | {"prompt": "The mother tongue is"}]}, SubjectNotFound, "Danielle"),
        ({"layers_mlp": (7,)}, UnknownSite, "layers 0 to 2"),
        ({"alpha": 2.0}, KtError, "alpha"),
        ({"alpha": "lots"}, KtError, "alpha"),
        ({"method": "magic"}, KtError, "magic"),
        ({"v_learning": 1}, KtError, "v_learning"),
        ({"v_lr": "fast"}, KtError, "v_lr"),
        ({"v_lr": -1.0}, KtError, "v_lr"),
        ({"v_num_grad_steps": 0}, KtError, "v_num_grad_steps"),
        ({"v_num_grad_steps": 2.5}, KtError, "v_num_grad_steps"),
        ({"attn_aim": "mlp"}, KtError, "attn_aim"),
        ({"fact_token": "first"}, KtError, "subject_last"),
        ({"context_templates": ["no place"]}, BadFact, "no place"),
        ({"preset": "none-such"}, KtError, "none-such"),
    ):
        arguments = {"requests": REQUESTS, "statistics": None} | FAST | ATTENTION | changes
        with pytest.raises(error, match=words) as caught:
            kt.edit(model, **arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")
def test_an_edit_that_changes_nothing_or_is_not_finite_is_refused(corpus, tmp_path):
    model = tiny_model("gpt2")
    edit = solve(model, corpus, tmp_path, "memit")
    name = edit.names[0]
    zero = kt.Edit({name: edit.updates[name].scaled(0.0)}, {})
    with pytest.raises(WorkFailed, match="changes nothing"):
        zero.check()
    with pytest.raises(WorkFailed, match="not finite"):
        kt.Edit({name: edit.updates[name].scaled(float("nan"))}, {}).check()


@pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")
def test_an_edit_of_another_model_is_refused(corpus, tmp_path):
    edit = solve(tiny_model("gpt2"), corpus, tmp_path, "memit")
    other = tiny_model("gpt2", seed=1)
    with pytest.raises(KtError, match="not the weight"):
        edit.apply_(other)
    edit.apply_(other, force=True)
    with pytest.raises(KtError, match="no weight called"):
        edit.apply_(tiny_model("llama"))
    with pytest.raises(BadFile):
        kt.Edit.load(__file__)
    (tmp_path / "cut").write_bytes(edit.save(tmp_path / "whole").read_bytes()[:500])
    with pytest.raises(BadFile):
        kt.Edit.load(tmp_path / "cut")


def test_alpha_that_cannot_be_traced_asks_for_a_number():
    with pytest.raises(WorkFailed, match=r"such as 0\.3"):
        kt.edit(tiny_model("gpt2"), REQUESTS, **(FAST | {"layers_attn": (0,), "alpha": "auto"}))
