"""A module that the caller passed keeps its training flags, its gradients and its tokenizer's padding."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from edits_by_hand import random_edit
from families import byte_level_tokenizer, tiny_module
from nnsight.tracing.backend import Backend

import kt
from kt._util.data import plain
from kt.errors import KtError, UnknownModel
from kt.export import to_hf, to_peft
from kt.facts.corpus import Corpus
from kt.model.model import TracedModel

FACTS = [
    kt.Fact("The mother tongue of {} is", "Danielle Darrieux", answer="French", foil="Italy", target="Italy"),
    kt.Fact("The {} is in the city of", "Space Needle", answer="Seattle", foil="Paris", target="Paris"),
]
NAMES = ["model.layers.1.mlp.down_proj.weight"]


def module_of(caller):
    """Half of it trains, dropout included, with a gradient on one weight that takes one."""
    module = tiny_module("llama", attention_dropout=0.5)
    if caller:
        module.train()
        module.model.layers[0].eval()
        for name, weight in module.named_parameters():
            weight.requires_grad_("layers.0" not in name)
        module.get_parameter(NAMES[0]).grad = torch.ones_like(module.get_parameter(NAMES[0]))
    return module


def state(module, tokenizer):
    training = [each.training for each in module.modules()]
    weights = {
        name: (w.requires_grad, None if w.grad is None else float(w.grad.sum()))
        for name, w in module.named_parameters()
    }
    return training, weights, tokenizer.special_tokens_map, tokenizer.padding_side


def solved(method, **options):
    def work(model, corpus, tmp_path):
        requests = [fact.as_request() for fact in FACTS]
        edit = kt.edit(model, requests, method, check=False, layers_mlp=(1,), **options)
        return [edit.delta(name) for name in edit.names]

    return work


def with_moments(model, corpus, tmp_path):
    given = kt.key_statistics(model, [model.site("mlp", 1)], corpus, max_tokens=300, cache_dir=tmp_path)
    quick = dict(v_num_grad_steps=2, context_templates=[["{}"]], mom2_update_weight=0.01)
    return solved("memit", statistics=given, **quick)(model, corpus, tmp_path)


def written(model, corpus, tmp_path):
    edit = random_edit(model, NAMES)
    edit.apply_(model)
    after = model.weight(NAMES[0]).clone()
    edit.revert_(model)
    with kt.EditStack([edit]).applied(model):
        return [after, model.logits(model.encode(["The"]))]


def exported(write):
    return lambda model, corpus, tmp: write(model, random_edit(model, NAMES), tmp / "out").as_dict() | {"path": ""}


WORK = {
    "logits": lambda model, *_: model.logits(model.encode(["The city of"])),
    "trace": lambda model, *_: kt.causal_trace(model, FACTS, samples=2, keep="all"),
    "screen": lambda model, *_: kt.causal_trace(model, FACTS, samples=2, keep="all", method="atp"),
    "probe": lambda model, *_: kt.contrast_probe(model, FACTS),
    "scores": lambda model, *_: kt.evaluate(model, FACTS, protocols=("tf", "gen", "prob", "wild")),
    "sampling": lambda model, *_: model.generate(["The city"], 8, True, 5),
    "memit": with_moments,
    "ultraedit": solved("ultraedit"),
    "ft": solved("ft", num_steps=2),
    "lora": solved("lora", num_steps=2),
    "written": written,
    "hf": exported(to_hf),
    "peft": exported(to_peft),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(
        "\n".join(["The Space Needle is in the city of Seattle. The mother tongue of Danielle is French."] * 20)
    )
    return Corpus.open(path)


@pytest.mark.parametrize("name", WORK)
@pytest.mark.filterwarnings("error:Converting a tensor")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_work_gives_the_same_bits_and_the_module_back_as_it_was(name, texts, tmp_path):
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.pad_token = None
    module = module_of(caller=True)
    before = state(module, tokenizer)
    model = kt.load(module, tokenizer=tokenizer)
    assert state(module, tokenizer) == before
    results = []
    for each in (model, TracedModel(module_of(caller=False), tokenizer, "LlamaForCausalLM", borrowed=False)):
        folder = tmp_path / str(len(results))
        folder.mkdir()
        results.append(plain(WORK[name](each, texts, folder)))
        assert state(module, tokenizer) == before
    assert results[0] == results[1]


def test_a_module_trains_before_between_and_after():
    module, tokenizer = tiny_module("llama").train().requires_grad_(), byte_level_tokenizer()
    batch = tokenizer("The city of Rome is", return_tensors="pt")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    model = kt.load(module, tokenizer=tokenizer)
    losses = []
    for _ in range(3):
        loss = module(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        model.logits(model.encode(["The"]))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0]


def test_flags_come_back_after_an_error_a_refusal_and_from_two_threads():
    module, tokenizer = module_of(caller=True), byte_level_tokenizer()
    before = state(module, tokenizer)
    with pytest.raises(UnknownModel):
        kt.load(module, tokenizer=tokenizer, layout={"o_proj": "nothing"})
    assert state(module, tokenizer) == before
    model, other = kt.load(module, tokenizer=tokenizer), kt.load(module, tokenizer=tokenizer)
    with pytest.raises(ZeroDivisionError), model.at_rest(), other.at_rest():
        assert not module.training
        raise ZeroDivisionError
    assert state(module, tokenizer) == before
    inside, leave = threading.Event(), threading.Event()

    def work():
        with other.at_rest():
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=work)
    with model.at_rest():
        thread.start()
        inside.wait(20)
    assert not module.training  # the other one is at work
    leave.set()
    thread.join()
    assert state(module, tokenizer) == before


def test_a_model_that_kt_loaded_is_at_rest_for_good():
    module = kt.load("demo").module
    assert not any(each.training for each in module.modules()) and not any(w.requires_grad for w in module.parameters())


def test_a_trace_that_changes_nothing_leaves_every_bit():
    module, tokenizer = module_of(caller=True), byte_level_tokenizer()
    model = kt.load(module, tokenizer=tokenizer)
    batch = model.encode(["The mother tongue of Danielle Darrieux is"])
    with torch.no_grad(), model.at_rest():
        expected = module(**model.inputs(batch)).logits.float()
    assert torch.equal(model.logits(batch), expected)


# Threads


def in_threads(*calls):
    """What the calls give, each in a thread of its own, all at once."""
    ready = threading.Barrier(len(calls))
    with ThreadPoolExecutor(len(calls)) as pool:
        found = [pool.submit(lambda call=call: (ready.wait(20), call())[1]) for call in calls]
        return [each.result(120) for each in found]


@pytest.mark.parametrize("borrowed", [True, False])
def test_threads_that_read_one_model_at_once_get_what_one_after_the_other_gets(borrowed):
    tokenizer = byte_level_tokenizer()
    module = module_of(caller=borrowed)
    model = TracedModel(module, tokenizer, "LlamaForCausalLM", borrowed=borrowed)
    again = kt.load(module, tokenizer=tokenizer) if borrowed else model  # another handle on the same module
    batch = model.encode(["The city of"])
    reads = [
        lambda: model.logits(batch).tolist(),
        lambda: again.read(batch, [kt.Site("mlp", 1)])[kt.Site("mlp", 1)].tolist(),
        lambda: model.generate(["The city"], 8, True, 5),
        lambda: plain(kt.causal_trace(model, FACTS[:1], samples=2, keep="all").facts[0].effects("mlp", "prob")),
        lambda: kt.evaluate(again, FACTS, protocols=("tf", "gen")).as_dict()["metrics"],
        lambda: model.embedded(batch.ids).tolist(),
    ]
    expected = [read() for read in reads]
    for shift in range(3):
        order = [*range(shift, len(reads)), *range(shift)]
        found = in_threads(*(lambda i=i: [plain(reads[i]()) for _ in range(3)] for i in order))
        assert found == [[plain(expected[i])] * 3 for i in order]


def test_a_read_inside_a_threads_own_forward_and_after_a_failed_one_waits_for_nothing():
    model = kt.load(module_of(caller=True), tokenizer=byte_level_tokenizer())
    batch = model.encode(["The"])
    with model.one_forward(), model.one_forward():
        expected = model.logits(batch)
    with pytest.raises(ZeroDivisionError), model.one_forward():
        raise ZeroDivisionError
    assert torch.equal(in_threads(lambda: model.logits(batch))[0], expected)


@pytest.mark.parametrize("borrowed", [False, True])
def test_a_trace_that_is_asked_for_elsewhere_goes_there(borrowed, monkeypatch):
    """nnsight chooses where a remote trace runs where it is given no place."""
    module = tiny_module("llama")
    model = TracedModel(module, byte_level_tokenizer(), "LlamaForCausalLM", borrowed=borrowed)
    sent = []
    monkeypatch.setattr(type(model.nnsight), "_remote_backend", lambda self, *asked: sent.append(asked[0]) or Backend())
    with model.nnsight.trace(**model.inputs(model.encode(["Her"])), remote="local"):
        pass
    assert sent == ["local"]


def test_a_module_that_was_changed_after_the_load_says_so_in_one_line():
    from peft import LoraConfig, get_peft_model

    module, tokenizer = module_of(caller=True), byte_level_tokenizer()
    model = kt.load(module, tokenizer=tokenizer)
    adapted = get_peft_model(module, LoraConfig(r=2, target_modules=["down_proj"]))
    site, batch = kt.Site("mlp", 1), model.encode(["The"])
    for read in (lambda: model.read(batch, [site]), lambda: kt.causal_trace(model, FACTS[:1], samples=2, keep="all")):
        with pytest.raises(KtError, match=r"the module was changed after kt.load .*load it again") as caught:
            read()
        assert "\n" not in str(caught.value)
    adapted.unload()
    assert model.read(batch, [site])[site].shape[0] == 1


def test_what_takes_gradients_is_refused_inside_inference_mode_and_what_takes_none_is_not(tmp_path):
    model = kt.load(module_of(caller=True), tokenizer=byte_level_tokenizer())
    with torch.inference_mode():
        expected = model.logits(model.encode(["The"]))
        kt.causal_trace(model, FACTS[:1], samples=2, keep="all")
        for call in (
            lambda: kt.edit(model, FACTS, "ft"),
            lambda: kt.screen(model, FACTS, samples=2, keep="all"),
            lambda: kt.knowledge_neurons(model, FACTS),
            lambda: kt.train_editor(model, FACTS),
        ):
            with pytest.raises(KtError, match=r"takes gradients, .* use torch.no_grad\(\) instead") as caught:
                call()
            assert "\n" not in str(caught.value)
        with pytest.raises(UnknownModel, match=r"made inside torch.inference_mode\(\).* torch.no_grad\(\)"):
            kt.load(copy.deepcopy(model.module), tokenizer=model.tokenizer)
    assert torch.equal(model.logits(model.encode(["The"])), expected)
    with torch.no_grad():
        assert kt.edit(model, FACTS, "ft", num_steps=1, layers_mlp=(1,), check=False).names
