"""Every method on two pretrained models with no setting given, and λ around the automatic one.

    python benchmarks/quality/real_models.py --facts counterfact-edit.json --edits 10  # goes on where the file ends
    python benchmarks/quality/real_models.py --facts counterfact-edit.json --methods "smollm2: memit" --edits 1,100
    python benchmarks/quality/real_models.py --table  # docs/data/real-models.md, from docs/data/real-models.json

The facts are the first ones of docs/data/real-known.json, which each model knows. One edit at a time is the mean over
`SINGLES` facts, each edited on the unedited model. Each row is its own process. CPU seconds are of one thread; layers
and α that a trace gives, and second moments, are counted apart. A value that several rows search for alike (one model,
fact, place, objective and prefixes) is searched once and kept beside the temporary files: its seconds and the memory
of its process count in every row that uses it. Fluency is of texts about the first `FLUENT` facts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from methods import cell, peak_mib
from protocols import markdown
from real_known import FETCHED, WANTED, facts_of, folder_of
from rows import run

from kt.experiments.shared_targets import SharedTargets

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "data" / "real-models.json"
KEPT = Path(tempfile.gettempdir()) / "kt-real-models"
SIZES, SINGLES, FLUENT = (10, 1, 50, 100), 5, 5
MAX_TOKENS = None
"""Of the shipped English text, for second moments: what kt takes with no setting (25,000 for keys of these sizes)."""
SETTINGS: dict[str, dict[str, Any]] = {
    "unedited": {},
    "memit": {},
    "intattn": {},
    "intattn α=0.1": {"method": "intattn", "alpha": 0.1},
    "intattn α=0.3": {"method": "intattn", "alpha": 0.3},
    **{
        name: {} for name in ("rome", "r-rome", "pmet", "alphaedit", "emmet", "jeep", "ft-l", "ft", "lora", "ultraedit")
    },
}
LAMBDAS = {f"memit λ×{factor:g}": factor for factor in (0.1, 0.3, 1.0, 3.0, 10.0)}
"""A single λ for all weights: so many times the median of those that `auto` chose."""
FEWER = ("core", "eamet", "encore", "lyaplock", "memit-blue", "memit-fe", "nse", "betaedit", "evoedit", "intattn-rome")
FEWER += ("alphaedit-are", "memit-are", "unke", "stableedit", "ft-m", "ft-wd", "locft", "crispedit", "grace", "melo")
FEWER += ("memoir", "wise", "ice", "ike", "scr")
"""Methods that are measured where `--methods` names them."""
METRICS = {
    "success": "edit_success_tf_exact",
    "paraphrase": "paraphrase_tf_exact",
    "locality": "neighbourhood_same_argmax",
    "fluency": "fluency_ngram_entropy_gen",
}
SHOWN = {"success": "success", "paraphrase": "paraphrase", "locality": "neighbour kept", "fluency": "fluency, bits"}


def row(label: str, size: int, facts: str) -> list[dict[str, Any]]:
    """One model and method at one number of edits."""
    import torch

    import kt

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    KEPT.mkdir(exist_ok=True)
    name, _, method = label.partition(": ")
    model = kt.load(folder_of(name))
    requests = facts_of(name, facts)[: SINGLES if size == 1 else size]
    before = unedited(model, requests)
    about: dict[str, Any] = {"method": label, "edits": size, "facts": len(requests)}
    if method == "unedited":
        return [about | figures(*before)]
    given = {"method": "memit" if method in LAMBDAS else method} | SETTINGS.get(method, {})
    try:
        edits, cost = solve(model, requests, size, given, LAMBDAS.get(method))
    except kt.KtError as error:
        return [about | {"failed": str(error)}]
    after = []
    for edit, group in edits:
        before = unedited(model, group)
        with edit.applied(model, force=True):
            after.append(scored(model, group, before))
    return [about | cost | (figures(*after[0]) if size > 1 else together(after))]


def solve(
    model: Any, facts: list[Any], size: int, given: Mapping[str, Any], factor: float | None
) -> tuple[list[tuple[Any, list[Any]]], dict[str, Any]]:
    """The edits with their facts, and what they cost."""
    import kt
    from kt.editing.resolve import configure, resolve, take_statistics
    from kt.editing.session_options import SessionOptions

    clock = time.process_time()
    with nothing_kept(f"{model.name}-{given['method']}-{given.get('alpha')}"):
        config = resolve(configure(model, **given), model, facts)[0]
    traced, clock = time.process_time() - clock, time.process_time()
    sites, default = getattr(config.plan(), "moment_sites", []), SessionOptions()
    statistics = take_statistics(model, sites, None, default.corpus, MAX_TOKENS, None)
    moments = time.process_time() - clock

    def solved(chosen: Any, group: list[Any]) -> tuple[Any, float]:
        journal, clock = SharedTargets(KEPT), time.process_time()
        edit = kt.edit(model, group, chosen, statistics=statistics, journal=journal)
        peaks.append(max(peak_mib(), journal.peak / 2**20))
        return edit, time.process_time() - clock + journal.seconds

    peaks: list[float] = []
    if factor is not None:
        auto = [chosen["lambda"] for chosen in solved(config, facts)[0].manifest["chosen"].values()]
        config = replace(config, mom2_update_weight=factor * median(auto))
    groups = [[fact] for fact in facts] if size == 1 else [facts]
    found = [solved(config, group) for group in groups]
    edits = [(edit, group) for (edit, _), group in zip(found, groups, strict=True)]
    seconds = {"edit": sum(s for _, s in found) / len(found), "resolve": traced, "second moments": moments}
    return edits, {"cpu_seconds": seconds, "peak_mib": max(peaks), "settings": settings_of(edits[0][0])} | holds(edits)


@contextmanager
def nothing_kept(label: str) -> Iterator[None]:
    """Inside the block kt's cache is one of this method alone, so that layers and α do not depend on the order of rows:
    they are those of a user who never traced this model."""
    before = os.environ.get("KT_CACHE")
    os.environ["KT_CACHE"] = str(KEPT / f"cache-{label}")
    try:
        yield
    finally:
        os.environ.pop("KT_CACHE")
        os.environ.update({} if before is None else {"KT_CACHE": before})


def settings_of(edit: Any) -> dict[str, Any]:
    """Layers, α and λ as they were chosen."""
    used = edit.manifest["hyper_parameters"]
    names = [name for name in used if name.startswith("layers") and used[name]]
    found: dict[str, Any] = {name: list(used[name]) for name in names} | {"alpha": edit.alpha}
    chosen = [value["lambda"] for value in edit.manifest.get("chosen", {}).values() if "lambda" in value]
    fixed = used.get("mom2_update_weight") if edit.manifest["method"] == "memit" else None
    found["lambda"] = median(chosen) if chosen else fixed
    return {name: value for name, value in found.items() if value is not None}


def holds(edits: Sequence[tuple[Any, list[Any]]]) -> dict[str, Any]:
    """The largest ‖W + ΔW‖ / ‖W‖, and the requests whose target's first token ends at rank 0."""
    reports = [report for edit, _ in edits for report in edit.report]
    ratios = [ratio for edit, _ in edits for ratio in edit.manifest.get("norm_ratios", {}).values()]
    return {"norm_ratio": max(ratios, default=None), "rank_0": sum(r.target_rank[1] == 0 for r in reports)}


