"""Large files and odd ones: flat memory, work bounded by the limit, mixed schemas, CSV."""

import json
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kt.errors import BadFact, BadFile, KtError
from kt.facts import Skips, iter_facts, json_stream, load_facts, read_facts

RECORD = {"id": "x", "prompt": "The capital of {} is", "subject": "Ostland", "answer": "Mir", "foil": "Grad"}
ZSRE = {"subject": "Ost", "src": "Who rules Ost?", "rephrase": "Ost is ruled by", "alt": "Bo", "answers": ["Eva"]}
MANY = 200_000


def big(folder, ending, n=MANY):
    path = folder / f"big.{ending}"
    line = json.dumps(RECORD)
    if ending == "csv":
        path.write_text("prompt,subject,answer\n" + "The capital of {} is,Ostland,Mir\n" * n)
    elif ending == "jsonl":
        path.write_text((line + "\n") * n)
    else:
        path.write_text("[" + (line + ",\n") * (n - 1) + line + "]")
    return path


def peak(read):
    """(bytes at most held, seconds, result)."""
    tracemalloc.start()
    began = time.perf_counter()
    result = read()
    seconds = time.perf_counter() - began
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return held, seconds, result


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_a_limit_bounds_memory_and_time_whatever_the_file_holds(tmp_path, ending):
    path = big(tmp_path, ending)
    held, seconds, facts = peak(lambda: load_facts(path, limit=10))
    assert len(facts) == 10 and path.stat().st_size > 6e6
    assert held < 4e6 and seconds < 2


def test_a_long_list_is_read_item_by_item(tmp_path):
    path = big(tmp_path, "json", 60_000)
    held, _, n = peak(lambda: sum(1 for _ in json_stream.items(path)))
    assert n == 60_000 and path.stat().st_size > 6e6 and held < 3e6


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_facts_are_iterated_in_flat_memory(tmp_path, ending):
    path, skips = big(tmp_path, ending, 8_000), Skips()
    held, _, n = peak(lambda: sum(1 for _ in iter_facts(path, skips=skips)))
    assert n == skips.records == 8_000 and held < 2.5e6


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3),
    max_leaves=12,
)
FOLDER = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FOLDER
@given(st.lists(JSON, max_size=6), st.booleans(), st.sampled_from([1, 2, 3, 7]), st.sampled_from([None, 1]))
def test_every_cut_of_a_list_gives_what_json_gives(tmp_path, monkeypatch, value, plain, chunk, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value, ensure_ascii=plain, indent=indent), encoding="utf-8-sig", errors="replace")
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    expected = json.loads(path.read_text(encoding="utf-8-sig"))
    assert repr(list(json_stream.items(path))) == repr(expected)


@FOLDER
@given(st.lists(JSON, min_size=1, max_size=4), st.data(), st.sampled_from([1, 3, 1 << 18]))
def test_a_broken_list_is_refused_where_json_refuses_it(tmp_path, monkeypatch, value, data, chunk):
    whole = json.dumps(value)
    at = data.draw(st.integers(1, len(whole) - 1))
    text = whole[:at] + whole[at + 1 :]
    path = tmp_path / "a.json"
    path.write_text(text)
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    try:
        expected = json.loads(text)
    except json.JSONDecodeError as error:
        with pytest.raises(BadFile) as caught:
            list(json_stream.items(path))
        assert f"line {error.lineno}, column " in str(caught.value)
    else:
        assert repr(list(json_stream.items(path))) == repr(expected)


@pytest.mark.parametrize("chunk", [1, 1 << 18])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1}\n {"a": 2}]', "line 2, column 2: Expecting ',' delimiter"),
        ('[{"a": 1},\n {"a" 2}]', "line 2, column 7: Expecting ':' delimiter"),
        ('[{"a": 1}]\n{"a": 2}', "line 2, column 1: Extra data; one record per line needs the ending .jsonl"),
        ('[{"a": 1},', "line 1, column 11: Expecting value"),
        ('["a\nb"]', "line 1, column 4: Invalid control character"),
        ('[{"a": "never ends]', "line 1, column 8: Unterminated string"),
    ],
)
def test_the_place_of_a_broken_list_is_named(tmp_path, monkeypatch, chunk, text, words):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(BadFile) as caught:
        list(json_stream.items(path))
    assert words in str(caught.value)


def test_a_byte_that_is_no_text_is_named_also_behind_the_first_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 4)
    path = tmp_path / "a.json"
    for raw, words in [
        (b'["aaaaaa\xe9"]', "not UTF-8 at byte 8"),
        (b'["a\xc3("]', "not UTF-8 at byte 3"),  # a letter of two bytes, cut by the end of the first chunk
        (b'["a",            "\0"]', "NUL"),
    ]:
        path.write_bytes(raw)
        with pytest.raises(BadFile, match=words):
            list(json_stream.items(path))


def test_a_broken_item_does_not_make_the_rest_be_read(tmp_path):
    path = big(tmp_path, "json")
    path.write_text('[{"prompt" 1},' + path.read_text()[1:])
    held, _, message = peak(lambda: fails(path))
    assert "line 1, column 12" in message and held < 4e6


def fails(path, **options):
    with pytest.raises(KtError) as caught:
        load_facts(path, **options)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2
    return message


