"""The verdict on an edit: what came of it, in numbers and in a line of words, and what it failed in.

    10 of 10 changed; 98% of neighbours kept; perplexity 23.3 -> 23.4

An edit can be finite, fit its keys and leave a wrecked model. So every solve is read back: the requests, their
neighbours (the next token's argmax, before and after), and perplexity on a small text that has nothing to do with them.
Each limit that is passed is a warning with the weight or request, the number and a remedy.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .._util.text import count, some_of, visible_lines
from ..errors import FailedCheck, warn_user
from ..evaluation.perplexity import check_losses
from ..facts.fact import Fact
from ..model.scoring import answer_row, teacher_force
from ..runs import parallel
from .request_report import LogProbs, RequestReport, told_prob, with_log_probs

if TYPE_CHECKING:
    from ..model.model import TracedModel


MOST_RANK = 0
"""The worst rank of a target's first token after the edit."""
MOST_MISSING = 1.0
"""The largest distance from the wanted value, relative to what was wanted: 1 is that of no edit at all."""
MOST_NORM_RATIO = 1.5
"""The largest ratio of a weight's norm to its norm before, or of before to after."""
MOST_PERPLEXITY = 1.1
"""The largest ratio of perplexity to that before."""
MOST_NEIGHBOURS = 200
"""Neighbours that are read, evenly over all of the requests'."""


class TextReading(NamedTuple):
    """Perplexity of the check's text, its name, and how many tokens it has."""

    perplexity: float
    text: str
    tokens: int


class SideEffects(NamedTuple):
    """The model beside the requests: the next token's argmax behind neighbours' prompts, and a text that has nothing to
    do with them (None where the tokenizer reads nothing of it)."""

    neighbours: dict[str, int]
    text: TextReading | None


def side_effects(model: TracedModel, facts: Sequence[Fact], text: TextReading | None = None) -> SideEffects:
    """Read what an edit of these facts should leave alone, from the model as it stands; `text` if it is known."""
    prompts = list(dict.fromkeys(near.prompt.rstrip() for fact in facts for near in fact.neighbours))
    prompts = prompts[:: math.ceil(len(prompts) / MOST_NEIGHBOURS) or 1]
    with parallel.alone():
        rows = [answer_row(model, (prompt, None)) for prompt in prompts]
        scores = teacher_force(model, rows, allow_nan=True)
        neighbours = {prompt: scores[prompt, None].predicted[0] for prompt in prompts}
        return SideEffects(neighbours, text or read_text(model))


def read_text(model: TracedModel) -> TextReading | None:
    """Perplexity of the check's text; infinite where a float has no room for it."""
    losses = check_losses(model)
    if losses is None:
        return None
    mean = sum(losses.nll) / sum(losses.tokens)
    return TextReading(math.exp(mean) if not mean > 700 else math.inf, losses.source, sum(losses.tokens))


def about_side_effects(before: SideEffects, after: SideEffects) -> dict[str, Any]:
    """The manifest's `neighbours` and `perplexity`, where they were read."""
    about: dict[str, Any] = {}
    if before.neighbours:
        kept = sum(token == after.neighbours[prompt] for prompt, token in before.neighbours.items())
        about["neighbours"] = {"kept": kept, "n": len(before.neighbours)}
    if before.text is not None and after.text is not None:
        values = {"before": before.text.perplexity, "after": after.text.perplexity}
        about["perplexity"] = values | {"text": before.text.text, "tokens": before.text.tokens}
    return about


def text_reading(manifest: Mapping[str, Any], when: str) -> TextReading | None:
    """The reading of a manifest's `perplexity` from `before` or `after` the edit."""
    about = manifest.get("perplexity")
    return None if about is None else TextReading(_number(about[when]), about["text"], about["tokens"])


