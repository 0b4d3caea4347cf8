"""The same edits under every protocol where every target has several tokens: what teacher forcing gives for nothing.

    python benchmarks/quality/many_tokens.py  # T = 30 and 100, minutes; goes on where docs/data/many-tokens.json ends
    python benchmarks/quality/many_tokens.py --table  # docs/data/many-tokens.md

The targets of protocols.py have one token each, so there the share of right tokens is a share of right
answers. Here a fact's target is another answer of its relation that has two tokens or more (capitals, chief executives,
currencies, languages, the names behind masks); methods, settings, protocols and tables are those of that benchmark.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import protocols
from rows import run

OUT = protocols.ROOT / "docs" / "data" / "many-tokens.json"
EDITS, ANSWERS = (30, 100), 10
BY_LENGTH = ("tf_token", "tf_exact", "gen_exact", "wild_contains")
LENGTHS = {"2": (2, 2), "3": (3, 3), "4 and more": (4, 99)}


def requests(model: Any) -> list[Any]:
    """Facts of every relation with `ANSWERS` or more answers of several tokens; one of these answers is the target.

    None of them is among the facts that the settings were found on: their relations have no consequences.
    """
    import kt

    long: dict[str, list[str]] = {}
    facts = kt.load_facts("demo")
    for fact in facts:
        if tokens(model, fact, fact.answer) >= 2 and fact.answer not in long.setdefault(fact.relation, []):
            long[fact.relation].append(fact.answer)
    draw = random.Random(0)
    chosen = [fact for fact in facts if len(long.get(fact.relation, ())) >= ANSWERS]
    targets = [draw.choice([each for each in long[fact.relation] if each != fact.answer]) for fact in chosen]
    return [replace(fact, target=target) for fact, target in zip(chosen, targets, strict=True)]


def tokens(model: Any, fact: Any, answer: str) -> int:
    """How many tokens an answer has behind the fact's prompt."""
    from kt.model.tokens import target_ids

    return len(target_ids(model.tokenizer, fact.prompt, answer))


def row(method: str, size: int) -> dict[str, Any]:
    """That of protocols.py, and the tokens of each target; these facts have no consequences, which its
    tables also ask for."""
    import kt
    from kt.demo.loop import spread

    found = protocols.row(method, size, requests)
    model = kt.load("demo")
    nothing = {f"portability_{way}": [None] * size for way in protocols.WAYS}
    lengths = [tokens(model, fact, fact.target) for fact in spread(requests(model), size)]
    return found | {"tokens": lengths, "values": nothing | found["values"]}


def tables(path: Path) -> str:
    """Markdown: the tables of protocols.py without the rows that have nothing, then one by tokens."""
    whole = protocols.tables(path).rstrip("\n").split("\n")
    said = [line for line in whole if not line.startswith(f"| {protocols.ROLES['portability']} |")]
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows.sort(key=lambda r: (r["edits"], protocols.METHODS.index(r["method"])))
    return "\n".join(said) + "\n\n" + protocols.markdown(by_length(rows)) + "\n"


def by_length(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The edit prompt's scores by the target's number of tokens."""
    from kt.stats import bootstrap_mean

    found = [["tokens of the target", "method", "T", "n", *BY_LENGTH]]
    for name, (least, most) in LENGTHS.items():
        for each in rows:
            places = [i for i, n in enumerate(each["tokens"]) if least <= n <= most]
            values = [[each["values"][f"edit_success_{way}"][i] for i in places] for way in BY_LENGTH]
            cells = [protocols.cell(bootstrap_mean(column).as_dict()) for column in values]
            found.append([name, each["method"], str(each["edits"]), str(len(places)), *cells])
    return found


if __name__ == "__main__":
    run(
        __file__,
        __doc__,
        row=lambda method, size: [row(method, size)],
        table=tables,
        jobs=protocols.by_size,
        methods=lambda: protocols.METHODS,
        sizes=EDITS,
        out=OUT,
        shown=lambda each, size: f"{each['method']}, T = {size}: done",
    )
