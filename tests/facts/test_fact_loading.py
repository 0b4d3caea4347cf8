"""Facts from files: every format, every way a file can be wrong, and no other exception than ours."""

import json
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kt.errors import BadFact, BadFile, KtError, SubjectNotFound
from kt.facts import FORMATS, Fact, Prompt, fact_by_hand, facts_from, load_facts, parse_limit, read_record

OWN = {
    "id": "c1",
    "relation": "capital",
    "prompt": "The capital of {} is",
    "subject": "France",
    "answer": "Paris",
    "foil": "Rome",
    "paraphrases": ["{}'s capital is", "Its seat of government is"],
    "neighbourhood": [{"prompt": "The capital of Italy is", "answer": "Rome"}, "The capital of Spain is"],
    "portability": [{"prompt": "The river of France's capital is the", "answer": "Tiber", "original": "Seine"}],
    "generation": ["France is"],
}
ROME = {
    "prompt": "The mother tongue of {} is",
    "subject": "Danielle Darrieux",
    "target_new": {"str": "English", "id": "Q1860"},
    "target_true": {"str": "French", "id": "Q150"},
}
COUNTERFACT = {
    "case_id": 7,
    "pararel_idx": 2796,
    "requested_rewrite": {**ROME, "relation_id": "P103"},
    "paraphrase_prompts": ["Shayna does this and Yossel goes still and dies. Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Leon Blum is", "The native language of Montesquieu is"],
    "attribute_prompts": ["J.R.R. Tolkien is a native speaker of"],
    "generation_prompts": ["Danielle Darrieux's mother tongue is"],
}
EASYEDIT = {
    "case_id": 0,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": [["French", "French language"]],
    "rephrase_prompt": "Where Danielle Darrieux is from, people speak",
    "locality": {"neighborhood": {"prompt": "Michel Rocard is a native speaker of", "ground_truth": "French"}},
    "portability": {
        "one_hop": {"prompt": ["Danielle Darrieux grew up in", "She reads"], "ground_truth": ["England", "Dickens"]}
    },
}
EASYEDIT_FLAT = {
    **{k: EASYEDIT[k] for k in ("case_id", "prompt", "target_new", "subject")},
    "ground_truth": "French",
    "rephrase_prompt": "Where Danielle Darrieux is from, people speak",
    "locality_prompt": "Michel Rocard is a native speaker of",
    "locality_ground_truth": "French",
}


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fails(path, *words, kind=KtError, **options):
    with pytest.raises(kind) as caught:
        load_facts(path, **options)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2
    for word in words:
        assert word in message
    return message


def test_own_record():
    (fact,) = facts_from([OWN])
    assert fact == Fact(
        "The capital of {} is",
        "France",
        answer="Paris",
        foil="Rome",
        id="c1",
        relation="capital",
        rephrasings=("{}'s capital is", "Its seat of government is"),
        neighbours=(Prompt("The capital of Italy is", "Rome"), Prompt("The capital of Spain is")),
        hops=(Prompt("The river of France's capital is the", "Tiber", "Seine"),),
        generation=("France is",),
    )
    assert fact.paraphrases == ("France's capital is", "Its seat of government is")


@pytest.mark.parametrize("format", [None, "rome", "kt"])
def test_rome_request_is_accepted_as_it_is(format):
    (fact,) = facts_from([ROME], format)
    assert (fact.answer, fact.target, fact.id) == ("French", "English", "0")
    plain = {**ROME, "target_new": "English"}
    plain.pop("target_true")
    (fact,) = facts_from([plain], format)
    assert (fact.answer, fact.target) == (None, "English")


def test_counterfact_record():
    (fact,) = facts_from([COUNTERFACT])
    assert (fact.id, fact.relation, fact.answer, fact.target) == ("7", "P103", "French", "English")
    assert fact.neighbours[0] == Prompt("The mother tongue of Leon Blum is", "French", kind="neighborhood")
    assert fact.paraphrases == tuple(COUNTERFACT["paraphrase_prompts"])
    assert "{}" in fact.rephrasings[0]
    assert fact.generation == ("Danielle Darrieux's mother tongue is",)


