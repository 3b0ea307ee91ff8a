"""Rows of every shape become the tables; a split, once given, stays; what cannot become a row is named by its line."""

import datetime
import json
from pathlib import Path

import pandas as pd
import pytest

from memgpt import tables
from memgpt.config import Ingest, Source
from memgpt.errors import UserError
from memgpt.sources.naming import Part

SETTINGS = Ingest(validation_fraction=0.1, test_fraction=0.1, corpus_validation_fraction=0.05)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def part(name: str, content: str, role: str = "train") -> Part:
    Path(name).write_text(content, encoding="utf-8")
    return Part(role, name, Path(name))


def jsonl(name: str, rows: list[dict], role: str = "train") -> Part:
    return part(name, "".join(json.dumps(row) + "\n" for row in rows), role)


def build(source: str, *parts: Part, **options: object) -> tables.Built:
    return tables.build(source, parts, Source(uri="x", **options), SETTINGS)  # type: ignore[arg-type]


def reviews(count: int) -> list[dict]:
    return [{"text": f"review number {number}", "label": ("good", "bad")[number % 2]} for number in range(count)]


def fails(source: str, *parts: Part, match: str, **options: object) -> None:
    with pytest.raises(UserError, match=match) as caught:
        build(source, *parts, **options)
    assert "\n" not in str(caught.value)


# ---- splits


def splits(built: tables.Built) -> dict[str, str]:
    return {row["text"]: split for split, table in built.tables.items() for row in table.to_pylist()}


def test_rows_never_move_as_data_grows() -> None:
    small = splits(build("sentiment", jsonl("a.jsonl", reviews(200), "all")))
    large = splits(build("sentiment", jsonl("b.jsonl", list(reversed(reviews(900))), "all")))
    assert all(large[text] == split for text, split in small.items())
    sizes = pd.Series(large).value_counts(normalize=True)
    assert abs(sizes["test"] - 0.1) < 0.04 and abs(sizes["validation"] - 0.1) < 0.04


def test_copies_of_a_text_share_a_split() -> None:
    rows = reviews(100) + [{"text": f"REVIEW  number {number}!", "label": "good"} for number in range(100)]
    found = splits(build("sentiment", jsonl("a.jsonl", rows, "all")))
    assert all(found[f"review number {number}"] == found[f"REVIEW  number {number}!"] for number in range(100))


def test_the_splits_of_the_source_are_kept_and_a_missing_one_is_split_off() -> None:
    train, test = reviews(200), [{"text": "held out", "label": "good"}]
    built = build("sentiment", jsonl("train.jsonl", train), jsonl("test.jsonl", test, "test"))
    assert built.tables["test"].column("text").to_pylist() == ["held out"]
    assert 5 < built.tables["validation"].num_rows < 40
    assert sum(table.num_rows for table in built.tables.values()) == 201
    corpus = build("corpus", jsonl("c.jsonl", [{"text": f"document {number}"} for number in range(300)], "all"))
    assert set(corpus.tables) == {"train", "validation"}


def test_a_split_that_stays_empty_is_an_error() -> None:
    fails("sentiment", jsonl("a.jsonl", reviews(2), "all"), match="data.sentiment: no rows for (test|validation)")


# ---- ids, labels, columns


def test_rows_that_name_their_split_are_not_split_anew() -> None:
    rows = [{**row, "Split": ("train", "dev", "test")[place % 3]} for place, row in enumerate(reviews(300))]
    fails(
        "sentiment", jsonl("a.jsonl", rows, "all"), match=r"a.jsonl: column 'Split' names splits, and is not read; wri"
    )
    assert build("sentiment", jsonl("a.jsonl", [*rows, {**rows[0], "Split": "web"}], "all"))


