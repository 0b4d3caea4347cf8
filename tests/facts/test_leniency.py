"""Files as they really come: what is read though it is written oddly, what is left out and counted, what is refused."""

import csv
import gzip
import io
import json
import tracemalloc
from dataclasses import replace

import pytest

from kt.errors import BadFact, BadFile, KtError
from kt.evaluation.metrics import record_values
from kt.evaluation.samples import samples_of
from kt.facts import Prompt, facts_from, load_facts, read_facts

OWN = {"prompt": "The capital of {} is", "subject": "France", "answer": "Paris", "target": "Lyon"}
EASY = {"prompt": "The capital of France is", "subject": "France", "target_new": "Lyon", "ground_truth": "Paris"}
ZSRE = {"subject": "Ost", "src": "Who rules Ost?", "rephrase": "Ost is ruled by", "alt": "Bo", "answers": ["Eva"]}


def lines(path, *records):
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    return path


def one(tmp_path, record, **options):
    loaded = read_facts(lines(tmp_path / "a.jsonl", record), **options)
    return loaded.facts[0], [note.partition(":")[0] for note in loaded.skips.noted]


def fails(source, *words, **options):
    with pytest.raises(KtError) as caught:
        load_facts(source, **options)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def test_numbers_are_read_as_they_are_written(tmp_path):
    fact, notes = one(tmp_path, {**OWN, "answer": 1969, "target": 1970.0, "id": 7.0})
    assert (fact.answer, fact.target, fact.id) == ("1969", "1970", "7")
    assert notes == ["a number in 'answer', read as text", "a number in 'target', read as text"]
    fact, _ = one(tmp_path, {**EASY, "target_new": 12.5, "ground_truth": [10, "ten"], "case_id": 3.5})
    assert (fact.target, fact.answer, fact.answer_aliases, fact.id) == ("12.5", "10", ("ten",), "3.5")
    fails(lines(tmp_path / "b.jsonl", {**OWN, "answer": True}), "'answer' is true or false")


def test_blank_and_null_pairs_are_left_out_and_counted(tmp_path):
    own = {**OWN, "paraphrases": [None, "{}'s capital is", " "], "neighbourhood": [None, {"prompt": ""}, "Rome is"]}
    fact, notes = one(tmp_path, own)
    assert len(fact.rephrasings) == len(fact.neighbours) == 1
    assert notes == ["blank or null in 'paraphrases', left out", "blank or null in 'neighbourhood', left out"]
    blank = {"prompt": ["", "Rome is in", "Oslo is in"], "ground_truth": ["x", "Italy", None]}
    fact, notes = one(tmp_path, {**EASY, "locality": {"near": blank, "none": [None]}, "portability": {"far": blank}})
    assert fact.neighbours == (Prompt("Rome is in", "Italy", kind="near"), Prompt("Oslo is in", kind="near"))
    assert fact.hops == (Prompt("Rome is in", "Italy", kind="far"),)
    assert "a portability prompt without an answer, left out" in notes
    (fact,) = facts_from([{**OWN, "foil": float("nan"), "relation": float("nan")}])
    assert fact.foil is None and fact.relation == ""


ANSWERLESS = {
    "unke": {"question": "Who?", "answer": "Bo", "para_question": "Who is it?", "sub_question": ["a?"],
             "sub_answer": [""]},
    "akew": {"requested_rewrite": {"question": "Who is Bo?", "subject": "Bo", "fact_new_uns": "Him.",
             "unsfact_triplets_GPT": [{"prompt": "{} is", "subject": "Bo", "target": " "}]}},
    "hallueditbench": {"question": "Who is Bo?", "subject": "Bo", "object": "x", "question_2hop": "a?",
                       "answer_2hop": None},
    "wikibigedit": {"subject": "Bo", "update": "Who is Bo?", "ans": "x", "mhop": "a?"},
    "easyedit": {**EASY, "portability_prompt": "a?"},
    "ripple": {"edit": {"prompt": "The gender of Bo is new."},
               "Logical_Generalization": [{"test_queries": [{"prompt": "a?", "answers": []}]}]},
}  # fmt: skip


