"""Settings that mean nothing, or that other settings leave without effect, are refused where they are given."""

from dataclasses import replace

import pytest
import torch
from families import tiny_model

import kt
from kt.editing.closed_form.factor import Moment
from kt.editing.closed_form.sequential import Evolving
from kt.editing.closed_form.solvers import System
from kt.editing.config import FORMAT_1
from kt.editing.methods import METHODS
from kt.editing.presets import configured, presets
from kt.errors import KtError, NothingToWrite, WorkFailed

REFUSED = {
    "memit v_lr=1e308": "v_lr is beyond float32",
    "memit v_lr=3e38": r"v_lr 3e\+38 has a square beyond float32, .* below 1.8e\+19",
    "ft lr=3e38": r"lr 3e\+38 has a square beyond float32",
    "jeep v_weight_decay_high=3e38": "v_weight_decay_high .* square",
    "lora lora_alpha=1e30": "lora_alpha .* square",
    "eamet tau=1e-300": "tau 1e-300 is 0 in float32, .* at least 1.2e-38",
    "rome held_share=1e-300": "held_share 1e-300 is 0 in float32",
    "grace eps=1e-300": "eps 1e-300 is 0 in float32",
    "ft num_steps=1e400": "num_steps is beyond float32",
    "memit-are kl_factor=1.0": "memit-are does not use it",
    "alphaedit-are kl_factor=1.0": "alphaedit-are does not use it",
    "unke kl_factor=1.0": "unke does not use it",
    "lora norm_constraint=0.1": "lora does not use it",
    "lora lora_dropout=1.0": "lora_dropout 1 must be a share below 1",
    "lora lora_alpha=0.0": "lora_alpha 0 scales the update to nothing",
    "betaedit leak=0.0": "leak 0 holds nothing of what leaks, which is AlphaEdit",
    "encore mom2_update_weight=0.0": "mom2_update_weight 0 leaves the second moment out",
    "emmet mom2_update_weight=0.0": "mom2_update_weight 0 leaves the second moment out",
    "alphaedit L2=0.0": "L2 0 .* must be above zero",
    "eamet tau=0.0": "tau 0 is a temperature",
    "nse neurons=0.0": "neurons 0 must be a share above 0",
    "nse neurons=1.5": r"neurons 1\.5 must be a share above 0",
    "nse residual_least=3.0 residual_most=2.0": r"residual_least 3\.0 and residual_most 2\.0 leave no residual",
    "nse residual_most=0.0": "leave no residual",
    "jeep min_loss=0.0": "min_loss 0 is the probability",
    "jeep min_loss=1.5": r"min_loss 1\.5 is the probability",
    "jeep region=low separate_targets=true": "region low has one target alone",
    "ice nearness=0.5": r"nearness 0\.5 has no use with retriever=bm25",
    "ike nearness=0.5": r"nearness 0\.5 has no use with retriever=bm25",
    "scr nearness=0.5": r"nearness 0\.5 has no use with retriever=bm25",
    "rome mom2_adjustment=false held_share=0.5": r"held_share 0\.5 has no use with mom2_adjustment=false",
    "rome held_share=1.0": "held_share 1 must lie from 0 to below 1",
}


def value_of(text):
    words = {"true": True, "false": False, "1e400": 10**400}
    try:
        return words[text] if text in words else float(text)
    except ValueError:
        return text


