"""What rounding to 16 bits leaves of an update, and the requests that it costs."""

import dataclasses
import warnings

import pytest
import torch
from editing_help import REQUESTS, solve
from edits_by_hand import in_dtype, random_edit, sha
from families import FAMILIES, tiny_model

import kt
from kt.editing import rounding
from kt.editing.package import about_requests, about_weights, read_back
from kt.editing.rounding import Rounded, about_rounding, logits_given_back, readings, says_targets
from kt.facts.load import facts_from
from kt.model.sites import Kind, Site
from kt.model.tokens import target_ids
from kt.model.update import Dense, LowRank

DOWN = "model.layers.0.mlp.down_proj.weight"
NARROW = (torch.bfloat16, torch.float16)


def written(dtype, scale=1e-3, name=DOWN, family="qwen3"):
    """A model with an edit in it, the weight's bytes from before, and W, W', ΔW as float64 matrices."""
    model = in_dtype(tiny_model(family), dtype)
    edit = random_edit(model, (name,), scale=scale)
    before, was = model.copies([name]), model.weight(name).double().clone()
    edit.apply_(model)
    return model, edit, before, was, model.weight(name).double(), edit.delta(name).double()


@pytest.mark.parametrize("rows_per_block", [1, 7, 1000])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
class TestMeasure:
    @pytest.mark.parametrize("family", ["qwen3", "gpt2"])
    def test_it_is_the_formula_whatever_the_blocks(self, dtype, rows_per_block, family, monkeypatch):
        name = DOWN if family == "qwen3" else "transformer.h.0.mlp.c_proj.weight"
        model, edit, before, was, now, delta = written(dtype, name=name, family=family)
        monkeypatch.setattr(rounding, "NUMBERS_PER_BLOCK", rows_per_block * was.shape[1])
        found = Rounded.of(model, name, before[name], edit.updates[name]).measure()
        got = now - was
        assert found["survived"] == pytest.approx(float((got * delta).sum() / delta.square().sum()), rel=1e-9)
        assert found["error"] == pytest.approx(float((got - delta).norm() / delta.norm()), rel=1e-9)
        assert 0.01 < found["error"] < 1

    def test_what_is_missing_of_the_values_is_the_difference_times_the_keys(self, dtype, rows_per_block, monkeypatch):
        model, edit, before, was, now, delta = written(dtype)
        monkeypatch.setattr(rounding, "NUMBERS_PER_BLOCK", rows_per_block * was.shape[1])
        keys = torch.randn(2, 5, was.shape[1])
        missing = Rounded.of(model, DOWN, before[DOWN], edit.updates[DOWN]).missing(keys)
        wanted = keys.double() @ (delta - (now - was)).T
        torch.testing.assert_close(missing.double(), wanted, atol=1e-6, rtol=1e-4)


