"""Perplexity: against a plain loop over every token, over windows, documents and two models."""

import math

import pytest
import torch
from families import byte_level_tokenizer, sentencepiece_tokenizer, tiny_model

from kt.errors import BadFact, BadFile
from kt.evaluation import evaluate, perplexity
from kt.evaluation.perplexity import Heldout, heldout_corpus, windows
from kt.facts import Fact
from kt.facts.corpus import Corpus
from kt.model.sites import Kind, Site
from kt.model.tokens import token_ids

FACTS = [Fact("{} is", "Rome", target="red")]
LINES = [
    "Marie Curie was born in Warsaw and lived in Paris.",
    "",
    "x",
    "The capital of Italy is Rome, and that of France is Paris. " * 7 + "The end.",
]
TOKENIZERS = {"gpt2": byte_level_tokenizer, "llama": sentencepiece_tokenizer}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "heldout.txt"
    path.write_text("\n".join(LINES))
    return path


def plain(model, window):
    """(nll, tokens) of each document: every token from the widest context that its window gives it."""
    found = []
    for line in LINES:
        ids = token_ids(model.tokenizer, line)
        nll, stop, step = 0.0, 1, window
        while stop < len(ids):
            first, stop, step = stop, min(stop + step, len(ids)), window // 2
            start = max(0, stop - 1 - window)
            with torch.no_grad():
                logits = model.module(input_ids=torch.tensor([ids[start : stop - 1]])).logits[0].double()
            logs = logits.log_softmax(-1)
            nll -= sum(logs[i - 1 - start, ids[i]].item() for i in range(first, stop))
        if len(ids) > 1:
            found.append((nll, len(ids) - 1))
    return found


@pytest.mark.parametrize("family", TOKENIZERS)
@pytest.mark.parametrize("window", [1024, 16])
def test_a_plain_loop_over_the_tokens_agrees(family, window, text, monkeypatch):
    monkeypatch.setattr(perplexity, "WINDOW", window)
    model = tiny_model(family, tokenizer=TOKENIZERS[family]())
    found = evaluate(model, FACTS, protocols=("ppl",), heldout=text)
    expected = plain(model, min(window, 128))
    assert len(plain(model, 8)) == len(expected) == (3 if family == "llama" else 2)  # BOS: "x" has a context
    assert found.heldout.tokens == tuple(n for _, n in expected)
    assert found.heldout.nll == pytest.approx([nll for nll, _ in expected], rel=1e-5)
    total, tokens = (sum(column) for column in zip(*expected, strict=True))
    metric = found.metrics["perplexity_heldout"]
    assert list(found.metrics) == ["perplexity_heldout"] and metric.n == len(expected)
    assert metric.mean == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert metric.low <= metric.mean <= metric.high
    assert f"{tokens} tokens" in found.protocol["perplexity_heldout"]


def test_every_token_but_the_first_is_predicted_once_with_half_a_window_before_it():
    ids = list(range(100))
    parts = list(perplexity._cut(ids, 10))
    assert [t for _, target in parts for t in target] == ids[1:]
    assert all(len(read) <= 10 and read[-len(target) :] == tuple(t - 1 for t in target) for read, target in parts)
    assert all(target[0] - read[0] >= 5 for read, target in parts[1:])
    assert list(perplexity._cut([5], 10)) == []
    assert [t for _, target in perplexity._cut(ids, 1) for t in target] == ids[1:]


def test_the_batch_size_changes_nothing(text):
    model = tiny_model("gpt2")
    one, auto = (evaluate(model, FACTS, protocols=("ppl",), heldout=text, batch_size=b).heldout for b in (1, "auto"))
    assert one.nll == pytest.approx(auto.nll, rel=1e-5)


def test_a_long_text_is_read_up_to_the_limit(text, monkeypatch):
    monkeypatch.setattr(perplexity, "MOST_TOKENS", 5)
    assert set(windows(tiny_model("gpt2"), Corpus.open(text)).owner) == {0}


def test_before_and_after_on_the_same_text(text, tmp_path):
    model = tiny_model("gpt2")
    before = evaluate(model, FACTS, protocols=("tf", "ppl"), heldout=text)
    site = Site(Kind.MLP, 1)
    with model.restored([site]):
        model.write(site, torch.randn(model.weight(site).shape, generator=torch.Generator().manual_seed(0)))
        after = evaluate(model, FACTS, before=before, protocols=("tf", "ppl"), heldout=text)
    gap = after.compare(before)["perplexity_heldout"]
    both = [scores.metrics["perplexity_heldout"].mean for scores in (after, before)]
    assert gap.mean == pytest.approx(both[0] - both[1]) and gap.n == 2
    assert type(after).load(after.save(tmp_path / "after.json")) == after
    assert "perplexity_heldout" not in type(after).joined([after, before]).metrics


def test_perplexity_weighs_tokens_not_documents():
    text = Heldout("t", "0", (8.0, 1.0), (8, 2))
    assert text.perplexity().mean == pytest.approx(math.exp(0.9))
    assert text.difference(text).ci95 == (0.0, 0.0)
    with pytest.raises(BadFact, match="do not compare"):
        text.difference(Heldout("u", "1", (8.0, 1.0), (8, 2)))


def test_the_demo_model_has_text_of_its_own_and_others_have_english():
    assert heldout_corpus(None, "demo").path.name == "heldout.txt"
    assert "Professor Lucifer" in " ".join(heldout_corpus(None, "gpt2").texts())


@pytest.mark.parametrize("content", ["", "\n\n", "x\n"])
def test_a_text_without_tokens_to_predict_is_refused(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(BadFile, match=r"empty\.txt has no text to predict"):
        evaluate(tiny_model("gpt2"), FACTS, protocols=("ppl",), heldout=path)
    with pytest.raises(BadFile, match="no corpus"):
        evaluate(tiny_model("gpt2"), FACTS, protocols=("ppl",), heldout=tmp_path / "none.txt")
