"""`Editor`: trained networks with what they were trained on, their file, and the plan that edits with them.

    metadata "kt"          JSON: schema_version, kind "editor", digest, method, model, fingerprint, identity, chat,
                           sites, settings, history
    network/OxI/NAME       parameters of the network of all weights of shape (O, I)
    mean/OxI, scatter/OxI  of those weights' pairs (k, g) over the training records; `counts` of the metadata

The digest is an edit file's. Reading runs no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..._util.data import SCHEMA_VERSION, complete_file, read_arrays, read_metadata, save_arrays
from ..._util.progress import Progress
from ..._util.text import count
from ...errors import BadFile, KtError, WorkFailed, warn_user
from ...facts.fact import Fact
from ...model.memory import require_memory
from ...model.sites import Site
from ...model.tokens import token_ids, wanted_ids
from ...model.update import Update
from ...report import Figure, Shown, Table
from ...stats import Interval
from ..apply import made_with_other, say_unnoted
from ..edit_io import DTYPES, MEAN, SEEN, digest_of, fits, read_by_checks
from ..plan import PlanText, SolveContext, SolveResult, WeightUpdate, WithoutSearch
from ..stack import editors_of
from ..ultraedit import Pairs, Running, answer_pairs
from .malmen import Malmen
from .mend import Mend
from .network import EditorNetwork

if TYPE_CHECKING:
    from ...model.model import TracedModel
    from ..edit import Edit


NETWORKS: dict[str, type[EditorNetwork]] = {"malmen": Malmen, "mend": Mend}
KIND = "editor"
AGAIN = "take it again from where it came, or train it again"
FOR_THIS = "train one for this model with kt train-editor, or edit the model that it was trained on"
GIVE = "give the editor.safetensors of a kt train-editor run"
FORM = {
    "method": str, "model": str, "revision": (str, None), "dtype": str, "fingerprint": str, "digest": str,
    "sites": [str], "shapes": [str], "counts": {...: int}, "settings": {"rank": int, "layers": int},
    "n_train": int, "n_held_out": int, "n_checked": (int, None), "best_step": int,
    "history": [{"step": int, "loss": float, "held_out_loss": float, "success": MEAN, "paraphrase": MEAN,
                 "locality": MEAN}],
    "subjects": ({"train": [str], "held_out": [str], "checked": ([str], None), "test": [str]}, None),
    "identity": ({"config": {}, "tokenizer": str}, None), "versions": ({...: str}, None), "chat": ({}, None),
}  # fmt: skip
TOKENS = 2048
"""The most (padded) tokens of one forward and backward; it bounds memory, and moves the result by rounding only."""


@dataclass
class Editor(Shown):
    """Networks by the shape of the weights that they write, and the statistics that their inputs are normalised by.

    Attributes:
        networks: by shape of the weight.
        running: by site the mean and variance that its inputs are normalised by.
        manifest: the metadata of its file, without kind and digest.
    """

    networks: nn.ModuleDict
    running: dict[str, Running]
    manifest: dict[str, Any]

    kind: ClassVar[str] = KIND

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site.parse(text) for text in self.manifest["sites"])

    @property
    def metadata(self) -> dict[str, Any]:
        """The manifest."""
        return self.manifest

    @property
    def network(self) -> type[EditorNetwork]:
        """The class of its networks."""
        return NETWORKS[self.manifest["method"]]

    # What it does -----------------------------------------------------------------------------------------------
    def pairs(
        self, model: TracedModel, facts: Sequence[Fact], progress: Progress | None = None
    ) -> tuple[dict[Site, Pairs], Float[Tensor, " token"]]:
        """Inputs and output-gradients of the tokens of `facts` at every site of `model`, and -log p of the answers'
        tokens.
        """
        return site_pairs(model, facts, self.sites, self.network.recipe.prompts, progress)

    def features(self, site: Site, pairs: Pairs) -> tuple[EditorNetwork, Float[Tensor, "pair size"], int]:
        """The network of `site`, its input made of `pairs`, and the site's number among those of that network."""
        shape = shape_of(pairs)
        network: Any = self.networks[shape]
        z = self.running[shape].normalised(pairs.features).to(next(network.parameters()).dtype)
        same = [text for text, its in zip(self.manifest["sites"], self.manifest["shapes"], strict=True) if its == shape]
        return network, z, same.index(str(site))

    def updates(self, pairs: Mapping[Site, Pairs]) -> dict[Site, Update]:
        """ΔW of every site, in float64, from each site's `pairs`."""
        found = {}
        for site, its in pairs.items():
            network, z, weight = self.features(site, its)
            found[site] = network.update(its, z, weight)
        return found

    def surrogate(self, pairs: Mapping[Site, Pairs], gradients: Mapping[Site, Tensor]) -> Float[Tensor, ""]:
        """The sum over sites of `EditorNetwork.surrogate` of a site's `pairs` and `gradients`."""
        total = torch.zeros(())
        for site, its in pairs.items():
            network, z, weight = self.features(site, its)
            total = total + network.surrogate(its, z, weight, gradients[site].cpu())
        return total

    def seen(self, facts: Sequence[Fact]) -> dict[str, int] | None:
        """How many of the facts' subjects it was trained on, how many were held out, and how many of those its checks
        read, which chose its settings and its last step; None for a file that does not say."""
        return seen_by(self.manifest, facts)

    # Keeping ----------------------------------------------------------------------------------------------------
    @property
    def digest(self) -> str:
        """SHA-256 of what its file holds: the editor's identity."""
        return digest_of(*self._contents())

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        arrays = {f"network/{n.replace('.', '/', 1)}": p.detach() for n, p in self.networks.state_dict().items()}
        arrays |= {f"mean/{shape}": its.mean for shape, its in self.running.items()}
        arrays |= {f"scatter/{shape}": its.scatter for shape, its in self.running.items()}
        counts = {shape: its.count for shape, its in self.running.items()}
        return arrays, self.manifest | {"kind": KIND, "counts": counts}

    def save(self, path: str | Path) -> Path:
        """Write the editor to `path`: the same editor is the same bytes.

        Raises:
            WorkFailed: a number is not finite; nothing was written.
        """
        arrays, metadata = self._contents()
        for name, array in arrays.items():
            if not bool(torch.isfinite(array).all()):
                raise WorkFailed(f"{name} is not finite; the editor was not saved; train it with a smaller lr")
        return save_arrays(path, arrays, metadata | {"digest": digest_of(arrays, metadata)})

    @classmethod
    def load(cls, path: str | Path) -> Editor:
        """Read the editor's file at `path`.

        Raises:
            BadFile: not there, cut short, changed since it was written, of a newer kt, or not an editor.
        """
        manifest = read_header(path)
        arrays, _ = read_arrays(path, framework="pt")
        with complete_file(path, KIND, AGAIN):
            expected = manifest.pop("digest")
            if digest_of(arrays, manifest | {"kind": KIND}) != expected:
                raise BadFile(f"{path}: was changed after it was written (its digest does not fit); {AGAIN}")
            counts, settings = manifest.pop("counts"), manifest["settings"]
            if counts.keys() != set(manifest["shapes"]) or not 0 < settings["layers"] <= len(arrays):
                raise ValueError("its networks are not those of its weights")
            with torch.device("meta"):  # nothing is allocated on the word of a file
                networks = new_networks(manifest["method"], manifest["shapes"], settings["rank"], settings["layers"])
            prefix = "network/"
            state = {n.removeprefix(prefix).replace("/", ".", 1): a for n, a in arrays.items() if n.startswith(prefix)}
            try:
                networks.load_state_dict(state, assign=True)
            except RuntimeError as error:
                raise ValueError(str(error)) from error
            running = {s: Running(count, arrays[f"mean/{s}"], arrays[f"scatter/{s}"]) for s, count in counts.items()}
            for shape, its in running.items():
                if not its.mean.shape == its.scatter.shape == (sum(map(int, shape.split("x"))),):
                    raise ValueError(f"its mean and scatter are not those of {shape} weights")
            if any(a.dtype not in DTYPES or not bool(torch.isfinite(a).all()) for a in arrays.values()):
                raise BadFile(f"{path}: holds what is no finite number of floating point; {AGAIN}")
        return cls(networks, running, manifest)

    # Looking ----------------------------------------------------------------------------------------------------
    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry a check: step, losses, and the scores on held-out records."""
        return self.manifest["history"]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return self.manifest | {"digest": self.digest}

    def tables(self) -> Sequence[Table]:
        """A row a check."""
        scores = ("success", "paraphrase", "locality")
        rows = [
            [c["step"], c["loss"], c["held_out_loss"], *(Interval.of(c[score]) for score in scores)]
            for c in self.history
        ]
        told = self.manifest
        read = told.get("n_checked")
        cut = "" if read in (None, told["n_held_out"]) else f" ({read} of them are read by the checks)"
        caption = (
            f"{told['n_train']} records to train on, {told['n_held_out']} of other subjects held out{cut}, "
            f"{told.get('n_test', 0)} of others again left alone for a test; kept: step "
            f"{told['best_step']}. Scores: share of a held-out answer's tokens that are greedy, or (locality) stay"
        )
        columns = ["step", "loss", "held-out loss", "success", "paraphrases", "locality"]
        return [Table(columns, rows, f"{told['method']}: training", caption)]

    def figures(self) -> Sequence[Figure]:
        """Scores on held-out records by step."""
        from ...figures.curves import Series, steps_figure

        x = [check["step"] for check in self.history]
        panels = {score: _series(Series, x, self.history, score) for score in ("success", "paraphrase", "locality")}
        title = f"{self.manifest['method']}: held-out records"
        return [Figure(steps_figure({"held out": panels}, title=title, x_title="step"), name="training")]


def _series(series: Any, x: list[int], history: list[dict[str, Any]], score: str) -> Any:
    means = [Interval.of(check[score]) for check in history]
    return series(score, x, [m.mean for m in means], [m.low for m in means], [m.high for m in means])


def read_header(path: str | Path) -> dict[str, Any]:
    """The metadata of an editor's file, without kind and version; its tensors are not read.

    Raises:
        BadFile: the file is missing, cut short, of a newer kt, or not an editor.
    """
    try:
        _, header = read_metadata(path)
    except BadFile as error:
        raise BadFile(f"{error}; {GIVE}") from error
    with complete_file(path, KIND, AGAIN):
        kind, version = header.pop("kind", None), header.pop("schema_version", None)
        if kind != KIND:
            held = f"{kind[:40]} of kt" if isinstance(kind, str) else "tensors of another program"
            raise BadFile(f"{path}: holds {held}, expected {KIND}; {GIVE}")
        if version != SCHEMA_VERSION:
            raise BadFile(f"{path}: schema_version {str(version)[:20]}, but this kt reads {SCHEMA_VERSION}; {AGAIN}")
        list(map(Site.parse, header["sites"] if fits(header.get("sites"), [str]) else ()))
        wrong = [name for name, form in FORM.items() if not fits(header.get(name), form)]
        if wrong or header["method"] not in NETWORKS or len(header["sites"]) != len(header["shapes"]):
            raise BadFile(f"{path}: its field {(wrong or ['method'])[0]!r} is not as kt writes it; {AGAIN}")
    return header


def seen_by(manifest: Mapping[str, Any], facts: Sequence[Fact]) -> dict[str, int] | None:
    """`Editor.seen` of the editor with this manifest."""
    known = manifest.get("subjects")
    if known is None:
        return None
    names = {subject_of(fact) for fact in facts}
    sides = [side for side in ("train", "held_out", "checked", "test") if known.get(side) is not None]
    return {"subjects": len(names)} | {side: len(names.intersection(known[side])) for side in sides}


def seen_of_steps(edits: Sequence[Edit], path: str, facts: Sequence[Fact]) -> dict[str, Any]:
    """`editors_of` of a session's steps, with each of all their subjects counted once.

    Args:
        path: the editor's file. Where it is gone, or another's by now, what the steps say is added up.
        facts: the requests of all steps.
    """
    notes = editors_of(edits)
    try:
        header = read_header(path)
    except BadFile:
        return notes
    return notes | {"editor_seen": seen_by(header, facts)} if notes.get("editor") == header["digest"] else notes


def known_words(seen: Any) -> str | None:
    """How many subjects of an edit its editor knew, from `Editor.seen` as the edit's manifest keeps it; None: none."""
    if not fits(seen, SEEN):
        return None
    checked = read_by_checks(seen)
    if not (known := seen["train"] + checked):
        return None
    verb = "was" if known == 1 else "were"
    return (
        f"{known} of {count(seen['subjects'], 'subject')} {verb} in the training of the editor that made this edit "
        f"({checked} of them in its checks only): scores on these say little about other subjects"
    )


