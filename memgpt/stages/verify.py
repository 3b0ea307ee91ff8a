"""verify: check that a registered version loads and predicts, in a separate process with its own packaged code."""

from pathlib import Path

from memgpt import gate, registry, tracking
from memgpt.config import Config

WORK = Path(".memgpt/verify")


def run(config: Config, reference: str) -> str:
    """Let a version predict its example; returns its number. reference: as for `registry.resolve`; a bare model name
    means its champion.

    Raises:
        UserError: if there is no such version, or it does not load or predict.
    """
    tracking.use()
    client = tracking.client()
    model, version = registry.resolve(client, reference)
    champion = registry.aliases(client, model).get(registry.CHAMPION) == version
    hint = f"`memgpt rollback {model}` returns to the version before" if champion else "it is not the champion"
    gate.try_out(config, model, registry.uri(model, version), WORK / model, hint)
    return version
