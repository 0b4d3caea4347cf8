"""Every format on a small file of ours in that format: what becomes of each key, what is junk, what is refused."""

import json
from collections import Counter
from pathlib import Path

import pytest

from kt.errors import BadFact, KtError
from kt.facts import FORMATS, Prompt, facts_from, load_facts, read_facts, read_record
from kt.facts.record import Record

HERE = Path(__file__).parent / "fixtures"
ITSELF = {
    "counterfact.json": "counterfact",
    "mquake.json": "mquake",
    "counterfact-tracing.jsonl": "counterfact-tracing",
    "zsre.json": "zsre",
    "zsre-portability.json": "zsre",
    "ripple.json": "ripple",
    "lre.json": "lre",
    "known.json": "known",
    "known-flags.json": "known",
    "qaedit.json": "qaedit",
    "knowedit.json": "knowedit",
    "easyedit.json": "easyedit",
    "wikibio.json": "wikibio",
    "akew.json": "akew",
    "bizsre.json": "bizsre",
    "conflictedit.json": "conflictedit",
    "unke.json": "unke",
    "hallueditbench.csv": "hallueditbench",
    "wikibigedit.json": "wikibigedit",
    "popqa.tsv": "popqa",
    "pararel.jsonl": "pararel",
    "cknowedit.json": "cknowedit",
    "rome.json": "kt",  # a plain request has no mark of its own, and our reader takes it
    "kt.jsonl": "kt",
    "kt.csv": "kt",
}


OTHER_SUBJECT = (
    "lre", "ripple", "conflictedit", "unke", "cknowedit", "kt.csv", "hallueditbench", "wikibio", "popqa", "pararel",
    "bizsre",
)  # fmt: skip
"""Formats whose subject stands under another key, need not be there, or is a column."""


def load(name, **options):
    loaded = read_facts(HERE / name, **options)
    return loaded.facts, loaded.skips


def reasons(skips):
    return dict(skips.reasons)


def records(name):
    text = (HERE / name).read_text(encoding="utf-8")
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    value = json.loads(text)
    return value if isinstance(value, list) else [value]


def test_every_format_has_a_fixture_and_every_fixture_a_format():
    assert set(ITSELF) == {path.name for path in HERE.iterdir()}
    assert set(ITSELF.values()) | {"rome", "bizsre-zh"} == set(FORMATS)


@pytest.mark.parametrize("name", ITSELF)
def test_a_fixture_is_sniffed_as_itself(name):
    _, skips = load(name)
    assert set(skips.formats) == {ITSELF[name]} and skips.formats.total() == skips.records


@pytest.mark.parametrize("name", [n for n in ITSELF if not n.endswith(("sv", "pararel.jsonl"))])
def test_no_other_data_set_claims_a_fixture(name):
    """The order of the table decides only between a data set and the looser formats that share its keys."""
    looser = {"kt", "easyedit"}
    claims = {f for f, known in FORMATS.items() if known.shows(Record(records(name)[0], "here"))}
    assert claims - looser in ({ITSELF[name]}, set()) and (claims - looser or ITSELF[name] in looser)


@pytest.mark.parametrize("name", ITSELF)
@pytest.mark.parametrize("format", FORMATS)
def test_forcing_a_format_reads_or_gives_one_line(name, format):
    try:
        facts = load_facts(HERE / name, format=format)
    except KtError as error:
        assert "\n" not in str(error) and error.exit_code == 2 and name in str(error)
    else:
        assert facts
        same = {FORMATS[f].family or f for f in (format, ITSELF[name])}
        prompt_subject_target = {"easyedit", "kt", "qaedit", "known", "counterfact-tracing", "cknowedit"}
        assert len(same) == 1 or same <= prompt_subject_target


@pytest.mark.parametrize("name", [n for n in ITSELF if not n.startswith(OTHER_SUBJECT)])
def test_a_record_without_its_subject_is_refused(name):
    record = records(name)[0]
    holder = record.get("requested_rewrite", record)
    (holder[0] if isinstance(holder, list) else holder).pop("subject")
    with pytest.raises(BadFact, match="'subject' is missing; the record has"):
        facts_from([record])


