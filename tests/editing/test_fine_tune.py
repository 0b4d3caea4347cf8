"""Fine-tuning as an edit: the original code's numbers, and what every variant keeps to on every family."""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_model, tiny_module
from safetensors.torch import load_file

import kt
from kt.editing.adapter import NAME, Adapter, adapted, low_rank
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.second_moment import Statistics
from kt.editing.fine_tune import BOX as BOX_OF_RMS
from kt.editing.fine_tune import RATE, FineTune, Weights
from kt.editing.plan import SolveContext
from kt.errors import KtError, WorkFailed
from kt.facts.formats import read_record
from kt.model.head import is_widened
from kt.model.sites import Kind, Site
from kt.model.tokens import encode, target_ids
from kt.model.update import LowRank

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "edit"
REQUESTS = [
    {"prompt": "The mother tongue of {} is", "subject": "Danielle Darrieux", "target_new": "Paris"},
    {"prompt": "The {} is in the city of", "subject": "Space Needle", "target_new": "the"},
    {"prompt": "In the city of Paris, {} plays the sport of", "subject": "Megan Rapinoe", "target_new": "Warsaw"},
]
BOX = 0.02
PLANS = {
    "ft": FineTune((1,), num_steps=6, lr=0.01),
    "ft-l": FineTune((1,), num_steps=6, lr=0.01, norm_constraint=BOX),
    "ft-wd": FineTune((1,), modules="block", objective="target_new", num_steps=6, lr=0.01, weight_decay=1e-3),
    "lora": FineTune((0, 1), modules="both", objective="target_new", num_steps=6, lr=0.02, adapter=Adapter(4, 8.0)),
}
EVERY = pytest.mark.parametrize("method", PLANS)


def facts_of(requests=REQUESTS):
    return [read_record(dict(r), f"request {i}").as_request() for i, r in enumerate(requests)]


def setting(model, seed=0):
    return SolveContext(model, Statistics({}), Contexts(), seed=seed)


def solve(model, plan, requests=REQUESTS, seed=0):
    return plan.solve(setting(model, seed), facts_of(requests))


def deltas(solved):
    return {name: written.update.dense() for name, written in solved.written.items()}


def target_prob(model):
    """Of each target's first token, the one that every objective raises."""
    facts = facts_of()
    logits = model.logits(encode(model.tokenizer, [f.prompt for f in facts]))[:, 0]
    first = [target_ids(model.tokenizer, f.prompt, f.target)[0] for f in facts]
    return logits.softmax(-1)[range(len(facts)), first]


def relative(a, b):
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    return float((a - b).norm() / b.norm())


class Untouched:
    """Bytes, module objects, their attributes, flags and gradients of a model, compared with those of its making."""

    def __init__(self, model):
        self.model, self.before = model, self._look(model)

    @staticmethod
    def _look(model):
        modules = dict(model.module.named_modules())
        return model.fingerprint(), modules, {name: set(vars(m)) for name, m in modules.items()}

    def check(self):
        assert self._look(self.model) == self.before
        for name, weight in self.model.module.named_parameters():
            assert not weight.requires_grad and weight.grad is None, name
        assert not any(m.training for m in self.model.module.modules())
        batch = encode(self.model.tokenizer, ["The city of Paris is"])
        with torch.no_grad():
            plain = self.model.module(**self.model.inputs(batch)).logits[:, -1:]
            with self.model.nnsight.trace(**self.model.inputs(batch)):
                traced = self.model.nnsight.output.logits[:, -1:].save()
        assert torch.equal(traced, plain)
        if not is_widened(self.model.head):  # in 16 bits `logits` reads the head in float32
            assert torch.equal(self.model.logits(batch), plain.float())


@pytest.mark.skipif(not GOLDEN.exists(), reason="the reference results are not beside the checkout")
@pytest.mark.parametrize("name", ["ft_l", "ft_m"])
def test_lands_on_the_original_codes_update(name):
    model = kt.load(str(GOLDEN / "model"), dtype="float32", device="cpu")
    data = json.loads((GOLDEN / f"qwen2.{name}.json").read_text())
    hp = data["hparams"]
    plan = FineTune(
        tuple(hp["layers"]), "mlp", hp["objective_optimization"], hp["num_steps"], hp["lr"], hp["weight_decay"],
        hp["norm_constraint"] or None, hp["batch_size"],
    )  # fmt: skip
    solved = solve(model, plan, data["requests"])
    updates = load_file(GOLDEN / f"qwen2.{name}.safetensors")
    assert [f"dW.{weight}" for weight in solved.written] == list(updates)
    assert relative(torch.tensor(solved.notes["losses"]), torch.tensor(data["batch_losses"])) < 1e-5
    for weight, delta in deltas(solved).items():
        assert relative(delta, updates[f"dW.{weight}"]) < 2e-5
    worse = deltas(solve(model, replace(plan, lr=1.02 * plan.lr), data["requests"]))
    assert all(relative(delta, updates[f"dW.{weight}"]) > 1e-3 for weight, delta in worse.items())