@pytest.mark.parametrize("given", REFUSED)
def test_a_setting_without_meaning_or_effect_is_refused_in_one_line_before_any_model(given):
    method, *settings = given.split()
    values = {name: value_of(text) for name, _, text in (setting.partition("=") for setting in settings)}
    with pytest.raises(KtError, match=REFUSED[given]) as caught:
        configured(None, method, **values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_is_accepted_and_so_is_a_file_with_its_values(method):
    """A file lists the settings of all methods, those that this one no longer has among them."""
    for preset in (None, *presets().values()):
        config = configured(preset, method)
        listed = config.as_dict()
        assert METHODS[method].of(listed).as_dict() == listed and set(FORMAT_1) <= set(listed)


@pytest.mark.parametrize(
    "given",
    (
        dict(method="ice", retriever="embeddings", nearness=0.5),
        dict(method="rome", mom2_adjustment=False),
        dict(method="rome", mom2_adjustment=False, held_share=0.0),  # as the presets of EasyEdit have it
        dict(method="jeep", min_loss=1.0),
        dict(method="nse", neurons=1.0, residual_least=2.0, residual_most=3.0),
        dict(method="lora", lora_dropout=0.9),
    ),
    ids=lambda given: given["method"],
)
def test_the_same_settings_with_a_use_are_accepted(given):
    configured(None, **given)


@pytest.mark.parametrize("name", ("layers_high", "clamp_norm_factor_high", "mom2_update_weight_high", "high_module"))
def test_jeeps_low_region_alone_has_no_use_for_what_the_high_one_was_given(name):
    """A preset's own values of them are no reason: only names that a user gave are asked about."""
    config = METHODS["jeep"].of({"region": "low", "layers_high": [5]})
    config.refuse_idle(())
    with pytest.raises(KtError, match=f"{name} has no use with region=low"):
        config.refuse_idle((name,))
    METHODS["jeep"]().refuse_idle((name,))


def test_a_kl_factor_at_the_prompts_last_token_is_said_to_be_without_effect(recwarn):
    model = tiny_model("llama")
    METHODS["memit"].of(dict(fact_token="last")).require(model)
    METHODS["memit"].of(dict(kl_factor=0.5)).require(model)
    METHODS["memit-are"].of({}).require(model)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"memit: kl_factor 0\.5 is without effect at fact_token=last"):
        METHODS["memit"].of(dict(fact_token="last", kl_factor=0.5)).require(model)


def test_a_lora_rank_above_the_models_width_is_refused_before_the_training():
    model = tiny_model("llama")
    METHODS["lora"].of(dict(rank=model.d_model)).require(model)
    with pytest.raises(KtError, match=f"rank 1,000,000 is above {model.d_model}, the width of "):
        METHODS["lora"].of(dict(rank=1_000_000)).require(model)


