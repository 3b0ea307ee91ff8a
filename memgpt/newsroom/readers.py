"""The archive and its readers: items that announce other items, and clicks that mostly follow these announcements."""

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import accumulate

from memgpt.newsroom import grammar, lexicon
from memgpt.newsroom.world import DAY, DAYS, YEAR_START, Company, Dice, Event, World

OPENING = YEAR_START + DAYS * DAY  # the archive opens after the year of the events
LATE_DAY, CLOSING_DAY = (
    49,
    56,
)  # the last week, in which a quarter of the items appear and each reader makes the last two clicks
FOLLOW, INTEREST, CHANCE = 0.72, 0.14, 0.14  # probabilities of the reasons for a click


@dataclass(eq=False, repr=False)
class Item:
    number: int
    event: Event
    late: bool
    title: str
    description: str
    announced: list["Item"] = field(default_factory=list)  # hidden state: the items that the text announces

    @property
    def id(self) -> str:
        return f"item-{self.number:05d}"


@dataclass(repr=False)
class Reader:
    number: int
    topics: list[str]
    kinds: list[str]
    companies: list[Company]
    clicks: list[tuple[int, Item]] = field(default_factory=list)  # (seconds, item), in order

    @property
    def id(self) -> str:
        return f"reader-{self.number:05d}"


class Archive:
    def __init__(self, world: World, items: int, readers: int, seed: int) -> None:
        dice = Dice(seed, "archive")
        self.by_company: dict[int, list[Item]] = defaultdict(list)
        self.by_beat: dict[tuple[str, str], list[Item]] = defaultdict(list)
        self.items = self._publish(world, items, dice)
        popularity = [1 / (1 + rank) ** 0.8 for rank in range(len(self.items))]
        self.popularity = dict(zip(dice.shuffled(range(len(self.items))), popularity, strict=True))
        self._ladder = list(accumulate(self.popularity[item.number] for item in self.items))
        dice = Dice(seed, "readers")
        self.readers = [self._read(number, dice) for number in range(readers)]

    def _publish(self, world: World, count: int, dice: Dice) -> list[Item]:
        """Publish items company by company in turn, so that all have about the same number of items."""
        waiting: dict[int, list[Event]] = defaultdict(list)
        for event in dice.shuffled(world.events):
            waiting[event.company.number].append(event)
        events: list[Event] = []
        while len(events) < count:
            round_ = [waiting[company.number].pop() for company in world.companies if waiting[company.number]]
            assert round_, "fewer events than items"
            events += round_[: count - len(events)]
        items = [Item(number, event, dice.chance(0.25), "", "") for number, event in enumerate(dice.shuffled(events))]
        for item in items:
            self.by_company[item.event.company.number].append(item)
            self.by_beat[item.event.topic, item.event.kind].append(item)
        for item in items:
            self._write(item, world, dice)
        return items

    def _write(self, item: Item, world: World, dice: Dice) -> None:
        event = item.event
        told = [company for company in world.companies if self.by_company[company.number]]
        other = dice.pick([company for company in told if company is not event.company])
        if dice.chance(0.4):
            beat = dice.pick([beat for beat in sorted(self.by_beat) if beat != (event.topic, event.kind)])
            item.announced = self.by_beat[beat]
            told_of = replace(event, topic=beat[0], kind=beat[1], roles={**event.roles, "org3": other})
            announce = grammar.announcement("beat")
        else:
            rivals = [rival for rival in event.company.rivals if self.by_company[rival.number] and rival is not other]
            company = dice.pick(rivals) if rivals and dice.chance(0.7) else event.company
            item.announced = [other_item for other_item in self.by_company[company.number] if other_item is not item]
            told_of = replace(event, roles={**event.roles, "org2": company, "org3": other})
            announce = grammar.announcement("company")
        item.title = grammar.draw(grammar.headline, event, dice, held_out=False).text
        desk = grammar.draw(grammar.desk, event, dice, held_out=False).text
        item.description = f"{desk} {grammar.draw(announce, told_of, dice, held_out=False).text}"

    # --- reading

    def _read(self, number: int, dice: Dice) -> Reader:
        told = [item.event.company for item in self.items]
        reader = Reader(
            number,
            topics=dice.shuffled(lexicon.TOPICS)[:2],
            kinds=dice.shuffled(lexicon.KINDS)[:2],
            companies=[dice.pick(told) for _ in range(2)],
        )
        clicks = 6 + dice.below(10)
        seconds: list[int] = []
        while len(seconds) < clicks:
            last_week = len(seconds) >= clicks - 2
            first, end = (LATE_DAY, CLOSING_DAY) if last_week else (0, LATE_DAY)
            second = first * DAY + dice.below((end - first) * DAY)
            if second not in seconds:
                seconds.append(second)
        for second in sorted(seconds):
            reader.clicks.append((OPENING + second, self._click(reader, late=second >= LATE_DAY * DAY, dice=dice)))
        return reader

    def _click(self, reader: Reader, late: bool, dice: Dice) -> Item:
        pools = self._pools(reader, late)
        turn = dice.weighted((FOLLOW, INTEREST, CHANCE))
        for pool in pools[turn:]:
            if pool:
                return self.items[list(pool)[dice.weighted(list(pool.values()))]]
        read = {item.number for _, item in reader.clicks}
        while True:
            item = self.items[min(bisect_right(self._ladder, dice.uniform() * self._ladder[-1]), len(self.items) - 1)]
            if item.number not in read and (late or not item.late):
                return item

    def _pools(self, reader: Reader, late: bool) -> list[dict[int, float]]:
        """Two pools of item number → weight, without items already read: those that the last read item announced, and
        those that match the reader's interests."""
        read = {item.number for _, item in reader.clicks}

        def open_(items: list[Item]) -> list[Item]:
            return [item for item in items if item.number not in read and (late or not item.late)]

        def weight(item: Item) -> float:
            return (3.0 if item.event.kind in reader.kinds else 1.0) * (2.0 if item.late else 1.0)

        announced = open_(reader.clicks[-1][1].announced) if reader.clicks else []
        cared = [item for topic in reader.topics for kind in reader.kinds for item in self.by_beat[topic, kind]]
        cared += [item for company in reader.companies for item in self.by_company[company.number]]
        return [{item.number: weight(item) for item in announced}, {item.number: 1.0 for item in open_(cared)}]

    def probabilities(self, reader: Reader) -> list[float]:
        """From the hidden state: the probability of each item to be the reader's last click, given those before it."""
        before = Reader(reader.number, reader.topics, reader.kinds, reader.companies, reader.clicks[:-1])
        follow, interest = self._pools(before, late=True)
        read = {item.number for _, item in before.clicks}
        chance = {item.number: self.popularity[item.number] for item in self.items if item.number not in read}
        out = [0.0] * len(self.items)
        shares = [FOLLOW, INTEREST, CHANCE]
        for turn, pool in enumerate((follow, interest, chance)):
            if not pool:  # an empty pool's share goes to the next pool, as in `_click`
                shares[turn + 1] += shares[turn]
                continue
            total = sum(pool.values())
            for number, value in pool.items():
                out[number] += shares[turn] * value / total
        return out
