"""Edits that leave the weights alone: what every one keeps to, alone, in a file, in a session and in a stack."""

import copy
import warnings

import pytest
import torch
from chat_templates import TEMPLATES, tokenizer_of
from editing_help import FAST, REQUESTS
from families import CONFIGS, FUSED, byte_level_tokenizer, tiny_model, tiny_module
from packed_linears import Bytes, packed_module

import kt
from kt.editing import METHODS
from kt.editing.closed_form.aims import Position, TargetSite
from kt.editing.closed_form.contexts import Contexts
from kt.editing.closed_form.objective import NLL, Objective, StopBelow
from kt.editing.closed_form.targets import find_targets
from kt.editing.diff import diff, stored
from kt.editing.evidence import traced_balance
from kt.editing.methods import used_by
from kt.editing.side_memory import reader
from kt.editing.stack import facts_of
from kt.errors import BadFile, KtError
from kt.evaluation.text import wild_request
from kt.export import to_hf, to_peft
from kt.model.effects import Rendered, rendered
from kt.model.scoring import answer_row, teacher_force
from kt.model.tokens import encode_ids, ending

pytestmark = pytest.mark.filterwarnings("ignore:.*(targets stay below|give the target first|less likely|perplexity)")
EFFECTS = [name for name in METHODS if METHODS[name].effect]
ADAPTERS = [name for name in EFFECTS if METHODS[name].effect == "adapter"]
POOL = [
    {"prompt": "The mother tongue of {}", "subject": name, "target_new": word, "target_true": "French"}
    for name, word in (("Leo Tolstoy", "Danish"), ("Dante", "Welsh"))
]


@pytest.fixture
def options(tmp_path):
    import json

    pool = tmp_path / "pool.json"
    pool.write_text(json.dumps(POOL))
    quick = FAST | {"layers_mlp": (1,), "demonstrations": str(pool), "shots": 1, "eps": 0.1}
    return lambda method, **changes: used_by(method, quick | changes)


def log_prob(model, prompt, answer):
    row = answer_row(model, (prompt, answer))
    return teacher_force(model, [row])[row.question].log_prob


@pytest.mark.parametrize("method", EFFECTS)
def test_weights_stay_the_model_changes_and_is_as_before_on_every_family(family, method, options, tmp_path):
    positions = next(name for name in ("n_positions", "max_position_embeddings") if name in (CONFIGS | FUSED)[family])
    model = tiny_model(family, **{positions: 1024})  # texts of ike and scr are long in bytes
    base = model.fingerprint()
    edit = kt.edit(model, REQUESTS, method, **options(method))
    assert model.effects == () and not edit.updates
    prompt, target = edit.report[0].prompt, edit.report[0].target
    old = log_prob(model, prompt, target)
    loaded = kt.Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert (loaded.digest, loaded.report) == (edit.digest, edit.report)
    with loaded.applied(model):
        assert model.fingerprint() == base, "a weight was written"
        assert log_prob(model, prompt, target) == pytest.approx(
            torch.tensor(edit.report[0].target_prob[1]).log().item(), abs=1e-4
        )
        assert log_prob(model, prompt, target) != old
    assert log_prob(model, prompt, target) == old
    edit.apply_(model)
    with pytest.raises(KtError, match="already applied"):
        loaded.apply_(model)
    edit.revert_(model)
    assert model.effects == () and log_prob(model, prompt, target) == old
    with pytest.raises(ZeroDivisionError), edit.applied(model):
        _ = 1 / 0
    assert model.effects == ()


@pytest.mark.parametrize("method", EFFECTS)
def test_the_same_seed_is_the_same_edit_and_steps_are_the_batch(method, options):
    model = tiny_model("llama", max_position_embeddings=4096)
    edit = kt.edit(model, REQUESTS, method, **options(method))
    assert kt.edit(model, REQUESTS, method, **options(method)).digest == edit.digest
    run = kt.run_edits(model, REQUESTS, "sequential", method=method, evaluate="step", **options(method))
    assert model.effects == () and len(run.edits) == 2
    for name, array in edit.effect.arrays().items():
        torch.testing.assert_close(run.edit.effect.arrays()[name], array, atol=1e-4, rtol=1e-4)
    mine, theirs = (dict(each.effect.fields()) for each in (run.edit, edit))
    assert {n: v for n, v in mine.items() if n != "radius"} == {n: v for n, v in theirs.items() if n != "radius"}
    single = kt.run_edits(model, REQUESTS, "single", method=method, evaluate="end", **options(method))
    assert model.effects == () and single.after is not None


