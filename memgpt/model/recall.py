"""Recall: the token that followed the last few tokens when they last occurred in the same text.

This is an n-gram head (*In-Context Language Learning*, arXiv 2401.12973) as a look-up. The recalled token depends only
on token ids, so finding it needs no multiplications. A Transformer learns the same by attention ("induction heads"),
but only after far more text than a small one reads. Shape letters: B batch, T positions, D hidden size.
"""

import torch
from torch import nn

from memgpt.model import kernels
from memgpt.model.config import MemGPTConfig
from memgpt.model.memory import GatedMemory, NGramHash, with_positions_before


class LookBack(nn.Module):
    """Finds, for each position, the longest run of last tokens (up to `recall_length`) that occurred earlier in its
    document, at most `recall_window` tokens back, and the token that followed it. Of several, the nearest counts.

    Tokens are compared by their canonical ids. Padding and masks are never part of a run and are never recalled.
    """

    def __init__(self, config: MemGPTConfig):
        super().__init__()
        self.longest: int = config.recall_length or 0
        self.window = config.recall_window

    @property
    def context(self) -> int:
        """How many preceding tokens a token's result depends on."""
        return self.window + self.longest - 1

    def forward(
        self,
        ngram_hash: NGramHash,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        context_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Arguments as in `NGramHash` → recalled tokens [B, T], and the lengths [B, T] of their runs; 0: no recall."""
        length, device = input_ids.shape[1], input_ids.device
        given = 0 if context_ids is None else context_ids.shape[1]
        window: int = torch.sym_min(self.window, length + given)
        before = self.longest - 1  # tokens before the first position that its run may contain
        ids, canonical, blank = ngram_hash.with_context(input_ids, context_ids, window + before)
        leads_on = ~(blank | nn.functional.pad(blank[:, 1:], (0, 1), value=True))
        tokens, earlier = canonical.int().masked_fill(blank, -2), canonical.int().masked_fill(~leads_on, -1)
        positions = with_positions_before(position_ids, input_ids, context_ids, before)
        if kernels.serve(tokens, fuses=False):
            from memgpt.model.kernels import recall

            best = recall.longest_run(tokens, earlier, positions, window, self.longest)
        else:
            best = longest_run(tokens, earlier, positions, window, self.longest)
        at = torch.arange(length, device=device) + before + best % window + 1
        return ids.expand(at.shape[0], -1).gather(1, at), best // window


def longest_run(
    tokens: torch.Tensor, earlier: torch.Tensor, position_ids: torch.Tensor, window: int, longest: int
) -> torch.Tensor:
    """For each of the last T positions, the longest run, and of equally long ones the nearest, as one number:
    length · window + window − distance back, [B, T]. tokens, earlier [B, window + longest − 1 + T]: ids to compare;
    tokens is −2 at padding and masks, earlier −1 at these and before them. position_ids [B or 1, longest − 1 + T]."""
    length = position_ids.shape[1] - longest + 1
    place = torch.arange(position_ids.shape[1], device=tokens.device, dtype=torch.int32)[:, None]
    back = torch.arange(window, device=tokens.device, dtype=torch.int32)
    # same[b, t, i]: the token at t equals the one `window - i` before it, in the same document.
    same = earlier[:, place + back] == tokens[:, window:, None]
    same = same & (window - back <= position_ids[..., None])
    run, lengths = same[:, longest - 1 :], same[:, longest - 1 :].int()
    for step in range(1, longest):
        run = run & same[:, longest - 1 - step : longest - 1 - step + length]
        lengths = lengths + run
    return (lengths * window + back).amax(-1)


class RecallMemory(GatedMemory):
    """Adds to a token's hidden state a gated projection of the recalled token's embedding plus an embedding of the
    run's length. At first it adds nothing."""

    def __init__(self, config: MemGPTConfig):
        super().__init__(config, config.hidden_size, kernel=0)
        self.look_back = LookBack(config)
        self.run = nn.Embedding(self.look_back.longest + 1, config.hidden_size, padding_idx=0)
        self.eps = config.rms_norm_eps
        self.value._starts_silent = True  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, followed: torch.Tensor, lengths: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """hidden [B, T, D]; followed [B, T, D]: embeddings of the recalled tokens; lengths [B, T] of their runs → what
        to add to hidden."""
        return super().forward(hidden, self.entry(followed, lengths), position_ids)

    def entry(self, followed: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The input of the key and value projections, [B, T, D]; zero where nothing is recalled."""
        # Normalised, because embeddings start so small that learning would be slow.
        followed = nn.functional.rms_norm(followed, followed.shape[-1:], eps=self.eps)
        return followed * (lengths > 0)[..., None] + self.run(lengths)
