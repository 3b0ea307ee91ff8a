"""verify: does the registered champion load and predict, in a process of its own with its own packaged code?"""

from pathlib import Path

from memgpt import environment, gate, packaging, registry, tracking
from memgpt.config import Config
from memgpt.errors import UserError

WORK = Path(".memgpt/verify")


def run(config: Config, model: str) -> str:
    """The champion's version, once it has answered its example.

    Raises:
        UserError: if there is no champion, or it does not load or predict.
    """
    tracking.use()
    version = registry.aliases(tracking.client(), model).get(registry.CHAMPION)
    if version is None:
        raise UserError(f"{registry.name(model)}: has no champion; `memgpt promote {model}` makes one")
    uri = registry.uri(model, version)
    with gate.Version(uri, WORK / model, environment.threads(config.runtime.threads)) as champion:
        champion.ask(packaging.EXAMPLES[model])
        try:
            champion.answer()
        except gate.VersionError as error:
            raise UserError(f"{error}; `memgpt rollback {model}` returns to the version before") from None
    return version
