"""The newsroom: a SYNTHETIC data set, generated from the word lists and sentence patterns in this package.

Nothing in it is real: no company, person, place, product, event or reader. It lets the whole pipeline run offline and
is hard enough to reveal a broken stage. Scores on it say nothing about real text. See `docs/newsroom.md`.
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
