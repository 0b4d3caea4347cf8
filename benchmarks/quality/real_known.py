"""Which CounterFact records a real model knows: those whose old answer begins with its likeliest token.

    python benchmarks/quality/real_known.py counterfact-edit.json  # fills docs/data/real-known.json: case numbers only
    python benchmarks/quality/real_known.py counterfact-edit.json --write FOLDER  # those records, as kt's -f reads them

The records are EasyEdit's flat form of CounterFact: one paraphrase and one neighbour each, and no portability. They
are read from the user's file; none of their text is kept here.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kt import Fact, TracedModel

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "data" / "real-known.json"
WANTED, AT_ONCE = {"smollm2": 120, "gemma3": 110, "qwen2.5-coder": 50}, 16
FETCHED = ("smollm2", "gemma3")
"""Those of `make real-models`: the default. Another model takes part where its folder stands beside theirs."""


def folder_of(name: str) -> Path:
    """The folder of a model that `make real-models` fetched, or one of this name that was put beside those."""
    tool = runpy.run_path(str(ROOT / "tools" / "real_models.py"))  # a benchmark has the same name
    fetched = name in tool["MODELS"]
    path: Path = tool["MODELS"][name].path if fetched else tool["home"]() / name
    if not path.is_dir():
        remedy = "make real-models fetches it" if fetched else f"put a model into {path}"
        sys.exit(f"{path.name} is not here; {remedy}")
    return path


def known(model: TracedModel, facts: Sequence[Fact]) -> Iterator[Fact]:
    """The facts whose old answer begins with the model's likeliest token."""
    from kt.model.scoring import answer_row, teacher_force

    for start in range(0, len(facts), AT_ONCE):
        asked = {(fact.prompt, fact.answer): fact for fact in facts[start : start + AT_ONCE]}
        scores = teacher_force(model, [answer_row(model, question) for question in asked])
        yield from (
            fact for question, fact in asked.items() if scores[question].predicted[0] == scores[question].target[0]
        )


def facts_of(name: str, source: str | Path) -> list[Fact]:
    """A model's known records, from the data set's file."""
    import kt

    by_id = {fact.id: fact for fact in kt.load_facts(source)}
    return [by_id[str(case)] for case in json.loads(OUT.read_text(encoding="utf-8"))[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="counterfact-edit.json")
    parser.add_argument("--models", nargs="+", default=list(FETCHED), choices=WANTED)
    parser.add_argument("--write", type=Path, help="write the known records to FOLDER/MODEL.json, and stop")
    args = parser.parse_args()
    from kt._util.files import atomic_write

    if args.write:
        cases = json.loads(OUT.read_text(encoding="utf-8"))
        records: dict[int, Any] = {r["case_id"]: r for r in json.loads(Path(args.source).read_text(encoding="utf-8"))}
        args.write.mkdir(parents=True, exist_ok=True)
        for name in args.models:
            chosen = [records[case] for case in cases[name]]
            atomic_write(args.write / f"{name}.json", json.dumps(chosen, ensure_ascii=False) + "\n")
        return
    import kt

    facts, found = kt.load_facts(args.source), {}
    for name in args.models:
        found[name] = []
        for fact in known(kt.load(folder_of(name)), facts):
            found[name].append(int(fact.id))
            if len(found[name]) == WANTED[name]:
                break
    held = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    atomic_write(OUT, json.dumps(held | found) + "\n")


if __name__ == "__main__":
    main()
