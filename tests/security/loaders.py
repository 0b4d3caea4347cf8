"""Every loader of `kt`, with whole files to break and what reads them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
from fuzzing import PACKAGE, Loader, Seeds
from hypothesis import strategies as st

from kt.errors import KtError

FIXTURES = Path(__file__).parents[1] / "facts" / "fixtures"
SETS = b'{"related": ["Paris", "France"], "factual": {"tongue": ["Polish", "Italian"]}}'


def all_loaders(runs: Path) -> list[Loader]:
    """The loaders, with seeds from the fixtures and from `runs`, a folder that `make_runs` filled."""
    return [*fact_loaders(), *result_loaders(runs), *setting_loaders(runs), *run_loaders(runs)]


def fact_loaders() -> list[Loader]:
    from kt.facts import FORMATS, load_facts
    from kt.facts.corpus import Corpus

    def seeds(ending: str) -> Seeds:
        return {p.name: p.read_bytes() for p in sorted(FIXTURES.glob(f"*{ending}"))}

    def every_format(path: Path) -> object:
        for name in FORMATS:
            try:
                load_facts(path, format=name)
            except KtError as error:
                assert "\n" not in str(error)
        return load_facts(path)

    corpus = {"corpus.txt": b"one line\nanother line\n", "corpus.jsonl": b'{"text": "one"}\n{"text": "two"}\n'}

    def documents(path: Path) -> object:
        opened = Corpus.open(path)
        return opened.sha256, sum(map(len, opened.texts()))

    return [
        Loader("facts, JSON", seeds(".json"), mutations.json_files, every_format),
        Loader("facts, JSON lines", seeds(".jsonl"), mutations.line_files, every_format),
        Loader("facts, CSV", seeds(".csv"), mutations.text_files, load_facts),
        Loader("corpus", corpus, mutations.text_files, documents),
    ]


def result_loaders(runs: Path) -> list[Loader]:
    from kt.capability import Abilities
    from kt.editing import Edit
    from kt.editing.closed_form.second_moment import Statistics
    from kt.editing.hyper.editor import Editor
    from kt.editing.stack import load_stack
    from kt.evaluation import Scores
    from kt.experiments import Point, Sweep
    from kt.experiments.case_study import CaseStudy
    from kt.experiments.sequence import Steps
    from kt.experiments.sweep_result import Kept
    from kt.probing import Probe
    from kt.probing.word_sets import open_sets as word_sets
    from kt.residual import Residual
    from kt.tracing import Balance, Trace

    def one(pattern: str, name: str | None = None) -> Seeds:
        found = sorted(runs.glob(pattern))
        assert found, f"no {pattern} among the runs"
        return {name or found[0].name: found[0].read_bytes()}

    def moments(path: Path) -> object:
        opened = Statistics.open(path)
        return [opened.moment_of(name).matrix() for name in opened.files]

    def point(path: Path) -> object:
        kept = Kept(path.parent, {}, resume=False)
        where = path.parent / "points" / "000-intattn-0.json"
        where.parent.mkdir()
        path.rename(where)
        return kept.row(0, Point("0", 0.0, {}, "intattn"))

    stack = Loader("stack of edits", one("stack.json"), mutations.json_files, load_stack)

    def stacked(path: Path) -> object:
        for file in runs.glob("edit/*.safetensors"):
            shutil.copy(file, path.parent)
        return stack.load(path)

    tensors, json_files = mutations.tensor_files, mutations.json_files
    return [
        Loader("edit", one("edit/edit.safetensors"), edit_files, Edit.load),
        Loader("adapter edit", one("adapter.safetensors"), edit_files, Edit.load),
        Loader("context edit", one("context.safetensors"), edit_files, Edit.load),
        Loader("trained editor", one("editor.safetensors"), edit_files, Editor.load),
        stack._replace(load=stacked),
        Loader("statistics", one("cache/cov-*.safetensors", "cov.safetensors"), tensors, moments),
        Loader("trace", one("heatmap/arrays.safetensors"), tensors, Trace.load),
        Loader("probe", one("probe/probe.safetensors"), tensors, Probe.load),
        Loader("residual", one("residual/residual.safetensors"), tensors, Residual.load),
        Loader("balance", one("alpha/balance.json"), json_files, Balance.load),
        Loader("scores", one("eval/scores.json"), json_files, Scores.load),
        Loader("steps", one("steps/steps.json"), json_files, Steps.load),
        Loader("sweep", one("sweep/sweep.json"), json_files, Sweep.load),
        Loader("case study", one("case/case.json"), json_files, CaseStudy.load),
        Loader("abilities", one("abilities/abilities.json"), json_files, Abilities.load),
        Loader("sweep's point", one("sweep/points/000-*.json", "point.json"), json_files, point),
        Loader("word sets", {"sets.json": SETS}, json_files, word_sets),
    ]


@st.composite
def edit_files(draw: Any, seed: bytes) -> bytes:
    """Broken edit files; half of those that safetensors can open get a digest that fits, as a forger would make it."""
    content = draw(mutations.tensor_files(seed))
    return forged(content) if draw(st.booleans()) else content


def forged(content: bytes) -> bytes:
    import json

    import torch
    from safetensors.torch import load

    from kt.editing.edit_io import digest_of

    try:
        header, data = mutations.parted(content)
        held = json.loads(header["__metadata__"]["kt"])
        arrays: dict[str, torch.Tensor] = load(content)
        held["digest"] = digest_of(arrays, {n: v for n, v in held.items() if n not in ("digest", "schema_version")})
        header["__metadata__"]["kt"] = json.dumps(held, sort_keys=True)
        return mutations.joined(header, data)
    except Exception:  # it cannot be opened, so no digest can be made to fit
        return content


def setting_loaders(runs: Path) -> list[Loader]:
    from kt.presets import read_preset
    from kt.recipes import read_recipe

    def config(path: Path) -> object:
        import typer

        from kt.cli.app import app
        from kt.cli.command import config_defaults

        group: Any = typer.main.get_command(app)
        parent = typer.Context(group, info_name="kt")
        return config_defaults(path, typer.Context(group.get_command(parent, "heatmap"), parent, "heatmap"))

    def shipped(*pattern: str) -> Seeds:
        return {p.name: p.read_bytes() for p in sorted(PACKAGE.glob("/".join(pattern)))}

    def recipe(path: Path) -> object:
        return read_recipe(path).smoked()

    def journal(path: Path) -> object:
        from kt.runs.journal import Journal

        place = path.parent / "phases" / "one.safetensors"
        place.parent.mkdir()
        path.rename(place)
        return Journal(path.parent).take("one", lambda: None)

    def claimed(path: Path) -> object:
        from kt.runs.journal import claim

        return claim(path.parent, {"seed": 0, "model": "demo"}, resume=True)

    config_file = b'model = "demo"\nseed = 7\nkind = ["mlp", "attn"]\n[heatmap]\nsamples = 2\n[apply-edit]\nseed = 9\n'
    phases = {p.name: p.read_bytes() for p in sorted(runs.glob("journal/phases/*.safetensors"))}
    settings = b'{"schema_version": 1, "seed": 0, "model": "demo"}'
    return [
        Loader("preset", shipped("presets", "*.toml"), mutations.toml_files, read_preset),
        Loader("recipe", shipped("recipes", "toml", "*.toml"), mutations.toml_files, recipe, cost=2),
        Loader("config", {"kt.toml": config_file}, mutations.toml_files, config, cost=20),
        Loader("journal phase", phases, mutations.tensor_files, journal),
        Loader("journal settings", {"settings.json": settings}, mutations.json_files, claimed),
    ]


def run_loaders(runs: Path) -> list[Loader]:
    """Manifests and results by themselves, and `kt report` on run folders of which one file is broken."""
    from kt.runs.folder import MANIFEST, RESULTS, is_run, read_run

    def run_of(command: str) -> Callable[[Path], object]:
        def read(path: Path) -> object:
            for name in (MANIFEST, RESULTS):
                if not (path.parent / name).exists():
                    shutil.copy(runs / command / name, path.parent)
            is_run(path.parent)
            return read_run(path.parent)

        return read

    def reported(command: str) -> Callable[[Path], object]:
        def write(path: Path) -> object:
            from kt.explorer import write_report

            for file in (runs / command).iterdir():
                if file.is_file() and file.suffix != ".html" and not (path.parent / file.name).exists():
                    shutil.copy(file, path.parent)
            run_of(command)(path)
            return write_report([path.parent], path.parent / "report.html")

        return write

    found = []
    for name in (MANIFEST, RESULTS):
        seeds = {name: (runs / "alpha" / name).read_bytes()}
        found.append(Loader(f"run folder's {name}", seeds, mutations.json_files, run_of("alpha")))
    for command, file in REPORTED:
        seeds = {file: (runs / command / file).read_bytes()}
        broken = mutations.json_files if file.endswith(".json") else mutations.tensor_files
        if file == "edit.safetensors":
            broken = edit_files
        found.append(Loader(f"report: {file} of {command}", seeds, broken, reported(command), cost=20))
    return found


REPORTED = (
    ("alpha", "manifest.json"),
    ("alpha", "balance.json"),
    ("heatmap", "arrays.safetensors"),
    ("probe", "probe.safetensors"),
    ("residual", "residual.safetensors"),
    ("edit", "edit.safetensors"),
    ("steps", "steps.json"),
    ("eval", "scores.json"),
    ("case", "case.json"),
    ("abilities", "abilities.json"),
)


NAMES = (
    *("facts, JSON", "facts, JSON lines", "facts, CSV", "corpus"),
    *("edit", "adapter edit", "context edit", "trained editor", "stack of edits"),
    *("statistics", "trace", "probe", "residual", "balance", "scores", "steps", "sweep", "case study", "abilities"),
    *("sweep's point", "word sets", "preset", "recipe", "config", "journal phase", "journal settings"),
    *("run folder's manifest.json", "run folder's results.json"),
    *(f"report: {file} of {command}" for command, file in REPORTED),
)
"""All of `all_loaders`, which takes files to be made."""
