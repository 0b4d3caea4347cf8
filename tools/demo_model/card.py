"""Writes MODEL_CARD.md: prose from a template, every number from figures.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from demo_data.text import KINDS

TEMPLATE = Path(__file__).parent / "card_template.md"
SHOWN = {
    "attn": "attention",
    "mlp": "MLP",
    "hidden": "residual",
    "attn_last": "attention, last token of prompt",
}


def write_card(figures: Mapping[str, Any]) -> str:
    """The card, from the template and the figures that the tool measured."""
    return TEMPLATE.read_text(encoding="utf-8").format(
        **{key: value for key, value in figures["recipe"].items() if key != "stages"},
        **{key: value for key, value in figures.items() if not isinstance(value, dict | list)},
        all=figures["recall"]["all"],
        records=figures["records"],
        trace=figures["trace"],
        relations=_relations(figures),
        curves=_curves(figures["trace"]["normalised_logit_difference"]),
        norms=" ".join(f"{norm:.1f}" for norm in figures["residual_norms"]),
        stages="\n".join(_stage(stage) for stage in figures["recipe"]["stages"]),
        wide=figures["recipe"]["heads"] * figures["recipe"]["head_dim"],
        samples="\n".join(f"> {text}\n>" for text in figures["continuations"][:3]).removesuffix("\n>"),
    )


def _stage(stage: Mapping[str, Any]) -> str:
    shares = ", ".join(str(share) for share in stage["mlp_drop"])
    mix = stage["mix"]
    kinds = ", ".join(f"{mix[kind]:.1%} {kind}" for kind in KINDS)
    often = f", with twice as many facts of {', '.join(mix['twice'])}" if mix["twice"] else ""
    openers = "a pronoun" if mix["pronouns"] else "the name of its subject"
    return (
        f"- {stage['steps']} steps; MLP stochastic depth per row of {shares}, for equal parts of the stage; "
        f"learning rates times {stage['peak']:g}, constant to {stage['flat']:.0%} and then linear to zero; "
        f"documents are {kinds}{often}; after a heading a paragraph goes on with {openers}."
    )


def _relations(figures: Mapping[str, Any]) -> str:
    lines = [
        "| relation | facts | trained, top-1 | held out, top-1 | two-hop, held out |",
        "| --- " * 5 + "|",
    ]
    for relation, count in sorted(figures["records"]["by_relation"].items()):
        row = figures["recall"][relation]
        hop = f"{row['hop_held_out_top1']:.3f}" if "hop_held_out_top1" in row else "-"
        lines.append(f"| {relation} | {count} | {row['trained_top1']:.3f} | {row['held_out_top1']:.3f} | {hop} |")
    return "\n".join(lines)


def _curves(curves: Mapping[str, list[float]]) -> str:
    layers = range(len(next(iter(curves.values()))))
    lines = ["| restored | " + " | ".join(map(str, layers)) + " |", "| --- |" + " --- |" * len(layers)]
    for kind, name in SHOWN.items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in curves[kind]) + " |")
    return "\n".join(lines)
