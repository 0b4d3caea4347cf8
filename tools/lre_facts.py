"""Make src/kt/demo/lre.json, the shipped real facts (`-f lre`): triples of the LRE data set, prompts of our own.

python tools/lre_facts.py FOLDER    # FOLDER holds the data set's JSON files (github.com/evandez/relations, MIT)

A relation gives at most MOST pairs, evenly over its file; subjects with two answers are left out.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

OUT = Path(__file__).parents[1] / "src" / "kt" / "demo" / "lre.json"
MOST = 36
PROMPTS = {
    "country_capital_city": ("The capital city of {} is", "The government of {} sits in"),
    "country_language": ("The main language of {} is", "Most people in {} speak"),
    "country_currency": ("The currency of {} is the", "In {}, prices are given in the local currency, the"),
    "country_largest_city": ("The largest city of {} is", "The city with the most people in {} is"),
    "city_in_country": ("The city of {} is in the country of", "{} is a city in"),
    "food_from_country": ("The dish {} comes from the country of", "{} is a dish that originates from"),
    "company_hq": ("The headquarters of {} are in the city of", "The company {} is based in"),
    "person_native_language": ("The mother tongue of {} is", "The native language of {} is"),
    "person_plays_instrument": ("The musician {} plays the", "On stage, {} performs on the"),
    "person_plays_pro_sport": ("The athlete {} plays the sport of", "{} is a professional in the sport of"),
    "person_band_lead_singer": ("{} is the lead singer of the band", "The band that {} sings for is called"),
    "person_university": ("As a student, {} went to", "{} has a degree from"),
    "product_by_company": ("The product {} was made by the company", "{} is developed by"),
    "landmark_in_country": ("{} is located in the country of", "The country where {} lies is"),
    "landmark_on_continent": ("{} is located on the continent of", "The continent where {} lies is"),
    "star_constellation": ("The star {} belongs to the constellation", "{} is a star in the constellation"),
}


def decoded(text):
    """The data set has some characters as the six of their JSON escape."""
    return re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), text)


def pairs_of(samples):
    """Subjects with one answer each, evenly over the list."""
    answers = defaultdict(set)
    for sample in samples:
        subject, answer = (decoded(sample[name]) for name in ("subject", "object"))
        answers[subject].add(answer)
    pairs = [[subject, *objects] for subject, objects in answers.items() if len(objects) == 1]
    most = min(MOST, len(pairs))
    return [pairs[i * len(pairs) // most] for i in range(most)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    relations = {}
    for name, prompts in PROMPTS.items():
        samples = json.loads((folder / f"{name}.json").read_text())["samples"]
        relations[name] = {"prompts": prompts, "pairs": pairs_of(samples)}
    about = {"source": "LRE data set, github.com/evandez/relations", "licence": "MIT, LICENSE-LRE"}
    lines = [f'  "{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in relations.items()]
    head = json.dumps(about)[1:-1]
    OUT.write_text("{" + head + ', "relations": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
