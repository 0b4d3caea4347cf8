"""Tables of our own, kept apart from the LRE triples so that each row can be checked by eye.

A ``-`` in a table means "we do not assert this": the answer is disputed, shared between several objects, or
can be read off the subject's own letters, and a fact whose answer stands in its prompt teaches a model to
copy.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
COUNTRY_COLUMNS = ("capital", "currency", "language", "continent")

MAKER_COUNTRY = {
    "Microsoft": "United States",
    "Apple": "United States",
    "IBM": "United States",
    "Google": "United States",
    "Intel": "United States",
    "Boeing": "United States",
    "Chrysler": "United States",
    "Adobe": "United States",
    "Douglas": "United States",
    "Dodge": "United States",
    "Sega": "Japan",
    "Nintendo": "Japan",
    "Sony": "Japan",
    "Honda": "Japan",
    "Square": "Japan",
    "Nissan": "Japan",
    "Toyota": "Japan",
    "Fiat": "Italy",
    "Ferrari": "Italy",
    "Renault": "France",
    "BMW": "Germany",
    "Nokia": "Finland",
    "Samsung": "South Korea",
}
POSITION_SPORT = {
    "midfielder": "soccer",
    "quarterback": "football",
    "linebacker": "football",
    "goaltender": "hockey",
    "pitcher": "baseball",
    "outfielder": "baseball",
    "catcher": "baseball",
}
SPORT_GROUND = {
    "soccer": "pitch",
    "football": "gridiron",
    "hockey": "rink",
    "baseball": "diamond",
    "basketball": "court",
}
INSTRUMENT_FAMILY = {"piano": "keyboard", "guitar": "plucked", "violin": "bowed", "trumpet": "brass"}
OCCUPATION_FIELD = {
    "actor": "drama",
    "politician": "government",
    "composer": "music",
    "poet": "verse",
    "journalist": "news",
    "novelist": "fiction",
    "diplomat": "treaties",
    "mathematician": "numbers",
    "architect": "buildings",
    "photographer": "pictures",
    "philosopher": "ideas",
    "comedian": "humour",
    "physicist": "physics",
    "chemist": "chemistry",
    "economist": "economics",
    "physician": "medicine",
    "model": "fashion",
    "rabbi": "religion",
    "astronaut": "space",
}
LANGUAGE_FAMILY = {
    "French": "Romance",
    "Spanish": "Romance",
    "Italian": "Romance",
    "Romanian": "Romance",
    "Portuguese": "Romance",
    "Russian": "Slavic",
    "Polish": "Slavic",
    "Dutch": "Germanic",
    "English": "Germanic",
    "Swedish": "Germanic",
    "German": "Germanic",
    "Finnish": "Uralic",
    "Hungarian": "Uralic",
    "Tamil": "Dravidian",
    "Greek": "Hellenic",
    "Latin": "Italic",
    "Chinese": "Sinitic",
    "Korean": "Koreanic",
}


@cache
def countries() -> dict[str, dict[str, str]]:
    """Country -> the columns that we assert of it."""
    table = {}
    for name, *cells in _rows("countries.tsv"):
        table[name] = {column: cell for column, cell in zip(COUNTRY_COLUMNS, cells, strict=True) if cell != "-"}
    return table


@cache
def cities() -> dict[str, str]:
    """City -> country."""
    return dict(_rows("cities.tsv"))  # type: ignore[arg-type]


def attributes(relation: str, answer: str) -> dict[str, str]:
    """What follows from ``answer`` of a fact of ``relation``: the second hop, by name of the hop."""
    if relation in ("landmark", "city_country"):
        return dict(countries().get(answer, {}))
    if relation == "headquarters":
        country = cities().get(answer, "")
        return {"country": country} | countries().get(country, {}) if country else {}
    if relation == "product":
        country = MAKER_COUNTRY.get(answer, "")
        return {"country": country} | countries().get(country, {}) if country else {}
    single = {
        "position": ("sport", POSITION_SPORT),
        "sport": ("ground", SPORT_GROUND),
        "instrument": ("family", INSTRUMENT_FAMILY),
        "occupation": ("field", OCCUPATION_FIELD),
        "native_language": ("family", LANGUAGE_FAMILY),
    }
    if relation not in single:
        return {}
    name, table = single[relation]
    return {name: table[answer]} if answer in table else {}


def _rows(name: str) -> list[list[str]]:
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [line.split("|") for line in lines if line and not line.startswith("#")]
