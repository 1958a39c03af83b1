"""A generated table-to-text corpus for training language models without a download.

The public part describes restaurants, pets at the vet, trains, concerts and players. The private part describes stays
in a clinic, with other attributes and wording. Both draw names, dates and numbers from the same generators, so a model
can transfer what it learned about copying. Every value of a table occurs verbatim in its text, every name is invented,
and record i depends only on (part, seed, i).

A template is a sequence of sentences in this notation:

    {area}              the value of an attribute
    [ in the {area}]    left out if the table lacks the attribute
    <opens at {opens}|costs {price}>
                        the parts whose attributes the table has, joined as "x, y and z"
    a/an                the article that fits the next letter

A sentence is left out if it names an attribute that the table lacks, or if no part of its <...> is kept.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memsave.data.errors import DataError
from memsave.data.text.draws import Draw, clock, compound, either, number, sequence, words
from memsave.data.text.records import Record

_FIELD, _OPTIONAL, _GROUP = re.compile(r"{(\w+)}"), re.compile(r"\[([^\]]*)\]"), re.compile(r"<([^>]*)>")
_ARTICLE = re.compile(r"\b([aA])/an (?=(\w))")


@dataclass(frozen=True)
class Domain:
    """One kind of record: its attributes, and templates that can each express every choice of attributes."""

    always: dict[str, Draw]
    sometimes: dict[str, Draw]
    some: tuple[int, int]  # minimum and maximum number of `sometimes` attributes in a table
    templates: tuple[str, ...]


def public_records(count: int, *, seed: int = 0) -> list[Record]:
    """The first `count` records of the public part, five everyday domains."""
    return _records(count, kind="public", domains=PUBLIC, seed=seed)


def private_records(count: int, *, seed: int = 0) -> list[Record]:
    """The first `count` records of the private part, stays in a clinic; another seed gives held-out records."""
    return _records(count, kind="private", domains=PRIVATE, seed=seed)


def _records(count: int, *, kind: str, domains: Sequence[Domain], seed: int) -> list[Record]:
    if count < 1:
        raise DataError(f"The number of records is {count}: give at least 1.")
    rng = random.Random(f"{kind} {seed}")  # a string gives the same seed in every process, a tuple does not
    return [_record(rng.choice(domains), rng=rng) for _ in range(count)]


def _record(domain: Domain, *, rng: random.Random) -> Record:
    optional = rng.sample(list(domain.sometimes), rng.randint(*domain.some))
    draws = domain.always | {name: domain.sometimes[name] for name in optional}
    values: dict[str, str] = {}
    for name, draw in draws.items():
        values[name] = _draw_different(values.values(), draw=draw, rng=rng)
    order = rng.sample(list(values), len(values))
    table = ", ".join(f"{name}[{values[name]}]" for name in order)
    return Record(prompt=table, completion=_text(rng.choice(domain.templates), values=values))


def _draw_different(others: Iterable[str], *, draw: Draw, rng: random.Random) -> str:
    """Draw a value that differs from `others`, so that no train runs from a town to itself."""
    taken = set(others)
    while (value := draw(rng)) in taken:
        pass
    return value


def _text(template: str, *, values: dict[str, str]) -> str:
    sentences = (_sentence(part, values=values) for part in template.removesuffix(".").split(". "))
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences if sentence)


def _sentence(template: str, *, values: dict[str, str]) -> str:
    """The filled sentence without its full stop; "" if it is left out."""

    def is_expressible(part: str) -> bool:
        return all(name in values for name in _FIELD.findall(part))

    def join_parts(group: re.Match[str]) -> str:
        parts = [part for part in group[1].split("|") if is_expressible(part)]
        return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) if parts else "<>"

    template = _OPTIONAL.sub(lambda piece: piece[1] if is_expressible(piece[1]) else "", template)
    template = _GROUP.sub(join_parts, template)
    if "<>" in template or not is_expressible(template):
        return ""
    filled = _FIELD.sub(lambda field: values[field[1]], template)
    return _ARTICLE.sub(lambda found: f"{found[1]}n " if found[2] in "aeiouAEIOU" else f"{found[1]} ", filled)


_first = compound(
    "Al Bre Ca Da El Fa Gi Ha In Jo Ka Lo Mi Na Or Pe Ro Sa Ta Vi Wi Ya", "dan len mira na ric rin sha ta vin wen lo ro"
)
_last = compound(
    "Bar Cal Dor Fen Gal Har Kes Lan Mor Nor Pel Quin Ros Sel Tor Ul Ver Wal",
    "by dale den gate land ley man mere nett ridge son ster ton wick",
)
_person = sequence(_first, _last)
_town = compound(
    "Ald Bram Cor Dun El Fal Gren Hol Kel Lyn Mar Nor Os Pen Rav Sal Thorn Wex",
    "bury ford ham haven ley mouth port stead ton wick worth",
)
_adjective = words("Blue, Green, Silver, Golden, Old, Quiet, Hidden, Little, Red, White, Lucky, Long, Wild, Salt")
_thing = words("Lantern, Garden, Harbour, Bridge, Crown, Fox, Mill, Anchor, Rose, Tower, Swan, Gate, Oak, Kettle")
_place = either(
    sequence(_adjective, _thing), sequence(_town, words("House, Hall, Court, Corner")), sequence(_last, _thing)
)
_title = either(sequence(words("The"), _adjective, _thing), sequence(words("The"), _thing, words("of"), _town), _place)
_landmark = either(_place, sequence(_town, words("Station, Park, Square")))
_area = words("old town, city centre, harbour district, north quarter, river quarter, market district, west end")
_small_euros = number(5, 60, "{} euros")
_date = sequence(
    number(1, 28),
    words("January, February, March, April, May, June, July, August, September, October, November, December"),
)
_span = either(number(2, 9, "{} hours"), number(20, 90, "{} minutes"))

_illness = sequence(
    words("mild, bad, severe, sudden, constant"),
    words("fever, cough, flu, asthma, back pain, chest pain, head pain, heart pain, hand pain, leg pain"),
)
_doctor = sequence(words("Dr"), _last)
_drug = compound("Kel Mor Nor Pel Sal Tor Ver Zan", "adol amin etin idin ofen oxin")
_tree = words("Alder, Birch, Cedar, Elm, Hazel, Maple, Rowan, Willow")

PUBLIC = (
    Domain(
        always={"name": _place, "type": words("restaurant, pub, bistro, coffee shop, diner, inn")},
        sometimes={
            "food": words("Italian, Thai, Indian, Greek, French, Mexican, Turkish, English"),
            "area": _area,
            "near": _landmark,
            "price": _small_euros,
            "rating": number(1, 5, "{} out of 5"),
            "opens": clock(6, 11),
        },
        some=(3, 4),
        templates=(
            "{name} is a/an [{food} ]{type}[ in the {area}][ near {near}]. "
            "The place <opens at {opens}|costs about {price} a head|is rated {rating}>.",
            "[Not far from {near}, ]guests can try the [{food} ]{type} {name}[ in the {area}]. "
            "Meals <start at {opens}|cost around {price}|earn a score of {rating}>.",
            "The [{food} ]{type} {name} <is in the {area}|stands near {near}|opens at {opens}|"
            "costs about {price} per person|has a rating of {rating}>.",
            "There is a/an [{food} ]{type} called {name}[ in the {area}][, close to {near}]. "
            "It <opens its doors at {opens}|charges around {price}|gets {rating} from guests>.",
            "[Rated {rating}, ]{name} is a/an {type}[ that serves {food} food][ in the {area}][, next to {near}]. "
            "Guests <can come from {opens}|pay about {price} each>.",
        ),
    ),
    Domain(
        always={"pet": words("cat, dog, horse, rabbit, goat, parrot"), "keeper": _person, "trouble": _illness},
        sometimes={
            "years": number(2, 20),
            "vet": _doctor,
            "room": _tree,
            "nights": number(2, 20),
            "remedy": _drug,
            "leaves": _date,
        },
        some=(2, 3),
        templates=(
            "The {pet} of {keeper}[, {years} years old,] has {trouble}[ and is a patient of {vet}]. "
            "It <gets {remedy}|sleeps in {room} room|needs {nights} nights of care|goes home on {leaves}>.",
            "{keeper} came in with a/an {pet}[ aged {years}] that had {trouble}[ and was seen by {vet}]. "
            "The notes <say {remedy}|name {room} room|count {nights} nights|end on {leaves}>.",
            "[On {leaves}, ]{keeper} took a/an {pet}[ aged {years}] home after {trouble}[ and thanked {vet}]. "
            "Care <included {remedy}|was given in {room} room|took {nights} nights>.",
            "For {trouble}, the {pet} of {keeper}[, age {years},] <was under {vet}|lay in {room} room|"
            "was given {remedy}|stayed {nights} nights|went home on {leaves}>.",
        ),
    ),
    Domain(
        always={"train": number(100, 999), "to": _town},
        sometimes={
            "from": _town,
            "via": _town,
            "departs": clock(5, 22),
            "platform": number(1, 16),
            "takes": _span,
            "fare": _small_euros,
        },
        some=(3, 5),
        templates=(
            "Train {train} goes[ from {from}] to {to}[ by way of {via}]. "
            "It <leaves at {departs}|uses platform {platform}|takes {takes}|costs {fare}>.",
            "Passengers for {to} can take train {train}[ from {from}][ via {via}]. "
            "The journey <starts at {departs}|begins on platform {platform}|lasts {takes}|costs {fare}>.",
            "The {to} train with the number {train} <starts in {from}|stops in {via}|departs at {departs}|"
            "waits on platform {platform}|needs {takes}|charges {fare}>.",
            "[At {departs}, ]train {train} leaves[ {from}] for {to}[ from platform {platform}]. "
            "The trip <passes through {via}|takes {takes}|costs {fare} one way>.",
        ),
    ),
    Domain(
        always={"band": _place, "city": _town},
        sometimes={
            "style": words("folk, jazz, rock, indie, soul, electronic"),
            "venue": _place,
            "date": _date,
            "starts": clock(17, 21),
            "ticket": _small_euros,
            "support": _person,
        },
        some=(3, 4),
        templates=(
            "The [{style} ]band {band} will play[ at {venue}] in {city}[ on {date}]. "
            "The show <starts at {starts}|costs {ticket}|opens with {support}>.",
            "[On {date}, ]people in {city} can hear the [{style} ]group {band}[ at {venue}]. "
            "Fans <pay {ticket}|should be there by {starts}|will also hear {support}>.",
            "A/an [{style} ]concert by {band}[ with {support} as a guest] takes place[ at {venue}] in {city}"
            "[ on {date}]. It <starts at {starts}|costs {ticket}>.",
            "Music lovers in {city} can see the [{style} ]band {band}[ on {date}][ at {venue}]. "
            "The evening <starts at {starts}|costs {ticket} a ticket|begins with {support}>.",
        ),
    ),
    Domain(
        always={"player": _person, "club": sequence(_town, words("Rovers, United, Town, Athletic"))},
        sometimes={
            "position": words("striker, defender, midfielder, keeper, winger"),
            "coach": _person,
            "born": _town,
            "joined": _date,
            "goals": number(2, 40),
        },
        some=(3, 4),
        templates=(
            "{player} plays for {club}[ as a/an {position}][ under {coach}]. "
            "The player <was born in {born}|joined on {joined}|has {goals} goals>.",
            "[On {joined}, ]{club} signed {player}[, a/an {position}][, born in {born}]. "
            "The player <has {goals} goals|is trained by {coach}>.",
            "At {club}, {player}[, who plays as a/an {position},] <has {goals} goals|works with the coach {coach}|"
            "is a player born in {born}|started on {joined}>.",
            "[Trained by {coach}, ]the {club} player {player}[, born in {born},] <plays as a/an {position}|"
            "has {goals} goals|came to the club on {joined}>.",
        ),
    ),
)

PRIVATE = (
    Domain(
        always={"patient": _person, "illness": _illness},
        sometimes={
            "age": number(18, 95),
            "ward": _tree,
            "doctor": _doctor,
            "days": number(2, 40),
            "drug": _drug,
            "home": _date,
        },
        some=(2, 2),
        templates=(
            "{patient}[, aged {age},] came in with {illness}[ and saw {doctor}]. "
            "Care <took {days} days|was on {ward} ward|included {drug}|ended on {home}>.",
            "Seen for {illness}, {patient}[, age {age},] <was under {doctor}|lay on {ward} ward|was given {drug}|"
            "stayed {days} days|went home on {home}>.",
            "Patient {patient}[, aged {age},] had {illness}[ and was seen by {doctor}]. "
            "The notes <list {drug}|name {ward} ward|count {days} days|end on {home}>.",
            "[Under {doctor}, ]{patient}[, aged {age},] got over {illness}[ on {ward} ward]. "
            "The stay <lasted {days} days|needed {drug}|ended on {home}>.",
        ),
    ),
)
