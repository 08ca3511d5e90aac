"""Where a text may be cut: its headings, blocks that belong together, and sentences.

Markdown and HTML are read as far as their structure goes; text that is neither is sentences and
paragraphs. Offsets are characters of the text as it is, markup included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sbert_pg.errors import DeclarationError

#: Tokens of each of several texts, special tokens not included.
Tokens = Callable[[Sequence[str]], list[int]]
#: Longest block, in characters, that is looked for behind an opening tag or fence; what is longer
#: is cut anyway.
_LONGEST = 20_000
#: Headings, tables and lists, and the beginnings of blocks whose end is looked for by itself. No
#: text may take more than a time that is proportional to its length, whatever it is made of.
_MARKUP = re.compile(
    r"""
      ^[ ]{0,3}(?P<fence>`{3,16}(?!`)|~{3,16}(?!~))[^\n]*$
    | <(?P<tag>pre|table|ul|ol|dl)\b[^>]{0,500}>
    | <h(?P<html>[1-6])\b[^>]{0,500}>(?P<html_text>[\s\S]{0,1000}?)</h(?P=html)\s*>
    | ^[ ]{0,3}(?P<atx>\#{1,6})(?P<atx_text>[ \t][^\n]*)$
    | ^(?P<setext_text>\S[^\n]{0,300})\n(?P<setext>={2,}|-{3,})[ \t]*$
    | (?:^[ \t]*\|[^\n]*(?:\n|\Z))+
    | (?:^[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]+[^\n]*(?:\n|\Z)(?:^[ \t]+\S[^\n]*(?:\n|\Z))*)+
    """,
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)
_TAG = re.compile(r"<[^>]{0,500}>")
#: Ends of sentences: with a blank behind them in scripts that have blanks, by themselves in others.
#: A row of full stops is looked at from its first one alone, or a long one would be n * n steps.
_END = re.compile(
    r"""(?<![.!?…])[.!?…]+["'”’»)\]]*(?=\s) | [。！？｡]+[”’」』）】"')]* | [।॥؟۔։።။]+
    | \n[ \t]*\n | </p> | <br\s*/?>""",
    re.VERBOSE | re.IGNORECASE,
)
#: Characters before and behind a full stop that say whether a text has capitals.
_AROUND = 300
_LAST_WORD = re.compile(r"([^\W\d_]+(?:\.[^\W\d_]+)*)\.$")
_ABBREVIATED = """
    mr mrs ms dr prof sr jr st no vs etc cf al fig eq ca approx inc ltd co vol pp ed eds rev gen col
    capt lt sgt hon mt dept univ bzw usw nr str abb bspw evtl ggf vgl sog mme mlle sra dra núm pág
"""
_ABBREVIATIONS = frozenset(_ABBREVIATED.split())


class Unit(NamedTuple):
    """A sentence, a block to be kept whole, or a heading (level 1 to 6), under its headings."""

    start: int
    stop: int
    headings: tuple[str, ...]
    level: int = 0


def units(text: str, language: str | None = None) -> Iterator[Unit]:
    """The units of a text, in order; what lies between two of them is white space.

    With a language, by its ISO 639 code, sentences end where the package ``sentencex`` says.
    """
    path: list[tuple[int, str]] = []
    before = 0
    for match, end in _blocks(text):
        headings = tuple(words for _, words in path)
        yield from _sentences(text, before, match.start(), headings, language)
        before = end
        level, words = _heading(match)
        if level:
            path = [(other, title) for other, title in path if other < level]
            if words:
                path.append((level, words))
            headings = tuple(title for _, title in path)
        unit = _trimmed(text, match.start(), end, headings)
        if unit is not None:
            yield unit._replace(level=level)
    headings = tuple(words for _, words in path)
    yield from _sentences(text, before, len(text), headings, language)


def _blocks(text: str) -> Iterator[tuple[re.Match[str], int]]:
    """Headings and blocks: how each begins, and the place behind its end."""
    closers: dict[str, re.Match[str] | None] = {}
    place = 0
    while (match := _MARKUP.search(text, place)) is not None:
        place = match.end()
        opening = match["fence"] or match["tag"]
        if opening:
            end = _end_of(text, opening.lower(), place, closers)
            if end is None:
                continue
            place = end
        yield match, place


def _end_of(
    text: str, opening: str, start: int, closers: dict[str, re.Match[str] | None]
) -> int | None:
    """Where a block ends; ``None`` where it has no end, or is longer than is looked for.

    ``closers`` are the next ends of each kind, so that none is looked for twice.
    """
    closer = closers.get(opening)
    if opening not in closers or (closer is not None and closer.start() < start):
        if opening[0] in "`~":
            pattern = rf"^ {{0,3}}{opening[0]}{{{len(opening)},}}[ \t]*$"
        else:
            pattern = rf"</{opening}\s*>"
        closer = re.compile(pattern, re.MULTILINE | re.IGNORECASE).search(text, start)
        closers[opening] = closer
    return None if closer is None or closer.start() - start > _LONGEST else closer.end()


def _heading(match: re.Match[str]) -> tuple[int, str]:
    """Level and words of a heading; level 0 for another block."""
    if match["atx"]:
        level, words = len(match["atx"]), match["atx_text"].strip()
        # Number signs close it where a blank is before them: "# C# #" is "C#".
        opened = words.rstrip("#")
        words = opened if not opened or opened[-1].isspace() else words
    elif match["setext"]:
        level, words = (1 if match["setext"][0] == "=" else 2), match["setext_text"]
    elif match["html"]:
        level, words = int(match["html"]), _TAG.sub(" ", match["html_text"])
    else:
        return 0, ""
    return level, " ".join(words.split())


def sentences(text: str, language: str | None = None) -> list[tuple[int, int]]:
    """Start and stop of each sentence of a text without markup."""
    return [(unit.start, unit.stop) for unit in _sentences(text, 0, len(text), (), language)]


def _sentences(
    text: str, start: int, stop: int, headings: tuple[str, ...], language: str | None
) -> Iterator[Unit]:
    before = start
    for end in (
        _ends(text, start, stop) if language is None else _by_package(text, start, stop, language)
    ):
        unit = _trimmed(text, before, end, headings)
        before = end
        if unit is not None:
            yield unit
    unit = _trimmed(text, before, stop, headings)
    if unit is not None:
        yield unit


def _ends(text: str, start: int, stop: int) -> Iterator[int]:
    for match in _END.finditer(text, start, stop):
        if match[0][0] == "." and _goes_on(text, start, match.start(), match.end()):
            continue
        yield match.end()


def _goes_on(text: str, start: int, dot: int, end: int) -> bool:
    """Whether a full stop ends an abbreviation or initial, or a small letter follows.

    Where no letter around is a capital, small letters begin sentences too.
    """
    word = _LAST_WORD.search(text, max(start, dot - 30), dot + 1)
    if text[end : end + 20].lstrip()[:1].islower():
        around = text[max(start, dot - _AROUND) : end + _AROUND]
        if around != around.lower() or (word is not None and "." in word[1]):
            return True
    if word is None:
        return False
    return len(word[1]) == 1 or word[1].lower() in _ABBREVIATIONS


def _by_package(text: str, start: int, stop: int, language: str) -> Iterator[int]:
    try:
        from sentencex import segment
    except ImportError as error:
        raise DeclarationError(
            f"Sentences of the language {language!r} are separated by the package sentencex, "
            "which is not installed. Install sbert-pg[sentences], or declare the chunker without a "
            "language."
        ) from error
    end = start
    for sentence in segment(language, text[start:stop]):
        end += len(sentence)
        yield end


def _trimmed(text: str, start: int, stop: int, headings: tuple[str, ...]) -> Unit | None:
    """The unit without white space at its ends, ``None`` where nothing is left."""
    while start < stop and text[start].isspace():
        start += 1
    while stop > start and text[stop - 1].isspace():
        stop -= 1
    return Unit(start, stop, headings) if start < stop else None


def _border_before(text: str, start: int, stop: int) -> int:
    """A place to cut a span in about its middle: at a line's end, else a blank, else anywhere."""
    middle = (start + stop) // 2
    earliest = start + max(1, (stop - start) // 4)
    for blank in ("\n", " "):
        border = text.rfind(blank, earliest, middle)
        if border > 0:
            return border
    return max(middle, start + 1)


def pieces(
    text: str, start: int, stop: int, tokens: Tokens, most: int
) -> Iterator[tuple[int, int, int]]:
    """A span in pieces of at most so many tokens: start, stop and tokens of each."""
    todo = [(start, stop)]
    while todo:
        start, stop = todo.pop()
        longest = 64 * most
        if stop - start > longest:
            # Counting a megabyte again at every halving would take minutes.
            end = _border_before(text, start, start + longest)
            todo += [(end, stop), (start, end)]
            continue
        count = tokens([text[start:stop]])[0]
        if count <= most or stop - start < 2:
            if text[start:stop].strip():
                yield start, stop, count
            continue
        middle = _border_before(text, start, stop)
        todo += [(middle, stop), (start, middle)]