def test_easyedit_records():
    nested, flat = facts_from([EASYEDIT, {**EASYEDIT_FLAT, "case_id": 1}])
    assert nested.template == flat.template == "The mother tongue of {} is"
    assert nested.answer == flat.answer == "French" and nested.target == flat.target == "English"
    neighbour = Prompt("Michel Rocard is a native speaker of", "French", kind="neighborhood")
    assert nested.neighbours == flat.neighbours == (neighbour,)
    hops = (("Danielle Darrieux grew up in", "England"), ("She reads", "Dickens"))
    assert nested.hops == tuple(Prompt(text, answer, kind="one_hop") for text, answer in hops)
    assert nested.answer_aliases == ("French language",)
    assert flat.paraphrases == (EASYEDIT_FLAT["rephrase_prompt"],)


def test_null_values_count_as_absent():
    (fact,) = facts_from([{**OWN, "foil": None, "ground_truth": None, "paraphrases": None}])
    assert fact.foil is None and fact.rephrasings == ()


def test_the_subject_is_marked_at_its_last_occurrence_in_a_filled_prompt():
    fact = fact_by_hand("Paris Hilton's Paris is in", "Paris", "France")
    assert fact.template == "Paris Hilton's {} is in" and fact.prompt == "Paris Hilton's Paris is in"


@pytest.mark.parametrize("name", ["list.json", "data.json", "one.json", "lines.jsonl"])
def test_files(tmp_path, name):
    content = {
        "list.json": "\ufeff" + json.dumps([OWN, ROME]),
        "data.json": json.dumps({"version": 1, "data": [OWN, ROME]}),
        "one.json": json.dumps(OWN),
        "lines.jsonl": "\ufeff" + json.dumps(OWN) + "\r\n\n" + json.dumps(ROME),
    }[name]
    facts = load_facts(write(tmp_path, name, content))
    assert [f.id for f in facts] == ["c1", "1"][: len(facts)] and len(facts) == (1 if name == "one.json" else 2)


def test_limit(tmp_path):
    lines = "\n".join(json.dumps({**ROME, "subject": f"S{i}"}) for i in range(1, 31))
    path = write(tmp_path, "many.jsonl", lines + "\n{broken")
    assert [f.subject for f in load_facts(path, limit=3)] == ["S1", "S2", "S3"]
    assert [f.subject for f in load_facts(path, limit="10-12")] == ["S10", "S11", "S12"]
    assert [f.id for f in load_facts(path, limit="10-11")] == ["9", "10"]
    fails(path, "line 31", kind=BadFile)
    fails(write(tmp_path, "few.jsonl", json.dumps(OWN)), "no record 5", kind=BadFile, limit="5-6")


@pytest.mark.parametrize("limit", [0, -1, "x", "5-3", "0-3", "3-", "-3", "", True, 1.5, "1-2-3", "٣", 10**12])
def test_a_limit_that_is_none(limit):
    with pytest.raises(BadFact, match="limit"):
        parse_limit(limit)


def test_doubled_ids_get_a_suffix():
    records = [{**OWN, "id": name} for name in ("a", "a", "a-2", "a", "b")]
    assert [f.id for f in facts_from(records)] == ["a", "a-3", "a-2", "a-4", "b"]
    assert facts_from(facts_from(records)) == facts_from(records)


