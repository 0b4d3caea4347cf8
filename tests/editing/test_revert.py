"""Applying and taking back: exact bytes in every dtype, and never into weights that are not the edit's."""

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import permutations

import pytest
import torch
from edits_by_hand import in_dtype, random_edit, sha
from families import tiny_model

import kt
from kt.errors import KtError, UnknownSite, WorkFailed
from kt.model.update import Dense

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DOWN = "model.layers.0.mlp.down_proj.weight"
OUT = "model.layers.1.self_attn.o_proj.weight"
WEIGHTS = {
    "qwen3": (DOWN, OUT),
    "gpt2": ("transformer.h.0.mlp.c_proj.weight", "transformer.h.0.mlp.c_proj.bias", "transformer.h.1.ln_1.weight"),
    "gemma2": ("model.embed_tokens.weight", "model.layers.0.post_feedforward_layernorm.weight"),
}


def ready(family="qwen3", dtype=torch.float32, **options):
    model = in_dtype(tiny_model(family), dtype)
    return model, random_edit(model, WEIGHTS[family], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", WEIGHTS)
class TestExactBytes:
    def test_apply_and_revert_bring_back_every_byte(self, family, dtype):
        model, edit = ready(family, dtype)
        before = sha(model)
        edit.apply_(model)
        applied = sha(model)
        edit.revert_(model)
        assert applied != before == sha(model)
        edit.apply_(model)
        assert sha(model) == applied

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_exception_inside_the_block_does_too(self, family, dtype, error):
        model, edit = ready(family, dtype)
        before = sha(model)
        with pytest.raises(error), edit.applied(model):
            assert sha(model) != before
            raise error
        assert sha(model) == before


def test_tied_embeddings_follow_and_come_back():
    model, edit = ready("gemma2")
    head, table = model.module.get_output_embeddings().weight, model.module.get_input_embeddings().weight
    assert head is table
    before = sha(model)
    with edit.applied(model):
        assert model.module.get_output_embeddings().weight is table and sha(model) != before
    assert sha(model) == before


def test_one_tied_weight_under_two_names_is_refused():
    model, edit = ready("gemma2")
    both = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), edit.updates["model.embed_tokens.weight"])
    with pytest.raises(KtError, match="one tied weight"):
        kt.Edit(both, {}).apply_(model)


class TestTwice:
    def test_the_same_edit_is_refused_also_by_force(self):
        model, edit = ready()
        edit.apply_(model)
        once = sha(model)
        for force in (False, True):
            with pytest.raises(KtError, match="already applied"):
                edit.apply_(model, force=force)
        with pytest.raises(KtError, match="already applied"), edit.applied(model):
            pass
        assert sha(model) == once

    def test_it_is_refused_through_another_object_of_the_same_file(self, tmp_path):
        model, edit = ready()
        other = kt.Edit.load(edit.save(tmp_path / "edit.safetensors"))
        with edit.applied(model), pytest.raises(KtError, match="already applied"):
            other.apply_(model)
        other.apply_(model)

    def test_also_when_rounding_left_one_of_its_weights_as_it_was(self, tmp_path):
        model = in_dtype(tiny_model("qwen3"), torch.bfloat16)
        edit = random_edit(model, (DOWN, OUT))
        edit.updates[OUT] = edit.updates[OUT].scaled(1e-12)
        edit.manifest["fingerprints_after"][OUT] = edit.manifest["fingerprints"][OUT]
        other = kt.Edit.load(edit.save(tmp_path / "edit.safetensors"))
        edit.apply_(model)
        with pytest.raises(KtError, match="already applied"):
            other.apply_(model)

    def test_an_edit_without_fingerprints_knows_it_too(self):
        model, edit = ready()
        bare = kt.Edit(edit.updates, {})
        bare.apply_(model)
        assert set(bare.state_of(model).values()) == {"applied"}
        with pytest.raises(KtError, match="already applied"):
            bare.apply_(model)
        bare.revert_(model)
        assert set(bare.state_of(model).values()) == {"base"}


