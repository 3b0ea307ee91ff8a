"""Word votes: a hash table with weights of words for labels, learned from which words were seen with which label.

The words around a token vote for its label, the words and word pairs of a text for the text's. The deep model
generalises; such a table memorises, which needs few examples. Their logits are added, as in *Wide & Deep Learning*
(arXiv 1606.07792), with hashed features (Weinberger et al. 2009, arXiv 0902.2206). A token's features are of the kind
used in conditional random fields. Addresses depend only on token ids, as in the knowledge memory.

The votes are a linear model that is fitted separately (`memgpt.tasks.votes`); training does not change them. Shape
letters: B batch, T positions, L labels, F features of a word.
"""

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from memgpt.model.config import MemGPTConfig

# A feature: one or more pairs of a view and the word's distance from the token's own word.
Features = tuple[tuple[tuple[str, int], ...], ...]
TEXT_FEATURES: Features = ((("word", 0),), (("word", 0), ("word", 1)))
TOKEN_FEATURES: Features = (
    *(((view, 0),) for view in ("exact", "word", "first", "last", "shape")),
    *(((view, distance),) for distance in (-2, -1, 1, 2) for view in ("word", "last", "shape")),
    (("word", -1), ("word", 0)),
    (("word", 0), ("word", 1)),
    (("word", -1), ("shape", 0)),
    (("shape", 0), ("word", 1)),
    (("shape", -1), ("shape", 0)),
    (("shape", 0), ("shape", 1)),
    (("shape", -1), ("shape", 0), ("shape", 1)),
)
_KINDS = ("blank", "digits", "with digits", "marks", "small", "capitals", "capital", "capitalised", "mixed")
_STARTS = 16  # added to the kind of a token that begins with a space
_FACTOR = -0x61C8864680B583EB  # 2^64 divided by the golden ratio, as a signed number; products wrap


def spelling(tokenizer: PreTrainedTokenizerFast, size: int) -> torch.Tensor:
    """For each token id, its spelling (an index of `_KINDS`, plus `_STARTS` after a space): int64 [size]."""
    ids = range(min(size, len(tokenizer)))
    texts = [tokenizer.backend_tokenizer.decode([i], skip_special_tokens=False).strip() for i in ids]
    spaced = [piece.startswith(("Ġ", "▁")) for piece in tokenizer.convert_ids_to_tokens(ids)]
    found = [_kind(text) + _STARTS * space for text, space in zip(texts, spaced, strict=True)]
    return torch.tensor(found + [0] * (size - len(found)))


def _kind(text: str) -> int:
    if not text:
        name = "blank"
    elif text.isdigit():
        name = "digits"
    elif any(sign.isdigit() for sign in text):
        name = "with digits"
    elif not any(sign.isalpha() for sign in text):
        name = "marks"
    elif text.islower():
        name = "small"
    elif text.isupper():
        name = "capitals" if len(text) > 1 else "capital"
    else:
        name = "capitalised" if text[0].isupper() else "mixed"
    return _KINDS.index(name)


class VoteTable(nn.Module):
    """rows [...] → their votes [..., L]; row 0 has none. The weight is a buffer, because loading would make a frozen
    parameter trainable again."""

    def __init__(self, rows: int, labels: int):
        super().__init__()
        self.weight = nn.Buffer(torch.zeros(rows, labels))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.weight[rows]


