"""Editing on top of earlier edits: they stand in the model while the new one is solved, and their keys are held.

Context templates, second moments and the trace that gives α belong to the model rather than to its state, and are taken
from the base, before the earlier edits are written in: with the same seed it is what the first edit had.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import sha256
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import warn_user
from ..facts.fact import Fact
from .session import EditSession

if TYPE_CHECKING:
    from ..model.model import TracedModel
    from .edit import Edit
    from .plan import Plan, SolveContext
    from .stack import EditStack


class SessionOnEdits(EditSession):
    """An `EditSession` on a model that `below` is written into; the base's exact bytes are back on exit.

    Args:
        below: the earlier edits, in order. The new edit names them (`stands_on` in its manifest).
        requests: facts that a probe for layers is made of, where `alpha_facts` names none. (An α of each fact's own is
            traced batch by batch, on the model as the earlier edits leave it.)
        options: those of `EditSession`; `keep_history=False` leaves the earlier keys free, which any method can.

    Raises:
        KtError: an earlier edit does not fit, or the method has no place for earlier keys.
    """

    def __init__(self, model: TracedModel, below: EditStack, requests: Sequence[Fact], **options: Any) -> None:
        holds = options.get("keep_history") is not False
        keyed = [edit for edit in below.edits if edit.keys]  # of the others `warn_of_keyless` says what they are
        super().__init__(model, history=keyed if holds else None, requests=requests, **options)
        self.below = below
        self._first = list(requests)
        # A run that goes on with other edits below must not take up what was found on top of these.
        digests = "".join(layer.digest for layer in below.layers)
        self.journal = self.journal.within(f"on-{sha256(digests.encode()).hexdigest()[:16]}")
        self._around = ExitStack()
        if holds:
            warn_of_keyless(below)

    def __enter__(self) -> SessionOnEdits:
        self._refuse_entry()
        self.below.grounds(self.model)  # fails before any work
        plan = self._resolve(self._first).plan()
        self._refuse(plan)
        self._context(plan, self._first)
        self._original = {}  # a norm guard holds to the state that this session starts from
        self._around.enter_context(self.below.applied(self.model))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._around:
            super().__exit__(kind, error, trace)

    def _solve(self, requests: Any) -> tuple[Edit, Plan, SolveContext, list[Fact]]:
        found = super()._solve(requests)
        self._note(found[0])
        return found

    def total(self) -> Edit:
        whole = super().total()
        self._note(whole)
        return whole

    def _note(self, edit: Edit) -> None:
        edit.manifest["stands_on"] = [layer.digest for layer in self.below.layers]


def warn_of_keyless(below: EditStack) -> None:
    """Fine-tuning keeps no keys: such an edit is written in below, and nothing holds what it wrote."""
    for layer in below.layers:
        if not layer.edit.keys:
            warn_user(
                f"{layer.name} keeps no keys ({layer.edit.manifest.get('method')} has none): it is written in below, "
                "but nothing makes the new edit leave it alone"
            )
