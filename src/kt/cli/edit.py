"""`kt apply-edit` and `kt cov`: solve an edit and write it; the key moments that solving needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..artifacts import check_writable
from ..errors import WorkFailed
from ..run_folder import FILES
from . import parse
from .command import BadOption
from .console import cell
from .options import FactOptions, ModelOptions, Opt, RunOptions
from .results import results_of_edit
from .session import Session, session

if TYPE_CHECKING:
    from ..editing import Edit

MODES = ("batch", "single", "sequential")


@dataclass(frozen=True)
class EditOptions(RunOptions, FactOptions, ModelOptions):
    edits: Annotated[str | None, Opt("--edits", help="The edit requests; the same as --facts.")] = None
    method: Annotated[str, Opt("--method", help="An editing method; kt ls methods lists them.")] = "intattn"
    alpha: Annotated[
        str | None,
        Opt("--alpha", help="0 (MLP only) to 1 (attention only), or auto: traced first [default: the preset's]."),
    ] = None
    preset: Annotated[str | None, Opt("--preset", help="Hyper-parameters by name; kt ls presets lists them.")] = None
    layers_mlp: Annotated[str | None, Opt("--layers-mlp", help="Layers whose MLP is written: 4-8.")] = None
    layers_attn: Annotated[str | None, Opt("--layers-attn", help="Layers whose attention is written: 2-4.")] = None
    set: Annotated[
        str | None, Opt("--set", help="More hyper-parameters: v_lr=0.1,mom2_update_weight=100,layers_high=5-6.")
    ] = None
    mode: Annotated[str, Opt("--mode", help="batch: all requests in one edit.")] = "batch"
    statistics: Annotated[
        Path | None, Opt("--statistics", help="A safetensors file of key second moments by module name.")
    ] = None
    corpus: Annotated[str, Opt("--corpus", help="Text for the key moments: demo, a file, or hf:repo.")] = "demo"
    max_tokens: Annotated[int, Opt("--max-tokens", min=1, help="Tokens of the corpus that are counted.")] = 100_000
    merge_to: Annotated[
        Path | None, Opt("--merge-to", help="Also write the edited model as a Hugging Face folder.")
    ] = None
    dry_run: Annotated[bool, Opt("--dry-run", help="Solve and report, but write no edit.")] = False


@dataclass(frozen=True)
class CovOptions(RunOptions, ModelOptions):
    corpus: Annotated[str, Opt("--corpus", help="demo, a .txt or .jsonl file, or hf:repo.")] = "demo"
    layers_mlp: Annotated[str | None, Opt("--layers-mlp", help="Layers of down_proj: 4-8, none [default: all].")] = None
    layers_attn: Annotated[str | None, Opt("--layers-attn", help="Layers of W_o: 2-4, none [default: all].")] = None
    max_tokens: Annotated[int, Opt("--max-tokens", min=1, help="Tokens of the corpus that are counted.")] = 100_000
    cache: Annotated[Path | None, Opt("--cache", help="Where the moments are kept [default: the user's cache].")] = None


def apply_edit(options: EditOptions) -> None:
    """Solve an edit for all requests and write it as a file."""
    mode = parse.names(options.mode, MODES, "--mode")[0]
    if mode != "batch":
        raise BadOption(f"--mode {mode} is not there yet; use --mode batch, one command per edit")
    if options.edits is not None and (options.prompt is not None or options.facts not in ("demo", options.edits)):
        raise BadOption("--edits and --facts (or --prompt) both name the requests; give one of them")
    if options.edits is not None:
        options = replace(options, facts=options.edits)
    layers_mlp = parse.layers(options.layers_mlp, "--layers-mlp")
    layers_attn = parse.layers(options.layers_attn, "--layers-attn")
    more = parse.settings(options.set)
    alpha = None if options.alpha is None else parse.alpha(options.alpha)
    if options.merge_to is not None:
        check_new(options.merge_to)
    with session(options, write=not options.dry_run) as s:
        from ..editing import edit, merge

        requests = [fact.as_request() for fact in s.load_facts()]
        model = s.load_model()
        with s.progress("solving") as tick:
            result = edit(
                model,
                requests,
                method=options.method,
                alpha=alpha,
                statistics=options.statistics,
                preset=options.preset,
                seed=options.seed,
                corpus=options.corpus,
                max_tokens=options.max_tokens,
                progress=tick,
                **{"layers_mlp": layers_mlp, "layers_attn": layers_attn, **more},
            )
        check_changed(result)
        if not options.dry_run:
            result.save(s.run.file(FILES["edit"]))
        s.keep(results_of_edit(result, None if options.dry_run else str(s.path / FILES["edit"])))
        if options.merge_to is not None and not options.dry_run:
            merge(model, result, options.merge_to)
            s.run.results["merged"] = str(options.merge_to)
        show_edit(s, result)


def check_new(folder: Path) -> None:
    """Refuse a `--merge-to` that is taken before solving, not after."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadOption(f"--merge-to {folder} exists and is not empty; name a new folder")
    check_writable(folder / "config.json")


