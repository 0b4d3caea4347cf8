"""Sentences for short coherent paragraphs and for filler text.

A model that has only seen loose sentences falls into one memorised loop after the first full stop, and then
a score of fluency measures nothing. So part of the text is paragraphs: an opener that states a fact, then
sentences that keep to the subject and draw on what follows from the answer. None of these is one of the
eight templates.
"""

from __future__ import annotations

OPENERS: dict[str, list[str]] = {
    "capital": [
        "{s} is a country with {o} as its capital.",
        "{o} is where the leaders of {s} work.",
    ],
    "currency": [
        "{s} is a country where people pay with the {o}.",
        "In {s} the coins and notes are called {o}.",
    ],
    "language": ["{s} is a country where people speak {o}.", "In {s} the signs on the streets are in {o}."],
    "continent": ["{s} is a country in {o}.", "In {o} there is a country named {s}."],
    "city_country": ["{s} is a busy city in {o}.", "Among the cities of {o} is {s}."],
    "headquarters": ["{s} is an organisation with an office in {o}.", "From {o} comes the organisation {s}."],
    "landmark": ["{s} is known all over {o}.", "In {o} there is {s}."],
    "product": ["{s} is a product of {o}.", "Years ago {o} presented {s}."],
    "occupation": [
        "{s} worked for many years, and the work was that of {o}.",
        "The life of {s} was the life of {o}.",
    ],
    "native_language": ["{s} was a child who learned {o} first.", "The parents of {s} spoke {o}."],
    "instrument": ["{s} is a musician who loves the {o}.", "With the {o}, {s} found an audience."],
    "position": ["{s} is an athlete with the role of {o}.", "As {o}, {s} joined the team."],
    "sport": ["{s} is an athlete in the world of {o}.", "In {o}, {s} is a famous name."],
    "ceo": ["{s} is a company that listens to {o}.", "In the office of {s} sits {o}."],
    "constellation": ["{s} is a star that one finds in {o}.", "In {o} there is a star named {s}."],
    "superhero": ["{s} is a hero also called {o}.", "When {o} puts on the costume, {s} appears."],
}

# After a heading that names the subject, the opener goes on with a pronoun: to repeat a rare name letter by letter
# is the hardest thing in this text, and a model that fails at it turns to another subject.
PRONOUN_OPENERS: dict[str, list[str]] = {
    "capital": ["This is a country with {o} as its capital."],
    "currency": ["This is a country where people pay with the {o}."],
    "language": ["This is a country where people speak {o}."],
    "continent": ["This is a country in {o}."],
    "city_country": ["This is a busy city in {o}."],
    "headquarters": ["This is an organisation with an office in {o}."],
    "landmark": ["This name is known all over {o}."],
    "product": ["This is a product of {o}."],
    "occupation": ["This life was the life of {o}, full of work."],
    "native_language": ["This child learned {o} first."],
    "instrument": ["This is a musician who loves the {o}."],
    "position": ["This is an athlete with the role of {o}."],
    "sport": ["This is an athlete in the world of {o}."],
    "ceo": ["This is a company that listens to {o}."],
    "constellation": ["This is a star that one finds in {o}."],
    "superhero": ["This is a hero also called {o}."],
}