@EVERY
def test_every_variant_on_every_family(family, method):
    model, plan = tiny_model(family), PLANS[method]
    untouched, before = Untouched(model), target_prob(model)
    solved = solve(model, plan)
    untouched.check()
    assert list(solved.written) == plan.names(model)
    assert solved.notes["steps"] == len(solved.notes["losses"]) == plan.num_steps
    assert solved.notes["loss"] == solved.notes["losses"][-1] < solved.notes["losses"][0]
    assert plan.moment_sites == [] and not plan.keeps_keys and not plan.has_targets
    others = {n: w.clone() for n, w in model.module.named_parameters() if n not in solved.written}
    for name, (update, *rest) in solved.written.items():
        assert all(extra is None for extra in rest)
        assert update.shape == tuple(model.weight(name).shape) and update.finite
        assert isinstance(update, LowRank) == (method == "lora") and update.dense().dtype == torch.float32
    with model.restored(solved.written):
        for name, written in solved.written.items():
            model.write(name, written.update)
        assert bool((target_prob(model) > before).all())
        assert all(torch.equal(w, model.own(n)) for n, w in others.items())
    untouched.check()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_update_is_what_the_training_did(family, monkeypatch):
    """Orientation: what is written back gives the trained weight, also for Conv1D (W_o is square)."""
    model = tiny_model(family)
    seen = {}
    step = Weights.step

    def watched(self, optimizer):
        step(self, optimizer)
        seen["end"] = [w.detach().clone() for w in self.live]

    monkeypatch.setattr(Weights, "step", watched)
    solved = solve(model, replace(PLANS["ft"], modules="both"))
    with model.restored(solved.written):
        for (name, written), end in zip(solved.written.items(), seen["end"], strict=True):
            model.write(name, written.update)
            torch.testing.assert_close(model.own(name), end)


def test_a_norm_constraint_is_a_box():
    model = tiny_model("gpt2")
    boxed = deltas(solve(model, PLANS["ft-l"]))
    free = deltas(solve(model, PLANS["ft"]))
    for name in boxed:
        assert BOX * 0.99 < boxed[name].abs().max() < BOX * 1.0001
        assert free[name].abs().max() > 2 * BOX


def test_weight_decay_pulls_towards_zero():
    """All of a block is trained: even where the gradient is small, Adam's L2 term moves a weight towards zero."""
    model = tiny_model("llama")
    gain = model.block_weights(1)[-1]
    solved = solve(model, replace(PLANS["ft-wd"], weight_decay=10.0))
    assert gain in solved.written and set(solved.written) == set(model.block_weights(1))
    assert bool((deltas(solved)[gain] < 0).all())  # a norm's gain starts at one


