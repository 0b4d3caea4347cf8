"""The arguments of a run of causal tracing, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BadFact
from ..model import TracedModel
from .patches import EVERY_HEAD, KINDS, Patch
from .trace import DIRECTIONS, METRICS

METHODS = ("exact", "atp")

MIN_GAP = 0.5
"""Logits. Where |d_clean - mean_S d_corrupted| is below it, eq. 8 divides by nearly nothing, and `keep="known"` leaves
the fact out: half a logit, where facts that a model recalls have gaps of 5 to 10."""

_NO_GAP = 1e-5  # `keep="all"` cannot trace below the rounding of logits: eq. 8 has no denominator there

FLAT = f"clean and corrupted logit difference are less than {MIN_GAP} apart"
STILL = "the corruption does not move the logit difference"


@dataclass(frozen=True)
class Settings:
    """See `causal_trace`. `given` says that the noise is the caller's."""

    kinds: Sequence[str]
    metrics: Sequence[str]
    samples: int
    window: int
    noise_scale: float
    corrupt: str
    keep: str
    seed: int
    max_rows: int | None
    given: bool
    direction: str = "denoise"
    method: str = "exact"

    def __post_init__(self) -> None:
        for name in ("kinds", "metrics"):
            value = getattr(self, name)
            words = [value] if isinstance(value, str) else value
            object.__setattr__(self, name, tuple(dict.fromkeys(str(word) for word in words)))
        for kind in self.kinds:
            if kind != EVERY_HEAD:
                Patch.parse(kind)
        for wrong, message in self._problems():
            if wrong:
                raise BadFact(message)

    def _problems(self) -> list[tuple[bool, str]]:
        return [
            (not self.kinds, _choose("kinds", self.kinds, KINDS)),
            (not self.metrics or not set(self.metrics) <= set(METRICS), _choose("metrics", self.metrics, METRICS)),
            (self.samples < 1, f"samples is {self.samples}; give at least 1"),
            (self.window < 1, f"window is {self.window}; give at least 1"),
            (not self.noise_scale > 0, f"noise_scale is {self.noise_scale}; give a number above 0 (3 is usual)"),
            (self.corrupt not in ("noise", "swap"), f"corrupt is {self.corrupt!r}; choose noise or swap"),
            (self.corrupt == "swap" and self.given, "noise was given, but corrupt is 'swap'; leave one of them out"),
            (self.direction not in DIRECTIONS, _choose("direction", [self.direction], DIRECTIONS)),
            (self.method not in METHODS, _choose("method", [self.method], METHODS)),
            (self.keep not in ("known", "all"), f"keep is {self.keep!r}; choose known or all"),
            (self.max_rows is not None and self.max_rows < 1, f"max_rows is {self.max_rows}; give at least 1"),
        ]

    @property
    def min_gap(self) -> float:
        return MIN_GAP if self.keep == "known" else _NO_GAP

    @property
    def flat(self) -> str:
        """Why a fact with a smaller gap is left out."""
        return FLAT if self.keep == "known" else STILL

    def described(self, model: TracedModel, noise_level: float | None) -> dict[str, Any]:
        """What a trace's metadata says of its run."""
        return {
            "model": model.name,
            "revision": model.revision,
            "dtype": str(model.dtype).removeprefix("torch."),
            "n_layers": model.n_layers,
            "metrics": [metric for metric in METRICS if metric in self.metrics],
            "window": self.window,
            "corrupt": self.corrupt,
            "direction": self.direction,
            "method": self.method,
            "noise": None if self.corrupt == "swap" else "given" if self.given else "drawn",
            "noise_scale": None if noise_level is None else self.noise_scale,
            "noise_level": noise_level,
            "keep": self.keep,
            "min_gap": MIN_GAP,
            "seed": self.seed,
        }


def _choose(what: str, given: Sequence[str], among: Sequence[str]) -> str:
    return f"{what} {', '.join(given) or '(none)'}: choose among {', '.join(among)}"