def subject_of(fact: Fact) -> str:
    """A subject as the split compares it."""
    return fact.subject.casefold()


def shape_of(pairs: Pairs) -> str:
    return f"{pairs.gradients.shape[1]}x{pairs.keys.shape[1]}"


def new_networks(method: str, shapes: Sequence[str], rank: int, layers: int) -> nn.ModuleDict:
    """A network for each distinct shape, for as many weights as have it."""
    made = nn.ModuleDict()
    for shape in dict.fromkeys(shapes):
        d_out, d_in = map(int, shape.split("x"))
        made[shape] = NETWORKS[method](d_in, d_out, list(shapes).count(shape), rank, layers)
    return made


def site_pairs(
    model: TracedModel,
    facts: Sequence[Fact],
    sites: Sequence[Site],
    prompts: bool,
    progress: Progress | None = None,
) -> tuple[dict[Site, Pairs], Float[Tensor, " token"]]:
    """`answer_pairs` of facts, in the order of `sites`; with `prompts` those tokens that the loss does not reach are
    left out (of a late layer's, all before the last)."""
    answers = [wanted_ids(model.reader, fact) for fact in facts]
    tokens = sum(map(len, answers))
    tokens += sum(len(token_ids(model.reader, fact.prompt)) for fact in facts) if prompts else 0
    widths = [sum(model.weight(site).shape) for site in sites]
    needed = tokens * (sum(widths) * model.dtype.itemsize + 32 * max(widths))
    advice = "edit fewer requests at a time"
    require_memory(needed, f"an edit of {tokens:,} tokens at {len(widths)} weights", advice)
    found, losses = answer_pairs(model, facts, answers, sites, TOKENS, progress, prompts)
    if prompts:
        reached = {site: its.gradients.ne(0).any(1) for site, its in found.items()}
        found = {site: Pairs(*(part[reached[site]] for part in its)) for site, its in found.items()}
    return {site: found[site] for site in sites}, losses


