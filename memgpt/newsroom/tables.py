"""Generates the tables from the world: articles, annotated sentences, investors' views, the archive. Also keeps the
hidden state."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd

from memgpt.newsroom import grammar, lexicon
from memgpt.newsroom.grammar import Sentence
from memgpt.newsroom.readers import Archive
from memgpt.newsroom.world import DAY, YEAR_START, Company, Dice, Entity, Event, World, build

Tables = dict[str, dict[str, pd.DataFrame]]
Maker = Callable[[Event, Dice], Sentence]

LABELS = {1: "positive", 0: "neutral", -1: "negative"}
NER_NOISE = 0.05  # share of mentions with a wrong annotation, in every split
SENTIMENT_NOISE = 0.06  # share of labels replaced by a neighbouring one
# share of a split's rows about strange names, and share whose phrasing is held out from train and corpus
STRANGE = {"train": 0.0, "validation": 0.5, "test": 0.8}
HELD_OUT = {"train": 0.0, "validation": 0.5, "test": 1.0}


@dataclass(repr=False)
class Newsroom:
    """`tables` is what `generate` returns. The rest is hidden state that only the oracle reads, in the order of the
    tables' rows."""

    tables: Tables
    world: World
    ner: dict[str, list[Sentence]]
    sentiment: dict[str, list[tuple[Event, Sentence]]]
    archive: Archive


def assemble(scale: float, seed: int) -> Newsroom:
    if not scale > 0:
        raise ValueError(f"newsroom: scale must be larger than 0, not {scale}")
    world = build(scale, seed)
    dice = Dice(seed, "ner")
    ner_rows = {
        "train": max(120, round(2000 * scale)),
        "validation": max(60, round(300 * scale)),
        "test": max(60, round(500 * scale)),
    }
    ner = {
        split: [sentence for _, sentence in rows]
        for split, rows in _sentences(world, grammar.story, ner_rows, dice).items()
    }
    dice = Dice(seed, "sentiment")
    rows = {
        "train": max(120, round(2400 * scale)),
        "validation": max(60, round(300 * scale)),
        "test": max(60, round(600 * scale)),
    }
    sentiment = _sentences(world, grammar.statement, rows, dice)
    archive = Archive(world, items=max(60, round(600 * scale)), readers=max(80, round(600 * scale)), seed=seed)
    tables: Tables = {
        "corpus": _corpus(world, max(200, round(4000 * scale)), Dice(seed, "corpus")),
        "ner": {split: _ner_table(split, sentences, Dice(seed, f"ner/{split}")) for split, sentences in ner.items()},
        "sentiment": {
            split: _sentiment_table(split, told, Dice(seed, f"sentiment/{split}")) for split, told in sentiment.items()
        },
        "recommendation": _recommendation_tables(archive),
    }
    return Newsroom(tables, world, ner, sentiment, archive)


def _sentences(world: World, make: Maker, rows: dict[str, int], dice: Dice) -> dict[str, list[tuple[Event, Sentence]]]:
    """(event, sentence) by split. In each half, all events are used about equally often; no text occurs twice."""
    halves = [[event for event in world.events if event.strange == strange] for strange in (False, True)]
    queues: list[list[Event]] = [[], []]
    taken: set[str] = set()
    out: dict[str, list[tuple[Event, Sentence]]] = {}
    for split, count in rows.items():
        told: list[tuple[Event, Sentence]] = []
        while len(told) < count:
            strange = dice.chance(STRANGE[split])
            if not queues[strange]:
                queues[strange] = dice.shuffled(halves[strange])
            event = queues[strange].pop()
            sentence = grammar.draw(make, event, dice, held_out=dice.chance(HELD_OUT[split]))
            if sentence.text not in taken:
                taken.add(sentence.text)
                told.append((event, sentence))
        out[split] = told
    return out


# --- entity recognition


def _ner_table(split: str, sentences: list[Sentence], dice: Dice) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "id": [f"ner-{split}-{row:05d}" for row in range(len(sentences))],
            "tokens": [list(sentence.tokens) for sentence in sentences],
            "tags": [_annotate(sentence.tags, dice) for sentence in sentences],
        }
    )


def _annotate(tags: tuple[str, ...], dice: Dice) -> list[str]:
    """The tags with annotation noise: now and then a mention gets a wrong type, or none."""
    out: list[str] = []
    told = ""  # the annotated type of the current mention
    for tag in tags:
        if tag[0] == "B":
            told = tag[2:]
            if dice.chance(NER_NOISE):
                told = dice.pick([other for other in ("", "LOC", "ORG", "PER", "PROD") if other != told])
        out.append(f"{tag[:2]}{told}" if tag != "O" and told else "O")
    return out


# --- sentiment