@pytest.mark.parametrize("format", ANSWERLESS)
def test_a_consequence_without_an_answer_is_left_out_and_counted_in_every_format(tmp_path, format):
    path = lines(tmp_path / "a.jsonl", ANSWERLESS[format])
    loaded = read_facts(path, format=format)
    assert loaded.facts[0].hops == () and any("answer, left out: 1 times" in n for n in loaded.skips.noted)


def test_one_blank_part_does_not_cost_the_record(tmp_path):
    pairs = [
        {"subject": "France", "object": " "},
        {"subject": None, "object": "Rome"},
        {"subject": "Peru", "object": "Lima"},
    ]
    fact, notes = one(tmp_path, {"name": "r", "prompt_templates": ["{} is"], "samples": pairs})
    assert (fact.subject, fact.answer) == ("Peru", "Lima") and notes == ["blank or null in 'samples', left out"]
    edit = {
        "relation": {"prompt": "{} is"},
        "subject": {"label": "Bo"},
        "object": {"label": "a"},
        "new_object": {"label": "b"},
    }
    fact, _ = one(tmp_path, {"edit": edit, "true_objects": [{"label": ""}, {"label": "c"}]})
    assert fact.answer_aliases == ("c",)
    bio = {"text": "About ada.", "concept": "ada", "labels": "x", "locality": {"near": [None]}}
    assert one(tmp_path, bio)[1] == ["blank or null in 'near', left out"]


@pytest.mark.parametrize("mark", ["{subject}", "[X]", "{0}"])
def test_another_tools_mark_of_the_subject_is_said(tmp_path, mark):
    _, notes = one(tmp_path, {**OWN, "paraphrases": [f"{mark}'s capital is"]})
    assert notes == [f"a prompt holds {mark}, which is asked as it stands ({{}} marks the subject)"]
    assert one(tmp_path, {**OWN, "paraphrases": ["{}'s capital is"]})[1] == []


def test_what_is_left_out_of_records_in_memory_is_said_once():
    with pytest.warns(UserWarning, match=r"unknown key 'note', which is not read: 2 times \(first: record 1,"):
        facts_from([{**OWN, "note": 1}, {**OWN, "note": 2}])


def test_flat_parallel_lists_keep_each_prompt_with_its_own_answer(tmp_path):
    flat = {"locality_prompt": ["a is", "b is"], "locality_ground_truth": ["1st", "2nd"],
            "portability": {"New Question": ["c is", "d is"], "New Answer": ["3rd", ["4th", "fourth"]]}}  # fmt: skip
    fact, _ = one(tmp_path, {**EASY, **flat})
    assert [(p.prompt, p.answer) for p in fact.neighbours] == [("a is", "1st"), ("b is", "2nd")]
    assert fact.hops == (
        Prompt("c is", "3rd", kind="One_Hop"),
        Prompt("d is", "4th", kind="One_Hop", aliases=("fourth",)),
    )


def test_prompts_beside_another_number_of_answers_are_left_out_and_counted(tmp_path):
    """Nobody knows which answer is whose; whatever else the record asks is read."""
    flat = {"locality_prompt": ["a", "b", "c"], "locality_ground_truth": ["1", "2"]}
    groups = {"far": {"prompt": ["a", "b"], "ground_truth": ["c", "d", "e"]}, "near": {"prompt": "f", "answer": "g"}}
    fact, notes = one(tmp_path, {**EASY, **flat, "portability": groups})
    assert fact.neighbours == () and fact.hops == (Prompt("f", "g", kind="near"),)
    said = ["a prompt in 'prompt' beside another number of answers, left out"]
    assert notes == ["a prompt in 'locality_prompt' beside another number of answers, left out", *said]


QA = {
    "prompt": "What is X?",
    "subject": "X",
    "target": "x",
    "rephrase": "X?",
    "locality": [{"loc": "a", "loc_ans": "b"}],
}


