"""Rebuild the demo word sets from the demo facts and corpus (JEEP, appendix A, without Wikipedia and GPT-4).

    python tools/make_word_sets.py

related   by subject: words of the corpus lines that contain the subject, without stopwords and the subject's own words;
          the `MOST` most frequent, ties in alphabetical order. A subject that the corpus never names has none.
factual   by relation: the answers of its facts; by subject: the answers of its facts. A fact's own answer is taken out
          where the sets are read (src/kt/probing/word_sets.py).
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

DEMO = Path(__file__).resolve().parents[1] / "src" / "kt" / "demo"
STOPWORDS = DEMO.parent / "probing" / "stopwords.txt"
MOST = 12

Lists = dict[str, list[str]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=DEMO / "word_sets.json")
    args = parser.parse_args(arguments)
    facts = [json.loads(line) for line in (DEMO / "facts.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = (DEMO / "corpus.txt").read_text(encoding="utf-8").splitlines()
    stopwords = set(STOPWORDS.read_text(encoding="utf-8").split())
    subjects = sorted({fact["subject"] for fact in facts})
    args.out.write_text(written({"related": related(subjects, lines, stopwords), "factual": factual(facts)}), "utf-8")


def related(subjects: Sequence[str], lines: Sequence[str], stopwords: set[str]) -> Lists:
    """The words that stand beside each subject."""
    found: Lists = {}
    for subject in subjects:
        whole = re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)")
        own = set(words(subject))
        counts = Counter(
            word for line in lines if subject in line and whole.search(line) for word in words(whole.sub(" ", line))
        )
        kept = [word for word in counts if word.lower() not in stopwords and word not in own]
        if kept:
            found[subject] = sorted(kept, key=lambda word: (-counts[word], word))[:MOST]
    return found


def factual(facts: Sequence[dict[str, str]]) -> Lists:
    """The answers of each relation and of each subject with more than one fact."""
    by_key: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        by_key[fact["relation"]].add(fact["answer"])
        by_key[fact["subject"]].add(fact["answer"])
    relations = {fact["relation"] for fact in facts}
    return {key: sorted(answers) for key, answers in sorted(by_key.items()) if key in relations or len(answers) > 1}


def words(text: str) -> list[str]:
    """Words with their inner hyphens and apostrophes."""
    return re.findall(r"\w+(?:[-'’]\w+)*", text)


def written(sets: dict[str, Lists]) -> str:
    """JSON with one key a line, so that a change shows as the lines that it changes."""
    blocks = []
    for name, lists in sets.items():
        rows = ",\n".join(f"    {dump(key)}: {dump(some)}" for key, some in sorted(lists.items()))
        blocks.append(f"  {dump(name)}: {{\n{rows}\n  }}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    main()
