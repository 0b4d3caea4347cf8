"""A case study shows what each edit makes the model say, and says what is right."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import kt
from kt.cli.case import case, chosen, edit_files
from kt.cli.command import BadOption, as_click
from kt.editing import Edit
from kt.errors import BadFact, BadFile
from kt.experiments.case_study import UNEDITED, CaseStudy, Question, Reply, case_study
from kt.facts import Fact, Prompt
from kt.model.update import LowRank


@pytest.fixture(scope="module")
def model():
    return kt.load("demo")


@pytest.fixture(scope="module")
def fact():
    return next(f for f in kt.load_facts("demo", limit=40) if f.paraphrases and f.neighbours)


def nudge(model, scale):
    name = "model.layers.4.mlp.down_proj.weight"
    d_out, d_in = model.weight(name).shape
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(n, generator=generator) for n in ((d_out, 2), (2, d_in))]
    return Edit({name: LowRank(draw[0] * scale, draw[1])}, {"method": "by hand"})


@pytest.fixture(scope="module")
def found(model, fact):
    return case_study(model, fact, {"nothing": nudge(model, 0.0), "noise": nudge(model, 0.5)})


def test_it_asks_the_edited_an_equivalent_and_an_unrelated_prompt(found, fact):
    asked = [(q.role, q.prompt, q.answers) for q in found.questions]
    assert asked == [
        ("edited", fact.prompt, (fact.foil,)),
        ("equivalent", fact.paraphrases[0], (fact.foil,)),
        ("unrelated", fact.neighbours[0].prompt, (fact.neighbours[0].answer,)),
    ]
    assert found.methods == (UNEDITED, "nothing", "noise")


def test_texts_are_the_models_own_under_each_edit_which_then_leaves_it(model, found):
    before = model.fingerprint()
    prompts = [q.prompt for q in found.questions]
    assert [r.text for r in found.replies[UNEDITED]] == model.generate(prompts, max_new_tokens=12)
    with nudge(model, 0.5).applied(model):
        assert [r.text for r in found.replies["noise"]] == model.generate(prompts, max_new_tokens=12)
    assert found.replies["nothing"] == found.replies[UNEDITED] != found.replies["noise"]
    assert model.fingerprint() == before


def test_a_text_is_right_when_it_holds_the_answer_or_an_alias(model, fact):
    says = model.generate([fact.prompt], max_new_tokens=12)[0].split()[0].strip(".,")
    for target, aliases, right in (("Xyzzy", (), False), (says, (), True), ("Xyzzy", (says,), True)):
        asked = replace(fact, answer=None, target=target, target_aliases=aliases)
        assert case_study(model, asked, {}).replies[UNEDITED][0].right is right


def test_a_neighbour_without_an_answer_is_right_when_nothing_changed(model, fact):
    asked = replace(fact, neighbours=(Prompt(fact.neighbours[0].prompt),))
    found = case_study(model, asked, {"nothing": nudge(model, 0.0), "noise": nudge(model, 0.5)})
    assert [replies[-1].right for replies in found.replies.values()] == [True, True, False]


def test_a_fact_alone_has_one_row_and_more_prompts_can_be_asked(model, fact):
    alone = Fact(fact.template, fact.subject, fact.answer, target="Oslo")
    assert [q.role for q in case_study(model, alone, {}).questions] == ["edited"]
    roles = [q.role for q in case_study(model, fact, {}, each=2).questions]
    assert roles.count("unrelated") == 2 and roles.count("equivalent") == min(2, len(fact.paraphrases))


def test_a_long_answer_gets_the_tokens_it_needs(model, fact, monkeypatch):
    asked = {}

    def noted(model, wishes):
        asked.update(wishes)
        return dict.fromkeys(wishes, "")

    monkeypatch.setattr("kt.model.sampling.continuations", noted)
    case_study(model, replace(fact, target="one two three four five six seven eight nine ten"), {}, max_new_tokens=2)
    assert asked[fact.prompt] >= 10 and asked[fact.neighbours[0].prompt] < 10


EVIL = "[red]x[/red]<script>alert(1)</script>\n\x1b[31m"


def evil():
    question = Question("edited", EVIL, (EVIL,))
    return CaseStudy("m[bold]", EVIL, (question,), {UNEDITED: (Reply(EVIL, None),), "<i>": (Reply(EVIL, False),)})


def test_hostile_text_is_only_ever_shown():
    from io import StringIO

    from rich.console import Console

    from kt.report import render
    from kt.report.terminal import rich_table

    page, cells = evil()._repr_html_(), render("t", [evil().section()])
    assert "<script>alert" not in page and "&lt;script&gt;" in page
    assert "<script>alert" not in cells and "&lt;i&gt;" in cells
    file = StringIO()
    Console(file=file, width=200).print(rich_table(evil().tables()[0]))
    assert "[red]x[/red]<script>" in file.getvalue() and "\x1b[31m" not in file.getvalue()


def test_right_and_wrong_are_marked_without_colour():
    rows = evil().tables()[0].texts()
    assert rows[0][-1].startswith("✗ ") and not rows[0][-2].startswith(("✓", "✗"))


def test_what_is_saved_is_read_back(found, tmp_path):
    path = found.save(tmp_path / "case.json")
    assert CaseStudy.load(path) == found
    assert len(found.to_dataframe()) == 9 and list(found.to_dataframe()["method"].unique()) == list(found.methods)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(BadFile, match="no case study"):
        CaseStudy.load(tmp_path / "other.json")


def test_bad_arguments_are_one_line(model, fact):
    with pytest.raises(BadFact, match="cannot be called 'unedited'"):
        case_study(model, fact, {UNEDITED: nudge(model, 0.0)})
    with pytest.raises(BadFact, match="at least 1"):
        case_study(model, fact, {}, each=0)
    with pytest.raises(BadFact, match="the target is empty"):
        case_study(model, Fact("{} is", "x", "y"), {})


def test_edits_are_named_or_take_the_name_of_their_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for file in ("a.safetensors", "runs/b.safetensors", "x"):
        save_file({"x": np.zeros(1)}, tmp_path / file, metadata={"kt": '{"kind": "edit"}'})
    assert {n: str(p) for n, p in edit_files("memit=a.safetensors, runs/b.safetensors,").items()} == {
        "memit": "a.safetensors",
        "b": "runs/b.safetensors",
    }
    assert edit_files("") == {}
    for text, says in (("a=x,a=y", "two edits are called 'a'"), ("=x", "write NAME=FILE"), ("a=", "write NAME=FILE")):
        with pytest.raises(BadOption, match=says):
            edit_files(text)


def test_a_record_is_chosen_by_id():
    facts = [Fact("{} a", "x", id="one"), Fact("{} b", "x", id="two")]
    assert chosen(facts, None).id == "one" and chosen(facts, "two").id == "two"
    with pytest.raises(BadOption, match="'three': none of the 2 facts"):
        chosen(facts, "three")


def test_the_command_prints_and_keeps_the_case(model, fact, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    nudge(model, 0.5).save("noise.safetensors")
    arguments = ["--record", fact.id, "--limit", "40", "--edits", "noise.safetensors", "-o", "run", "--json", "-"]
    as_click("case", case).main(args=arguments, standalone_mode=False)
    result = json.loads(capsys.readouterr().out)
    assert result["methods"] == [UNEDITED, "noise"] and result["record"] == fact.id
    assert CaseStudy.load(tmp_path / "run" / "case.json").record == fact.id
