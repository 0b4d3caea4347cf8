"""Free answers: the prompt as people would ask it, and all that the model says until it stops by itself.

As in "The Mirage of Model Editing" (WILD): nothing of the right answer reaches the model, neither its tokens nor their
number. A tokenizer with a chat template asks through it, one user turn, and the model stops at its end of text.
Without one, a prompt that ends in a question mark stands between "Q:" and "A:", any other (a sentence to complete,
or one that has such marks already) as it is; a model that was never taught to stop there is cut at the end of its
first line that is not empty.
"""

from __future__ import annotations

from typing import Any

from ..errors import WorkFailed
from ..model import TracedModel
from ..prompts import token_ids
from .continuations import Wish

WILD_TOKENS = 64
"""Most tokens of a free answer, unless the caller says otherwise."""


def has_chat(tokenizer: Any) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def as_question(tokenizer: Any, prompt: str) -> str:
    """The prompt as the model reads it.

    Raises:
        WorkFailed: the chat template cannot be filled in.
    """
    if not has_chat(tokenizer):
        return f"Q: {prompt} A:" if prompt.endswith("?") else prompt
    turns = [{"role": "user", "content": prompt}]
    try:
        # Templates that know no enable_thinking pass over it; the others would spend the tokens on thoughts.
        return str(
            tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, enable_thinking=False)
        )
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        reason = " ".join(str(error).split())[:200]
        raise WorkFailed(f"the tokenizer's chat template fails on {prompt!r} ({reason}); mend or remove it") from error


def wish_for(model: TracedModel, prompt: str, tokens: int) -> Wish:
    """What is generated for a prompt: the question, and as many tokens as are wished for or as the model has room."""
    question = as_question(model.tokenizer, prompt)
    longest = getattr(model.module.config.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return question, tokens
    return question, max(0, min(tokens, longest - len(token_ids(model.tokenizer, question))))


def up_to_stop(text: str, chat: bool) -> str:
    """The text without the space around it; without a chat template only its first line."""
    return text.strip() if chat else text.strip().partition("\n")[0].rstrip()


def wild_protocol(tokenizer: Any, tokens: int) -> str:
    """How the free answers came about, in a sentence."""
    asked, stop = (
        ("one user turn of the tokenizer's chat template", "the model's end of text")
        if has_chat(tokenizer)
        else ('questions as "Q: ... A:", other prompts as they are', "the model's end of text or the end of the line")
    )
    return f"{asked}; greedy up to {stop}, at most {tokens} tokens; never cut to the answer's length"
