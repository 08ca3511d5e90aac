"""The error tree.

Every error that this project raises on purpose derives from :class:`SbertPgError`, so an
application can catch all of them at once. A message names the thing, says why, and says what to do
next. Where a built-in exception describes the mistake as well (``ValueError``, ``ImportError``),
the class derives from it too, so that existing handlers keep working.

::

    SbertPgError
    ├── MissingExtraError        an optional dependency is not installed
    ├── EncoderError
    │   ├── EncoderNotFoundError     no such directory, hub name or file
    │   ├── UnsupportedEncoderError  the model asks for something that is not implemented
    │   ├── DamagedEncoderError      files missing, half written, or not matching their digest
    │   ├── ConversionError          the result disagrees with its reference
    │   ├── ProviderError            an execution provider is missing
    │   └── EncodingError            a text cannot be encoded
    ├── VectorError              a value that cannot be stored or compared as a vector
    │   ├── DimensionError
    │   ├── NonFiniteError
    │   └── ZeroVectorError
    ├── DeclarationError         an embedding column, index or query that makes no sense
    │   └── SourceError
    ├── CatalogError             the schema ``sbert`` in the database
    │   ├── CatalogMissingError
    │   └── CatalogVersionError
    ├── BindingError             a column and its encoder
    │   ├── NotBoundError
    │   ├── AlreadyBoundError
    │   └── EncoderMismatchError
    ├── ReembeddingError         a change of encoder
    │   ├── BackfillIncompleteError
    │   ├── VerificationError
    │   ├── StillInUseError
    │   ├── NotProvenError           an existing column's encoder or source could not be proven
    │   ├── TableBusyError           a lock could not be had
    │   └── StepStoppedError         a step was called off; it continues where it stopped
    ├── BackfillError            a column cannot be filled
    ├── ClusteringError
    ├── TuningError              an encoder cannot be fitted to labelled questions
    │   ├── TooFewPairsError
    │   └── NoGainError              on questions kept back it does no better
    ├── LoadError                a row that the bulk loader cannot take
    └── ServerError              the embedded server
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

#: Where each class has a section with its remedies, in the repository and on the site.
PAGE = "docs/reference/errors.md"


class SbertPgError(Exception):
    """Root of the tree.

    From Python 3.11 on a traceback ends with a line that says where the page is.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        if hasattr(self, "add_note"):
            self.add_note(f"Background on this error: {self.page}")

    @property
    def page(self) -> str:
        """The section on this kind of error, with what to do about it."""
        kind = next(kind for kind in type(self).__mro__ if kind.__module__ == __name__)
        return f"{PAGE}#{kind.__name__.lower()}"


class MissingExtraError(SbertPgError, ImportError):
    """An optional dependency is needed and not installed.

    Args:
        package: the distribution that could not be imported.
        extra: the extra of this project that brings it.
        purpose: what it is needed for, to be read after "is needed to".
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(
            f"The package {package!r} is needed to {purpose} and is not installed. "
            f"Install it with: pip install 'sbert-pg[{extra}]'"
        )


@contextmanager
def needing(package: str | None, extra: str, purpose: str) -> Iterator[None]:
    """Imports of an optional dependency: arguments as for ``MissingExtraError``.

    Without a package the one is named that is missing.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("sbert_pg"):
            raise
        raise MissingExtraError(package or error.name or extra, extra, purpose) from error


class EncoderError(SbertPgError):
    """Something about an encoder."""


class EncoderNotFoundError(EncoderError, LookupError):
    """No directory, hub repository or registered encoder has this name."""


class UnsupportedEncoderError(EncoderError):
    """The model asks for something that is not implemented; it is refused, never approximated."""


class DamagedEncoderError(EncoderError):
    """A directory is half written, a file is missing, or a digest does not match."""


class ConversionError(EncoderError):
    """A converted encoder disagrees with its reference by more than its floor."""


class ProviderError(EncoderError):
    """An execution provider was asked for that this installation does not have."""


class EncodingError(EncoderError, ValueError):
    """A text cannot be encoded.

    Attributes:
        index: position of the text in the call, or ``None``.
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        self.index = index
        super().__init__(message)


class VectorError(SbertPgError, ValueError):
    """A value cannot be stored or compared as a vector."""


class DimensionError(VectorError):
    """The width of a vector is not the column's."""


class NonFiniteError(VectorError):
    """A vector holds NaN, an infinity, or a value beyond the storage type's range."""


class ZeroVectorError(VectorError):
    """A zero vector where cosine distance is undefined."""


class DeclarationError(SbertPgError, ValueError):
    """A declaration (column, index, query) that cannot mean anything."""


class SourceError(DeclarationError):
    """A source that names a column which does not exist or is not text."""


class CatalogError(SbertPgError):
    """The library's schema ``sbert`` in the database."""


class CatalogMissingError(CatalogError):
    """The schema ``sbert`` is not installed in this database."""


class CatalogVersionError(CatalogError):
    """The schema ``sbert`` has a version that this code does not know or cannot use."""


class BindingError(SbertPgError):
    """A column and the encoder it belongs to."""


class NotBoundError(BindingError, LookupError):
    """The column is not bound to an encoder in the catalog."""


class AlreadyBoundError(BindingError):
    """The column is bound already, and a binding is for life."""


class EncoderMismatchError(BindingError):
    """The code's encoder and the column's are different vector spaces."""


class ReembeddingError(SbertPgError):
    """A change of encoder cannot take the step asked for."""


class BackfillIncompleteError(ReembeddingError):
    """Rows are still without a vector where all were required to have one."""


class VerificationError(ReembeddingError):
    """A verification missed one of its thresholds."""


class StillInUseError(ReembeddingError):
    """The old column is still read or written, so it is not dropped."""


class NotProvenError(ReembeddingError):
    """No candidate encoder and source could be shown to have made a column's vectors."""


class TableBusyError(ReembeddingError):
    """A table's lock could not be had; nothing was changed."""


class StepStoppedError(ReembeddingError):
    """A step was called off in the middle; the same call again continues from there."""


class BackfillError(SbertPgError):
    """A column cannot be filled; what was written stays."""


class ClusteringError(SbertPgError):
    """A clustering cannot be made, read or applied."""


class TuningError(SbertPgError):
    """An encoder cannot be fitted to labelled questions."""


class TooFewPairsError(TuningError):
    """The labelled questions are too few, or share too much, to learn and to judge by."""


class NoGainError(TuningError):
    """On the questions kept back the fitted encoder does no better; nothing was written."""


class LoadError(SbertPgError, ValueError):
    """A row cannot be loaded; the message says which.

    Attributes:
        row: number of the row, the first being 0, or ``None``.
    """

    def __init__(self, message: str, *, row: int | None = None) -> None:
        self.row = row
        super().__init__(message)


class ServerError(SbertPgError):
    """The embedded server cannot be started, reached or stopped."""
