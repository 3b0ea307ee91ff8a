"""A small place with real-shaped source files of all four kinds, for the tests of the data stages."""

import json
from pathlib import Path

from memgpt import config

ROOT = Path(__file__).parents[1]


def put(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def jsonl(path: str, rows: list[dict]) -> None:
    put(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_sources() -> None:
    """src/corpus.txt, src/ner/*.conll, src/reviews.jsonl and src/shop/*.csv below the working directory."""
    put("src/corpus.txt", "\n\n".join(f"Document {number}.\nIt tells of matter {number}." for number in range(200)))
    for split, start, count in (("train", 0, 40), ("dev", 40, 25), ("test", 65, 25)):
        lines = [f"Ann{n}\tB-PER\nLee\tI-PER\nsaw\tO\nRome{n}\tB-LOC\n" for n in range(start, start + count)]
        put(f"src/ner/{split}.conll", "\n".join(lines))
    reviews = [
        {"text": f"review {n}", "label": ("good", "bad")[n % 2], "time": f"2024-01-{n % 28 + 1:02d}"}
        for n in range(400)
    ]
    jsonl("src/reviews.jsonl", reviews)
    put("src/shop/items.csv", "item_id,title,description\n" + "".join(f"{n},Title {n},About {n}\n" for n in range(30)))
    clicks = [f"{user},{(user + step) % 30},{1_700_000_000 + step}\n" for user in range(25) for step in range(5)]
    put("src/shop/interactions.csv", "user_id,item_id,timestamp\n" + "".join(clicks))


def configured(*assignments: str) -> config.Config:
    """The committed params.yaml, reading src/."""
    document = config.read(ROOT / "params.yaml")
    uris = {
        "corpus": "src/corpus.txt",
        "ner": "src/ner",
        "sentiment": "src/reviews.jsonl",
        "recommendation": "src/shop",
    }
    config.override(document, [*(f"data.{name}.uri={uri}" for name, uri in uris.items()), *assignments])
    return config.parse(document)
