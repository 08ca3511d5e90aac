"""From the columns of a document to its passages, as they are embedded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from sbert_pg.passages.chunker import Chunker, pieces
from sbert_pg.source import GAP
from sbert_pg.spec import TextEncoder

#: What stands between two headings of a path.
_STEP = " > "
#: Passages whose tokens are counted by one call, and the share of the limit that a path may take.
_AT_ONCE, _PATH_SHARE = 256, 4
#: Characters that are hashed at once.
_SLICE = 1 << 20
_WORD = re.compile(r"\w+|[^\w\s]")
#: Hexadecimal digits of a passage's digest.
DIGITS = 32


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


def counter(encoder: TextEncoder) -> Callable[[Sequence[str]], list[int]]:
    """Counts tokens of texts, without special tokens.

    An encoder that has no ``count_tokens`` is taken to read words and signs.
    """
    count = getattr(encoder, "count_tokens", None)
    if count is None:
        return lambda texts: [sum(1 for _ in _WORD.finditer(text)) for text in texts]
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


def _path(
    steps: list[str], tokens: Callable[[Sequence[str]], list[int]], most: int
) -> tuple[str, int]:
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
