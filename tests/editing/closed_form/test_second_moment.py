"""Second moments: the plain formula, the cache's key, and a run that was cut."""

import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from absurd_files import absurd
from families import tiny_model

from kt.editing import Statistics, key_statistics
from kt.editing.closed_form import key_sums
from kt.errors import BadFact, BadFile, KtError, WorkFailed
from kt.facts.corpus import Corpus
from kt.model.sites import Kind, Site
from kt.model.tokens import Batch, encode, token_ids

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
    monkeypatch.setattr(key_sums, "TOKENS_PER_FORWARD", 64)
    monkeypatch.setattr(key_sums, "FORWARDS_PER_CHECKPOINT", 2)
    monkeypatch.setattr(key_sums, "FORWARDS_PER_SORT", 2)
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


def test_more_tokens_are_added_to_those_that_are_kept(family, corpus, tmp_path, caplog):
    """The limit of the first pass falls inside a document, whose other tokens still see its beginning."""
    fresh = key_statistics(tiny_model(family), SITES, corpus, max_tokens=600, cache_dir=tmp_path / "fresh")
    key_statistics(tiny_model(family), SITES[:1], corpus, max_tokens=207, cache_dir=tmp_path)
    key_statistics(tiny_model(family), SITES[1:], corpus, max_tokens=311, cache_dir=tmp_path)
    seen = []
    with caplog.at_level("INFO", "kt"):
        more = key_statistics(
            tiny_model(family), SITES, corpus, 600, tmp_path, progress=lambda done, total: seen.append(done)
        )
    assert "over 207 and 311 tokens are kept; the rest of 600 is added" in caplog.text
    assert min(seen) >= 207 and more.n_tokens == 600
    for name in fresh.files:
        torch.testing.assert_close(more.moment(name), fresh.moment(name), rtol=1e-5, atol=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = key_statistics(tiny_model(family), SITES, corpus, 600, tmp_path)
    assert again.files == more.files


def test_where_a_pass_until_ends_does_not_hang_on_what_is_kept(corpus, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(key_sums, "FIRST_MARK", 60)
    empty = key_statistics(tiny_model("gpt2"), SITES, corpus, 600, tmp_path / "empty", until=0.5)
    assert empty.n_tokens < 600
    key_statistics(tiny_model("gpt2"), SITES, corpus, 207, tmp_path)
    taken = key_statistics(tiny_model("gpt2"), SITES, corpus, 600, tmp_path, until=0.5)
    assert taken.n_tokens == empty.n_tokens and taken.changes == empty.changes
    before = set(tmp_path.iterdir())
    assert key_statistics(tiny_model("gpt2"), SITES, corpus, 600, tmp_path, until=0.5).files == taken.files
    with caplog.at_level("INFO", "kt"):
        assert key_statistics(tiny_model("gpt2"), SITES, corpus, 600, tmp_path).n_tokens == 600
    assert "the rest of 600 is added" in caplog.text
    assert before < set(tmp_path.iterdir())


def test_a_corpus_that_has_no_more_tokens_answers_every_higher_limit(corpus, tmp_path):
    all_of_it = key_statistics(tiny_model("gpt2"), SITES, corpus, 50_000, tmp_path)
    assert all_of_it.n_tokens < 50_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert key_statistics(tiny_model("gpt2"), SITES, corpus, 90_000, tmp_path).files == all_of_it.files


def test_the_same_weights_and_bytes_are_not_the_same_model_and_text(tmp_path):
    lines = "".join(json.dumps({"text": f"The capital of land {i} is Paris."}) + "\n" for i in range(20))
    for name in ("text.txt", "text.jsonl"):
        (tmp_path / name).write_text(lines)
    bigger = tiny_model("llama", hidden_act="gelu")
    assert bigger.fingerprint() == tiny_model("llama").fingerprint()
    settings = [(tiny_model("llama"), "text.txt"), (bigger, "text.txt"), (tiny_model("llama"), "text.jsonl")]
    taken = [key_statistics(model, SITES, tmp_path / name, 200, tmp_path / "c") for model, name in settings]
    name = "model.layers.1.mlp.down_proj"
    for other in taken[1:]:
        assert other.files[name] != taken[0].files[name]
        assert not torch.allclose(other.moment(name), taken[0].moment(name), rtol=0.01)


def test_a_map_that_no_token_excites_has_a_second_moment_of_zero(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(key_sums, "FIRST_MARK", 100)
    model = tiny_model("llama")
    model.module.model.layers[1].mlp.gate_proj.weight.data.zero_()
    for _ in range(2):
        stats = key_statistics(model, SITES, corpus, 600, tmp_path)
        assert stats.moment("model.layers.1.mlp.down_proj").abs().max() == 0
        assert {change for _, change in stats.changes["model.layers.1.mlp.down_proj"]} == {0.0}


def test_kept_files_and_checkpoints_of_the_absurd_count_as_absent(corpus, tmp_path):
    model, name = tiny_model("gpt2"), "transformer.h.1.mlp.c_proj"
    first = key_statistics(model, SITES, corpus, 200, tmp_path)
    before, sums = first.files[name].read_bytes(), tmp_path / "sums.safetensors"
    sizes = {SITES[0]: 4}
    begun = key_sums.Sums({SITES[0]: torch.eye(4, dtype=torch.float64)}, 7)
    begun.save(sums)
    checkpoint = sums.read_bytes()
    for what in absurd(before):
        first.files[name].write_bytes(absurd(before)[what])
        sums.write_bytes(absurd(checkpoint)[what])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = key_statistics(model, SITES, corpus, 200, tmp_path)
            resumed = key_sums.Sums.resume(sums, sizes, lambda: begun)
        good = what == "nothing but zeros"  # a map that no token excites
        assert good or again.files[name].read_bytes() == before, what
        assert (resumed is begun) != good, what


@pytest.mark.parametrize("broken", [b"", b"no", None])
def test_a_kept_file_that_cannot_be_read_counts_as_absent(corpus, tmp_path, broken):
    first = key_statistics(tiny_model("gpt2"), SITES, corpus, 200, tmp_path)
    name, file = next(iter(first.files.items()))
    before = file.read_bytes()
    file.write_bytes(before[: len(before) // 2] if broken is None else broken)
    with pytest.warns(UserWarning, match="damaged; it is computed again"):
        again = key_statistics(tiny_model("gpt2"), SITES, corpus, 200, tmp_path)
    assert again.files[name].read_bytes() == before


def test_a_product_in_strips_is_the_whole_product():
    keys = torch.randn(50, 700, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = key_sums.Sums({SITES[0]: torch.zeros(700, 700, dtype=torch.float64)}, n_tokens=50)
    key_sums.add_products(sums.totals[SITES[0]], keys)
    mean = sums.mean(SITES[0])
    torch.testing.assert_close(mean.double(), keys.T @ keys / 50, atol=1e-6, rtol=1e-5)
    assert torch.equal(mean, mean.T)


def test_the_change_is_that_of_twice_the_documents_and_ends_the_pass(corpus, tmp_path, monkeypatch):
    """Documents are taken in their order though they are sorted by length to share forwards."""
    monkeypatch.setattr(key_sums, "TOKENS_PER_FORWARD", 64)
    monkeypatch.setattr(key_sums, "FIRST_MARK", 150)
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


def test_long_documents_are_read_in_windows_where_their_beginnings_are_too_few(tmp_path):
    model, name = tiny_model("gpt2"), "transformer.h.1.mlp.c_proj"  # 128 positions
    path = tmp_path / "long.txt"
    path.write_text("\n".join(" ".join(f"land {i} of {j}" for i in range(150)) for j in range(2)))
    lengths = [len(token_ids(model.tokenizer, text)) for text in Corpus.open(path).texts()]
    few, most = (key_statistics(model, SITES, path, n, tmp_path / "cache") for n in (256, 10_000))
    assert (few.n_tokens, most.n_tokens) == (256, sum(lengths))
    expected, documents = 0, [token_ids(model.tokenizer, text) for text in Corpus.open(path).texts()]
    for ids in documents:
        for at in range(0, len(ids), 128):
            rows = torch.tensor([list(ids[at : at + 128])])
            keys = model.read(Batch(rows, torch.ones_like(rows)), SITES, "key")[SITES[1]][0].double()
            expected = expected + keys.T @ keys
    torch.testing.assert_close(most.moment(name).double(), expected / sum(lengths), atol=1e-6, rtol=1e-4)
