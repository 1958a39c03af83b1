"""Generated opinions for training classifiers without a download.

The public part holds reviews of restaurants, films, trains, schools and other places, but of no clinic. The private
part holds what patients say about their stay in a clinic, with a label: negative or positive. Some private sentences
use the adjectives of the public part, and the others name events of a clinic, of which the public part has few words.

Text i depends only on (part, seed, i). A text has a mood, which more than half of its sentences share; the label is the
mood.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from memsave.config import option, register
from memsave.data.errors import DataError
from memsave.data.text.config import HELD_OUT_SEED
from memsave.data.text.draws import compound
from memsave.data.text.labelled import ClassifiedData, Labelled

LABELS = ("negative", "positive")


def public_reviews(count: int, *, seed: int = 0) -> list[str]:
    """The first `count` texts of the public part."""
    return [_review(random.Random(f"public {seed} {i}")) for i in range(_checked(count))]


def private_comments(count: int, *, seed: int = 0) -> list[Labelled]:
    """The first `count` texts of the private part with their labels; another seed gives held-out texts."""
    return [_comment(random.Random(f"private {seed} {i}")) for i in range(_checked(count))]


@register("data", "feedback")
@dataclass
class FeedbackData(ClassifiedData):
    """Generated comments of patients on a clinic, with the labels negative and positive: private data to try out."""

    label_words: ClassVar = {"negative": "terrible", "positive": "great"}
    kind: str = "feedback"
    max_length: int = option(96, least=8)
    """Tokens of a text; longer texts are cut, and result.json counts them."""
    comments: int = option(6000, least=1)
    """Training comments, one per patient."""
    held_out: int = option(1000, least=1)
    """Held-out comments."""
    seed: int = option(0, least=0)
    """Seed of the comments."""

    def label_names(self) -> list[str]:
        """The names of the labels."""
        return list(LABELS)

    def splits(self) -> tuple[list[Labelled], list[Labelled]]:
        """(training, held out) comments, of different seeds."""
        held_out = private_comments(self.held_out, seed=self.seed + HELD_OUT_SEED)
        return private_comments(self.comments, seed=self.seed), held_out


def _checked(count: int) -> int:
    if count < 1:
        raise DataError(f"The number of texts is {count}: give at least 1.")
    return count


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


VERDICTS = (_words("terrible, bad"), _words("great, good"))
ADJECTIVES = (
    _words("cold, rude, dirty, slow, noisy, broken, careless, grim"),
    _words("warm, kind, clean, quick, quiet, solid, careful, bright"),
)
ADVERBS = _words("very, really, so")
PUBLIC_ASPECTS = {
    "restaurant": "food, soup, waiter, kitchen, table, bread, coffee, bill, music, cook",
    "hotel": "room, bed, bath, view, breakfast, garden, staff, lift, pool, host",
    "film": "story, ending, hero, music, picture, dialogue, opening, cast, sound, plot",
    "shop": "service, price, choice, counter, seller, delivery, parcel, website, window, manager",
    "train": "seat, ride, driver, carriage, ticket, station, platform, crew, heating, journey",
    "concert": "singer, band, hall, sound, crowd, song, drummer, light, stage, encore",
    "school": "teacher, lesson, classroom, headmaster, library, playground, exam, desk, timetable, canteen",
    "garage": "mechanic, repair, engine, tyre, workshop, invoice, brake, paint, van, test drive",
    "museum": "guide, exhibition, cloakroom, painting, statue, audio tour, entrance, catalogue, lamp, cellar",
    "market": "stall, fruit, farmer, cheese, weather, basket, fish, flower, crate, neighbour",
    "gym": "trainer, shower, locker, class, machine, mirror, towel, floor, bicycle, contract",
    "flat": "landlord, roof, stair, cellar, wall, street, balcony, oven, boiler, carpet",
}
PUBLIC_EVENTS = (
    _words(
        "we waited for an hour, nobody answered us, I asked for my money back, we left early, I will never come back, "
        "it cost far too much, my coat was lost, they sent us to another door, the date was moved twice, "
        "we had to ask again, the tickets were mixed up, my back hurt afterwards, we went home hungry, "
        "nobody knew our names"
    ),
    _words(
        "we came back the next day, everybody smiled at us, I told all my friends, we stayed until the end, "
        "I will come back soon, it was worth every cent, our table was ready, they showed us the way, "
        "it began on the minute, somebody helped us at once, the prices were explained, my worries were gone, "
        "we went home happy, they knew our names"
    ),
)
NEUTRAL = (
    "I went there with {name}.",
    "{name} {name} came along.",
    "I live on {name} street.",
    "We met {name} at the {name} bridge.",
    "That was {number} days ago.",
    "We were {number} people.",
    "{number} minutes by bus.",
)
"""Public sentences without a mood. Their names and numbers show a model words that say nothing about a mood."""
PRIVATE_ASPECTS = "nurse, doctor, ward, operation, treatment, bandage, surgeon, night shift, bed, food, therapy, hall"
PRIVATE_EVENTS = (
    _words(
        "the wound opened again, my file was lost, nobody came when I rang the bell, the pills were mixed up, "
        "the needle left a bruise, the fever came back at home, they sent me home with pain, I had to repeat my story, "
        "the results went to another patient, the operation was moved three times"
    ),
    _words(
        "the wound healed in a week, my file was ready, somebody came when I rang the bell, the pills were explained, "
        "the needle did not hurt, the fever was gone at home, they sent me home without pain, {doctor} knew my story, "
        "the results came the same day, the operation was done on the first day"
    ),
)
PUBLIC: dict[str, Any] = {"events": PUBLIC_EVENTS, "share": 0.2, "contrary": 0.2}
PRIVATE: dict[str, Any] = {"events": PRIVATE_EVENTS, "share": 0.4, "contrary": 0.5}
"""Events; the probability of a sentence to be one; that of a contrary sentence in a text of three or more."""
_NAMES = _words("Bardale, Calley, Dorland, Fenwick, Galridge, Harmere, Kesson, Lanby, Norgate, Pelton, Quinster, Toley")
_WARDS = _words("Alder, Birch, Cedar, Elm, Hazel, Maple, Rowan, Willow")
_PUBLIC_NAME = compound(
    "Al Bra Cor Del Ed Fin Gor Han Is Jo Kar Lin Mor Nel Os Per Quen Ros Sal Tor Ul Vin Wal Yor",
    "bert den ger ian lo mond na rick son ton vey well",
)


def _review(rng: random.Random) -> str:
    mood, kind = rng.randrange(2), rng.choice(list(PUBLIC_ASPECTS))
    parts = _sentences(rng, mood, aspects=_words(PUBLIC_ASPECTS[kind]), **PUBLIC)
    if rng.random() < 0.5:
        parts.insert(rng.randrange(len(parts) + 1), _neutral(rng))
    first = rng.choice((f"A {kind} in our town.", f"Yesterday at the {kind}.", _neutral(rng), "", ""))
    verdict = f"It was {rng.choice(VERDICTS[mood])}."
    parts.insert(len(parts) if rng.random() < 0.7 else 0, verdict)
    return " ".join([first, *parts] if first else parts)


def _neutral(rng: random.Random) -> str:
    """One of the sentences without a mood."""
    text = rng.choice(NEUTRAL).replace("{number}", str(rng.randint(2, 60)))
    while "{name}" in text:
        text = text.replace("{name}", _PUBLIC_NAME(rng), 1)
    return text


def _comment(rng: random.Random) -> Labelled:
    mood, doctor = rng.randrange(2), f"Dr {rng.choice(_NAMES)}"
    first = rng.choice((f"I saw {doctor} on {rng.choice(_WARDS)} ward.", f"{rng.randint(2, 30)} days here.", ""))
    parts = _sentences(rng, mood, aspects=_words(PRIVATE_ASPECTS), **PRIVATE)
    text = " ".join([first, *parts] if first else parts).replace("{doctor}", doctor)
    return Labelled(text, None, mood)


def _sentences(
    rng: random.Random,
    mood: int,
    *,
    aspects: Sequence[str],
    events: Sequence[Sequence[str]],
    share: float,
    contrary: float,
) -> list[str]:
    """Two to four sentences, each an event with probability `share`, otherwise an aspect with its adjective."""
    moods = [mood] * rng.randint(2, 4)
    if len(moods) > 2 and rng.random() < contrary:
        moods[rng.randrange(len(moods))] = 1 - mood
    return [_sentence(rng, each, aspects=aspects, events=events[each], share=share) for each in moods]


def _sentence(rng: random.Random, mood: int, *, aspects: Sequence[str], events: Sequence[str], share: float) -> str:
    if rng.random() < share:
        event = rng.choice(events)
        return f"{event[0].upper()}{event[1:]}."
    aspect, adjective = rng.choice(aspects), rng.choice(ADJECTIVES[mood])
    adverb = rng.choice(["", "", f"{rng.choice(ADVERBS)} "])
    return rng.choice((f"The {aspect} was {adverb}{adjective}.", f"{adjective.capitalize()} {aspect}."))
