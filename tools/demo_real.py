"""The loop on SmolLM2 by kt's own commands, each printed before it runs; a run folder each, and one HTML report.

    python tools/demo_real.py [FOLDER]

The edit's settings are kt's defaults. The report is made whatever its verdict (--force).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import real_models

FACTS = Path(__file__).with_name("real_facts.jsonl")
EDIT = ["--method", "memit", "--evaluate", "end", "--force"]


def commands(model: Path, folder: Path) -> list[list[str]]:
    """Trace and balance factor, probe, MEMIT edit with scores before and after, report."""
    given = ["-m", str(model), "-f", str(FACTS)]
    stages = {
        "trace": ["heatmap", *given, "--kind", "mlp,attn", "--limit", "6", "--samples", "3"],
        "alpha": ["alpha", *given, "--limit", "12", "--samples", "3"],
        "probe": ["probe", *given],
        "edit": ["apply-edit", *given, "--limit", "10", *EDIT],
    }
    runs = [[*words, "-o", str(folder / name)] for name, words in stages.items()]
    return [*runs, ["report", *(str(folder / name) for name in stages), "-o", str(folder / "report.html")]]


def main(folder: Path) -> int:
    if failed := real_models.main(["smollm2"]):
        return failed
    for words in commands(real_models.MODELS["smollm2"].path, folder):
        real_models.say(f"\n$ kt {' '.join(words)}")
        if failed := subprocess.run([sys.executable, "-m", "kt", *words]).returncode:
            return failed
    return 0


if __name__ == "__main__":
    now = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs") / f"{now}-real", help="where the runs go")
    sys.exit(main(parser.parse_args().folder))
