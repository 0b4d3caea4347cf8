"""A model whose weights are elsewhere says what the same model says here, and what it cannot do it refuses unsent."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import byte_level_tokenizer, tiny_module
from ndif_server import Server, connect

import kt
from kt.cli import main
from kt.errors import KtError, UnknownModel, UnknownSite, WorkFailed
from kt.model.load import load
from kt.model.ndif import RemoteModel, simulated
from kt.model.sites import Kind, Site
from kt.model.update import LowRank
from kt.probing.lens import read_lens
from kt.probing.word_sets import SetTokens

SUBJECTS = ("Paris", "Seattle", "Rapinoe", "works")
FACTS = [kt.Fact(template="The capital of {} is", subject=s, answer="Rome", foil="Paris", id=s) for s in SUBJECTS]
EVERY_KIND = ("mlp", "attn", "hidden", "hidden-no-mlp", "hidden-no-attn", "attn.h1")
WEIGHT = "transformer.h.1.mlp.c_proj.weight"
CLOSE = 1e-5


def pair(family: str):
    """The same random model here and in nnsight's simulation of a remote one."""
    module, tokenizer = tiny_module(family), byte_level_tokenizer()
    return kt.load(module, tokenizer=tokenizer), kt.load(module, tokenizer=tokenizer, remote="local")


def served(monkeypatch, family="gpt2"):
    """The same, with a server between that has nothing of kt."""
    here, simulated = pair(family)
    server = Server(simulated.root)
    connect(monkeypatch, server)
    return (
        here,
        server,
        RemoteModel(simulated.root, simulated.module, here.tokenizer, "tiny", None, model_key="a.Class:{}"),
    )


def differ(here, far, **options):
    """The largest difference between two traces, relative to the values, after what has to be the same to the bit."""
    found = [kt.causal_trace(model, FACTS, samples=2, keep="all", **options) for model in (here, far)]
    gaps = []
    for mine, theirs in zip(*(trace.facts for trace in found), strict=True):
        assert (mine.answer_id, mine.foil_id, mine.clean) == (theirs.answer_id, theirs.foil_id, theirs.clean)
        for kind, by_metric in mine.patched.items():
            for metric, values in by_metric.items():
                assert np.isfinite(values).all()
                gaps.append(np.abs(values - theirs.patched[kind][metric]).max() / np.abs(values).max())
                assert np.ptp(values) > 100 * CLOSE * np.abs(values).max()  # or there would be nothing to compare
    return max(gaps)


@pytest.mark.filterwarnings("ignore:traced all the same")
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_a_remote_trace_equals_the_local_one_to_rounding(family):
    here, far = pair(family)
    assert differ(here, far, kinds=("mlp", "attn", "hidden")) < CLOSE


@pytest.mark.filterwarnings("ignore:traced all the same")
@pytest.mark.parametrize(
    "options",
    [dict(kinds=EVERY_KIND, window=2), dict(direction="noise"), dict(corrupt="swap"), dict(max_rows=7)],
    ids=["window", "noise", "swap", "rows"],
)
def test_so_it_does_with_nothing_but_bytes_between(monkeypatch, options):
    here, server, far = served(monkeypatch)
    assert differ(here, far, **options) < CLOSE
    assert server.sent


def test_whole_answers_are_not_traced_on_another_machine():
    with pytest.raises(kt.KtError, match="traced on a model that runs here"):
        kt.causal_trace(pair("gpt2")[1], FACTS, metrics=("log_prob",))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("final_norm", [True, False])
def test_a_remote_probe_is_the_local_one_to_the_bit(monkeypatch, family, final_norm):
    here, _, far = served(monkeypatch, family)
    for model in (far, pair(family)[1]):
        found = [kt.contrast_probe(each, FACTS, final_norm).to_dataframe() for each in (here, model)]
        assert found[0].equals(found[1])
        assert found[0]["prob"].nunique() > 10


