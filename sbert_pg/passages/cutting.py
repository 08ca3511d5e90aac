"""Where a document is cut into passages: chunkers, and from its columns to what is embedded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

from sbert_pg.errors import DeclarationError
from sbert_pg.passages.structure import Tokens, Unit, pieces, units
from sbert_pg.source import GAP
from sbert_pg.spec import TextEncoder

#: Tokens that a passage under these headings may have.
Room = Callable[[tuple[str, ...]], int]
#: Units or passages counted by one call of the tokenizer.
_AT_ONCE = 512
_WORD = re.compile(r"\S+")
#: What stands between two headings of a path.
_STEP = " > "
#: Share of the limit that a path may take.
_PATH_SHARE = 4
_SLICE = 1 << 20
_WORD_OR_SIGN = re.compile(r"\w+|[^\w\s]")
#: Hexadecimal digits of a passage's digest.
DIGITS = 32


class Part(NamedTuple):
    """A part of a document, and the headings that it stands under, the outermost first."""

    start: int
    stop: int
    headings: tuple[str, ...] = ()


@runtime_checkable
class Chunker(Protocol):
    """Cuts texts into parts. The same text is always cut in the same way."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the borders: plain data with a ``kind``, part of the column's identity."""
        ...

    def cut(self, text: str, tokens: Tokens, room: Room) -> Iterable[Part]:
        """The parts of a text, in order; parts may overlap, and blanks may be left out.

        A part that turns out longer than an encoder reads is split by the caller.

        Args:
            text: the document's text.
            tokens: counts tokens of the column's encoder.
            room: tokens that a part under some headings may have.
        """
        ...


@dataclass(frozen=True, slots=True)
class SentenceChunker:
    """Whole sentences, never across a heading, with borders that the content decides.

    Of the sentence ends between ``least`` and ``most`` tokens the text is cut behind the sentence
    with the least hash. So an edit moves the borders near it alone, and the passages further on
    stay what they were (content-defined chunking, as in rsync and LBFS, over sentences). Lists,
    tables and code stay whole where they fit.

    Attributes:
        least: tokens before the first border.
        most: tokens of a passage.
        overlap: tokens, in whole sentences, that a passage repeats of the one before.
        language: see ``structure.units``.
    """

    least: int = 60
    most: int = 230
    overlap: int = 0
    language: str | None = None

    def __post_init__(self) -> None:
        if not (0 < self.least < self.most and 0 <= self.overlap < self.most - self.least):
            raise DeclarationError(
                f"A passage of {self.least} to {self.most} tokens with an overlap of "
                f"{self.overlap} cannot be: least is below most, and the overlap below their "
                "difference."
            )

    @property
    def identity(self) -> Mapping[str, Any]:
        """The settings."""
        return {"kind": "sentences", **asdict(self)}

    def cut(self, text: str, tokens: Tokens, room: Room) -> Iterator[Part]:
        """See ``Chunker``."""
        empty: Unit | None = None
        section: list[tuple[Unit, int]] = []
        before: list[tuple[Unit, int]] = []
        for unit, count in self._counted(text, tokens, room):
            if section and (unit.level or unit.headings != section[0][0].headings):
                yield from self._borders(text, section, before, room, last=True)
                before.clear()
            if unit.level:
                if empty is not None and unit.level <= empty.level:
                    yield _part(empty)
                empty = unit
                continue
            empty = None
            section.append((unit, count))
            if len(section) % 16 == 0:
                yield from self._borders(text, section, before, room, last=False)
        if section:
            yield from self._borders(text, section, before, room, last=True)
        if empty is not None:
            yield _part(empty)

    def _counted(self, text: str, tokens: Tokens, room: Room) -> Iterator[tuple[Unit, int]]:
        """Units with their tokens; those that are longer than a passage in pieces."""
        stream = units(text, self.language)
        while batch := list(islice(stream, _AT_ONCE)):
            counts = tokens([text[unit.start : unit.stop] for unit in batch])
            for unit, count in zip(batch, counts, strict=True):
                most = self._most(unit.headings, room)
                if unit.level or count <= most:
                    # What an encoder sees nothing in counts as well, or it would never be enough.
                    yield unit, max(1, count)
                    continue
                for start, stop, number in pieces(text, unit.start, unit.stop, tokens, most):
                    yield Unit(start, stop, unit.headings), number

    def _most(self, headings: tuple[str, ...], room: Room) -> int:
        return max(1, min(self.most, room(headings)) - self.overlap)

    def _borders(
        self,
        text: str,
        section: list[tuple[Unit, int]],
        before: list[tuple[Unit, int]],
        room: Room,
        *,
        last: bool,
    ) -> Iterator[Part]:
        """Move passages from the beginning of a section to ``before``, the last one cut off.

        What may still grow stays in the section, unless it is the last of it.
        """
        most = self._most(section[0][0].headings, room)
        least = min(self.least, most)
        while section:
            total = sum(count for _, count in section)
            if total <= most and not last:
                break
            number = len(section) if total <= most else _border(text, section, least, most)
            yield self._with_overlap(before, section[:number])
            before[:] = section[:number]
            del section[:number]

    def _with_overlap(
        self, before: Sequence[tuple[Unit, int]], chosen: Sequence[tuple[Unit, int]]
    ) -> Part:
        start, left = chosen[0][0].start, self.overlap
        for unit, count in reversed(before):
            left -= count
            if left < 0:
                break
            start = unit.start
        return Part(start, chosen[-1][0].stop, chosen[0][0].headings)