def held_system(rounding=1e-5):
    """Two requests, the second with a key of an earlier edit, to rounding."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random).double()  # noqa: E731
    moment, keys = draw(8, 30), draw(8, 2)
    past = keys[:, 1:] * (1 + rounding * 1e-3 * draw(8, 1))
    return System(draw(4, 2), keys, moment=Moment.of(moment @ moment.T), past=past, rounding=rounding)


@pytest.mark.parametrize("rounding", [1e-5, 3e-2])
@pytest.mark.parametrize("ridge", ["auto", 0.1])
def test_evoedit_leaves_a_request_alone_whose_key_an_earlier_edit_holds(ridge, rounding):
    system = held_system(rounding)
    solution = Evolving("auto", ridge)(system)
    update = solution.update
    assert solution.held == (1,) and (update.right[1] == 0).all()
    alone = system._replace(keys=system.keys[:, :1], residuals=system.residuals[:, :1])
    torch.testing.assert_close(update.dense(), Evolving("auto", ridge)(alone).update.dense())


def test_evoedit_refuses_a_batch_whose_every_key_is_held():
    system = held_system()
    system = system._replace(keys=system.keys[:, 1:], residuals=system.residuals[:, 1:])
    held = "already holds the key of {} at C, .* leave out what is about that subject, or use alphaedit"
    with pytest.raises(NothingToWrite, match=held.format("request 1")):
        Evolving("auto", 0.1)(system)
    with pytest.raises(NothingToWrite, match=held.format("'The tower is in'")):
        Evolving("auto", 0.1)(system._replace(requests=("The tower is in",)))


@pytest.mark.parametrize("free", [1e-2, 1e-3, 1e-4])
def test_the_automatic_ridge_of_evoedit_does_not_follow_a_key_that_is_nearly_held(free):
    random = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=random).double()  # noqa: E731
    moment, key = draw(8, 30), draw(8, 1)
    system = System(draw(4, 1), key, moment=Moment.of(moment @ moment.T), past=key + free * draw(8, 1))
    alone = Evolving("auto", "auto")(system._replace(past=None)).update.norm()
    solution = Evolving("auto", "auto")(system)
    assert solution.update.norm() < 20 * alone
    assert solution.chosen.share == pytest.approx(float(solution.update.right[0] @ key[:, 0]))


@pytest.mark.filterwarnings("ignore:.*(targets stay below|of the wanted change|does not give the target|near to each)")
def test_a_run_in_steps_goes_on_behind_a_step_that_evoedit_cannot_write():
    model, facts = kt.load("demo"), kt.load_facts("demo", limit=2)
    again = replace(facts[0], target=facts[1].target)
    options = dict(method="evoedit", v_num_grad_steps=3, max_tokens=2_000, evaluate="none")
    with pytest.warns(UserWarning, match="step 2 writes nothing: an earlier edit already holds"):
        run = kt.run_edits(model, [facts[0], again, facts[1]], "sequential", **options)
    assert len(run.edits) == 2 and len(run.steps.steps) == 3
    assert len(run.edit.requests) == 2 and run.edit.manifest["unwritten"] == [again.subject]
    assert "of 3 changed" in run.edit.verdict.text
    below = kt.EditStack([run.edits[0]])
    for mode in ("sequential", "single"):  # also where it is the first one
        with pytest.warns(UserWarning, match=" 1 writes nothing: an earlier edit already holds"):
            later = kt.run_edits(model, [again, facts[1]], mode, below=below, **options)
        assert [len(edit.requests) for edit in later.edits] == [1]
        assert [fact.subject for fact in later.unwritten] == [again.subject]
        assert "of 2 changed" in later.verdict.text and "not written" in later.verdict.warnings[0]
    scored = kt.run_edits(
        model, [again, facts[1]], "single", below=below, **options | {"evaluate": "end", "generate": False}
    )
    assert scored.after.metrics["edit_success_tf_exact"].n == 2  # what was not written was asked for all the same
    with pytest.raises(NothingToWrite):
        kt.run_edits(model, [again], "sequential", below=below, **options)


@pytest.mark.filterwarnings("ignore:.*(targets stay below|of the wanted change|does not give the target)")
def test_a_session_of_evoedit_names_the_request_that_it_was_given_before():
    model, facts = kt.load("demo"), kt.load_facts("demo", limit=1)
    with kt.EditSession(model, "evoedit", v_num_grad_steps=3) as session:
        session.edit(facts)
        with pytest.raises(WorkFailed, match="an earlier edit already holds the key of '"):
            session.edit(facts)


def test_jeep_asks_for_the_layers_of_the_regions_that_it_searches_alone():
    jeep = METHODS["jeep"]
    assert jeep(region="low").missing_layers == ["layers_mlp"]
    assert jeep(region="high").missing_layers == ["layers_high"]
    assert jeep(region="joint-low").missing_layers == ["layers_mlp", "layers_high"]


@pytest.mark.parametrize("name", ("clamp_norm_factor", "residual_most", "stop_loss", "norm_constraint"))
def test_a_bound_may_be_so_large_that_it_holds_nothing(name):
    method = {"residual_most": "nse", "stop_loss": "ft", "norm_constraint": "ft"}.get(name, "memit")
    assert getattr(configured(None, method, **{name: 1e30}), name) == 1e30


def test_a_memory_that_reads_no_number_of_a_request_says_so():
    model, facts = kt.load("demo"), kt.load_facts("demo", limit=2)
    with pytest.raises(WorkFailed, match="inputs are zero where the memory may read them"):
        kt.edit(model, facts, "wise", density=1e-30, v_num_grad_steps=2)
