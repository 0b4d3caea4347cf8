"""ICE: BM25 against its formula, and the text before a prompt."""

import math
import re
import warnings
from dataclasses import replace

import pytest
import torch
from editing_help import REQUESTS
from families import tiny_model

import kt
from kt.editing.context_edit import BM25, Context
from kt.editing.retrieval import embedded, origin, terms
from kt.errors import BadFile, KtError
from kt.model.sites import Site


def test_the_retriever_is_okapi_bm25():
    documents = ["the tongue of Ann is Welsh", "the tongue of Bob is Danish and only Danish", "Rome"]
    words = [
        ["tongue", "of", "ann", "is", "welsh"],
        ["tongue", "of", "bob", "is", "danish", "and", "only", "danish"],
        ["rome"],
    ]
    mean = sum(map(len, words)) / 3
    for word, document in (("danish", 1), ("tongue", 0)):
        n, f = sum(word in some for some in words), words[document].count(word)
        idf = math.log(1 + (3 - n + 0.5) / (n + 0.5))
        expected = idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(words[document]) / mean))
        assert BM25(documents).weights[document][word] == pytest.approx(expected)
    assert BM25(documents).nearest("Which tongue has Bob?") == [1, 0] and BM25(documents).nearest("Oslo") == []


@pytest.mark.parametrize(
    ("template", "subjects", "other"),
    [
        ("{}的首都是", ("法国", "波兰"), "今天天气很好。"),
        ("{}の首都は", ("フランス", "ポーランド"), "明日、雨が降る"),
        ("เมืองหลวงของ{}คือ", ("ฝรั่งเศส", "โปแลนด์"), "วันนี้ฝน"),
        ("{}의 수도는", ("프랑스", "폴란드"), "오늘 날씨"),
    ],
)
def test_facts_are_found_by_their_words_in_scripts_without_spaces(template, subjects, other):
    model = tiny_model("llama", max_position_embeddings=4096)
    facts = [kt.Fact(template, subject, target="Rome") for subject in subjects]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the prompts of")
        edit = kt.edit(model, facts, "ice", check=False)
    for fact, document in zip(facts, edit.effect.documents, strict=True):
        assert edit.effect.rendered(model, fact.prompt) == f"New Fact: {document}\nPrompt: {fact.prompt}"
        assert edit.effect.recall(model, fact.subject) == document
    assert edit.effect.rendered(model, other) == other


def test_latin_words_among_others_stay_whole_and_punctuation_of_such_scripts_is_no_character():
    assert terms("The tower 東京tower2は、「大」") == ["tower", "東京", "tower2", "は", "大"]
    assert terms("Ça, l'été “Oslo” — don't") == ["ça", "lété", "“oslo”", "—", "dont"]


def test_a_request_whose_own_prompt_does_not_find_its_fact_is_said_in_one_warning_with_a_remedy():
    model = tiny_model("llama", max_position_embeddings=4096)
    facts = [kt.Fact("{}:", "The", target="Rome", id="a"), *REQUESTS]
    for some, options, line, remedy in (
        (facts, {}, r"the prompts of 1 of 3 requests .* \('a'\): they share no word", "give retriever=embeddings, or"),
        (
            REQUESTS,
            {"retriever": "embeddings", "nearness": 1.0},
            "the prompts of 2 of 2 requests",
            "lower nearness, or",
        ),
    ):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            edit = kt.edit(model, some, "ice", **options)
        lines = [str(each.message) for each in said if "prompts of" in str(each.message)]
        assert len(lines) == 1 and re.search(line, lines[0]) and remedy in lines[0]
        assert "larger model" not in " ".join(edit.verdict.warnings)
    assert "not_found" not in kt.edit(model, REQUESTS, "ice", check=False).manifest


def test_the_nearest_fact_stands_before_the_prompt_and_facts_add_up():
    ann, bob = (Context((f"{name} speaks Welsh",), (f"New Fact: {name} speaks Welsh\n",)) for name in ("Ann", "Bob"))
    both = ann.plus(bob)
    assert both.rendered(None, "Bob lives in") == "New Fact: Bob speaks Welsh\nPrompt: Bob lives in"
    assert both.rendered(None, "Rome is {old}") == "Rome is {old}" and ann.rendered(None, "Bob lives") == "Bob lives"
    with pytest.raises(KtError, match="retriever without facts"):
        Context((), ())


@pytest.mark.parametrize("selects", [(0, 0), (2, 2), (2, 0), (0, 2)])
def test_a_later_edit_of_a_prompt_counts_where_the_earlier_fact_is_the_shorter_and_so_the_nearer(selects):
    prompt, targets = "The capital of France is", ("Rome", "Rio de Janeiro by the sea")
    first, later = (
        Context((f"{prompt} {target}",), (f"New Fact: {prompt} {target}\n",), select=select)
        for target, select in zip(targets, selects, strict=True)
    )
    both = first.plus(later)
    assert both.by_nearness(None).nearest(prompt) == [0, 1]
    assert both.rendered(None, prompt) == f"New Fact: {prompt} {targets[1]}\nPrompt: {prompt}"
    assert both.recall(None, prompt) == both.documents[1]
    assert later.plus(first).recall(None, prompt) == first.documents[0]