def scored(model: Any, facts: list[Any], before: Any = (None, None)) -> tuple[Any, Any]:
    """Answers and perplexity of all facts; generated text of the first few (of none where one fact is edited)."""
    import kt

    asked = kt.evaluate(model, facts, before[0], protocols=("tf", "ppl"))
    if len(facts) == 1:
        return asked, None
    return asked, kt.evaluate(model, facts[:FLUENT], before[1], protocols=("gen",))


def unedited(model: Any, facts: list[Any]) -> tuple[Any, Any]:
    """The unedited model's scores: the same for every method, so kept beside the other temporary files."""
    import kt

    words = hashlib.sha256(f"{model.fingerprint()} {[fact.id for fact in facts]}".encode()).hexdigest()[:24]
    paths = [KEPT / f"unedited-{words}-{part}.json" for part in ("asked", "text")]
    if not paths[0].exists():
        for scores, path in reversed(list(zip(scored(model, facts), paths, strict=True))):
            if scores is not None:
                scores.save(path)
    asked, text = (kt.Scores.load(path) if path.exists() else None for path in paths)
    return asked, text


def figures(asked: Any, text: Any) -> dict[str, Any]:
    """The metrics with interval and n, and the values that paired differences need."""
    found = {**asked.metrics} | ({} if text is None else {METRICS["fluency"]: text.metrics[METRICS["fluency"]]})
    shown = {name: found[metric].as_dict() for name, metric in METRICS.items() if metric in found}
    values = {n: [asked.values[m].get(r) for r in asked.records] for n, m in METRICS.items() if m in asked.values}
    perplexity = {} if asked.heldout is None else {"perplexity": found["perplexity_heldout"].as_dict()}
    return shown | perplexity | {"values": values}