@dataclass(frozen=True)
class Verdict:
    """What came of an edit.

    Args:
        requests: how many there were.
        changed: how many targets' first tokens have rank 0 after it.
        neighbours: how many neighbours' next tokens are as before, of how many; None where the requests have none.
        perplexity: before and after, on the check's text (not finite: NaN); None where it was not read.
        came_through: by aim, the share of the wanted change of its value that came through; mean over requests.
        missing: by aim, what is still missing, relative to what was wanted.
        norm_ratios: by weight, its norm over that before.
        warnings: one line for each limit that was passed.
    """

    requests: int
    changed: int
    neighbours: tuple[int, int] | None = None
    perplexity: tuple[float, float] | None = None
    came_through: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, float] = field(default_factory=dict)
    norm_ratios: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, manifest: Mapping[str, Any], report: Sequence[RequestReport]) -> Verdict | None:
        """From what an edit's read-back left in it; None where it was not read back."""
        if not report:
            return None
        near, text = manifest.get("neighbours"), manifest.get("perplexity")
        change = manifest.get("value_change") or {}
        written = manifest.get("written_aims", change)  # what nothing is written for cannot come through
        change = {aim: part for aim, part in change.items() if aim in written}
        means = [
            {aim: part[name]["mean"] for aim, part in change.items() if part[name]["mean"] is not None}
            for name in ("came_through", "left")
        ]
        numbers = cls(
            requests=len(report),
            changed=sum(_took(request) for request in report),
            neighbours=None if near is None else (near["kept"], near["n"]),
            perplexity=None if text is None else (_number(text["before"]), _number(text["after"])),
            came_through=means[0],
            missing=means[1],
            norm_ratios={n: r for n, r in manifest.get("norm_ratios", {}).items() if r is not None},
        )
        knobs = Knobs.of(str(manifest.get("method")))
        if manifest.get("not_found"):  # of a context edit: no model follows a text that it is not given
            knobs = knobs._replace(more=UNFOUND, free=UNFOUND, apart=UNFOUND)
        fallen = [told for r, logs in with_log_probs(manifest, report) if (told := _fell(r, logs))]
        numbers = replace(numbers, warnings=tuple(numbers._warnings(report, fallen, knobs)))
        return numbers.lacking(manifest.get("unwritten", ()))

    def lacking(self, subjects: Sequence[str]) -> Verdict:
        """The same of these requests too, which were asked for and for which nothing was written."""
        if not subjects:
            return self
        asked = self.requests + len(subjects)
        left = _counted([(repr(subject), "left as it is") for subject in subjects], asked, "request")
        verb = "was" if len(subjects) == 1 else "were"
        line = f"{left} {verb} not written; the warnings of the solve say why, and what to do"
        return replace(self, requests=asked, warnings=(line, *self.warnings))

    @classmethod
    def joined(cls, verdicts: Sequence[Verdict | None]) -> Verdict | None:
        """Of edits that are not in the model together: sums of counts, the worst perplexity; None where one is."""
        known = [verdict for verdict in verdicts if verdict is not None]
        if not known or len(known) < len(verdicts):
            return None
        near = [verdict.neighbours for verdict in known if verdict.neighbours is not None]
        texts = [verdict.perplexity for verdict in known if verdict.perplexity is not None]
        return cls(
            sum(verdict.requests for verdict in known),
            sum(verdict.changed for verdict in known),
            (sum(kept for kept, _ in near), sum(n for _, n in near)) if near else None,
            max(texts, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1] / pair[0]) if texts else None,
            warnings=tuple(dict.fromkeys(line for verdict in known for line in verdict.warnings)),
        )

    @property
    def text(self) -> str:
        """The numbers in a line."""
        parts = [f"{self.changed} of {self.requests} changed"]
        if self.neighbours is not None:
            parts.append(f"{self.neighbours[0] / self.neighbours[1]:.0%} of neighbours kept")
        if self.perplexity is not None:
            parts.append("perplexity " + " -> ".join(map(_shown, self.perplexity)))
        return "; ".join(parts)

    def __repr__(self) -> str:
        return f"Verdict({self.text})"

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        said = f"<p>{html.escape(self.text)}</p>"
        return said + "".join(f"<p>warning: {html.escape(visible_lines(line))}</p>" for line in self.warnings)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        near, text = self.neighbours, self.perplexity
        return {
            "text": self.text,
            "requests": self.requests,
            "changed": self.changed,
            "neighbours": None if near is None else {"kept": near[0], "n": near[1]},
            "perplexity": None if text is None else {"before": text[0], "after": text[1]},
            "came_through": dict(self.came_through),
            "missing": dict(self.missing),
            "norm_ratios": dict(self.norm_ratios),
            "warnings": list(self.warnings),
        }

    def warn(self) -> None:
        """Each warning as Python's."""
        for line in self.warnings:
            warn_user(line, FailedCheck)

    def _warnings(self, report: Sequence[RequestReport], fallen: Sequence[tuple[str, str]], knobs: Knobs) -> list[str]:
        """The lines, where `fallen` are the targets less likely than before, with their probabilities."""
        lines = []
        apart = knobs.apart if len(report) > 1 or not knobs.layers else ALONE
        changed = [(n, f"x {r:.2f}") for n, r in self.norm_ratios.items() if not _within(r)]
        worse = self.perplexity is not None and not self.perplexity[1] <= MOST_PERPLEXITY * self.perplexity[0]
        if unchanged := [(_name(r), f"rank {r.target_rank[1]}") for r in report if not _took(r)]:
            through = max(self.came_through.values(), default=1.0)
            verb = "does" if len(unchanged) == 1 else "do"
            remedy = knobs.more if through >= 0.5 else f"{through:.0%} of the wanted change was written: {knobs.free}"
            if changed or worse:  # a stronger edit would do more of the harm that the next lines name
                remedy = apart
            lines.append(f"{_counted(unchanged, len(report), 'request')} {verb} not give the target first; {remedy}")
        if fallen:
            verb = "is" if len(fallen) == 1 else "are"
            lines.append(f"{_counted(fallen, len(report), 'target')} {verb} less likely than before; {apart}")
        if far := [(aim, f"{share:.2f}") for aim, share in self.missing.items() if share > MOST_MISSING]:
            lines.append(f"more is missing than was wanted at {_counted(far, len(self.missing), 'aim')}; {APART}")
        if changed:
            what = f"the norm of {_counted(changed, len(self.norm_ratios), 'weight')} changed too much"
            lines.append(f"{what}; {knobs.less}" + ", or write more layers" * knobs.layers)
        if self.perplexity is not None and worse:
            before, after = map(_shown, self.perplexity)
            if math.isnan(self.perplexity[0]):
                return [*lines, f"perplexity of unrelated text is {before} already in the unedited model; {SOUND}"]
            largest = max(self.norm_ratios.items(), key=lambda item: max(item[1], 1 / (item[1] or 1e-9)), default=None)
            most = "" if largest is None else f" (the norm of {largest[0]} changed most: x {largest[1]:.2f})"
            lines.append(
                f"perplexity of unrelated text rose, {before} -> {after}{most}; {knobs.less}"
                + ", or take other layers" * knobs.layers
            )
        return lines


