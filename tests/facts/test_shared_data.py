"""The real data files, read whole where they lie beside this checkout (`pytest -m data`)."""

from pathlib import Path

import pytest

from kt.facts import read_facts

SHARED = Path(__file__).parents[3] / "shared"
DATA = SHARED / "data"

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not DATA.exists(), reason="the shared data are not beside this checkout"),
]


def whole(source, format, **options):
    loaded = read_facts(source, **options)
    assert set(loaded.skips.formats) == {format}
    assert len({f.id for f in loaded.facts}) == len(loaded.facts)
    assert all(f.subject in f.prompt for f in loaded.facts)
    return loaded.facts, loaded.skips


def test_counterfact_in_easyedits_form():
    facts, skips = whole(DATA / "counterfact-edit.json", "easyedit")
    assert len(facts) == 10_000 and not skips.total
    assert all(f.answer and f.target and len(f.neighbours) == len(f.rephrasings) == 1 for f in facts)


def test_qaedit():
    facts, skips = whole(DATA / "QAEdit_inter_1k.json", "qaedit")
    assert len(facts) == 1_000 and not skips.total
    assert all(f.target and len(f.neighbours) == 5 and len(f.rephrasings) == 1 for f in facts)


def test_known_facts_and_those_that_a_model_knows():
    source = DATA / "known_1000_model_flags.json"
    facts, skips = whole(source, "known")
    assert len(facts) == 1_209 and not skips.total and all(f.answer for f in facts)
    known, skips = whole(source, "known", known_to="Qwen3-4B-Instruct-2507")
    assert len(known) == 700 and skips.reasons == {"not known to Qwen3-4B-Instruct-2507": 509}


def test_lre_relations():
    facts, skips = whole(DATA / "lre", "lre")
    assert len(facts) == 9_696 and skips.records == len({f.relation for f in facts}) == 26
    assert all(f.foil and f.foil != f.answer for f in facts)
    assert sum(not f.rephrasings for f in facts) == 38  # the two relations with the same template twice


def test_wikibio():
    facts, skips = whole(DATA / "knowedit" / "benchmark_WikiBio_wikibio-test-all.json", "wikibio")
    assert len(facts) == 306 and not skips.total
    assert all(f.target and f.answer is None for f in facts)
    assert facts[0].subject == "john russell reynolds" and facts[0].target.startswith("He received general education")


def test_the_golden_requests():
    facts, _ = whole(SHARED / "golden" / "edit" / "requests.json", "easyedit")
    assert len(facts) > 1 and all(f.target for f in facts)
