"""What every method keeps to on every family."""

import pytest
import torch
from editing_help import ATTENTION, REQUESTS, fast, plan_of, solve, statistics
from families import tiny_model

import kt
from kt.editing import METHODS, Statistics
from kt.editing.closed_form.plan import LocateThenEdit
from kt.errors import BadFact, BadFile, KtError, SubjectNotFound, UnknownSite, WorkFailed
from kt.model.sites import Kind


@pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")
@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].effect])  # those: test_effects.py
def test_every_method_on_every_family(family, method, corpus, tmp_path):
    model = tiny_model(family)
    before = model.fingerprint()
    # What the check of an edit reads is alike for all methods: once a family and once a method.
    edit = solve(model, corpus, tmp_path, method, check=method == "memit" or family == "llama")
    assert model.fingerprint() == before, "solving left a trace in the model"
    plan = plan_of(method)
    if isinstance(plan, LocateThenEdit):  # one column a request and pass
        columns = len(REQUESTS) * (plan.again.passes if plan.again else 1)
        assert all(u.rank <= columns for u in edit.updates.values())
    gains = [after - start for start, after in (r.target_prob for r in edit.report)]
    assert min(gains) > 0, gains
    if getattr(plan, "modules", None) == "block":
        assert set(edit.names) == {name for layer in plan.layers for name in model.block_weights(layer)}
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


def test_solving_leaves_the_model_alone_when_it_raises(corpus, tmp_path, monkeypatch):
    model = tiny_model("llama")
    before = model.fingerprint()
    stats = statistics(model, corpus, tmp_path)
    broken = Statistics({n: f for n, f in stats.files.items() if "layers.1" not in n})
    with pytest.raises(BadFile, match="no second moment"):  # layer 0 is written before layer 1 is asked for
        kt.edit(model, REQUESTS, method="memit", statistics=broken, **fast("memit"))
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
        arguments = {"requests": REQUESTS, "statistics": None} | fast() | ATTENTION | changes
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


@pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|small demo corpus)")
def test_an_alpha_that_nobody_gave_and_no_fact_determines_is_the_papers_and_says_so(corpus, tmp_path):
    named = [kt.Fact("The {} is", "France", answer="Rome", foil="Paris")]
    with pytest.raises(WorkFailed, match=r"such as 0\.3"):
        solve(tiny_model("gpt2"), corpus, tmp_path, "intattn", alpha="auto", alpha_facts=named)
    with pytest.warns(UserWarning, match=r"no alpha given for GPT2LMHeadModel: writing alpha 0\.3 \(not traced"):
        edit = solve(tiny_model("gpt2"), corpus, tmp_path, "intattn", alpha="auto")
    assert edit.alpha == 0.3 and "the papers' 0.3" in edit.manifest["sources"]["alpha"]