def test_counterfact():
    (first, second), skips = load("counterfact.json")
    assert (first.template, first.subject) == ("{} was built in", "the Oru lighthouse")
    assert (first.id, first.relation, first.answer, first.target) == ("11", "P131", "Tallinn", "Lisbon")
    assert first.neighbours[1] == Prompt("the Sild tower was built in", "Tallinn", kind="neighborhood")
    assert first.paraphrases == ("Fog rolled in. the Oru lighthouse stands in",)
    assert first.generation == ("Visitors come to the Oru lighthouse because",)
    assert second.answer is None and second.target == "cello"
    assert reasons(skips) == {"the target is the same as the old answer": 1}


def test_counterfact_tracing_takes_the_false_target_as_foil_and_drops_leading_spaces():
    (first, second), _ = load("counterfact-tracing.jsonl")
    assert (first.template, first.subject) == ("The mother tongue of {} is", "Ilse Kivi")
    assert (first.answer, first.foil, first.target, first.relation) == ("Finnish", "Korean", None, "P103")
    assert second.template == "{} is a citizen of" and second.as_request().target == "Peru"


def test_zsre_edits_to_the_first_answer():
    facts, skips = load("zsre.json")
    assert [f.id for f in facts] == ["0", "1", "3"]
    first = facts[0]
    assert (first.template, first.target, first.answer) == ("Which river does {} cross?", "Vltava", None)
    assert first.target_aliases == ("the Vltava", "Moldau") and first.rephrasings == ("What river runs under {}?",)
    assert reasons(skips) == {"empty answers": 1, "the subject is not in its prompt": 1}


def test_zsre_edits_to_alt_as_easyedit_does():
    facts, skips = load("zsre.json", zsre_target="alt")
    assert [(f.id, f.target, f.answer) for f in facts] == [("0", "Danube", "Vltava")]
    assert facts[0].answer_aliases == ("the Vltava", "Moldau") and facts[0].target_aliases == ()
    assert reasons(skips) == {
        "empty alt": 1,
        "empty answers": 1,
        "the target is the same as the old answer": 1,
        "the subject is not in its prompt": 1,
    }
    assert skips.first["empty alt"].endswith("zsre.json, record 2") and skips.records == 5
    assert str(skips).startswith("4 of 5 records skipped: 1 ") and "1 empty alt (first: " in str(skips)
    assert skips.to_dict()["skipped"] == 4 and skips.to_dict()["formats"] == {"zsre": 5}


def test_a_zsre_locality_question_gets_one_question_mark():
    facts, _ = load("zsre.json")
    assert [f.neighbours[0].prompt for f in facts[:1] + facts[2:]] == [
        "nq question: who wrote the song of the rivers?",
        "nq question: who is that?",
    ]
    assert facts[0].neighbours[0].answer == "Anna Beck" and facts[0].neighbours[0].kind == "nq_question"


def test_zsre_portability_follows_from_alt_and_is_read_with_it_alone():
    (fact,), skips = load("zsre-portability.json", zsre_target="alt")
    question = "Which river does the water under Kord Bridge join?"
    assert fact.hops == (Prompt(question, "Elbe", kind="One_Hop"),) and not skips.noted
    (fact,), skips = load("zsre-portability.json")
    assert fact.hops == () and "--zsre-target alt keeps it" in skips.noted[0]


def test_an_unknown_zsre_target_is_refused():
    with pytest.raises(BadFact, match="zsRE target 'both' is not understood; choose answer or alt"):
        load_facts(HERE / "zsre.json", zsre_target="both")


def test_knowedit_answers_are_a_text_a_list_or_lists_of_lists():
    (first, second, last), skips = load("knowedit.json")
    assert first.hops == (
        Prompt("The mayor of the place of death of Asta Lund is", "Bo Friis", None, "Reasoning", ("B. Friis", "Bo F.")),
        Prompt("The place of death of A. M. Lund is", "Aarhus", None, "Subject_Aliasing", ("Århus",)),
    )  # the one under Logical_Generalization has no answer, so it cannot be scored
    assert first.neighbours == (
        Prompt("The father of Asta Lund is", "Per Lund", None, "Relation_Specificity"),
        Prompt("Her hat is", "blue", None, "Relation_Specificity", ("navy",)),
    )
    teacher = Prompt("The teacher of Asta Lund, which is not Kai, is", "Eva", None, "Forgetfulness")
    assert second.neighbours == (teacher,) and second.answer == "rowing" and second.hops == ()
    assert first.answer is None and last.target == "green" and last.neighbours == ()
    assert reasons(skips) == {"the target is the same as the old answer": 1}


