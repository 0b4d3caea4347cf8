"""The text between a prompt and its answer: a space or nothing, by the scripts and by what is open in the prompt.

Measured on Gemma 3 270M and SmolLM2 135M, whose next token decides where usage does not: a dash with a space before it
has one behind it ("France – Paris"), a bound one has none ("1914–1918"); "答案:" has a space behind it, "答案：" none.
"""

from __future__ import annotations

import re
import unicodedata

SPACELESS = (
    "CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO ", "YI ", "THAI ", "LAO ",
    "KHMER ", "MYANMAR ", "TAI ", "NEW TAI ", "AHOM ", "TIBETAN ", "JAVANESE ", "BALINESE ", "FULLWIDTH ",
)  # fmt: skip
"""How the Unicode names of characters begin in scripts that put no space between words, and of their punctuation."""

_WORD = r"[^\W\d_]"
_CLOSING = re.compile(
    rf"""['’](?:s|re|ve|ll|d|m|t)(?![-\w])    # 's, 're, not 's-Hertogenbosch
    | n['’]t\b
    | [,;.!?…)\]}}%‰°′″”»](?!\w)              # a closing mark; ".5" and ".NET" are none
    | [°%‰]
    | :(?!\w)
    | [-‐–—/](?={_WORD})                      # -based
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""How an answer begins that goes on with the prompt's last word."""
_OF_A_NUMBER = re.compile(r"(?:st|nd|rd|th|s)\b|[.,:]\d|[%°′″]")
_QUESTION = re.compile(
    r"(?:in |on |at |of |by |for |from |to )?(?:who|what|when|where|which|why|how|do|does|did|is|are|was)\b", re.I
)
_TAG = re.compile(r"<[^\s<>/][^<>]*>$")
_QUOTES = {"“": "”", "«": "»", "‹": "›", "„": "“”", "‚": "‘’", "‘": "’", "»": "«", "›": "‹", "”": "”"}
"""Typographic quotes, and what closes each of them in one language or another."""


def prompt_gap(prompt: str, answer: str) -> str:
    """The text between prompt and answer: " ", or "" where the two belong together.

    Nothing stands behind white space, scripts written without spaces (Japanese, Chinese, Thai, ...), an opening
    bracket or quote, a currency sign, `#`, `@`, `_`, a slash, a bound dash or equals sign, an opening tag, or a number
    that goes on, and nothing before `'s`, `-based`, `%` or a closing mark.

    >>> prompt_gap("The capital of France is", "Paris"), prompt_gap("フランスの首都は", "パリ")
    (' ', '')
    """
    prompt, answer = prompt.rstrip(" "), answer.lstrip()
    if not prompt or not answer or prompt[-1].isspace():
        return ""
    bound = _without_spaces(prompt, answer) or _CLOSING.match(answer) or _number_goes_on(prompt, answer)
    return "" if bound or _is_open(prompt, answer) else " "


def _without_spaces(prompt: str, answer: str) -> bool:
    """Whether the scripts at the boundary put no space there."""
    last, first = prompt[-1], answer[0]
    words = prompt.split()
    if _spaceless(last):
        # A word of such a script, quoted in a text of words: "the kanji 東京 means".
        quoted = len(words) > 1 and sum(not any(map(_spaceless, word)) for word in words) > len(words) / 2
        return _spaceless(first) or not (quoted and first.isalnum())
    inside = words[-1].rstrip("\"'”’»›)]")  # “東京”是
    return _spaceless(first) and any(map(_spaceless, inside)) and (inside[-1].isalnum() or _spaceless(inside[-1]))


def _spaceless(character: str) -> bool:
    return "\u3000" <= character <= "\u303f" or (
        not character.isascii() and unicodedata.name(character, "").startswith(SPACELESS)
    )


def _number_goes_on(prompt: str, answer: str) -> bool:
    if not prompt[-1].isdigit():
        return bool(answer[0].isdigit() and re.search(r"\d[.,:]$", prompt))
    if not answer[0].isdigit():
        return bool(_OF_A_NUMBER.match(answer))
    # A number that is whole: of a question, behind a letter (ww2), or a year.
    return not (_QUESTION.match(prompt) or re.search(r"(?:[^\W\d_]\d+|(?<!\d)(?:1\d|20)\d\d)$", prompt))


def _is_open(prompt: str, answer: str) -> bool:
    """Whether the prompt's last mark opens something, or binds what follows."""
    last, before = prompt[-1], prompt[-2:-1]
    bound = bool(before) and not before.isspace()
    if last in "'’":
        return _apostrophe_is_open(prompt.splitlines()[-1])
    if last in '"`':
        return _straight_is_open(prompt.splitlines()[-1], last)
    if last in _QUOTES:
        return _quote_is_open(prompt.splitlines()[-1])
    if last == "_":
        return not prompt.endswith("___")  # a blank to fill in
    if last in "-‐‑‒–—−":
        return bound or (last in "-−" and answer[0].isdigit())
    if last == "#":
        return not (before.isalpha() and answer[0].isalpha())  # C#
    if last in "=&~":
        return bound
    if last == "*":
        return prompt.endswith("**") and prompt.splitlines()[-1].count("**") % 2 == 1
    if last == ">":
        return bool(_TAG.search(prompt))
    if unicodedata.category(last) == "Sc":
        return not re.search(r"\d\s?.$", prompt)  # 20 €
    return last in "/\\@¿¡" or unicodedata.category(last) == "Ps"


def _quote_is_open(line: str) -> bool:
    """Whether the typographic quote at the line's end opens: it closes none, and is no closing one behind a word."""
    text, last = line[:-1], line[-1]
    for opening, closing in _QUOTES.items():
        n_open = text.count(opening) % 2 if opening == closing else text.count(opening)
        if last in closing and n_open > sum(text.count(mark) for mark in closing if mark != opening):
            return False
    return last not in "”›»" or not text[-1:].isalnum()


def _straight_is_open(line: str, mark: str) -> bool:
    """Whether the straight quote at the line's end opens: none is open there, and no word ends right before it."""
    opened = False
    for at, character in enumerate(line):
        if character == mark:
            word = at > 0 and (line[at - 1].isalnum() or line[at - 1] in ".!?,")
            opened = not opened and not word  # a mark behind a word closes, also where none is open (6")
    return opened


def _apostrophe_is_open(line: str) -> bool:
    """Whether the apostrophe at the line's end opens a quote, or binds as in "l'": not in "students'" or "'yes'"."""
    before = line[-2:-1]
    if not before.isalnum():
        return before.isspace() or not before or unicodedata.category(before) in ("Ps", "Pi", "Po", "Pd", "Sm")
    word = re.split(r"[\s(\[-]", line[:-1])[-1]
    quoted = re.search(r"(?:^|[\s(\[])['‘][^\W_][^'‘’]*$", line[:-1])
    return not quoted and (len(word) == 1 or word[-1].lower() not in "szx")
