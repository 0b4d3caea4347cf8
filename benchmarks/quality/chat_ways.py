"""Does an edit that was solved in the chat template hold without it, and the reverse?

    python benchmarks/quality/chat_ways.py --facts counterfact-edit.json --questions QAEdit_inter_1k.json
    python benchmarks/quality/chat_ways.py --table  # the table, from docs/data/chat-ways.json
    python benchmarks/quality/chat_ways.py --facts counterfact-edit.json --places  # docs/data/chat-places.json
    python benchmarks/quality/chat_ways.py --ends  # docs/data/chat-ends.json

Ten CounterFact prompts that stop where the answer goes on, and which SmolLM2 knows, and the first ten questions of
QAEdit, in one batch each; MEMIT with no setting given. `free` is an exact match of all that the model writes.
`--places`: how many of 60 such prompts keep their answer's first token as the likeliest, by where the prompt stands.
`--ends`: the probability of the template's end of turn behind whole replies; Gemma 3 270M, a base model without a
template, is given the turns of Gemma's instruct models.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

from protocols import cell, markdown
from real_known import facts_of, folder_of

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "data" / "chat-ways.json"
METRICS = {
    "success": "edit_success_tf_exact",
    "P(new)": "target_prob_tf",
    "paraphrase": "paraphrase_tf_exact",
    "neighbour kept": "neighbourhood_same_argmax",
    "free": "edit_success_wild_exact",
}
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
WAYS = {"in the template": "always", "as they stand": "never"}


def measure(name: str, facts: list[Any]) -> list[dict[str, Any]]:
    """Every way of solving by every way of asking, and the unedited model."""
    import torch

    import kt

    torch.set_num_threads(1)
    model = kt.load(folder_of("smollm2"))
    models = {way: model.asked(chat) for way, chat in WAYS.items()}
    options: dict[str, Any] = {"protocols": ("tf", "wild"), "max_new_tokens": 24}
    before = {way: kt.evaluate(asked, facts, **options) for way, asked in models.items()}
    rows = [row(name, "unedited", way, scores) for way, scores in before.items()]
    for solved, solver in models.items():
        edit = kt.edit(solver, facts, method="memit")
        for way, asked in models.items():
            with edit.applied(asked):
                rows.append(row(name, solved, way, kt.evaluate(asked, facts, before=before[way], **options)))
    return rows


def places(facts: list[Any]) -> list[dict[str, Any]]:
    """Known first tokens and their mean probability, by where the prompt stands."""
    import torch

    import kt
    from kt.model.chat import Chat
    from kt.model.scoring import answer_row, teacher_force

    torch.set_num_threads(1)
    model, found = kt.load(folder_of("smollm2")), []
    for place, chat in (
        ("as it stands", "never"),
        ("begins the reply", Chat(turn="reply")),
        ("user's turn", Chat(turn="user")),
    ):
        asked = model.asked(chat)
        scores = teacher_force(asked, [answer_row(asked, (f.prompt, f.answer)) for f in facts]).values()
        known = sum(score.predicted[0] == score.target[0] for score in scores)
        mean = sum(math.exp(score.token_log_probs[0]) for score in scores) / len(facts)
        found.append({"place": place, "known": known, "n": len(facts), "mean probability": mean})
    return found


def ends() -> list[dict[str, Any]]:
    """What `--chat auto` measures, of an instruct model and of a base model."""
    import torch

    import kt
    from kt.model.chat import Chat, ends_turns, frame_of, reader_of

    torch.set_num_threads(1)
    found = []
    for name in ("smollm2", "gemma3"):
        model = kt.load(folder_of(name))
        model.tokenizer.chat_template = model.tokenizer.chat_template or GEMMA
        reader = reader_of(model.tokenizer, frame_of(model.tokenizer, Chat()))
        found.append({"model": name, "end of turn": ends_turns(model, reader)})
    return found


def row(facts: str, solved: str, asked: str, scores: Any) -> dict[str, Any]:
    """One row of the table."""
    values = {shown: scores.metrics[name].as_dict() for shown, name in METRICS.items() if name in scores.metrics}
    return {"facts": facts, "solved": solved, "asked": asked} | values


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = ["facts", "solved", "asked", *METRICS]
    return markdown([heads, *([*(r[h] for h in heads[:3]), *(cell(r.get(h)) for h in METRICS)] for r in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", help="counterfact-edit.json")
    parser.add_argument("--questions", help="QAEdit_inter_1k.json")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--places", action="store_true")
    parser.add_argument("--ends", action="store_true")
    args = parser.parse_args()
    if args.table:
        sys.stdout.write(table(json.loads(OUT.read_text(encoding="utf-8"))) + "\n")
        return
    if args.ends or (args.places and args.facts):
        found = ends() if args.ends else places(facts_of("smollm2", args.facts)[:60])
        text = json.dumps(found, indent=1) + "\n"
        OUT.with_name("chat-ends.json" if args.ends else "chat-places.json").write_text(text, encoding="utf-8")
        sys.stdout.write(text)
        return
    if not (args.facts and args.questions):
        sys.exit("give --facts and --questions, or --table")
    import kt

    warnings.simplefilter("ignore")
    rows = measure("CounterFact, sentences", facts_of("smollm2", args.facts)[:10])
    rows += measure("QAEdit, questions", list(kt.load_facts(args.questions, limit=10)))
    OUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