def test_easyedit_flat_nested_and_with_a_portability_question():
    (flat, nested), skips = load("easyedit.json")
    assert (
        flat.neighbours
        == nested.neighbours
        == (Prompt("The native language of Ana Gil is", "Spanish", kind="neighborhood"),)
    )
    assert (nested.answer, nested.answer_aliases) == ("Norwegian", ("Bokmål",))
    assert nested.hops[0].kind == "One_Hop" and nested.hops[0].answer == "the Netherlands" and flat.hops == ()
    assert reasons(skips) == {"empty target_new": 1}


def test_mquake_makes_a_fact_of_each_edit_and_asks_the_questions_once_after_the_last():
    (first, second), skips = load("mquake.json")
    assert (first.id, second.id) == ("3-1", "3-2") and first.hops == ()
    assert (first.prompt, first.answer, first.target) == ("Hana Ilves is married to", "Olav Sten", "Piet Rand")
    assert first.answer_aliases == ("O. Sten",) and first.target_aliases == ("P. Rand",)
    assert second.paraphrases == ("Where was Piet Rand born?",) and second.target_aliases == ("Oporto",)
    wording = "Where was the spouse of Hana Ilves born?"
    assert second.hops[0] == Prompt(wording, "Porto", "Oslo", "multi_hop", ("Oporto", "Porto, Portugal"))
    assert len(second.hops) == 2 and skips.records == 2 and skips.total == 1


def test_a_record_with_several_facts_is_not_one_fact():
    with pytest.raises(BadFact, match="holds 2 facts where one is needed"):
        read_record(records("mquake.json")[0], "here")


def test_ripple_reads_subject_and_target_from_the_sentence():
    (fact, recent), skips = load("ripple.json")
    assert fact.template == "The name of the country of citizenship of {} is" and fact.subject == "Lea of Thule"
    assert (fact.answer, fact.target, fact.target_aliases) == ("United Ostland", "United Mirovia", ("Mirovia",))
    assert (recent.template, recent.subject) == ("{} is followed by", "What Is Love")
    assert (recent.answer, recent.target) == (None, "Who Is He")
    assert reasons(skips) == {"no subject can be read from the edit's sentence": 1}


def test_ripple_keeps_every_family_and_the_published_misspelling():
    (fact, recent), _ = load("ripple.json")
    assert Counter(p.kind for p in fact.hops) == {
        "Logical_Generalization": 1,
        "Compositionality_I": 1,
        "Subject_Aliasing": 1,
        "Compositionality_II": 1,
    }
    assert Counter(p.kind for p in fact.neighbours) == {"Relation_Specificity": 1, "Forgetfulness": 1}
    assert fact.neighbours[0].aliases == ("Ada of Thule",)  # under "Relation_Specifity" in this record
    assert recent.neighbours[0].kind == "Relation_Specificity"
    capital = next(p for p in fact.hops if p.kind == "Compositionality_I")
    assert (capital.answer, capital.aliases) == ("Mirgrad", ("New Mirgrad", "NM"))


SENTENCES = {
    "The name of the mother of {} is": ("Bo", "Eva"),
    "The name of the head of government of {} is": ("the Kingdom of Ost", "Bo Friis"),
    "The place of birth of {} is": ("Bo Friis", "Mir"),
    "The names of the siblings of {} are": ("Bo", "Eva and Per"),
    "The name of the country which {} is associated with is": ("Isle of Ost", "Ost"),
    "The name of the continent which {} is part of is": ("Ost", "Mirovia"),
    "The name of the league which {} plays in is": ("FC Ost", "the League"),
    "The name of the sports team which {} is a member of is": ("Bo", "FC Ost"),
    "The name of the award {} won is": ("Bo", "the Cup"),
    "The number of children {} has is": ("Bo", "3"),
    "The name of the currency in {} is": ("Ost", "mirk"),
    "The name of the position held by {} is": ("Bo", "mayor"),
    "The name of the capital city of {} is": ("Ost", "Mir"),
    "{} is followed by": ("Song of Ost", "Song of Mir"),
    "{} follows": ("The Song", "The Hymn"),
}


@pytest.mark.parametrize("template", SENTENCES)
def test_ripple_sentences(template):
    subject, target = SENTENCES[template]
    (fact,) = facts_from([{"edit": {"prompt": f"{template.replace('{}', subject)} {target}."}}])
    assert (fact.template, fact.subject, fact.target) == (template, subject, target)


