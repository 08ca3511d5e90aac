"""``passages_of``: an attribute of a mapped class that is the passages of its text.

The declaration adds what any application could have written by hand: a mapped class and table for
the passages, with an embedding column; a relationship to it; and on the documents an embedding
column for the text as a whole. That column's source also says how the text is cut, so a document's
row is fresh when its whole text is embedded *and* it is cut as it is now.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects.postgresql import TSVECTOR
from sqlalchemy.orm import InstrumentedAttribute, Mapper, deferred, registry, relationship

from sbert_pg import system
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.errors import DeclarationError
from sbert_pg.passages.cutting import DIGITS, Chunker, SentenceChunker, digest_of, embedded_text
from sbert_pg.passages.structure import sentences
from sbert_pg.registry import get_encoder
from sbert_pg.source import GAP, Source, companion_name
from sbert_pg.spec import EncoderSpec, canonical_name

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from sbert_pg.catalog.embedding import VectorOptions
    from sbert_pg.distance import Storage


#: Where a relationship keeps its ``Declared``.
_INFO = "sbert_pg.passages"
#: Columns of a passage table beside its key, the document's and the embedding, with their types.
PASSAGE_COLUMNS: dict[str, Any] = dict.fromkeys(("ordinal", "start", "stop"), sa.Integer)
PASSAGE_COLUMNS |= dict.fromkeys(("heading", "digest"), sa.Text)
#: Attribute of passages of a table that has no class; no column is called so.
_OF_TABLES = "sbert_pg_passages"
#: Column of the text, where it is copied.
CONTENT = "content"


class Passage:
    """A part of a document; the base of the classes that ``passages_of`` maps.

    Attributes:
        start: its first character, in the document's source column.
        stop: the character behind its last one.
        heading: the headings in front of it, as they are embedded with it.
        digest: names its text as it is embedded.
    """

    id: int
    ordinal: int
    start: int
    stop: int
    heading: str
    digest: str
    document: Any
    #: How it was declared; set on the mapped classes.
    declared: Declared

    @property
    def text(self) -> str | None:
        """The part of the document; ``None`` where the document has changed since it was cut."""
        copied: str | None = getattr(self, CONTENT, None)
        if copied is not None or self.document is None:
            return copied
        body: str = getattr(self.document, self.declared.source_keys[-1]) or ""
        part = body[self.start : self.stop]
        return part if digest_of(embedded_text(self.heading, part)) == self.digest else None

    def highlight(self, question: str) -> tuple[int, int, str] | None:
        """The sentence that is nearest to a question: start and stop in the document, and text.

        The passage itself where it has no sentence; ``None`` where the document has changed since
        it was cut.
        """
        text = self.text
        if text is None:
            return None
        spans = sentences(text, getattr(self.declared.chunker, "language", None))
        if len(spans) < 2:
            return self.start, self.stop, text
        encoder = get_encoder(self.declared.encoder)
        vectors = encoder.encode_document([text[start:stop] for start, stop in spans])
        start, stop = spans[int((vectors @ encoder.encode_query([question])[0]).argmax())]
        return self.start + start, self.start + stop, text[start:stop]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id}, {self.start}:{self.stop})"


@dataclass(frozen=True, eq=False)
class Declared:
    """The passages of a mapped class.

    Attributes:
        source_keys: attributes of the document that hold the headings, and last the text.
        keys: pairs of columns, of the passage and of the document, that are equal.
    """

    document: Any
    name: str
    passage: Any
    whole: str
    source_keys: tuple[str, ...]
    copies: bool
    encoder: EncoderSpec
    chunker: Chunker
    keys: tuple[tuple[sa.Column[Any], sa.Column[Any]], ...]


def passages_of(
    encoder: str | EncoderSpec,
    source: str,
    *,
    heading: str | Sequence[str] = (),
    chunker: Chunker | None = None,
    copy_text: bool = False,
    table_name: str | None = None,
    table_args: Sequence[sa.schema.SchemaItem] = (),
    replaces: str | None = None,
    **options: Unpack[VectorOptions],
) -> Any:
    """An attribute of a mapped class: the passages of a long text, as rows of a table of their own.

    ``passages = passages_of("all-MiniLM-L6-v2", source="body", heading="title")`` in the class
    ``Document`` maps a class ``DocumentPassage`` to a table ``document_passage`` of the same
    metadata, makes ``Document.passages`` the relationship to it, and adds the embedding column
    ``passages_embedding`` for the text as a whole. Workers cut and embed; see docs/passages.md.
    The class is ``Document.passages.property.mapper.class_``.

    Args:
        encoder: as in ``embedding_column``.
        source: name of the text column, as the database has it.
        heading: columns whose text stands in front of every passage, such as a title.
        chunker: where texts are cut; ``SentenceChunker()`` by default. It is part of the column's
            identity: another one is another attribute beside this, which ``replaces`` it.
        copy_text: whether passages also hold their text, in the column ``content``.
        table_name: name of its table, by default made of table and attribute.
        table_args: further arguments of the passages' table, such as
            ``[hnsw_index("document_passage_hnsw", "embedding")]``.
        replaces: name of the attribute of passages that this one is to replace.
        **options: ``storage``, ``dimensions`` and ``similarity`` of both embedding columns.

    Raises:
        DeclarationError: the declaration contradicts itself or leaves the dimensions unknown.
    """
    if not isinstance(source, str):
        raise DeclarationError(
            f"passages_of() was given the source {source!r}; offsets count in one text column, so "
            "name one. Give titles by heading=, or join columns in a stored generated column."
        )
    titles = (heading,) if isinstance(heading, str) else tuple(heading)
    spec = EncoderSpec.of(
        encoder, dimensions=options.get("dimensions"), similarity=options.get("similarity")
    )
    return _Passages(
        spec,
        Source((*titles, source)).columns,
        chunker or SentenceChunker(),
        copy_text,
        table_name,
        tuple(table_args),
        replaces,
        options.get("storage", "vector"),
    )


def add_passages(class_: type[Any], name: str, passages: Any) -> Any:
    """Give a class that is mapped already, such as one of SQLModel's, its passages.

    Args:
        class_: the mapped class.
        name: name of the attribute.
        passages: what ``passages_of`` returned.

    Returns:
        The class of the passages.

    Raises:
        DeclarationError: the class cannot have them; the message says why.
    """
    return passages.attach(sa.inspect(class_), name).passage


@dataclass(eq=False)
class _Passages:
    """What ``passages_of`` returns: stands in the class until it is mapped."""

    encoder: EncoderSpec
    #: Columns of the headings, and last that of the text.
    columns: tuple[str, ...]
    chunker: Chunker
    copy_text: bool
    table_name: str | None
    table_args: tuple[Any, ...]
    replaces: str | None
    storage: Storage

    def __set_name__(self, owner: type[Any], name: str) -> None:
        """Python's call at the end of the body of the class, which SQLAlchemy maps next."""

        def map_passages(mapper: Mapper[Any], class_: type[Any]) -> None:
            # A subclass has its parent's; that of a mixin or abstract class has its own.
            if mapper.inherits is None or not mapper.inherits.has_property(name):
                self.attach(mapper, name)

        # Out of the way of the relationship, which gets the name.
        delattr(owner, name)
        event.listen(owner, "after_mapper_constructed", map_passages, propagate=True)

    def attach(self, mapper: Mapper[Any], name: str) -> Declared:
        """Map the passages of a class, and give it its attributes."""
        table = mapper.local_table
        if not isinstance(table, sa.Table) or not table.primary_key.columns:
            raise DeclarationError(
                f"{mapper.class_.__name__} cannot have passages: it is mapped to {table!r}, and "
                "passages refer to a table by its primary key."
            )
        singular = name[:-1] if name.endswith("s") else name
        class_name = mapper.class_.__name__ + "".join(
            word.capitalize() for word in singular.split("_")
        )
        table_name = self.table_name or f"{table.name}_{singular}"
        passage_table = self._table(table, table_name)
        whole = self._whole(mapper, table, name, passage_table)
        passage = type(class_name, (Passage,), {"__module__": mapper.class_.__module__})
        keys = tuple(
            (passage_table.c[_key_name(table, key)], key) for key in table.primary_key.columns
        )
        sources = (mapper.get_property_by_column(table.c[column]).key for column in self.columns)
        declared = Declared(
            mapper.class_, name, passage, whole, tuple(sources), self.copy_text, self.encoder,
            self.chunker, keys,
        )  # fmt: skip
        passage.declared = declared  # type: ignore[attr-defined]
        _map(mapper, name, declared, passage_table)
        return declared

    def _whole(
        self, mapper: Mapper[Any], table: sa.Table, name: str, passage_table: sa.Table
    ) -> str:
        """Add the embedding of the document as a whole; returns its attribute."""
        settings = {
            "table": passage_table.name,
            "key": [[_key_name(table, key), key.name] for key in table.primary_key.columns],
            "encoder": canonical_name(self.encoder.name),
            "chunker": dict(self.chunker.identity),
            "copy": self.copy_text,
        }
        source = Source(self.columns, passages=json.dumps(settings, sort_keys=True))
        source.resolve(table)
        whole = f"{name}_embedding"
        replaces = None if self.replaces is None else f"{self.replaces}_embedding"
        type_ = Embedding(self.encoder, source, storage=self.storage, replaces=replaces)
        table.append_column(sa.Column(whole, type_, nullable=True))
        mapper.add_property(companion_name(whole), deferred(table.c[companion_name(whole)]))
        mapper.add_property(whole, deferred(table.c[whole]))
        return whole

    def _table(self, table: sa.Table, name: str) -> sa.Table:
        keys = list(table.primary_key.columns)
        names = [_key_name(table, key) for key in keys]
        place = {"key": names, "column": self.columns[-1]}
        source = Source(("digest",), document=json.dumps(place, sort_keys=True))
        content = [sa.Column(CONTENT, sa.Text, nullable=False)] if self.copy_text else []
        return sa.Table(
            name,
            table.metadata,
            sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
            *(sa.Column(n, key.type, nullable=False) for n, key in zip(names, keys, strict=True)),
            *(sa.Column(n, type_, nullable=False) for n, type_ in PASSAGE_COLUMNS.items()),
            *content,
            sa.Column("embedding", Embedding(self.encoder, source, storage=self.storage)),
            # Keys that change take their passages along, which are the same text still.
            sa.ForeignKeyConstraint(names, keys, ondelete="CASCADE", onupdate="CASCADE"),
            sa.Index(None, *names),
            *self.table_args,
            schema=table.schema,
        )


