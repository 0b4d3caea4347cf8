"""Edits one after the other: what a session keeps, writes and takes back."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from chat_templates import TEMPLATES, tokenizer_of
from editing_help import ATTENTION, CONTEXTS, REQUESTS, fast, plan_of, statistics
from families import tiny_model

import kt
from kt.editing import METHODS
from kt.editing.closed_form.aims import Position
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.keys import fact_values
from kt.editing.methods import used_by
from kt.editing.resolve import configure
from kt.editing.session_options import keys_of
from kt.errors import BadFact, KtError
from kt.model.sites import Kind, Site
from kt.probing.stages import no_stages
from kt.runs.journal import Journal

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular|alpha of their own)")
TARGETED = [name for name in METHODS if plan_of(name).has_targets]
KEEPING = ("memit", "intattn", "alphaedit", "emmet", "pmet", "jeep")


def session(setting, method="intattn", **changes):
    model, corpus, cache = setting
    extra = ATTENTION if METHODS[method].writes_attention else {}
    return kt.EditSession(
        model, method, statistics=statistics(model, corpus, cache), **fast(method, **(extra | changes))
    )


def norm(edit):
    return sum(u.norm() ** 2 for u in edit.updates.values()) ** 0.5


def test_steps_are_written_summed_up_and_taken_back(setting):
    model = setting[0]
    before = model.fingerprint()
    with session(setting) as s:
        for request in REQUESTS:
            s.edit([request])
        after = {name: model.weight(name).clone() for name in s.steps[0].names}
        assert all(ratio != 1 for ratio in s.norm_ratios().values())
        total = s.total()
        with s.unedited():
            assert model.fingerprint() == before
            with total.applied(model):
                for name, weight in after.items():
                    torch.testing.assert_close(model.weight(name), weight, atol=1e-6, rtol=1e-5)
        assert [len(r) for r in (total.requests, total.report)] == [2, 2] and total.manifest["steps"] == [1, 1]
        assert all(torch.equal(model.weight(name), weight) for name, weight in after.items())
    assert model.fingerprint() == before


def test_the_second_step_is_solved_on_the_edited_model(setting):
    with session(setting) as s:
        alone = s.solve(REQUESTS[1:])
        s.edit(REQUESTS[:1])
        second = s.edit(REQUESTS[1:])
    name = alone.names[-1]
    assert not torch.allclose(alone.delta(name), second.delta(name), rtol=1e-3)
    assert [step.requests[0]["subject"] for step in s.steps] == [r["subject"] for r in REQUESTS]


@pytest.mark.parametrize("method", KEEPING)
def test_history_makes_a_later_edit_leave_earlier_keys_alone(setting, method):
    moved = {}
    for keep in (False, True):
        with session(setting, method, keep_history=keep, alpha=0.4 if method == "intattn" else None) as s:
            first = s.edit(REQUESTS[:1])
            second = s.edit(REQUESTS[1:])
            moved[keep] = sum(float((second.delta(n) @ s_keys(first, n)).norm()) for n in first.names)
            assert bool(s.state.keys) == keep
            assert second.manifest["past_keys"] == (1 if keep else 0)
    assert moved[True] < 0.9 * moved[False], moved


def s_keys(edit, name):
    return edit.keys[name].T


def test_alphaedit_keeps_history_unless_told_not_to_and_memit_only_when_told(setting):
    for method, kept in (("alphaedit", True), ("memit", False)):
        with session(setting, method) as s:
            s.edit(REQUESTS[:1])
            assert bool(s.state.keys) == kept


def test_earlier_edits_given_as_history_equal_a_session_that_kept_them(setting):
    model = setting[0]
    with session(setting, "memit", keep_history=True) as s:
        first = s.edit(REQUESTS[:1])
        second = s.edit(REQUESTS[1:])
        keys = dict(s.state.keys)
    grams = {name: k[:, :1] @ k[:, :1].T for name, k in keys.items()}
    later = session(setting, "memit", history=grams)
    with first.applied(model):
        again = later.solve(REQUESTS[1:])
    for name in second.names:
        torch.testing.assert_close(again.delta(name), second.delta(name), atol=1e-6, rtol=1e-4)
    from_edits = session(setting, "memit", history=[first])
    assert {n: k.shape[1] for n, k in from_edits.state.keys.items()} == dict.fromkeys(first.names, 1)


@pytest.mark.parametrize("method", TARGETED)
def test_the_norm_guard_gives_wanted_values_the_original_norm(setting, method):
    model = setting[0]
    with session(setting, method, norm_guard=True) as s:
        s.edit(REQUESTS[:1])
        second = s.edit(REQUESTS[1:])
        fact = s._requests[1]
        with s.unedited():
            searched = {a: v for a, v in second.targets.items() if method != "memit-fe" or a == "hidden.0"}
            for aim, value in searched.items():  # (Forward Replay's other targets follow from the first)
                site, _, at = aim.partition("@")
                position = Position(at) if at else Position.SUBJECT_LAST
                old = fact_values(model, [fact], Contexts(), Site.parse(site), position)
                assert float(value.norm()) == pytest.approx(float(old.norm()), rel=1e-4)
    with session(setting, method) as free:
        free.edit(REQUESTS[:1])
        assert norm(free.steps[0]) != norm(s.steps[0])


def test_a_failed_step_leaves_model_and_session_as_they_were(setting, monkeypatch):
    model = setting[0]
    with session(setting, "memit", keep_history=True) as s:
        s.edit(REQUESTS[:1])
        now, keys = model.fingerprint(), {n: k.shape for n, k in s.state.keys.items()}

        def fail(self, *_):
            raise RuntimeError("in the middle")

        monkeypatch.setattr("kt.editing.closed_form.plan.LocateThenEdit.update_history", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            s.edit(REQUESTS[1:])
        assert model.fingerprint() == now and len(s.steps) == 1
        assert {n: k.shape for n, k in s.state.keys.items()} == keys


@pytest.mark.parametrize("method, options", [("ultraedit", {}), ("memit", {"update_guard": "simie"}), ("lyaplock", {})])
def test_a_solve_that_is_cut_off_before_it_is_written_counts_once(setting, monkeypatch, method, options):
    def cut(*_, **__):
        raise KeyboardInterrupt

    with session(setting, method, **options) as s:
        s.edit(REQUESTS[:1])
        before = dict(s.state.running)
        with monkeypatch.context() as patched:
            patched.setattr("kt.editing.session.package", cut)
            with pytest.raises(KeyboardInterrupt):
                s.edit(REQUESTS[1:])
        assert s.state.running.keys() == before.keys()
        assert all(s.state.running[name] is value for name, value in before.items())


def test_nas_anchors_are_those_of_edits_alone(setting):
    with session(setting, "memit", norm_guard="nas") as s:
        solved = s.solve(REQUESTS[:1])
        assert solved.manifest["norm_anchors"]
        anchors = s.edit(REQUESTS[1:]).manifest["norm_anchors"]
        assert anchors != solved.manifest["norm_anchors"]
        s.revert()
        assert s.solve(REQUESTS[:1]).manifest["norm_anchors"] == solved.manifest["norm_anchors"]


def test_holding_on_leaves_what_was_given(setting):
    for given, kept in (("nas", "nas"), (None, "kt"), (False, False)):
        with session(setting, "memit", hold=True, norm_guard=given, keep_history=False) as s:
            s.solve(REQUESTS[:1])
            assert (s.options.norm_guard, s.keeps_history) == (kept, False)


def test_solving_without_writing_is_not_remembered(setting):
    with session(setting, "ultraedit") as s:
        s.solve(REQUESTS)
        assert not s.state.running
        s.edit(REQUESTS)
        (seen,) = {r.count for r in s.state.running.values()}
        s.solve(REQUESTS)
        assert {r.count for r in s.state.running.values()} == {seen}


def test_two_sessions_know_nothing_of_each_other(setting):
    one, two = session(setting, "alphaedit"), session(setting, "alphaedit")
    with one:
        one.edit(REQUESTS[:1])
        assert one.state.keys and not two.state.keys


def test_contradictions_are_refused_before_any_work_where_that_is_asked_for(setting):
    one = REQUESTS[0]
    with pytest.raises(BadFact, match=r"1 and 2 contradict each other.*Italy.*Spain"):
        session(setting, strict=True).solve([one, one | {"target_new": "Spain"}])
    other = one | {"prompt": "{} speaks the language", "target_new": "Spain", "relation": "tongue"}
    with pytest.warns(UserWarning, match="may undo each other"):
        session(setting, "memit").solve([one | {"relation": "tongue"}, other])


def test_a_later_request_that_contradicts_an_earlier_one_is_left_out_with_its_chains_questions(setting):
    """Published data sets hold some, in records of their own; every copy of the later one is left out."""
    spain = REQUESTS[0] | {"target_new": "Spain", "id": "b-1"}
    hop = [{"prompt": "Hop is", "answer": "Rome", "kind": "multi_hop"}]
    chain = [REQUESTS[0] | {"id": "a-1"}, spain, REQUESTS[1] | {"id": "b-2", "portability": hop}, spain | {"id": "c"}]
    with pytest.warns(UserWarning, match=r"2 of 4 .*left out, and so are the multi-hop questions of 1 chain \(b-1, c;"):
        run = kt.run_edits(setting[0], chain, method="memit", statistics=statistics(*setting), **fast("memit"))
    assert [(f.id, f.hops) for f in run.requests] == [("a-1", ()), ("b-2", ())]
    assert [r.id for r in run.edit.report] == ["a-1", "b-2"]


def test_chains_that_share_an_edit_have_it_solved_once_and_are_judged_each(setting):
    """As MQuAKE's: every chain has its own questions, asked of the model with all edits in."""
    chains = [REQUESTS[0] | {"id": str(n), "portability": [{"prompt": f"Hop {n} is", "answer": "Rome"}]} for n in "ab"]
    with pytest.warns(UserWarning, match="1 of 3 requests ask for an edit that another asks for.*2 in all"):
        run = kt.run_edits(
            setting[0],
            [*chains, REQUESTS[1]],
            evaluate="end",
            generate=False,
            method="memit",
            statistics=statistics(*setting),
            **fast("memit"),
        )
    alone = session(setting, "memit").solve([chains[0], REQUESTS[1]])
    assert len(run.edit.requests) == run.steps.steps[0].edits == 2
    for name in alone.names:
        assert torch.equal(run.edit.delta(name), alone.delta(name))
    assert run.after.as_dict()["metrics"]["portability_tf_exact"]["n"] == 2


