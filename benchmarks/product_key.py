"""Product-key memory (Lample et al. 2019, arXiv 1907.05242), with which the n-gram memory is compared.

It is here and not in the model because it was worse (see docs/decisions.md).
"""

import torch
from torch import nn


class ProductKeyMemory(nn.Module):
    """h [B, T, D] → a weighted sum of `top` of keys² learned values per head, [B, T, D]; replaces a feed-forward layer.
    The best pairs of keys are among the pairs of the best half keys, so 2 · keys products per head find them."""

    def __init__(self, width: int, keys: int = 128, heads: int = 4, top: int = 16):
        super().__init__()
        self.keys, self.heads, self.top = keys, heads, top
        self.query = nn.Linear(width, heads * width, bias=False)
        self.query_norm = nn.RMSNorm(width // 2)
        self.half_keys = nn.Parameter(torch.randn(heads, 2, keys, width // 2) * (width // 2) ** -0.5)
        self.table = nn.Embedding(keys * keys, width)
        nn.init.normal_(self.table.weight, std=0.02)
        self.table._memory_table = True  # type: ignore[assignment]  # the optimizer treats it as the n-gram table

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query = self.query_norm(self.query(hidden).unflatten(-1, (self.heads, 2, -1)))  # [B, T, H, 2, D/2]
        halves = torch.einsum("bthsd,hskd->bthsk", query, self.half_keys.to(query.dtype))
        best, which = halves.topk(self.top, dim=-1)
        pairs = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2)
        index = (which[..., 0, :, None] * self.keys + which[..., 1, None, :]).flatten(-2)
        score, chosen = pairs.topk(self.top, dim=-1)
        rows = self.look_up(index.gather(-1, chosen))
        return (score.softmax(-1)[..., None] * rows).sum((-3, -2)).to(hidden.dtype)

    @torch.compiler.disable
    def look_up(self, index: torch.Tensor) -> torch.Tensor:
        return self.table(index)
