"""`contrast_probe` and `Probe`: which tokens are looked for, what is left out, tables, means, files."""

from __future__ import annotations

import gc
import tracemalloc
import warnings
import weakref
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from families import byte_level_tokenizer, sentencepiece_tokenizer, tiny_model

import kt
from kt._util.data import save_arrays
from kt.errors import BadFact, BadFile, UnknownSite
from kt.model.tokens import target_ids
from kt.probing import contrast as probing

FACTS = (
    kt.Fact("The capital of {} is", "France", answer="Paris", target="Rome", id="a", relation="capital"),
    kt.Fact("The mother tongue of {} is", "Danielle Darrieux", answer="French", foil="soccer", id="b"),
    kt.Fact("{} was born in", "Marie Curie", target="Seattle", id="c"),
    kt.Fact("{} plays the sport of", "Megan Rapinoe", answer="soccer", foil="Italy", target="Paris", id="d"),
)
SAME = kt.Fact("{} works as a", "Tomas Brill", answer="chemist", target="chemist in Rome", id="same")
NEITHER = kt.Fact("{} is in the city of", "The Space Needle", answer="Seattle", id="neither")


@lru_cache(maxsize=2)
def tiny(sentencepiece: bool = False) -> kt.TracedModel:
    return tiny_model("llama", tokenizer=sentencepiece_tokenizer() if sentencepiece else byte_level_tokenizer())


@pytest.fixture(scope="module")
def demo() -> kt.Probe:
    return kt.contrast_probe(kt.load("demo"), kt.load_facts("demo", limit=40))


@pytest.mark.parametrize("sentencepiece", [False, True])
def test_the_first_tokens_are_those_that_follow_the_prompt(sentencepiece):
    model = tiny(sentencepiece)
    probe = kt.contrast_probe(model, FACTS)
    for fact, probed in zip(FACTS, probe.facts, strict=True):
        target = fact.target or fact.foil
        assert probed.target == target and probed.target_source == ("target" if fact.target else "foil")
        assert probed.target_id == target_ids(model.tokenizer, fact.prompt, target)[0]
        if fact.answer:
            assert probed.original_id == target_ids(model.tokenizer, fact.prompt, fact.answer)[0]
            assert (probed.original, probed.original_source) == (fact.answer, "given")


def test_without_an_answer_the_original_is_the_model_s_own_next_token():
    model = tiny()
    probed = kt.contrast_probe(model, FACTS).facts[2]
    assert probed.original_source == "model"
    assert probed.original_id == int(model.logits(model.encode([FACTS[2].prompt]))[0, -1].argmax())
    assert kt.contrast_probe(model, FACTS[2]).reading.rank[0, 1, 0, -1, 0] == 0


def test_a_fact_without_target_or_foil_is_left_out_and_counted():
    probe = kt.contrast_probe(tiny(), [NEITHER, *FACTS])
    assert [one.fact for one in probe.left_out] == [0] and probe.left_out[0].id == "neither"
    assert probe.why_left_out() == "1 left out: it has neither a target nor a foil"
    assert [fact.index for fact in probe.facts] == [1, 2, 3, 4] and probe.metadata["n_given"] == 5
    with pytest.raises(BadFact, match=r"1 left out: it has neither .* give facts with a target or a foil"):
        kt.contrast_probe(tiny(), NEITHER)
    with pytest.raises(BadFact, match="no facts to probe"):
        kt.contrast_probe(tiny(), [])


def test_answers_with_one_first_token_are_warned_of_once_kept_in_the_table_and_out_of_the_means():
    with pytest.warns(UserWarning, match="1 of 5 facts have .* 'chemist' and 'chemist in Rome'") as caught:
        probe = kt.contrast_probe(tiny(), [*FACTS, SAME])
    assert len(caught) == 1 and probe.metadata["warnings"] == [str(caught[0].message)]
    assert [fact.id for fact in probe.same_first_token] == ["same"]
    assert 4 in set(probe.to_dataframe().fact)
    without = kt.contrast_probe(tiny(), FACTS)
    assert probe.curve().n == 4
    np.testing.assert_allclose(probe.curve("mlp").mean, without.curve("mlp").mean, rtol=1e-6)


def test_if_no_answers_can_be_told_apart_there_are_means_but_no_stages():
    with pytest.warns(UserWarning, match="there are no stages"):
        probe = kt.contrast_probe(tiny(), SAME)
    assert probe.curve().n == 1
    assert "same token" in probe.stages.enrichment.reason and probe.stages.layers_low is None


