"""The tasks' heads and models: token and text classification, recommendation, and all of them on one trunk.

Shape letters as in model.py; L labels, N items, H items of a user's history, P width of the two towers' vectors.
"""

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import TransformersKwargs, can_return_tuple

from memgpt.model.config import MemGPTConfig
from memgpt.model.memory import hide
from memgpt.model.model import Block, MemGPTModel, MemGPTPreTrainedModel, RotaryEmbedding
from memgpt.model.word_votes import TextVotes, TokenVotes


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, items: torch.Tensor | int | None = None) -> torch.Tensor:
    """Sum over the labels, divided by their number or by `items`, that of a whole step (num_items_in_batch)."""
    return fixed_cross_entropy(logits.float().flatten(0, -2), labels.flatten(), items)


def _topic_loss(logits: torch.Tensor, labels: torch.Tensor, items: torch.Tensor | int | None) -> torch.Tensor:
    """Divides by all texts of a step, including those without a topic, so that a batch may lack topics entirely."""
    return _cross_entropy(logits, labels, len(labels) if items is None else items)


def _by_position(attention_mask: object) -> torch.Tensor:
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        raise ValueError("attention_mask: to pool a text takes one of [texts, tokens], of no other form")
    return attention_mask


def mean_pool(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of hidden [B, T, D] over the positions that attention_mask [B, T] keeps → [B, D]."""
    if attention_mask is None:
        return hidden.mean(dim=1)
    weights = _by_position(attention_mask)[..., None].to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class TokenClassificationHead(nn.Module):
    """A label per token: hidden [B, T, D] → logits [B, T, L]."""

    def __init__(self, config: MemGPTConfig, num_labels: int):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(config.hidden_size, num_labels)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.score(self.dropout(hidden))


class SequenceClassificationHead(nn.Module):
    """A label per text, and a topic if `config.topics` names any: hidden [B, T, D] → logits [B, L] and [B, topics].

    Both use the maximum over positions, so that one decisive position ("failed to", "narrowed") counts however long
    the text is.
    """

    def __init__(self, config: MemGPTConfig, num_labels: int):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(config.hidden_size, num_labels)
        self.topic = nn.Linear(config.hidden_size, len(config.topics)) if config.topics else None

    def forward(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if attention_mask is not None:
            shown = _by_position(attention_mask)[:, -hidden.shape[1] :, None]  # drops a prefix before the text
            shown = shown.bool() | ~shown.bool().any(1, keepdim=True)  # for an empty text, its padding
            hidden = hidden.masked_fill(~shown, torch.finfo(hidden.dtype).min)
        pooled = self.dropout(hidden.amax(dim=1))
        return self.score(pooled), None if self.topic is None else self.topic(pooled)


class InterestHead(nn.Module):
    """Two towers over one trunk: an item's text → vector; the vectors of a user's latest items → vector.

    Their dot product, divided by `similarity_temperature`, is the logit that the user chooses the item next.
    """

    def __init__(self, config: MemGPTConfig):
        super().__init__()
        self.item = nn.Linear(config.hidden_size, config.pooled_size)
        self.history_in = nn.Linear(config.pooled_size, config.hidden_size)
        self.history = Block(config, layer_idx=0, memory=False)
        self.history_out = nn.Linear(config.hidden_size, config.pooled_size)
        self.rotary_emb = RotaryEmbedding(config)
        self.temperature = config.similarity_temperature

    def encode_item(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """hidden [B, T, D] of items' texts → unit vectors [B, P]."""
        return nn.functional.normalize(self.item(mean_pool(hidden, attention_mask)), dim=-1)

    def encode_reader(self, items: torch.Tensor) -> torch.Tensor:
        """Vectors [B, H, P] of the items read, oldest first → the user's interest after each of them [B, H, P].

        Attention is causal, so trailing padding does not affect earlier positions.
        """
        hidden = self.history_in(items)
        positions = torch.arange(items.shape[1], device=items.device)[None]
        mask = create_causal_mask(
            config=self.history.attention.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
        )
        hidden = self.history(hidden, rotation=self.rotary_emb(hidden, positions), attention_mask=mask, is_causal=True)
        return nn.functional.normalize(self.history_out(hidden) + items, dim=-1)

    def loss(
        self,
        items: torch.Tensor,
        history: torch.Tensor,
        targets: torch.Tensor,
        log_frequency: torch.Tensor,
        items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Softmax over the batch's items, with the popularity correction of sampled softmax (log Q; Yi et al. 2019).

        items [N, P]; history [B, H]: indices into items, oldest first; targets [B, H]: index of the next item or −100;
        log_frequency [N]: log of how often each item is a target. It is subtracted because popular items are negatives
        in most batches, which would lower their scores.
        """
        interest = self.encode_reader(items[history])
        logits = interest @ items.T / self.temperature - log_frequency
        # Items already read are never recommended again, so they do not compete, unless they are the target. Histories
        # from `memgpt.tables` repeat no items, but with others a masked target would make the loss infinite.
        seen = torch.zeros_like(logits).scatter_add(
            -1, history[:, None, :].expand(-1, history.shape[1], -1), _causal_ones(history).to(logits.dtype)
        )
        target_seen = seen.gather(-1, targets.clamp(min=0)[..., None]) > 0
        logits = logits.masked_fill((seen > 0) & ~target_seen, torch.finfo(logits.dtype).min)
        return _cross_entropy(logits, targets, items_in_batch)


def _causal_ones(history: torch.Tensor) -> torch.Tensor:
    """[B, H, H]: 1 where the second position is not after the first."""
    length = history.shape[1]
    return torch.ones(length, length, device=history.device).tril().expand(history.shape[0], -1, -1)


class MemGPTForTokenClassification(MemGPTPreTrainedModel):
    """A label per token (named entities), from the bidirectional trunk and a head. With `config.word_vote_rows`, the
    votes of the words around it are added."""

    def __init__(self, config: MemGPTConfig):
        super().__init__(config)
        self.model = MemGPTModel(config)
        self.head = TokenClassificationHead(config, config.num_labels)
        self.word_votes = TokenVotes(config) if config.word_vote_rows else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        attention_mode: str = "bidirectional",
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> TokenClassifierOutput:
        """labels [B, T], −100 for tokens without one. past_key_values: the prefix of peft's prefix tuning."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            attention_mode=attention_mode,
            **kwargs,
        )
        logits = self.head(outputs.last_hidden_state)
        if self.word_votes is not None and input_ids is not None and not self.training:
            shown = hide(input_ids, attention_mask, self.word_votes.pad)
            packed = kwargs.get("position_ids") if attention_mask is None else None
            votes = self.word_votes(shown, self.model.ngram_hash.canonical_ids, packed)
            logits = logits + self.config.word_vote_weight * votes
        loss = None if labels is None else _cross_entropy(logits, labels, kwargs.get("num_items_in_batch"))
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@dataclass
class TextClassifierOutput(SequenceClassifierOutput):
    """topic_logits: [B, topics] if the model has topics."""

    topic_logits: torch.Tensor | None = None


class MemGPTForSequenceClassification(MemGPTPreTrainedModel):
    """A label per text (sentiment), and its topic if `config.topics` names any. With `config.word_vote_rows`, the votes
    of the text's words are added."""

    def __init__(self, config: MemGPTConfig):
        super().__init__(config)
        self.model = MemGPTModel(config)
        self.head = SequenceClassificationHead(config, config.num_labels)
        self.word_votes = TextVotes(config) if config.word_vote_rows else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        sample_weights: torch.Tensor | None = None,
        topics: torch.Tensor | None = None,
        attention_mode: str = "bidirectional",
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> TextClassifierOutput:
        """labels [B], or [B, L] depending on `config.problem_type`; sample_weights [B]: weights of the texts' losses,
        for labels [B]; topics [B], −100 where unknown."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            attention_mode=attention_mode,
            **kwargs,
        )
        logits, topic_logits = self.head(outputs.last_hidden_state, attention_mask)
        if self.word_votes is not None and input_ids is not None and not self.training:
            shown = hide(input_ids, attention_mask, self.word_votes.pad)
            votes = self.word_votes(shown, self.model.ngram_hash.canonical_ids)
            logits = logits + self.config.word_vote_weight * votes
        loss, items = None, kwargs.get("num_items_in_batch")
        if labels is not None and sample_weights is not None:
            losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
            loss = (losses * sample_weights).sum() / (len(labels) if items is None else items)
        elif labels is not None:
            loss = self.loss_function(
                logits=logits, pooled_logits=logits.float(), labels=labels, config=self.config, **kwargs
            )
            if items is not None and self.config.problem_type in ("regression", "multi_label_classification"):
                loss = loss * labels.numel() / items  # transformers averages these over the batch and ignores `items`
        if loss is not None and topic_logits is not None and topics is not None:
            loss = loss + _topic_loss(topic_logits, topics, items)
        return TextClassifierOutput(
            loss=loss,
            logits=logits,
            topic_logits=topic_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MemGPTForRecommendation(MemGPTPreTrainedModel):
    """Scores items for a user by their texts."""

    def __init__(self, config: MemGPTConfig):
        super().__init__(config)
        self.model = MemGPTModel(config)
        self.head = InterestHead(config)
        self.post_init()

    def encode_item(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Texts of items [N, T] → unit vectors [N, P]."""
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, attention_mode="bidirectional")
        return self.head.encode_item(outputs.last_hidden_state, attention_mask)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        log_frequency: torch.Tensor | None = None,
        attention_mode: str = "bidirectional",
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> SequenceClassifierOutput:
        """input_ids [N, T]: the items of the batch; history, labels [B, H] and log_frequency [N] as in
        `InterestHead.loss`. logits: item vectors [N, P]."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            attention_mode=attention_mode,
            **kwargs,
        )
        items = self.head.encode_item(outputs.last_hidden_state, attention_mask)
        loss = None
        if history is not None and labels is not None and log_frequency is not None:
            loss = self.head.loss(items, history, labels, log_frequency, kwargs.get("num_items_in_batch"))
        return SequenceClassifierOutput(
            loss=loss, logits=items, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MemGPTForMultiTask(MemGPTPreTrainedModel):
    """Several tasks on one trunk; `task` chooses the head. `config.task_labels` gives each task's labels."""

    def __init__(self, config: MemGPTConfig):
        super().__init__(config)
        labels = config.task_labels or {}
        self.model = MemGPTModel(config)
        self.heads = nn.ModuleDict(
            {
                "ner": TokenClassificationHead(config, len(labels.get("ner", ("O",)))),
                "sentiment": SequenceClassificationHead(config, len(labels.get("sentiment", ("neutral",)))),
                "recommendation": InterestHead(config),
            }
        )
        if config.task_balancing:
            self.log_variance = nn.Parameter(torch.zeros(len(self.heads)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.task_balancing:  # loading a core leaves this parameter uninitialised
            init.zeros_(self.log_variance)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        topics: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        log_frequency: torch.Tensor | None = None,
        attention_mode: str = "bidirectional",
        *,
        task: str,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> SequenceClassifierOutput:
        """A batch of one task; arguments as in the task's own class."""
        if task not in self.heads:
            raise ValueError(f"task={task!r}: expected one of {', '.join(self.heads)}")
        head, items = self.heads[task], kwargs.get("num_items_in_batch")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            attention_mode=attention_mode,
            **kwargs,
        )
        loss = None
        if isinstance(head, InterestHead):
            logits = head.encode_item(outputs.last_hidden_state, attention_mask)
            if history is not None and labels is not None and log_frequency is not None:
                loss = head.loss(logits, history, labels, log_frequency, items)
        elif isinstance(head, SequenceClassificationHead):
            logits, topic_logits = head(outputs.last_hidden_state, attention_mask)
            loss = None if labels is None else _cross_entropy(logits, labels, items)
            if loss is not None and topic_logits is not None and topics is not None:
                loss = loss + _topic_loss(topic_logits, topics, items)
        else:
            logits = head(outputs.last_hidden_state)
            loss = None if labels is None else _cross_entropy(logits, labels, items)
        if loss is not None and self.training and self.config.task_balancing:
            # L / σ² + log σ with a learned σ for each task (Kendall et al. 2018, arXiv 1705.07115, equation 10).
            log_variance = self.log_variance[list(self.heads).index(task)]
            loss = loss * torch.exp(-log_variance) + log_variance / 2
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
