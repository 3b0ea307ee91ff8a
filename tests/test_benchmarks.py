"""The benchmark of the core is ready to run: its recipe is one of today's, and its comparison is fair."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import cells
import core
import peers


def test_its_recipe_and_every_change_of_it_are_valid() -> None:
    planned = [*core.plan(quick=True), *core.plan(quick=False), *core.ablations()]
    for _, spec in planned:
        if "tokens" in spec:
            assert cells.recipe(tokens=spec["tokens"], **spec.get("recipe", {})).tokens == spec["tokens"]
    with pytest.raises(ValueError, match="no_such_key"):
        cells.recipe(no_such_key=1)


def test_every_cell_that_starts_from_another_finds_it_in_the_plan() -> None:
    for quick in (True, False):
        names = [name for name, _ in core.plan(quick)]
        assert len(names) == len(set(names))
        for place, (_, spec) in enumerate(core.plan(quick)):
            assert "start" not in spec or spec["start"] in names[:place]


@pytest.mark.parametrize("width", core.WIDTHS)
def test_equal_cost_means_no_more_multiply_adds_than_the_peer(width: int) -> None:
    ours, peer = (peers.multiply_adds(model) for model in (peers.memgpt(width, rows=64), peers.llama(width)))
    assert 0.96 * peer < ours <= peer