def _part(heading: Unit) -> Part:
    """A heading without a text under it, which would else be in no passage."""
    return Part(heading.start, heading.stop, heading.headings[:-1])


def _border(text: str, section: Sequence[tuple[Unit, int]], least: int, most: int) -> int:
    """How many units to take: up to the one of least hash whose end lies within the limits."""
    total, fit = 0, 1
    best: tuple[bytes, int] | None = None
    for number, (unit, count) in enumerate(section, 1):
        total += count
        if total > most:
            break
        fit = number
        if total >= least:
            sentence = text[unit.start : unit.stop].encode("utf-8", "surrogatepass")
            one = hashlib.blake2b(sentence, digest_size=8).digest(), number
            best = one if best is None else min(best, one)
    return fit if best is None else best[1]


@dataclass(frozen=True, slots=True)
class FixedChunker:
    """Passages of a fixed number of tokens, cut between words; headings are not looked at.

    Attributes:
        tokens: tokens of a passage.
        overlap: tokens that a passage repeats of the one before.
    """

    tokens: int = 200
    overlap: int = 40

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.tokens:
            raise DeclarationError(
                f"Passages of {self.tokens} tokens cannot overlap by {self.overlap}; give less."
            )

    @property
    def identity(self) -> Mapping[str, Any]:
        """The settings."""
        return {"kind": "fixed", **asdict(self)}

    def cut(self, text: str, tokens: Tokens, room: Room) -> Iterator[Part]:
        """See ``Chunker``."""
        most = max(2, min(self.tokens, room(())))
        step = max(1, most - min(self.overlap, most - 1))
        words: list[tuple[int, int, int]] = []
        fresh = 0
        for word in _words(text, tokens, most):
            if words and sum(count for *_, count in words) + word[2] > most:
                yield Part(words[0][0], words[-1][1])
                gone = 0
                while words and gone < step:
                    gone += words.pop(0)[2]
                fresh = 0
            words.append(word)
            fresh += 1
        if fresh:
            yield Part(words[0][0], words[-1][1])