BROKEN = {
    "missing subject": ({"prompt": "a {}"}, "'subject' is missing; the record has 'prompt'"),
    "subject not in prompt": ({"prompt": "The capital is", "subject": "France"}, "'France' does not occur"),
    "two places": ({"prompt": "{} and {}", "subject": "France"}, "with one {}"),
    "empty subject": ({"prompt": "a {}", "subject": " "}, "'subject' is empty"),
    "no prompt": ({"target_new": "x", "subject": "y", "ground_truth": "z"}, "'prompt' is missing"),
    "empty target": ({**ROME, "target_new": ""}, "'target_new' is empty"),
    "empty nested target": ({**ROME, "target_new": {"str": " "}}, "'target_new' is empty"),
    "empty answer": ({**OWN, "answer": ""}, "'answer' is empty"),
    "identical target": ({**ROME, "target_new": "French"}, "target 'French' is the same as the old answer"),
    "identical foil": ({**OWN, "foil": "Paris "}, "foil 'Paris' is the same"),
    "no target": ({k: v for k, v in EASYEDIT.items() if k != "target_new"}, "'target_new' is missing"),
    "object for text": ({**OWN, "answer": {}}, "'answer' is an object; it must be a text"),
    "bool": ({**OWN, "subject": True}, "'subject' is true or false"),
    "number in list": ({**OWN, "paraphrases": ["a", 1]}, "'paraphrases' holds a number"),
    "object for list": ({**OWN, "neighbourhood": {"prompt": "x"}}, "must be a list of objects"),
    "list of lists": ({**OWN, "neighbourhood": [["x"]]}, "must be an object"),
    "neighbour without prompt": ({**OWN, "neighbourhood": [{"answer": "x"}]}, "neighbourhood: 'prompt' is missing"),
    "odd id": ({**OWN, "id": [1]}, "the id is a list"),
    "misspelt": ({**OWN, "paraphrases": None, "paraphrase": ["x"]}, "did you mean 'paraphrases'"),
    "a Fact's own name": ({**OWN, "neighbourhood": None, "neighbours": []}, "did you mean 'neighbourhood'"),
    "the same in a request": ({**ROME, "rephrasings": ["x"]}, "did you mean 'paraphrases'"),
    "unknown": ({"question": "a", "label": "b"}, "the keys 'question', 'label' fit no known format; "),
    "no keys": ({}, "the keys (none) fit no known format"),
    "not an object": ("France", "a record must be an object"),
    "rewrite of text": ({"requested_rewrite": "x"}, "must be an object"),
    "surrogate": ({**OWN, "answer": "\ud800"}, "surrogate"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_record_is_named_with_its_place(tmp_path, case):
    record, words = BROKEN[case]
    lines = write(tmp_path, "facts.jsonl", "\n\n" + json.dumps(record))
    fails(lines, words, f"{lines}, line 3", kind=(BadFact, SubjectNotFound))
    whole = write(tmp_path, "facts.json", json.dumps([record]))
    fails(whole, words, f"{whole}, record 1", kind=(BadFact, SubjectNotFound))


def test_the_nearest_format_is_named_when_none_fits(tmp_path):
    record = {"name": "r", "prompt_templates": ["{} is"], "pairs": []}
    message = fails(write(tmp_path, "a.json", json.dumps([record])), kind=BadFact)
    assert "the nearest is lre (name, prompt_templates, samples" in message and len(message) < 300
    message = fails(write(tmp_path, "a.json", '[{"a": "?"}]'), kind=BadFact)
    assert "ours has prompt and subject; kt ls datasets lists all" in message


def test_the_format_that_was_guessed_is_named_in_an_error(tmp_path):
    path = write(tmp_path, "a.json", json.dumps([{**EASYEDIT, "subject": True}]))
    fails(path, "(read as easyedit; --format names another)")
    assert "read as" not in fails(path, format="easyedit")


def test_an_unknown_or_wrong_format_is_refused(tmp_path):
    path = write(tmp_path, "a.json", json.dumps([OWN]))
    fails(path, "unknown format 'csv'", "easyedit", format="csv")
    fails(path, "'target_new' is missing", format="easyedit")
    fails(path, "'requested_rewrite' holds null", format="counterfact")


FILES = {
    "empty.json": (b"", "is empty"),
    "blank.json": (b" \n", "is empty"),
    "empty.jsonl": (b"\n\n", "holds no facts"),
    "nothing.json": (b"[]", "holds no facts"),
    "broken.json": (f'[{json.dumps(OWN)},\n {{"prompt" 2}}]'.encode(), "line 2, column 12"),
    "broken.jsonl": (json.dumps(OWN).encode() + b'\n{"prompt": }\n', "line 2: not JSON at column 12"),
    "lines.json": (b'{"a": 1}\n{"a": 2}', "line 2, column 1: Extra data; one record per line needs the ending .jsonl"),
    "nul.json": (b"[\0]", "NUL"),
    "nul.jsonl": (b"{}\0", "NUL"),
    "latin.json": ('[{"a": "é"}]'.encode("latin-1"), "not UTF-8 at byte 8"),
    "latin.jsonl": ('{"a": "é"}'.encode("latin-1"), "line 1: not UTF-8"),
    "utf16.json": ("[]".encode("utf-16"), "UTF-16"),
    "text.json": (b'"France"', "top level is a text"),
    "number.json": (b"3", "top level is a number"),
    "object.json": (b'{"a": []}', "top level is an object"),
    "deep.json": (b"[" * 100_000, "brackets too deep"),
    "long.json": (b"[" + b"9" * 10_000 + b"]", "number too long"),
    "facts.xml": (b"<a/>", ".json, .jsonl, .ndjson, .csv, .tsv, .parquet files"),
    "list.jsonl": (b"[1]", "line 1: a record must be an object"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named_with_its_place(tmp_path, name):
    content, words = FILES[name]
    path = write(tmp_path, name, content)
    fails(path, words, str(path))


def test_files_that_are_not_there(tmp_path):
    fails(tmp_path / "no.json", "does not exist", kind=BadFile)
    (tmp_path / "folder.json").mkdir()
    fails(tmp_path / "folder.json", "is a folder without .json", kind=BadFile)
    fails("", ".json, .jsonl, .ndjson, .csv, .tsv, .parquet files", kind=BadFile)


def test_a_hub_source_without_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails("hf:owner/name", "pip install 'kt-interp[data]'", kind=BadFile)


def test_a_dataset_is_read_through_datasets(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path, "facts.jsonl", json.dumps(OWN) + "\n" + json.dumps({**OWN, "id": "c2", "foil": None}))
    facts = load_facts(f"hf:{tmp_path}:facts.jsonl")
    assert [f.id for f in facts] == ["c1", "c2"] and facts[0] == facts_from([{**OWN}])[0]
    fails(f"hf:{tmp_path}:none.jsonl", "cannot be read after record 0", kind=BadFile)
    fails("hf:", "names no dataset", kind=BadFile)


def test_fact_by_hand():
    fact = fact_by_hand(" The capital of {} is ", "France", "Paris", foil="Rome", target="Lyon")
    assert fact == Fact("The capital of {} is", "France", "Paris", "Rome", "Lyon", id="by-hand")
    for arguments, words in [
        (("The capital is", "France"), "'France' does not occur"),
        (("{} is", ""), "'subject' is empty"),
        (("{} is", "x", "y", "y"), "foil 'y' is the same"),
        (("{} is", "x", "y", None, ""), "'target' is empty"),
    ]:
        with pytest.raises(KtError, match=words):
            fact_by_hand(*arguments)


def test_a_fact_gives_its_parts_by_the_names_of_records():
    fact = Fact("The capital of {} is", "France", "Paris", target="Rome", neighbours=[Prompt("Madrid is in", "Spain")])
    fact = Fact(
        prompt="The capital of {} is",
        subject="France",
        target_new=fact.target_new,
        target_true=fact.target_true,
        neighbourhood=fact.neighbourhood,
        portability=[Prompt("{}'s mayor lives in", "Rome")],
    )
    assert (fact.target_new, fact.target_true) == ("Rome", "Paris") == (fact.target, fact.answer)
    assert fact.neighbourhood == fact.neighbours == (Prompt("Madrid is in", "Spain"),)
    assert fact.portability == fact.hops == (Prompt("France's mayor lives in", "Rome"),)


KEYS = st.sampled_from(sorted({*OWN, *ROME, *COUNTERFACT, *EASYEDIT, *EASYEDIT_FLAT, "str", "target", "x"}))
TEXTS = st.sampled_from(["a {} b", "a", "{}", "", " ", "b", "\ud800"])
LEAVES = st.sampled_from([None, True, 0, -1, 10**30, 0.5, float("nan")]) | TEXTS
JSON = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS | TEXTS, v, max_size=5), max_leaves=10
)


@settings(max_examples=150, deadline=None)
@given(JSON, st.sampled_from([None, *FORMATS]))
def test_any_json_value_gives_facts_or_our_error(value, format):
    records = value if isinstance(value, list) else [value]
    check(lambda: facts_from(records, format))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([OWN, ROME, COUNTERFACT, EASYEDIT, EASYEDIT_FLAT]), st.data())
def test_any_change_of_a_good_record_gives_facts_or_our_error(record, data):
    record = {**record, data.draw(st.sampled_from(sorted(record))): data.draw(JSON)}
    check(lambda: [read_record(record, "here")])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | JSON.map(lambda v: json.dumps(v).encode()), st.sampled_from(["json", "jsonl"]))
def test_any_bytes_give_facts_or_our_error(tmp_path, content, ending):
    check(lambda: load_facts(write(tmp_path, f"any.{ending}", content)))


def check(read):
    try:
        facts = read()
    except KtError as error:
        assert "\n" not in str(error) and error.exit_code == 2
    else:
        assert all(isinstance(f, Fact) and f.subject and f.prompt.encode() for f in facts)


def test_the_embedded_facts_can_be_traced_edited_and_judged():
    facts = load_facts()
    assert len({f.id for f in facts}) == len(facts) >= 1500
    assert all(f.answer and f.foil and f.rephrasings and f.neighbours for f in facts)
    assert load_facts("demo", limit="2-3") == facts[1:3]