def test_ids_are_the_sources_or_derived_and_always_unique() -> None:
    rows = [{"text": "same", "label": "a"}, {"text": "same", "label": "b"}, {"id": 7, "text": "x", "label": "a"}]
    test = [{"id": 7.0, "text": "y", "label": "a"}]
    built = build(
        "sentiment", jsonl("t.jsonl", rows), jsonl("v.jsonl", test, "validation"), jsonl("e.jsonl", test, "test")
    )
    train = built.tables["train"].column("id").to_pylist()
    assert len(train[0]) == 16 and train[1] == f"{train[0]}-2" and train[2] == "7"
    assert built.tables["validation"].column("id").to_pylist() == ["7-2"]
    assert built.tables["test"].column("id").to_pylist() == ["7-3"]


def test_labels_are_those_of_train_or_the_pinned() -> None:
    rows = [{"text": "x", "label": 0}, {"text": "y", "label": 1}]
    parts = [jsonl("train.jsonl", rows), jsonl("v.jsonl", rows, "validation"), jsonl("e.jsonl", rows, "test")]
    assert build("sentiment", *parts).labels == ["0", "1"]
    assert build("sentiment", *parts, labels=["2", "1", "0"]).labels == ["0", "1", "2"]
    fails("sentiment", *parts, labels=["0"], match=r"train.jsonl line 2: label '1' is not among data.sentiment.labels")
    extra = jsonl("e.jsonl", [*rows, {"text": "z", "label": "odd"}], "test")
    fails(
        "sentiment",
        *parts[:2],
        extra,
        match=r"e.jsonl line 3: label 'odd' of test is not in train; .*pin data.sentiment.labels",
    )


@pytest.mark.parametrize("pair", [("Good", "good"), ("1", "1.0")])
def test_two_spellings_of_a_label_are_not_two_labels(pair: tuple[str, str]) -> None:
    rows = [{"text": str(place), "label": label} for place, label in enumerate((pair[0], pair[1], "bad"))]
    parts = [jsonl("a.jsonl", rows), jsonl("v.jsonl", rows[2:], "validation"), jsonl("e.jsonl", rows[2:], "test")]
    match = rf"a.jsonl line 2: label '{pair[1]}', elsewhere '{pair[0]}'; spell it one way, or pin both in data"
    fails("sentiment", *parts, match=match)
    assert build("sentiment", *parts, labels=["bad", *pair]).labels == sorted(("bad", *pair))


def test_columns_are_mapped_by_usual_names_or_by_the_configuration() -> None:
    rows = [{"sentence": f"s {number}", "sentiment": "a", "when": "x"} for number in range(100)]
    built = build("sentiment", jsonl("a.jsonl", rows, "all"))
    assert built.columns == {"text": "sentence", "label": "sentiment"}
    odd = [{"phrase": f"s {number}", "verdict": "a"} for number in range(100)]
    mapped = {"text": "phrase", "label": "verdict"}
    assert build("sentiment", jsonl("b.jsonl", odd, "all"), columns=mapped).columns == mapped
    match = r"b.jsonl: no column 'text'; it has phrase, verdict; name the right one with data.sentiment.columns.text"
    fails("sentiment", jsonl("b.jsonl", odd, "all"), match=match)
    fails(
        "sentiment",
        jsonl("b.jsonl", odd, "all"),
        columns={"text": "no"},
        match=r"no column 'no' \(data.sentiment.columns.text\)",
    )
    fails(
        "sentiment",
        jsonl("b.jsonl", odd, "all"),
        columns={"txt": "x"},
        match=r"data.sentiment.columns.txt: not a column of sent",
    )
    for name, mark in (("c.csv", ";"), ("c.csv", "\t"), ("c.tsv", ",")):
        match = rf"{name}: a single column, phrase{mark}verdict; commas separate the fields of a .csv, tabs those of"
        fails("sentiment", part(name, f"phrase{mark}verdict\na{mark}b\n"), match=match)
    fails("sentiment", part("c.txt", "some text"), match=r"c.txt: a .txt file holds texts without a label")
    bare = 'Great,"A text of somebody that goes on and on, as texts do, and is no name of a column",5\n' * 2
    with pytest.raises(UserError, match=r"d.csv: no column 'text'; it has a first line that does not look") as told:
        build("sentiment", part("d.csv", bare))
    assert "somebody" not in str(told.value)


