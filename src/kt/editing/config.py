"""The configuration of a method: frozen settings, each with its symbol and source, and the plan that follows from them.

A method is one file in `methods/`: a subclass of `Config` under one `@method` line. Reading configurations, their names
and their settings imports no torch, so that presets, `kt --help` and `kt ls methods` stay fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from difflib import get_close_matches
from numbers import Integral
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from ..errors import KtError
from .closed_form.contexts import Contexts, memit_contexts

if TYPE_CHECKING:
    from ..model.model import TracedModel
    from .plan import Plan

AUTO = "auto"
"""A value that follows from the model and the requests."""
MOST = (2 - 2**-23) * 2.0**127
"""The largest float32: larger settings become infinite where they are used."""
SQUARED = MOST**0.5
"""The largest number whose square is one: of what enters a gradient, a step or a state, which are squared (Adam,
norms)."""
TINY = 2.0**-126
"""The smallest float32 of full precision: smaller settings become 0 there, or nearly, and are divided by."""
_TYPES = {"float": float, "int": int, "bool": bool, "str": str, "tuple": tuple}


class Setting(NamedTuple):
    """A setting's description, beside its default.

    Attributes:
        symbol: its symbol in the paper that `source` names; – for none.
        about: what it is, in one sentence.
        source: paper and section or equation, or the file of the authors' code.
        unit: what it is counted in.
        own: the method's default comes before a value that a preset shares among all methods. So does every default
            of a setting that the method takes over from its base.
        least: the smallest number; None where the configuration checks the value itself.
        most: the largest number.
    """

    symbol: str
    about: str
    source: str
    unit: str = ""
    own: bool = False
    least: float | None = 0
    most: float = MOST

    @property
    def text(self) -> str:
        return f"{self.about} ({self.unit})" if self.unit else self.about


def setting(default: Any, *, source: str, about: str = "", symbol: str = "–", **more: Any) -> Any:
    """A field of a `Config`; see `Setting` for the arguments. Without `about`, a new default of the base's setting."""
    return field(default=default, metadata={"setting": Setting(symbol, about, source, **more)})


class NotGiven(tuple[int, ...]):
    """Layers that were not given: `resolve` takes them from a trace, a probe or the model's depth."""


LATER = NotGiven()


