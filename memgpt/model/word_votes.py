"""Tables, addressed by words, in which labels have votes: which words were seen with which label.

A token's label has the votes of the words around it, a text's label those of its words and word pairs. The deep model
generalises; such a table remembers, and needs few examples for it. Their logits are added up, as in *Wide & Deep
Learning* (arXiv 1606.07792), with hashed features (Weinberger et al. 2009, arXiv 0902.2206): of a token, the kind that
a conditional random field is given. Addresses depend on token ids alone, as those of the knowledge memory do.

The votes are a linear model, fitted by itself (`memgpt.tasks.votes`); training leaves them alone. Shape letters: B
batch, T positions, L labels, F features of a word.
"""

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from memgpt.model.config import MemGPTConfig

# A feature: the views of one or more words, each at a distance from the token's own.
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
_FACTOR = -0x61C8864680B583EB  # 2^64 over the golden ratio, signed; products wrap


def spelling(tokenizer: PreTrainedTokenizerFast, size: int) -> torch.Tensor:
    """For each token id, how it is spelt (an index of `_KINDS`, plus `_STARTS` after a space): int64 [size]."""
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
    """rows [...] → their votes [..., L]; row 0 is silent. Its weight is a buffer, since a frozen parameter that was
    loaded is trainable again."""

    def __init__(self, rows: int, labels: int):
        super().__init__()
        self.weight = nn.Buffer(torch.zeros(rows, labels))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.weight[rows]


class WordTable(nn.Module):
    """A row for each feature of a word, in which the labels have their votes; each label's bias.

    A word begins with a space, as `memgpt.predict` gives them. Its views: exact (its tokens), word (their canonical
    ids), first and last (of them, if there are several), shape (kinds of its first three).
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
        """What each feature of a token or a text counts: rows [..., F] → [..., F]."""
        return (rows > 0).float()

    def words(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, T]: which word of its row a token is in, from 0. A padding token is one by itself."""
        starts, blank = self.spelling[input_ids] >= _STARTS, input_ids == self.pad
        starts[:, 0] = True
        starts[:, 1:] |= blank[:, :-1]
        return (starts | blank).cumsum(1) - 1

    def addresses(
        self, input_ids: torch.Tensor, canonical_ids: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows [B, T, F] of the table; 0 for padding. position_ids [B or 1, T]: of packed documents, where they start
        again at 0, and so do words; those of another document are none."""
        input_ids = input_ids.long()  # what is mixed from fewer bits is another row
        word, blank = self.words(input_ids), input_ids == self.pad
        starts = torch.diff(word, dim=1, prepend=torch.full_like(word[:, :1], -1)) > 0
        document = None  # of a word
        if position_ids is not None:
            first = (position_ids == 0).expand_as(input_ids)
            starts = starts | first
            word = starts.cumsum(1) - 1
            document = torch.zeros_like(word).scatter(1, word, 1 + first.cumsum(1))
        ends = torch.diff(word, dim=1, append=torch.full_like(word[:, :1], word.shape[1])) > 0
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        place = position - torch.where(starts, position, 0).cummax(1).values  # of a token in its word
        folded, kind = canonical_ids[input_ids], self.spelling[input_ids] % _STARTS

        def of_words(parts: torch.Tensor, where: torch.Tensor | bool = True) -> torch.Tensor:
            """The sum of a word's parts [B, T] that are `where`: [B, words], 0 for padding."""
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
    """Token ids → what the words at and around each token say of its label."""

    features = TOKEN_FEATURES

    def forward(
        self, input_ids: torch.Tensor, canonical_ids: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """input_ids [B, T], canonical_ids [V] → votes [B, T, L]. position_ids [B or 1, T]: of packed documents, where
        they start again at 0; words of another document do not vote."""
        return self.table(self.addresses(input_ids, canonical_ids, position_ids)).sum(-2) + self.bias


class TextVotes(WordTable):
    """Token ids → what the words and word pairs of a text say of its label, by their idf values, each counted once, as
    a vector of length 1. Punctuation marks are words of their own."""

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
        """The idf of each, over the length of the text's vector."""
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
        """Rows [B, T, F] of the table, each where it is first read in its text; 0 elsewhere and for padding."""
        rows = super().addresses(input_ids, canonical_ids)
        found, order = rows.flatten(1).sort(dim=1, stable=True)
        first = torch.diff(found, dim=1, prepend=torch.zeros_like(found[:, :1])) > 0
        return torch.zeros_like(found).scatter(1, order, found * first).view_as(rows)


def _mix(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """A hash of two numbers each, in which their order counts."""
    mixed = ((first + 1) * _FACTOR ^ (second + 1)) * _FACTOR
    return mixed ^ (mixed >> 29)


def _shift(words: torch.Tensor, distance: int) -> torch.Tensor:
    """words [B, W] → at each place the word `distance` further on; 0 beyond the edges."""
    if distance < 0:
        return nn.functional.pad(words, (-distance, 0))[:, :distance]
    return nn.functional.pad(words, (0, distance))[:, distance:]
