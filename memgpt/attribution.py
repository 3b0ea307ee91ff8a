"""Why a prediction was made: how much each token and each memory entry contributed to its score.

Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) by captum, from a text of mask tokens, which reads
nothing from the memory, to the text itself. No gradient reaches the token ids that address the memory, so the outputs
of the memory layers are inputs of their own, varied together with the embeddings. The shares therefore add up to the
change of the score from masks to text (completeness), and a memory layer's share is that of the n-grams it read.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerIntegratedGradients
from torch import nn

from memgpt import predict
from memgpt.model.inspection import values
from memgpt.model.memory import KnowledgeMemory
from memgpt.model.word_votes import Features
from memgpt.predict.batching import encode
from memgpt.predict.words import encode_rows, split_words, windows

_BATCH = 16  # points of the integration path at once


@dataclass(frozen=True)
class Entry:
    """The n-gram `text` whose last token is at `position`. share: the contribution of its memory entry, all layers
    together; if recalled, of the token that followed the n-gram earlier, which `text` shows after an arrow."""

    text: str
    n: int
    position: int
    share: float
    recalled: bool = False


@dataclass(frozen=True)
class Attribution:
    """One prediction. score = start + sum of `shares` + sum of `memory`, up to `error`.

    tokens, shares: a text's tokens and the contribution of each, by its embedding and by the word votes that look at
    it. memory: the contribution of each entry of the knowledge memory and of each recalled token.
    score, start: the prediction's score for the text, and for the text of mask tokens, in `unit`.
    """

    answer: str
    unit: str
    score: float
    start: float
    tokens: list[str]
    shares: list[float]
    memory: list[Entry]

    @property
    def error(self) -> float:
        return self.score - self.start - sum(self.shares) - sum(entry.share for entry in self.memory)


def explain(task: str, directory: Path, texts: list[str], steps: int = 64) -> list[Attribution]:
    """Attributions of the predictions of a task's model in `directory`.

    ner: one per entity found; its score is the mean log-odds of its words being of its type. sentiment: one per text,
    of the log-odds of its label. recommendation: `texts` are a reader's history, oldest first, as texts or item ids
    (an id stands for its title); one per text, of the similarity to the first item offered, the other texts fixed.
    A text is truncated to the model's window; an entity is explained in the window with the most context around it.
    Of an ensemble the first member is explained.

    Raises:
        ValueError: for an empty text.
    """
    if not all(text.strip() for text in texts):
        raise ValueError("text: is empty; give at least one word")
    predictor: Any = predict.load(task, directory)
    predictor.model = getattr(predictor.model, "members", [predictor.model])[0]
    if task == "ner":
        return [each for text in texts for each in _ner(predictor, text, steps)]
    if task == "sentiment":
        return [_sentiment(predictor, text, steps) for text in texts]
    return _recommendation(predictor, texts, steps)


def _sentiment(predictor: Any, text: str, steps: int) -> Attribution:
    model = predictor.model
    [ids] = _encode(predictor, [text])
    answer = predictor.predict([text])[0]["label"]
    label = model.config.label2id[answer]

    def score(input_ids: torch.Tensor) -> torch.Tensor:
        return _log_odds(model(input_ids=input_ids).logits, [label])

    return _attribute(predictor, ids, score, steps, answer, "log-odds")


def _ner(predictor: Any, text: str, steps: int) -> list[Attribution]:
    model, places = predictor.model, split_words(text)
    (words,) = encode_rows(predictor.tokenizer, [[text[a:b] for a, b in places]])
    size, found = model.config.window, []
    ranges = windows([*map(len, words)], size)
    for entity in predictor.predict([text])[0]:
        inside = [i for i, (start, end) in enumerate(places) if entity["start"] <= start and end <= entity["end"]]
        # the window with the most context around it, as in prediction
        first, last = max(ranges, key=lambda shown: min(inside[0] - shown[0], shown[1] - 1 - inside[-1]))
        ids = [*chain.from_iterable(words[first:last])][:size]
        firsts = [sum(map(len, words[first:i])) for i in inside if first <= i < last]
        firsts = [place for place in firsts if place < len(ids)]
        tags = [model.config.label2id[f"{mark}-{entity['type']}"] for mark in "BI"]

        def score(input_ids: torch.Tensor, firsts: list[int] = firsts, tags: list[int] = tags) -> torch.Tensor:
            return _log_odds(model(input_ids=input_ids).logits[:, firsts], tags).mean(1)

        found.append(_attribute(predictor, ids, score, steps, f"{entity['text']}: {entity['type']}", "log-odds"))
    return found


def _recommendation(predictor: Any, history: list[str], steps: int) -> list[Attribution]:
    """How the texts read support the first item offered; the ranking's other signals have no tokens."""
    model = predictor.model
    best = predictor.predict([{"history": history, "k": 1}])[0]
    if not best:
        return []
    index, place_of = predictor.index, predictor.place
    target = index.vectors[place_of[best[0]["item_id"]]]
    texts = [index.titles[place_of[item]] if item in place_of else item for item in history]
    texts = texts[-model.config.max_history :]
    rows = _encode(predictor, texts)
    with torch.no_grad():
        vectors = torch.cat([model.encode_item(torch.tensor([ids])) for ids in rows])
    found = []
    for place, ids in enumerate(rows):

        def score(input_ids: torch.Tensor, place: int = place) -> torch.Tensor:
            read = vectors.expand(len(input_ids), -1, -1).clone()
            read[:, place] = model.encode_item(input_ids)
            return model.head.encode_reader(read)[:, -1] @ target

        found.append(_attribute(predictor, ids, score, steps, best[0]["title"], "similarity"))
    return found