def test_what_is_rounded_back_whole_survives_by_nothing():
    weight = torch.full((3, 4), 256.0, dtype=torch.bfloat16)
    update = LowRank(torch.full((3, 1), 0.9), torch.ones(1, 4))  # half a step is 1
    assert Rounded(weight, weight.clone(), update).measure() == {"survived": 0.0, "error": 1.0}
    nothing = Rounded(weight, weight.clone(), update.scaled(0.0)).measure()
    assert nothing == {"survived": None, "error": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unrounded_reading_is_that_of_the_update(family):
    """Nothing at all is written here, and what is given back is the whole update."""
    model = tiny_model(family)
    names = [model.weight_name(Site(kind, layer)) for layer in (0, 1) for kind in (Kind.ATTN, Kind.MLP)]
    edit = random_edit(model, names, scale=0.5)
    lost = {model.site_of(n): Rounded(model.weight(n), model.weight(n).clone(), edit.updates[n]) for n in names}
    batch = model.encode(["The city of the Space Needle", "The city"])
    with edit.applied(model):
        wanted = model.logits(batch, keep=2)
    assert not torch.allclose(wanted, model.logits(batch, keep=2), atol=0.1)
    torch.testing.assert_close(logits_given_back(model, batch, 2, lost), wanted, atol=1e-4, rtol=1e-4)


def test_a_target_is_said_where_each_of_its_tokens_is_the_argmax(monkeypatch):
    model = tiny_model("qwen3")
    facts = [fact.as_request() for fact in facts_from(REQUESTS)][::-1]  # a batch has the shorter row first
    first, second = (target_ids(model.tokenizer, fact.prompt, fact.target) for fact in facts)
    assert len(first) > 1 and len(second) > 1
    width = max(len(first), len(second))

    def says(model, batch, keep, rounded):
        logits = torch.zeros(2, width, model.vocab_size)
        for row, ids in zip(logits, (first, second), strict=True):
            row[range(width - len(ids), width), list(ids)] = 1.0
        return logits + wrong

    monkeypatch.setattr(rounding, "logits_given_back", says)
    wrong = torch.zeros(2, width, model.vocab_size)
    assert says_targets(model, facts, {}) == [True, True]
    wrong[1, -1, 7] = 1.5  # only the last token of the second
    assert says_targets(model, facts, {}) == [True, False]
    wrong[0, 0, 7] = 1.5  # before the answer, or its first token
    assert says_targets(model, facts, {}) == [width > len(first), False]


@pytest.fixture(scope="module")
def cancelling():
    """A bf16 model in which an update that matters is rounded away: two columns of down_proj that are large, cancel
    each other (their keys are equal), and leave steps of 2 between the numbers there."""
    module = tiny_model("qwen2").module
    mlp = module.model.layers[1].mlp
    with torch.no_grad():
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[1] = projection.weight[0] * 4
            projection.weight[0] *= 4
        mlp.down_proj.weight[:, 0], mlp.down_proj.weight[:, 1] = 320.0, -320.0
    model = kt.load(module.to(torch.bfloat16), tokenizer=tiny_model("qwen2").tokenizer)
    name = "model.layers.1.mlp.down_proj.weight"
    small = torch.zeros(tuple(model.weight(name).shape))
    small[0, 5] = 1e-3  # one number that is written, so that the edit is not lost whole
    prompt = {"prompt": "The mother tongue of {}", "subject": "Danielle Darrieux"}
    site = Site(Kind.MLP, 1)
    for seed in range(50):
        update = small.clone()
        update[:, 0] = 0.9 * torch.randn(len(update), generator=torch.Generator().manual_seed(seed)).sign()
        unrounded = Rounded(model.weight(name), model.weight(name).clone(), Dense(update))
        for word in ("Italy", "Warsaw", "Rome", "a", "e", "in", "the", "of", "n", "s", "t", "o", "i", "r"):
            (fact,) = (f.as_request() for f in facts_from([prompt | {"target_new": word}]))
            one = len(target_ids(model.tokenizer, fact.prompt, word)) == 1
            if one and says_targets(model, [fact], {site: unrounded}) == [True] != says_targets(model, [fact], {}):
                return model, name, Dense(update), fact
    raise AssertionError("no update of these makes the model say a word of these")


def packaged(model, name, update, fact):
    edit = kt.Edit({name: update}, about_weights(model, {name: update}) | about_requests([fact]))
    read_back(model, edit, [fact], readings(model, [fact]))
    return edit


class TestLostRequests:
    def test_a_request_that_only_rounding_costs_is_named(self, cancelling):
        model, name, update, fact = cancelling
        before = sha(model)
        with pytest.warns(UserWarning, match=r"rounding to bfloat16 left 0% .* and costs 1 of 1 requests"):
            edit = packaged(model, name, update, fact)
        assert edit.manifest["lost_to_rounding"] == [fact.id] and sha(model) == before
        assert edit.deltas()[name]["survived"] < 0.01 and edit.deltas()[name]["rounding_error"] > 0.9

    def test_one_that_the_update_never_wins_is_not(self, cancelling):
        model, name, update, fact = cancelling
        other = dataclasses.replace(fact, target="Seattle")
        with pytest.warns(UserWarning, match="rounding to bfloat16 left 0%"):
            edit = packaged(model, name, update, other)
        assert edit.manifest["lost_to_rounding"] == []

    def test_in_float32_nothing_is_said(self, cancelling):
        model, name, update, fact = cancelling
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            edit = packaged(in_dtype(model, torch.float32), name, update, fact)
        assert not {"rounding", "lost_to_rounding"} & set(edit.manifest)
        assert edit.report[0].target_rank[1] == 0  # what rounding had cost
        assert edit.deltas()[name]["survived"] is None

    def test_of_a_bias_no_value_is_read(self):
        name = "transformer.h.0.mlp.c_proj.bias"
        model, edit, before, was, now, delta = written(torch.bfloat16, 0.1, name, "gpt2")
        (fact,) = (f.as_request() for f in facts_from(REQUESTS[:1]))
        found = about_rounding(model, edit, before, [fact])
        assert found["lost_to_rounding"] is None
        error = float((now - was - delta).norm() / delta.norm())
        assert found["rounding"][name]["error"] == pytest.approx(error)


@pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_solved_edit_says_what_survived_and_keeps_it_in_its_file(dtype, setting, tmp_path):
    _, corpus, cache = setting
    model = in_dtype(tiny_model("qwen3"), dtype)
    edit = solve(model, corpus, cache)
    about = kt.Edit.load(edit.save(tmp_path / "edit")).manifest
    assert set(about["rounding"]) == set(edit.names)
    assert all(found["survived"] > 0.9 and 0 < found["error"] < 0.1 for found in about["rounding"].values())
    assert about["lost_to_rounding"] == [] and about["dtype"] == str(dtype).removeprefix("torch.")