@dataclass(frozen=True)
class Config:
    """Base of every method's configuration.

    Raises:
        KtError: a value is of the wrong type or sign.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    place: ClassVar[int]
    writes_attention: ClassVar[bool] = False
    keeps_history: ClassVar[bool] = False  # by default, between the edits of a session
    writes_contexts: ClassVar[bool] = True  # False: a request is read in its own prompt alone
    effect: ClassVar[str] = ""
    """The kind of its edits where they leave the weights alone: `context` or `adapter`."""
    depth: ClassVar[tuple[int, int, int] | None] = None
    """First and last MLP layer, and the model's last: a method's own, carried over to other models by relative depth.
    They come before the layers that a preset shares among all methods, which are MEMIT's, and not before those that it
    has for this one. None: the method takes the shared layers."""

    revision: ClassVar[int] = 0
    """Counts changes of what the method solves, or of its values in presets: an unfinished run that an older kt began
    is then solved anew, and not gone on with."""

    by_name: ClassVar[tuple[str, ...]] = ()
    """Properties that read a setting which is one of some words: each class names its own, and all are read at once, so
    that a wrong word is refused before any work."""

    layers_mlp: tuple[int, ...] = setting(
        LATER,
        symbol="R_mlp; l′..L′",
        about="layers whose MLP output projection is written",
        unit="from 0",
        source="IntAttn-Edit section 5.1; JEEP D.7",
    )

    unused: Mapping[str, Any] = field(default_factory=dict, kw_only=True, compare=False, repr=False)
    """Values given for settings of other methods, as presets share them: without effect, kept in the manifest."""

    def __init_subclass__(cls) -> None:
        """Complete the settings that only give a base's setting another default and source."""
        for name, spec in vars(cls).items():
            if isinstance(spec, Field) and "setting" in spec.metadata and not spec.metadata["setting"].about:
                known = next(
                    fs for base in cls.__mro__[1:] if name in (fs := vars(base).get("__dataclass_fields__", {}))
                )
                mine = known[name].metadata["setting"]._replace(source=spec.metadata["setting"].source, own=True)
                spec.metadata = MappingProxyType({"setting": mine})

    def __post_init__(self) -> None:
        for spec in setting_fields(type(self)):
            about = spec.metadata["setting"]
            check_value(spec.name, type_of(spec), getattr(self, spec.name), about.least, about.most)
        for name in (name for base in type(self).__mro__ for name in vars(base).get("by_name", ())):
            getattr(self, name)

    @classmethod
    def contexts(cls, model: TracedModel, seed: int) -> Contexts:
        """The context templates that a session lets the model write where none are given."""
        return memit_contexts(model, seed) if cls.writes_contexts else Contexts()

    def require(self, model: TracedModel) -> None:
        """Refuse, before any work, what neither a trace nor a default can give this model.

        Raises:
            KtError: it is not given, or is another model's.
        """

    def plan(self) -> Plan:
        """The plan of the edit; needs a configuration with all layers and α.

        Raises:
            KtError: the method's class has none.
        """
        raise KtError(
            f"{type(self).__name__} has no plan of its edit; give the class a method plan (docs/add-a-method.md)"
        )

    def refuse_old_names(self) -> None:
        """Refuse a name that only files of older versions may have.

        Raises:
            KtError: the message has today's.
        """

    def refuse_idle(self, given: Collection[str]) -> None:
        """Refuse settings that a user gave by name and that others of the values leave without effect. Only for those
        that presets give, too: a value that no preset has is refused where it is made.

        Raises:
            KtError: one of `given` is such a setting.
        """

    def outline(self) -> Plan:
        """The plan with a layer or an α wherever one is still to be found, which needs no model: what a method can take
        depends on neither."""
        some: dict[str, Any] = dict.fromkeys(self.missing_layers, (0,))
        if self.traces_alpha:
            some["alpha"] = 0.5
        return replace(self, **some).plan()

    @property
    def layer_settings(self) -> list[str]:
        """The layer settings that the plan reads."""
        return [spec.name for spec in setting_fields(type(self)) if spec.name.startswith("layers")]

    @property
    def missing_layers(self) -> list[str]:
        """The layer settings that were not given."""
        return [name for name in self.layer_settings if isinstance(getattr(self, name), NotGiven)]

    @property
    def follows_keys(self) -> bool:
        """Whether a number is to follow from keys, values or weights: a ridge, a rate, a box."""
        specs = [spec for spec in setting_fields(type(self)) if type_of(spec).startswith("float | Literal")]
        return any(getattr(self, spec.name) == AUTO for spec in specs)

    @property
    def needs_evidence(self) -> bool:
        """Whether α comes from a trace, or layers from a probe."""
        return "layers_high" in self.missing_layers or self.traces_alpha

    @property
    def traces_alpha(self) -> bool:
        """Whether α comes from a trace."""
        return False

    @property
    def fixed_alpha(self) -> float | None:
        """α if it is one known number; else None."""
        return 0.0

    @property
    def mean_alpha(self) -> float:
        """Attention's share of the update, as a mean over requests."""
        return 0.0

    def as_dict(self) -> dict[str, Any]:
        """The settings by name, as a manifest keeps them: those of `FORMAT_1` in every file, then the method's own."""
        layers = {name: tuple(sorted(set(value))) for name, value in self.unused.items() if name.startswith("layers")}
        values = {spec.name: getattr(self, spec.name) for spec in setting_fields(type(self))}
        return FORMAT_1 | dict(self.unused) | layers | values

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        return {spec.name: spec.metadata["setting"] for spec in setting_fields(cls)}

    @classmethod
    def own_defaults(cls) -> dict[str, Any]:
        """Defaults that come before a preset's shared values."""
        return {spec.name: spec.default for spec in setting_fields(cls) if spec.metadata["setting"].own}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """From values by name; those of other methods are `unused`, and layers may come as lists."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        known = {name: values.pop(name) for name in cls.settings() if name in values}
        return cls(**known, unused=values)


def setting_fields(config: type[Config]) -> list[Field[Any]]:
    """The fields that are settings."""
    return [spec for spec in fields(config) if "setting" in spec.metadata]


FORMAT_1: dict[str, Any] = {
    "layers_mlp": (), "layers_attn": (), "layers_high": (), "alpha": 0.0, "v_lr": 0.5, "v_num_grad_steps": 25,
    "v_weight_decay": 1e-3, "kl_factor": 0.0625, "clamp_norm_factor": 4.0, "mom2_update_weight": 15000.0,
    "mom2_update_weight_attn": None, "mom2_update_weight_high": None, "mom2_adjustment": True,
    "fact_token": "subject_last", "spread": "even", "attn_aim": "hidden", "joint_targets": False, "coupled": False,
    "modules": "mlp", "nullspace_threshold": 2e-2, "L2": 10.0, "clamp_norm_factor_high": 0.25,
    "v_weight_decay_high": 0.5, "min_loss": 0.9, "region": "both", "separate_targets": False, "high_module": "mlp",
    "emmet_lambda": 0.1, "shared_normaliser": True, "num_steps": 25, "lr": 5e-4, "weight_decay": 0.0,
    "norm_constraint": None, "objective_optimization": "prompt_last", "batch_size": 8, "stop_loss": 1e-2, "rank": 8,
    "lora_alpha": 32.0, "lora_dropout": 0.0,
}  # fmt: skip
"""The settings that every edit file lists, of whichever method it is, so that files of all versions compare equal. A
new method's settings are listed in its own files only; add nothing here."""


