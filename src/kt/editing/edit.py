"""`Edit`: the deltas of one or more requests, apart from any model; written, taken back, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..artifacts import load_arrays, save_arrays
from ..errors import BadFile, KtError, WorkFailed
from ..sites import Dense, LowRank, Update

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from ..model import TracedModel

KIND = "edit"


@dataclass(frozen=True)
class RequestReport:
    """One request's target and old answer, before and after: joint probability, and rank of the first token."""

    id: str
    prompt: str
    subject: str
    target: str
    answer: str | None
    target_prob: tuple[float, float]
    target_rank: tuple[int, int]
    answer_prob: tuple[float, float] | None
    answer_rank: tuple[int, int] | None
    control_prob: float | None = None
    """The target's probability under the edit's control (a joint edit's MLP part alone)."""


@dataclass
class Edit:
    """Updates by weight name (low-rank factors where a closed form gave them), and where they came from.

    `targets` and `keys` hold what was solved for: wanted values by aim (`hidden.4`), keys by weight name, (fact, d).
    """

    updates: dict[str, Update]
    manifest: dict[str, Any]
    report: tuple[RequestReport, ...] = ()
    targets: dict[str, Float[Tensor, "fact d_model"]] = field(default_factory=dict)
    keys: dict[str, Float[Tensor, "fact d_in"]] = field(default_factory=dict)
    _taken: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.updates)

    @property
    def requests(self) -> list[dict[str, Any]]:
        return self.manifest.get("requests", [])

    @property
    def alpha(self) -> float | None:
        return self.manifest.get("alpha")

    def delta(self, name: str) -> Float[Tensor, "d_out d_in"]:
        """The dense update of a weight, (d_out, d_in) float32 whatever the module's own layout."""
        if name not in self.updates:
            raise KtError(f"the edit does not touch {name!r}; it touches {', '.join(self.updates)}")
        return self.updates[name].to(torch.float64).dense().float()

    def control(self) -> Edit | None:
        """What every result of a joint edit is to be held against: its MLP part alone, scaled by 1 - α as in the edit.

        None for an edit that is not of both modules.
        """
        attention = set(self.manifest.get("attention_weights", []))
        rest = {name: update for name, update in self.updates.items() if name not in attention}
        if not self.alpha or not attention or not rest:
            return None
        known = self.manifest.get("fingerprints", {})
        manifest = self.manifest | {"control": "MLP alone, x (1 - α)", "fingerprints": {n: known[n] for n in rest}}
        return Edit(rest, manifest)

    def deltas(self, model: TracedModel | None = None) -> dict[str, dict[str, Any]]:
        """Per weight: shape, rank, norm, and the norm relative to the weight's own."""
        relative = self.manifest.get("weight_norms", {})
        rows = {}
        for name, update in self.updates.items():
            norm = update.norm()
            base = relative.get(name)
            rows[name] = {
                "shape": list(update.shape),
                "rank": update.rank,
                "norm": norm,
                "relative_norm": norm / base if base else None,
                "norm_ratio": self.manifest.get("norm_ratios", {}).get(name),
                "condition": self.manifest.get("conditions", {}).get(name),
            }
        return rows

    def check(self) -> None:
        """Raise WorkFailed when the edit changes nothing or is not finite."""
        for name, update in self.updates.items():
            if not update.finite:
                raise WorkFailed(f"the update of {name} is not finite; nothing was written")
        if not any(update.norm() > 0 for update in self.updates.values()):
            raise WorkFailed("the edit changes nothing: every update is zero; check alpha, layers and targets")

    # Writing ----------------------------------------------------------------------------------------------------
    @contextmanager
    def applied(self, model: TracedModel, force: bool = False) -> Iterator[TracedModel]:
        """The edit written into the model inside the block; the exact bytes back on exit."""
        self._refuse_foreign(model, force)
        with model.restored(self.names):
            self.write(model)
            yield model

    def apply_(self, model: TracedModel, force: bool = False) -> None:
        """Write the edit for good, until `revert_`."""
        self._refuse_foreign(model, force)
        self._taken[id(model.module)] = model.copies(self.names)
        self.write(model)

    def revert_(self, model: TracedModel) -> None:
        """Bring back the bytes from before `apply_`."""
        kept = self._taken.pop(id(model.module), None)
        if kept is None:
            raise KtError("this edit was not applied to this model with apply_; there is nothing to revert")
        model.put_back(kept)

    def write(self, model: TracedModel) -> None:
        """Add the updates to the weights, unchecked: `applied` and `apply_` are for use, this is for a session."""
        for name in self.names:
            model.write(name, self.delta(name))

    def _refuse_foreign(self, model: TracedModel, force: bool) -> None:
        known: Mapping[str, str] = self.manifest.get("fingerprints", {})
        for name in self.names:
            if tuple(model.weight(name).shape) != self.updates[name].shape:
                raise KtError(
                    f"{name} has another shape in {model.name}; the edit was solved for {self.manifest.get('model')}"
                )
            if not force and name in known and model.fingerprint([name]) != known[name]:
                raise KtError(
                    f"{name} in {model.name} is not the weight this edit was solved for (already applied, another "
                    "model, or another dtype?); load the model it names, or pass force=True"
                )

    # Keeping ----------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> Path:
        """Write safetensors with the manifest inside; loading it runs no code."""
        arrays: dict[str, Tensor] = {}
        for name, update in self.updates.items():
            if isinstance(update, Dense):
                arrays[f"dense/{name}"] = update.matrix
            else:
                arrays[f"left/{name}"], arrays[f"right/{name}"] = update.left, update.right
        arrays |= {f"target/{n}": t for n, t in self.targets.items()} | {f"key/{n}": k for n, k in self.keys.items()}
        report = [vars(r) for r in self.report]
        return save_arrays(
            path, arrays, {"kind": KIND, "weights": list(self.updates), "report": report, **self.manifest}
        )

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read an edit file.

        Raises:
            BadFile: not there, cut short, or not an edit.
        """
        arrays, manifest = load_arrays(path, kind=KIND, framework="pt")
        try:
            weights = manifest.pop("weights")
            updates = {n: _update(arrays, n) for n in weights}
            report = tuple(RequestReport(**{k: _pair(v) for k, v in r.items()}) for r in manifest.pop("report"))
        except (KeyError, TypeError) as error:
            raise BadFile(f"{path}: the edit file lacks {error}; save the edit again") from None
        part = lambda word: {n.removeprefix(word): t for n, t in arrays.items() if n.startswith(word)}  # noqa: E731
        return cls(updates, manifest, report, part("target/"), part("key/"))

    # Looking ----------------------------------------------------------------------------------------------------
    def to_dataframe(self) -> pd.DataFrame:
        """One row a request: probabilities and ranks of target and old answer, before and after."""
        import pandas as pd

        rows = []
        for r in self.report:
            row: dict[str, Any] = {
                "id": r.id,
                "prompt": r.prompt,
                "subject": r.subject,
                "target": r.target,
                "answer": r.answer,
            }
            for what in ("target_prob", "target_rank", "answer_prob", "answer_rank"):
                before, after = getattr(r, what) or (None, None)
                row |= {f"{what}_before": before, f"{what}_after": after}
            rows.append(row)
        return pd.DataFrame(rows)

    def figure(self) -> go.Figure:
        """Mean probability of the new and the old answer, before and after, and of the new one under the control."""
        from ..figures import Change, before_after
        from ..stats import bootstrap_mean

        old = [r.answer_prob for r in self.report if r.answer_prob is not None]
        new = [r.target_prob for r in self.report]
        alone = [(r.target_prob[0], r.control_prob) for r in self.report if r.control_prob is not None]
        rows = {"new answer": new, "new answer, MLP part alone": alone, "old answer": old}
        changes = [Change(n, *(bootstrap_mean(list(v)) for v in zip(*p, strict=True))) for n, p in rows.items() if p]
        title = f"{self.manifest.get('method', 'edit')}: {len(self.report)} requests"
        return before_after(changes, title=title, subtitle="joint probability, teacher-forced", x_title="probability")

    def __repr__(self) -> str:
        method, alpha = self.manifest.get("method", "?"), self.alpha
        weights = ", ".join(f"{n} ({_form(u)})" for n, u in self.updates.items())
        return f"Edit({method}, {len(self.requests)} requests, alpha={alpha}, {weights})"

    def _repr_html_(self) -> str:
        return self.to_dataframe().to_html(index=False, escape=True, float_format="{:.3g}".format)


def merge(model: TracedModel, edit: Edit, folder: str | Path) -> Path:
    """Write the edited model as a Hugging Face folder: whole, or not at all.

    Raises:
        KtError: the folder exists and is not empty.
    """
    import secrets
    import shutil

    from ..artifacts import writing

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise KtError(f"{folder} exists and is not empty; name a new folder for the merged model")
    temporary = folder.with_name(f".{folder.name}.tmp-{secrets.token_hex(4)}")
    try:
        with writing(folder), edit.applied(model):
            temporary.mkdir(parents=True)
            model.module.save_pretrained(temporary)
            model.tokenizer.save_pretrained(temporary)
            if folder.exists():
                folder.rmdir()
            temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def fingerprints(model: TracedModel, names: Sequence[str]) -> dict[str, str]:
    """Each weight's SHA-256 in this model."""
    return {name: model.fingerprint([name]) for name in names}


def _form(update: Update) -> str:
    return "dense" if isinstance(update, Dense) else f"rank {update.rank}"


def _update(arrays: Mapping[str, Tensor], name: str) -> Update:
    if f"dense/{name}" in arrays:
        return Dense(arrays[f"dense/{name}"])
    return LowRank(arrays[f"left/{name}"], arrays[f"right/{name}"])


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
