"""The newsroom's hidden world: its entities, and the events of one year.

All draws use only `random()` of `random.Random(str)`, whose stream Python guarantees across versions and processes.
Entities form two halves, familiar and strange, each with its own roots (name stems). Tasks train on events of familiar
entities; most of their held-out texts are about strange ones. The corpus is about both.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from memgpt.newsroom import lexicon

T = TypeVar("T")

YEAR_START = 1_704_067_200  # 2024-01-01T00:00:00Z: the year of the events; readers click in the eight weeks after it
DAY = 86_400
DAYS = 366


class Dice:
    """Seeded draws, one stream per `name`: a change in one part of the generator does not change the others' output."""

    def __init__(self, seed: int, name: str) -> None:
        self._random = random.Random(f"newsroom/{seed}/{name}").random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def uniform(self) -> float:
        return self._random()

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self._random() * len(choices))]

    def weighted(self, weights: Sequence[float]) -> int:
        """An index, drawn with probability proportional to `weights`."""
        left = self._random() * math.fsum(weights)
        for index, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return index
        return max(index for index, weight in enumerate(weights) if weight > 0)  # if rounding skipped the last one

    def shuffled(self, items: Sequence[T]) -> list[T]:
        out = list(items)
        for last in range(len(out) - 1, 0, -1):
            other = self.below(last + 1)
            out[last], out[other] = out[other], out[last]
        return out


@dataclass(eq=False, repr=False)
class Entity:
    """`type` is PER, ORG, LOC or PROD; `forms` are its written forms, the fullest first."""

    type: str
    forms: tuple[str, ...]


@dataclass(eq=False, repr=False)
class Company(Entity):
    number: int = 0
    topic: str = ""
    home: Entity | None = None
    staff: list[Entity] = field(default_factory=list)
    products: list[Entity] = field(default_factory=list)
    rivals: list["Company"] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Event:
    """`roles` maps a pattern's slot (org, per, loc2, …) to the entity that fills it, `mood` is how investors see the
    event (1 good, 0 neutral, −1 bad), `day` counts from the start of the year."""

    number: int
    strange: bool
    kind: str
    topic: str
    mood: int
    day: int
    roles: dict[str, Entity]

    @property
    def company(self) -> Company:
        company = self.roles["org"]
        assert isinstance(company, Company)
        return company


@dataclass(repr=False)  # its repr would never end
class World:
    companies: list[Company]
    people: list[Entity]
    places: list[Entity]
    products: list[Entity]
    events: list[Event]

    @property
    def entities(self) -> list[Entity]:
        return [*self.companies, *self.people, *self.places, *self.products]


def build(scale: float, seed: int) -> World:
    """The number of names grows with the square root of `scale`, that of events with `scale`: more events per name."""
    half = max(12, round(60 * math.sqrt(scale)))  # companies in each half
    world = World([], [], [], [], [])
    dice = Dice(seed, "names")
    roots = _roots(dice, 4 * half)
    first_names = dice.shuffled(lexicon.FIRST_NAMES)
    third = len(first_names) // 3
    halves = []
    for strange in (False, True):
        # both halves share the middle third of the first names
        firsts = first_names[third:] if strange else first_names[: 2 * third]
        halves.append(_populate(dice, roots[strange::2], firsts, half, first_number=half * strange))
    for companies, people, places, products in halves:
        world.companies += companies
        world.people += people
        world.places += places
        world.products += products
    _happen(world, halves, Dice(seed, "events"), count=max(80, round(1200 * scale)))
    return world


def _roots(dice: Dice, count: int) -> list[str]:
    """`count` different name stems, with the ordinary words first, so that both halves have some."""
    heads, middles, tails = lexicon.ROOT_HEADS, lexicon.ROOT_MIDDLES, lexicon.ROOT_TAILS
    roots = dice.shuffled([head + tail for head in heads for tail in tails])
    if len(roots) < count:
        roots += dice.shuffled([head + middle + tail for head in heads for middle in middles for tail in tails])
    return [*dice.shuffled(lexicon.ORDINARY_ROOTS), *roots][:count]


