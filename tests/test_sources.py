"""Sources: what a URI resolves to, what the lock pins, and the one line that says what is wrong with an input."""

import gzip
import http.server
import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memgpt import sources
from memgpt.config import Source
from memgpt.errors import UserError
from memgpt.sources import formats, licences, naming, sample
from memgpt.sources.naming import Part

SECRET = "Zanzibar quarterly"  # stands in the rows; may never stand in a message


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put(path: str, content: str | bytes) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    target.write_bytes(gzip.compress(data, mtime=0) if path.endswith(".gz") else data)
    return target


def row(text: str = "a text", label: str = "good") -> str:
    return json.dumps({"text": text, "label": label}) + "\n"


def fails(name: str, uri: str, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        sources.resolve(name, Source(uri=uri))
    assert "\n" not in str(caught.value)


def roles(uri: str, name: str = "sentiment") -> dict[str, str]:
    return {Path(file["path"]).name: file["role"] for file in sources.resolve(name, Source(uri=uri))["files"]}


# ---- names


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.csv", "train"),
        ("train-00-of-04.jsonl.gz", "train"),
        ("training_1.csv", "train"),
        ("dev.conll", "validation"),
        ("valid.txt", "validation"),
        ("validation-1.parquet", "validation"),
        ("test.jsonl", "test"),
        ("reviews.csv", None),
        ("testimony.txt", None),
        ("trainers.csv", None),
        ("trainset.csv", "train"),
        ("devel.conll", "validation"),
        ("validate.csv", "validation"),
        ("wnut17train.conll", "train"),
        ("eng.testa", "validation"),
        ("eng.testb", "test"),
        ("testable.csv", None),
    ],
)
def test_a_files_name_says_its_split(name: str, split: str | None) -> None:
    assert naming.split_of(name) == split


def test_a_folder_gives_its_splits_and_nothing_else() -> None:
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl", "extra.jsonl", ".hidden.jsonl", "sub/train.jsonl"):
        put(f"set/{name}", row())
    put("set/README.txt", "about")
    put("set/LICENSE.txt", "Creative Commons Attribution-NonCommercial-ShareAlike 3.0 Unported")
    assert roles("set") == {"train.jsonl": "train", "dev.jsonl": "validation", "test.jsonl": "test"}
    entry = sources.resolve("sentiment", Source(uri="set"))
    assert (entry["licence"], entry["non_commercial"], entry["family"]) == ("CC-BY-NC-SA-3.0", True, "file:set")
    assert [file["path"] for file in entry["files"]] == ["set/dev.jsonl", "set/test.jsonl", "set/train.jsonl"]