def lines(path, *records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_mixed_data_sets_are_refused_with_both_places(tmp_path):
    path = lines(tmp_path / "a.jsonl", ZSRE, ZSRE, RECORD)
    message = fails(path)
    assert f"{path}, line 3: it looks like kt, but {path}, line 1 like zsre" in message and "--format" in message
    assert "line 3: 'answers' is missing" in fails(path, format="zsre")
    assert len(load_facts(path, limit=2)) == 2


def test_a_record_without_the_optional_keys_stays_in_its_data_set(tmp_path):
    bare = {"prompt": "The sport of Ada is", "subject": "Ada", "target_new": "chess"}
    knowedit = {**bare, "locality": {"Forgetfulness": [{"prompt": "p", "ground_truth": "q"}]}}
    flat = {**bare, "ground_truth": "rowing"}
    skips = read_facts(lines(tmp_path / "a.jsonl", knowedit, bare, flat)).skips
    assert skips.formats == {"knowedit": 2, "easyedit": 1}


def test_a_folder_is_read_in_the_order_of_names_and_must_be_of_one_kind(tmp_path):
    for name in ("b", "a"):
        lines(tmp_path / f"{name}.jsonl", {**RECORD, "id": name})
    (tmp_path / "LICENSE").write_text("no facts")
    assert [f.id for f in load_facts(tmp_path)] == ["a", "b"]
    lines(tmp_path / "c.jsonl", ZSRE)
    assert "c.jsonl, line 1: it looks like zsre" in fails(tmp_path)


def test_skipped_records_do_not_count_for_the_limit_and_keep_their_position(tmp_path):
    path = lines(tmp_path / "a.jsonl", {**ZSRE, "answers": [""]}, *[{**ZSRE, "answers": [a]} for a in "abc"])
    loaded = read_facts(path, limit=2)
    assert [(f.id, f.target) for f in loaded.facts] == [("1", "a"), ("2", "b")] and loaded.skips.records == 3
    assert [f.target for f in load_facts(path, limit="2-3")] == ["b", "c"]


def test_a_file_of_nothing_but_junk_says_why_it_is_empty(tmp_path):
    path = lines(tmp_path / "a.jsonl", *[{**ZSRE, "alt": " "}] * 3)
    words = f"holds no facts (3 of 3 records skipped: 3 empty alt (first: {path}, line 1))"
    assert words in fails(path, zsre_target="alt")


def test_many_doubled_ids_become_unique_in_linear_time(tmp_path):
    path = lines(tmp_path / "a.jsonl", *[RECORD] * 5_000)
    began = time.perf_counter()
    facts = load_facts(path)
    assert len({f.id for f in facts}) == 5_000 and facts[-1].id == "x-5000"
    assert time.perf_counter() - began < 10


HEAD = "prompt,subject,answer,paraphrases,portability\n"
CSV = {
    "empty": ("", "is empty"),
    "short row": (HEAD + "a {},b\n", "line 2: 2 cells under 5 columns"),
    "no subject": ("prompt,answer\na {},b\n", "line 2: 'subject' is missing; the record has 'prompt', 'answer'"),
    "blank subject": (HEAD + "a {}, ,b,,\n", "'subject' is missing"),
    "no known column": ("question,label\na,b\n", "fit no known format"),
    "twice": ("prompt,subject,prompt\na,b,c\n", "two columns are named 'prompt'"),
    "no list": (HEAD + "a {},b,c,[x,\n".replace("[x", '"[x"'), "'paraphrases' begins with [ but is no JSON list"),
    "no objects": (HEAD + 'a {},b,c,,"[1]"\n', "'portability' holds a number"),
    "quote": (HEAD + 'a {},"b"x,c,,\n', "not CSV"),
    "open quote": (HEAD + 'a {},"b,c,,\n', "not CSV"),
    "header only": (HEAD, "holds no facts"),
    "misspelt": ("prompt,subject,paraphrase\na {},b,c\n", "did you mean 'paraphrases'"),
}


@pytest.mark.parametrize("case", CSV)
def test_a_broken_table_is_named_with_its_place(tmp_path, case):
    text, words = CSV[case]
    path = tmp_path / "a.csv"
    path.write_text(text)
    message = fails(path)
    assert words in message and str(path) in message


def test_a_table_may_have_tabs_a_byte_order_mark_line_breaks_in_cells_and_blank_rows(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('prompt\tsubject\tanswer\n\n"a\n{}"\tb\tc, d\n', encoding="utf-8-sig")
    (fact,) = load_facts(path)
    assert (fact.prompt, fact.answer) == ("a\nb", "c, d")


def test_a_table_may_have_the_columns_of_a_data_set(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,subject,target_true,target_false\nBo lives in,Bo, Oslo, Lima\n")
    (fact,) = load_facts(path)
    assert (fact.template, fact.answer, fact.foil) == ("{} lives in", "Oslo", "Lima")


@pytest.mark.parametrize("raw", [b"prompt,subject\n\xff{},b\n", b"prompt,subject\na\0{},b\n"])
def test_bytes_that_are_no_text_are_refused_in_a_table(tmp_path, raw):
    path = tmp_path / "a.csv"
    path.write_bytes(raw)
    assert str(path) in fails(path)


@FOLDER
@given(st.text(alphabet='ab,"|[]{}\n\t ', max_size=60))
def test_any_table_gives_facts_or_one_line(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_text("prompt,subject,answer,portability\n" + text)
    try:
        assert all(f.subject for f in load_facts(path))
    except KtError as error:
        assert "\n" not in str(error)


def test_an_unknown_format_is_refused_before_anything_is_read():
    with pytest.raises(BadFact, match="unknown format 'zsRE'; there are counterfact, mquake"):
        iter_facts("nowhere.json", format="zsRE")