def _words(text: str, tokens: Tokens, most: int) -> Iterator[tuple[int, int, int]]:
    """Words with their tokens; those of scripts without blanks in pieces."""
    matches = _WORD.finditer(text)
    while batch := list(islice(matches, _AT_ONCE)):
        for word, count in zip(batch, tokens([word[0] for word in batch]), strict=True):
            start, stop = word.span()
            if count <= most // 4 or stop - start < 2:
                yield start, stop, max(1, count)
            else:
                yield from pieces(text, start, stop, tokens, max(1, most // 4))


@dataclass(frozen=True, slots=True)
class LangChainChunker:
    """A text splitter of LangChain's, or anything else with ``split_text``.

    The worker's process has to know it by its name too: see ``use_chunker``.

    Attributes:
        name: what identifies it with its settings; another name where these change.
        splitter: has ``split_text(text)``, which returns strings that occur in the text, in order.
    """

    name: str
    splitter: Any

    @property
    def identity(self) -> Mapping[str, Any]:
        """Kind and name."""
        return {"kind": "named", "name": self.name}

    def cut(self, text: str, tokens: Tokens, room: Room) -> Iterator[Part]:
        """See ``Chunker``."""
        after = 0
        for chunk in self.splitter.split_text(text):
            words = chunk.strip()
            start = text.find(words, after)
            if start < 0:
                raise DeclarationError(
                    f"The splitter {self.name!r} gave {words[:60]!r}, which the document does not "
                    "hold there. Passages are parts of the text as it is; use a splitter that "
                    "changes nothing."
                )
            if words:
                yield Part(start, start + len(words))
                after = start + 1


_named: dict[str, Chunker] = {}


def use_chunker(chunker: Chunker) -> Chunker:
    """Use a chunker of your own, in this process, for every column that names it.

    Args:
        chunker: its identity is ``{"kind": "named", "name": ...}``, as of ``LangChainChunker``.

    Returns:
        The chunker, for chaining.

    Raises:
        DeclarationError: it has no name.
    """
    name = chunker.identity.get("name")
    if chunker.identity.get("kind") != "named" or not isinstance(name, str):
        raise DeclarationError(
            f"{chunker!r} has the identity {dict(chunker.identity)!r}; a chunker that is not the "
            'library\'s says {"kind": "named", "name": ...} with a name of its own.'
        )
    _named[name] = chunker
    return chunker


def chunker_of(identity: Mapping[str, Any]) -> Chunker:
    """The chunker with an identity."""
    settings = {name: value for name, value in identity.items() if name != "kind"}
    if identity.get("kind") == "sentences":
        return SentenceChunker(**settings)
    if identity.get("kind") == "fixed":
        return FixedChunker(**settings)
    name = str(settings.get("name"))
    if name not in _named:
        raise DeclarationError(
            f"Documents are cut by the chunker {name!r}, which this process does not know. "
            "Register it at start-up with sbert_pg.passages.use_chunker(chunker)."
        )
    return _named[name]


class Passage(NamedTuple):
    """A passage as it is stored; ``digest`` names its text as embedded, with the heading."""

    start: int
    stop: int
    heading: str
    digest: str


def digest_of(text: str) -> str:
    """What names a text as it is embedded; ``sbert.passage_sql_v1`` computes the same."""
    digest = hashlib.sha256()
    # In slices: a document may be large, and need not be there once more as bytes.
    for start in range(0, len(text), _SLICE):
        digest.update(text[start : start + _SLICE].encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:DIGITS]


def embedded_text(heading: str, part: str) -> str:
    """What the encoder gets of a passage."""
    return f"{heading}{GAP}{part}" if heading else part


def counter(encoder: TextEncoder) -> Tokens:
    """Counts tokens of texts, without special ones; words and signs where an encoder cannot."""
    count = getattr(encoder, "count_tokens", None)
    if count is None:
        return lambda texts: [sum(1 for _ in _WORD_OR_SIGN.finditer(text)) for text in texts]
    special = count([""])[0]
    return lambda texts: [number - special for number in count(texts)]


def limit_of(encoder: TextEncoder) -> int:
    """Tokens of a text that an encoder reads, without special tokens and its document prompt."""
    longest = encoder.spec.max_seq_length
    if longest is None:
        return 2**31
    count = getattr(encoder, "count_tokens", None)
    special = 0 if count is None else count([""])[0]
    prompt = encoder.spec.document_prompt
    return max(8, longest - special - (counter(encoder)([prompt])[0] if prompt else 0))


def _path(steps: list[str], tokens: Tokens, most: int) -> tuple[str, int]:
    """A path of so many tokens at most, and its tokens."""
    while steps:
        path = _STEP.join(steps)
        length = tokens([path])[0]
        if length <= most:
            return path, length
        if len(steps) == 1:
            start, stop, length = next(pieces(path, 0, len(path), tokens, most))
            return path[start:stop], length
        # The innermost says most of the part, the outermost of the document.
        del steps[len(steps) // 2]
    return "", 0


def cut(
    titles: Sequence[str | None], body: str, chunker: Chunker, encoder: TextEncoder
) -> Iterator[Passage]:
    """The passages of a document, in order, none longer than the encoder reads."""
    tokens, limit = counter(encoder), limit_of(encoder)
    title = [" ".join(words.split()) for words in titles if words and words.strip()]

    @lru_cache(maxsize=64)
    def path_of(headings: tuple[str, ...]) -> tuple[str, int]:
        steps = [*title, *(words for words in headings if words not in title)]
        return _path(steps, tokens, limit // _PATH_SHARE)

    def room(headings: tuple[str, ...]) -> int:
        # One spare, since what two texts have in tokens is not always what they have together.
        return max(1, limit - path_of(headings)[1] - 1)

    empty = True
    parts = iter(chunker.cut(body, tokens, room))
    while batch := list(islice(parts, _AT_ONCE)):
        headings = [path_of(part.headings)[0] for part in batch]
        texts = [
            embedded_text(heading, body[part.start : part.stop])
            for heading, part in zip(headings, batch, strict=True)
        ]
        counts = tokens(texts)
        empty = False
        for part, heading, text, count in zip(batch, headings, texts, counts, strict=True):
            if count <= limit:
                yield Passage(part.start, part.stop, heading, digest_of(text))
                continue
            # Never silently: what an encoder would not read becomes its own passage.
            for start, stop, _ in pieces(body, part.start, part.stop, tokens, room(part.headings)):
                digest = digest_of(embedded_text(heading, body[start:stop]))
                yield Passage(start, stop, heading, digest)
    if empty:
        # A document of a title alone, or with an empty text, is found by that.
        heading = path_of(())[0]
        yield Passage(0, 0, heading, digest_of(embedded_text(heading, "")))