Chosen = TypeVar("Chosen", bound=type[Config])
REGISTERED: dict[str, type[Config]] = {}


def method(name: str, summary: str, place: int = 1000) -> Callable[[Chosen], Chosen]:
    """Register a configuration as the method `name`.

    Args:
        summary: one line for `kt ls methods`.
        place: orders the lists of methods; equal places are ordered by name.
    """

    def register(config: Chosen) -> Chosen:
        config.name, config.summary, config.place = name, summary, place
        REGISTERED[name] = config
        return config

    return register


def type_of(spec: Field[Any]) -> str:
    """A field's type as it is written, with or without postponed annotations."""
    return spec.type if isinstance(spec.type, str) else getattr(spec.type, "__name__", str(spec.type))


def share(value: float, name: str) -> None:
    """Refuse what is no share above zero.

    Raises:
        KtError: it is not.
    """
    if not 0 < value <= 1:
        raise KtError(f"{name} {value:g} must be a share above 0, at most 1")


def check_value(name: str, annotation: str, value: Any, least: float | None = 0, most: float = MOST) -> None:
    """Refuse a value that is not of the annotated type, a number below `least` (None: any value) or above `most`, and
    one beyond float32 or so small that it is 0 there.

    Raises:
        KtError: it is not.
    """
    automatic = AUTO in annotation
    if least is None or (value is None and "None" in annotation) or (automatic and value == AUTO):
        return
    wanted = next(kind for word, kind in _TYPES.items() if annotation.startswith(word))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is tuple and not (isinstance(value, tuple) and all(_is_whole(part) for part in value)):
        shown = f"{list(value)!r} must be" if isinstance(value, tuple) else f"{value!r} is no tuple of"
        raise KtError(f"{name} {shown} whole numbers from 0, as [4, 5]")
    if wanted is tuple and len(set(value)) < len(value):
        raise KtError(f"{name} {list(value)!r} names a layer twice; name each once")
    if not (number if wanted is float else isinstance(value, wanted) and (number or wanted is not int)):
        others = f", nor {AUTO}" if automatic else ""
        raise KtError(f"{name} {value!r} is no {wanted.__name__}{others}; see docs/methods.md")
    if number and value > MOST:  # before isfinite, which a whole number beyond float64 makes fail
        raise KtError(f"{name} is beyond float32, in which models compute; give a number below {MOST:.2g}")
    if number and not (math.isfinite(value) and value >= 0):
        raise KtError(f"{name} {value!r} must be {f'at least {least:g}' if least else 'zero or more'}")
    if number and value > most:
        raise KtError(
            f"{name} {value:g} has a square beyond float32, in which models compute; give a number below {most:.2g}"
        )
    if number and 0 < value < TINY:
        raise KtError(f"{name} {value:g} is 0 in float32, in which models compute; give at least {TINY:.2g}")
    if number and value < least:
        raise KtError(f"{name} must be at least {least:g}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


WRITTEN = "weights of a layer that are written: mlp, attn, both, block, or linear maps, as mlp.gate_proj,mlp.up_proj"
MAPS = {"mlp": ("mlp",), "attn": ("attn",), "both": ("attn", "mlp")}


def linear_maps(modules: str, others: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The linear maps that `modules` names, as `Site` takes them.

    Args:
        modules: `mlp` (down_proj), `attn` (W_o), `both`, or maps by role or module name, such as
            `mlp.gate_proj,mlp.up_proj`.
        others: other words that the method knows, for the message.

    Raises:
        KtError: neither.
    """
    names = MAPS.get(modules) or tuple(part.strip() for part in modules.split(","))
    if modules not in MAPS and not all(name.partition(".")[0] in ("mlp", "attn") and "." in name for name in names):
        known = ", ".join((*MAPS, *others))
        raise KtError(f"modules {modules!r} is unknown; choose among {known}, or name linear maps, as mlp.up_proj")
    return names


def one_of(value: str, known: Collection[str], name: str) -> str:
    """The value; a KtError that lists the known ones if it is none of them."""
    if value not in known:
        near = get_close_matches(str(value).lower(), known, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise KtError(f"{name} {value!r} is unknown; {meant}choose one of {', '.join(known)}")
    return value
