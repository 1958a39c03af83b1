"""`data=calls`: generated telephone calls for training dialog models without a download.

In each call an agent has a record and answers a caller's questions from it. In the public part people call a shop, a
railway and a hotel. In the private part relatives call a clinic about a patient, with other records and wording. Both
draw names, dates and numbers from the same generators. Every name is invented, every answer contains the value of the
record verbatim, and call i depends only on (part, seed, i).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from memsave.config import option, register
from memsave.data.errors import DataError
from memsave.data.text.config import HELD_OUT_SEED
from memsave.data.text.dialogs import DialogData
from memsave.data.text.draws import Draw, clock, compound, number, sequence, words
from memsave.data.text.messages import Dialog, Message


@dataclass(frozen=True)
class Topic:
    """One value of a record, with questions for it and answers that contain it."""

    draw: Draw
    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """One telephone line. {name} in a text is a value of the record."""

    known: dict[str, Draw]
    """Values that both speakers know."""
    topics: dict[str, Topic]
    opening: tuple[tuple[str, str], ...]
    """What the caller and the agent say first."""
    closing: tuple[tuple[str, str], ...] = ()
    recorded: int = 4
    """Number of topics in a record."""
    asked: tuple[int, int] = (1, 2)
    """Minimum and maximum number of questions."""


@register("data", "calls")
@dataclass
class CallsData(DialogData):
    """Generated calls to a clinic: the private data of the built-in example of task=dialog."""

    kind: str = "calls"
    max_length: int = option(160, least=8)
    """Tokens of a row; a longer dialog has several rows, each with the turns before it as far as they fit."""
    max_rows: int | None = option(1, least=1)
    """Largest number of rows of a dialog; later replies are left out, and counted. null keeps all; a plan needs one."""
    records: int = option(6000, least=1)
    """Training dialogs, one per patient."""
    held_out: int = option(300, least=1)
    """Held-out dialogs."""
    seed: int = option(0, least=0)
    """Seed of the dialogs."""

    def splits(self) -> tuple[list[Dialog], list[Dialog]]:
        """(training, held-out) dialogs, of different seeds."""
        return (
            private_dialogs(self.records, seed=self.seed),
            private_dialogs(self.held_out, seed=self.seed + HELD_OUT_SEED),
        )


def public_dialogs(count: int, *, seed: int = 0) -> list[Dialog]:
    """The first `count` dialogs of the public part: calls to a shop, a railway and a hotel."""
    return _dialogs(count, part="public", lines=PUBLIC, seed=seed)


def private_dialogs(count: int, *, seed: int = 0) -> list[Dialog]:
    """The first `count` dialogs of the private part, calls to a clinic; another seed gives held-out dialogs."""
    return _dialogs(count, part="private", lines=PRIVATE, seed=seed)


def _dialogs(count: int, *, part: str, lines: Sequence[Line], seed: int) -> list[Dialog]:
    if count < 1:
        raise DataError(f"The number of dialogs is {count}: give at least 1.")
    rng = random.Random(f"dialogs {part} {seed}")
    return [_dialog(rng.choice(lines), rng=rng) for _ in range(count)]


def _dialog(line: Line, *, rng: random.Random) -> Dialog:
    values = {name: draw(rng) for name, draw in line.known.items()}
    topics = rng.sample(list(line.topics), line.recorded)
    values |= {name: line.topics[name].draw(rng) for name in topics}
    order = rng.sample(list(values), len(values))
    turns = [rng.choice(line.opening)]
    for name in rng.sample(topics, rng.randint(*line.asked)):
        topic = line.topics[name]
        turns.append((rng.choice(topic.questions), rng.choice(topic.answers)))
    turns += [rng.choice(line.closing)] if line.closing else []
    messages = [Message("system", ", ".join(f"{name}: {values[name]}" for name in order))]
    for question, answer in turns:
        messages.append(Message("user", question.format_map(values)))
        messages.append(Message("assistant", answer.format_map(values)))
    return Dialog(tuple(messages))


_last = compound(
    "Bar Cal Dor Fen Gal Har Kes Lan Mor Nor Pel Ros Sel Tor Wal", "by dale den ley man nett ridge son ton wick"
)
_person = sequence(
    compound("Al Bre Ca Da El Fa Ha Jo Ka Lo Mi Na Ro Sa Ta", "dan len na ric rin sha vin wen lo ro"), _last
)
_town = compound("Ald Bram Cor Dun El Gren Hol Kel Lyn Nor Os Pen Thorn Wex", "bury ford ham haven ley mouth port ton")
_date = sequence(number(1, 28), words("January, March, April, June, July, August, October, December"))
_tree = words("Alder, Birch, Cedar, Elm, Hazel, Maple, Rowan, Willow")
_time = clock(6, 21)

_goodbye = (
    ("Thank you.", "You are welcome."),
    ("Thanks, that is all.", "Thank you for your call."),
    ("That is all, goodbye.", "Goodbye."),
)

PUBLIC = (
    Line(
        known={"customer": _person, "order": number(1000, 9999)},
        topics={
            "item": Topic(
                sequence(words("red, blue, green, white, black"), words("lamp, chair, kettle, coat, clock, table")),
                ("What did I buy?", "Which item is in it?", "What is the item?"),
                ("You bought one {item}.", "The item is a {item}.", "It is a {item}."),
            ),
            "price": Topic(
                number(5, 90, "{} euros"),
                ("What is the price?", "How much do I pay?", "What does it cost?"),
                ("The price is {price}.", "You pay {price}.", "It costs {price}."),
            ),
            "arrives": Topic(
                _date,
                ("When does it come?", "On which day does it arrive?", "When do I get it?"),
                ("It arrives on {arrives}.", "You get it on {arrives}.", "It comes on {arrives}."),
            ),
            "driver": Topic(
                _person,
                ("Who brings it?", "What is the name of the driver?", "Who is the driver?"),
                ("The driver is {driver}.", "{driver} brings it.", "Your driver is called {driver}."),
            ),
            "depot": Topic(
                _town,
                ("Where is it now?", "In which depot is it?", "Where does it wait?"),
                ("It is in {depot}.", "It waits in the {depot} depot.", "The depot is {depot}."),
            ),
        },
        opening=(
            ("Hello, I call about order {order}.", "Hello {customer}, I see order {order} here."),
            ("This is {customer}, I have a question.", "Hello {customer}, is it about order {order}?"),
            ("Good day, my order is {order}.", "Good day, this is the order of {customer}."),
        ),
        closing=_goodbye,
    ),
    Line(
        known={"passenger": _person, "train": number(100, 999)},
        topics={
            "from": Topic(
                _town,
                ("Where do I get on?", "Where does it start?", "From which town does it go?"),
                ("It starts in {from}.", "You get on in {from}.", "The train goes from {from}."),
            ),
            "to": Topic(
                _town,
                ("Where does it end?", "Which town does it go to?", "Where do I get off?"),
                ("It goes to {to}.", "You get off in {to}.", "The last stop is {to}."),
            ),
            "leaves": Topic(
                _time,
                ("At what time does it leave?", "When does it go?", "What is the time?"),
                ("It leaves at {leaves}.", "The train goes at {leaves}.", "You leave at {leaves}."),
            ),
            "platform": Topic(
                number(1, 24),
                ("Which platform is it?", "Where does the train stop?", "What is the platform?"),
                ("It is platform {platform}.", "Go to platform {platform}.", "It stops at platform {platform}."),
            ),
            "seat": Topic(
                number(10, 99),
                ("Which seat do I have?", "What is my seat?", "Where do I sit?"),
                ("You have seat {seat}.", "Your seat is {seat}.", "You sit in seat {seat}."),
            ),
        },
        opening=(
            ("Hi, I want to ask about train {train}.", "Yes, {passenger} has a ticket for train {train}."),
            ("Hi, it is {passenger}.", "Hi {passenger}, you are on train {train}."),
            ("I have a ticket for train {train}.", "Are you {passenger}? Then I can help."),
        ),
        closing=_goodbye,
    ),
    Line(
        known={"guest": _person, "hotel": sequence(_town, words("House, Hall, Court, Inn"))},
        topics={
            "room": Topic(
                number(10, 99),
                ("Which room is it?", "What is the room?", "Where do I sleep?"),
                ("It is room {room}.", "You have room {room}.", "Your room is {room}."),
            ),
            "nights": Topic(
                number(2, 20),
                ("How many nights is it?", "How long do I stay?", "How long is it?"),
                ("You stay for {nights} nights.", "It is {nights} nights.", "We have {nights} nights here."),
            ),
            "from": Topic(
                _date,
                ("When do I come?", "What is the first day?", "On which day does it start?"),
                ("You come on {from}.", "The first day is {from}.", "It starts on {from}."),
            ),
            "breakfast": Topic(
                _time,
                ("When is breakfast?", "At what time can I eat?", "What time is breakfast?"),
                ("Breakfast is at {breakfast}.", "You can eat at {breakfast}.", "We start at {breakfast}."),
            ),
            "floor": Topic(
                _tree,
                ("Which floor is it?", "What is the name of the floor?", "Where is it?"),
                ("It is on {floor} floor.", "The floor is called {floor}.", "You are on {floor} floor."),
            ),
        },
        opening=(
            ("Is this {hotel}?", "Yes, this is {hotel}, hello {guest}."),
            ("Hello, my name is {guest}.", "Welcome to {hotel}, {guest}."),
            ("Hello, I come to {hotel} soon.", "I see, the name is {guest}."),
        ),
        closing=_goodbye,
    ),
)

PRIVATE = (
    Line(
        known={
            "patient": _person,
            "illness": sequence(words("mild, bad, severe, sudden"), words("fever, cough, flu, asthma")),
        },
        topics={
            "ward": Topic(
                _tree,
                ("Which ward is it?", "Where can I visit?", "Where do I go?"),
                ("Please go to {ward} ward.", "You can find us on {ward} ward."),
            ),
            "doctor": Topic(
                sequence(words("Dr"), _last),
                ("Who is the doctor?", "Which doctor can I ask?", "Who can tell me more?"),
                ("Please ask {doctor}.", "{doctor} is the doctor here."),
            ),
            "drug": Topic(
                compound("Kel Mor Nor Pel Sal Tor Ver Zan", "adol amin etin idin ofen oxin"),
                ("What was given?", "Which drug is it?", "What do we take?"),
                ("We give {drug} every day.", "We started with {drug}."),
            ),
            "home": Topic(
                _date,
                ("When can we go home?", "When is the last day?", "How long will it be?"),
                ("We hope to end on {home}.", "Going home is planned for {home}."),
            ),
            "visits": Topic(
                _time,
                ("When may I visit?", "When are visits?", "At what time may I come?"),
                ("Please come after {visits}.", "You may visit from {visits}."),
            ),
        },
        opening=(
            ("Hello, how is {patient}?", "Hello, {patient} is here with {illness}."),
            ("I ask about {patient}.", "I see, {patient} came with {illness}."),
            ("Is there news of {patient}?", "The notes of {patient} say {illness}."),
        ),
        recorded=3,
    ),
)
