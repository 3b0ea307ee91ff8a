"""Do killed runs end with the same results as an undisturbed run?

    python benchmarks/chaos.py --kills 24 --seed 1     kills stages at random moments of manual retrains
    python benchmarks/chaos.py --up 6 --seed 1         kills the flow, the worker and the server of `make up`, in turn
    python benchmarks/chaos.py --report                the results of the kills so far

Uses tiny settings, in a clone in .memgpt/chaos. The first run is undisturbed. Each other run starts from scratch, gets
kill -9 at a random moment of a random stage (or of flow, worker or server), and is restarted until complete. Its test
metrics must equal the undisturbed run's, bit for bit. A stopped benchmark resumes; results/chaos.json has every kill.
"""

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from memgpt.atomic import write_json

ROOT = Path(__file__).parents[1]
WORK = Path(".memgpt/chaos")
RESULTS = Path(__file__).parent / "results/chaos.json"
SETTINGS = [
    *(f"data.{source}.uri=sample://newsroom?scale=0.05" for source in ("corpus", "ner", "sentiment", "recommendation")),
    "tokenize.vocab_size=500",
    "pretrain.tokens=100000",
    "pretrain.checkpoint_steps=10",
    "multitask.steps=20",
    "multitask.checkpoint_steps=5",
    *(f"finetune.{task}.epochs=1" for task in ("ner", "sentiment", "recommendation")),
    *(f"finetune.{task}.checkpoint_steps=5" for task in ("ner", "sentiment", "recommendation")),
    "evaluate.bootstrap=50",
    "evaluate.robustness=20",
    "promote.bootstrap=50",
]
STAGES = (
    "ingest corpus",
    "validate ner",
    "tokenize",
    "pretrain",
    "multitask",
    *(f"{verb} {task}" for verb in ("finetune", "evaluate") for task in ("ner", "sentiment", "recommendation")),
    "promote sentiment",
)
MADE = ("dvc.lock", "models", "reports", "data/tables", "data/tokens", ".dvc/cache", ".dvc/tmp", ".memgpt/checkpoints")
PER_RUN = 3  # kills in one retrain, from scratch until complete
PATIENCE = 1500.0  # seconds for one retrain on a machine with other load


@dataclass(frozen=True)
class Checkout:
    """A clone with tiny settings in which `memgpt retrain` runs."""

    root: Path
    env: dict[str, str]

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self.root / "chaos.log").open("ab")
        return subprocess.Popen(command, cwd=self.root, env=self.env, stdout=log, stderr=log)

    def retrain(self) -> subprocess.Popen[bytes]:
        return self.start("memgpt", "retrain")

    def forget(self) -> None:
        """Remove everything that runs made except the registry."""
        for name in MADE:
            path = self.root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        subprocess.run(["git", "checkout", "--quiet", "--", "models", "data"], cwd=self.root, check=False)

    def metrics(self, folder: str = ".") -> dict[str, str]:
        """model → text of its metrics report; models whose evaluation did not finish are missing."""
        found = (self.root / folder / "reports/metrics").glob("*.json")
        return {path.stem: path.read_text(encoding="utf-8") for path in sorted(found)}

    def processes(self, *calls: tuple[str, ...]) -> list[psutil.Process]:
        """Processes that work in this folder and whose command line contains the words of one of the calls in a row."""
        found = []
        for process in psutil.process_iter():
            try:
                line = [Path(word).name for word in process.cmdline()]
                inside = Path(process.cwd()).is_relative_to(self.root)
            except (psutil.Error, OSError):
                continue
            called = any(tuple(line[i : i + len(words)]) == words for words in calls for i in range(len(line)))
            if inside and called and "dvc" not in line:
                found.append(process)
        return found


def stage(name: str) -> list[tuple[str, ...]]:
    """The command lines of a stage's process: from dvc.yaml, and from the flow."""
    return [("memgpt", *name.split()), ("memgpt.cli", *name.split())]


