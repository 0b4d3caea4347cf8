"""From a preset's TOML to its entries: one value each, with the method and variant it is for and where it comes from.

Every key is checked when the file is read, so that a misspelt one is an error and not a value that is never used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BadFile

# What each hyper-parameter is called in the papers, and what it is; the one list of names that a preset may hold.
#
# Symbols are those of the paper named, and IntAttn-Edit's (arXiv 2510.27400) where none is. JEEP (arXiv 2412.17872)
# marks
# its high region with * and its low one with ′, which is left out here where other methods have the same value.


class Symbol(NamedTuple):
    """A hyper-parameter's symbol in the papers (– for none), what it is, and what it is counted in."""

    symbol: str
    about: str
    unit: str = ""

    @property
    def text(self) -> str:
        return f"{self.about} ({self.unit})" if self.unit else self.about


SYMBOLS: dict[str, Symbol] = {
    "layers_mlp": Symbol("R_mlp; l′..L′", "layers whose MLP output projection is written", "from 0"),
    "layers_attn": Symbol("R_attn", "layers whose attention output projection is written", "from 0"),
    "layers_high": Symbol("l*..L*", "JEEP's high region", "from 0"),
    "alpha": Symbol("α (eq. 12)", "IntAttn-Edit: attention's share of the update; the MLP's is 1 - α"),
    "v_lr": Symbol("–", "Adam's learning rate in the search for δ"),
    "v_num_grad_steps": Symbol("–", "forward passes in the search for δ, one more than updates"),
    "v_weight_decay": Symbol("β (JEEP eq. 11)", "weight of ‖δ‖ in the search", "of ‖δ‖/‖v‖², as the code has it"),
    "v_weight_decay_high": Symbol("β* (JEEP eq. 11)", "JEEP: the same in the high region", "of ‖δ‖/‖v‖²"),
    "kl_factor": Symbol("α′ (JEEP eq. 11)", "weight of the KL divergence at the subject's last token"),
    "clamp_norm_factor": Symbol("γ (JEEP eq. 12)", "largest ‖δ‖", "times ‖v‖"),
    "clamp_norm_factor_high": Symbol("γ* (JEEP eq. 12)", "JEEP: largest ‖δ‖ in the high region", "times ‖v‖"),
    "mom2_update_weight": Symbol("λ", "weight of what the layer already knows, C₀ = λ E[kkᵀ]", "keys"),
    "mom2_update_weight_attn": Symbol("λ of W_o", "IntAttn-Edit: λ of the attention path, where not the MLP's", "keys"),
    "mom2_update_weight_high": Symbol("λ*", "JEEP: λ in the high region", "keys"),
    "mom2_adjustment": Symbol("C⁻¹ (ROME eq. 2)", "ROME: whether the second moment enters the direction u = C⁻¹k"),
    "fact_token": Symbol("i′", "token whose keys and values are edited"),
    "spread": Symbol("1/(L-l+1)", "how the residual is divided among layers"),
    "attn_aim": Symbol("v_attn (eq. 10)", "IntAttn-Edit: what the attention path aims at"),
    "joint_targets": Symbol("–", "IntAttn-Edit: search for both paths' values together"),
    "coupled": Symbol("–", "IntAttn-Edit: let the MLP path see the attention's write"),
    "modules": Symbol("–", "weights of a layer that are written: mlp, both, block"),
    "nullspace_threshold": Symbol("P", "AlphaEdit: singular values of C below it span what P leaves free"),
    "L2": Symbol("I", "AlphaEdit, UltraEdit: factor of I in the solve"),
    "min_loss": Symbol("–", "JEEP: the search stops at this probability, despite the name"),
    "region": Symbol("–", "JEEP's ablation: both, low, high, joint-low, joint-high"),
    "separate_targets": Symbol("–", "JEEP's ablation: each region's δ searched for alone"),
    "high_module": Symbol("–", "JEEP's ablation: mlp or attn in the high region"),
    "emmet_lambda": Symbol("λ", "EMMET: added to the diagonal of KᵀC⁻¹K; the paper has none"),
    "num_steps": Symbol("–", "fine-tuning: passes over the requests"),
    "lr": Symbol("–", "fine-tuning: Adam's learning rate; UltraEdit: step of the gradient"),
    "weight_decay": Symbol("–", "fine-tuning: Adam's weight decay"),
    "norm_constraint": Symbol("ε", "FT-L: how far each weight may move, ‖ΔW‖∞ ≤ ε"),
    "objective_optimization": Symbol(
        "–", "fine-tuning: prompt_last (all target tokens at the prompt's end), target_new"
    ),
    "batch_size": Symbol("–", "fine-tuning: requests per gradient step"),
    "stop_loss": Symbol("–", "fine-tuning: a mean loss below it ends the training", "nats"),
    "shared_normaliser": Symbol("–", "UltraEdit: normalise all weights of a shape together"),
    "rank": Symbol("r", "LoRA: rank of the update"),
    "lora_alpha": Symbol("α", "LoRA: the update is scaled by α / r"),
    "lora_dropout": Symbol("–", "LoRA: share of its input that is dropped while training"),
}