def _encode(predictor: Any, texts: list[str]) -> list[list[int]]:
    return encode(predictor.tokenizer, texts, predictor.model.config.window)


def _log_odds(logits: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """log(p / (1 - p)) of being one of the labels, [..., L] → [...]: unlike p it does not saturate."""
    others = [label for label in range(logits.shape[-1]) if label not in labels]
    return logits[..., labels].logsumexp(-1) - logits[..., others].logsumexp(-1)


def _attribute(
    predictor: Any,
    ids: list[int],
    score: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
    answer: str,
    unit: str,
) -> Attribution:
    """score: input_ids [B, T] → [B]."""
    model, tokenizer = predictor.model, predictor.tokenizer
    backbone, config = model.model, model.config
    blank = config.pad_token_id if config.mask_token_id is None else config.mask_token_id
    text = torch.tensor([ids], device=model.device)
    masks = torch.full_like(text, blank)
    memories = [layer.memory for layer in backbone.layers if layer.memory is not None]
    votes = getattr(model, "word_votes", None)
    more = [module for module in (backbone.recall, None if votes is None else votes.table) if module is not None]
    layers = [backbone.embed_tokens, *memories, *more]
    heard: dict[nn.Module, tuple[Any, ...]] = {}
    with torch.no_grad():
        start = score(masks).item()
        hooks = [layer.register_forward_hook(lambda m, i, o: heard.__setitem__(m, (*i, o))) for layer in layers]
        try:
            end = score(text).item()
        finally:
            for hook in hooks:
                hook.remove()
    # Mean gradients along the path: the share of any part of an input is its product with these.
    with warnings.catch_warnings():  # captum warns that layers may depend on each other, which is intended here
        warnings.filterwarnings("ignore", message="Multiple layers provided")
        gradients = LayerIntegratedGradients(score, layers, multiply_by_inputs=False).attribute(
            text, baselines=masks, n_steps=steps, internal_batch_size=min(_BATCH, steps)
        )
    slope = dict(zip(layers, gradients, strict=True))
    with torch.no_grad():
        embedded = heard[backbone.embed_tokens][-1] - backbone.embed_tokens(masks)
        shares = (embedded * slope[backbone.embed_tokens])[0].sum(-1)
        if votes is not None:
            blank_votes = votes.table(votes.addresses(masks, backbone.ngram_hash.canonical_ids))
            moved = ((heard[votes.table][-1] - blank_votes) * slope[votes.table])[0].sum(-1)
            shares = shares + _looked_at(votes.words(text)[0], votes.features, moved)
        entries: dict[tuple[int, int], float] = defaultdict(float)
        for layer in memories:
            for n, moved in _entries(layer, backbone.ngram_hash, heard[layer], slope[layer]):
                for place, share in enumerate(moved.tolist()):
                    if place >= n - 1:
                        entries[place, n] += share
    memory = [
        Entry(tokenizer.decode(ids[place - n + 1 : place + 1]).strip(), n, place, share)
        for (place, n), share in sorted(entries.items())
    ]
    if backbone.recall is not None:
        with torch.no_grad():
            tokens, lengths = backbone.recall.look_back(backbone.ngram_hash, text, torch.arange(len(ids))[None])
            moved = (heard[backbone.recall][-1] * slope[backbone.recall])[0].sum(-1)
        for place in lengths[0].nonzero()[:, 0].tolist():
            n = int(lengths[0, place])
            run = tokenizer.decode(ids[place - n + 1 : place + 1]).strip()
            shown = f"{run} → {tokenizer.decode(tokens[0, place]).strip()}"
            memory.append(Entry(shown, n, place, float(moved[place]), recalled=True))
    return Attribution(answer, unit, end, start, _shown(tokenizer, ids), shares.tolist(), memory)


def _shown(tokenizer: Any, ids: list[int]) -> list[str]:
    """Each token's text. If a character takes several tokens, the first shows it and the others are empty."""
    shown, first = [""] * len(ids), 0
    for place in range(len(ids)):
        text = tokenizer.decode(ids[first : place + 1])
        if "\ufffd" not in text or place - first == 3:  # no character has more bytes
            shown[first], first = text, place + 1
    if first < len(ids):  # the text was cut within a character
        shown[first] = tokenizer.decode(ids[first:])
    return shown


def _looked_at(words: torch.Tensor, features: Features, moved: torch.Tensor) -> torch.Tensor:
    """words [T]: the word of each token; moved [T, F]: contribution of the votes for each token → [T]: of the votes
    that look at each word, at its first token. A vote that looks at several words is divided equally among them; one
    that looks beyond the edges counts for the nearest word."""
    last = int(words[-1])
    of_word = moved.new_zeros(last + 1)
    for feature, votes in zip(features, moved.T, strict=True):
        for _, distance in feature:
            of_word.index_add_(0, (words + distance).clamp(0, last), votes / len(feature))
    first = torch.diff(words, prepend=words[:1] - 1) > 0
    return torch.zeros_like(moved[:, 0]).masked_scatter(first, of_word)


def _entries(
    memory: KnowledgeMemory, ngram_hash: Any, heard: tuple[torch.Tensor, ...], slope: torch.Tensor
) -> list[tuple[int, torch.Tensor]]:
    """n → contribution of the n-gram ending at each position [T], including what the convolution carries on to later
    positions. Gate and convolution are linear in the values read, so an entry's share is exact."""
    hidden, entry, position_ids, _ = heard
    gate = memory.gate(hidden, entry[:, ngram_hash.lead :])
    pull = gate * slope  # gradient of the convolved values, [1, T, D]
    felt = pull.clone()
    for back in range(1, min(memory.lead, felt.shape[1] - 1) + 1):
        reached = pull * memory.taps[back - 1] * (position_ids >= back)[..., None]
        felt[:, : felt.shape[1] - back] += reached[:, back:]
    return [(n, (part[0, ngram_hash.lead :] * felt[0]).sum(-1)) for n, part in values(memory, entry, ngram_hash.ngrams)]
