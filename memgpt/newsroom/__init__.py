"""The newsroom: a SYNTHETIC data set, generated from our own word lists and sentence patterns.

Nothing in it is real: no company, person, place, product, event or reader. It lets the whole pipeline run offline, and
it is hard enough that a broken stage shows; how well a model does on it says nothing about real text. See
`docs/newsroom.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def generate(scale: float = 1.0, seed: int = 7) -> dict[str, dict[str, pd.DataFrame]]:
    """Tables by source and split: `corpus`, `ner`, `sentiment`, `recommendation` (`items` and unsplit `interactions`).

    The same (scale, seed) gives the same bytes on every machine. Raises ValueError if `scale` is not larger than 0.
    """
    from memgpt.newsroom.tables import assemble

    return assemble(scale, seed).tables