def test_word_sets_are_reduced_where_the_model_is(monkeypatch):
    here, server, far = served(monkeypatch)
    ids = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    sets = SetTokens([[np.array([3, 4]), np.array([9])]] * 3, [np.array([1, 2, 3])] * 3)
    read = [read_lens(model, ids, [1, 0, 2], np.array([[4, 7]] * 3), masks=sets) for model in (here, far)]
    for mine, theirs in zip(*read, strict=True):
        assert np.array_equal(mine, theirs)
    logits = 4 * far.vocab_size * read[0].prob[..., 0].size
    assert server.returned[-1] < logits / 4


def test_reading_and_logits_are_those_of_the_model_here(monkeypatch):
    here, _, far = served(monkeypatch, "opt")
    batch = here.encode(["The Space Needle is in the city of", "Paris"])
    sites = [Site(kind, layer) for kind in Kind for layer in range(3)]
    for end in ("key", "value"):
        wanted, found = here.read(batch, sites[:-3], end), far.read(batch, sites[:-3], end)
        assert all(torch.equal(wanted[site], found[site]) for site in wanted)
    assert torch.equal(here.logits(batch, 2), far.logits(batch, 2))
    assert far.layout.unchecked == "its weights are not here"
    layout = replace(far.layout, unchecked=None)
    assert (layout, far.dtype, far.vocab_size) == (here.layout, here.dtype, here.vocab_size)


def test_no_weights_are_here_and_none_travel(monkeypatch):
    here, server, far = served(monkeypatch)
    assert all(parameter.is_meta for parameter in far.module.parameters())
    far.logits(far.encode(["Paris"]))
    weights = sum(p.numel() * 4 for p in here.module.parameters())
    assert server.sent[-1] < weights / 10
    content = here.weight(Site(Kind.MLP, 1)).detach().numpy().tobytes()[:64]
    assert all(content not in blob for blob in server.said)


def test_of_kt_only_functions_travel(monkeypatch):
    """A class of kt would have to be shipped whole, in the bytecode of one Python."""
    _, server, far = served(monkeypatch)
    kt.contrast_probe(far, FACTS)
    with pytest.warns(UserWarning, match="traced all the same"):
        kt.causal_trace(far, FACTS, samples=2, keep="all")
    named = [
        name for blob in server.said for name in (b"TracedModel", b"RemoteModel", b"Layout", b"Kind") if name in blob
    ]
    assert named == []


def test_the_fingerprint_says_that_it_is_no_hash_of_weights():
    _, far = pair("gpt2")
    other = RemoteModel(far.root, far.module, far.tokenizer, far.name, "v2", None)
    assert far.fingerprint().startswith("remote:")
    assert far.fingerprint() == pair("gpt2")[1].fingerprint() != other.fingerprint()


def test_what_needs_weights_is_refused_before_anything_is_sent(monkeypatch):
    _, server, far = served(monkeypatch)
    before = len(server.sent)
    for needs in (
        lambda: kt.edit(far, FACTS[:1], method="memit", layers=[1]),
        lambda: far.write(WEIGHT, torch.zeros(32, 128)),
        lambda: far.copies([WEIGHT]),
        lambda: far.put_back({WEIGHT: torch.zeros(128, 32)}),
        lambda: far.weight(Site(Kind.MLP, 1)),
        lambda: far.fingerprint([WEIGHT]),
        lambda: far.generate(["Paris"], 3),
        lambda: far.nnsight,
        lambda: kt.causal_trace(far, FACTS, method="atp"),
    ):
        with pytest.raises(KtError, match="NDIF are shared") as caught:
            needs()
        assert "\n" not in str(caught.value)
    with pytest.raises(UnknownSite, match="no weight"):
        far.own("nothing.weight")
    assert len(server.sent) == before