def test_an_is_inside_a_name_does_not_end_the_subject_where_questions_or_the_old_fact_tell():
    sentence = "The name of the author of This is Us is {}."
    edit = {"prompt": sentence.format("Bo"), "subject_id": "Q1"}
    asked = {"prompt": "The name of the editor of This is Us is", "answers": [{"value": "Eva"}], "subject_id": "Q1"}
    (fact,) = facts_from([{"edit": edit, "Relation_Specificity": [{"test_queries": [asked]}]}])
    assert (fact.subject, fact.target) == ("This is Us", "Bo")
    old = {"prompt": "The gender of Bo is What is new.", "original_fact": {"prompt": "The gender of Bo is old."}}
    (fact,) = facts_from([{"edit": old}])
    assert (fact.subject, fact.answer, fact.target) == ("Bo", "old", "What is new")
    old = {"prompt": sentence.format("Bo"), "original_fact": {"prompt": sentence.format("Eva")}}
    (fact,) = facts_from([{"edit": old}])
    assert (fact.subject, fact.answer, fact.target) == ("This is Us", "Eva", "Bo")


def test_lre_makes_a_fact_of_each_pair():
    facts, _ = load_lre()
    assert [(f.subject, f.answer) for f in facts] == [
        ("Ilva", "Queen Mira"), ("Ilva", "King Oro"), ("Sund", "Lady Fen"), ("Tarn", "king oro"),
    ]  # fmt: skip
    assert facts[0].template == "{} is ruled by" and facts[0].relation == "island ruler"
    assert facts[0].rephrasings == ("The ruler of {} is", "Who rules {}? It is")
    assert facts[0].answer_aliases == ("King Oro",) and facts[2].id == "island ruler 3"


def test_an_lre_foil_is_another_object_that_is_not_the_subjects_and_depends_on_no_order():
    facts, value = load_lre()
    objects = {f.answer for f in facts}
    assert facts[0].foil == facts[1].foil == "Lady Fen"  # "king oro" is the subject's own but for its case
    assert all(f.foil in objects and f.foil != f.answer for f in facts)
    (backwards,) = [{**value, "samples": value["samples"][::-1]}]
    assert {f.subject: f.foil for f in facts_from([backwards])} == {f.subject: f.foil for f in facts}
    many = [{"subject": f"Isle {n}", "object": o} for n in range(12) for o in ("A", "B", "C")[n % 3]]
    assert {f.foil for f in facts_from([{**value, "samples": many}])} == {"A", "B", "C"}
    assert len({f.foil for f in facts_from([{**value, "samples": many}]) if f.answer == "C"}) == 2
    alone = facts_from([{**value, "samples": value["samples"][:1]}])
    assert alone[0].foil is None


def load_lre():
    (value,) = records("lre.json")
    return load("lre.json")[0], value


def test_an_lre_sample_or_template_that_is_none_is_named():
    (value,) = records("lre.json")
    for change, words in [
        ({"samples": [{"subject": "Ilva"}]}, "sample 1: 'object' is missing"),
        ({"samples": {"Ilva": "Mira"}}, "'samples' is an object"),
        ({"prompt_templates": ["ruled by"]}, "the template 'ruled by' must hold one"),
        ({"prompt_templates": None, "prompt_templates_zs": []}, "'prompt_templates' is missing"),
    ]:
        with pytest.raises(KtError, match=words):
            facts_from([{**value, **change}])


def test_known_facts_are_traced_from_their_own_prompt_and_have_no_target():
    (fact,), skips = load("known.json")
    assert (fact.template, fact.answer, fact.target) == ("{} is located in the north of", "Sweden", None)
    assert reasons(skips) == {"the subject is not in its prompt": 1}


@pytest.mark.parametrize(("model", "ids"), [("acme/small-1b", ["0"]), ("small-1b", ["0"]), ("large-7b", ["0", "1"])])
def test_known_to_keeps_what_a_model_answers(model, ids):
    facts, skips = load("known-flags.json", known_to=model)
    assert [f.id for f in facts] == ids and reasons(skips) == ({f"not known to {model}": 1} if len(ids) == 1 else {})


def test_known_to_a_model_without_flags_lists_those_with():
    with pytest.raises(BadFact, match="'gpt2-xl' knows; the models with flags are: acme/small-1b, acme/large-7b"):
        load("known-flags.json", known_to="gpt2-xl")
    with pytest.raises(BadFact, match="only known_1000 records say which model knows them"):
        load("kt.jsonl", known_to="gpt2-xl")