def test_a_column_is_read_as_one_thing_and_can_be_left_out() -> None:
    rows = [{"text": f"s {number}", "category": "a", "date": "whenever"} for number in range(100)]
    mapped = {"label": "category", "time": None}
    assert build("sentiment", jsonl("a.jsonl", rows, "all"), columns=mapped).columns == {
        "text": "text",
        "label": "category",
    }


@pytest.mark.parametrize(("column", "value"), [("text", ["a", "b"]), ("text", {"en": "a"}), ("label", ["good"])])
def test_a_list_or_a_record_is_no_text(column: str, value: object) -> None:
    rows = jsonl("a.jsonl", [*reviews(1), {**reviews(1)[0], column: value}], "all")
    fails("sentiment", rows, match=rf"a.jsonl line 2: column '{column}' is not one value; write a text or a number")


def test_the_licences_of_the_rows_are_collected() -> None:
    rows = [{"text": f"t{number}", "license": ("MIT", "CC0")[number % 2]} for number in range(100)]
    assert build("corpus", jsonl("a.jsonl", rows, "all")).licences == ["CC0", "MIT"]


# ---- ner


def sentences(*lines: str) -> str:
    return "\n".join(line.replace("/", "\t") for line in lines) + "\n"


GOOD = sentences("Ann/B-PER", "Lee/I-PER", "left/O", "", "Rome/B-LOC")


def three(train: Part) -> list[Part]:
    return [train, part("dev.conll", GOOD, "validation"), part("test.conll", GOOD, "test")]


def test_ner_rows_from_conll_csv_and_lists() -> None:
    built = build("ner", *three(part("train.conll", GOOD)))
    assert built.labels == ["LOC", "PER"]
    assert built.tables["train"].to_pylist()[0]["tokens"] == ["Ann", "Lee", "left"]
    assert built.tables["train"].schema.equals(tables.SCHEMAS["ner"])
    csv = part("train.csv", 'tokens,ner_tags\nAnn left,B-PER O\n"[""Rome""]","[""B-LOC""]"\n')
    assert [row["tags"] for row in build("ner", *three(csv)).tables["train"].to_pylist()] == [["B-PER", "O"], ["B-LOC"]]
    python = part(
        "train.csv", "tokens,ner_tags\n\"['Ann', 'Lee\\'s']\",\"['B-PER', 'I-PER']\"\n\"['Rome']\",['B-LOC']\n"
    )
    assert [row["tokens"] for row in build("ner", *three(python)).tables["train"].to_pylist()] == [
        ["Ann", "Lee's"],
        ["Rome"],
    ]


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (
            ("Rome/B-LOC", "Ann/O", "Lee/I-PER"),
            r"train.conll line 3: broken BIO: I-PER follows O, so that no B-PER begins the entity",
        ),
        (("Rome/B-LOC", "", "Ann/B-PER", "Lee/I-LOC"), r"train.conll line 4: broken BIO: I-LOC follows B-PER"),
        (("Ann/B- ",), r"train.conll line 1: .*tag 'B-' is none of O, B-type, I-type"),
        (("Ann/PER",), r"train.conll line 1: .*tag 'PER' is none of O, B-type, I-type; BIO, IOB1, BIOES and B"),
        (("Ann/S-PER", "ran/O", "Lee/E-PER"), r"train.conll line 3: broken BIO: I-PER follows O"),
    ],
)
def test_broken_bio_is_named_by_line(lines: tuple[str, ...], match: str) -> None:
    fails("ner", *three(part("train.conll", sentences(*lines))), match=match)