def test_an_edit_leaves_a_remote_model_alone(monkeypatch):
    here, server, far = served(monkeypatch)
    update = LowRank(torch.ones(32, 1), torch.ones(1, 128))
    with here.restored([Site(Kind.MLP, 1)]):
        here.write(Site(Kind.MLP, 1), update)
        before = len(server.sent)
        with pytest.raises(KtError, match="shared"), far.restored([Site(Kind.MLP, 1)]):
            far.write(Site(Kind.MLP, 1), update)
        assert len(server.sent) == before


def test_without_a_key_or_a_name_that_ndif_could_know_nothing_is_sent(monkeypatch, tmp_path):
    from nnsight import CONFIG

    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    for model, options, error, words in (
        ("gpt2", dict(remote=True), KtError, "NDIF_API_KEY"),
        ("demo", dict(remote=True), UnknownModel, "Hub id"),
        (str(tmp_path), dict(remote=True), UnknownModel, "Hub id"),
        ("demo", dict(remote="elsewhere"), KtError, "elsewhere"),
        ("demo", dict(remote="local", dtype="bf16"), KtError, "dtype"),
    ):
        with pytest.raises(error, match=words) as caught:
            kt.load(model, **options)
        assert "\n" not in str(caught.value)


def unanswered(root, module):
    return RemoteModel(root, module, byte_level_tokenizer(), "tiny", None, model_key="a.Class:{}")


def test_a_host_that_is_not_there_is_one_line(monkeypatch):
    from nnsight import CONFIG

    _, far = pair("gpt2")
    monkeypatch.setattr(CONFIG.API, "HOST", "http://127.0.0.1:9")
    with pytest.raises(WorkFailed, match=r"127\.0\.0\.1:9.*did not run the trace") as caught:
        unanswered(far.root, far.module)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(CONFIG.API, "HOST", "nowhere")
    with pytest.raises(KtError, match="NDIF_HOST"):
        unanswered(far.root, far.module)


def test_an_answer_with_more_than_tensors_is_not_opened(monkeypatch, tmp_path):
    class Harm:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "harm",))

    _, far = pair("gpt2")
    server = Server(far.root)
    connect(monkeypatch, server)
    answer = tmp_path / "answer"
    torch.save({"seen": Harm()}, answer)
    monkeypatch.setattr(server, "run", lambda blob: answer.read_bytes())
    with pytest.raises(WorkFailed, match="more than tensors"):
        unanswered(far.root, far.module)
    assert not (tmp_path / "harm").exists()


def no_model(*_, **__):
    pytest.fail("a model was loaded")


@pytest.mark.parametrize(
    "words",
    [
        ["apply-edit", "--method", "memit"],
        ["eval"],
        ["eval", "--edit", "edit.safetensors"],
        ["cov"],
        ["export", "edit.safetensors"],
        ["demo"],
        ["heatmap", "--method", "atp"],
        ["probe", "--edit", "edit.safetensors"],
        ["heatmap", "--dtype", "bf16"],
        ["heatmap", "--device-map", "auto"],
    ],
    ids=" ".join,
)
def test_the_command_line_refuses_it_before_a_model_is_looked_for(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kt.model.load.load", no_model)
    for typed, variable in ((["--remote"], None), ([], "1")):
        if variable:
            monkeypatch.setenv("KT_REMOTE", variable)
        assert main([*words, "-m", "gpt2", *typed]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "NDIF" in said
    assert list(tmp_path.iterdir()) == []


def test_the_commands_that_trace_work_remotely(monkeypatch, tmp_path):

    def load_here(model, remote=False, tokenizer=None, **options):
        here = load(model, tokenizer=tokenizer, device="cpu")
        return simulated(here) if remote else here

    monkeypatch.setattr("kt.model.load.load", load_here)
    for command in ("heatmap", "alpha", "probe"):
        out = tmp_path / command
        # heatmap and alpha draw as many samples as they are told
        few = ["--samples", "2"] if command != "probe" else []
        assert main([command, "--remote", "--limit", "2", *few, "--out", str(out), "--quiet"]) == 0
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["model"]["fingerprint"].startswith("remote:")