def _sentiment_table(split: str, told: list[tuple[Event, Sentence]], dice: Dice) -> pd.DataFrame:
    moods = [event.mood for event, _ in told]
    noisy = [(0 if mood else dice.pick((1, -1))) if dice.chance(SENTIMENT_NOISE) else mood for mood in moods]
    seconds = [YEAR_START + event.day * DAY + dice.below(DAY) for event, _ in told]
    return pd.DataFrame(
        {
            "id": [f"sentiment-{split}-{row:05d}" for row in range(len(told))],
            "text": [sentence.text for _, sentence in told],
            "label": [LABELS[mood] for mood in noisy],
            "topic": [event.topic for event, _ in told],
            "time": pd.to_datetime(pd.Series(seconds), unit="s").astype("datetime64[us]"),
        }
    )


# --- corpus


def _corpus(world: World, count: int, dice: Dice) -> dict[str, pd.DataFrame]:
    texts = [_profile(entity, events, dice) for entity, events in _appearances(world) if events]
    texts = dice.shuffled(texts)[: count // 4]
    by_company: dict[int, list[Event]] = {company.number: [] for company in world.companies}
    for event in world.events:
        by_company[event.company.number].append(event)
    queue: list[Event] = []
    while len(texts) < count:
        queue = queue or dice.shuffled(world.events)
        texts.append(_article(queue.pop(), by_company, world, dice))
    texts = dice.shuffled(texts)
    held_out = max(40, round(0.05 * count))
    splits = {"train": texts[held_out:], "validation": texts[:held_out]}
    return {
        split: pd.DataFrame(
            {
                "id": [f"article-{split}-{row:05d}" for row in range(len(articles))],
                "text": articles,
                "source": ["newsroom"] * len(articles),
            }
        )
        for split, articles in splits.items()
    }


def _article(event: Event, by_company: dict[int, list[Event]], world: World, dice: Dice) -> str:
    """Headline, what happened now and before, what it means and how the market reacts, and an announcement of the next
    story with its headline."""

    def write(make: Maker, of: Event = event) -> str:
        return grammar.draw(make, of, dice, held_out=False).text

    views = [f"{write(grammar.statement)} {write(grammar.reaction)}" for _ in range(3)]
    before = dice.pick(by_company[event.company.number])
    other = dice.pick(world.events)
    roles = {**event.roles, "org2": other.company, "org3": dice.pick(world.companies)}
    follow = dice.pick(("company", "beat"))
    announced = (
        replace(event, roles=roles)
        if follow == "company"
        else replace(event, roles=roles, topic=other.topic, kind=other.kind)
    )
    paragraphs = [
        f"{write(grammar.headline)}. {write(grammar.desk)}",
        " ".join(write(grammar.story, of) for of in (event, before)),
        " ".join([write(grammar.maxim), *views]),
        write(grammar.story),
        f"{write(grammar.announcement(follow), announced)} {write(grammar.headline, other)}. "
        f"{write(grammar.desk, other)}",
    ]
    return "\n\n".join(paragraphs)


def _appearances(world: World) -> list[tuple[Entity, list[tuple[str, Event]]]]:
    """Each entity with the events in which it occurs, and its slot there (org, per, loc or prod)."""
    found: dict[int, list[tuple[str, Event]]] = {id(entity): [] for entity in world.entities}
    for event in world.events:
        for slot in lexicon.PROFILES:
            found[id(event.roles[slot])].append((slot, event))
    return [(entity, found[id(entity)]) for entity in world.entities]


def _profile(entity: Entity, events: list[tuple[str, Event]], dice: Dice) -> str:
    """A profile of one entity, drawn from one event in which it occurs."""
    slot, event = dice.pick(events)
    if isinstance(entity, Company):
        facts: dict[str, Entity | None] = {"loc": entity.home, "per": entity.staff[0], "prod": entity.products[0]}
        event = replace(event, roles={**event.roles, **{key: value for key, value in facts.items() if value}})
    lines = [
        grammar.draw(grammar.profile(slot, position), event, dice, held_out=False).text
        for position in range(len(lexicon.PROFILES[slot]))
    ]
    return " ".join(lines)


# --- recommendation


def _recommendation_tables(archive: Archive) -> dict[str, pd.DataFrame]:
    items = archive.items
    clicks = [(reader.id, item.id, second) for reader in archive.readers for second, item in reader.clicks]
    return {
        "items": pd.DataFrame(
            {
                "item_id": [item.id for item in items],
                "title": [item.title for item in items],
                "description": [item.description for item in items],
                "tags": [f"{item.event.topic}|{item.event.kind}" for item in items],
            }
        ),
        "interactions": pd.DataFrame(
            {
                "user_id": [user for user, _, _ in clicks],
                "item_id": [item for _, item, _ in clicks],
                "timestamp": pd.Series([second for _, _, second in clicks], dtype="int64"),
                "event": ["click"] * len(clicks),
                "rating": pd.Series([None] * len(clicks), dtype="float64"),
            }
        ),
    }