def test_one_object_stands_for_a_list_of_one_and_a_part_of_a_wrong_type_is_left_out_of_published_records(tmp_path):
    near = Prompt("a", "b", kind="loc")
    assert one(tmp_path, {**QA, "locality": QA["locality"][0]})[0].neighbours == (near,)
    fact, notes = one(tmp_path, {**QA, "locality": [7, *QA["locality"], ["c"]], "rephrase": [True, "X is?"]})
    assert fact.neighbours == (near,) and fact.paraphrases == ("X is?",)
    assert notes == [
        "true or false in 'rephrase', left out",
        "a number in 'locality', left out",
        "a list in 'locality', left out",
    ]
    fact, notes = one(tmp_path, {**EASY, "locality": {"near": 3, "far": "Rome is in"}, "portability": 5})
    assert fact.neighbours == (Prompt("Rome is in", kind="far"),) and len(notes) == 2
    test = {"test_queries": {"prompt": "q is", "answers": [{"value": "a"}]}}
    (fact,) = facts_from([{"edit": {"prompt": "The gender of Bo is new."}, "Logical_Generalization": test}])
    assert [hop.prompt for hop in fact.hops] == ["q is"]
    odd = {"prompt": ["p", "q"], "ground_truth": [True, "r"]}
    assert one(tmp_path, {**EASY, "locality": {"near": odd}})[0].neighbours == (Prompt("q", "r", kind="near"),)
    fails(lines(tmp_path / "b.jsonl", {**OWN, "neighbourhood": {"prompt": "x"}}), "must be a list of objects")


def test_a_record_that_cannot_be_read_is_left_out_of_a_published_file_and_counted(tmp_path):
    odd = [
        {**EASY, "subject": True},
        {k: v for k, v in EASY.items() if k != "prompt"},
        None,
        "Paris",
        {**EASY, "case_id": []},
    ]
    loaded = read_facts(lines(tmp_path / "a.jsonl", odd[0], EASY, *odd[1:]))
    assert len(loaded.facts) == 1 and loaded.skips.records == 6
    assert loaded.skips.reasons == {"that cannot be read as easyedit": 3, "a null record": 1, "that are no objects": 1}
    assert "line 1: 'subject' holds true or false" in str(loaded.skips)
    fails(lines(tmp_path / "b.jsonl", *odd[:2]), "line 1: 'subject' holds true or false")  # and nothing else to read
    many = lines(tmp_path / "c.jsonl", *[odd[0]] * 200, EASY)
    fails(many, "line 1: 'subject' holds true or false")
    fails(lines(tmp_path / "d.jsonl", OWN, {**OWN, "subject": True}), "line 2: 'subject' is true or false")


@pytest.mark.parametrize("first", [{"rephrase": None}, {"rephrase": float("nan"), "locality": []}, {"locality": None}])
def test_a_format_is_recognised_by_more_than_the_first_record(tmp_path, first):
    bare = {**QA, **first}
    for begin in (bare, {key: value for key, value in bare.items() if value == QA[key]}):
        loaded = read_facts(lines(tmp_path / "a.jsonl", begin, QA, QA))
        assert set(loaded.skips.formats) == {"qaedit"} and len(loaded.facts) == 3
        assert len(read_facts(tmp_path / "a.jsonl", limit=1).facts) == 1


def test_what_is_read_ahead_is_refused_where_it_stands(tmp_path):
    path = lines(tmp_path / "a.jsonl", QA, QA)
    path.write_text(path.read_text() + "\n{broken")
    assert len(load_facts(path, limit=2)) == 2
    fails(path, "line 3: not JSON")


def test_a_chain_with_a_blank_edit_is_left_out(tmp_path):
    whole = chain(2, 1)
    cut = {**whole, "requested_rewrite": [*whole["requested_rewrite"], None]}
    loaded = read_facts(lines(tmp_path / "a.jsonl", cut, whole))
    assert len(loaded.facts) == 2 and list(loaded.skips.reasons) == [
        "a chain of edits with a blank one, which its questions need"
    ]


def test_end_of_text_is_no_answer(tmp_path):
    fact, _ = one(tmp_path, {**EASY, "ground_truth": "<|endoftext|>"})
    assert fact.answer is None
    loaded = read_facts(lines(tmp_path / "b.jsonl", {**EASY, "target_new": "</s>"}, EASY))
    assert len(loaded.facts) == 1 and loaded.skips.reasons == {"empty target_new": 1}


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("paraphrase_prompts", ["{}'s capital is"], lambda f: f.rephrasings == ("{}'s capital is",)),
        ("rephrase", "{}'s capital is", lambda f: f.rephrasings == ("{}'s capital is",)),
        ("neighborhood_prompts", ["Rome is"], lambda f: f.neighbours == (Prompt("Rome is"),)),
        ("object", "Paris", lambda f: f.answer == "Paris"),
        ("target_old", "Paris", lambda f: f.answer == "Paris"),
        ("generation_prompts", ["France is"], lambda f: f.generation == ("France is",)),
    ],
)
def test_other_tools_names_are_read_in_our_own_records(tmp_path, key, value, read):
    fact, notes = one(tmp_path, {"prompt": OWN["prompt"], "subject": "France", "target_new": "Lyon", key: value})
    assert read(fact) and fact.target == "Lyon" and notes == []