@pytest.mark.parametrize(
    "tags",
    [
        "B-PER I-PER O B-PER B-LOC",  # BIO
        "I-PER I-PER O I-PER I-LOC",  # IOB1
        "B-PER E-PER O S-PER S-LOC",  # BIOES
        "B-PER L-PER O U-PER U-LOC",  # BILOU
    ],
)
def test_schemes_that_say_the_same_become_bio(tags: str) -> None:
    rows = [f"{token}/{tag}" for token, tag in zip("Ann Lee met Bo Rome".split(), tags.split(), strict=True)]
    table = build("ner", *three(part("train.conll", sentences(*rows)))).tables["train"]
    assert table.to_pylist()[0]["tags"] == ["B-PER", "I-PER", "O", "B-PER", "B-LOC"]


def test_a_type_may_be_several_words() -> None:
    rows = ["Ann/B-work of art", "Lee/I-work of art", "Rome/B-LOC", "met/O", "Bo/B-PER"]
    assert build("ner", *three(part("train.conll", sentences(*rows)))).labels == ["LOC", "PER", "work of art"]


def test_beside_another_of_its_type_an_iob1_entity_begins_with_b() -> None:
    rows = ["Ann/I-PER", "Bo/B-PER", "Lee/I-PER", "Rome/I-LOC"]
    table = build("ner", *three(part("train.conll", sentences(*rows)))).tables["train"]
    assert table.to_pylist()[0]["tags"] == ["B-PER", "B-PER", "I-PER", "B-LOC"]


def test_broken_ner_rows_are_named() -> None:
    short = jsonl("train.jsonl", [{"tokens": ["a"], "tags": ["O"]}, {"tokens": ["a", "b"], "tags": ["O"]}])
    fails("ner", short, match=r"train.jsonl line 2: 2 tokens but 1 tags")
    inner = jsonl("train.jsonl", [{"tokens": ["a", "b", "c"], "tags": ["B-X", "O", "I-X"]}])
    fails("ner", inner, match=r"train.jsonl line 1, tag 3: broken BIO")
    numbers = jsonl("train.jsonl", [{"tokens": ["a"], "tags": [3]}])
    fails("ner", numbers, match=r"column 'tags' is not a list of strings; numbers stand for names")
    printed = part(
        "train.csv", "tokens,tags\n\"['Ann' 'Lee']\",\"['B-PER'\n 'I-PER']\"\n"
    )  # read as AnnLee, B-PERI-PER
    fails(
        "ner", printed, match=r"train.csv row 1: column 'tokens' has lists without commas, as NumPy prints them; .*JSON"
    )
    quotes = jsonl("train.jsonl", [{"tokens": "['\"', '\"', 'a \\' \\' b']", "tags": '["B-X", "O", "O"]'}])
    assert build("ner", *three(quotes), labels=["LOC", "PER", "X"]).tables["train"].to_pylist()[0]["tokens"] == [
        '"',
        '"',
        "a ' ' b",
    ]
    spans = jsonl("train.jsonl", [{"text": "Ann left", "spans": [{"start": 0, "end": 3, "label": "PER"}]}])
    fails(
        "ner",
        spans,
        match=r"train.jsonl: a text with spans is not read; it has text, spans; bring its words as 'tok",
    )
    words = part("train.csv", "Sentence #,Word,Tag\nSentence: 1,Ann,B-PER\n,Lee,I-PER\n,left,O\n")
    named = {"tokens": "Word", "tags": "Tag"}
    fails(
        "ner",
        words,
        columns=named,
        match=r"train.csv: every row holds one word; a row is a sentence, or bring a .conll",
    )
    fails(
        "ner",
        *three(part("train.conll", GOOD)),
        labels=["PER"],
        match=r"train.conll line 5: entity type 'LOC' is not among",
    )
    fails("ner", *three(part("train.conll", "a\tO\n")), match="data.ner: train has no entity type")


# ---- times