def check_changed(edit: Edit) -> None:
    """An update can be finite, not zero, and still vanish in the rounding of a 16-bit weight."""
    if all(r.target_prob[0] == r.target_prob[1] for r in edit.report):
        raise WorkFailed(
            "the edit is solved, but no target's probability changed: the update is lost in the weights' rounding; "
            "load the model with --dtype float32"
        )


def show_edit(s: Session, edit: Edit) -> None:
    """A row a request, a row a weight."""
    columns = ["prompt", "target", "prob", "rank", "old answer", "prob", "rank"]
    rows = []
    for r in edit.report:
        target = [r.target, arrow(r.target_prob), arrow(r.target_rank)]
        rows.append([r.prompt, *target, r.answer, arrow(r.answer_prob), arrow(r.answer_rank)])
    about = edit.manifest
    s.screen.table(f"{about.get('method')}, alpha {cell(about.get('alpha'))}", columns, rows)
    deltas = []
    for name, delta in edit.deltas().items():
        shape = "x".join(map(str, delta["shape"]))
        condition = "–" if delta["condition"] is None else f"{delta['condition']:.0e}"
        deltas.append([name, shape, delta["rank"], delta["norm"], delta["relative_norm"], condition])
    columns = ["weight", "shape", "rank", "norm", "relative", "condition"]
    s.screen.table("written weights", columns, deltas)


def arrow(pair: tuple[Any, Any] | None) -> str:
    """`0.012 → 0.981`."""
    return "–" if pair is None else f"{cell(pair[0])} → {cell(pair[1])}"


def cov(options: CovOptions) -> None:
    """Take the second moments of the keys over a corpus, into the cache."""
    mlp = parse.layers(options.layers_mlp, "--layers-mlp")
    attn = parse.layers(options.layers_attn, "--layers-attn")
    with session(options) as s:
        from ..editing import key_statistics, memory_needed
        from ..sites import Kind, Site

        model = s.load_model()
        everywhere = tuple(range(model.n_layers))
        chosen = {Kind.MLP: everywhere if mlp is None else mlp, Kind.ATTN: everywhere if attn is None else attn}
        sites = [Site(kind, model.checked(layer)) for kind, layers in chosen.items() for layer in layers]
        if not sites:
            raise BadOption("--layers-mlp none and --layers-attn none leave nothing to do; name some layers")
        s.screen.say(f"kt: {len(sites)} second moments need {memory_needed(model, sites) / 2**20:.0f} MiB")
        with s.progress("tokens") as tick:
            found = key_statistics(model, sites, options.corpus, options.max_tokens, options.cache, progress=tick)
        files = {name: str(path) for name, path in found.files.items()}
        s.keep({"files": files, "n_tokens": found.n_tokens, "corpus": found.corpus})
        rows = [[name, path] for name, path in files.items()]
        s.screen.table(f"second moments over {found.n_tokens} tokens", ["module", "file"], rows)