def test_an_unknown_key_is_said_and_two_names_of_one_thing_are_refused(tmp_path):
    _, notes = one(tmp_path, {**OWN, "note": "x", "source": "y"})
    assert notes == ["unknown key 'note', which is not read", "unknown key 'source', which is not read"]
    fails(lines(tmp_path / "b.jsonl", {**OWN, "target_old": "Rome"}), "'answer' and 'target_old' mean the same")
    fails(lines(tmp_path / "b.jsonl", {**OWN, "portabilty": []}), "did you mean 'portability'")


def test_keys_that_were_dropped_are_read(tmp_path):
    fact, _ = one(tmp_path, {**EASY, "rephrase": "France's capital is", "ood_rephrase": "In France they rule from"})
    assert fact.paraphrases == ("France's capital is", "In France they rule from")
    near = {"prompt": "Rome is in", "ground_truth": "Italy"}
    record = {**ZSRE, "loc": "who is that", "loc_ans": "Di", "locality": {"near": near}, "port": "Bo was born in",
              "port_ans": "Aia"}  # fmt: skip
    fact, _ = one(tmp_path, record, zsre_target="alt")
    assert [p.kind for p in fact.neighbours] == ["nq_question", "near"]
    assert fact.hops == (Prompt("Bo was born in", "Aia", kind="port"),)
    assert one(tmp_path, record)[0].hops == ()


CELLS = {
    '["Mox", "Moxy"]': ("Mox", ("Moxy",)),
    "['Mox', \"O'Mox\"]": ("Mox", ("O'Mox",)),
    "['Mox' 'Moxy']": ("Mox", ("Moxy",)),
    "[Mox]": ("[Mox]", ()),
    "('Mox', 'Moxy')": ("Mox", ("Moxy",)),
    "{'Mox', 'Moxy'}": ("Mox", ("Moxy",)),
    "(Mox, Moxy)": ("(Mox, Moxy)", ()),
    "('Mox')": ("('Mox')", ()),
    '[["Mox", "Moxy"]]': ("Mox", ("Moxy",)),
}


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_that_is_a_list_is_one_in_published_formats(tmp_path, cell):
    path = tmp_path / "a.csv"
    near = "{'near': {'prompt': 'Bo is', 'ground_truth': 'y'}}"
    row = {"prompt": "[i] Ada is", "subject": "Ada", "target_new": "x", "ground_truth": cell, "locality": near}
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([row, row.values()])
    (fact,) = load_facts(path)
    assert (fact.answer, fact.answer_aliases) == CELLS[cell]
    assert fact.prompt == "[i] Ada is" and fact.neighbours == (Prompt("Bo is", "y", kind="near"),)


def chain(n, name):
    edits = [
        {"prompt": "{} is", "subject": f"s{i}", "target_new": {"str": "a"}, "target_true": {"str": "b"}}
        for i in range(n)
    ]
    return {"case_id": name, "requested_rewrite": edits, "questions": ["who?"], "new_answer": "x", "answer": "y"}


def test_a_chain_that_the_limit_cuts_has_no_multi_hop_questions(tmp_path):
    path = lines(tmp_path / "a.jsonl", chain(2, 1), chain(2, 2))
    assert [len(f.hops) for f in load_facts(path)] == [0, 1, 0, 1]
    for limit, ids, hops in (("1", ["1-1"], [0]), ("2", ["1-1", "1-2"], [0, 1]), ("2-3", ["1-2", "2-1"], [0, 0])):
        loaded = read_facts(path, limit=limit)
        assert ([f.id for f in loaded.facts], [len(f.hops) for f in loaded.facts]) == (ids, hops)
        assert any("--limit cuts" in note for note in loaded.skips.noted) == (limit != "2")


