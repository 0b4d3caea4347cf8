"""What the table of scores shows, beside what the files hold."""

from __future__ import annotations

from dataclasses import replace

from families import tiny_model

import kt


def test_a_table_has_no_second_row_for_the_only_key():
    near = [kt.Prompt("The city of Paris is", "French", kind=key) for key in ("near", "near", "far")]
    for prompts, keyed in ((near[:2], 0), (near, 2)):
        fact = kt.Fact("The city of {} is", "Rome", answer="Italy", target="Poland", neighbours=tuple(prompts))
        model = tiny_model("gpt2")
        scores = kt.evaluate(model, fact, kt.evaluate(model, fact, generate=False), generate=False)
        names = [row[0] for row in scores.tables()[0].rows]
        assert sum("neighbourhood_same_argmax" in name for name in names) == 1 + keyed, names
        assert any("[near]" in name for name in scores.metrics)


def test_a_title_shows_the_last_part_of_a_folders_path():
    fact = kt.Fact("The city of {} is", "Rome", answer="Italy", target="Poland")
    scores = kt.evaluate(tiny_model("gpt2"), fact, generate=False)
    names = {"/home/me/models/tiny": "tiny", "../up/tiny": "tiny", "C:\\models\\tiny": "tiny", "demo": "demo"}
    names |= {"owner/name": "owner/name", "models/tiny": "models/tiny"}
    for name, shown in names.items():
        assert replace(scores, model=name).tables()[0].title.startswith(f"{shown}: "), name
