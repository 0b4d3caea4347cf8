"""Tasks of our own in lm-eval's YAML, over a few lines of our own, and an edit made by hand."""

from __future__ import annotations

import json

import torch

from kt.editing import Edit
from kt.model.update import LowRank

CITIES = (
    ("The government of Afghanistan meets in", "Kabul", "Oslo"),
    ("The government of Norway meets in", "Oslo", "Lima"),
    ("The government of Switzerland meets in", "Bern", "Kabul"),
    ("The government of Germany meets in", "Berlin", "Dakar"),
    ("The capital of Senegal is", "Dakar", "Berlin"),
    ("The capital of Albania is", "Bern", "Tirana"),  # the label is wrong on purpose: nobody answers all
)
METRIC = "  - metric: {}\n    aggregation: {}\n    higher_is_better: {}\n"
TASKS = {
    "kt_choice": (
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{label}}"\n',
        ("acc", "mean", "true"),
    ),
    "kt_text": (
        'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{choices[label]}}"\n'
        'generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}\n'
        "filter_list:\n  - name: first-word\n    filter:\n      - function: regex\n"
        '        regex_pattern: "([A-Z][a-z]+)"\n      - function: take_first\n',
        ("exact_match", "mean", "true"),
    ),
    "kt_perplexity": (
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{question}}"\n',
        ("word_perplexity", "weighted_perplexity", "false"),
    ),
}


def write_tasks(folder):
    """A folder for `include_path`, with the three tasks and a group of the first two."""
    data = folder / "cities.jsonl"
    rows = [{"question": q, "choices": [right, wrong], "label": 0} for q, right, wrong in CITIES]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, (body, metric) in TASKS.items():
        head = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}\n"
            "test_split: test\nfewshot_split: train\n"
        )
        tail = "metric_list:\n" + METRIC.format(*metric) + "metadata: {version: 1.0}\n"
        (folder / f"{name}.yaml").write_text(head + body + tail, encoding="utf-8")
    (folder / "group.yaml").write_text(
        "group: kt_pair\ntask: [kt_choice, kt_other]\naggregate_metric_list:\n"
        "  - {metric: acc, aggregation: mean, weight_by_size: true}\n",
        encoding="utf-8",
    )
    other = (folder / "kt_choice.yaml").read_text(encoding="utf-8").replace("task: kt_choice", "task: kt_other")
    (folder / "kt_other.yaml").write_text(other.replace("{{label}}", "{{1 - label}}"), encoding="utf-8")
    return folder


def edit_by_hand(model, scale, layer=2):
    """A random update of one weight: at scale 0.5 it changes answers, at infinity it breaks the model."""
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    d_out, d_in = model.weight(name).shape
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(d_out, 4, generator=generator) * scale
    right = torch.randn(4, d_in, generator=generator)
    return Edit({name: LowRank(left, right)}, {"method": "by hand"})