class TestRefused:
    def test_half_of_it_applied(self):
        model, edit = ready()
        model.write(DOWN, edit.delta(DOWN))
        assert edit.state_of(model) == {DOWN: "applied", OUT: "base"}
        with pytest.raises(KtError, match=r"partly applied.*1 of 2 weights \(model.layers.0") as caught:
            edit.apply_(model)
        assert "\n" not in str(caught.value)

    def test_other_weights(self):
        model, edit = ready()
        with torch.no_grad():
            model.own(OUT)[0, 0] += 1
        assert edit.state_of(model) == {DOWN: "base", OUT: "other"}
        before = sha(model)
        with pytest.raises(KtError, match=r"1 of 2 weights \(model.layers.1.self_attn.o_proj.weight\)"):
            edit.apply_(model)
        assert sha(model) == before

    def test_another_dtype_is_called_so(self):
        _, edit = ready()
        half = in_dtype(tiny_model("qwen3"), torch.bfloat16)
        with pytest.raises(KtError, match=r"solved in float32, and .* in bfloat16; load it with --dtype float32"):
            edit.apply_(half)

    def test_another_shape_or_family_also_by_force(self):
        _, edit = ready()
        with pytest.raises(KtError, match="another shape"):
            edit.apply_(tiny_model("qwen3", intermediate_size=64), force=True)
        with pytest.raises(UnknownSite, match="no weight called"):
            edit.apply_(tiny_model("gpt2"), force=True)


class TestForce:
    def test_it_says_what_differs_and_can_be_taken_back(self):
        model, edit = ready()
        with torch.no_grad():
            model.own(OUT)[0, 0] += 1
        before = sha(model)
        with pytest.warns(UserWarning, match="forced: 1 of 2 weights"):
            edit.apply_(model, force=True)
        assert sha(model) != before
        edit.revert_(model)
        assert sha(model) == before

    def test_an_edit_made_for_the_model_by_force_needs_it_no_more(self):
        _, edit = ready()
        half = in_dtype(tiny_model("qwen3"), torch.bfloat16)
        with pytest.raises(KtError, match="solved in float32"):
            edit.for_model(half)
        with pytest.warns(UserWarning, match="forced: .*bfloat16"):
            own = edit.for_model(half, force=True)
        before = sha(half)
        with own.applied(half):
            assert sha(half) != before
        assert sha(half) == before and "bfloat16" in own.manifest["forced"] and own.for_model(half) is own


class TestRevertIsRefused:
    def test_where_nothing_was_applied(self):
        model, edit = ready()
        with pytest.raises(KtError, match="nothing to revert"):
            edit.revert_(model)

    def test_where_somebody_wrote_since_unless_forced(self):
        model, edit = ready()
        before = sha(model)
        edit.apply_(model)
        with torch.no_grad():
            model.own(DOWN)[0, 0] += 1
        changed = sha(model)
        with pytest.raises(KtError, match=r"1 of 2 weights \(model.layers.0.*force=True"):
            edit.revert_(model)
        assert sha(model) == changed
        edit.revert_(model, force=True)
        assert sha(model) == before

    def test_not_where_the_old_bytes_are_back_already(self):
        model, edit = ready()
        before, kept = sha(model), model.copies(edit.names)
        edit.apply_(model)
        model.put_back(kept)
        edit.revert_(model)
        assert sha(model) == before and edit.taken(model) is None


def test_for_good_inside_a_block_that_holds_the_same_weights_is_refused_and_on_others_stays():
    model = tiny_model("qwen3")
    block, same, other = (random_edit(model, names, seed=7 + len(names[0])) for names in ((DOWN,), (DOWN, OUT), (OUT,)))
    base = sha(model)
    with block.applied(model):
        there = sha(model)
        for lasting in (same, kt.EditStack([same])):
            with pytest.raises(KtError, match=f"{DOWN} is in a block that is open .*as a block inside it") as caught:
                lasting.apply_(model, force=True)
            assert "\n" not in str(caught.value) and sha(model) == there and same.taken(model) is None
        other.apply_(model)
        with same.applied(model, force=True), pytest.raises(KtError, match="revert the edit after that block"):
            other.revert_(model, force=True)
    assert sha(model) != base and other.state_of(model) == {OUT: "applied"}
    other.revert_(model)
    assert sha(model) == base
    stack = kt.EditStack([other])
    stack.apply_(model)
    with same.applied(model, force=True):
        for change in (lambda: stack.push(block), lambda: stack.remove(1), lambda: stack.revert_(model)):
            with pytest.raises(KtError, match=r"is in a block that is open .*the stack after that block"):
                change()
    stack.revert_(model)
    assert sha(model) == base


