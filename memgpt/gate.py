"""The gate: may this challenger become champion? The rules, and the processes in which the versions predict.

Only predictions decide: each version reads the same frozen test inputs in its own process, with its own packaged code
(`isolated.py`), and `decide` compares the answers.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from memgpt import atomic, bootstrap, environment, packaging
from memgpt.bootstrap import Score
from memgpt.config import Config, Gate
from memgpt.errors import UserError

Outcome = Literal["promote", "reject", "hold", "unchanged"]
SEPARATOR = "\x1f"  # joins pre-split words for the served model: ASCII's unit separator
_TIMED_ROWS, _TIMED_SECONDS, _ROUNDS = 32, 2.0, 5


@dataclass(frozen=True)
class Decision:
    verdict: Outcome
    reasons: list[str]
    numbers: dict[str, float] = field(default_factory=dict)


class VersionError(Exception):
    """A registered version does not load, does not predict, or does not give one answer per input."""


def decide(
    gate: Gate,
    score: Score,
    challenger: np.ndarray,
    *,
    champion: np.ndarray | None,
    baseline: np.ndarray | None = None,
    slices: Mapping[str, np.ndarray] | None = None,
    resamples: int,
    seed: int,
    incomparable: str | None = None,
    replace: bool = False,
) -> Decision:
    """The verdict on per-example statistics [n, k] of challenger, champion and baseline on the same n test rows.

    champion: None if there is none, or none that is comparable. baseline: required without a champion.
    slices: name → mask [n] of its rows. incomparable: why the champion's numbers cannot be compared.
    replace: an operator's request, which releases a hold, never a rejection.
    """
    value = float(score(challenger.sum(axis=0)))
    if not np.isfinite(challenger).all() or not np.isfinite(value):
        return Decision("reject", ["predictions score NaN or infinity"])
    low, high = bootstrap.interval(challenger, score, resamples, seed)
    numbers = {"value": value, "ci_low": low, "ci_high": high}
    if value < gate.floor:
        return Decision("reject", [f"{value:.4f} is below the floor {gate.floor:g}"], numbers)
    if champion is None:
        if incomparable and not replace:
            return Decision("hold", [f"not comparable: {incomparable}"], numbers)
        assert baseline is not None, "without a champion the baseline decides"
        difference, low, high = bootstrap.paired(challenger, baseline, score, resamples, seed)
        numbers |= {"baseline": float(score(baseline.sum(axis=0))), "over_baseline": difference}
        numbers |= {"over_baseline_low": low, "over_baseline_high": high}
        shown = f"baseline {numbers['baseline']:.4f} by {difference:+.4f} [{low:+.4f}, {high:+.4f}]"
        if low > 0:
            first = f"replaces on request ({incomparable})" if incomparable else "first champion"
            return Decision("promote", [f"{first}, above the simple {shown}"], numbers)
        return Decision("reject", [f"not better than the simple {shown}"], numbers)

    failed = []
    for name, allowed in sorted(gate.slices.items()):
        mask = (slices or {})[name]
        if not mask.any():
            continue
        drop = float(score(champion[mask].sum(axis=0)) - score(challenger[mask].sum(axis=0)))
        numbers[f"drop_{name}"] = drop
        if not drop <= allowed:
            failed.append(f"slice {name} ({int(mask.sum())} rows) drops by {drop:.4f}, {allowed:g} is accepted")
    difference, low, high = bootstrap.paired(challenger, champion, score, resamples, seed)
    numbers |= {"champion": float(score(champion.sum(axis=0)))}
    numbers |= {"difference": difference, "difference_low": low, "difference_high": high}
    if failed:
        return Decision("reject", failed, numbers)
    shown = f"{difference:+.4f} [{low:+.4f}, {high:+.4f}] against the champion"
    if low > -gate.margin and difference >= 0:
        return Decision("promote", [shown], numbers)
    why = "worse than the champion" if difference < 0 else "the gain is not certain"
    if replace:
        return Decision("promote", [f"replaces on request though {why}: {shown}"], numbers)
    return Decision("hold", [f"{why}: {shown}, margin {gate.margin:g}"], numbers)


def check_slices(model: str, gate: Gate, known: Mapping[str, np.ndarray]) -> None:
    """
    Raises:
        UserError: if params.yaml names a slice that the test set does not have.
    """
    for name in gate.slices:
        if name not in known:
            names = ", ".join(sorted(known)) or "none"
            raise UserError(f"promote.{model}.slices.{name}: no such slice of the test set; known: {names}")


class Version:
    """One registered version, which loads and predicts in its own child process.

    uri: `models:/name/version`. The child's output goes to `<folder>/v<version>.log`. Inputs, predictions and the
    version's downloaded files are in a temporary folder, which is removed with the `with`.
    timeout: seconds to wait for an answer; None: no limit.
    """

    def __init__(self, uri: str, folder: Path, threads: int, timeout: float | None = None) -> None:
        self.uri = uri
        self.timeout = timeout
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.label = "v" + uri.rpartition("/")[2]
        self.log = self.folder / f"{self.label}.log"
        threaded = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with ExitStack() as stack, self.log.open("w") as log:
            # Private to this process: another may use the same version, and the inputs may be private texts.
            exchange = stack.enter_context(atomic.temporary())
            self.inputs, self.out, files = exchange / "inputs.json", exchange / "answers.json", exchange / "version"
            files.mkdir()
            self.process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("isolated.py").resolve()), uri, str(files)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=tempfile.gettempdir(),  # not the checkout
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **threaded},
                text=True,
            )
            self._exchange = stack.pop_all()
        self.weight_bytes = 0
        self._loaded = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()
        self._exchange.close()

    def ask(self, inputs: list[Any], params: dict[str, Any] | None = None) -> None:
        """Request predictions, which start once the model is loaded; `answer` waits for them."""
        self.inputs.write_text(json.dumps(inputs), encoding="utf-8")
        self.asked = len(inputs)
        self._send({"do": "predict", "inputs": str(self.inputs), "params": params, "out": str(self.out)})

    def answer(self) -> list[Any]:
        """The predictions that `ask` requested, one per input.

        Raises:
            VersionError: if the version does not load or predict, or takes longer than `timeout` for either.
        """
        if not self._loaded:  # the child reports this once, before its first answer
            self.weight_bytes = self._receive("load")["bytes"]
            self._loaded = True
        self._receive("predict")
        predictions = json.loads(self.out.read_text(encoding="utf-8"))
        if not isinstance(predictions, list) or len(predictions) != self.asked:
            raise VersionError(f"{self.uri} does not predict: not one answer for each of {self.asked} inputs")
        return predictions

    def seconds(self, rows: int) -> float:
        """Time to predict the first rows again."""
        self._send({"do": "time", "rows": rows})
        return self._receive("predict")["seconds"]

    def _send(self, command: dict[str, Any]) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # the child has ended: `_receive` gets its last message or exit status
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()

    def _receive(self, verb: str) -> dict[str, Any]:
        assert self.process.stdout
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(self.timeout or threading.TIMEOUT_MAX, give_up)
        timer.daemon = True  # so that an interrupt does not wait for it
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if late.is_set():
            answer = {"error": f"no answer within {self.timeout:g} s, which is promote.timeout_seconds in params.yaml"}
        else:
            answer = json.loads(line) if line else {"error": f"its process ended with {self.process.wait()}"}
        if "error" in answer:
            raise VersionError(f"{self.uri} does not {verb}: {answer['error']} (see {self.log})")
        return answer


def try_out(config: Config, model: str, uri: str, folder: Path, hint: str) -> None:
    """Load a version and let it predict its example, in a separate process.

    Raises:
        UserError: if that fails; `hint` says what to do then.
    """
    threads = environment.threads(config.runtime.threads)
    with Version(uri, folder, threads, config.promote.timeout_seconds) as version:
        version.ask(packaging.EXAMPLES[model])
        try:
            version.answer()
        except VersionError as error:
            raise UserError(f"{error}; {hint}") from None


def as_served(inputs: list[Any]) -> tuple[list[Any], dict[str, Any] | None]:
    """Test inputs in the form that the served model takes, with its params. The signature is a list of texts, so words
    that are already split are joined to one text. Offsets stay the same, since the separator is one character."""
    if inputs and all(isinstance(value, list) for value in inputs):
        return [SEPARATOR.join(words) for words in inputs], {"separator": SEPARATOR}
    return inputs, None


def cost(challenger: Version, champion: Version | None, rows: int) -> dict[str, float]:
    """Size, time per row, and their ratios to the champion's. Both are timed in turn: a slowdown affects both.

    On at most 32 rows, for at most about 2 s.
    """
    versions = [challenger, champion] if champion else [challenger]
    rounds: list[list[float]] = []
    rows = min(rows, _TIMED_ROWS)
    while len(rounds) < _ROUNDS and sum(map(sum, rounds)) < _TIMED_SECONDS:
        rounds.append([version.seconds(rows) for version in versions])
    numbers = {"latency_ms": 1000 * median(times[0] for times in rounds) / rows}
    numbers["size_mb"] = challenger.weight_bytes / 1e6
    if champion:
        numbers["latency_ratio"] = median(times[0] / times[1] for times in rounds)
        numbers["size_ratio"] = challenger.weight_bytes / champion.weight_bytes
    return numbers
