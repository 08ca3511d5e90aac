"""Where texts are cut: nothing is lost, nothing is too long, and edits move few borders."""

from __future__ import annotations

import random
import sys
import tracemalloc
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbert_pg.errors import DeclarationError
from sbert_pg.passages import FixedChunker, LangChainChunker, SentenceChunker, use_chunker
from sbert_pg.passages.cutting import chunker_of, counter, cut, embedded_text
from sbert_pg.passages.structure import sentences
from sbert_pg.spec import EncoderSpec
from sbert_pg.testing import DeterministicEncoder


class Short(DeterministicEncoder):
    """Reads 40 words and signs."""

    @property
    def spec(self) -> EncoderSpec:
        return EncoderSpec(name="short", dimensions=8, max_seq_length=40)


ENCODER = Short(dimensions=8)
CHUNKERS = [SentenceChunker(12, 32), SentenceChunker(12, 32, overlap=10), FixedChunker(30, 8)]
PIECES = st.sampled_from([
    "A sentence. ", "Another one, longer than the first? ", "Dr. Who said 3.14 e.g. once. ", "\n\n",
    "# Heading\n", "## Sub\n\n", "- item one\n- item two\n", "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "```\ncode = 1\n\n# no heading\n```\n", "<h2>Title</h2>", "<ul><li>x</li></ul>", "你好。世界！",
    "word " * 50, "x" * 300, "日本語" * 30, "é\u0301 ", "\u00a0", "<table>", "```\n", "===\n",
])  # fmt: skip


def cut_all(text: str, chunker: Any, titles: Sequence[str | None] = ()) -> list[Any]:
    return list(cut(titles, text, chunker, ENCODER))


@given(st.lists(PIECES, max_size=25).map("".join), st.sampled_from(CHUNKERS))
@settings(max_examples=150, deadline=None)
def test_nothing_is_lost_or_too_long(text: str, chunker: Any) -> None:
    passages = cut_all(text, chunker, ["A title of some words"])
    tokens = counter(ENCODER)
    for passage in passages:
        part = text[passage.start : passage.stop]
        assert tokens([embedded_text(passage.heading, part)])[0] <= 40
    held = " ".join(f"{p.heading} {text[p.start : p.stop]}" for p in passages)
    covered = {i for p in passages for i in range(p.start, p.stop)}
    for i, character in enumerate(text):
        # Of a heading the words stand in the path of what is under it.
        assert (
            i in covered or character in "#=<>/h123456" or character.isspace() or character in held
        )
    assert [p.start for p in passages] == sorted(p.start for p in passages)


def test_headings_lists_tables_and_code() -> None:
    text = (
        "Before.\n\n# One\n\nFirst. Second.\n\n## Two\n\n- a\n- b\n\n```\nx = 1\n\n# comment\n```\n"
        "\n# Three\n\n| a |\n|---|\n| 1 |\n\nEmpty\n=====\n\n<h3>Last &amp; <b>least</b></h3>End."
    )
    passages = [(p.heading, text[p.start : p.stop]) for p in cut_all(text, SentenceChunker(5, 36))]
    assert passages == [
        ("", "Before."),
        ("One", "First. Second."),
        ("One > Two", "- a\n- b\n\n```\nx = 1\n\n# comment\n```"),
        ("Three", "| a |\n|---|\n| 1 |"),
        ("Empty > Last &amp; least", "End."),
    ]


def test_a_heading_without_a_text_is_a_passage() -> None:
    passages = cut_all("# One\n\n# Two\n\nText.\n\n## Three\n", SentenceChunker(5, 30))
    assert [p.heading for p in passages] == ["", "Two", "Two"]
    assert len(passages) == 3


