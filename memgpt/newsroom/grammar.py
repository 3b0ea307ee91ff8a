"""Turns patterns into sentences: tokens, true BIO tags, and a key that decides whether the phrasing is held out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memgpt.newsroom import lexicon
from memgpt.newsroom.world import Dice, Event

PARTS = 5  # the combinations of pattern and words are divided into this many parts, of which one is held out
_NO_SPACE_BEFORE = frozenset(",.:")


@dataclass(frozen=True)
class Sentence:
    """`tags` are the true ones, without annotation noise. `key` is the sum of the list indices of the pattern and of
    each word. It depends only on the phrasing, never on names or numbers, and each word is equally frequent under every
    value of key modulo `PARTS`.
    """

    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    key: int

    @property
    def held_out(self) -> bool:
        return self.key % PARTS == 0

    @property
    def text(self) -> str:
        return join(self.tokens)

    @property
    def masked(self) -> str:
        """The text with NAME in place of every name."""
        return join(
            [tok if tag == "O" else "NAME" for tok, tag in zip(self.tokens, self.tags, strict=True) if tag[0] != "I"]
        )


def join(tokens: Sequence[str]) -> str:
    return "".join(token if i == 0 or token in _NO_SPACE_BEFORE else f" {token}" for i, token in enumerate(tokens))


class Draft:
    """A sentence under construction, about one event.

    Every chosen word must also be written: with a choice that leaves no trace in the text, the key would depend on more
    than the phrasing.
    """

    def __init__(self, event: Event, dice: Dice) -> None:
        self.event, self.dice = event, dice
        self.tokens: list[str] = []
        self.tags: list[str] = []
        self.key = 0

    def choose(self, options: Sequence[str]) -> str:
        choice = self.dice.pick(options)
        self.key += options.index(choice)  # index() finds the first of equal options, so the key follows from the text
        return choice

    def add(self, pattern: str) -> "Draft":
        for piece in pattern.split():
            if piece[0] == "{":
                self._name(piece[1:-1])
            elif piece[0] == "<":
                self.add(self.choose(self._words(piece[1:-1])))
            elif piece == "#":
                self._put(str(2 + self.dice.below(58)), "O")
            else:
                self._put(piece, "O")
        return self

    def _words(self, name: str) -> tuple[str, ...]:
        if name == "sector":
            return lexicon.SECTOR[self.event.topic]
        if name == "affair":
            return lexicon.AFFAIR[self.event.kind]
        return lexicon.WORDS[name]

    def _name(self, slot: str) -> None:
        """`{org!}` is written in full, `{org?}` in short, `{org}` at random in either form."""
        entity = self.event.roles[slot.rstrip("!?")]
        full = slot[-1] == "!" or (slot[-1] != "?" and self.dice.chance(0.5))
        for i, token in enumerate(entity.forms[0 if full else -1].split()):
            self._put(token, f"{'I' if i else 'B'}-{entity.type}")

    def _put(self, token: str, tag: str) -> None:
        if tag == "O" and self.tokens and self.tokens[-1] == "a" and token[0] in "aeiou":
            self.tokens[-1] = "an"
        self.tokens.append(token)
        self.tags.append(tag)

    def done(self, stop: bool = True) -> Sentence:
        first, *rest = self.tokens
        tokens = [first[0].upper() + first[1:], *rest]
        return (
            Sentence((*tokens, "."), (*self.tags, "O"), self.key)
            if stop
            else Sentence(tuple(tokens), tuple(self.tags), self.key)
        )


def draw(make: Callable[[Event, Dice], Sentence], event: Event, dice: Dice, held_out: bool) -> Sentence:
    """A sentence whose phrasing is in the held-out part, or is not, as requested."""
    while True:
        sentence = make(event, dice)
        if sentence.held_out == held_out:
            return sentence


def story(event: Event, dice: Dice) -> Sentence:
    """What happened, with people, companies, places and products: the sentences for NER."""
    draft = Draft(event, dice)
    source = dice.weighted((0.35, 0.25, 0.4))
    if source < 2:
        return _framed(draft, draft.choose((lexicon.FRAMES[event.kind], lexicon.COMMON_FRAMES)[source]))
    kind = dice.pick(("PER", "ORG", "LOC", "PROD"))
    main = draft.choose(lexicon.FAR_FRAMES)
    for slot, words in (
        ("<gap>", lexicon.GAPS),
        ("<deed>", lexicon.DEEDS_OF[kind]),
        ("<sort>", lexicon.SORTS_OF[kind]),
    ):
        if slot in main:
            main = main.replace(slot, draft.choose(words))
    first, second = dice.shuffled(lexicon.PAIRS_OF[kind])
    return _framed(draft, main.replace("{X}", f"{{{first}}}").replace("{Y}", f"{{{second}}}"))


def statement(event: Event, dice: Dice) -> Sentence:
    """What the event means to an investor, according to its mood: the sentences for sentiment."""
    draft, mood = Draft(event, dice), event.mood
    form = dice.weighted((0.44, 0.16, 0.2, 0.12, 0.08))
    if mood == 0:
        contrast = form == 2
        main = draft.choose(lexicon.NEUTRAL_MAIN if contrast else lexicon.NEUTRAL)
        quantity, movement = _claim(dice, dice.pick((1, -1)), negated=dice.chance(0.3))
        main = main.replace("<Q>", quantity).replace("<V>", movement)
        return _framed(draft, _contrast(draft, main, dice.pick((1, -1))) if contrast else main)
    if form == 3:
        verb, thing = dice.pick(lexicon.DEEDS[mood])
        return _framed(draft, draft.choose(lexicon.DEED_FRAMES).replace("DEED", verb).replace("OBJECT", thing))
    if form == 4:
        verb = "<liked>" if mood > 0 else "<disliked>"
        return _framed(draft, draft.choose(lexicon.OPINIONS).replace("VERB", verb))
    quantity, movement = _claim(dice, mood, negated=form == 1 or (form == 2 and dice.chance(0.15)))
    main = draft.choose(lexicon.CLAIMS).replace("<Q>", quantity).replace("<V>", movement)
    if form == 2:
        main = _contrast(draft, main, -mood if dice.chance(0.8) else mood)
    return _framed(draft, main)


def reaction(event: Event, dice: Dice) -> Sentence:
    draft = Draft(event, dice)
    return draft.add(draft.choose(lexicon.REACTIONS[event.mood])).done()


def maxim(event: Event, dice: Dice) -> Sentence:
    draft, mood = Draft(event, dice), dice.pick((1, -1))
    main = draft.choose(lexicon.MAXIMS[mood])
    quantity, movement = _claim(dice, mood, negated=dice.chance(0.4))
    return draft.add(main.replace("<Q>", quantity).replace("<V>", movement)).done()


def headline(event: Event, dice: Dice) -> Sentence:
    draft = Draft(event, dice)
    return draft.add(draft.choose(lexicon.HEADLINES[event.kind])).done(stop=False)


def desk(event: Event, dice: Dice) -> Sentence:
    draft = Draft(event, dice)
    return draft.add(draft.choose(lexicon.DESKS)).done()


def announcement(follow: str) -> Callable[[Event, Dice], Sentence]:
    """Announces the next story: about `{org2}` (follow="company"), or about the event's topic and kind ("beat")."""

    def make(event: Event, dice: Dice) -> Sentence:
        draft = Draft(event, dice)
        return draft.add(draft.choose(lexicon.ANNOUNCEMENTS[follow])).done()

    return make