def _map(mapper: Mapper[Any], name: str, declared: Declared, table: sa.Table) -> None:
    """Map the class of the passages, and give that of the documents its attribute."""
    same: dict[str, Any] = {
        "primaryjoin": sa.and_(*(ours == theirs for ours, theirs in declared.keys)),
        "foreign_keys": [ours for ours, _ in declared.keys],
    }
    mapper.registry.map_imperatively(
        declared.passage,
        table,
        properties={
            "embedding": deferred(table.c.embedding),
            "embedding_of": deferred(table.c[companion_name("embedding")]),
            "document": relationship(mapper.class_, back_populates=name, **same),
        },
    )
    own = relationship(
        declared.passage,
        back_populates="document",
        order_by=table.c.ordinal,
        cascade="all, delete-orphan",
        passive_deletes=True,
        info={_INFO: declared},
        **same,
    )
    mapper.add_property(name, own)


def passages_between(whole: sa.Column[Any], passages: sa.Table) -> Any:
    """The attribute of passages of reflected tables, by the column that embeds whole documents."""
    documents: Any = whole.table
    type_: Any = whole.type
    settings = json.loads(type_.source.passages)
    mapper: Any = registry().map_imperatively(
        type("Document", (), {}),
        documents,
        properties={c.key: deferred(c) for c in documents.c if isinstance(c.type, TSVECTOR)},
    )
    passage = type("DocumentPassage", (Passage,), {})
    keys = tuple((passages.c[ours], documents.c[theirs]) for ours, theirs in settings["key"])
    chunker: Any = None  # nobody cuts by it, and it need not be known here
    declared = Declared(
        mapper.class_, _OF_TABLES, passage, whole.key, type_.source.columns, settings["copy"],
        type_.encoder, chunker, keys,
    )  # fmt: skip
    passage.declared = declared  # type: ignore[attr-defined]
    _map(mapper, _OF_TABLES, declared, passages)
    return getattr(mapper.class_, _OF_TABLES)


