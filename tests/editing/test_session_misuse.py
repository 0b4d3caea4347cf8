"""What a session is given or asked for that it cannot mean: one line, before any work, and the base's bytes."""

import warnings

import pytest
import torch
from editing_help import REQUESTS, fast, statistics
from families import tiny_model

import kt
from kt.editing.methods import METHODS, used_by
from kt.errors import KtError

pytestmark = pytest.mark.filterwarnings("ignore::kt.editing.verdict.FailedCheck", "ignore:.*no layers given")
WEIGHT = "model.layers.0.mlp.down_proj.weight"
TUNING = {"num_steps": 1, "layers_mlp": (1,), "check": False}


def tuning(model, **options):
    """A session that edits fast."""
    return kt.EditSession(model, "ft", **(TUNING | options))


def refused(call, words):
    with pytest.raises(KtError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("method", ["grace", "melo", "wise", "memoir", "ice", "ike", "scr"])
def test_an_update_guard_on_a_method_that_writes_no_weight_is_refused(setting, method):
    refused(
        lambda: kt.EditSession(setting[0], method, update_guard="simie"),
        f"update_guard simie restrains updates of weights, and {method}",
    )


@pytest.mark.parametrize("method", ["grace", "ice", "ft", "ultraedit", "melo", "wise", "ft-l", "unke"])
def test_context_templates_that_a_method_does_not_read_are_said_once_to_be_without_effect(method):
    model = tiny_model("llama")
    given = used_by(method, {"layers_mlp": (1,), "v_num_grad_steps": 2, "num_steps": 1}) | {"check": False}
    plain = kt.EditSession(model, method, **given)
    told = kt.EditSession(model, method, context_templates=["{}", "Now. {}"], **given)
    said, edits = [], []
    for session in (plain, told, told):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            edits.append(session.solve(REQUESTS))
        said.append([str(w.message) for w in found if "context_templates are without effect" in str(w.message)])
    lines = [f"context_templates are without effect: {method} reads the requests' own prompts; leave them out"]
    reads = method in ("melo", "wise", "unke")
    assert said == [[], [] if reads else lines, []]
    assert _same(edits[0], edits[1]) == (not reads)


@pytest.mark.parametrize(
    ("method", "reads", "settings"),
    [
        *((name, False, {}) for name in ("ft", "grace", "ice", "unke", "ultraedit")),
        ("rome", False, {"mom2_adjustment": False}),
        *((name, True, {}) for name in ("rome", "memit", "crispedit")),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_statistics_that_a_method_does_not_read_are_said_once_to_be_without_effect(
    setting, method, reads, settings, as_file
):
    given = {"check": False} | used_by(method, {"layers_mlp": (1,), "v_num_grad_steps": 1, "num_steps": 1}) | settings
    moments = statistics(*setting)
    file = moments.files["model.layers.1.mlp.down_proj"]
    session = kt.EditSession(setting[0], method, statistics=file if as_file else moments, **given)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        session.solve(REQUESTS)
        session.solve(REQUESTS)
    said = [str(w.message) for w in found if "statistics are without effect" in str(w.message)]
    line = f"statistics are without effect: {method}, as it is set, takes no second moments; leave them out"
    assert said == ([] if reads else [line])


def _same(one, other):
    """Whether two edits have the same numbers."""
    found = [each.effect.arrays() if each.effect else {n: each.delta(n) for n in each.names} for each in (one, other)]
    return found[0].keys() == found[1].keys() and all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize(("method", "choice"), [("ft-wd", "modules=mlp, or another"), ("unke", "another")])
def test_simie_on_weights_that_are_no_linear_maps_is_refused_before_anything_is_solved(setting, method, choice):
    refused(
        lambda: kt.EditSession(setting[0], method, update_guard="simie"),
        f"simie needs linear maps, and {method} writes whole blocks.*; choose {choice} update guard",
    )


@pytest.mark.parametrize(
    ("method", "option", "words"),
    [
        ("ft", {"norm_guard": True}, "norm_guard .* ft has none"),
        ("ft", {"keep_history": True}, "ft has no place for earlier edits' keys"),
        ("rome", {"keep_history": True}, "rome has no place for earlier edits' keys"),
        ("rome", {"history": {WEIGHT: torch.eye(48)}}, "rome has no place for earlier edits' keys"),
        ("jeep", {"spread": "blue"}, "spread blue searches for one target after the other"),
        ("memit", {"layers_mlp": ()}, "layers_mlp is empty"),
        ("memit", {"layers": (0,), "layers_mlp": (1,)}, r"layers \(0,\) and layers_mlp \(1,\) are two names of one"),
        ("jeep", {"v_lr": 0.1, "v_lr_low": 0.5}, "v_lr 0.1 and v_lr_low 0.5 are two names of one setting; give v_lr"),
    ],
)
def test_what_a_method_cannot_take_is_refused_when_the_session_is_made(setting, method, option, words):
    refused(lambda: kt.EditSession(setting[0], method, **option), words)


def test_a_session_that_has_ended_edits_no_more_and_can_still_be_read(setting):
    model = setting[0]
    base = model.fingerprint()
    with tuning(model) as session:
        refused(session.__enter__, "entered already")
        step = session.edit(REQUESTS[:1])
    for call in (session.__enter__, session.revert, lambda: session.edit(REQUESTS), lambda: session.solve(REQUESTS)):
        refused(call, "the session has ended.*make a new EditSession")
    assert session.total().names == step.names and session.steps == [step]
    assert model.fingerprint() == base


def test_an_earlier_block_left_inside_a_session_says_so_and_the_base_comes_back(setting):
    model = setting[0]
    base = model.fingerprint()
    earlier = tuning(model).solve(REQUESTS[:1])
    block = earlier.applied(model)
    block.__enter__()
    with tuning(model) as session:
        session.edit(REQUESTS[1:])
        refused(lambda: block.__exit__(None, None, None), "not left in the reverse of their order")
    assert model.fingerprint() == base


def test_a_later_block_left_after_its_session_says_so_and_the_base_comes_back(setting):
    model = setting[0]
    base = model.fingerprint()
    with pytest.raises(KtError, match="not left in the reverse"), tuning(model) as session:
        step = session.edit(REQUESTS[1:])
        with session.unedited():
            earlier = tuning(model, layers_mlp=(0, 1)).solve(REQUESTS[:1])
        block = earlier.applied(model, force=True)
        with pytest.warns(UserWarning, match="forced"):
            block.__enter__()
    assert not set(step.names).isdisjoint(earlier.names)
    block.__exit__(None, None, None)
    assert model.fingerprint() == base


def test_a_block_between_two_steps_and_an_edit_before_the_session_is_entered_are_taken_back(setting):
    model = setting[0]
    base = model.fingerprint()
    other = tuning(model, layers_mlp=(0,)).solve(REQUESTS[:1])
    session = tuning(model)
    first = session.edit(REQUESTS[:1])
    with session:
        with other.applied(model):
            session.edit(REQUESTS[1:])
        assert model.fingerprint() != base
        session.revert()
        assert model.fingerprint() == base
        session.edit(REQUESTS[1:])
    assert model.fingerprint() == base and set(first.names).isdisjoint(other.names)


def written_since(model, how, edit):
    """What writes a weight of an edit beside a session, and how it is taken back."""
    if how == "forced":
        with pytest.warns(UserWarning, match="forced"):
            edit.apply_(model, force=True)
        return lambda: edit.revert_(model)
    kept = model.copies(edit.names)
    with torch.no_grad():
        model.own(edit.names[0])[0, 0] += 1
    return lambda: model.put_back(kept)


@pytest.mark.parametrize("how", ["forced", "by hand"])
def test_a_session_that_is_not_entered_leaves_what_was_written_since_unless_forced(setting, how):
    model = setting[0]
    base = model.fingerprint()
    other, session = tuning(model).solve(REQUESTS[1:]), tuning(model)
    session.edit(REQUESTS[:1])
    edited = model.fingerprint()
    take_back = written_since(model, how, other)
    written = model.fingerprint()
    for call in (session.revert, session.__enter__):
        refused(call, r"1 of 1 weights .* changed after the session's last edit; take that back first.*force=True")
        assert model.fingerprint() == written and session.steps
    take_back()
    assert model.fingerprint() == edited
    session.revert()
    assert model.fingerprint() == base
    session.edit(REQUESTS[:1])
    written_since(model, how, other)
    session.edit(REQUESTS[1:])  # on top of it: its bytes cannot be brought back without that write
    refused(session.revert, "changed after the session's last edit")
    session.revert(force=True)
    assert model.fingerprint() == base


@pytest.mark.parametrize("entered", [False, True])
def test_a_session_takes_back_what_it_wrote_and_not_what_came_between_its_solve_and_its_edit(setting, entered):
    model = setting[0]
    options = fast("memit", layers_mlp=(0,), v_num_grad_steps=2)
    session = kt.EditSession(model, "memit", statistics=statistics(*setting), norm_guard="kt", check=False, **options)
    session.solve(REQUESTS[:1])  # the norm guard keeps the weights as they are now
    other = tuning(model, layers_mlp=(0,)).solve(REQUESTS[1:])
    if entered:
        session.__enter__()
    other.apply_(model)
    applied = model.fingerprint()
    session.edit(REQUESTS[:1])
    session.__exit__(None, None, None) if entered else session.revert()
    assert model.fingerprint() == applied
    other.revert_(model)


def broken(what):
    gram = torch.eye(48)
    gram[0, 1] = {"nan": float("nan"), "one side": 0.5}.get(what, 0.0)
    return -gram if what == "negative" else gram


@pytest.mark.parametrize(
    ("what", "words"), [("nan", "not finite"), ("one side", "not symmetric"), ("negative", "eigenvalue -1")]
)
def test_a_history_that_is_no_sum_of_keys_is_refused_by_name(setting, what, words):
    refused(
        lambda: kt.EditSession(setting[0], "memit", history={WEIGHT: broken(what)}), f"history of {WEIGHT}.*{words}"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_history_is_taken_as_rounding_leaves_it(setting, dtype):
    keys = torch.randn(48, 7, generator=torch.Generator().manual_seed(0)) + 0.5
    session = kt.EditSession(setting[0], "memit", history={WEIGHT: (keys @ keys.T).to(dtype)})
    gram = session.state.keys[WEIGHT] @ session.state.keys[WEIGHT].T
    torch.testing.assert_close(gram.float(), keys @ keys.T, rtol=0.02, atol=0.2)


def test_a_history_of_an_edit_without_keys_warns(setting):
    keyless = tuning(setting[0]).solve(REQUESTS[:1])
    with pytest.warns(UserWarning, match="history: a ft edit keeps no keys"):
        kt.EditSession(setting[0], "memit", history=[keyless])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("keep_history", v) for v in ("no", 1)),
        *((name, "x") for name in ("hold", "check", "strict", "seed", "max_tokens", "history", "journal")),
        *(("norm_guard", v) for v in (3, 0.5)),
        *(("update_guard", v) for v in (3, True)),
        *(("seed", v) for v in (1.5, None, True)),
        *(("max_tokens", v) for v in (-5, 0, 0.5, True)),
        *(("corpus", v) for v in (5, None)),
        *(("statistics", v) for v in (5, ["x"])),
        *(("history", v) for v in (5, ["x"], {WEIGHT: [[1]]}, object())),
        *(("context_templates", v) for v in ("x", 5, [1, 2], [[]], [["{}"], 3])),
        *(("method", v) for v in (3, METHODS["memit"])),
    ],
)
def test_a_value_of_another_kind_is_named_with_what_to_give(setting, option, value):
    name = "history of|history" if option == "history" else option
    refused(lambda: kt.EditSession(setting[0], **({"method": "memit"} | {option: value})), f"^({name}) .*; give ")


@pytest.mark.parametrize("model", ["demo", None, torch.nn.Linear(2, 2)])
def test_a_model_that_kt_did_not_load_is_refused(model):
    refused(lambda: kt.edit(model, REQUESTS, "memit"), "^model is .*; give the model that kt.load returns")


def test_no_method_at_all_is_refused(setting):
    refused(lambda: kt.edit(setting[0], REQUESTS, None), "^method is None; give a method's name")


def test_every_kind_of_value_that_is_meant_is_taken(setting):
    model, corpus, cache = setting
    given = {"keep_history": None, "norm_guard": False, "hold": False, "max_tokens": 5, "seed": 3, "history": ()}
    given |= {"statistics": statistics(model, corpus, cache), "corpus": corpus, "journal": None}
    assert kt.EditSession(model, "memit", **fast("memit", **given)).options.max_tokens == 5
