"""`kt edits ls|show|diff|stack` and `kt apply-edit --history` on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = ("--layers-mlp", "0-1", "--method", "memit", "--set", "mom2_update_weight=0.01,v_num_grad_steps=5")


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """Edit files by name, solved once for all tests of the file."""
    return tmp_path_factory.mktemp("edits")


@pytest.fixture
def apply(kt, model_folder, facts_file, corpus_file, monkeypatch, solved):
    monkeypatch.setenv("KT_CACHE", str(solved / "cache"))

    def run(*more, limit="1-2"):
        asked = ("-m", model_folder, "-f", facts_file, "--limit", limit, "--corpus", corpus_file)
        return kt("apply-edit", *asked, *LAYERS, "--force", *more)

    return run


@pytest.fixture
def two(apply, solved):
    """The current folder with a.safetensors and b.safetensors, of other facts, both of the base."""
    for name, limit in (("a", "1-2"), ("b", "3-4")):
        if not (solved / f"{name}.safetensors").exists():
            ran = apply("-o", name, limit=limit)
            assert ran.code == 0, ran.err
            shutil.copy(f"{name}/edit.safetensors", solved / f"{name}.safetensors")
            shutil.rmtree(name)
        shutil.copy(solved / f"{name}.safetensors", ".")


def test_ls_shows_edits_and_stacks_and_why_a_broken_one_does_not_open(kt, two, model_folder):
    assert kt("edits", "stack", "a.safetensors", "b.safetensors", "-m", model_folder, "--to", "s.json").code == 0
    Path("below/.hidden").mkdir(parents=True)
    whole = Path("a.safetensors").read_bytes()
    Path("below/cut.safetensors").write_bytes(whole[: len(whole) - 100])
    Path("below/nothing.safetensors").write_bytes(b"")
    shutil.copy("a.safetensors", "below/.hidden/a.safetensors")
    shutil.copy(model_folder / "model.safetensors", "below/model.safetensors")
    Path("below/other.json").write_text("{}")
    ran = kt("edits", "ls", "--json", "-")
    assert ran.code == 0, ran.err
    found = {row["path"]: row for row in ran.json["edits"]}
    assert set(found) == {
        "a.safetensors",
        "b.safetensors",
        "s.json",
        "below/cut.safetensors",
        "below/nothing.safetensors",
    }
    a = found["a.safetensors"]
    assert (a["kind"], a["method"], a["requests"], a["weights"], a["error"]) == ("edit", "memit", 2, 2, None)
    assert found["s.json"]["kind"] == "stack" and found["s.json"]["requests"] == 4
    assert "not a whole safetensors file" in found["below/cut.safetensors"]["error"]
    assert "empty" in found["below/nothing.safetensors"]["error"]
    shown = kt("edits", "ls", "below")
    assert shown.code == 0 and "cannot be" in shown.out and "memit" not in shown.out
    assert kt("edits", "ls", "nowhere").code == 2


def test_show_holds_the_manifest_and_looks_at_a_model(kt, two, model_folder):
    ran = kt("edits", "show", "a.safetensors", "-m", model_folder, "--json", "-")
    assert ran.code == 0, ran.err
    result = ran.json
    assert result["method"] == "memit" and result["hyper_parameters"]["v_num_grad_steps"] == 5
    assert len(result["requests"]) == 2 and result["digest_verified"]
    weight = result["weights"]["model.layers.0.mlp.down_proj.weight"]
    assert weight["state"] == "base" and len(weight["before"]) == 64 and weight["rank"] == 2
    shown = kt("edits", "show", "a.safetensors")
    assert "alpha" not in shown.out and "num_steps" not in shown.out  # MEMIT has neither
    assert (
        shown.code == 0 and "mother tongue" in shown.out and "0.01" in shown.out and weight["before"][:12] in shown.out
    )


def test_text_from_a_file_cannot_steer_the_terminal(kt, two):
    from kt.editing import Edit

    edit = Edit.load("a.safetensors")
    edit.manifest |= {"model": "m\x1b[2J\u202e[red]x[/red]", "method": "memit\n\x07"}
    edit.save("a.safetensors")
    for words in (("show", "a.safetensors"), ("ls",), ("diff", "a.safetensors", "b.safetensors")):
        ran = kt("edits", *words)
        assert ran.code == 0, ran.err
        assert not {"\x1b", "\x07", "\u202e"} & set(ran.out + ran.err)
        assert "\\u001b" in ran.out


def test_diff_names_what_differs(kt, two):
    ran = kt("edits", "diff", "a.safetensors", "b.safetensors", "--json", "-")
    assert ran.code == 0, ran.err
    assert [len(ran.json["requests"][name]) for name in ("only_first", "only_second", "both", "conflicts")] == [
        2,
        2,
        0,
        0,
    ]
    assert ran.json["same_base"] and len(ran.json["weights"]) == 2
    assert all(abs(w["cosine"]) < 1 and w["difference"] > 0 for w in ran.json["weights"])
    assert "only A 2, only B 2" in kt("edits", "diff", "a.safetensors", "b.safetensors").out


def test_stack_reads_every_request_back_and_writes_what_can_be_opened_again(kt, two, model_folder):
    both = ("a.safetensors", "b.safetensors", "-m", model_folder)
    ran = kt("edits", "stack", *both, "--to", "s.json", "--json", "-")
    assert ran.code == 0, ran.err
    assert [row["solved_for"] for row in ran.json["edits"]] == ["base", "base"]
    assert [row["place"] for row in ran.json["requests"]] == [1, 1, 2, 2]
    assert all(0 <= row["stacked"]["prob"] <= 1 and row["solved"] for row in ran.json["requests"])
    assert [e["file"] for e in json.loads(Path("s.json").read_text())["edits"]] == list(both[:2])
    less = kt("edits", "stack", "s.json", "-m", model_folder, "--remove", "a.safetensors", "--json", "-")
    assert "nothing is written: --to FILE" in less.err
    assert less.code == 0 and [row["file"] for row in less.json["edits"]] == ["b.safetensors"]
    alone = {row["prompt"]: row["stacked"] for row in less.json["requests"]}
    only = kt("edits", "stack", "b.safetensors", "-m", model_folder, "--json", "-").json["requests"]
    assert alone == {row["prompt"]: row["stacked"] for row in only}
    assert "still first" in kt("edits", "stack", *both).out or ran.json["held"] is None
    assert kt("edits", "show", "s.json", "-m", model_folder).code == 0


@pytest.mark.parametrize(
    ("remove", "left"),
    [
        ("1,2", ["c.safetensors"]),
        ("2,1", ["c.safetensors"]),
        ("1,3", ["b.safetensors"]),
        ("c.safetensors, 1", ["b.safetensors"]),
        ("1,2,3", []),
    ],
)
def test_places_to_remove_are_those_of_the_stack_as_it_is_given(kt, two, model_folder, remove, left):
    from kt.editing import Edit

    third = Edit.load("a.safetensors")
    third.manifest["seed"] = 7  # another edit by its digest, of the same base
    third.save("c.safetensors")
    stack = ("edits", "stack", "a.safetensors", "b.safetensors", "c.safetensors", "-m", model_folder)
    ran = kt(*stack, "--remove", remove, "--json", "-")
    assert ran.code == 0 and [row["file"] for row in ran.json["edits"]] == left, ran.err


@pytest.mark.parametrize("remove", ["1,1", "a.safetensors,1", "2,1,b.safetensors"])
def test_an_edit_that_is_to_be_removed_twice_is_refused(kt, two, model_folder, remove):
    refused = kt("edits", "stack", "a.safetensors", "b.safetensors", "-m", model_folder, "--remove", remove)
    assert refused.code == 2 and "are one edit" in refused.err and refused.err.count("\n") == 1, refused.err


def test_history_shows_conflicts_first_and_is_named_by_the_result(kt, two, apply, model_folder):
    ran = apply("--history", "a.safetensors,b.safetensors", "-o", "c", "--json", "-", limit="2-3")
    assert ran.code == 0, ran.err
    assert sorted(c["what"] for c in ran.json["conflicts"] if c["what"] != "keys") == ["same", "same"]
    assert {c["edit"] for c in ran.json["conflicts"] if c["what"] == "same"} == {1, 2}
    assert len(ran.json["stands_on"]) == 2
    shown = apply("--history", "a.safetensors", "-o", "d", "--dry-run")
    assert shown.code == 0 and shown.out.index("conflicts with earlier") < shown.out.index("written weights")
    same = apply("--history", "a.safetensors,b.safetensors", "-o", "e", limit="2-3")
    assert same.code == 0 and Path("c/edit.safetensors").read_bytes() == Path("e/edit.safetensors").read_bytes()
    files = ("a.safetensors", "b.safetensors", "c/edit.safetensors")
    fits = kt("edits", "stack", *files, "-m", model_folder, "--json", "-")
    assert fits.code == 0 and [row["stands_on"] for row in fits.json["edits"]] == [[], [], [1, 2]]
    for wrong in (files[1:], (files[2], *files[:2])):
        refused = kt("edits", "stack", *wrong, "-m", model_folder, "--to", "s.json")
        assert refused.code == 2 and "fits neither" in refused.err and not Path("s.json").exists()
    stands = kt("edits", "stack", *files, "-m", model_folder, "--remove", 1)
    assert stands.code == 2 and "c/edit.safetensors (place 3) was solved on top of" in stands.err
    forced = kt("edits", "stack", *files, "-m", model_folder, "--remove", 1, "--force", "--json", "-")
    assert forced.code == 0 and [row["forced"] for row in forced.json["edits"]] == [False, True]
    assert "forced: " in forced.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fly",), "ls|show|diff|stack"),
        (("show",), "takes 1 file, not 0"),
        (("diff", "a.safetensors"), "takes 2 files, not 1"),
        (("stack",), "needs edit files"),
        (("ls", "--remove", "1"), "belong to kt edits stack"),
        (("diff", "a.safetensors", "b.safetensors", "-m", "demo"), "needs no model"),
        (("show", "none.safetensors"), "none.safetensors"),
        (("stack", "a.safetensors", "a.safetensors"), "already, at place 1"),
        (("stack", "a.safetensors", "--remove", "3"), "has no such edit"),
    ],
)
def test_wrong_words_are_one_line_and_exit_2(kt, two, words, said):
    ran = kt("edits", *words)
    assert ran.code == 2 and said in ran.err and ran.err.count("\n") == 1, ran.err


def test_history_with_a_merge_or_a_broken_file_is_refused_before_the_model_loads(apply, two):
    ran = apply("--history", "a.safetensors", "--merge-to", "merged")
    assert ran.code == 2 and "--merge-to" in ran.err
    Path("a.safetensors").write_bytes(b"x")
    ran = apply("--history", "a.safetensors")
    assert ran.code == 2 and not Path("runs").exists()