def test_times_are_read_in_the_usual_forms() -> None:
    forms = ["2024-05-31", 20240531, "2024-05-31T12:00:00+02:00", 1717149600, 1717149600000, "1717149600", None, ""]
    rows = [{"text": str(number), "label": "a", "date": time} for number, time in enumerate(forms)]
    built = build(
        "sentiment",
        jsonl("t.jsonl", rows),
        jsonl("v.jsonl", rows[:1], "validation"),
        jsonl("e.jsonl", rows[:1], "test"),
    )
    noon = datetime.datetime(2024, 5, 31, 10)
    assert built.tables["train"].column("time").to_pylist() == [
        datetime.datetime(2024, 5, 31),
        datetime.datetime(2024, 5, 31),
        noon,
        noon,
        noon,
        noon,
        None,
        None,
    ]
    for odd in ("last week", "03/04/2024", "3.4.24"):  # of the third of April, or the fourth of March?
        row = jsonl("t.jsonl", [{"text": "x", "label": "a", "date": odd}])
        fails(
            "sentiment",
            row,
            match=r"t.jsonl line 1: column 'date' is not a time; write 2024-05-31T12:00:00 or sec.*, or",
        )
        fails("sentiment", row, match=r"leave the column out with data.sentiment.columns.time=null")


# ---- recommendation

ITEMS = "item_id,title,genres,tags\n1,Toy,Comedy|Drama,pixar|fun\n2,Heat,,\n"


def test_items_and_interactions_from_files() -> None:
    items = part("items.csv", ITEMS, "items")
    clicks = part(
        "interactions.csv", "userId,movieId,rating,timestamp\n7,1,4.5,100\n7,2,,2001-09-09T01:46:40\n", "interactions"
    )
    built = build("recommendation", items, clicks)
    assert built.tables["items"].to_pylist() == [
        {"item_id": "1", "title": "Toy", "description": "Comedy, Drama", "tags": "pixar|fun"},
        {"item_id": "2", "title": "Heat", "description": "", "tags": ""},
    ]
    assert built.tables["train"].to_pylist() == [
        {"user_id": "7", "item_id": "1", "timestamp": 100, "event": None, "rating": 4.5},
        {"user_id": "7", "item_id": "2", "timestamp": 1_000_000_000, "event": None, "rating": None},
    ]
    assert built.columns["items.description"] == "genres" and built.labels is None
    assert built.tables["test"].schema.equals(tables.SCHEMAS["interactions"])


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (",1,4,100", r"interactions.csv line 2: column 'user_id' is empty"),
        ("7,,4,100", r"interactions.csv line 2: column 'item_id' is empty"),
        ("7,1,4,", r"interactions.csv line 2: column 'timestamp' is not a time"),
        ("7,1,4,soon", r"interactions.csv line 2: column 'timestamp' is not a time"),
        ("7,1,many,100", r"interactions.csv line 2: column 'rating' is not a number; .*columns.rating=null"),
    ],
)
def test_unreadable_interactions_are_named(line: str, match: str) -> None:
    clicks = part("interactions.csv", f"user_id,item_id,rating,timestamp\n{line}\n", "interactions")
    fails("recommendation", part("items.csv", ITEMS, "items"), clicks, match=match)


def test_a_mapped_column_of_one_of_the_two_files_suffices() -> None:
    items = part("items.csv", ITEMS, "items")
    clicks = part("interactions.csv", "who,item_id,timestamp\n7,1,100\n", "interactions")
    assert build("recommendation", items, clicks, columns={"user_id": "who"}).tables["train"].num_rows == 1
    fails(
        "recommendation", items, clicks, columns={"user_id": "who", "event": "x"}, match=r"columns.event: no column 'x'"
    )


