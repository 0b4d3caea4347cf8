"""Tasks for a smoke run of abilities: demo facts as questions and as whole texts, in lm-eval's YAML.

The tasks that papers report are fetched from the Hub; these need nothing, and take seconds.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIMIT = 4.0
TEXT, WHOLE = "kt_smoke_text", "kt_smoke_whole"
TASKS: tuple[Any, ...] = ({"task": TEXT, "num_fewshot": 2}, WHOLE)
_METRICS = {TEXT: "exact_match,first-words", WHOLE: "word_perplexity,none"}
_BODIES = {
    TEXT: (
        'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}\n'
        "filter_list:\n  - name: first-words\n    filter:\n      - function: regex\n"
        '        regex_pattern: "(\\\\w[\\\\w -]*)"\n      - function: take_first\n',
        "{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}",
    ),
    WHOLE: (
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{question}} {{answer}}"\n',
        "{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}",
    ),
}


def metric_like(metric: str) -> str:
    """The metric of a smoke task that stands for one of the recipe's."""
    task = WHOLE if "perplexity" in metric else TEXT
    return f"{task}/{_METRICS[task]}"


@contextmanager
def written() -> Iterator[Path]:
    """A folder with both tasks and their data, for lm-eval's `include_path`."""
    from ..demo.loop import spread
    from ..facts.load import load_facts

    with tempfile.TemporaryDirectory(prefix="kt-smoke-") as name:
        folder = Path(name)
        data = folder / "facts.jsonl"
        facts = spread(load_facts("demo"), 12)
        rows = [{"question": fact.prompt, "answer": fact.answer} for fact in facts]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files = json.dumps({"test": str(data), "train": str(data)})  # JSON is YAML
        for task, (body, metric) in _BODIES.items():
            head = (
                f"task: {task}\ndataset_path: json\ndataset_kwargs: {{data_files: {files}}}\n"
                "test_split: test\nfewshot_split: train\n"
            )
            text = f"{head}{body}metric_list:\n  - {metric}\nmetadata: {{version: 1.0}}\n"
            (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
        yield folder
