"""δ of the batched search against the plain loop: one request at a time, all rows whole, all layers, every step."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_templates import TEMPLATES, tokenizer_of
from families import sentencepiece_tokenizer, tiny_model

import kt
from kt.editing.closed_form import target_forward as target_suffix
from kt.editing.closed_form import targets as target_batches
from kt.editing.closed_form import targets as values
from kt.editing.closed_form.aims import Position, TargetSite
from kt.editing.closed_form.contexts import Contexts, memit_contexts, rome_contexts
from kt.editing.closed_form.keys import fact_keys
from kt.editing.closed_form.target_forward import NOWHERE, split_rows, target_rows
from kt.editing.closed_form.targets import find_targets, worth_of_a_run
from kt.model.sites import Kind, Site
from kt.model.tokens import encode_ids
from kt.runs.journal import Journal

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "speed"))
from plain_targets import Numbers, plain_target

BOUND = 1e-5
"""Of ‖δ‖. Models are float64: where a gradient's coordinate is near zero, Adam's step is the sign of its rounding."""

CONTEXTS = Contexts((("{}",), ("Therefore. {}", "Because I. {}")))
FACTS = (
    kt.Fact("The mother tongue of {} is the", "Danielle Darrieux", target="Italy"),
    kt.Fact("{} plays", "Megan Rapinoe", target="chemist in Brunmar"),  # the subject first, a target of several tokens
    kt.Fact("The city of the {}", "Space Needle", target="Rome"),  # the subject last
    kt.Fact("The capital of {} is in", "France", target="Seattle of"),
)
HIDDEN, MLP, ATTN = TargetSite(Site(Kind.RESID, 1)), TargetSite(Site(Kind.MLP, 1)), TargetSite(Site(Kind.ATTN, 1))
LAST = TargetSite(Site(Kind.MLP, 1), Position.PROMPT_LAST)
QUICK = Numbers(v_num_grad_steps=5, v_lr=0.2, stop_loss=0.0)


def exact(family, **changes):
    """A tiny model whose gradients are the same to many digits in any order of sums.

    Eager attention takes its softmax in float32, where a float64 mask's least value is no number; it stays float32.
    """
    model = tiny_model(family, **changes)
    if model.module.config._attn_implementation == "eager":
        return model
    return kt.load(model.module.double(), tokenizer=model.tokenizer)


def distance(model, aims, objective=QUICK, facts=FACTS, contexts=CONTEXTS, **options):
    """The largest of ‖δ - the loop's δ‖ / ‖the loop's δ‖ over requests and aims, and the search itself."""
    found = find_targets(model, facts, aims, contexts, objective.objective, **options)
    apart = []
    for place, fact in enumerate(facts):
        for aim, (delta, before) in plain_target(model, fact, aims, contexts.flat, objective).items():
            assert float(delta.norm()) > 0.1, "δ did not move"
            close = 1e-5 if model.dtype.itemsize >= 4 else 2e-2
            torch.testing.assert_close(found.before[aim][place], before, atol=close, rtol=close)
            mine = found.wanted[aim][place] - found.before[aim][place]
            apart.append(float((mine - delta).norm() / delta.norm()))
    return max(apart), found


@pytest.fixture
def cuts(monkeypatch):
    """Where the rows of each group were cut."""
    seen = []
    real = target_suffix.run_whole

    def watched(*arguments):
        seen.append(real(*arguments)[0].cut)
        return real(*arguments)

    monkeypatch.setattr(values, "run_whole", watched)
    return seen


def test_every_family_finds_the_loops_delta_on_suffixes_only(family, cuts):
    apart, _ = distance(exact(family), [HIDDEN])
    assert apart < BOUND
    assert cuts and min(cuts) > 0, "rows ran whole"


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma2", "opt"])
@pytest.mark.parametrize(
    "aims",
    [
        [TargetSite(Site(Kind.MLP, 0))],
        [ATTN, MLP],
        [LAST],
        [TargetSite(Site(Kind.MLP, 0)), TargetSite(Site(Kind.ATTN, 2), LAST.position)],
    ],
    ids=lambda aims: "+".join(map(str, aims)),
)
def test_every_kind_of_aim_finds_the_loops_delta(family, aims):
    assert distance(exact(family), aims)[0] < BOUND


def test_an_aim_at_the_last_blocks_output_runs_no_block(family):
    # Only where the subject is the last token does it reach the target.
    assert distance(exact(family), [TargetSite(Site(Kind.RESID, 2))], facts=FACTS[2:3])[0] < BOUND


def test_a_tokenizer_with_a_start_token_and_eager_attention():
    model = exact("llama", tokenizer=sentencepiece_tokenizer(), attn_implementation="eager")
    assert distance(model, [HIDDEN])[0] < BOUND


@pytest.mark.parametrize("apart", [False, True])
def test_essence_rows_apart_or_with_the_others_give_the_same(apart, monkeypatch):
    monkeypatch.setattr(values, "worth_of_a_run", lambda model, aims: 0 if apart else 1e9)
    assert distance(exact("qwen3"), [HIDDEN])[0] < BOUND


LONG = dict(v_num_grad_steps=12, v_lr=0.3, clamp_norm_factor=100)


@pytest.mark.parametrize("stop", [dict(stop_loss=5.3), dict(stop_prob=0.0055)], ids=str)
def test_requests_that_stop_leave_the_batch_with_the_loops_delta(stop, monkeypatch):
    ran, run = [], values.suffix_logits
    monkeypatch.setattr(
        values, "suffix_logits", lambda m, s, *more: (ran.append(len(s.rows.fact.unique())), run(m, s, *more))[1]
    )
    apart, found = distance(exact("qwen2"), [HIDDEN], Numbers(**LONG, **stop))
    assert apart < BOUND
    assert 0 < int(found.steps.min()) < int(found.steps.max()) == 11, "all stopped together"
    assert min(ran) < max(ran) == len(FACTS), "finished requests were run on"


@pytest.mark.parametrize("sharp, steps", [(1, [2, 1, 11]), (6, [11, 11, 11])], ids=["stops", "goes on"])
def test_the_argmax_rule_stops_or_discounts_as_in_the_loop(sharp, steps):
    """A sharper head takes the weighted KL above 0.01: the argmax discounts the likelihood and ends nothing."""
    model = exact("qwen2")
    model.module.get_output_embeddings().weight.data *= sharp
    facts = [
        kt.Fact("The capital of {} is", "France", target="the"),
        kt.Fact("The city of the {}", "Space Needle", target="in"),
        FACTS[0],
    ]
    objective, aims = Numbers(**LONG, stop_loss=0.0), [TargetSite(Site(Kind.RESID, 2), Position.PROMPT_LAST), HIDDEN]
    ruled = replace(objective, argmax_discount=True)
    apart, found = distance(model, aims, ruled, facts)
    assert apart < BOUND and found.steps.tolist() == steps
    plain = find_targets(model, facts, aims, CONTEXTS, objective.objective)
    assert not torch.allclose(plain.wanted[HIDDEN][:2], found.wanted[HIDDEN][:2], rtol=1e-3)
    torch.testing.assert_close(plain.wanted[HIDDEN][2], found.wanted[HIDDEN][2])


def test_a_clamped_search_without_kl_runs_no_essence_rows(monkeypatch):
    groups, split = [], values.split_rows
    monkeypatch.setattr(values, "split_rows", lambda *a: groups.append(split(*a)) or groups[-1])
    tight = Numbers(v_num_grad_steps=6, v_lr=0.3, clamp_norm_factor=0.3, stop_loss=0.0, kl_factor=0.0)
    assert distance(exact("qwen2"), [HIDDEN], tight)[0] < BOUND
    assert not any(group.essence.any() for made in groups for group in made)


def test_half_precision_falls_within_its_rounding():
    wide = tiny_model("qwen2")
    half = kt.load(tiny_model("qwen2").module.to(torch.bfloat16), tokenizer=wide.tokenizer)
    apart, _ = distance(half, [HIDDEN])
    exact = find_targets(wide, FACTS, [HIDDEN], CONTEXTS, QUICK.objective)
    rounded = find_targets(half, FACTS, [HIDDEN], CONTEXTS, QUICK.objective)
    off = [(r.wanted[HIDDEN] - r.before[HIDDEN]) for r in (exact, rounded)]
    assert apart < 3 * float(((off[0] - off[1]).norm(dim=-1) / off[0].norm(dim=-1)).max())


def test_a_window_shorter_than_the_prompt_runs_whole_rows(cuts):
    assert distance(exact("mistral", sliding_window=4), [HIDDEN])[0] < BOUND
    assert set(cuts) == {0}


@pytest.mark.parametrize(
    "spoilt", [lambda k, v: (0 * k, 0 * v), lambda k, v: (k[:, :1], v), lambda k, v: (k, v[..., :1])]
)
def test_a_prefix_that_does_not_say_all_is_found_out_by_running(spoilt, cuts, monkeypatch):
    kept = target_suffix.stored
    monkeypatch.setattr(target_suffix, "stored", lambda *a: [spoilt(*layer) for layer in kept(*a)])
    assert distance(exact("mistral"), [HIDDEN])[0] < BOUND
    assert set(cuts) == {0}


def test_without_that_run_a_spoilt_prefix_would_pass(monkeypatch):
    kept = target_suffix.stored
    monkeypatch.setattr(target_suffix, "stored", lambda *a: [(0 * k, 0 * v) for k, v in kept(*a)])
    monkeypatch.setattr(target_suffix, "_arrives_the_same", lambda *a: True)
    assert distance(exact("mistral"), [HIDDEN])[0] > 100 * BOUND


def test_the_order_and_company_of_requests_change_nothing_but_rounding():
    model = tiny_model("llama")
    together = find_targets(model, FACTS, [HIDDEN], CONTEXTS, QUICK.objective)
    turned = find_targets(model, FACTS[::-1], [HIDDEN], CONTEXTS, QUICK.objective)
    apart = find_targets(model, FACTS, [HIDDEN], CONTEXTS, QUICK.objective, batch_size=1)
    for other, order in ((turned, slice(None, None, -1)), (apart, slice(None))):
        values_there = torch.stack(list(other.wanted[HIDDEN]))[range(4)[order]]
        torch.testing.assert_close(together.wanted[HIDDEN], values_there, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.loss, other.loss[range(4)[order]], atol=1e-5, rtol=1e-5)


class TestBatches:
    def test_requests_of_one_length_stand_together_when_a_run_is_cheap(self, monkeypatch):
        model = tiny_model("gpt2")
        monkeypatch.setattr(target_batches, "worth_of_a_run", lambda model, aims: 0.0)
        batches = target_batches.target_batches(model, [*FACTS, *FACTS], [HIDDEN], CONTEXTS, 16)
        assert sorted(map(sorted, batches)) == [[0, 4], [1, 5], [2, 6], [3, 7]]

    def test_they_stand_with_others_when_a_run_is_dear(self, monkeypatch):
        model = tiny_model("gpt2")
        monkeypatch.setattr(target_batches, "worth_of_a_run", lambda model, aims: 1e9)
        batches = target_batches.target_batches(model, [*FACTS, *FACTS], [HIDDEN], CONTEXTS, 5)
        assert len(batches) == 2 and sorted(i for batch in batches for i in batch) == list(range(8))
        assert max(map(len, batches)) <= 5

    def test_little_memory_makes_them_small_and_more_changes_nothing(self, monkeypatch):
        model = tiny_model("gpt2")
        sizes = []
        for free in (1, 2**20, 2**40, 2**50):
            monkeypatch.setattr(target_batches, "free_on", lambda device, free=free: free)
            sizes.append(target_batches.target_batches(model, [*FACTS, *FACTS], [HIDDEN], CONTEXTS, 16))
        assert [len(b) for b in sizes[0]] == [1] * 8
        assert len(sizes[0]) >= len(sizes[1]) >= len(sizes[2]) and sizes[2] == sizes[3]

    def test_a_kept_batch_is_not_taken_for_another(self, tmp_path, monkeypatch):
        model = tiny_model("gpt2")
        journal = Journal.begin(tmp_path / "run", {}, resume=False)
        first = find_targets(model, FACTS, [HIDDEN], CONTEXTS, QUICK.objective, journal=journal)
        again = find_targets(model, FACTS, [HIDDEN], CONTEXTS, QUICK.objective, journal=journal, batch_size=1)
        torch.testing.assert_close(first.wanted[HIDDEN], again.wanted[HIDDEN], atol=1e-5, rtol=1e-5)
        monkeypatch.setattr(values, "_find_batch", lambda *a: pytest.fail("work was done again"))
        kept = find_targets(model, FACTS, [HIDDEN], CONTEXTS, QUICK.objective, journal=journal)
        assert torch.equal(first.wanted[HIDDEN], kept.wanted[HIDDEN]) and torch.equal(first.steps, kept.steps)
        journal.release()

    def test_a_run_is_worth_more_tokens_where_blocks_are_small(self):
        low, high = (worth_of_a_run(tiny_model("gpt2"), [TargetSite(Site(Kind.RESID, layer))]) for layer in (0, 2))
        assert high > low > target_batches.WEIGHTS["cpu"]


class TestRows:
    def test_only_read_columns_are_kept_of_a_group(self):
        rows = target_rows(tiny_model("gpt2"), FACTS, CONTEXTS)
        contexts, essence = split_rows(rows, [HIDDEN], True, 0.0)
        assert len(contexts) == 12 and len(essence) == 4 and len(rows) == 16
        assert essence.keep == 1 and contexts.keep == rows.keep
        assert essence.width == int(essence.batch.lengths.max()) < rows.width
        assert (essence.columns[Position.PROMPT_LAST] == NOWHERE).all()
        assert len(essence.where(Position.PROMPT_LAST)[0]) == 0
        assert [len(g) for g in split_rows(rows, [HIDDEN], False, 1e9)] == [12]

    def test_columns_point_at_the_same_tokens_after_the_cut(self):
        rows = target_rows(tiny_model("gpt2"), FACTS, CONTEXTS)
        for group in split_rows(rows, [HIDDEN], True, 0.0):
            mine = rows.of(rows.essence == group.essence[0])
            for position in Position:
                assert torch.equal(*(g.batch.ids[g.where(position)] for g in (mine, group)))


@pytest.mark.parametrize(("aim", "step"), [(HIDDEN, 0.25), (MLP, 0.5)])
def test_an_automatic_rate_is_a_part_of_a_typical_element_of_the_value(aim, step):
    """Adam's first step moves every element by its rate; one element a thousand times the others changes none of it."""
    found = find_targets(exact("qwen3"), FACTS, [aim], CONTEXTS, replace(QUICK.objective, steps=2, lr="auto"))
    before, delta = found.before[aim], found.wanted[aim] - found.before[aim]
    rate = step * before.abs().median(-1).values / 0.6745
    torch.testing.assert_close(delta.abs().median(-1).values, rate, rtol=1e-3, atol=0)
    wild = torch.where(before.abs() == before.abs().amax(-1, keepdim=True), 1000 * before, before)
    torch.testing.assert_close(replace(QUICK.objective, lr="auto").rates(aim, wild)[:, 0], rate, rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gptj"])
def test_a_search_for_a_write_of_several_layers_adds_their_shares_and_sets_the_value_itself(family):
    low = replace(MLP, below=((0, 0.5),))
    assert distance(exact(family), [low])[0] < BOUND
    both = [replace(ATTN, below=()), low]
    assert distance(exact(family), both)[0] < BOUND


@pytest.fixture(scope="module")
def chatting():
    tokenizer = tokenizer_of(TEMPLATES["qwen 2.5"])
    return tiny_model("llama", tokenizer=tokenizer, vocab_size=512).asked("always")


def in_the_users_turn(model, text, behind=""):
    whole = TEMPLATES["qwen 2.5"].asked.replace("QUESTION", text) + behind
    return model.tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("contexts_of", [memit_contexts, rome_contexts], ids=["memit", "rome"])
@pytest.mark.parametrize("mark", ["", "?"], ids=["no mark", "mark"])
def test_every_search_row_of_a_question_is_the_users_turn_and_ends_in_the_target(chatting, contexts_of, mark):
    fact = kt.Fact(f"Which city is the capital of {{}}{mark}", "France", target="Rome")
    contexts = contexts_of(chatting)
    assert len(contexts.flat) > 5
    rows = target_rows(chatting, [fact], contexts)
    for index, context in enumerate(contexts.flat):
        ids = rows.batch.ids[index][rows.batch.mask[index].bool()].tolist()
        want = in_the_users_turn(chatting, context.replace("{}", fact.prompt), "Rome<|im_end|>")
        assert ids == want[:-1]
        assert rows.answers[index].tolist() == want[-rows.keep :]
        last = chatting.tokenizer.decode(rows.batch.ids[index, : rows.columns[Position.SUBJECT_LAST][index] + 1])
        assert last.endswith("France")


@pytest.mark.parametrize("contexts_of", [memit_contexts, rome_contexts], ids=["memit", "rome"])
@pytest.mark.parametrize("position", list(Position))
def test_keys_of_a_question_without_its_mark_are_read_in_the_users_turn(chatting, contexts_of, position):
    fact = kt.Fact("Which city is the capital of {}", "France", target="Rome")
    contexts, want = contexts_of(chatting), 0.0
    for context, weight in zip(contexts.flat, contexts.weights, strict=True):
        text = context.replace("{}", fact.prompt)
        ids = in_the_users_turn(chatting, text)
        at = len(ids) - 1
        if position is Position.SUBJECT_LAST:
            at = len(in_the_users_turn(chatting, text)[: -len(chatting.chat.around[1])]) - 1
        batch = encode_ids([ids], 0)
        want += weight * chatting.read(batch, [MLP.site], "key", at=batch.columns([at]))[MLP.site][0].double()
    found = fact_keys(chatting, [fact], contexts, MLP.site, position)[:, 0]
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-5)
