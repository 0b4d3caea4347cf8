"""Tracing beside TransformerLens, in one run: a GPT-2 of the same shape, the same number of sites and samples.

    python -m venv peer && peer/bin/pip install 'transformer-lens<4'
    python benchmarks/speed/peer_trace.py --python peer/bin/python  # some minutes; docs/data/peer-trace.json

TransformerLens has no weights to download here, so both models are random, and only the work is the same: patch the
MLP's output, attention's output and the residual stream of every layer and token into 10 corrupted prompts of 12
tokens, as its activation patching does, one forward a site with the samples as a batch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

OUT = Path(__file__).parents[2] / "docs" / "data" / "peer-trace.json"
TOKENS, SAMPLES, FIRST = 12, 10, 1


def theirs(layers: int, width: int) -> dict[str, object]:
    """Inside the other environment: CPU seconds and forwards of TransformerLens."""
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.set_num_threads(1)
    config = HookedTransformerConfig(
        n_layers=layers, d_model=width, n_ctx=1024, d_head=64, n_heads=max(2, width // 64), d_mlp=4 * width,
        d_vocab=50_257, act_fn="gelu_new", normalization_type="LN", device="cpu", seed=0,
    )  # fmt: skip
    model = HookedTransformer(config)
    ids = torch.arange(TOKENS)[None].expand(SAMPLES, -1)
    with torch.no_grad():
        _, clean = model.run_with_cache(ids[:1])
        noise = torch.randn(SAMPLES, TOKENS, width, generator=torch.Generator().manual_seed(0))

        def corrupt(value: torch.Tensor, hook: object) -> torch.Tensor:
            return value + noise

        forwards, start = 0, time.process_time()
        for name in ("hook_mlp_out", "hook_attn_out", "hook_resid_post"):
            for layer in range(layers):
                site = f"blocks.{layer}.{name}"
                for token in range(FIRST, TOKENS):

                    def patch(value: torch.Tensor, hook: object, site: str = site, token: int = token) -> torch.Tensor:
                        value[:, token] = clean[site][:, token]
                        return value

                    model.run_with_hooks(ids, fwd_hooks=[("hook_embed", corrupt), (site, patch)])[:, -1].softmax(-1)
                    forwards += 1
        return {
            "cpu_s": time.process_time() - start,
            "forwards": forwards,
            "version": version("transformer-lens"),
            "torch": torch.__version__,
        }


def ours(layers: int, width: int) -> float:
    """CPU seconds of `kt.causal_trace`."""
    import torch
    from measure import measured
    from trace_speed import KINDS, random_gpt2

    import kt

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="traced all the same")
    model, fact = random_gpt2(layers, width), kt.Fact("a{}efghij-", "bcdx", answer="q", foil="z")
    trace, cost = measured(lambda: kt.causal_trace(model, fact, kinds=KINDS, samples=SAMPLES, keep="all"))
    assert len(trace.facts[0].ids) == TOKENS
    return cost.cpu_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="the interpreter of an environment with transformer-lens")
    parser.add_argument("--small", action="store_true", help="4 layers with d_model 128; writes nothing")
    parser.add_argument("--inside", action="store_true", help="used by itself: this is that environment")
    chosen = parser.parse_args()
    shape = (4, 128) if chosen.small else (12, 768)
    if chosen.inside:
        sys.stdout.write(json.dumps(theirs(*shape)))
        return 0
    if chosen.python is None:
        parser.error("name an interpreter that has transformer-lens: --python peer/bin/python")
    command = [str(chosen.python), __file__, "--inside", *(["--small"] if chosen.small else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peer, mine = json.loads(done.stdout.splitlines()[-1]), ours(*shape)
    found = {"kt_cpu_s": mine, "ratio": peer["cpu_s"] / mine, "transformer_lens": peer, "shape": shape}
    text = json.dumps(found, indent=2) + "\n"
    if not chosen.small:
        OUT.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