def test_the_table_has_one_row_for_each_number(demo):
    frame = demo.to_dataframe()
    assert list(frame.columns) == ["fact", "layer", "position", "kind", "answer", "prob", "rank"]
    assert len(frame) == 40 * 8 * 2 * 3 * 2
    row = frame.query("fact == 7 and layer == 3 and position == 'prediction' and kind == 'mlp' and answer == 'target'")
    assert row["rank"].item() == demo.reading.rank[7, 1, 2, 3, 1]
    assert row["prob"].item() == demo.reading.prob[7, 1, 2, 3, 1]


def test_curves_are_means_and_medians_over_distinct_facts_with_intervals(demo):
    frame = demo.to_dataframe().query("position == 'subject_last' and kind == 'attn' and answer == 'target'")
    for metric in ("rank", "prob"):
        for statistic in ("mean", "median"):
            curve = demo.curve("attn", "subject_last", "target", metric, statistic)
            np.testing.assert_allclose(curve.mean, frame.groupby("layer")[metric].agg(statistic), rtol=1e-5)
            assert curve.n == 40 and (curve.low <= curve.mean).all() and (curve.mean <= curve.high).all()
            assert (curve.low < curve.high).all()
    begun = demo.curve(start=True)
    assert begun.layers == (-1, *range(8)) and begun.mean[0] == pytest.approx(demo.reading.start_rank[:, 1, 0].mean())


def test_a_fact_given_twice_counts_once():
    once = kt.contrast_probe(tiny(), FACTS)
    twice = kt.contrast_probe(tiny(), [*FACTS, *(replace(fact, id=fact.id + "2") for fact in FACTS)])
    assert twice.n_facts == 8 and twice.curve().n == 4
    np.testing.assert_allclose(twice.curve().high, once.curve().high)


def test_the_demo_model_says_its_facts_at_the_last_layer(demo):
    model = kt.load("demo")
    facts = kt.load_facts("demo", limit=40)
    own = model.logits(model.encode([fact.prompt for fact in facts]))[:, -1].softmax(-1)
    ids = [fact.original_id for fact in demo.facts]
    np.testing.assert_allclose(demo.reading.prob[:, 1, 0, -1, 0], own[range(40), ids].numpy(), atol=1e-5)


def test_stages_of_the_demo_model_do_not_depend_on_batches(demo):
    again = kt.contrast_probe(kt.load("demo"), kt.load_facts("demo", limit=40), batch_size=7)
    assert demo.stages.promotion.found and demo.stages.promotion.layers[0] >= demo.stages.extraction.layers[0]
    assert [s.layers for s in again.stages[:3]] == [s.layers for s in demo.stages[:3]]
    assert again.stages.layers_high == demo.stages.layers_high


def test_some_layers_are_probed_but_give_no_stages():
    probe = kt.contrast_probe(tiny(), FACTS, layers=[2, 0, 2])
    assert probe.layers == (0, 2) and set(probe.to_dataframe().layer) == {0, 2}
    assert probe.stages.layers_low is None and "all 3 layers" in probe.stages.promotion.reason
    with pytest.raises(UnknownSite, match="layers 0 to 2, not 3"):
        kt.contrast_probe(tiny(), FACTS, layers=[3])
    with pytest.raises(UnknownSite, match="no layers"):
        kt.contrast_probe(tiny(), FACTS, layers=[])


def test_unknown_names_are_refused(demo):
    for arguments in (
        ("hidden",),
        ("mlp", "last"),
        ("mlp", "prediction", "foil"),
        ("mlp", "prediction", "target", "p"),
    ):
        with pytest.raises(BadFact, match="choose among"):
            demo.curve(*arguments)
    with pytest.raises(BadFact, match="choose among mean, median"):
        demo.curve(statistic="mode")
    with pytest.raises(BadFact, match="no word sets"):
        demo.set_curve("rest")


def test_a_generator_of_facts_is_never_held_whole(monkeypatch):
    monkeypatch.setattr(probing, "_BLOCK", 8)
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    class Watched(kt.Fact):
        __hash__ = object.__hash__

    def stream(n: int):
        nonlocal most
        for i in range(n):
            fact = Watched("The capital of {} is", "France", answer="Paris", target="Rome", id=str(i))
            alive.add(fact)
            most = max(most, len(alive))
            yield fact
            del fact

    said = []
    probe = kt.contrast_probe(tiny(), stream(60), progress=lambda *n: said.append(n))
    assert probe.n_facts == 60 and probe.reading.rank.shape[0] == 60
    assert most <= 17  # one block, and the next that is read while the last is still bound
    assert said[-1] == (60, 60)


def test_memory_grows_by_the_numbers_kept_and_no_more(monkeypatch):
    monkeypatch.setattr(probing, "_BLOCK", 32)

    def stream(n: int):
        return (kt.Fact("The capital of {} is", "France", answer="Paris", target="Rome") for _ in range(n))

    def peak(n: int) -> tuple[int, int]:
        gc.collect()
        tracemalloc.start()
        probe = kt.contrast_probe(tiny(), stream(n))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top, sum(array.nbytes for array in probe.reading if array is not None)

    peak(32)
    (small, few), (large, many) = peak(64), peak(640)
    # The numbers once in blocks and once joined, and some 500 bytes for each fact's own texts.
    assert large - small < 2.2 * (many - few) + 1000 * (640 - 64)


