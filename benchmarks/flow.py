"""How much longer does the flow take than the same stages run manually?

    python benchmarks/flow.py [--rounds 2]

In a clone with tiny settings in .memgpt/flow: from scratch, and with nothing to do, by the flow and manually (snapshot,
`dvc repro`, promote), in turn. The flow may take less time, because it runs several stages in parallel.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from statistics import median

import chaos
from tqdm import tqdm

from memgpt.atomic import write_json

WORK = Path(".memgpt/flow")
RESULTS = Path(__file__).parent / "results/flow.json"
BY_HAND = [
    ["memgpt", "snapshot"],
    [sys.executable, "-m", "dvc", "repro"],
    *(["memgpt", "promote", model] for model in ("base", "ner", "sentiment", "recommendation")),
]
BY_FLOW = [["memgpt", "retrain"]]


def seconds(checkout: chaos.Checkout, commands: list[list[str]]) -> float:
    began = time.monotonic()
    for command in commands:
        checkout.start(*command).wait()  # a tiny model is rejected, with exit status 1
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    checkout = chaos.clone(WORK / "checkout")
    took: dict[str, list[float]] = {}
    ways = {"flow": BY_FLOW, "by hand": BY_HAND}
    for number in tqdm(range(parser.parse_args().rounds), desc="rounds"):
        for way in sorted(ways, reverse=bool(number % 2)):
            checkout.forget()
            took.setdefault(f"from nothing, {way}", []).append(seconds(checkout, ways[way]))
            took.setdefault(f"nothing to do, {way}", []).append(seconds(checkout, ways[way]))
        took.setdefault("nothing to do, dvc repro", []).append(seconds(checkout, BY_HAND[1:2]))
    found = {name: round(median(times), 1) for name, times in took.items()}
    for case in ("from nothing", "nothing to do"):
        ratio = median(a / b for a, b in zip(took[f"{case}, flow"], took[f"{case}, by hand"], strict=True))
        found[f"{case}, flow / by hand"] = round(ratio, 3)
    write_json(RESULTS, found)
    for name, value in found.items():
        print(f"{name:32} {value:8.3g}")
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