def test_either_of_ripples_questions_passes_a_test_with_or():
    asked = [{"prompt": f"q{i} is", "answers": [{"value": f"a{i}"}]} for i in range(2)]
    tests = [{"test_queries": asked, "test_condition": "OR"}, {"test_queries": asked[:1], "test_condition": "OR"}]
    (fact,) = facts_from([{"edit": {"prompt": "The gender of Bo is new."}, "Logical_Generalization": tests}])
    assert [hop.any_of for hop in fact.hops] == ["Logical_Generalization 1"] * 2 + [""]
    hops = [s for s in samples_of([fact]) if s.role == "portability"]
    right = {0: (1,), 1: (2,), 2: (2,)}  # of the first test's two questions only the second is answered
    given = [replace(s, target_ids=(2,), predicted_ids=right[i]) for i, s in enumerate(hops)]
    values = record_values(given, {}, ("tf",))
    assert values["portability_tf_exact"] == {fact.id: 1.0}
    values = record_values([replace(s, any_of="") for s in given], {}, ("tf",))
    assert values["portability_tf_exact"][fact.id] == pytest.approx(2 / 3)


def test_where_both_of_ripples_targets_begin_alike_the_answers_and_the_relation_tell():
    sentence = "The name of the spouse of Bo is What is {}."
    edit = {"prompt": sentence.format("new"), "original_fact": {"prompt": sentence.format("old")}, "relation": "SPOUSE"}
    asked = {"prompt": "The name of the spouse of B. is", "answers": [{"value": "What is new"}]}
    (fact,) = facts_from([{"edit": edit, "Subject_Aliasing": [{"test_queries": [asked]}]}])
    assert (fact.subject, fact.answer, fact.target) == ("Bo", "What is old", "What is new")
    follows = {
        "prompt": "Song is followed by Who is he.",
        "original_fact": {"prompt": "Song is followed by Who is she."},
    }
    (fact,) = facts_from([{"edit": {**follows, "relation": "FOLLOWED_BY"}}])
    assert (fact.subject, fact.answer, fact.target) == ("Song", "Who is she", "Who is he")


def compressed(path, data):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    else:
        path.write_bytes(pytest.importorskip("zstandard").compress(data))
    return path


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.csv", "object.json"])
def test_compressed_files(tmp_path, name, ending):
    texts = {
        "a.json": json.dumps([OWN]),
        "object.json": json.dumps({"data": [OWN]}),
        "a.csv": "prompt,subject,answer,target\nThe capital of {} is,France,Paris,Lyon\n",
    }
    path = compressed(tmp_path / (name + ending), texts.get(name, json.dumps(OWN)).encode())
    (fact,) = load_facts(path)
    assert (fact.subject, fact.answer, fact.target) == ("France", "Paris", "Lyon")
    path.write_bytes(path.read_bytes()[:-6])
    fails(path, str(path))
    path.write_bytes(path.read_bytes()[:12] + b"\xff" * 30)
    fails(path, str(path))