APART = "requests of one batch pull apart, or the layers do not reach: edit fewer at once, or take other layers"

ALONE = "the layers do not reach: take other layers (kt layers compares them by editing)"

UNFOUND = "some prompts do not find their facts: take the other retriever, or reword them"

SOUND = "check its weights, or load it in float32"


class Knobs(NamedTuple):
    """A method's own settings that make an edit stronger, smaller, or less held back, as remedies. `layers`: whether
    the user chooses them."""

    more: str
    less: str
    free: str
    apart: str = APART
    layers: bool = True

    @classmethod
    def of(cls, method: str) -> Knobs:
        """From the names of the method's settings."""
        from .methods import METHODS

        if method in METHODS and METHODS[method].effect == "context":
            more = "the model does not follow the text: take a larger model, or a method that edits its weights"
            return cls(more, "edit fewer facts, or take scr", more, more, layers=False)
        names = {each.name for each in fields(METHODS[method])} if method in METHODS else set()
        if "editor" in names:
            more = "train its editor on more records like these, or for more steps"
            return cls(more, "edit fewer facts, or train its editor with a larger c_loc", more, more, layers=False)
        ridges = " or ".join(n for n in ("mom2_update_weight", "L2", "emmet_lambda") if n in names)
        reach = " or ".join(n for n in ("clamp_norm_factor", "v_num_grad_steps", "lr", "num_steps") if n in names)
        raised, lowered = (f"raise {ridges}, " if ridges else ""), (f"lower {reach}" if reach else "")
        more = f"raise {reach}, or take other layers" if reach else "take other layers"
        return cls(more, f"{raised}{lowered or 'edit fewer facts'}", f"lower {ridges}" if ridges else more)


def _took(report: RequestReport) -> bool:
    """Logits that are not numbers rank nothing."""
    return report.target_rank[1] <= MOST_RANK and not math.isnan(report.target_prob[1])


def _fell(report: RequestReport, log_probs: LogProbs) -> tuple[str, str] | None:
    """The request and its target's probability before and after, where that is less likely than before."""
    told = [f"{prob:.3g}" for prob in report.target_prob]
    before, after = report.target_prob
    if "target" in log_probs:
        before, after = log_probs["target"]
        told = [told_prob(each) for each in (before, after)]
    return None if after >= before else (_name(report), " -> ".join(told))


def _within(ratio: float) -> bool:
    return 1 / MOST_NORM_RATIO <= ratio <= MOST_NORM_RATIO


def _name(report: RequestReport) -> str:
    return f"{report.subject!r} -> {report.target!r} ({report.id})"


def _number(value: float | None) -> float:
    """NaN for a null of JSON, and for what is not finite."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _shown(value: float) -> str:
    return "not a number" if math.isnan(value) else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _counted(values: Sequence[tuple[str, str]], total: int, noun: str) -> str:
    """`4 of 10 requests ('A' -> 'x' (3): rank 4, ... and 1 more)`."""
    some = some_of([f"{name}: {value}" for name, value in values])
    return f"{len(values)} of {count(total, noun)} ({some})"