def test_a_model_that_is_gone_leaves_no_trace():
    """Its id may be the next model's."""
    model, edit = ready()
    edit.apply_(model)
    assert len(edit._taken) == 1
    del model
    gc.collect()
    assert len(edit._taken) == 0


class TestNothingBadIsWritten:
    def test_no_weight_of_float32_is_to_be_loaded_in_float32(self):
        model = tiny_model("qwen3")
        small = random_edit(model, (DOWN,)).updates[DOWN].scaled(1e-20)
        large = Dense(torch.full(small.shape, 3e38))
        with pytest.raises(WorkFailed, match=r"nothing was written; solve a larger edit$"):
            kt.Edit({DOWN: small}, {}).apply_(model)
        with torch.no_grad():
            model.own(DOWN).fill_(3e38)
        with pytest.raises(WorkFailed, match=r"not finite .* nothing was written; solve a smaller edit$"):
            kt.Edit({DOWN: large}, {}).apply_(model)

    def test_an_update_that_rounding_takes_whole_is_failed_work(self):
        model = in_dtype(tiny_model("qwen3"), torch.bfloat16)
        edit = random_edit(model, (DOWN, OUT))
        small = kt.Edit({n: u.scaled(1e-12) for n, u in edit.updates.items()}, {})
        before = sha(model)
        with pytest.raises(WorkFailed, match=r"changed no weight.*bfloat16.*--dtype float32"):
            small.apply_(model)
        with pytest.raises(WorkFailed, match="changed no weight"), small.applied(model):
            pass
        assert sha(model) == before and small.taken(model) is None
        with kt.Edit(small.updates, {"control": "its part"}).applied(model):
            pass  # of a control it is a finding
        zero = kt.Edit({n: u.scaled(0.0) for n, u in edit.updates.items()}, {})
        with zero.applied(model):
            assert sha(model) == before  # as asked
        with pytest.raises(WorkFailed, match="changes nothing"):
            zero.for_model(model)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_second_update_that_is_not_finite_takes_the_first_one_out(self, bad):
        model, edit = ready()
        broken = edit.updates[OUT].dense().clone()
        broken[0, 0] = bad
        edit.updates[OUT] = Dense(broken)
        before = sha(model)
        with pytest.raises(WorkFailed, match=f"the update of {OUT} is not finite"):
            edit.apply_(model)
        with pytest.raises(WorkFailed, match="not finite"), edit.applied(model):
            pass
        assert sha(model) == before

    def test_a_weight_that_would_overflow_is_not_kept(self):
        model = in_dtype(tiny_model("qwen3"), torch.float16)
        large = kt.Edit({DOWN: Dense(torch.full(tuple(model.weight(DOWN).shape), 1e5))}, {})
        before = sha(model)
        with pytest.raises(WorkFailed, match=r"not finite with the edit in it .in float16.*float32"):
            large.apply_(model)
        assert sha(model) == before


# Threads