@dataclass(frozen=True)
class Learned(WithoutSearch):
    """An edit by a trained editor: one backward pass, and its networks.

    `sites`: those of the file, as text; of a configuration without one, those of its layers.
    """

    method: str
    editor: str
    sites: tuple[str, ...]

    def describe(self) -> PlanText:
        solver = {"malmen": "V Hᵀ(HHᵀ + e^λ I)⁻¹, V from a trained network", "mend": "-η Σ δ̃ũᵀ from a trained network"}
        written = "the maps that the editor was trained for"
        return PlanText("no search: one backward pass", written, solver[self.method], "all at once")

    def names(self, model: TracedModel) -> list[str]:
        return [model.weight_name(Site.parse(text)) for text in self.sites]

    def require_room(self, model: TracedModel) -> None:
        """No check yet: memory grows with the requests' tokens, and `solve` checks it after counting them."""

    def solve(self, context: SolveContext, facts: Sequence[Fact], progress: Progress | None = None) -> SolveResult:
        """Notes: `editor`, the digest of the editor's file, and `editor_seen`, its `Editor.seen` of the facts.

        Warns if the editor was trained on one of the subjects.

        Raises:
            WorkFailed: an update is not finite.
        """
        editor, model = Editor.load(self.editor), context.model
        pairs, _ = editor.pairs(model, facts, progress)
        written = {model.weight_name(site): WeightUpdate(update) for site, update in editor.updates(pairs).items()}
        for name, update in written.items():
            if not update.update.finite:
                raise WorkFailed(f"the update of {name} is not finite; train the editor on records like these")
        seen = editor.seen(facts)
        if known := known_words(seen):
            warn_user(known)
        return SolveResult(written, notes={"editor": editor.digest, "editor_seen": seen})

    def update_history(self, context: SolveContext, facts: Sequence[Fact]) -> None:
        """No history: an editor remembers nothing of its edits."""