@pytest.mark.parametrize(("text", "due"), [
    ("Dr. Smith came. He left.", ["Dr. Smith came.", "He left."]),
    ("It costs 3.5 units. J. Doe paid.", ["It costs 3.5 units.", "J. Doe paid."]),
    ("今日は晴れ。明日は「雨。」そうです。", ["今日は晴れ。", "明日は「雨。」", "そうです。"]),
    ("这是一。这是二！真的？", ["这是一。", "这是二！", "真的？"]),
    ("यह एक है। यह दो है।", ["यह एक है।", "यह दो है।"]),
    ("Was? Ja! z. B. so etwas.", ["Was?", "Ja!", "z. B. so etwas."]),
    ("it is late. we go, e.g. home, at approx. ten. you stay.",
     ["it is late.", "we go, e.g. home, at approx. ten.", "you stay."]),
    ("We go, e.g. home, at ten. you Stay.", ["We go, e.g. home, at ten. you Stay."]),
    ("No end", ["No end"]), ("", []),
])  # fmt: skip
def test_sentences(text: str, due: list[str]) -> None:
    assert [text[a:b] for a, b in sentences(text)] == due


def test_sentences_of_a_language() -> None:
    pytest.importorskip("sentencex")
    text = "Das ist z. B. gut. Nr. 5 lebt. 今日。"
    spans = sentences(text, "de")
    assert "".join(text[a:b] for a, b in spans).replace(" ", "") == text.replace(" ", "")


def test_a_language_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencex", None)
    with pytest.raises(DeclarationError, match=r"sbert-pg\[sentences\]"):
        sentences("One. Two.", "en")


def test_edits_move_few_borders() -> None:
    """Against fixed windows, on the same edits."""
    random.seed(3)
    words = [f"w{n}" for n in range(400)]

    def sentence() -> str:
        return " ".join(random.choices(words, k=random.randint(6, 14))).capitalize() + "."

    kept: dict[str, list[float]] = {"content": [], "fixed": []}
    for _ in range(20):
        before = [sentence() for _ in range(120)]
        after = list(before)
        place = random.randrange(len(after))
        after[place : place + random.randint(0, 1)] = [sentence()]
        for name, chunker in (
            ("content", SentenceChunker(40, 110)),
            ("fixed", FixedChunker(75, 0)),
        ):
            old, new = (
                [p.digest for p in cut((), " ".join(text), chunker, DeterministicEncoder())]
                for text in (before, after)
            )
            kept[name].append(sum(digest in old for digest in new) / len(new))
    content, fixed = (sum(values) / len(values) for values in kept.values())
    assert content > 0.85
    assert fixed < 0.7


def test_overlap_repeats_whole_sentences() -> None:
    text = " ".join(f"This is sentence number {n} of the text." for n in range(40))
    plain, over = cut_all(text, SentenceChunker(12, 32)), cut_all(text, SentenceChunker(12, 32, 9))
    assert len(over) >= len(plain)
    assert all(b.start < a.stop for a, b in pairwise(over))
    assert all(text[p.start : p.stop].startswith("This is sentence") for p in over)


def test_a_splitter_of_langchains_kind() -> None:
    class Splitter:
        def split_text(self, text: str) -> list[str]:
            return [part.strip() for part in text.split("\n\n")]

    chunker = use_chunker(LangChainChunker("mine-v1", Splitter()))
    text = "One part.\n\nSame.\n\nSame.\n\n" + "long " * 60
    passages = cut_all(text, chunker_of(chunker.identity))
    assert [text[p.start : p.stop] for p in passages][:3] == ["One part.", "Same.", "Same."]
    assert len({p.start for p in passages}) == len(passages) > 4

    class Changing:
        def split_text(self, text: str) -> list[str]:
            return [text.upper()]

    with pytest.raises(DeclarationError, match="changes nothing"):
        cut_all("some text", LangChainChunker("bad", Changing()))


def test_what_cannot_be_declared() -> None:
    for arguments in ((0, 10), (20, 20), (20, 40, 30)):
        with pytest.raises(DeclarationError):
            SentenceChunker(*arguments)
    with pytest.raises(DeclarationError):
        FixedChunker(10, 10)


@pytest.mark.parametrize("kind", ["sentences", "no blank", "one paragraph of words"])
def test_a_large_document_is_cut_in_bounded_memory(kind: str) -> None:
    """2 MB here; it grows with the number of passages, and not with copies of the text."""
    size = 2_000_000
    text = {
        "sentences": "Some words of a sentence here. " * (size // 31),
        "no blank": "x" * size,
        "one paragraph of words": "word " * (size // 5),
    }[kind]
    tracemalloc.start()
    number = sum(1 for _ in cut((), text, SentenceChunker(12, 32), ENCODER))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number >= 1
    assert peak < 4 * size