@pytest.mark.parametrize("name", ["a.json", "object.json", "a.jsonl", "a.csv"])
def test_a_small_compressed_file_with_one_huge_record_is_refused_with_a_bound_on_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr("kt.facts.opening.LARGEST", 1 << 20)
    start = {"a.json": '[{"prompt": "', "object.json": '{"data": [{"prompt": "'}.get(name, '{"prompt": "')
    path = compressed(tmp_path / f"{name}.gz", start.encode() + b"x" * (1 << 26))
    tracemalloc.start()
    fails(path, "a record larger than 1 MiB; write one record a line")
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_parquet(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "a.parquet"
    near = [{"prompt": "Rome is", "answer": "it"}]
    parquet.write_table(pyarrow.Table.from_pylist([{**OWN, "neighbourhood": near, "foil": None}]), path)
    (fact,) = load_facts(path)
    assert fact.answer == "Paris" and fact.neighbours == (Prompt("Rome is", "it"),)
    path.write_bytes(b"PAR1" + b"x" * 40)
    fails(path, "is not Parquet after record 0")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    fails(path, "needs pyarrow", "pip install 'kt-interp[data]'")


def test_a_zst_file_without_zstandard(tmp_path, monkeypatch):
    import sys

    path = tmp_path / "a.json.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd")
    for name in ("zstandard", "compression", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    fails(path, "pip install zstandard")


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        ("a.csv", b"\n<!DOCTYPE html><html>", "an HTML page"),
        ("a.jsonl", b"<html><body>404", "an HTML page"),
        ("a.json", gzip.compress(b"[]", mtime=0), "let its name end in .gz"),
        ("a.csv", b"PAR1....", "let its name end in .parquet"),
        ("a.csv", b"PK\x03\x04....", "a spreadsheet"),
        ("a.jsonl", b"[\n{}\n]", "needs the ending .json"),
        ("a.jsonl", b"{\n}\n", "needs the ending .json"),
        ("a.jsonl", b'[{"a": 1},\n{"a": 2}]', "needs the ending .json"),
        ("a.jsonl", b"[[]]", "needs the ending .json"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "needs the ending .jsonl"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_its_name_says_is_called_what_it_is(tmp_path, name, raw, words):
    path = tmp_path / name
    path.write_bytes(raw)
    fails(path, words, str(path))


def test_folders_are_read_in_depth_without_hidden_ones(tmp_path):
    for name in ("b/x/1.jsonl", "a/2.ndjson", ".git/3.json", "0.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines(path, {**OWN, "id": name}) if name != "0.json" else path.write_text(json.dumps([{**OWN, "id": name}]))
    (tmp_path / "b" / "README.md").write_text("x")
    assert [f.id for f in load_facts(tmp_path)] == ["0.json", "a/2.ndjson", "b/x/1.jsonl"]


def test_a_hub_source_names_a_configuration_and_a_split(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "repo"
    repo.mkdir()
    for name in ("one", "two"):
        lines(repo / f"{name}.jsonl", {**OWN, "id": name})
    (repo / "README.md").write_text(
        "---\nconfigs:\n- config_name: v1.en\n  data_files:\n  - split: first\n    path: one.jsonl\n"
        "  - split: second\n    path: two.jsonl\n---\n"
    )
    assert [f.id for f in load_facts(f"hf:{repo}:v1.en:second")] == ["two"]
    assert [f.id for f in load_facts(f"hf:{repo}:v1.en")] == [f.id for f in load_facts(f"hf:{repo}")] == ["one"]
    fails(f"hf:{repo}:v1.en:third", "has no split 'third'; there are first, second")
    fails("hf:a:b:c:d", "names no dataset")


def test_the_first_bytes_are_looked_at_once_and_the_stream_is_whole(tmp_path):
    from kt.facts.opening import open_bytes

    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * 100_000))
    with open_bytes(path) as stream:
        assert len(stream.read()) == 100_000 and isinstance(stream, io.IOBase)


def test_what_is_not_a_record_is_refused():
    with pytest.raises((BadFact, BadFile), match="a record must be an object"):
        facts_from(["Paris is nice."])


DIALECTS = {
    "semicolons.csv": "prompt;subject;target\n{} is, so;France;x\n",
    "tabs.csv": "prompt\tsubject\ttarget\n{} is, so\tFrance\tx\n",
    "spaces.csv": 'prompt, subject, target\n"{} is, so", "France", x\n',
    "commas.tsv": 'prompt,subject,target\n"{} is, so",France,x\n',
    "absent.csv": 'prompt,subject,target,answer,foil\n"{} is, so",France,x,NaN,None\n',
    "columns.json": '{"prompt": ["{} is, so"], "subject": ["France"], "target": ["x"]}',
    "pandas.json": '{"prompt": {"0": "{} is, so"}, "subject": {"0": "France"}, "target": {"0": "x"}}',
}


@pytest.mark.parametrize("name", DIALECTS)
def test_tables_are_read_in_the_dialects_of_other_programs(tmp_path, name):
    (tmp_path / name).write_text(DIALECTS[name])
    (fact,) = load_facts(tmp_path / name)
    assert (fact.template, fact.subject, fact.target, fact.answer, fact.foil) == (
        "{} is, so",
        "France",
        "x",
        None,
        None,
    )


def test_no_answer_of_a_list_and_no_row_of_a_table_is_lost(tmp_path):
    hops = [{"prompt": "a", "ground_truth": ["b", "c"]}, {"prompt": "d"}]
    fact, _ = one(tmp_path, {**OWN, "answer": ["Paris", "Paname"], "target": ["Rome", "Roma"], "portability": hops})
    assert (fact.answer_aliases, fact.target_aliases) == (("Paname",), ("Roma",))
    assert fact.hops == (Prompt("a", "b", aliases=("c",)),)
    (tmp_path / "a.json").write_text(json.dumps({"prompt": ["{} is", "{} has"], "subject": ["a", "b"]}))
    assert [f.prompt for f in load_facts(tmp_path / "a.json")] == ["a is", "b has"]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({**EASY, "rephrase_prompts": ["x"]}, "'rephrase_prompts' is not read (did you mean 'rephrase_prompt'?)"),
        ({**EASY, "Locality_Prompt": "x"}, "'Locality_Prompt' is not read (did you mean 'locality_prompt'?)"),
        ({**OWN, "neighbourhood": [{"prompt": "a", "answr": "b"}]}, "unknown key 'answr', which is not read (did you "),
        ({**OWN, "portability": [{"prompt": "d"}]}, "a portability prompt without an answer, left out"),
    ],
)
def test_a_key_that_is_passed_over_is_said(tmp_path, record, said):
    _, notes = one(tmp_path, record)
    assert any(note.startswith(said) for note in notes), notes