METHOD_NAMES = (
    "intattn",
    "memit",
    "rome",
    "r-rome",
    "intattn-rome",
    "pmet",
    "alphaedit",
    "jeep",
    "emmet",
    "ultraedit",
    "ft",
    "ft-l",
    "ft-wd",
    "lora",
)
"""Listed here, too, so that reading a preset does not import the methods, and torch with them (a test compares)."""


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
SUFFIX = ".toml"
TOP = ("summary", "source", "inherits", "match", "hyper_parameters", "methods", "variants")
VARIANT = ("summary", "source", "hyper_parameters", "methods")
ABOUT = ("source", "sources")  # keys of a table of values that are no values


class Entry(NamedTuple):
    """One value: for a method (None: for all), in a variant (None: in all)."""

    method: str | None
    variant: str | None
    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class Contents:
    """A file's own part of a preset, and which presets come before it."""

    summary: str
    source: str
    inherits: str | None
    match: Mapping[str, Any]
    entries: tuple[Entry, ...]
    like: Mapping[str, str]
    variants: tuple[str, ...]


def names() -> list[str]:
    """The presets that are shipped."""
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def path_of(name: str, beside: Path = Path()) -> Path:
    """The file of a preset: a shipped name, or the path of a TOML file (from the file that inherits it)."""
    if name.endswith(SUFFIX):
        return beside / name
    if name not in names():
        raise BadFile(f"no preset {name!r}; there are {', '.join(names())}, or name a file that ends in {SUFFIX}")
    return FOLDER / f"{name}{SUFFIX}"


def lineage(path: Path) -> list[Contents]:
    """The file's contents after those of every preset that it builds on."""
    seen: list[Path] = []
    found: list[Contents] = []
    while True:
        if path.resolve() in seen:
            raise BadFile(f"{path}: inherits itself ({' -> '.join(p.stem for p in [*seen, path])})")
        seen.append(path.resolve())
        found.append(read(path))
        above = found[-1].inherits
        if above is None:
            return found[::-1]
        path = _above(path, above)


def _above(path: Path, name: str) -> Path:
    try:
        above = path_of(name, path.parent)
    except BadFile as error:
        raise BadFile(f"{path}: inherits: {error}") from None
    if not above.is_file():
        raise BadFile(f"{path}: inherits {name!r}, and there is no file {above}")
    return above


def read(path: Path) -> Contents:
    """One file, checked."""
    table = _toml(path)
    _only(path, "", table, TOP)
    source = _text(path, table, "source") or path.name
    inherits = _text(path, table, "inherits")
    variants = _table(path, "", table, "variants")
    entries = list(_entries(path, "", table, None, source))
    for name in variants:
        where = f"variants.{name}"
        variant = _table(path, "variants", variants, name)
        _only(path, where, variant, VARIANT)
        entries += _entries(path, where, variant, name, _text(path, variant, "source") or source)
    methods = _table(path, "", table, "methods")
    like = {method: model for method, values in methods.items() if (model := _text(path, values, "like"))}
    match = _table(path, "", table, "match")
    summary = _text(path, table, "summary") or ""
    return Contents(summary, source, inherits, match, tuple(entries), like, tuple(variants))


def _entries(path: Path, where: str, table: Mapping[str, Any], variant: str | None, source: str) -> Iterator[Entry]:
    """The values of a file, or of one of its variants."""
    dot = f"{where}." if where else ""
    shared = _table(path, where, table, "hyper_parameters")
    yield from _values(path, f"{dot}hyper_parameters", shared, None, variant, source, ABOUT)
    methods = _table(path, where, table, "methods")
    for method in methods:
        if method not in METHOD_NAMES:
            raise BadFile(f"{path}: [{dot}methods.{method}] is no method of kt; known are {', '.join(METHOD_NAMES)}")
        own = _table(path, f"{dot}methods", methods, method)
        about = ABOUT if variant else (*ABOUT, "like")
        yield from _values(path, f"{dot}methods.{method}", own, method, variant, source, about)


def _values(
    path: Path,
    where: str,
    table: Mapping[str, Any],
    method: str | None,
    variant: str | None,
    source: str,
    about: tuple[str, ...],
) -> Iterator[Entry]:
    _only(path, where, table, (*about, *SYMBOLS))
    source = _text(path, table, "source") or source
    sources = _table(path, where, table, "sources")
    _only(path, f"{where}.sources", sources, tuple(name for name in table if name not in about))
    for name, value in table.items():
        if name not in about:
            value = tuple(value) if isinstance(value, list) else value
            yield Entry(method, variant, name, value, str(sources.get(name, source)))


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise BadFile(f"{path}: not TOML ({' '.join(str(error).split())})") from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not a text file"
        raise BadFile(f"cannot read the preset {path}: {why}") from None


def _only(path: Path, where: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise BadFile(f"{path}: unknown key {key!r}{f' in [{where}]' if where else ''}; {hint}")


def _table(path: Path, where: str, table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, Mapping):
        raise BadFile(f"{path}: {f'{where}.' if where else ''}{key} must be a table")
    return value


def _text(path: Path, table: Mapping[str, Any], key: str) -> str | None:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise BadFile(f"{path}: {key} {value!r} must be a text")
    return value
