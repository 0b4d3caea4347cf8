"""Chat templates: where a prompt and its answer stand in the dialogue that an instruct model was trained on.

A prompt that is whole ("What is the capital of France?") is the user's turn, and the answer begins the reply. A prompt
that stops where the answer goes on ("The capital of France is") begins the reply itself, behind a short request of the
user: put into the user's turn, 6 of 60 such CounterFact prompts that SmolLM2-Instruct knows keep their answer's first
token as the likeliest, and 51 as the beginning of the reply.

A text that is made of a prompt (a context before it, an answer behind it, another subject in it) stands where the
prompt does: `in_turn` marks it, since its own beginning and end may say something else.

The text is the template's own: rendered once around a mark, and compared with a full rendering for every prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from .._util.kinds import TEXT, TEXT_OR_NONE, YES_OR_NO, require_kinds
from ..errors import BadFact, KtError, UnknownModel, said_by

if TYPE_CHECKING:
    from .model import TracedModel

MODES = ("auto", "always", "never")
TURNS = ("auto", "user", "reply")
BEGUN = "\ufdd0"
"""In a prompt: what follows is the beginning of the reply to what stands before. No text has this noncharacter."""
USER, REPLY = "\ufdd1", "\ufdd2"
"""At a text's start: it is the user's turn, or begins the reply, whatever it looks like. No text has these either."""
DAY = date(2024, 7, 26)
"""The day that templates which ask for today's are given (it is Llama 3's own where there is no clock): the same model
reads the same prompt tomorrow."""
TURN_ENDS = 0.01
"""A model is an instruct model if it gives the end of its turn at least this probability (geometric mean) behind whole
replies. docs/chat.md has what real models give."""
_WHOLE = re.compile(r"[.?!。？！؟۔।՞;…][\"'”’»)\]]*\s*$|\n\s*$")
"""How a prompt ends that is whole by itself."""
_ASKS = re.compile(
    r"(?:in |on |at |of |by |for |from |to )?(?:who|whom|whose|what|which|where|why|how)\b(?![^?]*[?.:])"
    r"(?!.*\b(?:is|are|was|were|be|by|of|in|on|at|to|as|from|for|with|the|an?|called|named|and|or)$)",
    re.IGNORECASE | re.DOTALL,
)
"""A question without its mark, which does not stop where an answer would go on."""
_MARK, _SECOND = "kt⟦prompt⟧", "kt⟦reply⟧"
_DIALOGUES = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How much is two and two?", "Two and two is four."),
    ("Which animal barks?", "A dog."),
    ("Is fire hot? Answer yes or no.", "Yes."),
)


class Verbatim(str):
    """A text that the model reads as it stands: no effect and no chat template is put around it."""


@dataclass(frozen=True)
class Chat:
    """How prompts are asked of a model whose tokenizer has a chat template.

    Args:
        mode: `auto` (where the model ends its turns as the template does), `always`, or `never`.
        system: the system prompt; None leaves it to the template.
        thinking: whether the template opens a reply with thoughts, where it knows the difference; None for not.
        turn: `user` (the prompt is the user's turn), `reply` (it begins the reply), or `auto`: a prompt that ends in a
            sentence's mark or a line end, or that asks, is the user's, any other begins the reply.
        request: what the user says before a reply that begins with a prompt.
    """

    mode: str = "always"
    system: str | None = None
    thinking: bool | None = None
    turn: str = "auto"
    request: str = "Complete the sentence."

    def __post_init__(self) -> None:
        require_kinds(vars(self), {"system": TEXT_OR_NONE, "thinking": YES_OR_NO, "request": TEXT})
        for name, known in (("mode", MODES), ("turn", TURNS)):
            if getattr(self, name) not in known:
                raise KtError(f"chat {name} {getattr(self, name)!r} is unknown; choose {', '.join(known)}")
        if not self.request.strip():
            raise KtError("chat request is empty; say what the user asks before a reply that begins with the prompt")

    def words(self) -> str:
        """The settings in words."""
        system = "the template's own" if self.system is None else repr(self.system)
        return (
            f"in the chat template; whose turn a prompt is: {self.turn}; system prompt: {system}; "
            f"thinking {'on' if self.thinking else 'off'}"
        )


@dataclass(frozen=True)
class Frame:
    """A chat template's text around a prompt, by the settings of `chat`.

    Args:
        head: what stands before the user's text.
        tail: what stands between it and the reply.
        gap: what stands between `tail` and the reply's own text.
        end: what closes a reply, up to the end of the turn; "" if the template closes none.
        trims: whether the template takes the white space from the ends of the user's text.
    """

    chat: Chat
    head: str
    tail: str
    gap: str
    end: str
    trims: bool

    def as_dict(self) -> dict[str, Any]:
        """Its settings and texts, as files keep them."""
        told = asdict(self.chat) | asdict(self)
        return {
            key: value for key, value in told.items() if key not in ("chat", "mode")
        }  # how it was chosen is no part


class Placed(NamedTuple):
    """A rendered prompt, and where in it the characters of the bare prompt stand."""

    text: str
    start: int
    user: int
    """Characters of the bare prompt in the user's turn."""
    reply: int
    """Where the characters behind them (and behind `BEGUN`) begin in the text."""

    def at(self, place: int) -> int:
        """The place in the text of a character of the bare prompt."""
        return self.start + place if place <= self.user else self.reply + place - self.user - len(BEGUN)


@dataclass(frozen=True)
class ChatReader:
    """A tokenizer whose prompts are read inside a chat template; everything else is the tokenizer's own."""

    tokenizer: Any
    frame: Frame
    end_ids: tuple[int, ...]
    _known: dict[str, Placed | None] = field(default_factory=dict, repr=False, compare=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.tokenizer(*args, **options)

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """The template's own marks: a text that holds one is read as it stands."""
        return tuple(mark for mark in self.tokenizer.all_special_tokens if len(mark) > 2)

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The ids before and behind the user's text."""
        return self.bare(self.frame.head), self.bare(self.frame.tail)

    def bare(self, text: str) -> list[int]:
        """The ids of a text alone, without those that the tokenizer adds."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def in_reply(self, prompt: str) -> bool:
        """Whether the prompt itself begins the reply, or has begun one."""
        if BEGUN in prompt:
            return True
        if prompt[:1] in (USER, REPLY):
            return prompt[0] == REPLY
        turn = self.frame.chat.turn
        return turn == "reply" if turn != "auto" else not (_WHOLE.search(prompt) or _ASKS.match(prompt.rstrip(" ")))

    def turned(self, text: str, prompt: str) -> str:
        """See `in_turn`."""
        if text == prompt or isinstance(text, Verbatim):
            return text
        if isinstance(prompt, Verbatim):
            return Verbatim(text)
        bare = unmarked(text)
        if BEGUN in bare or any(mark in part for mark in self.marks for part in (bare, prompt)):
            return bare
        return (REPLY if self.in_reply(prompt) else USER) + bare

    def place(self, prompt: str) -> Placed | None:
        """The prompt in the template; None for a text that is read as it stands, or that holds the template's marks.

        Raises:
            BadFact: the template would change the prompt.
        """
        if isinstance(prompt, Verbatim):
            return None
        if prompt not in self._known:
            if len(self._known) > 100_000:
                self._known.clear()
            self._known[prompt] = self._placed(prompt)
        return self._known[prompt]

    def _placed(self, prompt: str) -> Placed | None:
        if any(mark in prompt for mark in self.marks):
            return None
        frame, text = self.frame, unmarked(prompt)
        mark = len(prompt) - len(text)
        if BEGUN not in prompt and self.in_reply(prompt):
            before = frame.head + frame.chat.request + frame.tail + frame.gap
            return Placed(before + text, len(before) - mark, len(prompt), len(before) + len(text))
        user, _, begun = text.partition(BEGUN)
        asked = user.strip() if frame.trims else user
        turns = frame.head + asked + frame.tail
        if turns != dialogue(self.tokenizer, frame.chat, [user_turn(asked)]):
            raise BadFact(f"the model's chat template changes the prompt {user!r}; ask it without (--chat never)")
        cut = len(user) - len(user.lstrip()) if frame.trims else 0
        return Placed(turns + begun, len(frame.head) - cut - mark, mark + len(user), len(turns))


def unmarked(text: str) -> str:
    """The text without the marks that say whose turn it is."""
    return text.replace(USER, "").replace(REPLY, "")


def in_turn(tokenizer: Any, text: str, prompt: str) -> str:
    """A text that is made of a prompt, or of its template, marked to stand in the prompt's turn in a chat template.

    It keeps its place when more text comes before or behind it. Without a template it is the text itself; of a prompt
    that is read as it stands, so is the text.
    """
    return tokenizer.turned(text, prompt) if isinstance(tokenizer, ChatReader) else text


def frame_of(tokenizer: Any, chat: Chat, name: str = "the model") -> Frame:
    """The template's text around a prompt.

    Raises:
        UnknownModel: there is no template, it fails, or it has no use for a setting.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UnknownModel(
            f'{name} has no chat template; ask its prompts as they stand (chat="never", --chat never), and leave out '
            "--system, --thinking and --chat-turn"
        )
    system, mark = chat.system, [user_turn(_MARK)]
    try:
        around = dialogue(tokenizer, chat, mark)
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        why = f"{name}'s chat template fails ({said_by(error, 200)})"
        raise UnknownModel(f"{why}; ask without it (--chat never){' or without --system' if system else ''}") from error
    if around.count(_MARK) != 1:
        raise UnknownModel(f"{name}'s chat template does not hold the user's text once; ask without it (--chat never)")
    if system is not None and system.strip() not in around:
        raise UnknownModel(f"{name}'s chat template has no place for a system prompt; leave out --system")
    if chat.thinking is not None and around == dialogue(tokenizer, chat, mark, not chat.thinking):
        raise UnknownModel(f"{name}'s chat template knows no thinking; leave out --thinking")
    head, tail = around.split(_MARK)
    padded = dialogue(tokenizer, chat, [user_turn(f"\n{_MARK}\n")])
    return Frame(chat, head, tail, *_reply(tokenizer, chat, head + _MARK + tail), trims=padded == around)


def _reply(tokenizer: Any, chat: Chat, asked: str) -> tuple[str, str]:
    """What stands before and behind a reply's own text, by a dialogue that has one."""
    turns = [user_turn(_MARK), {"role": "assistant", "content": _SECOND}]
    try:
        whole = dialogue(tokenizer, chat, turns, ask=False)
    except Exception:  # some templates read questions alone: what closes a reply is then unknown
        return "", ""
    before, found, after = whole.partition(_SECOND)
    gap = before.removeprefix(asked) if before.startswith(asked) else ""
    return (gap if found else ""), _first_mark(tokenizer, after)


def _first_mark(tokenizer: Any, text: str) -> str:
    """The text up to its first special token, and that."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for token in ids:
        word = tokenizer.convert_ids_to_tokens(token)
        if token in tokenizer.all_special_ids or (word.startswith("<") and word.endswith(">") and word in text):
            return text[: text.index(word) + len(word)] if word in text else ""
    return ""


def user_turn(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def dialogue(
    tokenizer: Any, chat: Chat, turns: Sequence[Mapping[str, str]], thinking: bool | None = None, ask: bool = True
) -> str:
    """The turns in the tokenizer's chat template: the text that a model reads.

    Args:
        ask: end where the reply begins.
    """
    thinks = bool(chat.thinking if thinking is None else thinking)
    system = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    return str(
        tokenizer.apply_chat_template(
            [*system, *turns],
            tokenize=False,
            add_generation_prompt=ask,
            enable_thinking=thinks,  # Qwen, Gemma
            thinking=thinks,  # DeepSeek, Granite
            date_string=DAY.strftime("%d %b %Y"),
            strftime_now=DAY.strftime,
        )
    )


def reader_of(tokenizer: Any, frame: Frame) -> ChatReader:
    """The tokenizer as one that puts prompts into the frame."""
    return ChatReader(tokenizer, frame, tuple(tokenizer(frame.end, add_special_tokens=False)["input_ids"]))


def stops_at(model: TracedModel) -> frozenset[int]:
    """The tokens at which the model's own files end a text."""
    rules = getattr(model.module, "generation_config", None)
    ends = getattr(rules, "eos_token_id", None)
    ends = model.tokenizer.eos_token_id if ends is None else ends
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def ends_turns(model: TracedModel, reader: ChatReader) -> float:
    """The probability (geometric mean) that the model gives the end of its turn behind whole replies to questions.

    One forward.
    """
    import torch

    from .tokens import encode_ids, pad_id

    frame = reader.frame
    texts = [frame.head + ask + frame.tail + frame.gap + reply for ask, reply in _DIALOGUES]
    rows = [reader.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    with torch.no_grad():
        logits = model.logits(encode_ids(rows, pad_id(reader)).to(model.device), 1)[:, -1].float()
    return float(logits.log_softmax(-1)[:, reader.end_ids[0]].mean().exp())


def choose(model: TracedModel, chat: Chat | str | None) -> tuple[ChatReader | None, str | None]:
    """The reader that the settings ask for, and one line on what `auto` found where there was a choice.

    Raises:
        UnknownModel: the template is missing, fails, or has no use for a setting; or `auto` leaves it out, and a
            setting of it was given.
    """
    if chat is None or chat == "never":
        return None, None
    wanted = Chat(chat) if isinstance(chat, str) else chat
    tokenizer, set_apart = model.tokenizer, wanted != Chat(wanted.mode)
    has_one = bool(getattr(tokenizer, "chat_template", None))
    if wanted.mode == "never" or (wanted.mode == "auto" and not has_one and not set_apart):
        return None, None
    try:
        reader = reader_of(tokenizer, frame_of(tokenizer, wanted, model.name))
    except UnknownModel as error:
        if wanted.mode == "always" or set_apart:
            raise
        return None, f"prompts are asked as they stand: {error}"
    if wanted.mode == "always":
        return reader, None
    if not reader.end_ids:
        why = "its chat template closes no reply"
    elif reader.end_ids[-1] not in stops_at(model):
        why = f"its generation config ends no text at {reader.frame.end.strip()!r}, where its chat template ends a turn"
    elif (ends := ends_turns(model, reader)) < TURN_ENDS:
        why = f"it ends its turn with probability {ends:.2g}, as a base model does"
    else:
        return reader, (
            f"prompts are asked in the model's chat template, whose end of turn it gives {ends:.2g} "
            "(--chat never asks them as they stand)"
        )
    if set_apart:
        raise UnknownModel(f"{model.name} is not asked in its chat template: {why}; add --chat always for its settings")
    return None, f"prompts are asked as they stand: {why} (--chat always puts them into its chat template)"