@pytest.mark.parametrize(
    ("key", "meant"), [("Target", "target"), ("new_target", "target"), ("rephrases", "paraphrases"), ("Foil", "foil")]
)
def test_keys_in_other_case_or_of_other_tools_are_asked_about(tmp_path, key, meant):
    fails(lines(tmp_path / "a.jsonl", {"prompt": "{} is", "subject": "Bo", key: "x"}), f"did you mean {meant!r}")
    fails(lines(tmp_path / "b.jsonl", {"Prompt": "{} is", "Subject": "Bo"}), "did you mean 'prompt' by 'Prompt'")


def test_counterfacts_flat_keys_are_read_beside_easyedits(tmp_path):
    more = {"paraphrase_prompts": ["p {}"], "neighborhood_prompts": ["n"], "generation_prompts": ["{} g"]}
    fact, _ = one(tmp_path, {**EASY, **more, "ground_truth": "Paris"})
    assert "p {}" in fact.rephrasings and fact.neighbours[-1] == Prompt("n", "Paris", kind="neighborhood")
    assert fact.generation == (f"{fact.subject} g",)
    flat, _ = one(tmp_path, {"prompt": "{} is", "subject": "Bo", "target_true": "Paris", "target_new": "x", **more})
    assert flat.neighbours == (Prompt("n", "Paris"),)


def test_null_and_missing_keys_do_not_change_a_records_format(tmp_path):
    unke = {"question": "What is X?", "answer": "A text.", "para_question": "X?"}
    qa = {"prompt": "What is X?", "subject": "X", "target": "x", "rephrase": "X?", "locality": [{"loc": "a"}]}
    for first, key in ((unke, "para_question"), (qa, "rephrase")):
        without = {k: v for k, v in first.items() if k != key}
        loaded = read_facts(lines(tmp_path / "a.jsonl", first, {**first, key: None}, without))
        assert [len(f.rephrasings) for f in loaded.facts] == [1, 0, 0] and len(loaded.skips.formats) == 1
    null = read_facts(lines(tmp_path / "b.jsonl", qa, {**qa, "subject": None}))
    assert len(null.facts) == 1 and null.skips.reasons == {"empty subject": 1}
    know = {"prompt": "a是", "target_old": "b", "target_new": "c", "portability": None, "locality": []}
    assert read_facts(lines(tmp_path / "c.jsonl", know)).skips.formats == {"cknowedit": 1}


DISGUISED = {
    "a.json": ("<!-- x --><html>", "an HTML page"),
    "b.json": ("\ufeff<!DOCTYPE html>", "an HTML page"),
    "c.json": ("404: Not Found", "a server's message"),
    "d.jsonl": ("/annex/objects/SHA256E-s1--a.json", "a git-annex pointer"),
    "e.csv": ("BZh91AY", "bzip2"),
}


@pytest.mark.parametrize("name", DISGUISED)
def test_what_is_no_data_is_called_by_its_name(tmp_path, name):
    content, what = DISGUISED[name]
    (tmp_path / name).write_text(content)
    fails(tmp_path / name, what)