def test_a_saved_probe_comes_back_whole(tmp_path, demo):
    with_sets = kt.contrast_probe(tiny(), [NEITHER, *FACTS], sets={"sports": ["soccer"], "stopwords": ["the"]})
    for probe in (demo, with_sets):
        loaded = kt.Probe.load(probe.save(tmp_path / "probe.safetensors"))
        assert (loaded.facts, loaded.layers, loaded.left_out) == (probe.facts, probe.layers, probe.left_out)
        assert loaded.set_names == probe.set_names and dict(loaded.metadata) == dict(probe.metadata)
        for mine, its in zip(probe.reading, loaded.reading, strict=True):
            assert (mine is None and its is None) or (mine.dtype == its.dtype and np.array_equal(mine, its, True))
        assert loaded.stages.as_dict() == probe.stages.as_dict()
    assert demo.save(tmp_path / "1").read_bytes() == demo.save(tmp_path / "2").read_bytes()


def test_foreign_and_torn_files_are_refused(tmp_path, demo):
    path = demo.save(tmp_path / "probe.safetensors")
    torn = tmp_path / "torn"
    torn.write_bytes(path.read_bytes()[:5000])
    trace = save_arrays(tmp_path / "trace", {"a": np.zeros(3)}, {"kind": "trace"})
    hollow = save_arrays(tmp_path / "hollow", {"prob": np.zeros(3)}, {"kind": "probe"})
    other = save_arrays(tmp_path / "other", {"a": np.zeros(3)})
    for file, message in (
        (torn, "not a whole safetensors file"),
        (trace, "holds trace, expected probe"),
        (hollow, "not a whole probe"),
        (other, "tensors of another program"),
        (tmp_path / "missing", "cannot read"),
    ):
        with pytest.raises(BadFile, match=message):
            kt.Probe.load(file)


def test_arrays_that_do_not_belong_to_the_header_are_refused(tmp_path, demo):
    short = replace(demo, reading=demo.reading._replace(rank=demo.reading.rank[:-1]))
    with pytest.raises(BadFile, match="rank should be int32 of shape"):
        kt.Probe.load(short.save(tmp_path / "short"))
    wide = replace(demo, reading=demo.reading._replace(prob=demo.reading.prob.astype(np.float64)))
    with pytest.raises(BadFile, match="prob should be float32"):
        kt.Probe.load(wide.save(tmp_path / "wide"))


def test_merged_probes_are_the_probe_of_all_facts():
    model = tiny()
    sets = {"sports": ["soccer"]}
    both = kt.contrast_probe(model, [NEITHER, *FACTS], sets=sets)
    merged = kt.contrast_probe(model, [NEITHER, *FACTS[:2]], sets=sets).merge(
        kt.contrast_probe(model, FACTS[2:], sets=sets)
    )
    assert merged.facts == both.facts and merged.left_out == both.left_out
    assert merged.metadata == both.metadata
    assert merged.reading.sets is not None
    np.testing.assert_allclose(merged.reading.prob, both.reading.prob, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(merged.reading.sets, both.reading.sets, rtol=1e-4, atol=1e-8)


def test_probes_that_were_not_made_alike_do_not_merge():
    model = tiny()
    first = kt.contrast_probe(model, FACTS[:2])
    for other, message in (
        (kt.contrast_probe(model, FACTS[2:], final_norm=False), "final_norm"),
        (kt.contrast_probe(model, FACTS[2:], layers=[0, 1]), "layers"),
        (kt.contrast_probe(model, FACTS[2:], sets={"x": ["soccer"]}), "word sets"),
    ):
        with pytest.raises(BadFact, match=f"probes of {message}"):
            first.merge(other)
    with pytest.raises(BadFact, match="in two of the probes"):
        first.merge(kt.contrast_probe(model, FACTS[1:]))


def test_figures_and_summaries_are_drawn_and_escaped(demo):
    title = str(demo.figure("resid", "median").layout.title.text)
    assert "demo" in title and len(demo.figure("attn").data) > 0
    named = replace(demo, metadata=dict(demo.metadata) | {"model": "<b>x</b>"})
    assert "<b>x</b>" not in named._repr_html_() and "&lt;b&gt;x" in named._repr_html_()
    assert repr(demo) == "Probe(demo: 40 facts, 8 layers; none left out)"


def test_no_warning_comes_without_cause():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kt.contrast_probe(tiny(), FACTS)