def clone(target: Path) -> Checkout:
    """A clone of the committed state, in which tiny settings are committed."""
    if not (target / ".git").exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(target)], check=True)
        setter = "import sys; from memgpt import config; config.write(config.override(config.read(), sys.argv[1:]))"
        subprocess.run([sys.executable, "-c", setter, *SETTINGS], cwd=target, check=True)
        git = ["git", "-c", "user.name=chaos", "-c", "user.email=chaos@example.invalid"]
        subprocess.run([*git, "commit", "--all", "--quiet", "--message", "tiny"], cwd=target, check=True)
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("MEMGPT_", "MLFLOW_", "PREFECT_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{ours.get('PATH', '')}"
    return Checkout(target.resolve(), {**ours, "PATH": path, "PYTHONPATH": str(target.resolve())})


def whole(checkout: Checkout, reference: dict[str, str]) -> bool:
    return checkout.metrics().keys() >= reference.keys()


def kill_stages(
    checkout: Checkout, plan: list[tuple[str, float]], reference: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """A retrain from scratch; each stage of `plan` is killed once, so many seconds after it is first seen."""
    checkout.forget()
    left = list(plan)
    deadline = time.monotonic() + PATIENCE
    killed: list[dict[str, Any]] = []
    while left or not whole(checkout, reference):
        flow = checkout.retrain()
        while flow.poll() is None:
            if time.monotonic() > deadline:
                flow.kill()
                raise SystemExit(f"{checkout.root}: not whole after {PATIENCE:.0f} s; see chaos.log there")
            for name, delay in list(left):
                found = checkout.processes(*stage(name))
                if found:
                    left.remove((name, delay))
                    time.sleep(delay)
                    for process in found:
                        if process.is_running():
                            process.kill()
                            killed.append({"what": name, "seconds_into_it": round(delay, 2)})
            time.sleep(0.2)  # listing all processes takes time too
        if flow.returncode == 0 or (not left and whole(checkout, reference)):
            break
        left = [(name, delay) for name, delay in left if not _done(checkout, name)]
    same = checkout.metrics() == reference
    for kill in killed:
        yield {**kill, "same_metrics": same}


def _done(checkout: Checkout, name: str) -> bool:
    """Whether a stage is done and will not run again."""
    lock = checkout.root / "dvc.lock"
    return lock.exists() and f"\n  {name.replace(' ', '@')}:" in lock.read_text(encoding="utf-8")


# --- the flow, the worker, the server


class Up:
    """`make up` in the checkout, on free ports."""

    def __init__(self, checkout: Checkout) -> None:
        ports = [_free_port(), _free_port()]
        extra = {"MEMGPT_PREFECT_PORT": ports[0], "MEMGPT_MLFLOW_PORT": ports[1]}
        self.checkout = Checkout(checkout.root, {**checkout.env, **extra})
        self.api = f"http://127.0.0.1:{ports[0]}/api"

    def start(self) -> None:
        if self.checkout.start(sys.executable, "-m", "flows.up").wait():
            raise SystemExit(f"{self.checkout.root}: make up failed; see chaos.log there")

    def stop(self) -> None:
        self.checkout.start(sys.executable, "-m", "flows.up", "--down").wait()

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.api}/{path}", data, {"Content-Type": "application/json"})
        for wait in (1, 2, 4, 8, None):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code != 503 or wait is None:  # its database is busy
                    raise
                time.sleep(wait)
        raise AssertionError("the last wait is None")

    def run(self) -> str:
        deployment = self.ask("deployments/name/retrain/retrain")["id"]
        return self.ask(f"deployments/{deployment}/create_flow_run", {})["id"]

    def state(self, run: str) -> str:
        try:
            return self.ask(f"flow_runs/{run}")["state"]["type"]
        except OSError:
            return "UNKNOWN"

    def until(self, well: Callable[[], Any], seconds: float = PATIENCE) -> float:
        """Wait until `well()` is true; returns the seconds that it took."""
        began = time.monotonic()
        while not well():
            if time.monotonic() - began > seconds:
                raise SystemExit(f"{self.checkout.root}: gave up after {seconds:.0f} s; see chaos.log there")
            time.sleep(0.2)
        return time.monotonic() - began


TARGETS: dict[str, tuple[str, ...]] = {
    "flow": ("prefect.engine",),
    "worker": ("prefect", "worker"),
    "server": ("prefect", "server"),
}
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def kill_up(up: Up, target: str, delay: float, reference: dict[str, str]) -> dict[str, Any]:
    """A deployed retrain from scratch; the target is killed `delay` seconds into pretraining, then `make up` is run."""
    place = Checkout(up.checkout.root / ".memgpt/workspace", up.checkout.env)
    place.forget()
    shutil.rmtree(up.checkout.root / ".dvc/cache", ignore_errors=True)  # the workspace uses it too
    (place.root / ".memgpt/settled.json").unlink(missing_ok=True)
    training = lambda: place.processes(*stage("pretrain"))  # noqa: E731
    first = up.run()
    up.until(training)
    time.sleep(delay)
    for process in up.checkout.processes(TARGETS[target]):
        process.kill()
    began = time.monotonic()
    up.start()
    result: dict[str, Any] = {"what": target, "seconds_into_it": round(delay, 2)}
    if up.state(first) not in ENDED and training():  # the run survived
        up.until(lambda: up.state(first) in ENDED)
    if not whole(place, reference):
        second = up.run()
        up.until(lambda: training() or up.state(second) in ENDED)
        result["seconds_to_resumed"] = round(time.monotonic() - began, 1)
        up.until(lambda: up.state(second) in ENDED)
    up.until(lambda: up.state(first) in ENDED, 240)
    return {**result, "first_run": up.state(first), "same_metrics": place.metrics() == reference}


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# --- all of it


def undisturbed(checkout: Checkout) -> tuple[dict[str, str], float]:
    """(metrics, seconds) of an undisturbed run; measured once and stored."""
    path = WORK / "undisturbed.json"
    if not path.exists():
        checkout.forget()
        began = time.monotonic()
        checkout.retrain().wait()
        write_json(path, {"metrics": checkout.metrics(), "seconds": time.monotonic() - began})
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["metrics"], found["seconds"]


def known() -> dict[str, list[dict[str, Any]]]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"stages": [], "up": []}


