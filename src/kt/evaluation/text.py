"""Measures of text alone: normalised comparison, n-gram entropy, repetition.

The originals split words with nltk, whose data must be downloaded. Here a word is a run of letters, digits
and underscores, and every other visible character is a word of its own ("don't" gives don, ', t); the figures
differ from nltk's in the second decimal on ordinary prose.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..errors import WorkFailed, said_by
from ..model.chat import BEGUN, Chat, dialogue, unmarked, user_turn
from ..model.effects import Rendered, rendered
from ..model.model import TracedModel
from ..model.sampling import GenerationRequest
from ..model.tokens import reader, token_ids

_WORD = re.compile(r"\w+|[^\w\s]")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """The words of a text (see the module), case kept."""
    return _WORD.findall(text)


def normalised(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no articles, single spaces.

    A text that would lose everything ("The", "!?") keeps it, or all such texts would be equal.
    """
    lower = unicodedata.normalize("NFKC", text).lower()
    bare = " ".join(_ARTICLE.sub(" ", lower.translate(_PUNCTUATION)).split())
    return bare or " ".join(lower.split())


def same_text(text: str, answer: str) -> bool:
    return normalised(text) == normalised(answer)


def contains(text: str, answer: str) -> bool:
    """Whether the answer occurs in the text, as whole words."""
    return f" {normalised(answer)} " in f" {normalised(text)} "


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def entropy(tokens: Sequence[str], n: int) -> float:
    """Entropy of the distribution of n-grams in bits; 0 for a text shorter than n."""
    counts = Counter(ngrams(tokens, n)).values()
    total = sum(counts)
    # log2(total / c), not -log2(c / total): a single n-gram then gives 0.0 and not -0.0.
    return sum(c / total * math.log2(total / c) for c in counts)


def ngram_entropy(text: str) -> float:
    """Mean of 2/3 the bigram and 4/3 the trigram entropy, (H2 + 2 H3) / 3 in bits.

    Eq. 17 of the IntAttn-Edit paper gives the second sum a plus sign; every implementation has both entropies
    positive and takes the mean of the two weighted terms, and so does this one.
    """
    tokens = words(text)
    return (2 / 3 * entropy(tokens, 2) + 4 / 3 * entropy(tokens, 3)) / 2


def word_count(text: str) -> float:
    """Number of words. Its logarithm bounds the entropy, so a text that ends early looks less fluent."""
    return float(len(words(text)))


def repetition(text: str, n: int = 3) -> float | None:
    """Share of the text's n-grams of words that occurred in it before; None for a text shorter than n."""
    grams = ngrams(words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else None


# Free answers, as in "The Mirage of Model Editing" (WILD): the prompt as people would ask it, and all that the model
# writes until it stops by itself. Nothing of the right answer reaches the model, neither its tokens nor their number.
# A chat template makes the prompt one user turn, and the model stops at its end of text. Without one, a prompt that
# ends in a question mark stands between "Q:" and "A:", any other as it is; a model that was never taught to stop there
# is cut at the end of its first line that is not empty.

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
    try:
        return dialogue(tokenizer, Chat(), [user_turn(prompt)])
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        reason = said_by(error, 200)
        raise WorkFailed(f"the tokenizer's chat template fails on {prompt!r} ({reason}); mend or remove it") from error


def wild_request(model: TracedModel, prompt: str, tokens: int) -> GenerationRequest:
    """The question that is continued for a prompt, and `tokens`, or fewer where the model has no more positions."""
    if getattr(model, "chat", None) is not None:
        question: str = Rendered(unmarked(rendered(model, prompt)) + BEGUN)  # the user's turn, whole or not
    elif has_chat(model.tokenizer):  # what an effect puts before a prompt belongs into the user's turn
        question = Rendered(as_question(model.tokenizer, rendered(model, prompt)))
    else:
        question = as_question(model.tokenizer, prompt)
    return question, _free_positions(model, question, tokens)


def room(model: TracedModel, prompt: str, total: int) -> int:
    """How many tokens may follow the prompt, up to `total` with it or to the model's last position.

    Rounded down to a multiple of ten: prompts of like length can then share a batch.
    """
    return _free_positions(model, prompt, total - len(token_ids(reader(model), prompt))) // 10 * 10


def _free_positions(model: TracedModel, prompt: str, tokens: int) -> int:
    """At most `tokens` positions behind the prompt; fewer where the model has no more."""
    longest = model.most_positions
    read = token_ids(reader(model), rendered(model, prompt))
    return max(0, tokens if longest is None else min(tokens, longest - len(read)))


def up_to_stop(text: str, chat: bool) -> str:
    """The text without the space around it; without a chat template only its first line."""
    return text.strip() if chat else text.strip().partition("\n")[0].rstrip()


def wild_protocol(tokenizer: Any, tokens: int) -> str:
    """How free answers are obtained, in a sentence."""
    form, stop = (
        ("one user turn of the tokenizer's chat template", "the model's end of text")
        if has_chat(tokenizer)
        else ('questions as "Q: ... A:", other prompts as they are', "the model's end of text or the end of the line")
    )
    return f"{form}; greedy up to {stop}, at most {tokens} tokens; never cut to the answer's length"