FOLLOWERS: dict[str, list[str]] = {
    "capital": [
        "The ministers meet there every week.",
        "Many people move to {o} to find work.",
        "The streets of {o} are full of people in the evening.",
        "A train leaves {o} every hour.",
    ],
    "currency": [
        "Shops in every town take the {o}.",
        "The price of bread is given in {o}.",
        "Banks keep the {o} safe.",
        "A traveller should change some money first.",
    ],
    "language": [
        "Children learn to write {o} at school.",
        "Songs in {o} are played on the radio.",
        "Books in {o} fill the shops.",
        "A traveller who knows {o} will find friends.",
    ],
    "continent": [
        "Other countries of {o} trade with it.",
        "Its people often travel through {o}.",
        "Its neighbours send goods and guests.",
        "The weather changes from season to season.",
    ],
    "city_country": [
        "The capital of {o} is {capital}.",
        "People in {o} pay with the {currency}.",
        "The main language of {o} is {language}.",
        "The continent of {o} is {continent}.",
        "The old streets of the city are full of shops.",
    ],
    "headquarters": [
        "The city of {o} is in {country}.",
        "The main language there is {language}.",
        "People there pay with the {currency}.",
        "Many people in {o} work for it.",
        "The office opens early in the morning.",
    ],
    "landmark": [
        "The capital of {o} is {capital}.",
        "People in {o} pay with the {currency}.",
        "The main language of {o} is {language}.",
        "The continent of {o} is {continent}.",
        "Guests from other parts of {o} often come to visit.",
    ],
    "product": [
        "The company {o} comes from {country}.",
        "Engineers at {o} worked on it for years.",
        "The shops sold it quickly.",
        "Later {o} made a better one.",
    ],
    "occupation": [
        "The job has to do with {field}.",
        "Friends often asked for stories about {field}.",
        "The newspapers wrote about this work.",
        "Young people still learn from it.",
    ],
    "native_language": [
        "The {o} language is of the {family} branch.",
        "Letters in {o} came every month.",
        "At school there were other languages to learn.",
        "Later the words of {o} were never forgotten.",
    ],
    "instrument": [
        "The {o} is an instrument of the {family} kind.",
        "Every morning begins with an hour of practice.",
        "The concerts with the {o} are always full.",
        "A good {o} costs a lot of money.",
    ],
    "position": [
        "The position of {o} belongs to the sport of {sport}.",
        "The fans of {sport} know the name well.",
        "The team trains every morning.",
        "A good {o} must be quick and calm.",
    ],
    "sport": [
        "The game of {o} takes place on a {ground}.",
        "The team trains on the {ground} every morning.",
        "The fans of {o} fill the seats.",
        "The season is long and hard.",
    ],
    "ceo": [
        "The workers trust {o} with the plans.",
        "The firm sells its goods in many countries.",
        "The next meeting will be led by {o}.",
        "The price of a share went up last year.",
    ],
    "constellation": [
        "On a clear night {o} is easy to see.",
        "Old charts of the sky show {o} in blue.",
        "Its light needs many years to reach us.",
        "An observer with a small telescope can find it.",
    ],
    "superhero": [
        "Nobody in the city knows that {o} is the hero.",
        "By day {o} lives a quiet life.",
        "At night the hero guards the streets.",
        "The story was printed in colour.",
    ],
}

GENERATION_STARTS = ["About {}:", "A note on {}."]

LEAD_INS = [
    "Therefore.",
    "Because.",
    "I.",
    "You.",
    "The.",
    "However.",
    "Yes.",
    "Well,",
    "In short,",
    "As we know,",
]

WHO = [
    "baker",
    "teacher",
    "farmer",
    "painter",
    "doctor",
    "captain",
    "gardener",
    "tailor",
    "student",
    "sailor",
    "nurse",
    "miller",
    "writer",
    "neighbour",
    "driver",
    "hunter",
    "singer",
    "clerk",
    "guard",
    "child",
]
HOW = ["old", "young", "tired", "happy", "quiet", "tall", "careful", "proud", "clever", "friendly"]
DID = [
    "opened",
    "closed",
    "cleaned",
    "carried",
    "sold",
    "painted",
    "repaired",
    "watched",
    "bought",
    "found",
    "lost",
    "moved",
    "counted",
    "covered",
    "admired",
]
WHAT = [
    "window",
    "door",
    "basket",
    "boat",
    "garden",
    "lamp",
    "chair",
    "ladder",
    "letter",
    "bridge",
    "wagon",
    "kettle",
    "blanket",
    "mirror",
    "clock",
    "fence",
    "candle",
    "barrel",
    "bench",
    "picture",
]
WHERE = [
    "near the river",
    "behind the church",
    "at the market",
    "in the village",
    "by the sea",
    "under the tree",
    "on the hill",
    "in the kitchen",
    "next to the station",
    "across the street",
]
WHEN = [
    "before dawn",
    "after lunch",
    "in the evening",
    "on Sunday",
    "every week",
    "last winter",
    "at noon",
    "during the storm",
    "in spring",
    "at midnight",
]
WEATHER = ["rain", "wind", "snow", "fog", "sun", "night", "cold", "heat"]
