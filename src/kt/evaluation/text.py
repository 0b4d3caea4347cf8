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

from ..errors import WorkFailed
from ..model.model import TracedModel
from ..model.sampling import GenerationRequest
from ..model.tokens import token_ids

_WORD = re.compile(r"\w+|[^\w\s]")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Words as the module describes them, case kept."""
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
    """Entropy is bounded by the logarithm of this, so that a text that ends early looks less fluent."""
    return float(len(words(text)))


def repetition(text: str, n: int = 3) -> float | None:
    """Share of the text's n-grams of words that occurred in it before; None for a text shorter than n."""
    found = ngrams(words(text), n)
    return 1 - len(set(found)) / len(found) if found else None


# Free answers: the prompt as people would ask it, and all that the model says until it stops by itself.
#
# As in "The Mirage of Model Editing" (WILD): nothing of the right answer reaches the model, neither its tokens nor
# their
# number. A tokenizer with a chat template asks through it, one user turn, and the model stops at its end of text.
# Without one, a prompt that ends in a question mark stands between "Q:" and "A:", any other (a sentence to complete,
# or one that has such marks already) as it is; a model that was never taught to stop there is cut at the end of its
# first line that is not empty.

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


def wish_for(model: TracedModel, prompt: str, tokens: int) -> GenerationRequest:
    """What is generated for a prompt: the question, and as many tokens as are wished for or as the model has room."""
    question = as_question(model.tokenizer, prompt)
    longest = getattr(model.module.config.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return question, tokens
    return question, max(0, min(tokens, longest - len(token_ids(model.tokenizer, question))))


def room(model: TracedModel, prompt: str, total: int) -> int:
    """How many tokens may follow the prompt, up to `total` with it or to the model's last position.

    Rounded down to a multiple of ten: prompts of like length can then share a batch.
    """
    longest = getattr(model.module.config.get_text_config(), "max_position_embeddings", None) or total
    free = min(total, longest) - len(token_ids(model.tokenizer, prompt))
    return max(0, free // 10 * 10)


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