def test_what_a_method_has_no_place_for_is_refused(setting):
    for method, option, words in (("rome", "keep_history", "no place"), ("r-rome", "keep_history", "no place")):
        with pytest.raises(KtError, match=words):
            session(setting, method, **{option: True}).solve(REQUESTS)
    with pytest.raises(KtError, match="nothing was edited"):
        session(setting).total()
    name = "model.layers.0.mlp.down_proj.weight"
    for history, method, words in (
        ({name: torch.eye(48)}, "rome", "no place"),
        ({name: torch.eye(5)}, "memit", "keys of 5 numbers where the weight reads 48"),
        ({"model.layers.9.mlp.down_proj.weight": torch.eye(48)}, "memit", "no weight called"),
    ):
        with pytest.raises(KtError, match=words):
            session(setting, method, history=history).solve(REQUESTS)
    with pytest.raises(KtError, match="square sum"):
        session(setting, history={"x": torch.zeros(3, 2)})


def test_a_projector_that_does_not_fit_is_refused_before_any_work(setting, monkeypatch):
    monkeypatch.setattr("kt.model.memory.free_memory", lambda *a: 1000)
    monkeypatch.setattr("kt.editing.closed_form.plan.find_targets", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(KtError, match=r"projector.*GiB"):
        session(setting, "alphaedit").solve(REQUESTS)


@pytest.mark.filterwarnings("ignore:no layers given")
def test_jeeps_regions_come_from_the_stages_of_recall_when_nobody_gives_them(setting, monkeypatch):
    probed = no_stages("none")._replace(layers_low=(1,), layers_high=(2,))
    asked = []
    monkeypatch.setattr("kt.editing.resolve.probe_stages", lambda model, facts: asked.append(facts) or probed)
    with pytest.warns(UserWarning, match="layers_mlp 1 as probed, layers_high 2 as probed"):
        edit = session(setting, "jeep", layers_mlp=None, layers_high=None).solve(REQUESTS)
    assert edit.names == ("model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight")
    assert [len(facts) for facts in asked] == [2]
    probed = no_stages("none")
    with pytest.warns(UserWarning, match="by relative depth.*kt probe"):
        session(setting, "jeep", layers_mlp=None, layers_high=None).solve(REQUESTS)


class TestBalance:
    """α: one a fact, and the control that every joint edit carries."""

    def test_each_facts_column_is_scaled_by_its_own(self, setting, monkeypatch):
        traced = SimpleNamespace(alpha=0.5, layers={}, per_fact=[SimpleNamespace(id="a", alpha=0.25)])
        monkeypatch.setattr("kt.editing.resolve.trace_balance", lambda *a: traced)
        named = [request | {"id": name} for request, name in zip(REQUESTS, "ab", strict=True)]
        with pytest.warns(UserWarning, match=r"1 of 2 requests have no alpha of their own .*Space Needle.* 0\.500"):
            mixed = session(setting, alpha="per-fact").solve(named)
        assert mixed.manifest["alphas"] == [0.25, 0.5] and mixed.alpha == 0.375
        full = {a: session(setting, alpha=a).solve(named) for a in (0.0, 1.0)}
        assert set(mixed.names) == set(full[0.0].names) | set(full[1.0].names)
        for whole, shares in ((full[1.0], [0.25, 0.5]), (full[0.0], [0.75, 0.5])):
            for name in whole.names:
                want = whole.updates[name].scaled(torch.tensor(shares))
                torch.testing.assert_close(mixed.delta(name), want.dense(), atol=1e-6, rtol=1e-4)

    def test_the_control_is_the_mlp_part_of_the_same_edit(self, setting):
        model = setting[0]
        edit = session(setting, alpha=0.25).solve(REQUESTS)
        control = edit.control()
        assert control is not None and {model.site_of(n).kind for n in control.names} == {Kind.MLP}
        assert all(torch.equal(control.delta(n), edit.delta(n)) for n in control.names)
        assert all(r.control_prob is not None for r in edit.report)
        with control.applied(model):
            pass  # its own fingerprints let it in
        drawn = edit.figure().to_json()
        assert "MLP part alone" in drawn and "old answer" in drawn
        for alpha in (0.0, 1.0):
            assert session(setting, alpha=alpha).solve(REQUESTS).control() is None
        both = session(setting, "pmet", modules="both").solve(REQUESTS)
        assert both.control() is None, "PMET scales nothing by α"


def test_how_much_of_the_wanted_change_came_through(setting):
    tight = session(setting, "memit", mom2_update_weight=1e-6).solve(REQUESTS).manifest["value_change"]
    with pytest.warns(UserWarning, match="wanted change came through the write"):
        loose = session(setting, "memit", mom2_update_weight=1000.0).solve(REQUESTS).manifest["value_change"]
    (tight,), (loose,) = tight.values(), loose.values()
    assert tight["came_through"]["mean"] > 0.8 > loose["came_through"]["mean"] > 0
    assert tight["left"]["mean"] < loose["left"]["mean"] and tight["left"]["n"] == 2


@pytest.mark.parametrize(
    ("method", "settings", "hint"),
    [
        ("memit", {"mom2_update_weight": 1000.0}, "lower mom2_update_weight"),
        ("alphaedit", {"L2": 1e6}, "lower L2"),
        ("unke", {"num_steps": 1, "lr": 1e-6}, "raise .*lr or num_steps, or take other layers"),
    ],
)
def test_a_write_that_changes_little_names_the_settings_that_its_method_has(setting, method, settings, hint):
    with pytest.warns(UserWarning, match=f"% of the wanted change came through the write; {hint}$"):
        session(setting, method, **settings).solve(REQUESTS)


def test_each_family_of_methods_draws_its_own_contexts(setting):
    found = {name: [METHODS[name].contexts(setting[0], seed) for seed in (0, 0, 1)] for name in ("memit", "rome")}
    memit, rome = found["memit"][0], found["rome"][0]
    assert [len(g) for g in memit.groups] == [1, 5] and memit.weights[0] == 0.5
    assert [len(g) for g in rome.groups] == [21] and len(set(rome.weights)) == 1
    for same, again, other in found.values():
        assert same == again != other


def test_a_configuration_and_its_name_with_options_give_the_same_edit(setting):
    model, corpus, cache = setting
    config = configure(model, "memit", **used_by("memit", fast("memit")))
    given = {"statistics": statistics(model, corpus, cache), "context_templates": CONTEXTS}
    named, made = session(setting, "memit").solve(REQUESTS), kt.edit(model, REQUESTS, config, **given)
    assert named.manifest["hyper_parameters"] == made.manifest["hyper_parameters"]
    assert all(torch.equal(named.delta(name), made.delta(name)) for name in named.names)
    with pytest.raises(KtError, match="v_lr belongs into the configuration"):
        kt.edit(model, REQUESTS, config, v_lr=0.1, **given)


def test_layers_that_nobody_gave_are_said_to_be_guessed(setting):
    model, corpus, cache = setting
    given = {k: v for k, v in fast("memit").items() if k != "layers_mlp"}
    with pytest.warns(UserWarning, match="no layers given.*layers_mlp .* by relative depth"):
        kt.edit(model, REQUESTS, method="memit", statistics=statistics(model, corpus, cache), **given)


@pytest.mark.parametrize("method", ["memit", "ft", "ultraedit", "lora"])
def test_a_weight_that_a_method_needs_and_cannot_have_is_one_line_before_any_work(method, monkeypatch):
    model = tiny_model("gpt2")
    for changed, words in ((torch.int8, "is quantised"), ("meta", "is offloaded")):
        projection = model.linear(Site(Kind.MLP, 1))
        weight = projection.weight.data.to(changed)
        projection.weight = torch.nn.Parameter(weight, requires_grad=False)
        with pytest.raises(KtError, match=f"transformer.h.1.mlp.c_proj.weight {words}") as caught:
            kt.edit(model, REQUESTS, method=method, **fast(method, layers_mlp=(1,)))
        assert "\n" not in str(caught.value)
    with pytest.raises(KtError, match="no weight called"):
        model.weight("transformer.h.0.mlp.gone.weight")


def test_every_option_of_a_session_can_be_what_a_misspelt_one_meant():
    from kt.editing.presets import OPTIONS
    from kt.editing.session_options import SessionOptions

    assert {field.name for field in fields(SessionOptions)} <= set(OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_sum_of_keys_in_fewer_digits_holds_no_more_and_no_fewer_directions(dtype):
    draw = torch.randn(64, 21, generator=torch.Generator().manual_seed(0)).double()
    keys = draw[:, :1] + 0.5 * draw[:, 1:]  # real keys have a common mean, so their eigenvalues are far apart
    (held,) = keys_of({"w": (keys @ keys.T).to(dtype)}).values()
    assert held.shape == (64, 20)
    if dtype in (torch.float64, torch.float32):
        torch.testing.assert_close(held @ held.T, keys @ keys.T, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["nse", "ft", "jeep"])
def test_a_run_that_an_older_kt_began_with_another_solve_is_solved_anew(setting, method, tmp_path):
    fresh = session(setting, method).solve(REQUESTS)
    session(setting, method, journal=Journal(tmp_path / "a")).solve(REQUESTS)
    kept = list((tmp_path / "a").rglob("*-r1*"))
    assert kept and METHODS[method].revision == 1 and METHODS["memit"].revision == 0
    for path in kept:  # as it would stand there, of other numbers
        old = path.with_name(path.name.replace("-r1", ""))
        path.rename(old)
        for file in [old] if old.is_file() else [f for f in old.rglob("*") if f.is_file()]:
            file.write_bytes(b"not what is solved now")
    again = session(setting, method, journal=Journal(tmp_path / "a")).solve(REQUESTS)
    assert again.digest == fresh.digest


@pytest.mark.filterwarnings("ignore")
def test_what_an_older_kt_kept_of_a_question_without_its_mark_is_not_taken_up(corpus, tmp_path):
    """Nor is what it kept of later edits: they stand on other weights. All other phases have their old names."""
    tokenizer = tokenizer_of(TEMPLATES["qwen 2.5"])
    plain = tiny_model("llama", tokenizer=tokenizer, vocab_size=512)
    templates = ("Which city is {}?", "The capital of {} is", "Which city is the capital of {}", "Which town is {}?")
    facts = [
        kt.Fact(t, name, target="Rome") for t, name in zip(templates, ("Oslo", "Peru", "Chile", "Bonn"), strict=True)
    ]
    options = fast("memit", layers_mlp=(0,), v_num_grad_steps=2)
    for model, apart in ((plain.asked("always"), True), (plain, False)):
        folder = tmp_path / str(model.chat)[:4]
        moments = statistics(model, corpus, tmp_path / "cache")
        with kt.EditSession(model, "memit", statistics=moments, journal=Journal(folder), **options) as s:
            for fact in facts:
                s.edit([fact])
        names = [path.name for path in (folder / "phases").iterdir()]
        for number in range(1, 5):
            kept = [name.startswith(f"solve-0000{number}-in-turn-") for name in names if f"solve-0000{number}" in name]
            assert kept and all(kept) is any(kept) is (apart and number > 2)