def test_qaedit():
    (fact,), skips = load("qaedit.json")
    assert (fact.template, fact.target, fact.answer) == ("who painted the {}?", "Ida Holm", None)
    assert fact.rephrasings == ("Who is the painter of {}?",)
    asked = (("who sang it first", "Ben Aro"), ("when did it rain", "1994"))
    assert fact.neighbours == tuple(Prompt(text, answer, kind="loc") for text, answer in asked)
    assert reasons(skips) == {"the subject is not in its prompt": 1}


def test_our_own_records_are_the_same_from_csv_and_jsonl():
    (line,), _ = load("kt.jsonl")
    (row, second), skips = load("kt.csv")
    assert row == line and line.hops[0].kind == "Reasoning" and line.hops[0].aliases == ("S.",)
    assert line.answer_aliases == ("Mir-Grad",) and line.target_aliases == ("Süd",)
    assert second.rephrasings == ("It rules from", "The seat, of {}, is") and second.foil is None
    assert not skips.total


def test_what_users_write_themselves_is_refused_not_skipped():
    for format in ("kt", "rome"):
        with pytest.raises(BadFact, match="target 'oboe' is the same as the old answer"):
            load_with(target_new="oboe", format=format)
        with pytest.raises(BadFact, match="'target_new' is empty"):
            load_with(target_new=" ", format=format)


def load_with(format, **change):
    return facts_from([{**records("rome.json")[0], **change}], format)


def test_wikibio_edits_the_sentence_after_the_passage():
    (ada, mary), skips = load("wikibio.json")
    assert not skips.total and ada.subject == "ada lovelace" and ada.answer is None
    assert ada.prompt.endswith("Ada Lovelace was an English writer.")
    assert ada.target == "She wrote on Charles Babbage's Analytical Engine."
    assert ada.neighbours == (
        Prompt("The field of work of ada lovelace is", "mathematics", None, "Relation_Specificity", ()),
    )
    assert mary.neighbours == ()


def test_wikibio_names_its_own_key_in_an_error():
    with pytest.raises(BadFact, match="'labels'"):
        read_record({"text": "About ada.", "concept": "ada", "labels": {}}, "a.json, record 1")


def test_a_wikibio_record_without_its_concept_fits_no_format():
    record = records("wikibio.json")[0]
    record.pop("concept")
    with pytest.raises(BadFact, match=r"fit no known format|'subject' is missing"):
        facts_from([record])


def test_akew_answers_each_edits_question_with_its_paragraph():
    (lone, first, second), _ = load("akew.json")
    assert (lone.template, lone.answer) == ("Where was the {} built?", "Tallinn")
    assert lone.target == "The Oru lighthouse rose in Lisbon. Fog hid it for a year."
    assert lone.hops == (Prompt("Oru lighthouse rose in", "Lisbon", kind="triple"),)
    assert lone.neighbours == (Prompt("Sild tower was built in", "Tallinn", kind="neighborhood"),)
    assert [f.id for f in (first, second)] == ["5-1", "5-2"] and second.prompt == "Where was Piet Rand born?"
    assert [f.target for f in load("akew.json", limit=1)[0]] == [lone.target]
    question = "Where was the spouse of Hana Ilves born?"
    assert not first.hops and second.hops == (Prompt(question, "Porto", "Bergen", "multi_hop", ("Oporto",)),)


def test_bizsre_is_edited_in_one_language_and_asked_in_all():
    (whole, lone), skips = load("bizsre.json")
    assert (whole.prompt, whole.target, whole.answer) == ("Which river does Kord Bridge cross?", "Danube", "Vltava")
    asked = {hop.kind: (hop.answer, hop.original) for hop in whole.hops}
    assert asked == {
        "One_Hop": ("Elbe", None),
        "edit_zh": ("多瑙河", "伏尔塔瓦河"),
        "rephrase_zh": ("多瑙河", "伏尔塔瓦河"),
        "One_Hop_zh": ("易北河", None),
    }
    near = {each.kind: each.prompt for each in whole.neighbours}
    assert near["nq_question"].endswith("rivers?") and near["nq_question_zh"] == "nq question: 河流之歌的作者是谁？"
    # A translation that does not name its subject is left out, and counted; edited in, the record is.
    assert [hop.kind for hop in lone.hops] == ["One_Hop"] and any("'zh' part" in note for note in skips.notes)
    (chinese,), skips = load("bizsre.json", format="bizsre-zh")
    assert (chinese.subject, chinese.target) == ("科德桥", "多瑙河") and skips.total == 1
    assert {hop.kind for hop in chinese.hops} == {"One_Hop", "edit_en", "rephrase_en", "One_Hop_en"}


