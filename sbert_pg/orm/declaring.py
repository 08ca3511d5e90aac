"""``embedding_column``: an attribute of a mapped class that stores the embedding of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import MappedColumn, mapped_column

from sbert_pg.distance import Similarity, Storage
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types import Embedding


def embedding_column(
    encoder: str | EncoderSpec,
    source: str | Sequence[str] | Source,
    *,
    separator: str = "\n\n",
    storage: Storage = "vector",
    dimensions: int | None = None,
    similarity: Similarity | None = None,
    replaces: str | None = None,
    name: str | None = None,
    nullable: bool | None = None,
    deferred: bool = True,
    init: bool = True,
) -> MappedColumn[Any]:
    """A mapped column that stores the embedding of other columns of its row.

    Nothing is loaded or checked before the column is used: the class can be mapped with no encoder
    on disk.

    Args:
        encoder: name or path as ``Encoder.load`` takes it, or an ``EncoderSpec``.
        source: name of the text column to embed, or several, or a ``Source``. Several are joined
            with ``separator``; values that are ``NULL`` or empty are left out.
        separator: what stands between two values, a blank line by default.
        storage: ``"vector"``, 4 bytes a dimension, or ``"halfvec"``, 2 bytes.
        dimensions: width, needed where the library does not know ``encoder`` by name.
        similarity: similarity function, where it is not the encoder's own.
        replaces: name of the embedding column of this table that this one is to replace.
        name: name of the column in the database; the attribute's name by default.
        nullable: as in ``mapped_column``. A column that the worker fills has to be nullable.
        deferred: whether the vector stays in the database until it is asked for, as is faster.
        init: for classes mapped as dataclasses, whether ``__init__`` takes the vector, as a keyword
            that may be left out. The attribute is never part of ``repr`` or of comparison.

    Raises:
        DeclarationError: the declaration contradicts itself or leaves the dimensions unknown.
    """
    type_ = Embedding(
        encoder,
        source,
        separator=separator,
        storage=storage,
        dimensions=dimensions,
        similarity=similarity,
        replaces=replaces,
    )
    arguments: tuple[Any, ...] = (type_,) if name is None else (name, type_)
    options: dict[str, Any] = {} if nullable is None else {"nullable": nullable}
    made: MappedColumn[Any] = mapped_column(
        *arguments,
        deferred=deferred,
        # An array has no truth value, so == of two dataclasses would raise; and repr() would fetch
        # the vector from the database.
        init=init,
        default=None,
        kw_only=True,
        repr=False,
        compare=False,
        **options,
    )
    # SQLAlchemy refuses such options on a class that is no dataclass. This function serves both
    # kinds of class and cannot know which one it is called for.
    made._has_dataclass_arguments = False
    return made
