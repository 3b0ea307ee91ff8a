"""verify: does a registered version load and predict, in a process of its own with its own packaged code?"""

from pathlib import Path

from memgpt import environment, gate, packaging, registry, tracking
from memgpt.config import Config
from memgpt.errors import UserError

WORK = Path(".memgpt/verify")


def run(config: Config, reference: str) -> str:
    """The version's number, once it has answered its example. reference: as `registry.parse` reads it; a bare model
    is its champion.

    Raises:
        UserError: if there is no such version, or it does not load or predict.
    """
    tracking.use()
    model, version = registry.resolve(tracking.client(), reference)
    uri = registry.uri(model, version)
    with gate.Version(
        uri, WORK / model, environment.threads(config.runtime.threads), config.promote.patience
    ) as served:
        served.ask(packaging.EXAMPLES[model])
        try:
            served.answer()
        except gate.VersionError as error:
            raise UserError(f"{error}; `memgpt rollback {model}` returns to the version before") from None
    return version
