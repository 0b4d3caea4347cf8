"""Rebuild the embedded demo model: weights, tokenizer, facts, corpus, figures and card.

    python tools/train_demo_model.py --out src/kt/demo

It needs torch, transformers and tokenizers, a quarter of an hour on two CPU cores, and no network.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from demo_data.knowledge import HERE as DATA
from demo_data.knowledge import Item, build_items, load_triples, select_triples
from demo_data.text import Writer
from demo_model.card import write_card
from demo_model.evaluate import (
    continuations,
    perplexity,
    questions,
    recall,
    repetition,
    residual_norms,
    score,
)
from demo_model.prune import prune
from demo_model.records import RecordMaker
from demo_model.tokens import save_tokenizer, train_tokenizer
from demo_model.tracing import trace
from demo_model.train import Recipe, Trainer, build_model
from safetensors.torch import load_file

log = logging.getLogger("demo")
CORPUS_CHARS, HELD_OUT_CHARS = 220_000, 20_000
TRACED_FACTS, FREE_STARTS = 60, 15
PRUNE_DOCUMENTS = 1000
LRE_SOURCE = (
    "LRE dataset, https://github.com/evandez/relations, Copyright (c) 2022 Evan Hernandez, MIT licence; "
    "subject-object pairs only, filtered by knowledge.py"
)


def main() -> None:
    args = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    if args.lre:
        write_triples(select_triples(args.lre, args.seed))
        shutil.copyfile(args.lre / "LICENSE", DATA / "LICENSE-LRE")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".demo-") as folder:
        stage = Path(folder)
        build(stage, Recipe(), args)
        publish(stage, args.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the artefacts")
    parser.add_argument("--lre", type=Path, help="folder of the LRE files; without it, demo_data/triples.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=Path, help="trained weights (safetensors): measure, do not train")
    return parser.parse_args()


def build(stage: Path, recipe: Recipe, args: argparse.Namespace) -> None:
    """Make everything in ``stage``; nothing there is used before all of it is complete."""
    items = build_items(load_triples(), args.seed)
    tokenizer = train_tokenizer(items, args.seed, recipe.vocabulary)
    log.info("%d facts, %d tokens", len(items), len(tokenizer))
    history: list[dict[str, float]] = []
    if args.weights:
        weights = load_file(args.weights)
        inner = weights["model.layers.0.mlp.down_proj.weight"].shape[1]
        model = build_model(replace(recipe, inner=inner), args.seed)
        model.load_state_dict(weights, strict=False)
        model.tie_weights()
        earlier = args.weights.parent.parent / "figures.json"
        history = json.loads(earlier.read_text(encoding="utf-8"))["history"] if earlier.exists() else []
    else:
        model = build_model(recipe, args.seed)
        history = Trainer(model, tokenizer, items, recipe, args.seed).train()
    writer = Writer(items, f"{args.seed}/prune")
    prune(model, tokenizer, [writer.document().text for _ in range(PRUNE_DOCUMENTS)], recipe.kept)
    folder = stage / "model"
    folder.mkdir()
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tokenizer, folder, recipe.positions)
    model.float().eval()  # from here on the numbers are those of the shipped bfloat16 weights

    corpus, held_out = write_texts(stage, items, args.seed)
    hits = score(model, tokenizer, questions(items))
    figures: dict[str, Any] = {
        "seed": args.seed,
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": args.threads,
        "train_minutes": round(history[-1]["seconds"] / 60, 1) if history else float("nan"),
        "recall": recall(hits, items),
    }
    log.info("recall %s", figures["recall"]["all"])
    records, figures["records"] = write_records(stage, items, RecordMaker(items, hits, tokenizer, args.seed), hits)
    figures["relation_count"] = len(figures["records"]["by_relation"])
    figures["perplexity"] = round(perplexity(model, tokenizer, held_out), 3)
    figures["residual_norms"] = residual_norms(model, tokenizer, corpus[:200])
    rng = random.Random(f"{args.seed}/measure")
    chosen = rng.sample(records, FREE_STARTS)
    starts = [record["generation"][kind] for kind in (0, 1) for record in chosen]
    texts = continuations(model, tokenizer, starts)
    figures["continuations"], figures["continuation_count"] = texts, len(texts)
    answered = [record["answer"] in text for record, text in zip(chosen * 2, texts, strict=True)]
    figures["opening_answered"] = sum(answered[:FREE_STARTS]) / FREE_STARTS
    figures["heading_answered"] = sum(answered[FREE_STARTS:]) / FREE_STARTS
    figures["repetition"] = round(repetition(texts), 4)
    figures["trace"] = trace(model, tokenizer, rng.sample(records, TRACED_FACTS), args.seed)
    log.info("trace %s", figures["trace"])
    figures["history"] = history
    (stage / "figures.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (stage / "MODEL_CARD.md").write_text(write_card(figures), encoding="utf-8")
    shutil.copyfile(DATA / "LICENSE-LRE", stage / "LICENSE-LRE")


def write_triples(triples: dict[str, list[list[str]]]) -> None:
    """One pair a line, so that a change of a filter shows as a readable difference."""
    blocks = []
    for relation, pairs in triples.items():
        lines = ",\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs)
        blocks.append(f"{json.dumps(relation)}: [\n{lines}\n]")
    text = f'{{\n"source": {json.dumps(LRE_SOURCE)},\n"relations": {{\n' + ",\n".join(blocks) + "\n}\n}\n"
    (DATA / "triples.json").write_text(text, encoding="utf-8")


def write_texts(stage: Path, items: Sequence[Item], seed: int) -> tuple[list[str], list[str]]:
    """corpus.txt (as in training) and heldout.txt (held-out templates and hops), one document a line."""
    texts = []
    for name, held_out, limit in (("corpus", False, CORPUS_CHARS), ("heldout", True, HELD_OUT_CHARS)):
        writer, lines, size = Writer(items, f"{seed}/{name}", held_out), list[str](), 0
        while size < limit:
            lines.append(writer.document().text)
            size += len(lines[-1]) + 1
        (stage / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        texts.append(lines)
    return texts[0], texts[1]


def write_records(
    stage: Path, items: Sequence[Item], maker: RecordMaker, hits: dict[tuple[str, str], Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """facts.jsonl, and what there is to say about it."""
    made = [record for item in items if (record := maker.record(item))]
    lines = [json.dumps(record, ensure_ascii=False) for record in made]
    (stage / "facts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    hops = [hop for record in made for hop in record["portability"]]
    right = [hits[hop["prompt"], hop["original"]].first for hop in hops]
    return made, {
        "kept": len(made),
        "dropped": len(items) - len(made),
        "by_relation": dict(Counter(record["relation"] for record in made)),
        "portability": len(hops),
        "portability_right": round(sum(right) / len(right), 4),
        "neighbours": sum(len(record["neighbourhood"]) for record in made),
    }


def publish(stage: Path, out: Path) -> None:
    """Replace file by file, each in one rename, so that a reader never sees half a file."""
    for path in sorted(p for p in stage.rglob("*") if p.is_file()):
        target = out / path.relative_to(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.chmod(0o644)
        path.replace(target)
        log.info("%s %.0f KB", target.name, target.stat().st_size / 1000)


if __name__ == "__main__":
    main()