class WordTable(nn.Module):
    """A table with a row of votes, one per label, for each feature of a word; and a bias per label.

    A word begins with a space, as in the input from `memgpt.predict`. Its views: exact (its tokens), word (their
    canonical ids), first, last (of these; last only if there are several), shape (kinds of its first three tokens).
    """

    features: Features

    def __init__(self, config: MemGPTConfig):
        super().__init__()
        self.rows = config.word_vote_rows
        self.pad = -1 if config.pad_token_id is None else config.pad_token_id
        self.table = VoteTable(1 + self.rows, config.num_labels)
        self.bias = nn.Buffer(torch.zeros(config.num_labels))
        self.spelling = nn.Buffer(torch.zeros(config.vocab_size, dtype=torch.long))

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """The value of each feature of a token or a text: rows [..., F] → [..., F]."""
        return (rows > 0).float()

    def words(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, T]: the number of a token's word in its row, from 0. Each padding token is a word of its own."""
        starts, blank = self.spelling[input_ids] >= _STARTS, input_ids == self.pad
        starts[:, 0] = True
        starts[:, 1:] |= blank[:, :-1]
        return (starts | blank).cumsum(1) - 1

    def addresses(
        self, input_ids: torch.Tensor, canonical_ids: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows [B, T, F] of the table; 0 for padding. position_ids [B or 1, T]: restart at 0 with each packed document,
        where a new word also starts. Words of other documents count as absent."""
        input_ids = input_ids.long()  # a hash of fewer bits would select another row
        word, blank = self.words(input_ids), input_ids == self.pad
        starts = torch.diff(word, dim=1, prepend=torch.full_like(word[:, :1], -1)) > 0
        document = None  # [B, words]: the document of each word
        if position_ids is not None:
            first = (position_ids == 0).expand_as(input_ids)
            starts = starts | first
            word = starts.cumsum(1) - 1
            document = torch.zeros_like(word).scatter(1, word, 1 + first.cumsum(1))
        ends = torch.diff(word, dim=1, append=torch.full_like(word[:, :1], word.shape[1])) > 0
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        place = position - torch.where(starts, position, 0).cummax(1).values  # a token's place in its word
        folded, kind = canonical_ids[input_ids], self.spelling[input_ids] % _STARTS

        def of_words(parts: torch.Tensor, where: torch.Tensor | bool = True) -> torch.Tensor:
            """Sums over each word's tokens the parts [B, T] for which `where` is true: [B, words], 0 for padding."""
            return torch.zeros_like(parts).scatter_add(1, word, parts * (~blank & where))

        views = {
            "exact": of_words(_mix(input_ids, place)),
            "word": of_words(_mix(folded, place)),
            "first": of_words(folded + 1, starts),
            "last": of_words(folded + 1, ends & ~starts),
            "shape": of_words(_mix(kind, place), place < 3),
        }
        rows = []
        for number, feature in enumerate(self.features):
            mixed = torch.full_like(input_ids, number)
            for view, distance in feature:
                found = _shift(views[view], distance)
                if document is not None:
                    found = found * (_shift(document, distance) == document)
                mixed = _mix(mixed, found)
            rows.append(1 + (mixed >> 20) % self.rows)
        of_tokens = torch.stack(rows, dim=-1).gather(1, word[..., None].expand(-1, -1, len(rows)))
        return of_tokens.masked_fill(blank[..., None], 0)


class TokenVotes(WordTable):
    """Token ids → the votes of the words at and around each token for its label."""

    features = TOKEN_FEATURES

    def forward(
        self, input_ids: torch.Tensor, canonical_ids: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """input_ids [B, T], canonical_ids [V] → votes [B, T, L]. position_ids [B or 1, T]: restart at 0 with each
        packed document; words of other documents do not vote."""
        return self.table(self.addresses(input_ids, canonical_ids, position_ids)).sum(-2) + self.bias


class TextVotes(WordTable):
    """Token ids → the votes of the words and word pairs of a text for its label. Each counts once, weighted by its idf
    value; the vector of these is normalised to length 1. Punctuation marks are words of their own."""

    features = TEXT_FEATURES

    def __init__(self, config: MemGPTConfig):
        super().__init__(config)
        self.idf = nn.Buffer(torch.zeros(1 + self.rows))

    def forward(self, input_ids: torch.Tensor, canonical_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [B, T], canonical_ids [V] → votes [B, L]."""
        rows = self.addresses(input_ids, canonical_ids)
        values = self.values(rows.flatten(1)).view_as(rows)
        return (self.table(rows) * values[..., None]).sum((1, 2)) + self.bias

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """The idf value of each feature, divided by the length of the text's vector."""
        idf = self.idf[rows]
        return idf / idf.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-6)

    def count(self, texts: list[torch.Tensor]) -> None:
        """Set the idf values from addresses [N, F] of all texts."""
        having = torch.zeros(len(self.idf))
        for text in (text for rows in texts for text in rows):
            having[text.unique()] += 1
        having[0] = 0
        known = having.nonzero()[:, 0]
        self.idf[known] = torch.log((1 + sum(map(len, texts))) / (1 + having[known])) + 1

    def words(self, input_ids: torch.Tensor) -> torch.Tensor:
        alone = (self.spelling[input_ids] % _STARTS == _KINDS.index("marks")) | (input_ids == self.pad)
        starts = (self.spelling[input_ids] >= _STARTS) | alone
        starts[:, 1:] |= alone[:, :-1]
        starts[:, 0] = True
        return starts.cumsum(1) - 1

    def addresses(  # type: ignore[override]  # one text a row
        self, input_ids: torch.Tensor, canonical_ids: torch.Tensor
    ) -> torch.Tensor:
        """Rows [B, T, F] of the table, each only at its first occurrence in its text; 0 elsewhere and for padding."""
        rows = super().addresses(input_ids, canonical_ids)
        found, order = rows.flatten(1).sort(dim=1, stable=True)
        first = torch.diff(found, dim=1, prepend=torch.zeros_like(found[:, :1])) > 0
        return torch.zeros_like(found).scatter(1, order, found * first).view_as(rows)


def _mix(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """An elementwise hash of two numbers that depends on their order."""
    mixed = ((first + 1) * _FACTOR ^ (second + 1)) * _FACTOR
    return mixed ^ (mixed >> 29)


def _shift(words: torch.Tensor, distance: int) -> torch.Tensor:
    """words [B, W] → at each place the word `distance` places later; 0 beyond the edges."""
    if distance < 0:
        return nn.functional.pad(words, (-distance, 0))[:, :distance]
    return nn.functional.pad(words, (0, distance))[:, distance:]
