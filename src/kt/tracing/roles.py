"""Names for token positions that mean the same in every prompt: ROME's roles.

Every token has exactly one role, taken in this order:

- `subject_last`   the subject's last token (a subject of one token is its own last token);
- `subject_first`  the first token of a subject of two or more;
- `subject_middle` the tokens between those two;
- `last`           the prompt's last token, where the prediction is made;
- `after_first`    the first token after the subject;
- `after_middle`   the tokens between that one and the last;
- `before`         the tokens left of the subject. Patching them changes nothing (they hold no corruption and see
                   none), so no mean over roles shows them.

ROME counts a one-token subject as first and as last, and a token that alone follows the subject as first subsequent
and as last; here no token is counted twice.
"""

from __future__ import annotations

from ..prompts import Span

ROLES = ("subject_first", "subject_middle", "subject_last", "after_first", "after_middle", "last")
BEFORE = "before"
TITLES = {
    "subject_first": "First subject token",
    "subject_middle": "Middle subject tokens",
    "subject_last": "Last subject token",
    "after_first": "First subsequent token",
    "after_middle": "Further tokens",
    "last": "Last token",
}


def token_roles(span: Span, length: int) -> tuple[str, ...]:
    """The role of every token of a prompt of `length` tokens whose subject stands at `span`."""
    return tuple(_role(i, span, length) for i in range(length))


def _role(token: int, span: Span, length: int) -> str:
    if token < span.start:
        return BEFORE
    if token == span.last:
        return "subject_last"
    if token < span.last:
        return "subject_first" if token == span.start else "subject_middle"
    if token == length - 1:
        return "last"
    return "after_first" if token == span.stop else "after_middle"