def test_embeddings_are_mean_states_behind_the_middle_block_and_a_text_below_the_least_cosine_is_read_as_it_is(
    tmp_path,
):
    """cos(mean of a text's tokens but the first - centre, a document's) ≥ nearness, the nearest first."""
    model = tiny_model("llama")
    edit = kt.edit(model, REQUESTS, "ice", retriever="embeddings", nearness=0.0)
    effect, texts = edit.effect, ["The tongue of Danielle Darrieux", "Xyzzy plugh, and more of it"]
    for text, own in zip(texts, embedded(model, texts), strict=True):
        site = Site("hidden", (model.n_layers - 1) // 2)
        states = model.read(model.encode([text]), [site], "value")[site][0]
        torch.testing.assert_close(own, states[1:].mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(effect.vectors, embedded(model, effect.documents))
    torch.testing.assert_close(effect.centre, origin(model))
    cosines = torch.cosine_similarity(
        (embedded(model, texts) - effect.centre)[:, None], effect.vectors - effect.centre, dim=-1
    )
    for text, row in zip(texts, cosines, strict=True):
        order = [int(i) for i in row.argsort(descending=True) if row[i] >= 0]
        assert effect.by_nearness(model).nearest(text) == order
    path = edit.save(tmp_path / "edit.safetensors")
    loaded = kt.Edit.load(path)
    assert loaded.digest == edit.digest and loaded.effect.by_nearness(model).nearest(texts[0])
    with loaded.applied(model):
        assert model.effects[0].recall(model, edit.report[0].prompt) == effect.documents[0]
    strict = kt.edit(model, REQUESTS, "ice", retriever="embeddings", nearness=1.0).effect
    assert strict.rendered(model, texts[1]) == texts[1]
    both = effect.plus(strict)
    assert both.vectors.shape[0] == 4 and both.by_nearness(model).nearest(effect.documents[0])[0] == 2
    object.__setattr__(effect, "vectors", effect.vectors[:1])
    with pytest.raises(BadFile, match="a vector a fact"):
        kt.Edit.load(edit.save(tmp_path / "broken.safetensors"))


def test_facts_of_a_stack_are_each_found_by_their_own_edits_retriever_and_least_cosine(tmp_path):
    model = tiny_model("llama")
    texts = ["The tongue of Danielle Darrieux", "Space Needle is in", "Xyzzy plugh, and more of it"]
    words = kt.edit(model, [kt.Fact("{} speaks", "Ann", target="Welsh")], "ice", check=False)
    wide, none = (
        kt.edit(model, REQUESTS, "ice", retriever="embeddings", nearness=nearness, check=False)
        for nearness in (0.0, 1.0)
    )
    for order in ((words, wide), (wide, words)):
        joint = kt.EditStack(order).as_sum()
        own = {document: i for i, document in enumerate(joint.effect.documents)}
        retriever = joint.effect.by_nearness(model)
        near = [[wide.effect.documents[i] for i in wide.effect.by_nearness(model).nearest(text)] for text in texts]
        assert any(near), "else nothing is asked here"
        for text, documents in zip(texts, near, strict=True):
            assert {joint.effect.documents[i] for i in retriever.nearest(text)} == set(documents)
        assert retriever.nearest("Ann speaks")[0] == own["Ann speaks Welsh"], "BM25's facts, first by their words"
        assert retriever.found(joint.effect.documents) == [True] * 3
        loaded = kt.Edit.load(joint.save(tmp_path / "joint.safetensors"))
        assert loaded.digest == joint.digest and loaded.effect == joint.effect
        assert loaded.effect.by_nearness(model).nearest(texts[0]) == retriever.nearest(texts[0])
    joint = kt.EditStack([none, wide]).as_sum().effect
    assert joint.nearness == (1.0, 1.0, 0.0, 0.0) and joint.retriever == "embeddings"
    assert set(joint.by_nearness(model).nearest(texts[0])) <= {2, 3}
    narrow = kt.edit(tiny_model("llama", hidden_size=64), REQUESTS, "ice", retriever="embeddings", check=False)
    with pytest.raises(KtError, match="of different sizes"):
        kt.EditStack([wide, narrow]).as_sum()


def test_a_vector_is_held_against_the_centre_that_it_was_solved_with():
    model = tiny_model("llama")
    effect = kt.edit(model, REQUESTS, "ice", retriever="embeddings", nearness=0.5, check=False).effect
    moved = replace(effect, centre=effect.centre + 100)
    for parts in ((effect, moved), (moved, effect)):
        joint, text = parts[0].plus(parts[1]), effect.documents[0]
        for part, mine in zip(parts, ([0, 1], [2, 3]), strict=True):
            alone = [mine[i] for i in part.by_nearness(model).nearest(text)]
            assert [i for i in joint.by_nearness(model).nearest(text) if i in mine] == alone


def test_an_unknown_retriever_and_a_cosine_above_one_are_one_line():
    for changes, words in (
        ({"retriever": "google"}, "retriever 'google' is unknown"),
        ({"nearness": 2.0}, "nearness 2 is"),
    ):
        with pytest.raises(KtError, match=words) as caught:
            kt.edit(tiny_model("llama"), REQUESTS, "ice", **changes)
        assert "\n" not in str(caught.value)