def _populate(
    dice: Dice, roots: list[str], firsts: list[str], companies: int, first_number: int
) -> tuple[list[Company], list[Entity], list[Entity], list[Entity]]:
    places = [
        Entity("LOC", (dice.pick(lexicon.PLACE_FORMS).format(root),))
        for root in dice.shuffled(roots)[: companies * 2 // 3]
    ]
    people: list[Entity] = []
    taken: set[str] = set()
    while len(people) < 2 * companies:
        surname = dice.pick(roots)
        first = dice.pick(roots) if dice.chance(0.15) else dice.pick(firsts)  # some first names are roots
        full = f"{first} {surname}"
        if first != surname and full not in taken:
            taken.add(full)
            people.append(Entity("PER", (full, surname)))
    products = [
        Entity("PROD", (form.format(root),))
        for root in dice.shuffled(roots)[:companies]
        for form in [dice.pick(lexicon.PRODUCT_FORMS)]
    ]
    firms = []
    for number, root in enumerate(dice.shuffled(roots)[:companies]):
        topic = lexicon.TOPICS[number % len(lexicon.TOPICS)]
        full = dice.pick(lexicon.COMPANY_FORMS).format(root, sector=lexicon.COMPANY_SECTOR[topic])
        namesakes = [place for place in places if root in place.forms[0].split()]
        home = namesakes[0] if namesakes and dice.chance(0.6) else dice.pick(places)
        staff = people[2 * number : 2 * number + 2]
        firms.append(
            Company(
                "ORG",
                (full, root),
                number=first_number + number,
                topic=topic,
                home=home,
                staff=staff,
                products=[products[number]],
            )
        )
    for firm in firms:
        others = dice.shuffled([other for other in firms if other is not firm])
        firm.rivals = sorted(others, key=lambda other: other.topic != firm.topic)[:2] + others[:2]
    return firms, people, places, products


def _happen(
    world: World, halves: list[tuple[list[Company], list[Entity], list[Entity], list[Entity]]], dice: Dice, count: int
) -> None:
    """Add `count` events, cycling through the topics. Each topic has two bursts in the year and a mood that drifts."""
    bursts = {topic: (30 + dice.below(130), 190 + dice.below(140)) for topic in lexicon.TOPICS}
    phase = {topic: dice.uniform() for topic in lexicon.TOPICS}
    for number in range(count):
        strange = number % 2 == 1
        companies, people, places, products = halves[strange]
        topic = lexicon.TOPICS[number // 2 % len(lexicon.TOPICS)]
        company = dice.pick([company for company in companies if company.topic == topic])
        day = dice.below(DAYS)
        if dice.chance(0.4):
            day = dice.pick(bursts[topic]) + dice.below(14)
        tilt = 0.08 * math.sin(2 * math.pi * (day / DAYS + phase[topic]))
        mood = (1, 0, -1)[dice.weighted((1 / 3 + tilt, 1 / 3, 1 / 3 - tilt))]
        assert company.home is not None
        loc = company.home if dice.chance(0.5) else dice.pick(places)
        per = company.staff[0] if dice.chance(0.5) else dice.pick(people)
        prod = company.products[0] if dice.chance(0.7) else dice.pick(products)
        roles: dict[str, Entity] = {
            "org": company,
            "org2": dice.pick(company.rivals),
            "per": per,
            "per2": dice.pick([person for person in company.staff if person is not per]),
            "loc": loc,
            "loc2": dice.pick([place for place in places if place is not loc]),
            "prod": prod,
            "prod2": dice.pick([product for product in products if product is not prod]),
        }
        kind = lexicon.KINDS[dice.below(len(lexicon.KINDS))]
        world.events.append(Event(number, strange, kind, topic, mood, day, roles))
