"""verify: does a registered version load and predict, in a process of its own with its own packaged code?"""

from pathlib import Path

from memgpt import gate, registry, tracking
from memgpt.config import Config

WORK = Path(".memgpt/verify")


def run(config: Config, reference: str) -> str:
    """The version's number, once it has answered its example. reference: as `registry.parse` reads it; a bare model
    is its champion.

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