def refuse_other_model(header: Mapping[str, Any], model: TracedModel, path: str) -> None:
    """Refuse an editor of other weights, or of the same with another config, tokenizer or chat, or beside an edit.

    An older file did not note all of them: then a warning says once what was not compared.

    Raises:
        KtError: it is one.
    """
    if model.fingerprint() != header["fingerprint"]:
        here = f"{model.name} ({str(model.dtype).removeprefix('torch.')})"
        raise KtError(
            f"{path} was trained on {header['model']} ({header['dtype']}), and {here} has other weights; {FOR_THIS}"
        )
    if header.get("identity") is None:
        say_unnoted(f"editor {path}")
    elif (made := made_with_other(header, model)) is not None:
        raise KtError(f"{path} was trained {made}; {FOR_THIS}")
    if "chat" in header and header["chat"] != chat_of(model):
        ways = [_asked(header["chat"]), _asked(chat_of(model))]
        how = f"{ways[0]}, and {model.name} is asked {ways[1] if ways[0] != ways[1] else 'with other settings of it'}"
        raise KtError(
            f"{path} was trained on prompts asked {how}; ask as in the training (--chat, --system, --thinking, "
            "--chat-turn, in Python model.asked), or train one for this"
        )
    refuse_effects(model, f"{path} was trained without; take that back, or solve on top of it (--history)")


def refuse_effects(model: TracedModel, why: str) -> None:
    """Refuse a model with an edit beside its weights, of which its fingerprint says nothing.

    Raises:
        KtError: it has one.
    """
    if kinds := sorted({effect.kind for effect in model.effects}):
        raise KtError(f"{model.name} has an edit beside its weights ({', '.join(kinds)}), and {why}")


def chat_of(model: TracedModel) -> dict[str, Any] | None:
    """How its prompts are asked, as files keep it; None for as they stand."""
    return None if model.chat is None else model.chat.frame.as_dict()


def _asked(chat: Any) -> str:
    return "as they stand" if chat is None else "in a chat template"
