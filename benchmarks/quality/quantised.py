"""A real model quantised on the CPU: traced as it stands, edited, taken back.

    pip install bitsandbytes torchao
    python benchmarks/quality/quantised.py --facts counterfact-edit.json  # writes docs/data/quantised.json, ~10 minutes
    python benchmarks/quality/quantised.py --table

SmolLM2-135M-Instruct as it is and in three formats, each written by transformers and loaded by kt: the causal trace of
one fact, and MEMIT with no setting given for the first five known CounterFact records.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from protocols import cell, markdown
from real_known import facts_of, folder_of

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "data" / "quantised.json"
FACTS = 5
METRICS = {"success": "edit_success_tf_exact", "neighbour kept": "neighbourhood_same_argmax"}
FORMATS = ("float32", "bitsandbytes int8", "bitsandbytes nf4", "torchao int8")


def about(kind: str) -> Any:
    """transformers' configuration of a format."""
    import torch
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "bitsandbytes int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bitsandbytes nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quantised(kind: str, folder: Path) -> Path:
    """The model's folder in a format."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = folder_of("smollm2")
    if kind == "float32":
        return source
    AutoModelForCausalLM.from_pretrained(source, quantization_config=about(kind)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def measure(kind: str, facts: list[Any], folder: Path) -> dict[str, Any]:
    """One row."""
    import kt
    from kt.model.packed import is_packed

    model = kt.load(quantised(kind, folder))
    before = model.fingerprint()
    trace = kt.causal_trace(model, facts[:1], samples=3, keep="all")
    unedited = kt.evaluate(model, facts, protocols=("tf",))
    edit = kt.edit(model, facts, method="memit")
    with edit.applied(model):
        scores = kt.evaluate(model, facts, protocols=("tf",), before=unedited)
    after = model.fingerprint()
    edit.apply_(model)
    edit.revert_(model)
    return {
        "format": kind,
        "packed maps": sum(map(is_packed, model.module.modules())),
        "traced": trace.headline()[0].value if trace.headline() else None,
        "written": len(edit.names),
        "dequantised": len(edit.manifest.get("packed", {})),
        "perplexity": edit.manifest["perplexity"],
        "same bytes": before == after == model.fingerprint(),
        **{shown: scores.metrics[name].as_dict() for shown, name in METRICS.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = [
        "format",
        "packed maps",
        "written, of them dequantised",
        *METRICS,
        "perplexity",
        "bytes after revert",
    ]
    lines = [
        [
            row["format"],
            str(row["packed maps"]),
            f"{row['written']}, {row['dequantised']}",
            *(cell(row[name]) for name in METRICS),
            f"{row['perplexity']['before']:.2f} to {row['perplexity']['after']:.2f}",
            "the same" if row["same bytes"] else "others",
        ]
        for row in rows
    ]
    return markdown([heads, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", help="counterfact-edit.json")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        if not args.facts:
            sys.exit("give --facts, or --table")
        warnings.simplefilter("ignore")
        rows = {row["format"]: row for row in json.loads(OUT.read_text())} if OUT.exists() else {}
        for kind in args.formats:
            with tempfile.TemporaryDirectory() as folder:
                rows[kind] = measure(kind, facts_of("smollm2", args.facts)[:FACTS], Path(folder))
            OUT.write_text(json.dumps([rows[k] for k in FORMATS if k in rows], indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(json.loads(OUT.read_text(encoding="utf-8"))) + "\n")


if __name__ == "__main__":
    main()
