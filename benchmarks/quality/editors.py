"""Trained editors on subjects that their training never saw: 1, 10, 100, … edits at once, beside other methods.

    python benchmarks/quality/editors.py malmen=RUN mend=RUN
    python benchmarks/quality/editors.py malmen=RUN --model FOLDER --facts FILE --sizes 1,10 --beside ft,memit
    python benchmarks/quality/editors.py --keys --count 120  # no editor: what a last token's key tells apart, by layer

RUN is a folder that holds an editor.safetensors. The facts are those of whose subjects no editor given saw a record, in
training or in a check. A size is measured on `--count` facts (one group if it is larger), each group edited together
on the unedited model. Prints a row a method and size: mean [95%] over facts, CPU seconds of a group; then each editor
less each of the others on the same facts (`Scores.compare`, paired bootstrap). Facts edited together are not
independent: an interval at a size with one group says how far another choice of facts would move the mean, not another
group.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

METRICS = {
    "success": "edit_success_tf_exact",
    "paraphrase": "paraphrase_tf_exact",
    "locality": "neighbourhood_same_argmax",
    "score": "score_tf_token",
}
MAX_TOKENS = 40_000
OPTIONS: dict[str, dict[str, Any]] = {"memit": {"max_tokens": MAX_TOKENS}}


def measured(options: argparse.Namespace) -> None:
    """Print the tables."""
    import kt
    from kt.evaluation import Scores

    warnings.simplefilter("ignore")
    editors = {name: Path(run) / "editor.safetensors" for name, run in (part.split("=", 1) for part in options.editors)}
    methods = {name: OPTIONS.get(name, {}) for name in options.beside.split(",")}
    methods |= {name: {"editor": path} for name, path in editors.items()}
    model, facts = kt.load(options.model), test_facts(list(editors.values()), options.facts)
    say(f"{options.model}: {len(facts)} facts of subjects that no editor was trained on or chosen by")
    say(f"| edits | n | method | {' | '.join(METRICS)} | s |\n|{' --- |' * (len(METRICS) + 4)}")
    for size in (int(text) for text in options.sizes.split(",")):
        if size > len(facts):
            say(f"(no {size} edits: too few facts)")
            continue
        groups = [facts[at : at + size] for at in range(0, max(options.count // size, 1) * size, size)]
        some = [fact for group in groups for fact in group]
        before = kt.evaluate(model, some, protocols=("tf",))
        scores = {}
        for method, settings in methods.items():
            seconds, parts = 0.0, []
            for group in groups:
                start = time.process_time()
                edit = kt.edit(model, group, method, check=False, **settings)
                seconds += time.process_time() - start
                with edit.applied(model):
                    parts.append(kt.evaluate(model, group, protocols=("tf",), before=before))
            scores[method] = Scores.joined(parts)
            found = cells(scores[method].metrics)
            say(f"| {size} | {len(some)} | `{method}` | {found} | {seconds / len(groups):.2f} |")
        for number, editor in enumerate(editors):
            for name in [name for name in scores if name not in list(editors)[: number + 1]]:
                gap = cells(scores[editor].compare(scores[name]), "+")
                say(f"| {size} | {len(some)} | `{editor}` - `{name}` | {gap} | |")


def keys(options: argparse.Namespace) -> None:
    """Print, by layer, the median cosine of prompts' last keys with those of a paraphrase and an unrelated prompt."""
    import random

    import torch

    import kt
    from kt.editing.hyper.editor import site_pairs
    from kt.model.sites import Site

    model, facts = kt.load(options.model), [fact.as_request() for fact in kt.load_facts(options.facts)]
    random.Random(0).shuffle(facts)
    facts = [fact for fact in facts if fact.paraphrases and fact.neighbours][: options.count]
    sites = [Site("mlp", layer) for layer in range(model.n_layers)]
    asked = [[f.prompt for f in facts], [f.paraphrases[0] for f in facts], [f.neighbours[0].prompt for f in facts]]
    say(f"| layer | paraphrase | unrelated |\n|{' --- |' * 3}")
    found = [
        [site_pairs(model, [kt.Fact("{}", prompt, target=fact.target)], sites, False)[0] for prompt, fact in pair]
        for pair in (zip(prompts, facts, strict=True) for prompts in asked)
    ]
    for site in sites:
        at, alike, apart = (torch.stack([pairs[site].keys[0] for pairs in each]) for each in found)
        cosines = (float(torch.cosine_similarity(at, other).median()) for other in (alike, apart))
        say(f"| {site.layer} | {' | '.join(f'{cosine:.2f}' for cosine in cosines)} |")


def test_facts(editors: list[Path], source: str) -> list[Any]:
    """The facts whose subjects every editor left alone, in a drawn order."""
    import random

    import kt

    known = [kt.Editor.load(path) for path in editors]
    facts, found = [fact.as_request() for fact in kt.load_facts(source)], []
    random.Random(0).shuffle(facts)
    for fact in facts:
        seen = [editor.seen([fact]) or {"train": 1} for editor in known]
        if not any(each["train"] or each["held_out"] for each in seen):
            found.append(fact)
    return found


def cells(intervals: Any, sign: str = "") -> str:
    found = [intervals[metric] for metric in METRICS.values()]
    return " | ".join(f"{i.mean:{sign}.2f} [{i.low:{sign}.2f}, {i.high:{sign}.2f}]" for i in found)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("editors", nargs="*")
    parser.add_argument("--keys", action="store_true")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--facts", default="demo")
    parser.add_argument("--sizes", default="1,10,100,1000")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--beside", default="ft,ft-m,ft-l,memit")
    given = parser.parse_args()
    keys(given) if given.keys else measured(given)