def profile(entity_type: str, position: int) -> Callable[[Event, Dice], Sentence]:
    def make(event: Event, dice: Dice) -> Sentence:
        draft = Draft(event, dice)
        return draft.add(lexicon.PROFILES[entity_type][position]).done()

    return make


def _framed(draft: Draft, main: str) -> Sentence:
    """Adds a phrase before the statement in a quarter of the sentences, and after it in another quarter."""
    before, after = lexicon.SURROUNDINGS
    place = draft.dice.weighted((0.5, 0.25, 0.25))
    opener = draft.choose(before) if place == 1 else ""
    closer = draft.choose(after) if place == 2 else ""
    return draft.add(opener).add(main).add(closer).done()


def _claim(dice: Dice, mood: int, negated: bool) -> tuple[str, str]:
    """A quantity and a movement that together are good (1) or bad (−1) news; if negated, the opposite movement is."""
    boon = dice.chance(0.75)  # news mentions profits more often than costs
    quantity = "<boon>" if boon else "<bane>"
    upwards = (mood > 0) == boon
    if negated:
        return quantity, "<not_down>" if upwards else "<not_up>"
    adverb = "<adverb> " if dice.chance(0.4) else ""
    return quantity, adverb + ("<upped>" if upwards else "<downed>")


def _contrast(draft: Draft, main: str, aside_mood: int) -> str:
    quantity, movement = _claim(draft.dice, aside_mood, negated=False)
    aside = draft.choose(lexicon.ASIDES).replace("<Q>", quantity).replace("<V>", movement)
    return draft.choose(lexicon.CONTRASTS).replace("ASIDE", aside).replace("MAIN", main)
