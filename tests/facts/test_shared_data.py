"""The real data files, read whole where they lie beside this checkout (`pytest -m data`)."""

from pathlib import Path

import pytest

from kt.editing.resolve import without_contradictions
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


def eyed(facts, expected):
    """Five records, compared with what was read by eye: index -> (subject, old answer, beginning of the target)."""
    for index, (subject, answer, target) in expected.items():
        fact = facts[index]
        assert (fact.subject, fact.answer, (fact.target or "")[: len(target)]) == (subject, answer, target), index


def test_counterfact_in_easyedits_form():
    facts, skips = whole(DATA / "counterfact-edit.json", "easyedit")
    assert len(facts) == 10_000 and not skips.total
    assert all(f.answer and f.target and len(f.neighbours) == len(f.rephrasings) == 1 for f in facts)
    expected = {
        0: ("Danielle Darrieux", "French", "English"),
        2500: ("James Franck", "physics", "ecology"),
        5000: ("Christiaan Snouck Hurgronje", "Islam", "Buddhism"),
        7500: ("Palmer Archipelago", "Antarctica", "Asia"),
        9999: ("Subair", "actor", "composer"),
    }
    eyed(facts, expected)


def test_qaedit():
    facts, skips = whole(DATA / "QAEdit_inter_1k.json", "qaedit")
    assert len(facts) == 1_000 and not skips.total
    assert all(f.target and len(f.neighbours) == 5 and len(f.rephrasings) == 1 for f in facts)
    expected = {
        0: ("most 70 point games in nba history", None, "Wilt Chamberlain *"),
        250: ("kiddies story book character", None, "Noddy"),
        500: ("fire detector", None, "optical smoke detector"),
        750: ("women's Skeleton Bob at the 2010 Vancouver Winter Olympics", None, "Amy Williams"),
        999: ("pakora", None, "Deep-fried in batter"),
    }
    eyed(facts, expected)


def test_known_facts_and_those_that_a_model_knows():
    source = DATA / "known_1000_model_flags.json"
    facts, skips = whole(source, "known")
    assert len(facts) == 1_209 and not skips.total and all(f.answer for f in facts)
    expected = {
        0: ("Vinson Massif", "Antarctica", ""),
        302: ("Russian Post", "Moscow", ""),
        604: ("National Memorial Cemetery of the Pacific", "Honolulu", ""),
        906: ("Bundesautobahn 6", "Germany", ""),
        1208: ("Ballers", "HBO", ""),
    }
    eyed(facts, expected)
    known, skips = whole(source, "known", known_to="Qwen3-4B-Instruct-2507")
    assert len(known) == 700 and skips.reasons == {"not known to Qwen3-4B-Instruct-2507": 509}


def test_lre_relations():
    facts, skips = whole(DATA / "lre", "lre")
    assert len(facts) == 9_696 and skips.records == len({f.relation for f in facts}) == 26
    assert all(f.foil and f.foil != f.answer for f in facts)
    expected = {
        0: ("New York City", "United States", ""),
        2424: ("Yovkov Point", "Antarctica", ""),
        4848: ("Silvo Lahtela", "Helke Sander", ""),
        7272: ("Marcus Marek", "linebacker", ""),
        9695: ("Star-Lord", "Peter Quill", ""),
    }
    eyed(facts, expected)
    assert sum(not f.rephrasings for f in facts) == 38  # the two relations with the same template twice


def test_wikibio():
    facts, skips = whole(DATA / "knowedit" / "benchmark_WikiBio_wikibio-test-all.json", "wikibio")
    assert len(facts) == 306 and not skips.total
    assert all(f.target and f.answer is None for f in facts)
    expected = {
        0: ("john russell reynolds", None, "He received general education"),
        76: ("twila shively", None, "An outfielder, she played"),
        153: ("frank abagnale", None, "He became one of the most famous impostors"),
        229: ("kenan hasagić", None, "At the age of 16, he made his debut"),
        305: ("ted childs", None, "Whilst there, he produced The Sweeney"),
    }
    eyed(facts, expected)


def test_knowedit_zsre():
    facts, skips = whole(DATA / "knowedit" / "benchmark_ZsRE_ZsRE-test-all.json", "knowedit")
    same, absent = "the target is the same as the old answer", "the subject is not in its prompt"
    assert skips.records == 1_304 and skips.reasons == {same: 43, absent: 3} and len(facts) == 1_258
    expected = {
        0: ("Epaspidoceras", "Aspidoceratidae", "Noctuidae"),
        314: ("Matthew Brend", "Nicholas Brend", "Brendan Brend"),
        629: ("Verdala Palace", "Girolamo Cassar", "Pietro da Cortona"),
        943: ("Geoffrey Keynes", "John Neville Keynes", "John Keynes, 7th Earl"),
        1257: ("Another Mother Further", "Mother's Finest", "Cher"),
    }
    eyed(facts, expected)


