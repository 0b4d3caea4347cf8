"""The unedited model's scores from the cache: the bytes that were computed, and only for the same question."""

from dataclasses import replace

import pytest
import torch
from families import tiny_model

from kt._util.data import to_json
from kt.evaluation import cached, evaluate, evaluate_cached
from kt.evaluation import run as work
from kt.facts import Fact, Prompt

FACTS = [
    Fact("The mother tongue of {} is", "Danielle Darrieux", answer="French", target="Rome, Italy", id="one",
         neighbours=(Prompt("Marie Curie was born in", "Warsaw"),)),
    Fact("{} plays the sport of", "Megan Rapinoe", answer="soccer", foil="chemist", id="two"),
]  # fmt: skip
ASKED = {"protocols": ("tf", "gen", "prob", "wild"), "max_new_tokens": 4}


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr(work, "TEXT_TOKENS", 20)


@pytest.fixture
def model():
    return tiny_model("gpt2")


def of(scores, path):
    return scores.save(path).read_bytes()


def test_what_is_read_back_is_what_was_computed(model, tmp_path, monkeypatch):
    first = evaluate_cached(model, FACTS, tmp_path / "new" / "cache", **ASKED)
    plain = evaluate(model, FACTS, **ASKED)
    monkeypatch.setattr(cached, "evaluate", lambda *_a, **_k: pytest.fail("computed again"))
    again = evaluate_cached(model, FACTS, tmp_path / "new" / "cache", batch_size=1, progress=print, **ASKED)
    assert first.file is None and again.file is not None and again.file.parent == tmp_path / "new" / "cache"
    ours, theirs, computed = (of(s, tmp_path / "x.json") for s in (again.scores, first.scores, plain))
    assert ours == theirs == computed and again.scores.records == plain.records
    assert to_json(again.scores.as_dict()) == to_json(plain.as_dict())
    assert [row[0] for row in again.scores.tables()[0].rows] == [row[0] for row in plain.tables()[0].rows]


def test_an_edit_is_compared_with_them_as_with_fresh_ones(model, tmp_path):
    evaluate_cached(model, FACTS, tmp_path, **ASKED)
    kept, fresh = evaluate_cached(model, FACTS, tmp_path, **ASKED).scores, evaluate(model, FACTS, **ASKED)
    with torch.no_grad():
        model.module.transformer.h[1].mlp.c_proj.weight.add_(0.5)
    after = [evaluate(model, FACTS, before=before, **ASKED) for before in (kept, fresh)]
    assert of(after[0], tmp_path / "a.json") == of(after[1], tmp_path / "b.json")
    assert {n: g.as_dict() for n, g in after[0].compare(kept).items()} == {
        n: g.as_dict() for n, g in after[0].compare(fresh).items()
    }


def other_weights(model):
    with torch.no_grad():
        model.module.transformer.h[0].mlp.c_proj.weight[0, 0] += 1


def other_tokenizer(model):
    model.tokenizer = model.tokenizer.__class__(
        tokenizer_object=model.tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<s>"
    )


def other_ends(model):
    model.module.generation_config.eos_token_id = 7


def other_name(model):
    model.name = "another"


@pytest.mark.parametrize("change", [other_weights, other_tokenizer, other_ends, other_name])
def test_another_model_has_other_scores(model, tmp_path, change):
    evaluate_cached(model, FACTS, tmp_path, **ASKED)
    change(model)
    assert evaluate_cached(model, FACTS, tmp_path, **ASKED).file is None


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"protocols": ("tf", "wild", "prob")}, {"max_new_tokens": 5}, {"protocols": ("wild",)}],
    ids=str,
)
def test_other_questions_have_other_scores(model, tmp_path, other):
    evaluate_cached(model, FACTS, tmp_path, **ASKED)
    assert evaluate_cached(model, FACTS, tmp_path, **ASKED | other).file is None


def test_other_facts_have_other_scores(model, tmp_path):
    evaluate_cached(model, FACTS, tmp_path, protocols=("tf",))
    moved = [replace(FACTS[0], target="Rome"), FACTS[1]]
    for facts in (moved, FACTS[:1], FACTS[::-1]):
        assert evaluate_cached(model, facts, tmp_path, protocols=("tf",)).file is None


def test_another_heldout_text_has_other_scores(model, tmp_path):
    text = tmp_path / "text.txt"
    for content in ("Marie Curie was born in Warsaw.\n", "Marie Curie was born in Paris.\n"):
        text.write_text(content)
        asked = {"protocols": ("ppl",), "heldout": text}
        assert [evaluate_cached(model, FACTS, tmp_path, **asked).file is None for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    "content", ["", "{", '{"kind": "edit"}', '{"kind": "scores", "schema_version": 1}', "\x00\xff"]
)
def test_a_damaged_file_is_a_miss_with_a_warning_and_is_replaced(model, tmp_path, content):
    first = evaluate_cached(model, FACTS, tmp_path, protocols=("tf",)).scores
    (file,) = tmp_path.glob("scores-*.json")
    whole = file.read_bytes()
    file.write_bytes(content.encode("latin-1"))
    with pytest.warns(UserWarning, match="computed again"):
        found = evaluate_cached(model, FACTS, tmp_path, protocols=("tf",))
    assert found.file is None and found.scores.values == first.values and file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_only_time(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="are not kept"):
        found = evaluate_cached(model, FACTS, tmp_path / "file" / "cache", protocols=("tf",))
    assert found.file is None and found.scores.values == evaluate(model, FACTS, protocols=("tf",)).values


def test_a_judges_verdicts_are_not_kept(model, tmp_path):
    asked = {"protocols": ("wild",), "max_new_tokens": 3, "judge": lambda cases: [True] * len(cases)}
    for _ in range(2):
        found = evaluate_cached(model, FACTS, tmp_path, **asked)
        assert found.file is None and "edit_success_wild_judge" in found.scores.metrics
    assert list(tmp_path.iterdir()) == []


def test_a_known_fingerprint_is_not_taken_again(model, tmp_path, monkeypatch):
    known = model.fingerprint()
    evaluate_cached(model, FACTS, tmp_path, protocols=("tf",))
    monkeypatch.setattr(model, "fingerprint", lambda: pytest.fail("hashed again"))
    assert evaluate_cached(model, FACTS, tmp_path, known, protocols=("tf",)).file is not None
