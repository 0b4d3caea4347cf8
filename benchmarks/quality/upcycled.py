"""A mixture of experts with real weights: SmolLM2 upcycled, edited, beside the dense model that it computes.

    python benchmarks/quality/upcycled.py --facts counterfact-edit.json  # writes docs/data/upcycled.json, ~20 minutes
    python benchmarks/quality/upcycled.py --table

No pretrained mixture is small enough for this machine. So each MLP of SmolLM2-135M-Instruct becomes a mixture of copies
of itself (sparse upcycling, Komatsuzaki et al. 2023) in Mixtral's shape, with a random router: the weights of the two
experts that a token is sent to add up to one, so the model computes what SmolLM2 does, from routed keys. An edit then
writes experts that are no copies any more. Ten known CounterFact records, no setting given.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from protocols import cell, markdown
from real_known import facts_of, folder_of

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "data" / "upcycled.json"
FACTS = 10
METRICS = {
    "success": "edit_success_tf_exact",
    "paraphrase": "paraphrase_tf_exact",
    "neighbour kept": "neighbourhood_same_argmax",
}
MODELS = {"dense": 1, "4 experts, 2 a token": 4, "8 experts, 2 a token": 8}
METHODS = ("memit", "alphaedit", "r-rome")


def upcycled(count: int, seed: int = 0) -> Any:
    """SmolLM2 with `count` copies of each MLP behind a random router; 1: as it is."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(folder_of("smollm2"), dtype=torch.float32)
    if count == 1:
        return dense
    same = dense.config.to_dict()
    drop = ("architectures", "model_type", "torch_dtype", "dtype", "attention_bias", "mlp_bias", "pretraining_tp")
    known = MixtralConfig().to_dict()
    config = {name: value for name, value in same.items() if name not in drop and name in known}
    config |= dict(num_local_experts=count, num_experts_per_tok=2, sliding_window=None)
    module = MixtralForCausalLM(MixtralConfig(**config)).to(torch.float32).eval()
    weights = dict(dense.state_dict())
    state = module.state_dict()
    draw = torch.Generator().manual_seed(seed)
    for name in state:
        path = name.replace("experts.", "")
        if name.endswith("experts.gate_up_proj"):
            parts = [weights[path.replace("gate_up_proj", f"{each}_proj.weight")] for each in ("gate", "up")]
            state[name] = torch.cat(parts).expand(count, -1, -1).clone()
        elif name.endswith("experts.down_proj"):
            state[name] = weights[f"{path}.weight"].expand(count, -1, -1).clone()
        elif name.endswith("mlp.gate.weight"):
            state[name] = torch.randn(state[name].shape, generator=draw) / state[name].shape[1] ** 0.5
        else:
            state[name] = weights[name]
    module.load_state_dict(state)
    module.generation_config = dense.generation_config
    return module


def measure(name: str, facts: list[Any], tokenizer: Any, dense: Any) -> list[dict[str, Any]]:
    """A row for each method."""
    import kt

    model = kt.load(upcycled(MODELS[name]), tokenizer=tokenizer)
    prompts = [fact.prompt for fact in facts]
    with_dense = (model.logits(model.encode(prompts)) - dense.logits(dense.encode(prompts))).abs().max()
    unedited = kt.evaluate(model, facts, protocols=("tf",))
    rows = []
    for method in METHODS:
        edit = kt.edit(model, facts, method=method)
        with edit.applied(model):
            scores = kt.evaluate(model, facts, protocols=("tf",), before=unedited)
        rows.append(
            {
                "model": name,
                "method": method,
                "logits from dense": float(with_dense),
                "written": len(edit.names),
                "perplexity": edit.manifest["perplexity"],
                **{shown: scores.metrics[key].as_dict() for shown, key in METRICS.items()},
            }
        )
        sys.stderr.write(f"{name} {method}: {scores.metrics[METRICS['success']].mean}\n")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = ["model", "method", "weights written", *METRICS, "perplexity"]
    lines = [
        [
            row["model"],
            row["method"],
            str(row["written"]),
            *(cell(row[name]) for name in METRICS),
            f"{row['perplexity']['before']:.2f} to {row['perplexity']['after']:.2f}",
        ]
        for row in rows
    ]
    return markdown([heads, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", help="counterfact-edit.json")
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        if not args.facts:
            sys.exit("give --facts, or --table")
        import kt

        warnings.simplefilter("ignore")
        rows = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else []
        dense = kt.load(folder_of("smollm2"), dtype="float32")
        facts = facts_of("smollm2", args.facts)[:FACTS]
        for name in args.models:
            rows = [row for row in rows if row["model"] != name] + measure(name, facts, dense.tokenizer, dense)
            OUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(json.loads(OUT.read_text(encoding="utf-8"))) + "\n")


if __name__ == "__main__":
    main()
