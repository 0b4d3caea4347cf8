"""Edits on one base: put on, taken out, kept as JSON; the base's bytes stay what they are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from editing_help import REQUESTS, solve
from families import byte_level_tokenizer, tiny_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kt
from kt.editing import Edit
from kt.editing.apply import fingerprints
from kt.editing.stack import open_edit
from kt.errors import BadFile, KtError
from kt.model.update import LowRank

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|all but singular)")
NAMES = tuple(f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))


def loaded(dtype=torch.float32):
    return kt.load(tiny_module("qwen2").to(dtype), tokenizer=byte_level_tokenizer())


def by_hand(model, seed, names=NAMES, size=0.1):
    """An edit of the model as it stands."""
    torch.manual_seed(seed)
    updates = {n: LowRank(torch.randn(32, 2) * size, torch.randn(2, 48) * size) for n in names}
    about = {"method": "memit", "model": model.name, "alpha": 0.0, "fingerprints": fingerprints(model, names)}
    return Edit(updates, about | {"requests": [as_asked(REQUESTS[0] | {"target_new": f"Town {seed}"}, seed)]})


def as_asked(request, number):
    return {"id": str(number), "prompt": request["prompt"], "subject": request["subject"],
            "target_new": {"str": request["target_new"]}, "target_true": {"str": request["target_true"]}}  # fmt: skip


def on_top(model, below, seed, names=NAMES):
    with kt.EditStack(below).applied(model):
        return by_hand(model, seed, names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [1, 2, 3])
def test_an_edit_taken_out_leaves_the_bytes_of_a_stack_that_never_had_it(dtype, place):
    model = loaded(dtype)
    base = model.fingerprint()
    edits = [by_hand(model, 1), by_hand(model, 2, NAMES[:1]), by_hand(model, 3)]
    stack = kt.EditStack(edits)
    stack.apply_(model)
    full = model.fingerprint()
    stack.remove(place)
    left = model.fingerprint()
    rest = [edit for at, edit in enumerate(edits, 1) if at != place]
    assert stack.edits == tuple(rest)
    stack.revert_(model)
    assert model.fingerprint() == base
    with kt.EditStack(rest).applied(model):
        assert model.fingerprint() == left
    assert len({base, full, left}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_every_edit_taken_out_the_base_is_back_to_the_byte(dtype):
    model = loaded(dtype)
    base, stack = model.fingerprint(), kt.EditStack()
    edits = [by_hand(model, seed) for seed in (1, 2, 3)]
    stack.apply_(model)
    for edit in edits:
        stack.push(edit)
    for edit in (stack.edits[1], stack.edits[0], stack.edits[2]):
        assert model.fingerprint() != base
        stack.remove(edit)
    assert model.fingerprint() == base and len(stack) == 0


def test_each_edit_is_rounded_once_in_its_order():
    model = loaded(torch.bfloat16)
    edits = [by_hand(model, seed) for seed in (1, 2)]
    wanted = model.weight(NAMES[0]).clone()
    for edit in edits:
        wanted = (wanted.float() + edit.delta(NAMES[0])).bfloat16()
    with kt.EditStack(edits).applied(model):
        assert torch.equal(model.weight(NAMES[0]), wanted)


def test_an_edit_fits_on_the_base_and_on_exactly_what_is_below():
    model = loaded()
    first, second = by_hand(model, 1), by_hand(model, 2)
    third = on_top(model, [first, second], 3)
    stack = kt.EditStack([first, second, third])
    assert stack.grounds(model) == ["base", "base", "below"]
    assert [stack.stands_on(place) for place in (1, 2, 3)] == [[], [], [1, 2]]
    before = model.fingerprint()
    for wrong in ([third], [first, third], [second, first, third]):
        with pytest.raises(KtError, match="fits neither"), kt.EditStack(wrong).applied(model):
            pytest.fail("it was written")
        assert model.fingerprint() == before


def test_what_a_later_edit_stands_on_is_not_taken_out_but_by_force():
    model = loaded()
    first = by_hand(model, 1)
    second = on_top(model, [first], 2)
    stack = kt.EditStack([first, second])
    stack.apply_(model)
    full = model.fingerprint()
    with pytest.raises(KtError, match=rf"{second.digest[:12]} \(place 2\) was solved on top of .*{first.digest[:12]}"):
        stack.remove(first)
    assert len(stack) == 2 and model.fingerprint() == full
    with pytest.warns(UserWarning, match="forced: .*fits neither"):
        stack.remove(first, force=True)
    assert stack.layers[0].forced and stack.edits == (second,)
    stack.revert_(model)
    with pytest.warns(UserWarning, match="forced"):
        assert kt.EditStack([second]).for_model(model, force=True).layers[0].forced


def test_history_names_what_it_stands_on_where_the_weights_do_not_tell():
    model = loaded()
    first = by_hand(model, 1, NAMES[:1])
    second = by_hand(model, 2, NAMES[1:])
    assert kt.EditStack([first, second]).stands_on(2) == []
    second.manifest["stands_on"] = [first.digest]
    stack = kt.EditStack([first, second])
    assert stack.stands_on(2) == [1]
    with pytest.raises(KtError, match="remove that first"):
        stack.remove(1)


def test_an_edit_that_does_not_fit_leaves_a_live_stack_as_it_was():
    model = loaded()
    first, other = by_hand(model, 1), loaded()
    with kt.EditStack([by_hand(other, 9)]).applied(other):
        foreign = by_hand(other, 2)
    stack = kt.EditStack([first])
    stack.apply_(model)
    before = model.fingerprint()
    with pytest.raises(KtError, match="fits neither"):
        stack.push(foreign)
    assert model.fingerprint() == before and stack.edits == (first,)
    with pytest.raises(KtError, match=r"stands in .* already"):
        stack.apply_(model)
    with pytest.raises(KtError, match="not applied to this model"):
        stack.revert_(other)


def test_what_was_written_over_a_live_stack_is_not_lost_but_by_force():
    model = loaded()
    base = fingerprints(model, NAMES)
    stack = kt.EditStack([by_hand(model, 1)])
    stack.apply_(model)
    later = on_top(model, [], 2)
    later.apply_(model)
    with_both = fingerprints(model, NAMES)
    third = by_hand(model, 3)
    for change in (stack.revert_, lambda m: stack.remove(1), lambda m: stack.push(third, force=True)):
        with pytest.raises(KtError, match="changed after apply_; take that back first"):
            change(model)
        assert fingerprints(model, NAMES) == with_both and len(stack.edits) == 1
    later.revert_(model)
    stack.revert_(model)
    assert fingerprints(model, NAMES) == base
    stack.apply_(model)
    later.apply_(model)
    stack.revert_(model, force=True)
    assert fingerprints(model, NAMES) == base


def test_an_exception_inside_brings_the_base_back():
    model = loaded()
    before = model.fingerprint()
    with pytest.raises(ZeroDivisionError), kt.EditStack([by_hand(model, 1)]).applied(model):
        1 / 0  # noqa: B018
    assert model.fingerprint() == before


def test_one_edit_twice_and_an_edit_that_is_not_there_are_refused():
    model = loaded()
    edit = by_hand(model, 1)
    stack = kt.EditStack([edit])
    with pytest.raises(KtError, match="already, at place 1"):
        stack.push(edit)
    for gone in (0, 2, by_hand(model, 2)):
        with pytest.raises(KtError, match="the stack has no edit"):
            stack.remove(gone)


def test_the_total_is_the_stack_as_one_edit_of_the_base(setting):
    model, corpus, cache = setting
    first, second = (solve(model, corpus, cache, requests=[request]) for request in REQUESTS)
    stack = kt.EditStack([first, second])
    before, total = model.fingerprint(), stack.total(model)
    assert model.fingerprint() == before
    with stack.applied(model):
        wanted = {name: model.weight(name).clone() for name in stack.names}
    with total.applied(model):
        for name, weight in wanted.items():
            torch.testing.assert_close(model.weight(name), weight, atol=1e-6, rtol=1e-5)
    assert [r.subject for r in total.report] == [r["subject"] for r in REQUESTS]
    assert total.manifest["stack"] == [first.digest, second.digest] and total.manifest["steps"] == [1, 1]
    assert all(r.target_prob[1] > r.target_prob[0] for r in total.report)
    control, alone = stack.control(), total.control()
    assert not set(control.names) & set(total.manifest["attention_weights"])
    with control.applied(model):
        wanted = {name: model.weight(name).clone() for name in control.names}
    with alone.applied(model):
        assert all(torch.allclose(model.weight(name), weight, atol=1e-6) for name, weight in wanted.items())
    assert kt.EditStack([by_hand(loaded(), 1)]).control() is None
    with pytest.raises(KtError, match="the stack is empty"):
        kt.EditStack().total(model)


# Files ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def kept(tmp_path):
    """A stack of an edit in a folder below and one that has no file, with its model."""
    model = loaded()
    (tmp_path / "stacks" / "below").mkdir(parents=True)
    first, second = by_hand(model, 1), by_hand(model, 2)
    file = first.save(tmp_path / "stacks" / "below" / "a.safetensors")
    stack = kt.EditStack()
    stack.push(first, file)
    stack.push(second)
    return model, stack, stack.save(tmp_path / "stacks" / "stack.json")


def test_a_stack_moves_with_its_folder(kept, tmp_path):
    model, stack, path = kept
    held = json.loads(path.read_text())
    assert [e["file"] for e in held["edits"]] == ["below/a.safetensors", f"{stack.edits[1].digest[:16]}.safetensors"]
    shutil.move(tmp_path / "stacks", tmp_path / "moved")
    again = open_edit(tmp_path / "moved" / "stack.json")
    assert isinstance(again, kt.EditStack) and [e.digest for e in again.edits] == [e.digest for e in stack.edits]
    with stack.applied(model):
        wanted = model.fingerprint()
    with again.applied(model):
        assert model.fingerprint() == wanted
    assert isinstance(open_edit(tmp_path / "moved" / "below" / "a.safetensors"), Edit)


def test_an_edit_from_elsewhere_is_written_beside_the_stack(kept, tmp_path):
    _, stack, _ = kept
    path = stack.save(tmp_path / "other" / "stack.json")
    names = [f"{e.digest[:16]}.safetensors" for e in stack.edits]
    assert [e["file"] for e in json.loads(path.read_text())["edits"]] == names
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([*names, "stack.json"])


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "below/../../a.safetensors", "/etc/passwd", "C:\\a.safetensors", "\\\\host\\a.safetensors",
     "..\\a.safetensors", "link/a.safetensors", "a\0b", "a\x1b[2J", "", ".", "missing.safetensors"],
)  # fmt: skip
def test_a_name_that_leaves_the_folder_is_refused(kept, tmp_path, name):
    _, stack, path = kept
    stack.edits[0].save(tmp_path / "a.safetensors")
    (path.parent / "link").symlink_to(tmp_path)
    held = json.loads(path.read_text())
    held["edits"][0]["file"] = name
    path.write_text(json.dumps(held))
    with pytest.raises(BadFile, match=r"not in the stack's own folder|cannot read|no such file|not a whole"):
        kt.EditStack.load(path)


def test_a_changed_edit_file_is_found(kept):
    _, stack, path = kept
    stack.edits[1].save(path.parent / "below" / "a.safetensors")
    with pytest.raises(BadFile, match=f"edit 1 was {stack.edits[0].digest[:12]}, but .* now holds"):
        kt.EditStack.load(path)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {}, optional={"file": st.text(max_size=12) | anything, "digest": anything, "forced": anything}
)


made_up = {"kind": st.just("edit-stack") | anything, "edits": st.lists(entries | anything, max_size=3) | anything}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(held=st.fixed_dictionaries({}, optional=made_up))
def test_made_up_stacks_are_read_or_refused_in_one_line(tmp_path, held):
    path = Path(tmp_path, "stack.json")
    path.write_text(json.dumps(held))
    try:
        assert len(open_edit(path)) == len(held["edits"])
    except BadFile as error:
        assert "\n" not in str(error)


def test_a_broken_stack_is_refused(tmp_path):
    for content in (b"", b"{", b"[]", b"{}", b"\x80\x04", b'{"kind": "trace"}', b"[" * 100_000, b'{"a":' * 100_000):
        (path := tmp_path / "stack.json").write_bytes(content)
        with pytest.raises(BadFile):
            open_edit(path)
    with pytest.raises(BadFile, match="No such file"):
        open_edit(tmp_path / "none.json")
