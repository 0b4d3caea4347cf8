"""Second moments: the plain formula, the cache's key, and a run that was cut."""

import sys
from types import SimpleNamespace

import pytest
import torch
from families import tiny_model

from kt.editing import Statistics, key_statistics
from kt.editing.closed_form import second_moment as module
from kt.errors import BadFact, BadFile, KtError, WorkFailed
from kt.facts.corpus import Corpus
from kt.model.sites import Kind, Site
from kt.model.tokens import encode

SITES = [Site(Kind.ATTN, 0), Site(Kind.MLP, 1)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"The capital of land {i} is Paris, number {i * i}." for i in range(40)) + "\n\n")
    return Corpus.open(path)


def test_equals_the_plain_formula(family, corpus, tmp_path):
    model = tiny_model(family)
    stats = key_statistics(model, SITES, corpus, max_tokens=300, cache_dir=tmp_path / "cache")
    expected, tokens = dict.fromkeys(SITES, 0), 0
    for text in corpus.texts():
        batch = encode(model.tokenizer, [text])
        cut = min(batch.ids.shape[1], 300 - tokens)
        batch = type(batch)(batch.ids[:, :cut], batch.mask[:, :cut])
        for site, keys in model.read(batch, SITES, "key").items():
            expected[site] = expected[site] + keys[0].double().T @ keys[0].double()
        tokens += cut
        if tokens == 300:
            break
    assert stats.n_tokens == tokens == 300
    for site in SITES:
        torch.testing.assert_close(
            stats.moment(model.weight_name(site)).double(), expected[site] / tokens, atol=1e-6, rtol=1e-4
        )


def test_cache_knows_weights_corpus_and_tokens_not_names(corpus, tmp_path):
    cache = tmp_path / "cache"
    files = set()
    for seed, tokens in ((0, 200), (0, 200), (1, 200), (0, 150)):
        stats = key_statistics(tiny_model("gpt2", seed=seed), SITES, corpus, max_tokens=tokens, cache_dir=cache)
        files |= set(stats.files.values())
    assert len(files) == 3 * len(SITES) == len(list(cache.glob("*.safetensors")))


def test_resumed_run_gives_the_same_bytes(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_PER_FORWARD", 64)
    monkeypatch.setattr(module, "FORWARDS_PER_CHECKPOINT", 2)
    monkeypatch.setattr(module, "FORWARDS_PER_SORT", 2)
    whole = key_statistics(tiny_model("llama"), SITES, corpus, max_tokens=600, cache_dir=tmp_path / "a")

    class Cut(Exception):
        pass

    def cut(done, total):
        if done > 300:
            raise Cut

    with pytest.raises(Cut):
        key_statistics(tiny_model("llama"), SITES, corpus, max_tokens=600, cache_dir=tmp_path / "b", progress=cut)
    assert [p.name[:7] for p in (tmp_path / "b").glob("*.safetensors")] == ["partial"]
    seen = []
    again = key_statistics(
        tiny_model("llama"),
        SITES,
        corpus,
        max_tokens=600,
        cache_dir=tmp_path / "b",
        progress=lambda d, t: seen.append(d),
    )
    assert min(seen) > 200, "the resumed run began again from the start"
    for name in whole.files:
        assert whole.files[name].read_bytes() == again.files[name].read_bytes()


def test_a_product_in_strips_is_the_whole_product():
    keys = torch.randn(50, 700, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = module.Sums({SITES[0]: torch.zeros(700, 700, dtype=torch.float64)}, n_tokens=50)
    module.add_products(sums.totals[SITES[0]], keys)
    mean = sums.mean(SITES[0])
    torch.testing.assert_close(mean.double(), keys.T @ keys / 50, atol=1e-6, rtol=1e-5)
    assert torch.equal(mean, mean.T)


def test_the_change_is_that_of_twice_the_documents_and_ends_the_pass(corpus, tmp_path, monkeypatch):
    """Documents are taken in their order though they are sorted by length to share forwards."""
    monkeypatch.setattr(module, "TOKENS_PER_FORWARD", 64)
    monkeypatch.setattr(module, "FIRST_MARK", 150)
    model, name = tiny_model("qwen2"), "model.layers.1.mlp.down_proj"

    def take(tokens, **more):
        return key_statistics(model, SITES, corpus, tokens, tmp_path / f"{tokens}{more}", **more)

    whole = take(600)
    marks = [tokens for tokens, _ in whole.changes[name]]
    assert len(marks) == 2 and 300 <= marks[0] < 330 and marks[1] == 600
    half, change = take(marks[0]).moment(name), whole.changes[name][-1][1]
    true = (whole.moment(name) - half).norm() / whole.moment(name).norm()
    assert change == pytest.approx(float(true), rel=0.2)  # 128 directions
    early = take(600, until=1.01 * max(c[0][1] for c in whole.changes.values()))
    assert early.n_tokens == marks[0] and torch.equal(early.moment(name), half)
    assert take(600, until=1e-9).n_tokens == 600
    with pytest.raises(BadFact, match="above zero"):
        take(600, until=0.0)


def test_what_would_not_fit_is_refused_before_it_is_taken(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("kt.model.memory.free_memory", lambda *a: 1000)
    with pytest.raises(KtError, match=r"sum of 2 second moments .* needs .* take fewer layers"):
        key_statistics(tiny_model("gpt2"), SITES, corpus, 300, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_wrong_files_are_one_line(tmp_path, corpus):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(BadFile):
        Statistics.open(tmp_path / "x.safetensors")
    with pytest.raises(BadFile, match="no corpus"):
        Corpus.open(tmp_path / "absent.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txet": 1}\n')
    with pytest.raises(BadFile, match="line 2"):
        list(Corpus.open(tmp_path / "bad.jsonl").texts())
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(WorkFailed, match="no tokens"):
        key_statistics(tiny_model("gpt2"), SITES, Corpus.open(tmp_path / "empty.txt"), cache_dir=tmp_path / "c")


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:wikitext", ("wikitext", "train")),
        ("hf:owner/name:test", ("owner/name", "test")),
        ("hf:owner/name/20231101.en", ("owner/name", "20231101.en", "train")),
    ],
)
def test_a_corpus_on_the_hub_may_name_a_configuration_and_a_split(monkeypatch, source, asked):
    seen = []

    def load_dataset(*names, split, streaming):
        seen.append((*names, split))
        return [{"text": "one"}, {"text": "two"}] if streaming else pytest.fail("it would be downloaded whole")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(Corpus.open(source).texts()) == ["one", "two"] and seen == [asked]
