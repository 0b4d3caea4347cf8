"""The text between a prompt and its answer: a space or nothing, by the scripts and by what is open in the prompt.

Measured on Gemma 3 270M and SmolLM2 135M, whose next token decides where usage does not: a dash with a space before it
has one behind it ("France – Paris"), a bound one has none ("1914–1918"); "答案:" has a space behind it, "答案：" none.
"""

from __future__ import annotations

import re
import unicodedata

SPACELESS = (
    "CJK ", "IDEOGRAPHIC ", "KANGXI ", "HIRAGANA ", "HENTAIGANA ", "KATAKANA", "HALFWIDTH KATAKANA",
    "HALFWIDTH IDEOGRAPHIC", "HALFWIDTH LEFT", "HALFWIDTH RIGHT", "BOPOMOFO ", "YI ", "TANGUT ", "NUSHU ", "THAI ",
    "LAO ", "KHMER ", "MYANMAR ", "TAI ", "NEW TAI ", "AHOM ", "TIBETAN ", "JAVANESE ", "BALINESE ", "FULLWIDTH ",
)  # fmt: skip
"""How the Unicode names of characters begin in scripts that put no space between words, and of their punctuation."""

_WORD = r"[^\W\d_]"
_CLOSING = re.compile(
    rf"""['’](?:s|re|ve|ll|d|m)(?![-\w])      # 's, 're, not 's-Hertogenbosch
    | n['’]t\b
    | [,;.!?…%‰°℃℉′″।॥。、，；：？！၊။،؛؟۔։།](?![\w=])  # a closing mark; ".5", ".NET" and != are none
    | \.(?:com|org|edu|gov|io)\b
    | @[\w-]+\.\w                             # the rest of an e-mail address
    | [°%‰]
    | :(?![\w=])
    | [-‐–—/](?={_WORD}[^\s/]*(?:\s|$))       # -based, /or; not /usr/bin
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""How an answer begins that goes on with the prompt's last word."""
_NOT = re.compile(
    r"(?:do|does|did|is|are|was|were|ca|wo|could|would|should|has|have|had|must|might|need|sha|ai)n$", re.I
)
_OF_A_NUMBER = re.compile(
    r"(?:st|nd|rd|th|s)\b|[.,:/–]\d|[%°′″年月日時时分秒円元歳岁回人個个章号世万億亿千百倍度년월원명개]"
)
_LAST_WORD = re.compile(r"(?:^|(?<=[\s(\[{,;!=*/]))[^\s(\[{,;!=*/]*[\w)\]]$")
_WORDS = """
a an the is are was were be been am has had of in on at to by for from with as and or not no than that this it its like
only but if when which who what how equals called named says write type use uses extension suffix ending file operator
format ranked about ist est es è é son sind heißt der die das le la el
"""
_PLAIN = frozenset(_WORDS.split())
"""Words that no suffix or operator belongs to: the extension is .py, the operator is ++."""
_SUFFIX = re.compile(
    r"""->[A-Za-z_] | \^(?:-?\d|[({]|[a-z]\b) | _\w | =[^\s=>~] | \(\)   # p->next, x^2, snake_case, --key=v, main()
    | \.[a-z][a-z0-9]{0,4}(?![\w-])(?!\s+\w)          # setup.py, data.tar.gz
    """,
    re.VERBOSE,
)
"""How an answer begins that goes on with a word."""
_SUFFIX_OF_A_NAME = re.compile(
    r"(?:\+\+|--)(?![A-Za-z-]) | [-‐‑−]\d | [+*<>]=?[\d(] | [+&][A-Z]\b | \.[A-Z]+\b", re.VERBOSE
)
"""How an answer begins that goes on with a name (C++, COVID-19, UTC+1, AT&T, ASP.NET) or a number."""
_SUFFIX_OF_A_SIGN = re.compile(r"\#(?!\w) | \[\w+\] | \(\w | [+*<>]\w", re.VERBOSE)
"""How an answer begins that goes on with one letter: C#, a[0], f(x), a+b."""
_DEGREES = re.compile(r"[CFK]\b")
_YEAR = r"(?<!\d)(?:1\d|20)\d\d"
_QUESTION = re.compile(
    r"(?:in |on |at |of |by |for |from |to )?(?:who|what|when|where|which|why|how|do|does|did|is|are|was)\b", re.I
)
_TAG = re.compile(r"<[^\s<>/](?:[^<>]*[^<>/])?>$")
_CODE = re.compile(
    r"(?:^(?:import|from|return|await|del|>>>)\s.*|[\w\]]\(|\w\s?=\s?|\[|^)"
    r"(?!(?:e\.g|i\.e|etc|approx|ca|cf|vs)\.$)(?:[a-z_]\w*[.])+$"
)
"""A name and a dot where code may stand: `np.`, `print(os.`, `x = self.`."""
_ADDRESS = re.compile(r"(?:\w://|\bwww\.|\w@\w)\S*$")
_OPERAND = re.compile(r"(?:\d|[)\]]|(?:^|\W)\w)\s$")
"""What stands before a sign that has a second operand behind it: 6 - 2, not: costs -5."""
_QUOTES = {"“": "”", "«": "»", "‹": "›", "„": "“”", "‚": "‘’", "‘": "’", "»": "«", "›": "‹", "”": "”"}
"""Typographic quotes, and what closes each of them in one language or another."""
_CONSONANTS = frozenset("bcdfgjklmnpqrstvwxz")


def prompt_gap(prompt: str, answer: str) -> str:
    """The text between prompt and answer: " ", or "" where the two belong together.

    Nothing stands behind white space, scripts written without spaces (Japanese, Chinese, Thai, ...), an opening
    bracket or quote, a currency sign, `#`, `@`, `_`, a slash, a bound dash or operator, an opening tag, a name that
    goes on (`np.`, `www.`), or a number that does, and nothing before `'s`, `-based`, `%` or a closing mark.

    >>> prompt_gap("The capital of France is", "Paris"), prompt_gap("フランスの首都は", "パリ")
    (' ', '')
    """
    prompt, answer = prompt.rstrip(" "), answer.lstrip()
    if not prompt or not answer or prompt[-1].isspace():
        return ""
    bound = _without_spaces(prompt, answer) or _closes(prompt, answer) or _number_goes_on(prompt, answer)
    return "" if bound or _is_a_suffix(prompt, answer) or _is_open(prompt, answer) else " "


def _without_spaces(prompt: str, answer: str) -> bool:
    """Whether the scripts at the boundary put no space there."""
    bare = re.sub(r"[\u0300-\u036f\u3099\u309a]+$", "", prompt) or prompt  # か with its voicing mark apart
    last, first = bare[-1], answer[0]
    words = bare.split()
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


def _closes(prompt: str, answer: str) -> bool:
    """Whether the answer goes on with the prompt's last word, or closes what the prompt has opened."""
    category = unicodedata.category(answer[0])
    if category[0] == "M" or _CLOSING.match(answer):
        return True
    if answer[0] in "'’" and _NOT.search(prompt) and re.match(r"t(?!\w)", answer[1:]):
        return True
    if answer[0] in "./?:@" and _ADDRESS.search(prompt):
        return True
    return (category in ("Pe", "Pf") or answer[0] in "\"'") and not re.match(r"[^\s,.;:!?)\]]", answer[1:])


def _is_a_suffix(prompt: str, answer: str) -> bool:
    """Whether the answer begins with a suffix or an operator without spaces, which binds to the prompt's last word.

    An operator with a space behind it (x = 5) has one before it too.
    """
    found = _LAST_WORD.search(prompt)
    word = found.group() if found else ""
    if (
        not word
        or _QUESTION.match(prompt)
        or (word != prompt and (word if word.isupper() and len(word) > 1 else word.lower()) in _PLAIN)
    ):
        return False
    if _SUFFIX.match(answer) or unicodedata.decomposition(answer[0]).startswith(("<super>", "<sub>")):
        return True
    letter = len(word) == 1
    sign = unicodedata.category(answer[0]) == "Sm" and answer[0] not in "+<>=|~" and re.match(r".[^\s=]", answer)
    if letter or word[-1] in "0123456789)":
        return bool(sign or _SUFFIX_OF_A_NAME.match(answer) or (letter and _SUFFIX_OF_A_SIGN.match(answer)))
    name = any(c.isupper() or c.isdigit() or c in "_)]" for c in word)
    return name and bool(_SUFFIX_OF_A_NAME.match(answer))


def _number_goes_on(prompt: str, answer: str) -> bool:
    if not prompt[-1].isdigit():
        if prompt[-1] == "°":
            return bool(_DEGREES.match(answer))
        if not answer[0].isdigit() or not re.search(r"\d[.,:]$", prompt) or re.search(_YEAR + ".$", prompt):
            return False
        listed = prompt[-1] == "," and (re.search(r"\d, \d+,$", prompt) or re.search(r"\d{4},$", prompt))
        return not listed
    if not answer[0].isdigit():
        year = re.search(_YEAR + "$", prompt) and re.match(r"[-‐‑]\d", answer)
        return bool(year or _OF_A_NUMBER.match(answer))
    # A number that is whole: of a question, behind a letter (ww2), or a year; or the answer is a year.
    whole = _QUESTION.match(prompt) or re.search(rf"(?:[^\W\d_]\d+|{_YEAR})$", prompt)
    return not whole and not re.match(_YEAR + r"(?!\d)", answer)


def _is_open(prompt: str, answer: str) -> bool:
    """Whether the prompt's last mark opens something, or binds what follows."""
    last, before, line = prompt[-1], prompt[-2:-1], prompt.splitlines()[-1]
    bound = bool(before) and not before.isspace()
    if last in ".?:/=&#-_%+@~" and _ADDRESS.search(prompt):
        return last not in ".?:" or not answer[0].isupper()  # else the sentence ends there
    if last in "'’":
        return _apostrophe_is_open(line, answer)
    if last in '"`':
        return _straight_is_open(re.sub("`+", "`", line), last)
    if last in _QUOTES:
        return _quote_is_open(prompt)
    if last == "_":
        return not prompt.endswith("___")  # a blank to fill in
    if last in "-−+±" and answer[0].isdigit() and not bound:
        return not _OPERAND.search(prompt[:-1])
    if last in "-−":
        return line.rstrip("-−")[-1:].strip() != "" or _is_a_sign(line, answer)
    if unicodedata.category(last) == "Pd":
        return bound
    if last == "#":
        return not (before.isalpha() and answer[0].isalpha())  # C#
    if last in "=&~^|:/<>" or prompt.endswith(("::", "->")):
        return _operator_is_bound(line, answer)
    if last in "*+":
        if prompt.endswith("**"):
            return line.count("**") % 2 == 1 and not _OPERAND.search(prompt[:-2])
        return bool(re.search(r"[\d)][*+]$", prompt)) and answer[0].isdigit()
    if last == "." and not bound:
        return bool(re.fullmatch(r"[a-z0-9]+|[A-Z]{2,}", answer)) and answer not in _PLAIN and not line.endswith(". .")
    if last == ".":
        return bool(_CODE.search(line)) and answer[0].isidentifier()
    if unicodedata.category(last) == "Sc":
        return not re.search(r"\d\s?.$", prompt)  # 20 €
    if unicodedata.category(last) == "Sm":
        return bound or last in "√∛¬"
    return last in "\\@¿¡" or unicodedata.category(last) == "Ps"


def _is_a_sign(line: str, answer: str) -> bool:
    """Whether the free dash at the line's end is a minus sign or begins an option: y = -x, rm -rf, with --verbose."""
    if line.endswith("--"):
        return bool(re.fullmatch(r"[a-z][\w-]*", answer))
    if not answer[0].isalpha() or _OPERAND.search(line[:-1]):
        return False
    single = re.match(r"[A-Za-z](?!\w)", answer) and not re.match(r"[aAI]\s", answer)
    return bool(
        single
        or re.search(r"(?:[=(*/+<>,^\[{]|\breturn)\s*-$", line)
        or (re.fullmatch(r"(?:\$ )?[a-z]+ -", line) and re.fullmatch(r"[a-z]{1,4}", answer))
    )


def _operator_is_bound(line: str, answer: str) -> bool:
    """Whether no space stands around the operator at the line's end, as in x=5, a->b, std::vector and </b>."""
    sign = re.search(r"[=&~^|:/<>!+*-]+$", line)
    text, run = (line[: sign.start()], sign.group()) if sign else (line, "")
    bound = bool(text) and not text[-1].isspace()
    if run == ":":
        return False
    if run == "~":
        return bound or answer[0].isdigit() or answer[0] == "/"
    if run == "/":
        return bound or not _OPERAND.search(text)
    if run == "<":
        return bound or not text or line.lstrip().startswith("#include")
    if run.endswith(">") and run != "->":
        return bool(_TAG.search(line))
    return bound or run in ("</", "~/", "://")


def _quote_is_open(text: str) -> bool:
    """Whether the typographic quote at the text's end opens: it closes none, and is no closing one behind a word."""
    text, last = text[:-1], text[-1]
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
            word = word and not re.search(r"(?:^|[\s(\[=,{])(?:[fFrRbBuU]|[fF][rR]|[rR][fFbB])$", line[:at])  # f"
            opened = not opened and not word  # a mark behind a word closes, also where none is open (6")
    return opened


def _apostrophe_is_open(line: str, answer: str) -> bool:
    """Whether the apostrophe at the line's end opens a quote, or binds as in "l'": not in "students'" or "'yes'"."""
    before = line[-2:-1]
    if not before.isalnum():
        return before.isspace() or not before or unicodedata.category(before) in ("Ps", "Pi", "Po", "Pd", "Sm")
    word = re.split(r"[\s(\[-]", line[:-1])[-1]
    if re.search(r"(?:^|[\s(\[])['‘](?=[^\W_])(?:[^'‘’]|\w['’](?=\w))*$", line[:-1]) or word[-1].isdigit():
        return False  # it closes a quote, or means feet
    if len(word) == 1:
        return True
    # Elision is before a vowel: dell'Umbria, but un po' di, goin' to.
    whole = word[-1].lower() in "szx" or (word.lower().endswith("in") and len(word) > 3)
    return not whole and answer[0].lower() not in _CONSONANTS
