"""dvc.yaml says what the code does: a stage depends on exactly the modules that can change its bytes, and lists the
parameters that it reads. `python -m tests.test_pipeline` prints the code deps that each stage needs.
"""

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows.retrain import steps
from memgpt import config

ROOT = Path(__file__).parents[1]
# Modules whose change cannot change what a stage writes, with the reason.
NO_BYTES = {
    "memgpt": "its classes are imported on use, from modules that are counted themselves",
    "memgpt.atomic": "how a file is replaced, not what is in it",
    "memgpt.checkpoint": "where to resume from; a checkpoint is keyed by all code",
    "memgpt.config": "checks values; the values are params",
    "memgpt.environment": "telemetry, threads, noise",
    "memgpt.errors": "one exception",
    "memgpt.stages": "empty",
}
# Reached, but what they make is pinned by something else that the stage depends on.
PINNED = {"memgpt.newsroom": "data/sources.lock.json holds the digest of what it generates"}
STAGES = ("ingest", "validate", "tokenize", "pretrain", "multitask", "finetune", "evaluate")


@cache
def module_file(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def tree(name: str) -> ast.Module:
    path = module_file(name)
    assert path is not None, name
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(name: str, item: str | None) -> Iterator[str]:
    """The project's modules that a module imports anywhere in it, but for type checkers only.

    `import_module(f"memgpt.tasks.{name}")` is the item's module where there is one, else that of each task.
    """
    for node in _running(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:  # a module out of a package does not need what else the package offers
                inner = f"{node.module}.{alias.name}"
                yield inner if module_file(inner) else str(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "import_module":
            written = ast.unparse(node.args[0]).strip("f'\"")
            for choice in [item] if item in config.MODELS else config.TASKS:
                yield re.sub(r"\{\w+\}", str(choice), written)


def _running(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _running(child)


@cache
def closure(verb: str, item: str | None) -> frozenset[str]:
    """Every module that a stage can reach and that can change its bytes."""
    found: set[str] = set()
    waiting = [f"memgpt.stages.{verb}"]
    while waiting:
        name = waiting.pop()
        package = name.partition(".")[0] == "memgpt"
        if not package or name in found or name in PINNED or name in NO_BYTES or module_file(name) is None:
            continue
        found.add(name)
        waiting += imports(name, item)
    return frozenset(found)


def needed(address: str) -> set[str]:
    verb, _, item = address.partition("@")
    files = (module_file(name) for name in closure(verb, item or None))
    return {str(path.relative_to(ROOT)) for path in files if path and path.read_text(encoding="utf-8").strip()}


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        return {stage.addressing: stage for stage in repo.index.stages}


def code_deps(stage: Any) -> set[str]:
    return {dep.def_path for dep in stage.deps if dep.def_path.startswith("memgpt")}


def test_every_stage_is_known(stages: dict[str, Any]) -> None:
    assert {address.partition("@")[0] for address in stages} == set(STAGES)


def test_no_dependency_on_code_is_missing(stages: dict[str, Any]) -> None:
    missing = {address: sorted(needed(address) - code_deps(stage)) for address, stage in stages.items()}
    assert {address: files for address, files in missing.items() if files} == {}


def test_no_dependency_on_code_is_needless(stages: dict[str, Any]) -> None:
    """A foreach lists for all its items what one of them needs."""
    by_verb: dict[str, set[str]] = {}
    for address in stages:
        by_verb.setdefault(address.partition("@")[0], set()).update(needed(address))
    needless = {a: sorted(code_deps(s) - by_verb[a.partition("@")[0]]) for a, s in stages.items()}
    assert {address: files for address, files in needless.items() if files} == {}


def test_stages_read_and_write_where_the_flow_expects(stages: dict[str, Any]) -> None:
    """The flow runs every stage of dvc.yaml once, after all whose outputs it reads."""
    plan = steps(config.load(ROOT / "params.yaml"))
    names = [step.name for step in plan]
    assert sorted(set(names) & set(stages)) == sorted(stages)
    assert len(names) == len(set(names))
    before: dict[str, set[str]] = {}
    for step in plan:
        before[step.name] = {earlier for name in step.after for earlier in {name} | before[name]}
    makes = {out.def_path: address for address, stage in stages.items() for out in stage.outs}
    for address, stage in stages.items():
        for dep in stage.deps:
            for out, maker in makes.items():
                if dep.def_path == out or dep.def_path.startswith(out + "/"):
                    assert maker in before[address], f"{address} reads {out}, but does not wait for {maker}"


def listed(stage: Any) -> set[str]:
    return {key for dep in stage.deps if dep.def_path == "params.yaml" for key in dep.params}


def leaves(section: Any, prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, config.Section):
            yield from leaves(inner, f"{prefix}.{field.alias or name}")
        else:
            yield f"{prefix}.{field.alias or name}"


def names_in(modules: frozenset[str]) -> set[str]:
    """Attributes and arguments: a section may be handed on as keywords."""
    nodes = [node for module in modules for node in _running(tree(module))]
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {node.arg for node in nodes if isinstance(node, ast.arg)}


def test_every_key_is_read_by_the_stage_that_lists_it(stages: dict[str, Any]) -> None:
    keys = [key for name in config.Config.model_fields for key in _keys(name)]
    for address, stage in stages.items():
        verb, _, item = address.partition("@")
        read = names_in(closure(verb, item or None))
        for param in listed(stage):
            for key in keys:
                if key == param or key.startswith(param + "."):
                    assert key.rpartition(".")[2] in read, f"{address} lists {param}, but nothing reads {key}"


def test_every_section_that_a_stage_reads_is_listed(stages: dict[str, Any]) -> None:
    sections = {field.alias or name: name for name, field in config.Config.model_fields.items()}
    for address, stage in stages.items():
        verb = address.partition("@")[0]
        for node in _running(tree(f"memgpt.stages.{verb}")):
            if not (isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("config", "settings")):
                continue
            for section, attribute in sections.items():
                if node.attr == attribute and section != "runtime":
                    found = [key for key in listed(stage) if key.partition(".")[0] == section]
                    assert found, f"{address} reads {section}, which dvc.yaml does not list"


def _keys(name: str) -> list[str]:
    field = config.Config.model_fields[name]
    return list(leaves(field.annotation, field.alias or name))


def test_every_key_of_the_schema_is_in_the_committed_file() -> None:
    document = config.read(ROOT / "params.yaml")
    optional = {f"data.{source}.{key}" for source in config.SOURCES for key in ("columns", "labels", "licence")}
    for name in config.Config.model_fields:
        for key in set(_keys(name)) - optional:
            node: Any = document
            for part in key.split("."):
                assert part in node, f"params.yaml lacks {key}"
                node = node[part]


def test_the_committed_file_survives_being_written(tmp_path: Path) -> None:
    """--set changes what it names and not a byte more."""
    config.write(config.read(ROOT / "params.yaml"), tmp_path / "params.yaml")
    assert (tmp_path / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_dvc_can_read_what_it_writes_there(tmp_path: Path) -> None:
    """`dvc exp run -S` drops quotes, so that `{uri: "a://b"}` in one line would not be read again."""
    from dvc.utils.serialize import load_yaml, modify_yaml

    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    config.write(
        config.override(config.read(tmp_path / "params.yaml"), ["data.ner.uri='*.conll'"]), tmp_path / "p.yaml"
    )
    with modify_yaml(str(tmp_path / "p.yaml")) as document:
        document["finetune"]["ner"]["epochs"] = 7
    assert load_yaml(str(tmp_path / "p.yaml"))["data"]["ner"]["uri"] == "*.conll"


def test_shipped_configuration_parses() -> None:
    config.load(ROOT / "params.yaml")
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    settings = tomllib.loads((ROOT / "prefect.toml").read_text())
    deployments = YAML(typ="safe").load((ROOT / "prefect.yaml").read_text())
    YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())
    assert settings["home"] == ".prefect"
    assert settings["server"]["analytics_enabled"] is False
    assert f"prefect=={deployments['prefect-version']}" in pyproject["project"]["dependencies"]


def test_every_shipped_json_parses() -> None:
    for path in [*ROOT.glob("data/*.json"), *ROOT.glob("benchmarks/*.json")]:
        json.loads(path.read_text(encoding="utf-8"))


def test_prefect_reads_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import Settings

    monkeypatch.chdir(ROOT)
    for name in ("PREFECT_HOME", "PREFECT_SERVER_ANALYTICS_ENABLED"):
        monkeypatch.delenv(name, raising=False)
    settings = Settings()
    assert settings.home == Path(".prefect")
    assert settings.server.analytics_enabled is False
    assert settings.server.ephemeral.enabled is True


def test_deployments_name_flows_and_their_parameters() -> None:
    from importlib import import_module

    for deployment in YAML(typ="safe").load((ROOT / "prefect.yaml").read_text())["deployments"]:
        path, _, name = deployment["entrypoint"].partition(":")
        module = import_module(path.removesuffix(".py").replace("/", "."))
        flow = getattr(module, name)
        assert flow.name == name == deployment["name"]
        assert set(deployment.get("parameters", ())) <= set(flow.parameters.properties)


def test_the_lock_is_for_every_machine() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    pins = {line.partition(";")[0].strip() for line in lines}
    assert all(re.fullmatch(r"[a-z0-9.-]+==[a-z0-9.]+", pin) for pin in pins), "a pin is no plain name==version"
    assert "torch==2.13.0" in pins
    locked = {pin.partition("==")[0] for pin in pins}
    assert not any(name.startswith(("nvidia-", "cuda-")) for name in locked)
    assert "triton==3.7.1 ; sys_platform == 'linux'" in lines, "another than torch 2.13.0 for CUDA requires"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["gpu"]]
    names = {re.split(r"[^\w.-]", need)[0].lower().replace(".", "-") for need in wanted}
    assert names - {"memgpt"} <= locked  # of the project itself another extra


def as_written(stages: dict[str, Any]) -> dict[str, list[str]]:
    """Verb → the code deps for dvc.yaml; a module of the item's own name is written with ${key} (or ${item})."""
    found: dict[str, set[str]] = {}
    for address in stages:
        verb, _, item = address.partition("@")
        files = {file.replace(f"/{item}.py", "/${key}.py") if item else file for file in needed(address)}
        found.setdefault(verb, set()).update(files)
    return {
        verb: sorted(files, key=lambda file: (f"/stages/{verb}" not in file, file)) for verb, files in found.items()
    }


if __name__ == "__main__":
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repository:
        for each, lines in as_written({stage.addressing: stage for stage in repository.index.stages}).items():
            print(f"{each}:", *lines, sep="\n        - ")


def test_the_locks_are_of_this_configuration() -> None:
    """`dvc repro` in a fresh clone starts from them: what the sources held, and what the stages were given."""
    sources = json.loads((ROOT / "data" / "sources.lock.json").read_text(encoding="utf-8"))
    settings = config.load(ROOT / "params.yaml")
    assert {name: entry["uri"] for name, entry in sources.items()} == {
        name: getattr(settings.data, name).uri for name in config.SOURCES
    }
    locked = YAML(typ="safe").load(ROOT / "dvc.lock")["stages"]
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    assert locked["pretrain"]["params"]["params.yaml"]["pretrain"] == params["pretrain"]
    assert locked["finetune@ner"]["params"]["params.yaml"]["finetune.ner"] == params["finetune"]["ner"]