def test_a_stack_of_a_weight_edit_an_adapter_and_a_context_goes_on_and_off(options, tmp_path):
    model = tiny_model("llama")
    base = model.fingerprint()
    edits = [kt.edit(model, REQUESTS[:1], each, **options(each)) for each in ("ft", "grace", "ice")]
    stack = kt.EditStack(edits)
    stack.apply_(model)
    assert model.fingerprint() != base and [each.kind for each in model.effects] == ["adapter", "context"]
    stack.remove(2)
    assert [each.kind for each in model.effects] == ["context"]
    loaded = kt.EditStack.load(stack.save(tmp_path / "stack.json"))
    stack.revert_(model)
    assert model.fingerprint() == base and model.effects == ()
    with loaded.applied(model):
        assert [each.kind for each in model.effects] == ["context"]
    with pytest.raises(KtError, match="keep them as a stack"):
        loaded.total(model)


@pytest.fixture(scope="module")
def inside():
    """A model, its base, an edit of its weights, and an adapter and a context that are applied for good inside it."""
    model = tiny_model("llama")
    quick = {"v_num_grad_steps": 2, "num_steps": 1}
    layers = {"ft": {"layers_mlp": (0,)}, "grace": {"layers_mlp": (1,)}, "ice": {}}
    edits = (
        kt.edit(model, REQUESTS[:1], each, check=False, **used_by(each, quick), **at) for each, at in layers.items()
    )
    return model, model.fingerprint(), *edits


@pytest.mark.parametrize("as_stack", [False, True])
def test_an_effect_that_is_applied_for_good_inside_a_block_stays_after_it(inside, as_stack):
    model, base, weights, *effects = inside
    for edit in effects:
        lasting = kt.EditStack([edit]) if as_stack else edit
        with weights.applied(model):
            lasting.apply_(model)
        assert model.effects == (edit.effect,) and model.fingerprint() == base
        lasting.revert_(model)
        assert model.effects == ()
        with pytest.raises(ZeroDivisionError), weights.applied(model):
            lasting.apply_(model)
            _ = 1 / 0
        assert model.effects == (edit.effect,) and model.fingerprint() == base
        with weights.applied(model):
            lasting.revert_(model)
        assert model.effects == ()


def test_a_block_of_an_effect_takes_out_its_own_in_whatever_order_blocks_are_left(inside):
    model, base, weights, adapter, context = inside
    with adapter.applied(model):
        context.apply_(model)
        with weights.applied(model):
            assert model.effects == (adapter.effect, context.effect)
    assert model.effects == (context.effect,)
    context.revert_(model)
    early, late = adapter.applied(model), weights.applied(model)
    early.__enter__()
    late.__enter__()
    context.apply_(model)
    early.__exit__(None, None, None)
    assert model.effects == (context.effect,)
    late.__exit__(None, None, None)
    assert model.effects == (context.effect,) and model.fingerprint() == base
    context.revert_(model)
    assert model.effects == ()


def test_an_effect_that_is_applied_for_good_beside_a_stack_or_in_a_session_stays_when_these_go(inside):
    model, base, weights, adapter, context = inside
    stack = kt.EditStack([weights, context])
    stack.apply_(model)
    adapter.apply_(model)
    stack.remove(2)
    assert model.effects == (adapter.effect,)
    stack.push(context)
    stack.revert_(model)
    assert model.effects == (adapter.effect,) and model.fingerprint() == base
    adapter.revert_(model)
    session = kt.EditSession(model, "ice", check=False)
    session.edit(REQUESTS[1:])
    adapter.apply_(model)
    session.revert()
    assert model.effects == (adapter.effect,)
    with session:
        adapter.revert_(model)
        session.edit(REQUESTS[1:])
        adapter.apply_(model)
        with session.unedited():
            assert model.effects == (adapter.effect,)
    assert model.effects == (adapter.effect,)
    adapter.revert_(model)