def _key_name(table: sa.Table, key: sa.Column[Any]) -> str:
    return f"{table.name}_{key.name}"


def declared_passages(attribute: Any) -> Declared | None:
    """How the attribute of a mapped class was declared, where it is one of passages."""
    if not isinstance(attribute, InstrumentedAttribute):
        return None
    declared: Declared | None = attribute.property.info.get(_INFO)
    return declared


def text_of(declared: Declared) -> sa.ColumnElement[str]:
    """A passage's part of its document; ``NULL`` where the document has changed since it was cut.

    For a statement that joins both tables.
    """
    passage: Any = sa.inspect(declared.passage).local_table.c
    body: Any = sa.inspect(declared.document).columns[declared.source_keys[-1]]
    part = sa.func.substr(
        sa.func.coalesce(body, ""), passage.start + 1, passage.stop - passage.start
    )
    whole = sa.func.concat_ws(GAP, sa.func.nullif(passage.heading, ""), part)
    hashed = sa.func.encode(sa.func.sha256(sa.func.convert_to(whole, "UTF8")), "hex")
    return sa.case((sa.func.substr(hashed, 1, DIGITS) == passage.digest, part))


class PassageView(system.Statement):
    """``CREATE OR REPLACE VIEW`` of the passages of a class, each with its text.

    Alembic's autogenerate does not see views. In a migration:
    ``op.execute(PassageView(Document.passages))``. The view has the passages' key, the document's,
    their places and ``text``, which is ``NULL`` while a changed document waits for being cut again.

    Args:
        passages: the attribute of a mapped class, ``Document.passages``.
        name: name of the view; the passage table's and ``_text`` by default.

    Raises:
        DeclarationError: it is not such an attribute.
    """

    def __init__(self, passages: Any, name: str | None = None) -> None:
        declared = declared_passages(passages)
        if declared is None:
            raise DeclarationError(
                f"PassageView was given {passages!r}; it takes an attribute made with "
                "passages_of(), such as Document.passages."
            )
        table: Any = sa.inspect(declared.passage).local_table
        names = ["id", *(ours.name for ours, _ in declared.keys), *PASSAGE_COLUMNS]
        same = sa.and_(*(ours == theirs for ours, theirs in declared.keys))
        columns = [*(table.c[name] for name in names), text_of(declared).label("text")]
        documents = sa.inspect(declared.document).local_table
        query = sa.select(*columns).join_from(table, documents, same)

        def create(compiler: Any) -> str:
            view = system.ddl_name(compiler, table.schema, name or f"{table.name}_text")
            text = compiler.sql_compiler.process(query, literal_binds=True)
            return f"CREATE OR REPLACE VIEW {view} AS {text}"

        super().__init__(create)