def test_no_split_is_left_out_unseen(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train.csv", "notes.csv"):
        put(f"some/{name}", "text,label\na,b\n")
    assert roles("some") == {"train.csv": "train"}
    assert (
        "data.sentiment.uri: left out, since others name a split and these do not: notes.csv" in capsys.readouterr().err
    )
    put("some/eval.py", "print()")
    assert roles("some") == {"train.csv": "train"}
    put("some/reviews.test.annotated", "a")
    fails(
        "sentiment", "some", r"reviews.test.annotated names the split test, which no other file gives, but is in no for"
    )
    put("some/test.csv", "text,label\na,b\n")
    assert roles("some") == {"train.csv": "train", "test.csv": "test"}


def test_what_is_neither_items_nor_interactions_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("items.csv", "interactions.csv", "users.csv"):
        put(f"shop/{name}", "item_id,title\n1,a\n")
    assert roles("shop", "recommendation") == {"items.csv": "items", "interactions.csv": "interactions"}
    told = capsys.readouterr().err
    assert told == "data.recommendation.uri: left out, neither items nor interactions: users.csv\n"


def test_tagged_words_go_by_many_names() -> None:
    for name in ("eng.train", "eng.testa", "eng.testb", "README.txt"):
        put(f"conll/{name}", "Ann NNP B-PER\n")
    assert roles("conll", "ner") == {"eng.train": "train", "eng.testa": "validation", "eng.testb": "test"}
    rows = formats.read(Part("train", "eng.train", Path("conll/eng.train")), "ner")
    assert rows.frame.to_dict("list") == {"tokens": [["Ann"]], "tags": [["B-PER"]]} and rows.token_lines == [[1]]
    put("a.txt", "Ann B-PER\n")
    assert formats.read(Part("train", "a.txt", Path("a.txt")), "ner").frame["tags"].tolist() == [["B-PER"]]
    assert read("a.txt").frame["text"].tolist() == ["Ann B-PER"]


def test_a_glob_never_descends() -> None:
    put("set/train-0.jsonl.gz", row())
    put("set/train-1.jsonl.gz", row())
    put("set/deeper/test.jsonl.gz", row())
    assert roles("set/*") == {"train-0.jsonl.gz": "train", "train-1.jsonl.gz": "train"}
    assert roles("set/**") == roles("set/*")


def test_a_glob_over_folders_finds_their_splits() -> None:
    for name in ("train/part-0.jsonl", "train/part-1.jsonl", "test/part-9.jsonl", "test/dev-0.jsonl"):
        put(f"set-for-tests/{name}", row())
    splits = {"part-0.jsonl": "train", "part-1.jsonl": "train", "part-9.jsonl": "test", "dev-0.jsonl": "validation"}
    assert roles("set-for-tests/*/*.jsonl") == splits
    put("dev-blog/a.jsonl", row())
    assert roles("dev-blog/*") == roles("dev-blog") == {"a.jsonl": "all"}


def test_unsplit_files_are_one_whole() -> None:
    put("one/reviews.jsonl", row())
    assert roles("one/reviews.jsonl") == roles("one") == roles("one/*.jsonl") == {"reviews.jsonl": "all"}
    put("items/items.csv", "item_id,title\n1,a\n")
    put("items/interactions.csv", "user_id,item_id,timestamp\n1,1,1\n")
    assert roles("items", "recommendation") == {"items.csv": "items", "interactions.csv": "interactions"}


def test_what_cannot_be_resolved_is_said_in_one_line() -> None:
    put("mixed/train.jsonl", row())
    put("mixed/train.csv", "text,label\na,b\n")
    put("partly/train.jsonl", row())
    put("partly/more.jsonl", row())
    put("held/dev.jsonl", row())
    put("held/test.jsonl", row())
    put("other/notes.xlsx", "x")
    put("items/items.csv", "item_id,title\n1,a\n")
    fails("ner", "ftp://host/x", "data.ner.uri: unknown scheme ftp://")
    fails("ner", "file:///x", "unknown scheme file://.*a local path has none")
    fails("ner", " ", "data.ner.uri: empty")
    fails("ner", "nowhere", "data.ner.uri: nowhere: no such file or folder")
    fails("ner", "nowhere/*.conll", "no data files at nowhere")
    fails("ner", "other", "no data files at other; formats are .conll, .jsonl")
    put("nested/train/part-0.jsonl", row())
    fails("sentiment", "nested/", r"data.sentiment.uri: nested/ holds folders but no data files; write nested/\*/\*")
    fails("ner", "other/notes.xlsx", "notes.xlsx: not a format that is read")
    fails("sentiment", "mixed", "train comes in more than one format at mixed: train.csv, train.jsonl")
    fails("sentiment", "partly/*", "more.jsonl names no split while others do")
    fails("sentiment", "held", "no train file at held")
    fails(
        "recommendation",
        "items",
        r"no interactions file at items; needed are items.\* and interactions.\*, found items.csv; ren",
    )
    fails("ner", "sample://newspaper", "the embedded data is sample://newsroom")
    fails("ner", "sample://newsroom?size=3", "unknown option 'size'")
    fails("ner", "sample://newsroom?scale=big", "scale must be a number")
    fails("ner", "sample://newsroom?scale=0", "scale must be above 0")


def test_licences_are_named_and_the_non_commercial_flagged() -> None:
    by_nc_sa = (
        "This work is licensed under the Creative Commons Attribution-NonCommercial-ShareAlike 3.0 Unported License."
    )
    assert licences.from_text(by_nc_sa, "L") == ("CC-BY-NC-SA-3.0", True)
    assert licences.from_text("Creative Commons Attribution 4.0 International", "L") == ("CC-BY-4.0", False)
    apache = (Path(__file__).parents[1] / "LICENSE").read_text()
    assert licences.from_text(apache, "LICENSE") == ("Apache-2.0", False)
    house = "The user may not use this information for any commercial or revenue-bearing purposes."
    assert licences.from_text(house, "LICENSE.txt") == ("see LICENSE.txt", True)
    assert licences.from_text("Do as you like.", "LICENSE") == ("see LICENSE", False)
    assert licences.non_commercial("cc-by-nc-4.0") and not licences.non_commercial("CC-BY-4.0")
    assert not licences.non_commercial(None)


# ---- the lock


def test_the_lock_is_byte_stable_and_written_only_when_it_changes() -> None:
    put("set/train.jsonl", row())
    entries = {"ner": sources.resolve("ner", Source(uri="set"))}
    assert sources.write_lock(entries)
    before = (sources.LOCK.read_bytes(), sources.LOCK.stat().st_mtime_ns)
    assert not sources.write_lock({"ner": sources.resolve("ner", Source(uri="set"))})
    assert (sources.LOCK.read_bytes(), sources.LOCK.stat().st_mtime_ns) == before
    put("set/train.jsonl", row("another"))
    assert sources.write_lock({"ner": sources.resolve("ner", Source(uri="set"))})


def test_only_the_locked_content_is_fetched() -> None:
    source = Source(uri="set")
    path = put("set/train.jsonl", row())
    sources.write_lock({"ner": sources.resolve("ner", source)})
    entry = sources.read_lock("ner", source)
    assert [part.path for part in sources.fetch("ner", source, entry)] == [Path("set/train.jsonl")]
    path.write_text(row("b text"))  # of the same size
    with pytest.raises(UserError, match=r"set/train.jsonl: changed since the snapshot of ner; run `memgpt snapshot`"):
        sources.fetch("ner", source, entry)
    path.unlink()
    with pytest.raises(UserError, match=r"gone since the snapshot"):
        sources.fetch("ner", source, entry)


def test_a_lock_of_another_source_is_refused() -> None:
    put("set/train.jsonl", row())
    with pytest.raises(UserError, match="nothing locked for ner; run `memgpt snapshot`"):
        sources.read_lock("ner", Source(uri="set"))
    sources.write_lock({"ner": sources.resolve("ner", Source(uri="set"))})
    with pytest.raises(UserError, match=r"data.ner.uri is other but .* has set; run `memgpt snapshot`"):
        sources.read_lock("ner", Source(uri="other"))
    put("data/sources.lock.json", "{")
    with pytest.raises(UserError, match="not valid JSON; run `memgpt snapshot`"):
        sources.read_lock("ner", Source(uri="set"))
    put("data/sources.lock.json", '{"ner": {"uri": "set"}}')
    with pytest.raises(UserError, match="not complete"):
        sources.read_lock("ner", Source(uri="set"))


def test_the_sample_is_locked_by_its_generated_content(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(scale: float, seed: int) -> dict[str, dict[str, pd.DataFrame]]:
        return {"ner": {"train": pd.DataFrame({"id": ["1"], "tokens": [["a"]], "tags": [["O"]], "n": [seed]})}}

    monkeypatch.setattr(sample, "_generate", generate)
    source = Source(uri="sample://newsroom?scale=0.5&seed=3")
    entry = sources.resolve("ner", source)
    assert entry["family"] == "sample:newsroom" and entry["files"][0]["path"] == "ner/train"
    assert len(sources.fetch("ner", source, entry)) == 1
    monkeypatch.setattr(sample, "_generate", lambda scale, seed: generate(scale, seed + 1))
    with pytest.raises(UserError, match="ner/train changed since the snapshot of ner; run `memgpt snapshot`"):
        sources.fetch("ner", source, entry)


def test_a_digest_sees_every_value_and_does_not_tell_kinds_of_missing_apart() -> None:
    frame = pd.DataFrame({"a": ["x", None], "t": [pd.Timestamp("2024-01-01"), pd.NaT]})
    assert sample.digest(frame) == sample.digest(frame.copy())
    assert sample.digest(frame) != sample.digest(frame.rename(columns={"a": "b"}))
    assert sample.digest(frame) != sample.digest(frame.iloc[::-1])


# ---- formats


def read(path: str) -> formats.Rows:
    return formats.read(Part("train", path, Path(path)))


def test_every_format_gives_rows_and_where_they_stand() -> None:
    put("a.jsonl.gz", row("one") + "\n" + row("two"))
    rows = read("a.jsonl.gz")
    assert rows.frame["text"].tolist() == ["one", "two"] and rows.at(1) == "a.jsonl.gz line 3"
    put("a.csv", 'text,label\n"one, more",good\n,bad\n')
    assert (
        read("a.csv").frame.values.tolist() == [["one, more", "good"], ["", "bad"]]
        and read("a.csv").at(0) == "a.csv line 2"
    )
    put("b.csv", 'text,label\n"one\nmore",good\ntwo,bad\n\n')
    assert read("b.csv").at(1) == "b.csv row 2" and len(read("b.csv").frame) == 2
    put("c.csv", "text,label\none,good,\ntwo,bad,\n")  # as some programs end each line
    assert read("c.csv").frame.values.tolist() == [["one", "good"], ["two", "bad"]]
    put("c.csv", "text,label\none,good\n\n,\ntwo,\n")  # a blank line is no row
    assert read("c.csv").frame.values.tolist() == [["one", "good"], ["", ""], ["two", ""]]
    assert read("c.csv").at(1) == "c.csv line 4"
    put("c.csv", "text\none\n\ntwo\n")
    assert read("c.csv").frame["text"].tolist() == ["one", "", "two"]
    put("d.csv", "text , label\none,good\n")
    assert list(read("d.csv").frame.columns) == ["text", "label"]
    put("a.txt", "one\nmore\n\n\ntwo\u2028still two\n")
    assert (
        read("a.txt").frame["text"].tolist() == ["one\nmore", "two\u2028still two"]
        and read("a.txt").at(1) == "a.txt line 5"
    )
    put("a.tsv", 'sentence\tlabel\nthe "best, of all\t1\n')
    assert read("a.tsv").frame.values.tolist() == [['the "best, of all', "1"]]
    put("a.conll", "-DOCSTART- -X- O\nAnn NNP B-PER\nsmiles VBZ O\n-DOCSTART- -X- O\n\n\nYes\tO\r\n")
    assert read("a.conll").frame["tokens"].tolist() == [["Ann", "smiles"], ["Yes"]]
    assert (
        read("a.conll").frame["tags"].tolist() == [["B-PER", "O"], ["O"]] and read("a.conll").at(1) == "a.conll line 7"
    )
    put("b.conll", " 10\u00a0000  CD O \n\u3000 O\n\n\u00a0\tO\n")  # blanks of other kinds belong to the token
    assert read("b.conll").frame["tokens"].tolist() == [["10\u00a0000", "\u3000"], ["\u00a0"]]
    pd.DataFrame({"text": ["one"], "n": [3]}).to_parquet("a.parquet")
    assert read("a.parquet").frame.values.tolist() == [["one", 3]] and read("a.parquet").at(0) == "a.parquet row 1"
    columns = {"text": pa.array(["ö".encode()]), "tokens": pa.array([[b"a"]]), "other": pa.array([b"\xff"])}
    pq.write_table(pa.table(columns), "bytes.parquet")
    assert read("bytes.parquet").frame.values.tolist() == [["ö", ["a"], b"\xff"]]
    features = {
        "label": {"names": ["bad", "good"], "_type": "ClassLabel"},
        "text": {"dtype": "string", "_type": "Value"},
    }
    table = pa.table({"text": ["one", "two"], "label": [1, -1]})
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(said), "hub.parquet")  # the hub's own files name their numbers
    assert read("hub.parquet").frame["label"].tolist() == ["good", None]
    put("bom.csv", b"\xef\xbb\xbftext\none\n")
    assert list(read("bom.csv").frame.columns) == ["text"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b"", r"a.jsonl: empty"),
        ("a.jsonl", b" \n\n", r"a.jsonl: empty"),
        ("a.csv", b"text,label\n", r"a.csv: holds no rows"),
        ("a.jsonl", row(SECRET).encode() + b'{"text": "Zanzibar quarterly', r"line 2: not valid JSON .*cut off there"),
        ("a.jsonl", b'{"text": 1,}\n{"text": "Zanzibar quarterly"}\n', r"a.jsonl line 1: not valid JSON"),
        ("a.jsonl", b'["Zanzibar quarterly"]\n', r"a.jsonl line 1: expected a JSON object"),
        ("a.csv", b"text\nok\nZanzibar quarterly \xff\n", r"a.csv line 3: byte 27 \(0xff\) is not UTF-8"),
        ("a.csv", b"text,label\nok,b\nZanzibar quarterly,b,c\n", r"not a well-formed CSV file .*line 3"),
        ("a.csv", b"text\nok\nin Zanzibar, quarterly\n", r"not a well-formed CSV file .*line 3"),
        ("a.csv", b"text\nin Zanzibar, quarterly\nok\n", r"a.csv line 2: 2 fields, but the header names 1; .* quotes"),
        ("a.csv", b"\xef\xbb\xbf", r"a.csv: empty"),
        ("a.csv", b'text\nok\n"Zanzibar\nmore\n"odd" end\n', r"a.csv line 3: a quoted field that does not end where"),
        (
            "a.csv",
            b'text\n"Zanzibar ' + b"more\n" * 30_000 + b'"odd" end\n',
            r"a.csv line 2: a quoted field that does not",
        ),
        ("a.csv", b"text\n" + b"Zanzibar" * 20_000 + b", quarterly\nok\n", r"a.csv line 2: 2 fields, but the header"),
        (
            "a.tsv",
            b"text\tlabel\nZanzibar\tb\tc\n",
            r"a.tsv line 2: 3 fields, but the header names 2; a text holds no tab",
        ),
        ("a.jsonl", b"[" * 200_000, r"a.jsonl line 1: JSON that is nested too deeply"),
        ("a.conll", b"Zanzibar quarterly\nAnn\n", r"a.conll line 2: expected a token and its tag"),
        (
            "a.conll",
            b"1 Zanzibar O\n2 shop O\n\n1 Yes O\n",
            r"a.conll: the first column numbers the words; leave it out",
        ),
        ("a.conll", b"-DOCSTART- -X- O\n", r"a.conll: holds no rows"),
        ("a.parquet", b"PAR1 Zanzibar quarterly", r"a.parquet: not a readable Parquet file, or truncated"),
    ],
)
def test_a_damaged_file_is_named_and_its_text_is_not_shown(name: str, content: bytes, match: str) -> None:
    put(name, content)
    with pytest.raises(UserError, match=match) as caught:
        read(name)
    assert "Zanzibar" not in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_files_are_refused() -> None:
    whole = put("a.jsonl.gz", row(SECRET) * 100).read_bytes()
    Path("a.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"a.jsonl.gz: truncated"):
        read("a.jsonl.gz")
    Path("a.jsonl.gz").write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"a.jsonl.gz: not gzip data"):
        read("a.jsonl.gz")
    Path("a.jsonl.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"a.jsonl.gz: empty"):
        read("a.jsonl.gz")
    pd.DataFrame({"text": [SECRET] * 1000}).to_parquet("a.parquet")
    Path("a.parquet").write_bytes(Path("a.parquet").read_bytes()[:-50])
    with pytest.raises(UserError, match=r"a.parquet: not a readable Parquet file, or truncated"):
        read("a.parquet")


# ---- S3, over HTTP


@pytest.fixture(scope="module")
def endpoint():  # type: ignore[no-untyped-def]
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    import boto3

    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    client = boto3.client("s3", region_name="us-east-1")
    name = f"bucket{time.time_ns()}"
    client.create_bucket(Bucket=name)

    def upload(key: str, text: str) -> None:
        client.put_object(Bucket=name, Key=key, Body=text.encode())

    upload.name, upload.client = name, client  # type: ignore[attr-defined]
    return upload


def lock(uri: str, name: str = "sentiment") -> dict:
    return sources.resolve(name, Source(uri=uri))


def texts(uri: str, entry: dict, name: str = "sentiment") -> dict[str, list[str]]:
    return {
        part.role: formats.read(part).frame["text"].tolist() for part in sources.fetch(name, Source(uri=uri), entry)
    }


def test_s3_lists_page_by_page_and_fetches_what_is_locked(bucket, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from memgpt.sources import s3

    monkeypatch.setattr(s3, "PAGE", 2)
    for number in range(7):
        bucket(f"set/train-{number}.jsonl", row(f"text {number}"))
    bucket("set/test.jsonl", row("held out"))
    bucket("set/deeper/test-2.jsonl", row("not this one"))
    bucket("set/LICENSE", "Creative Commons Attribution-NonCommercial 4.0")
    uri = f"s3://{bucket.name}/set"
    entry = lock(uri)
    assert len(entry["files"]) == 8 and entry["family"] == f"s3:{bucket.name}/set"
    assert (entry["licence"], entry["non_commercial"]) == ("CC-BY-NC-4.0", True)
    assert texts(uri, entry)["test"] == ["held out"]
    assert lock(f"{uri}/")["files"] == entry["files"] and lock(f"{uri}/*.jsonl")["files"] == entry["files"]
    assert [file["role"] for file in lock(f"{uri}/test.jsonl")["files"]] == ["all"]
    # from the cache now: the endpoint is not asked again
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert texts(uri, entry)["test"] == ["held out"]


def test_s3_refuses_an_object_that_changed(bucket) -> None:  # type: ignore[no-untyped-def]
    uri = f"s3://{bucket.name}/one.jsonl"
    bucket("one.jsonl", row("before"))
    entry = lock(uri)
    bucket("one.jsonl", row("later!"))
    with pytest.raises(UserError, match=r"one.jsonl: changed since the snapshot of sentiment; run `memgpt snapshot`"):
        sources.fetch("sentiment", Source(uri=uri), entry)
    bucket.client.delete_object(Bucket=bucket.name, Key="one.jsonl")
    with pytest.raises(UserError, match="changed since the snapshot"):
        sources.fetch("sentiment", Source(uri=uri), entry)


def test_s3_fetches_the_locked_version_of_a_versioned_bucket(bucket) -> None:  # type: ignore[no-untyped-def]
    bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    uri = f"s3://{bucket.name}/one.jsonl"
    bucket("one.jsonl", row("before"))
    entry = lock(uri)
    bucket("one.jsonl", row("later!"))
    assert entry["files"][0]["version"] and texts(uri, entry) == {"all": ["before"]}
    assert lock(uri)["files"] != entry["files"]


@pytest.fixture
def cutting(endpoint: str):  # type: ignore[no-untyped-def]
    """A proxy that cuts the bodies of so many object downloads: `proxy.cuts`. With `proxy.encrypted`, objects have what
    S3 says of those encrypted by KMS: an ETag that looks like a checksum and is none."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.forward()

        def do_GET(self) -> None:
            self.forward()

        def forward(self) -> None:
            asked = {key: value for key, value in self.headers.items() if not (server.encrypted and key == "If-Match")}
            request = urllib.request.Request(endpoint + self.path, method=self.command, headers=asked)
            try:
                with urllib.request.urlopen(request) as answer:
                    status, headers, body = answer.status, answer.headers, answer.read()
            except urllib.error.HTTPError as error:
                status, headers, body = error.code, error.headers, error.read()
            self.send_response(status)
            for key, value in headers.items():
                if server.encrypted and key.lower() == "etag":
                    value = '"0123456789abcdef0123456789abcdef"'
                    self.send_header("x-amz-server-side-encryption", "aws:kms")
                if key.lower() not in ("transfer-encoding", "connection", "server", "date"):
                    self.send_header(key, value)
            self.end_headers()
            if self.command == "GET" and self.path.partition("?")[0].endswith(".jsonl") and server.cuts > 0:
                server.cuts -= 1
                body = body[: len(body) // 2]
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.cuts, server.encrypted = 0, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_s3_retries_a_truncated_download_and_names_one_that_stays_so(
    bucket, cutting, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    uri = f"s3://{bucket.name}/one.jsonl"
    bucket("one.jsonl", row(SECRET) * 50)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{cutting.server_address[1]}")
    entry = lock(uri)
    cutting.cuts = 1000
    with pytest.raises(UserError, match=r"one.jsonl: arrives damaged or truncated"):
        sources.fetch("sentiment", Source(uri=uri), entry)
    assert not list(Path(".memgpt").rglob("*.jsonl"))  # nothing half is left to be taken for whole
    cutting.cuts = 1
    assert len(texts(uri, entry)["all"]) == 50


def test_s3_objects_encrypted_by_kms_can_be_read(bucket, cutting, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    uri = f"s3://{bucket.name}/one.jsonl"
    bucket("one.jsonl", row("a text") * 3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{cutting.server_address[1]}")
    cutting.encrypted = True
    assert len(texts(uri, lock(uri))["all"]) == 3


def test_s3_mistakes_are_said_in_one_line_within_seconds(bucket, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    fails("ner", "s3://nobodys-bucket/x", "data.ner.uri: s3://nobodys-bucket/x: no such bucket")
    fails("ner", f"s3://{bucket.name}/nothing", "no data files at")
    fails("ner", "s3://", "names no bucket")
    fails("ner", "s3://Not_a bucket!/x", "not a valid bucket name")
    fails("ner", "s3://key:secret@bucket/x", "credentials do not belong in a URI")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    fails("ner", "s3://bucket/x", r"S3 at http://127.0.0.1:9 cannot be reached .*check AWS_ENDPOINT_URL")
    assert time.monotonic() - started < 20
    monkeypatch.setenv("AWS_PROFILE", "nobodys")
    fails("ner", "s3://bucket/x", r"no profile 'nobodys' in ~/\.aws; check AWS_PROFILE")


def test_s3_region_is_that_of_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    from memgpt.sources import s3

    (tmp_path / "config").write_text("[profile news]\nregion = eu-central-1\n", encoding="utf-8")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "news")
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # which has read another
    assert s3.connect().meta.region_name == "eu-central-1"


# ---- the hub


def test_a_local_hub_folder_is_read_by_datasets_with_labels_named() -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    tags = List(ClassLabel(names=["O", "B-PER", "I-PER"]))
    kinds = Features({"tokens": List(Value("string")), "ner_tags": tags})
    Path("toy").mkdir()
    for split, tokens in (("train", ["Ann", "Lee"]), ("test", ["Bo", "Li"])):
        Dataset.from_dict({"tokens": [tokens], "ner_tags": [[1, 2]]}, features=kinds).to_parquet(f"toy/{split}.parquet")
    put("toy/README.md", "---\nlicense: cc-by-nc-4.0\n---\n")
    source = Source(uri="hf://./toy")
    entry = sources.resolve("ner", source)
    assert (entry["licence"], entry["non_commercial"]) == ("cc-by-nc-4.0", True)
    assert entry["files"][0]["revision"].startswith("sha256:")
    parts = {part.role: formats.read(part).frame for part in sources.fetch("ner", source, entry)}
    assert parts["train"]["tokens"].tolist() == [["Ann", "Lee"]] and parts["test"]["ner_tags"].tolist() == [
        ["B-PER", "I-PER"]
    ]
    assert entry["files"] == sources.resolve("ner", source)["files"]
    put("toy/extra.txt", "more")
    assert entry["files"] != sources.resolve("ner", source)["files"]


def test_a_changed_local_hub_folder_is_refused() -> None:
    put("toy/train.csv", "text,label\nfine,good\n")
    source = Source(uri="hf://./toy?split=train")
    entry = sources.resolve("sentiment", source)
    put("toy/train.csv", "text,label\nfine,bad\n")
    with pytest.raises(UserError, match=r"toy: changed since the snapshot of sentiment"):
        sources.fetch("sentiment", source, entry)
    entry = sources.resolve("sentiment", source)
    assert [part.role for part in sources.fetch("sentiment", source, entry)] == ["all"]


def test_the_hub_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from memgpt.sources import hub

    class Unreachable:
        def dataset_info(self, *_: object, **__: object) -> None:
            raise hub.HTTPError("name or service not known")

    monkeypatch.setattr(hub, "HfApi", Unreachable)
    advice = r"the hub cannot be reached .*download the set on a machine with network.*set data.ner.uri to its folder"
    fails("ner", "hf://org/name", advice)
    entry = {
        "uri": "hf://org/name",
        "scheme": "hf",
        "files": [{"path": "org/name", "config": None, "split": None, "revision": "1"}],
    }
    with pytest.raises(UserError, match=advice):
        sources.fetch("ner", Source(uri="hf://org/name"), entry)
    fails("ner", "hf://org/name?revision=1", "unknown option 'revision'; hf:// takes config and split")
    fails("ner", "hf://./nowhere", "no such folder")
    fails("ner", "hf://a/b/c", "names no data set")


@pytest.mark.parametrize(
    "name, split",
    [
        ("train-00-of-04", "train"),
        ("news_train", "train"),
        ("news.dev", "validation"),
        ("eval", "validation"),
        ("reviews", None),
        ("contest", None),
        ("pretrained", None),
    ],
)
def test_a_split_is_named_anywhere_in_a_file_name(name: str, split: str | None) -> None:
    from memgpt.sources.naming import split_of

    assert split_of(name) == split