def in_thread(call):
    """What a call in another thread raises, or None."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).exception()


def enter(edit, model):
    with edit.applied(model):
        pass


def test_a_second_thread_is_refused_in_one_line_and_the_base_comes_back():
    model, edit = ready()
    other, stack = random_edit(model, WEIGHTS["qwen3"], seed=3), kt.EditStack([edit])
    applied = random_edit(model, (DOWN,), seed=4)
    applied.apply_(model)
    again = kt.load(model.module, tokenizer=model.tokenizer)  # another handle on the same module
    before = sha(model)
    calls = [
        lambda: enter(other, model),
        lambda: enter(other, again),
        lambda: other.apply_(model),
        lambda: applied.revert_(model),
        lambda: enter(stack, model),
        lambda: stack.apply_(again),
        lambda: model.write(DOWN, other.delta(DOWN)),
    ]
    inside = random_edit(model, WEIGHTS["qwen3"], seed=5)
    with inside.applied(model):
        there = sha(model)
        for call in calls:
            error = in_thread(call)
            assert isinstance(error, KtError) and "another thread is writing" in str(error) and "\n" not in str(error)
        assert sha(model) == there
        with random_edit(model, WEIGHTS["qwen3"], seed=6).applied(model):  # nested, by one thread
            assert "another thread" in str(in_thread(calls[0]))
        assert sha(model) == there
    assert sha(model) == before
    assert in_thread(lambda: applied.revert_(model)) is None
    assert in_thread(lambda: enter(other.for_model(model, force=True), model)) is None


def test_weights_that_two_modules_share_count_as_one_model():
    one, two, third = (tiny_model("gemma2") for _ in range(3))
    two.module.set_input_embeddings(one.module.get_input_embeddings())
    edits = {m: random_edit(m, WEIGHTS["gemma2"]) for m in (two, third)}
    with random_edit(one, WEIGHTS["gemma2"]).applied(one):
        assert "tied to them" in str(in_thread(lambda: enter(edits[two], two)))
        assert in_thread(lambda: enter(edits[third], third)) is None
    assert in_thread(lambda: enter(edits[two].for_model(two, force=True), two)) is None


def test_many_threads_at_once_leave_the_base():
    model, _ = ready()
    before, edits = sha(model), [random_edit(model, WEIGHTS["qwen3"], seed=seed) for seed in range(8)]

    def go(edit):
        for _ in range(20):
            with suppress(KtError):
                enter(edit, model)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(go, edits))
    assert sha(model) == before


def test_a_block_that_another_thread_leaves_still_gives_the_bytes_back():
    model, edit = ready()
    before, block = sha(model), edit.applied(model)
    block.__enter__()
    assert in_thread(lambda: block.__exit__(None, None, None)) is None
    assert sha(model) == before and in_thread(lambda: enter(edit, model)) is None


# Tasks of one thread, which take turns


def in_turns(model, first, second):
    """Enter the first edit, then the second, and leave them in that order; the states on the way."""
    seen = []

    async def task(edit, mine, others):
        with edit.applied(model, force=True):
            mine.set()
            await others.wait()
        seen.append(sha(model))

    async def both():
        entered, gone = asyncio.Event(), asyncio.Event()
        one = asyncio.create_task(task(first, asyncio.Event(), entered))
        await asyncio.sleep(0)
        two = asyncio.create_task(task(second, entered, gone))
        try:
            await one
        finally:
            gone.set()
            await two

    asyncio.run(both())
    return seen


def test_tasks_that_leave_in_the_order_of_their_coming_leave_the_base():
    model, edit = ready()
    before = sha(model)
    with pytest.raises(KtError, match="not left in the reverse of their order") as caught:
        in_turns(model, edit, random_edit(model, WEIGHTS["qwen3"], seed=3))
    assert sha(model) == before and "\n" not in str(caught.value)
    with random_edit(model, WEIGHTS["qwen3"], seed=4).applied(model):  # nothing is left open
        pass
    assert sha(model) == before


def test_tasks_that_write_different_weights_leave_in_any_order():
    model = tiny_model("qwen3")
    one, two = random_edit(model, (DOWN,), seed=3), random_edit(model, (OUT,), seed=4)
    before = sha(model)
    with two.applied(model):
        with_two = sha(model)
    assert in_turns(model, one, two) == [with_two, before]


def test_three_blocks_left_in_any_order_leave_the_base():
    model = tiny_model("qwen3")
    before = sha(model)
    for order in permutations(range(3)):
        edits = [random_edit(model, (DOWN, OUT), seed=seed) for seed in range(3)]
        blocks = [edit.applied(model, force=True) for edit in edits]
        for block in blocks:
            block.__enter__()
        for place in order:
            with suppress(KtError):
                blocks[place].__exit__(None, None, None)
        assert sha(model) == before, order