def test_conflictedit_and_roundedit():
    (child, father, genre), _ = load("conflictedit.json")
    assert (child.prompt, child.answer, child.target) == ("The child of Per Lund is", "Asta Lund", "Kai Friis")
    assert (father.id, father.paraphrases, father.relation) == ("0-2", ("Who is the father of Kai Friis?",), "P22")
    assert (genre.target, genre.answer, genre.answer_aliases) == ("humor", "novel", ("satire",))


def test_unke_edits_whole_questions_where_no_subject_is_named():
    (whole, named), skips = load("unke.json")
    assert (whole.template, whole.subject) == ("{}", "What did Ida Holm paint?")
    assert whole.target.startswith("Ida Holm painted") and whole.paraphrases == ("Which works are by Ida Holm?",)
    assert [(p.prompt, p.answer) for p in whole.hops] == [
        ("What did Ida Holm paint with?", "oil"), ("And how often?", "twice")
    ]  # fmt: skip
    assert named.template == "Who was {}?" and named.rephrasings == ("Tell me about {}.",)
    assert "its whole prompt stands for it: 1 times" in skips.noted[0]


def test_hallueditbench():
    (fact,), _ = load("hallueditbench.csv")
    assert (fact.template, fact.subject) == ("What is the country of {}?", "Ostby")
    assert (fact.target, fact.answer) == ("Ostland", "Ostby is a village")
    assert fact.rephrasings == ("Which country is {} in?",)
    assert fact.neighbours == (Prompt("What is a well-known beach in Ostby?", kind="locality"),)
    assert [(p.kind, p.answer) for p in fact.hops] == [
        ("2_hops", "Mir"), ("yes_question", "Yes"), ("no_question", "No"), ("reversed_relation", "Ostby")
    ]  # fmt: skip


def test_wikibigedit():
    (fact, bare), skips = load("wikibigedit.json")
    assert (fact.template, fact.target, fact.answer) == ("Who is the head of state of {}?", "Eva Lind", None)
    assert [(p.kind, p.answer) for p in fact.hops] == [("personas", "Eva Lind"), ("mhop", "Mir")]
    assert fact.neighbours == (Prompt("Who leads Mirovia?", "Bo Friis", kind="loc"),)
    assert bare.hops == () and not skips.total


def test_popqa():
    (fact,), _ = load("popqa.tsv")
    assert (fact.id, fact.template, fact.answer) == ("4222362", "What is {}'s occupation?", "politician")
    assert fact.answer_aliases == ("political leader",) and fact.target is None


def test_pararel_words_the_facts_of_trex_from_left_to_right():
    (fact,), skips = load("pararel.jsonl")
    assert (fact.template, fact.rephrasings) == ("{} was born in", ("{} is originally from",))
    assert (fact.id, fact.subject, fact.answer, fact.relation) == ("u-1", "Asta Lund", "Aarhus", "P19")
    assert skips.records == 1


def test_pararel_in_a_folder_of_its_two_kinds_of_files(tmp_path):
    fact = {"uuid": "u-1", "sub_label": "Asta Lund", "obj_label": "Aarhus"}
    for name, record in (("trex/P19.jsonl", fact), ("z/graphs_json/P19.jsonl", {"pattern": "[X] was born in [Y]."})):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(json.dumps(record))
    (read,) = load_facts(tmp_path)
    assert (read.template, read.relation) == ("{} was born in", "P19")
    with pytest.raises(BadFact, match=r"no wording of relation 'P19' that ends in \[Y\]; give a folder"):
        load_facts(tmp_path / "trex")


def test_cknowedit():
    (idiom, capital), _ = load("cknowedit.json")
    assert (idiom.template, idiom.answer, idiom.target) == ("{}", "画得很好", "做多余的事")
    assert idiom.hops == (Prompt("“画蛇添足”的反义词是", "恰到好处", kind="portability"),)
    assert capital.template == "{}的首都是" and capital.rephrasings == ("{}国的首都叫",)
    assert capital.neighbours == (Prompt("南明的首都是", "南城", kind="locality"),)


def test_a_special_token_that_stands_for_no_answer_is_named_where_a_users_record_has_one(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{"prompt": "{} is in", "subject": "Rome", "answer": "Italy", "target": "</s>"}]))
    loaded = read_facts(path)
    assert loaded.facts[0].target is None
    assert reasons(loaded.skips) | dict(loaded.skips.notes) == {"target '</s>', a special token, is read as none": 1}