def test_two_adapters_at_one_site_are_one_codebook_and_their_overlap_is_a_conflict(options):
    from kt.editing.conflicts import conflicts

    model = tiny_model("llama")
    first, second = (kt.edit(model, [r], "grace", **options("grace", eps=5.0)) for r in REQUESTS)
    assert [c.measure for c in conflicts(model, REQUESTS[1:], [first])] == ["radii"]
    assert not conflicts(model, REQUESTS[1:], [kt.edit(model, REQUESTS[:1], "grace", **options("grace", eps=1e-4))])
    both = kt.EditStack([first, second]).as_sum().effect
    distance = float((both.keys[0] - both.keys[1]).norm())
    torch.testing.assert_close(both.radii, torch.tensor([distance / 2] * 2), rtol=1e-4, atol=0)
    with kt.EditStack([first, second]).applied(model):
        linear = model.linear(both.site)
        torch.testing.assert_close(linear(both.keys), torch.cat([first.effect.values, second.effect.values]))
    assert not torch.allclose(linear(both.keys), both.values)


def test_two_adapters_at_one_site_of_other_settings_keep_each_its_own(options):
    model = tiny_model("llama")
    same, later, other = (
        kt.edit(model, [request], "wise", **options("wise", **changes))
        for request, changes in zip([*REQUESTS, REQUESTS[1]], ({}, {}, {"density": 0.9, "shard_size": 1}), strict=True)
    )
    site, key = same.effect.site, other.effect.keys
    linear = model.linear(site)
    plain = linear(key)
    change = reader(other.effect)(key).value
    with kt.EditStack([same, other]).applied(model):
        met, first = reader(same.effect)(key)
        torch.testing.assert_close(linear(key), plain + change + met[:, None] * first)
    torch.testing.assert_close(linear(key), plain, rtol=0, atol=0)
    assert len(kt.EditStack([same, later]).as_sum().effect.labels) == 2
    with pytest.raises(KtError, match="read by other settings do not add up"):
        kt.EditStack([same, other]).as_sum()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("share", 1.5, "share lies above 0, at most at 1"),
        ("share", 0.0, "share lies above 0"),
        ("rank", 0, "sizes and ranks are at least 1"),
        ("size", -1, "sizes and ranks are at least 1"),
        ("more", 1, "has a field 'more'"),
        ("name", "nonsense", "'nonsense', is not one that this kt reads"),
        ("position", "middle", "'middle', is not one that this kt reads"),
        ("name", "x" * 300, "is not one that this kt reads"),
    ],
)
def test_a_rule_that_kt_does_not_read_is_one_line_of_the_file(field, value, words, options, tmp_path):
    edit = kt.edit(tiny_model("llama"), REQUESTS, "wise", **options("wise", v_num_grad_steps=2))
    fields = edit.effect.fields()
    fields["rule"][field] = value
    object.__setattr__(edit.effect, "fields", lambda: fields)
    path = edit.save(tmp_path / "edit.safetensors")
    with pytest.raises(BadFile, match=words) as caught:
        kt.Edit.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("method", ["ice", "grace"])
