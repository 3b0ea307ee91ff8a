"""Held-out texts are found in the corpus, whatever their case, marks and line breaks, and removed by paragraph."""

import time

import numpy as np

from memgpt.overlap import HeldOut, clean, normalise

LONG = "Zeta Metals said on Monday that it will close two of its five mines in the north by May."


def test_normalise_reads_alike_what_reads_alike() -> None:
    assert (
        normalise("  The  Firm's\tEUR 1,070 mn . ")
        == normalise("the firm s eur 1 070 MN!")
        == "the firm s eur 1 070 mn"
    )
    assert normalise("Straße") == normalise("STRASSE")
    assert normalise(":-)") == ""


def test_a_long_text_is_found_by_thirteen_words_in_a_row() -> None:
    held_out = HeldOut(["something else entirely", LONG])
    words = LONG.split()
    assert held_out.hits(LONG).texts == {1}
    assert held_out.hits("intro\n\nAnd so: " + " ".join(words[3:16]).upper() + ", they say").lines == {2}
    assert held_out.hits(" ".join(words[:12]) + " but not the rest").texts == set()
    assert held_out.hits(" ".join(words[:7]) + " again " + " ".join(words[7:])).texts == set()


def test_a_run_of_words_may_span_lines() -> None:
    words = LONG.split()
    document = "first line\n" + " ".join(words[:8]) + "\n" + " ".join(words[8:]) + "\nlast line"
    assert HeldOut([LONG]).hits(document).lines == {1, 2}
    assert clean([document], HeldOut([LONG])) == (["first line\nlast line"], 2)


def test_a_short_text_is_found_as_a_line_or_a_sentence_only() -> None:
    held_out = HeldOut(["Profit fell .", "…"])
    assert held_out.hits("Sales rose.\nprofit fell").lines == {1}
    assert held_out.hits('"Sales rose." Profit fell! Nobody knew.').texts == {0}
    assert held_out.hits("The profit fell because of rain.").texts == set()


def test_clean_keeps_documents_aligned_and_counts() -> None:
    documents = [f"keep me\n{LONG}\nkeep me too", LONG, "untouched\n\nparagraphs"]
    cleaned, removed = clean(documents, HeldOut([LONG]))
    assert cleaned == ["keep me\nkeep me too", "", "untouched\n\nparagraphs"] and removed == 2
    assert clean(documents, HeldOut([])) == (documents, 0)


def test_hits_agree_with_a_plain_search_on_random_words() -> None:
    draw = np.random.default_rng(0)
    vocabulary = [f"w{number}" for number in range(4)]  # so few that runs repeat
    texts = [" ".join(draw.choice(vocabulary, 14)) for _ in range(300)]
    document = " ".join(draw.choice(vocabulary, 20_000))
    grams = [{" ".join(text.split()[start : start + 13]) for start in range(2)} for text in texts]
    expected = {index for index, two in enumerate(grams) if any(f" {gram} " in f" {document} " for gram in two)}
    planted = document + " " + texts[7]
    assert HeldOut(texts).hits(document).texts == expected
    assert HeldOut(texts).hits(planted).texts == expected | {7}


def test_a_million_words_take_seconds() -> None:
    draw = np.random.default_rng(0)
    vocabulary = np.array([f"word{number}" for number in range(20_000)])
    documents = [". ".join(" ".join(draw.choice(vocabulary, 15)) for _ in range(70)) for _ in range(1000)]
    held_out = HeldOut(" ".join(draw.choice(vocabulary, 20)) for _ in range(2000))
    started = time.monotonic()
    assert clean(documents, held_out)[1] == 0
    assert time.monotonic() - started < 20  # 0.5 s on an idle core