def together(after: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Of edits of one fact each: their metrics as one, and the mean perplexity over the edits."""
    from kt.evaluation import Scores
    from kt.stats import bootstrap_mean

    shown = figures(Scores.joined([asked for asked, _ in after]), None)
    return shown | {"perplexity": bootstrap_mean([a.metrics["perplexity_heldout"].mean for a, _ in after]).as_dict()}


def table(path: Path) -> str:
    """Markdown: a table a metric, by number of edits; a table a model with all columns; then λ. Means with 95%
    intervals over records."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    by_label = {(each["method"], each["edits"]): each for each in rows}
    found = by_size(by_label)
    for name in WANTED:
        lines = [
            ["method", "edits", *SHOWN.values(), "perplexity", "of unedited", "‖W‖ ×", "CPU s an edit", "peak MiB"]
        ]
        for size, method in itertools.product(sorted(SIZES), (*SETTINGS, *FEWER)):
            if (each := by_label.get((f"{name}: {method}", size))) is not None:
                lines.append(line(each, f"{method}{mark(each)}", by_label))
        if lines[1:]:
            found.append(markdown([["model", *lines[0]], *([name, *each] for each in lines[1:])]))
    return "\n\n".join([*found, markdown(lambda_rows(by_label))]) + "\n"


def by_size(by_label: Mapping[tuple[str, int], dict[str, Any]]) -> list[str]:
    """Success, kept neighbours, and perplexity over the unedited model's: methods down, models and numbers of edits
    across."""
    places = [(name, size) for name in FETCHED for size in sorted(SIZES)]
    tables = []
    for what in ("success", "locality", "perplexity"):
        lines = [["method", *(f"{name}, {size}" for name, size in places)]]
        for method in (each for each in SETTINGS if each != "unedited"):
            cells = []
            for name, size in places:
                each = by_label.get((f"{name}: {method}", size))
                of = None if each is None or "failed" in each else ratio(each, by_label)
                if each is None or of is None:
                    cells.append("–")
                elif what == "perplexity":
                    cells.append((f"{of:.3f}" if of < 100 else f"{of:,.0f}") + mark(each))
                else:
                    cells.append(cell(each[what]) + mark(each))
            lines.append([method, *cells])
        tables.append(markdown(lines))
    return tables


def mark(each: dict[str, Any]) -> str:
    """A dagger at what an older kt measured (`commit`), before the method changed: it is to be measured anew."""
    return " †" if "commit" in each else ""


def line(each: dict[str, Any], method: str, by_label: Mapping[tuple[str, int], dict[str, Any]]) -> list[str]:
    """A row of a model's table."""
    if "failed" in each:
        return [method, str(each["edits"]), f"failed: {each['failed']}", *["–"] * (len(SHOWN) + 4)]
    cells = [cell(each[metric]) if metric in each else "–" for metric in SHOWN]
    if "cpu_seconds" not in each:
        return [method, str(each["edits"]), *cells, f"{each['perplexity']['mean']:.2f}", "1.000", "–", "–", "–"]
    of = ratio(each, by_label)
    seconds = each["cpu_seconds"]["edit"] / (1 if each["edits"] == 1 else each["edits"])
    cells += [f"{each['perplexity']['mean']:.2f}", "–" if of is None else f"{of:.3f}", f"{each['norm_ratio']:.3f}"]
    return [method, str(each["edits"]), *cells, f"{seconds:.1f}", f"{each['peak_mib']:.0f}"]


def ratio(each: dict[str, Any], by_label: Mapping[tuple[str, int], dict[str, Any]]) -> float | None:
    """Perplexity over the unedited model's, which does not depend on the facts."""
    name = each["method"].partition(": ")[0]
    known = [r for (label, _), r in by_label.items() if label == f"{name}: unedited"]
    return each["perplexity"]["mean"] / known[0]["perplexity"]["mean"] if known else None


def lambda_rows(by_label: Mapping[tuple[str, int], dict[str, Any]]) -> list[list[str]]:
    """MEMIT with λ around the automatic one, and the differences from it on the same records."""
    from kt.stats import paired_bootstrap_difference

    shown = ("success", "paraphrase", "locality")
    lines = [
        [
            "model",
            "λ",
            *(SHOWN[name] for name in shown),
            *(f"{SHOWN[name]}, less auto" for name in shown),
            "perplexity, of unedited",
        ]
    ]
    for name in WANTED:
        auto = by_label.get((f"{name}: memit", 10))
        for method in ("memit", *LAMBDAS):
            each = by_label.get((f"{name}: {method}", 10))
            if auto is None or each is None or "failed" in each:
                continue
            pairs = [[[_number(v) for v in r["values"][metric]] for r in (each, auto)] for metric in shown]
            gaps = ["–" if each is auto else cell(paired_bootstrap_difference(*pair).as_dict()) for pair in pairs]
            of = ratio(each, by_label)
            factor = method.partition("λ")[2]
            value = f"{each['settings']['lambda']:.3g} ({'auto, median' if each is auto else factor})"
            lines.append([name, value, *(cell(each[m]) for m in shown), *gaps, "–" if of is None else f"{of:.3f}"])
    return lines


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def jobs(labels: Sequence[str], sizes: Sequence[int]) -> list[tuple[str, int]]:
    """By number of edits; λ only at ten."""
    return [(label, n) for n in sizes for label in labels if n == 10 or "λ" not in label]


if __name__ == "__main__":
    run(
        __file__,
        __doc__,
        row=row,
        table=table,
        jobs=jobs,
        methods=lambda: [f"{name}: {method}" for name in FETCHED for method in (*SETTINGS, *LAMBDAS)],
        sizes=SIZES,
        out=OUT,
        shown=lambda each, size: f"{each['method']:<28}{size:>4}  {line(each, '', {})[2:]}",
        given={"facts": "counterfact-edit.json"},
    )