def test_what_cannot_hold_such_an_edit_says_so_in_a_line(method, options, tmp_path):
    model = tiny_model("llama")
    edit = kt.edit(model, REQUESTS, method, **options(method))
    for export in (to_hf, to_peft):
        with pytest.raises(KtError, match=f"cannot hold {method}, of kind"):
            export(model, edit, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    facts = facts_of([edit])
    if method == "ice":
        with pytest.raises(KtError, match="reads bare prompts, cannot hold ice"):
            kt.residual_fact(model, edit, facts)
    else:
        other = tiny_model("llama", seed=1)
        with pytest.raises(KtError, match=r"mlp\.1 of .* has other weights"):
            edit.apply_(other)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            edit.apply_(other, force=True)
        assert any("forced" in str(each.message) for each in said) and len(other.effects) == 1
        with pytest.raises(KtError, match=r"mlp\.1 of .* maps 64 numbers to 32"):
            edit.apply_(tiny_model("llama", intermediate_size=64))


def test_what_reads_bare_prompts_refuses_a_model_with_text_before_them_in_a_line():
    model = tiny_model("llama")
    edit, adapter = (kt.edit(model, REQUESTS, m, **used_by(m, FAST | {"layers_mlp": (1,)})) for m in ("ice", "grace"))
    facts = facts_of([edit])
    reads = {
        "a trace": lambda: kt.causal_trace(model, facts, samples=1, keep="all"),
        "a trace, screened": lambda: kt.screen(model, facts, samples=1, keep="all", top=1),
        "a probe": lambda: kt.contrast_probe(model, facts),
        "an attribution": lambda: kt.knowledge_neurons(model, facts, steps=1),
        "a residual": lambda: kt.residual_fact(model, adapter, facts, neutral=False),
        "lm-eval": lambda: kt.abilities(model, ["copa"]),
    }
    with edit.applied(model):
        for what, read in reads.items():
            with pytest.raises(KtError, match=f"{what.partition(',')[0]}.* reads bare prompts, and an edit") as caught:
                read()
            assert "\n" not in str(caught.value)
    kt.contrast_probe(model, facts)


def test_the_share_of_attention_is_traced_on_a_model_with_text_before_its_prompts_as_without(options):
    model = tiny_model("llama")
    edit, adapter = (kt.edit(model, REQUESTS, method, **options(method)) for method in ("ice", "grace"))
    fact = kt.Fact("The mother tongue of {}", "Danielle Darrieux", answer="French", foil="Italy")

    def found():
        try:
            return traced_balance(model, [fact], most=None).alpha
        except KtError as error:  # of a model that knows nothing
            return str(error)

    adapter.apply_(model)
    plain = found()
    with edit.applied(model):
        before = model.effects
        assert found() == plain and model.effects == before


def test_a_file_whose_entries_do_not_fit_each_other_is_refused(options, tmp_path):
    model = tiny_model("llama")
    edit = kt.edit(model, REQUESTS, "grace", **options("grace"))
    good = edit.effect
    edit.effect = kt.edit(model, REQUESTS, "ice").effect
    object.__setattr__(edit.effect, "documents", ())
    with pytest.raises(BadFile, match="retriever without facts"):
        kt.Edit.load(edit.save(tmp_path / "empty.safetensors"))
    object.__setattr__(good, "radii", torch.zeros(len(good.labels)))
    edit.effect = good
    with pytest.raises(BadFile, match="radii must lie above 0"):
        kt.Edit.load(edit.save(tmp_path / "zero.safetensors"))


def test_prompts_are_rendered_once_and_free_text_is_not(options):
    model = tiny_model("llama")
    edit = kt.edit(model, REQUESTS, "ice")
    prompt = edit.report[0].prompt
    with edit.applied(model):
        text = rendered(model, prompt)
        assert text == f"New Fact: {prompt} Italy\nPrompt: {prompt}" and rendered(model, text) is text
        assert rendered(model, "Xyzzy plugh") == "Xyzzy plugh"
        assert model.generate([prompt], 5) == model.generate([Rendered(text)], 5)
        told = log_prob(model, prompt, "Italy")
    assert told == log_prob(model, text, "Italy") and rendered(model, prompt) == prompt
    before, after = edit.manifest["perplexity"]["before"], edit.manifest["perplexity"]["after"]
    assert before == after


@pytest.mark.parametrize("method", EFFECTS)
def test_neither_a_batch_nor_kept_prefixes_nor_a_cache_changes_what_is_read(method, options):
    model = tiny_model("llama", max_position_embeddings=4096)
    edit = kt.edit(model, REQUESTS, method, **options(method))
    prompts = [edit.report[0].prompt, edit.report[1].prompt, "The old and the new city of the Space Needle is in"]
    questions = [(prompt, answer) for prompt in prompts for answer in ("Italy", "Warsaw and Rome", "Paris")]

    def scores(some, **how):
        found = teacher_force(model, [answer_row(model, question) for question in some], **how)
        return torch.tensor([found[question].log_prob for question in some])

    before = scores(questions)
    with edit.applied(model):
        alone = torch.cat([scores([question]) for question in questions])
        for how in ({"share_prefixes": True}, {"share_prefixes": False}, {"share_prefixes": False, "batch_size": 2}):
            torch.testing.assert_close(scores(questions, **how), alone, atol=1e-4, rtol=1e-4)
        written = model.generate(prompts, 6)
        assert written == [text for prompt in prompts for text in model.generate([prompt], 6)]
        ids = model.encode([rendered(model, prompts[0])]).ids[0].tolist()
        read = len(ids)
        for _ in range(6):  # greedy, every token from a forward over the whole text
            ids.append(int(model.logits(encode_ids([tuple(ids)], 0))[0, -1].argmax()))
        assert model.tokenizer.decode(ids[read:], skip_special_tokens=True) == written[0]
    assert float((alone - before).abs()[:3].min()) > 1e-3, "the effect reaches every answer to a prompt"


@pytest.mark.parametrize("method", ["ice", "grace"])
def test_an_effect_of_another_model_is_refused_alone_and_in_a_stack(method, options):
    edit = kt.edit(tiny_model("llama"), REQUESTS, method, **options(method))
    for other, words in (
        (tiny_model("llama", seed=1), "is not that of the model|has other weights"),
        (tiny_model("llama", rope_theta=500.0), "rope_theta"),
    ):
        with pytest.raises(KtError, match=words) as caught:
            edit.apply_(other)
        assert "\n" not in str(caught.value) and other.effects == ()
        with pytest.raises(KtError, match=words):
            kt.EditStack([edit]).apply_(other)
        with pytest.warns(UserWarning, match="forced"), edit.applied(other, force=True):
            assert len(other.effects) == 1
        assert other.effects == ()


@pytest.mark.parametrize("method", EFFECTS)
def test_by_force_an_effect_becomes_an_edit_of_the_other_model(method, options, tmp_path):
    size = {"max_position_embeddings": 1024}
    edit = kt.edit(tiny_model("llama", **size), REQUESTS, method, **options(method))
    other = tiny_model("llama", seed=1, **size)
    with pytest.warns(UserWarning, match="forced"):
        own = edit.for_model(other, force=True)
    kt.Edit.load(own.save(tmp_path / "own.safetensors")).apply_(other)  # without force
    assert len(other.effects) == 1 and own.for_model(tiny_model("llama", seed=1, **size)) is own
    now, before = own.effect.fields(), edit.effect.fields()
    assert {name for name in now if now[name] != before[name]} == {"fingerprint"}
    with pytest.warns(UserWarning, match="forced"):
        stack = kt.EditStack([edit]).for_model(tiny_model("llama", seed=1, **size), force=True)
    assert stack.layers[0].forced


def test_a_difference_lists_the_entries_and_a_page_and_a_list_of_files_show_the_kind(options, tmp_path):
    model = tiny_model("llama")
    both, one = (kt.edit(model, some, "ice") for some in (REQUESTS, REQUESTS[:1]))
    found = diff(both, one)
    assert [entry.among for entry in found.entries] == ["both", "A"] and found.same_base
    assert "Danielle Darrieux" in found.entries[0].entry and "entries" in found.as_dict()
    other = diff(both, kt.edit(model, REQUESTS, "grace", **options("grace")))
    assert {entry.among for entry in other.entries} == {"A", "B"} and other.same_base
    both.save(tmp_path / "edit.safetensors")
    assert [each.kind for each in stored([tmp_path])] == ["context"]


def plain_logits(model, batch):
    """Of a forward without a trace, which nnsight only passes on."""
    with torch.no_grad():
        return model.module(**model.inputs(batch)).logits[:, -1:].float()


@pytest.mark.parametrize(
    ("family", "method"), [*((f, "grace") for f in CONFIGS | FUSED), *(("llama", m) for m in ADAPTERS)]
)
def test_what_is_read_at_an_adapters_site_is_its_output_and_what_is_written_there_stays(family, method, options):
    model = tiny_model(family)
    edit = kt.edit(model, REQUESTS, method, **options(method))
    site, batch = edit.effect.site, model.encode([edit.report[0].prompt])
    before, unedited = model.read(batch, [site])[site], plain_logits(model, batch)
    with edit.applied(model), torch.no_grad():
        value, logits = model.read(batch, [site])[site], plain_logits(model, batch)
        linear, hook = edit.effect.hook(model)
        key = model.read(batch, [site], "key")[site]
        torch.testing.assert_close(value[0, -1], hook(linear, (key,), before)[0, -1])
        assert (value - before)[0, -1].norm() > 1e-2, "the read is of the map alone"
        with model.nnsight.trace(**model.inputs(batch)):
            nothing = model.nnsight.output.logits[:, -1:].float().save()
        assert torch.equal(nothing, logits), "a trace that changes nothing is the plain forward"
        with model.nnsight.trace(**model.inputs(batch)):
            model.value(site, 1)[:] = before
            patched = model.nnsight.output.logits[:, -1:].float().save()
        assert torch.equal(patched, unedited), "the adapter wrote over the patch"
    assert torch.equal(plain_logits(model, batch), unedited)


def test_an_adapter_reads_the_input_that_a_trace_puts_in_and_a_skipped_module_has_none(options):
    model = tiny_model("llama")
    edit = kt.edit(model, REQUESTS, "grace", **options("grace"))
    site, batch = edit.effect.site, model.encode(["A much longer line of text about the city of the"])
    projection = model.projection(site)
    with edit.applied(model), torch.no_grad():
        with model.nnsight.trace(**model.inputs(batch)):
            projection.input = edit.effect.keys[:1].expand_as(projection.input).clone()
            met = projection.output.save()
        with model.nnsight.trace(**model.inputs(batch)):
            zero = torch.zeros_like(met)
            projection.skip(zero)
            skipped = projection.output.save()
        assert torch.equal(met, edit.effect.values[0].expand_as(met)) and not skipped.any()
        assert "F_linear_0" in str(projection.source)  # nnsight builds the forward anew for it
        own = model.encode([edit.report[0].prompt])
        assert torch.equal(model.read(own, [site])[site][0, -1], edit.effect.values[0])
    assert not torch.equal(model.read(own, [site])[site][0, -1], edit.effect.values[0])


def test_a_search_for_values_at_an_adapters_site_finds_some(options):
    model = tiny_model("llama")
    edit = kt.edit(model, REQUESTS, "grace", **options("grace"))
    aim = TargetSite(edit.effect.site, Position.PROMPT_LAST)
    others = [fact.as_request() for fact in facts_of([edit])]
    others = [kt.Fact(f.template, f.subject, target="Rome", answer=f.answer) for f in others]
    with edit.applied(model):
        found = find_targets(model, others, [aim], Contexts(), Objective((NLL(), StopBelow()), 10, 0.3))
    assert (found.wanted[aim] - found.before[aim]).norm(dim=-1).min() > 1e-2
    torch.testing.assert_close(found.before[aim].float().cpu(), edit.effect.values)


def test_a_deep_copy_of_an_edited_module_is_edited_too_and_its_handle_takes_the_effect_out(options):
    model = tiny_model("llama")
    edit = kt.edit(model, REQUESTS, "grace", **options("grace"))
    batch = model.encode([edit.report[0].prompt])
    before = plain_logits(model, batch)
    with edit.applied(model):
        copied = kt.load(copy.deepcopy(model.module), tokenizer=model.tokenizer)
        edited = plain_logits(model, batch)
        assert torch.equal(plain_logits(copied, batch), edited) and not torch.equal(edited, before)
        assert torch.equal(plain_logits(model.asked(None), batch), edited)
    assert torch.equal(plain_logits(model, batch), before) and torch.equal(plain_logits(copied, batch), edited)
    copied.effects = ()
    assert torch.equal(plain_logits(copied, batch), before)


def test_an_adapter_and_an_edit_of_the_packed_map_below_it_come_off_in_either_order(options):
    model = kt.load(packed_module(Bytes), tokenizer=byte_level_tokenizer())
    base, batch = model.fingerprint(), model.encode(["The mother tongue of Danielle Darrieux"])
    before = plain_logits(model, batch)
    value = kt.edit(model, REQUESTS[:1], "grace", **options("grace"))
    weight = kt.edit(model, REQUESTS[1:], "ft", **options("ft"))
    site = value.effect.site
    assert any(model.weight_name(site) == name for name in weight.names)
    for first, second in ((value, weight), (weight, value)):
        value.apply_(model)
        weight.apply_(model)
        assert torch.equal(model.read(batch, [site])[site][0, -1], value.effect.values[0])
        first.revert_(model)
        stays = torch.equal(model.read(batch, [site])[site][0, -1], value.effect.values[0])
        assert stays == (first is weight)
        second.revert_(model)
        assert model.fingerprint() == base and torch.equal(plain_logits(model, batch), before)


def test_accelerates_hooks_run_around_an_adapter(options):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubled(ModelHook):
        def post_forward(self, module, output):
            return output * 2

    module = tiny_module("llama")
    add_hook_to_module(module.get_submodule("model.layers.1.mlp.down_proj"), Doubled())
    model = kt.load(module, tokenizer=byte_level_tokenizer())
    edit = kt.edit(model, REQUESTS, "grace", **options("grace"))
    site, batch = edit.effect.site, model.encode([edit.report[0].prompt])
    before = plain_logits(model, batch)
    with edit.applied(model):
        assert not torch.equal(plain_logits(model, batch), before)
        value = model.read(batch, [site])[site][0, -1]
        torch.testing.assert_close(value, 2 * edit.effect.values[0])
    assert torch.equal(plain_logits(model, batch), before)


@pytest.mark.parametrize("method", ["ice", "ike", "scr"])
@pytest.mark.parametrize("template", ["Which city is the capital of {}", "Which city is {}?", "The capital of {} is"])
def test_in_a_chat_template_a_fact_before_a_prompt_stands_in_the_prompts_turn(method, template, options):
    tokenizer = tokenizer_of(TEMPLATES["qwen 2.5"])
    plain = tiny_model("llama", tokenizer=tokenizer, vocab_size=512, max_position_embeddings=4096)
    model, fact = plain.asked("always"), kt.Fact(template, "France", "Paris", target="Rome")
    edit = kt.edit(model, [fact], method, **options(method))
    around = TEMPLATES["qwen 2.5"].asked
    if template.endswith("is"):
        around, gap, end = around.replace("QUESTION", "Complete the sentence.") + "QUESTION", " ", ""
    else:
        gap, end = "", "<|im_end|>"
    with edit.applied(model):
        text = rendered(plain, fact.prompt)
        assert text.endswith(f"New Fact: {fact.prompt} Rome\nPrompt: {fact.prompt}")
        whole = around.replace("QUESTION", text)
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert model.encode([rendered(model, fact.prompt)]).ids[0].tolist() == ids
        row = answer_row(model, (fact.prompt, "Rome"))
        assert [*row.read, row.target[-1]] == tokenizer(f"{whole}{gap}Rome", add_special_tokens=False)["input_ids"]
        assert plain.encode([rendered(plain, fact.prompt)]).ids[0].tolist() == tokenizer(text)["input_ids"]
        free, _ = wild_request(model, fact.prompt, 8)
        asked = TEMPLATES["qwen 2.5"].asked.replace("QUESTION", text)
        assert model.encode([free]).ids[0].tolist() == tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert ending(model.reader, fact.prompt) == tuple(tokenizer(end)["input_ids"])
