"""What an edit adds to a model without changing a weight: text before its prompts, or values at one linear map.

A model carries the effects of the edits that are applied to it (`TracedModel.effects`). Effects of one place and one
rule act as one (`together`, `plus`). Prompts are rendered in one place only, where they become tokens to be answered or
continued (`scoring.answer_row`, `sampling.continued`). Values are set in every forward, inside what nnsight reads
(inside.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from ..errors import KtError
from .chat import Verbatim, in_turn
from .inside import Hook, set_hooks

if TYPE_CHECKING:
    from ..report import Table
    from .model import TracedModel
    from .sites import Site


PROMPT = "prompt"
"""The place of text before prompts."""
HELD_AS = "_kt_effects"
"""The attribute of a module that carries effects."""


class Rendered(str):
    """A prompt with what its effects put before it; rendering it again changes nothing."""


class Effect(Protocol):
    """One kind of effect, with the entries of its facts."""

    @property
    def kind(self) -> str:
        """`context` or `adapter`: the kind of its edit's file."""

    @property
    def place(self) -> str:
        """`prompt`, or the site whose values it sets."""

    def plus(self, later: Any) -> Effect:
        """The effect of both, in this order; they are `together`."""

    def rendered(self, model: TracedModel, prompt: str) -> str:
        """The prompt with its text before it."""

    def recall(self, model: TracedModel, text: str) -> str | None:
        """The fact, as a sentence, that is nearest to a text; None where it holds no texts or none is near."""

    def hook(self, model: TracedModel) -> tuple[nn.Module, Hook] | None:
        """The module and the hook that set its values."""

    def refuse(self, model: TracedModel) -> None:
        """Raise a KtError where no force can apply it to this model."""

    def misfit(self, model: TracedModel) -> str | None:
        """Why the model is not the one that it was made on, in words."""

    def as_made_on(self, model: TracedModel) -> Effect:
        """The same entries, as those of an edit of this model, which then is no `misfit`."""

    def overlaps(self, model: TracedModel, facts: Sequence[Any]) -> Any:
        """How far facts reach into its entries, (fact, request), 1 where they begin to; None for no such measure."""

    def arrays(self) -> dict[str, Tensor]:
        """Its tensors, as a file holds them."""

    def fields(self) -> dict[str, Any]:
        """Everything else, as JSON."""

    def table(self) -> Table:
        """A row an entry."""


class Effects:
    """The effects on one module: `applied` in their order, and what they come to by place and rule."""

    def __init__(self) -> None:
        self.applied: tuple[Effect, ...] = ()
        self.by_place: dict[Hashable, Effect] = {}
        self.prompts: dict[str, Rendered] = {}

    def become(self, model: TracedModel, effects: Sequence[Effect]) -> None:
        """Take these effects in the place of those before."""
        by_place: dict[Hashable, Effect] = {}
        for effect in effects:
            known = by_place.get(together(effect))
            by_place[together(effect)] = effect if known is None else known.plus(effect)
        set_hooks(model.module, [hook for effect in by_place.values() if (hook := effect.hook(model)) is not None])
        self.applied, self.by_place = tuple(effects), by_place
        self.prompts.clear()
        if effects:
            model.module.__dict__[HELD_AS] = self
        else:  # no trace is left in the user's module
            model.module.__dict__.pop(HELD_AS, None)


def text_of(model: TracedModel) -> Effect | None:
    """The text before a model's prompts, of all its edits; None where there is none."""
    texts = [effect for effect in effects_of(model.module).by_place.values() if effect.place == PROMPT]
    return texts[0] if texts else None  # they have no rule of their own: one place, one effect


def site_of(effect: Effect | None) -> Site | None:
    """The site whose values an effect sets; None where it sets none."""
    return getattr(effect, "site", None)


def together(effect: Effect) -> Hashable:
    """What effects share that act as one: their place, and the settings by which their entries are read."""
    return effect.place, getattr(effect, "rule", None)


def effects_of(module: nn.Module) -> Effects:
    """The module's effects, the same for every handle on it; none where it carries none."""
    effects: Effects = module.__dict__.get(HELD_AS) or Effects()
    return effects


def rendered(model: Any, prompt: str) -> Rendered | Verbatim:
    """The prompt with its effects on, in the prompt's own turn; a stand-in without effects reads it as it is."""
    if isinstance(prompt, Rendered | Verbatim):
        return prompt
    effects = effects_of(model.module) if hasattr(model, "module") else Effects()
    if prompt not in effects.prompts:
        text = prompt
        for effect in effects.by_place.values():
            text = effect.rendered(model, text)
        if not effects.by_place:
            return Rendered(prompt)
        effects.prompts[prompt] = Rendered(text)
    found = effects.prompts[prompt]
    # Marked here, not where it is kept: the same module may be asked with a chat template and without.
    turned = in_turn(getattr(model, "chat", None), found, prompt)
    return found if turned == found else Rendered(turned)


def puts_text(model: TracedModel) -> bool:
    """Whether an edit of kind `context` is applied: its text stands before prompts, and what reads a bare prompt shows
    the model without it."""
    return any(effect.place == PROMPT for effect in model.effects)


def refuse_text(model: TracedModel, what: str) -> None:
    """Refuse, before any work, what reads bare prompts of a model that has text put before its prompts.

    Raises:
        KtError: it has.
    """
    if puts_text(model):
        raise KtError(
            f"{what} reads bare prompts, and an edit of kind context is applied to {model.name}, which puts text before"
            " them: the numbers would be the unedited model's; take that edit out first"
        )


@contextmanager
def without_text(model: TracedModel) -> Iterator[None]:
    """Inside the block no text stands before prompts: for what asks about a model's weights."""
    if not puts_text(model):
        yield
        return
    with model.restored(()):
        model.effects = [effect for effect in model.effects if effect.place != PROMPT]
        yield


def without(effects: Sequence[Effect], gone: Sequence[Effect]) -> tuple[Effect, ...]:
    """The effects but for these very ones, each taken out once; one that is not among them is passed over."""
    left = list(effects)
    for effect in gone:
        at = next((at for at, each in enumerate(left) if each is effect), None)
        if at is not None:
            del left[at]
    return tuple(left)


def same_effect(one: Effect, other: Effect) -> bool:
    """Whether two effects are the same, entry by entry."""
    if (one.kind, one.fields()) != (other.kind, other.fields()):
        return False
    mine, theirs = one.arrays(), other.arrays()
    return mine.keys() == theirs.keys() and all(mine[n].equal(theirs[n]) for n in mine)