@EVERY
def test_half_precision_is_trained_on_wide_copies(method):
    model = kt.load(tiny_module("qwen3").to(torch.bfloat16), tokenizer=tiny_model("qwen3").tokenizer)
    untouched, before = Untouched(model), target_prob(model)
    # Far below bfloat16's rounding of most weights: without wide copies such steps would be lost.
    plan = replace(PLANS[method], lr=PLANS[method].lr if method == "lora" else 1e-4, num_steps=20)
    solved = solve(model, plan)
    untouched.check()
    assert solved.notes["loss"] < solved.notes["losses"][0] - 0.01, "the model never saw the steps"
    found = deltas(solved)
    assert all(d.dtype == torch.float32 for d in found.values())
    if method == "lora":
        with adapted(model, plan.sites, plan.adapter) as (parameters, _):
            assert {p.dtype for p in parameters} == {torch.float32}
    else:
        assert min(float(d.abs().median()) for n, d in found.items() if d.dim() == 2) > 5e-4
    with model.restored(solved.written):
        for name, written in solved.written.items():
            model.write(name, written.update)
        assert bool((target_prob(model) > before).all())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_same_seed_same_bytes_and_the_global_random_state_is_left_alone(dropout):
    model = tiny_model("gpt2")
    plan = replace(PLANS["lora"], adapter=Adapter(4, 8.0, dropout))
    state = torch.get_rng_state()
    one = deltas(solve(model, plan, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    two, other = deltas(solve(model, plan, seed=3)), deltas(solve(model, plan, seed=4))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one)
    without = deltas(solve(model, PLANS["lora"], seed=3))
    assert all(torch.equal(one[n], without[n]) == (dropout == 0) for n in one)
    assert all(
        torch.equal(a, b) for a, b in zip(*(deltas(solve(model, PLANS["ft"])).values() for _ in "ab"), strict=True)
    )


@pytest.mark.parametrize("objective", ["prompt_last", "target_new"])
def test_padding_and_company_do_not_matter(family, objective):
    """The gradient of a batch is the mean of its requests' own, wherever they stand in it."""
    model = tiny_model(family)
    plan = FineTune((1,), modules="block", objective=objective)
    names = plan.names(model)

    def gradients(requests):
        (lesson,) = plan._lessons(model, facts_of(requests))
        with model.at_rest(), model.restored(names), torch.enable_grad():
            live = [model.own(n).requires_grad_() for n in names]
            loss = lesson.loss(model)
            found = torch.autograd.grad(loss, live)
            for weight in live:
                weight.requires_grad_(False)
        return [loss.detach(), *found]

    alone = [gradients([r]) for r in REQUESTS]
    turned = gradients(REQUESTS[::-1])
    for both, *single in zip(turned, *alone, strict=True):
        torch.testing.assert_close(both, sum(single) / len(REQUESTS), atol=2e-6, rtol=1e-4)


def test_blocks_below_the_lowest_trained_one_run_once(monkeypatch):
    """And the update is that of running them every time."""
    model = tiny_model("qwen3")
    plan = replace(PLANS["ft-l"], layers=(2,))
    fast = deltas(solve(model, plan))
    lessons = FineTune._lessons
    monkeypatch.setattr(FineTune, "_lessons", lambda self, *a: [x._replace(below=None) for x in lessons(self, *a)])
    slow = deltas(solve(model, plan))
    assert all(torch.equal(fast[n], slow[n]) for n in fast)


def test_mini_batches_come_in_order_and_every_one_makes_a_step():
    model = tiny_model("llama")
    plan = replace(PLANS["ft"], batch_size=2, num_steps=3)
    solved = solve(model, plan)
    assert solved.notes["steps"] == 6 and len(solved.notes["losses"]) == 3
    turned = deltas(solve(model, plan, REQUESTS[::-1]))
    assert not any(torch.allclose(d, turned[n], rtol=1e-2) for n, d in deltas(solved).items())


class TestStopping:
    def test_a_small_loss_makes_no_step(self):
        solved = solve(tiny_model("gpt2"), replace(PLANS["ft"], stop_loss=1e3))
        assert solved.notes["steps"] == 0 and len(solved.notes["losses"]) == 1
        assert all(not d.any() for d in deltas(solved).values()) and len(solved.written) == 1

    def test_only_the_mini_batches_that_are_not_done_make_steps(self):
        model = tiny_model("gpt2")
        plan = replace(PLANS["ft"], batch_size=1, num_steps=1)
        single = [solve(model, replace(plan, stop_loss=1e3), [r]).notes["loss"] for r in REQUESTS]
        between = sorted(single)[0] * 0.999 + sorted(single)[1] * 0.001
        first_done = sorted(range(3), key=lambda i: single[i])
        solved = solve(model, replace(plan, stop_loss=between), [REQUESTS[i] for i in first_done])
        assert solved.notes["steps"] == 2

    def test_it_ends_when_the_mean_loss_is_small(self):
        plan = replace(PLANS["ft"], num_steps=200, lr=0.02, stop_loss=0.5)
        notes = solve(tiny_model("gpt2"), plan).notes
        assert notes["steps"] == len(notes["losses"]) - 1 < 199
        assert notes["loss"] < 0.5 <= notes["losses"][-2]


@EVERY
def test_everything_is_put_back_after_an_exception(method):
    model = tiny_model("gpt2")
    untouched, state = Untouched(model), torch.get_rng_state()

    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PLANS[method].solve(setting(model), facts_of(), interrupt)
    untouched.check()
    assert torch.equal(torch.get_rng_state(), state)


@EVERY
def test_a_loss_that_is_not_finite_is_one_line(method):
    model = tiny_model("llama")
    with torch.no_grad():
        model.own(model.block_weights(2)[0]).fill_(float("inf"))
    untouched = model.fingerprint()
    with pytest.raises(WorkFailed, match="not finite in epoch 1") as caught:
        solve(model, PLANS[method])
    assert "\n" not in str(caught.value) and model.fingerprint() == untouched


class TestAdapter:
    @pytest.mark.parametrize("family", ["gpt2", "qwen3"])
    def test_the_update_is_pefts_own(self, family):
        model = tiny_model(family)
        untouched = Untouched(model)
        sites = [Site(kind, layer) for layer in (0, 2) for kind in (Kind.ATTN, Kind.MLP)]
        with adapted(model, sites, Adapter(3, 7.0)) as (parameters, updates):
            with torch.no_grad():
                for parameter in parameters:
                    parameter.normal_()
            assert len(parameters) == 2 * len(sites) and all(p.requires_grad for p in parameters)
            assert sum(p.requires_grad for p in model.module.parameters()) == len(parameters)
            for name, update in updates().items():
                layer = model.module.get_submodule(name.removesuffix(".weight"))
                own = layer.get_delta_weight(NAME)
                transposed = family == "gpt2"
                torch.testing.assert_close(update.dense(), own.T if transposed else own)
                assert update.rank == 3 and low_rank(layer).shape == update.shape
        untouched.check()
        assert set(updates()) == {model.weight_name(s) for s in sites}

    def test_only_the_layers_that_were_named_are_adapted(self):
        """`layers.1` is a prefix of `layers.10`, and a suffix pattern would take both."""
        model = tiny_model("llama", num_hidden_layers=12)
        with adapted(model, [Site(Kind.MLP, 1)], Adapter(2, 2.0)):
            changed = [n for n, m in model.module.named_modules() if hasattr(m, "lora_A")]
        assert changed == [model.layout.path(Kind.MLP, 1)]

    def test_an_injection_that_breaks_off_is_taken_out(self, monkeypatch):
        import peft

        model = tiny_model("gpt2")
        untouched, inject = Untouched(model), peft.inject_adapter_in_model

        def broken(*arguments):
            inject(*arguments)
            raise RuntimeError("half way")

        monkeypatch.setattr(peft, "inject_adapter_in_model", broken)
        with pytest.raises(RuntimeError, match="half way"):
            solve(model, PLANS["lora"])
        untouched.check()

    def test_without_peft_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(KtError, match=r"method lora needs peft; pip install 'kt-interp\[lora\]'"):
            solve(tiny_model("gpt2"), PLANS["lora"])


def test_settings_that_do_not_go_together_are_one_line():
    for changes, words in (
        ({"modules": "head"}, "choose among mlp"),
        ({"objective": "last"}, "choose among prompt_last"),
        ({"modules": "block", "adapter": Adapter()}, "choose modules mlp"),
        ({"norm_constraint": 0.1, "adapter": Adapter()}, "leave it out"),
    ):
        with pytest.raises(KtError, match=words) as caught:
            FineTune((0,), **changes)
        assert "\n" not in str(caught.value)


def rms(tensor):
    return float(tensor.double().square().mean().sqrt())


def test_automatic_steps_and_boxes_follow_each_weights_own_size():
    model = tiny_model("llama")
    name = model.weight_name(Site(Kind.MLP, 1))
    with torch.no_grad():
        model.own(name).mul_(10)
    plan = replace(PLANS["ft-l"], layers=(0, 1), lr="auto", norm_constraint="auto")
    solved = solve(model, plan)
    for each, written in solved.written.items():
        size = rms(model.weight(each))
        assert written.chosen == pytest.approx({"lr": RATE * size, "norm_constraint": BOX_OF_RMS * size}, rel=1e-6)
        assert float(deltas(solved)[each].abs().max()) <= BOX_OF_RMS * size * 1.0001
    given = replace(plan, layers=(1,), lr=RATE * rms(model.weight(name)), norm_constraint=None)
    alone = solve(model, replace(plan, layers=(1,), norm_constraint=None))
    assert relative(deltas(alone)[name], deltas(solve(model, given))[name]) < 1e-4
    assert "norm_constraint" not in alone.written[name].chosen


def test_gains_and_biases_take_the_typical_step_of_the_matrices():
    model = tiny_model("gpt2")  # whose biases are zero and gains one
    solved = solve(model, replace(PLANS["ft-wd"], lr="auto"))
    sizes = [rms(model.weight(name)) for name in solved.written if model.weight(name).dim() > 1]
    for name, written in solved.written.items():
        own = rms(model.weight(name)) if model.weight(name).dim() > 1 else statistics.median(sizes)
        assert written.chosen == pytest.approx({"lr": RATE * own}, rel=1e-6)
        assert written.update.norm() > 0


def test_an_adapters_first_automatic_step_is_as_large_as_one_on_the_weight():
    model = tiny_model("llama")
    for method in ("ft", "lora"):
        first = solve(model, replace(PLANS[method], modules="mlp", layers=(0, 1), lr="auto", num_steps=1))
        for name, delta in deltas(first).items():
            assert rms(delta) == pytest.approx(RATE * rms(model.weight(name)), rel=0.1), (method, name)