def keep(kind: str, kills: list[dict[str, Any]]) -> None:
    found = known()
    found[kind] += kills
    write_json(RESULTS, found)


def report() -> None:
    for kind, kills in known().items():
        same = sum(kill["same_metrics"] for kill in kills)
        resumed = sorted(kill["seconds_to_resumed"] for kill in kills if "seconds_to_resumed" in kill)
        took = f"; from kill to resumed {resumed[0]} to {resumed[-1]} s, `make up` included" if resumed else ""
        print(f"{kind:8} {len(kills)} kills, {same} ended with the metrics of the undisturbed run{took}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="kills of stages, those of earlier calls counted")
    parser.add_argument("--up", type=int, default=0, help="kills of flow, worker and server, likewise")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only what the kills so far came to")
    arguments = parser.parse_args()
    if not arguments.report:
        checkout = clone(WORK / "checkout")
        reference, seconds = undisturbed(checkout)
        print(f"undisturbed: {seconds:.0f} s", flush=True)
        with tqdm(total=arguments.kills, initial=len(known()["stages"]), desc="stages", unit="kill") as bar:
            while (done := len(known()["stages"])) < arguments.kills:
                draw = random.Random(f"{arguments.seed} {done}")
                names = draw.sample(STAGES, min(PER_RUN, arguments.kills - done))
                kills = list(kill_stages(checkout, [(name, draw.uniform(0, 4)) for name in names], reference))
                keep("stages", kills)
                bar.update(len(kills))
        if len(known()["up"]) < arguments.up:
            kill_all_up(Up(checkout), arguments.up, arguments.seed, reference)
    report()


def kill_all_up(up: Up, kills: int, seed: int, reference: dict[str, str]) -> None:
    up.start()
    try:
        with tqdm(total=kills, initial=len(known()["up"]), desc="up", unit="kill") as bar:
            while (done := len(known()["up"])) < kills:
                delay = random.Random(f"{seed} up {done}").uniform(0, 4)
                keep("up", [kill_up(up, list(TARGETS)[done % len(TARGETS)], delay, reference)])
                bar.update()
    finally:
        up.stop()


if __name__ == "__main__":
    main()