def test_items_and_interactions_may_call_the_item_differently() -> None:
    clicks = part("interactions.csv", "user_id,isbn,timestamp\n7,1,100\n", "interactions")
    named = {"item_id": "isbn"}
    built = build("recommendation", part("items.csv", ITEMS, "items"), clicks, columns=named)
    assert (built.columns["items.item_id"], built.columns["interactions.item_id"]) == ("item_id", "isbn")
    odd = part("items.csv", ITEMS.replace("item_id", "book_no"), "items")
    match = (
        r"no column 'isbn' \(data.recommendation.columns.item_id\), nor one of a usual name, such as 'item_id'; it has"
    )
    fails("recommendation", odd, clicks, columns=named, match=match)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("1,Heat", r"new.csv line 3: item id '1' is also that of .*new.csv line 2"),
        (",Heat", r"new.csv line 3: column 'item_id' is empty"),
        ("2,", r"new.csv line 3: column 'title' is empty"),
    ],
)
def test_new_items_that_cannot_be_told_apart_are_named(line: str, match: str) -> None:
    Path("new.csv").write_text(f"item_id,title\n1,Toy\n{line}\n")
    with pytest.raises(UserError, match=match):
        tables.read_items(Path("new.csv"), {})


def test_what_a_list_lacks_leaves_no_gap() -> None:
    Path("new.jsonl").write_text('{"item_id": 1, "title": "Toy", "genres": ["Drama", null, ""], "tags": [null]}\n')
    [item] = tables.read_items(Path("new.jsonl"), {})
    assert (item["description"], item["tags"]) == ("Drama", "")


def test_new_items_have_the_columns_that_ingested_ones_have() -> None:
    Path("new.csv").write_text("sku,title,who\n7,Toy,x\n")
    [item] = tables.read_items(Path("new.csv"), {"item_id": "sku", "user_id": "reader"})
    assert (item["item_id"], item["title"]) == ("7", "Toy")


def test_the_last_of_each_user_is_left_out_ties_by_item() -> None:
    def click(user: str, item: str, time: int) -> dict:
        return {"user_id": user, "item_id": item, "timestamp": time}

    rows = [
        click("a", "3", 5),
        click("a", "9", 1),
        click("a", "2", 5),
        click("b", "1", 1),
        click("b", "2", 2),
        click("a", "1", 5),
    ]
    found = tables.leave_last_out(rows)
    assert found["test"] == [click("a", "3", 5)] and found["validation"] == [click("a", "2", 5)]
    assert found["train"] == [click("a", "9", 1), click("a", "1", 5), click("b", "1", 1), click("b", "2", 2)]
    assert tables.leave_last_out(rows[::-1]) == found


def test_an_item_that_was_read_before_is_never_the_next_one(capsys: pytest.CaptureFixture[str]) -> None:
    """It is not offered again, so that a test row with it could not be answered."""
    items = part("items.csv", "item_id,title\n" + "".join(f"{n},Toy {n}\n" for n in range(1, 5)), "items")
    read = "".join(f"ann,{item},{100 + time}\n" for time, item in enumerate("12131432"))
    clicks = part("interactions.csv", f"user_id,item_id,timestamp\n{read}", "interactions")
    built = build("recommendation", items, clicks).tables
    found = {split: "".join(built[split]["item_id"].to_pylist()) for split in ("train", "validation", "test")}
    assert found == {"train": "12", "validation": "3", "test": "4"}
    assert "had interacted with before: 4 of 8 interactions" in capsys.readouterr().err


# ---- writing


def test_equal_rows_are_equal_bytes() -> None:
    built = build("sentiment", jsonl("a.jsonl", reviews(100), "all"))
    again = build("sentiment", jsonl("a.jsonl", reviews(100), "all"))
    tables.write(built.tables["train"], Path("1.parquet"))
    tables.write(again.tables["train"], Path("2.parquet"))
    assert Path("1.parquet").read_bytes() == Path("2.parquet").read_bytes()
    assert list(pd.read_parquet("1.parquet").columns) == ["id", "text", "label", "topic", "time"]