def test_knowedit_counterfact():
    facts, skips = whole(DATA / "knowedit" / "benchmark_wiki_counterfact_train_cf.json", "knowedit")
    assert skips.records == 1_428 and len(facts) == 1_422
    expected = {
        0: ("Goursez Vreizh", "France", "Franche-Comté"),
        355: ("Shetuken", "Qing dynasty", "Giza"),
        711: ("Howard R. Bayne", "male", "trans woman"),
        1066: ("list of earthquakes in 2006", "list of earthquakes in 2007", "Chaula"),
        1421: ("Suzanne C Bart", "female", "transgender"),
    }
    eyed(facts, expected)


def test_knowedit_recent():
    loaded = read_facts(DATA / "knowedit" / "benchmark_wiki_recent_recent_train.json")
    assert len(loaded.facts) == loaded.skips.records == 570 and set(loaded.skips.formats) == {"knowedit", "easyedit"}
    expected = {
        0: ("Ingrīda Amantova", None, "female"),
        142: ("EUR Palasport", None, "Europe"),
        285: ("Oliver Held", None, "Bundesliga"),
        427: ("Renaud Robert", None, "Bordeaux Montaigne University"),
        569: ("John Diffley", None, "Major League Soccer"),
    }
    eyed(loaded.facts, expected)


def test_mquake_hard():
    facts, skips = whole(DATA / "mquake" / "MQuAKE-hard.json", "mquake")
    assert len(facts) == 1_716 and skips.records == 429 and sum(bool(f.hops) for f in facts) == 429
    expected = {
        0: ("Hey Jude", "The Beatles", "Madonna"),
        429: ("goalkeeper", "association football", "Gaelic football"),
        858: ("Steve Jobs", "United States of America", "South Korea"),
        1287: ("Italy", "Europe", "Oceania"),
        1715: ("Italy", "Rome", "Duluth"),
    }
    eyed(facts, expected)
    with pytest.warns(UserWarning, match=r"2 of 1,716 requests contradict .* of 2 chains \(8563-1, 8695-1;"):
        together = without_contradictions(facts)
    assert len(together) == 1_714 and sum(bool(f.hops) for f in together) == 427


def test_ripples_sentences():
    popular, skips = whole(DATA / "ripple" / "popular_prompts.json", "ripple")
    assert len(popular) == 884 and skips.records == 885 and skips.reasons == {"empty target": 1}
    expected = {
        0: ("Leonardo DiCaprio", None, "United States of America"),
        221: ("Starlink", None, "United States of America"),
        442: ("Naga Chaitanya", None, "Filmfare Awards South"),
        663: ("Mae Martin", None, "non-binary"),
        883: ("Prince Edward, Duke of Kent", None, "Princess Marina of Greece and Denmark"),
    }
    eyed(popular, expected)
    random, skips = whole(DATA / "ripple" / "random_prompts.json", "ripple")
    assert len(random) == 1_920 and skips.records == 1_922 and skips.reasons == {"empty target": 2}
    expected = {
        0: ("꼠", None, "꼟"),
        960: ("Laura A Dada", None, "researcher"),
        1440: ("Catherine J Reynolds", None, "female"),
        1919: ("Suzanne C Bart", None, "female"),
    }
    eyed(random, expected)
    assert random[480].subject.startswith("Indeterminate Human") and random[480].target == "Connie Celum"


def test_wise():
    facts, skips = whole(DATA / "wise" / "temporal-edit.json", "easyedit")
    assert len(facts) == 75 and not skips.total and all(len(f.rephrasings) == len(f.neighbours) == 1 for f in facts)
    expected = {
        0: ("Tesla, Inc.,", None, "originally known as Tesla Motors"),
        18: ("Genetic engineering,", None, "also referred to as genetic modification"),
        37: ("The Dark", None, "Web is a part of the internet"),
        56: ("Rashida Tlaib,", None, "a Palestinian-American politician"),
        74: ("Waymo, formerly", None, "known as the Google Self-Driving Car Project"),
    }
    eyed(facts, expected)


def test_the_golden_requests():
    facts, _ = whole(SHARED / "golden" / "edit" / "requests.json", "easyedit")
    assert len(facts) > 1 and all(f.target for f in facts)
