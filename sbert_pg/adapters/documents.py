"""Rows of a mapped class as what other libraries call documents: an id, a text, metadata."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, Insert, insert
from sqlalchemy.orm import ColumnProperty, Mapper, Session, undefer

from sbert_pg.adapters.running import Runner, Work
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.errors import DeclarationError
from sbert_pg.orm.declaring import attributes_of, plain_attributes
from sbert_pg.registry import query_vector
from sbert_pg.reranking import diverse
from sbert_pg.row_vectors import embed_rows
from sbert_pg.search import hybrid, matching, nearest
from sbert_pg.search.filters import condition
from sbert_pg.spec import EncoderSpec
from sbert_pg.types.wire import VectorValue


@dataclass
class Row:
    """One row of the class as a document; without an ``id`` it is to be written under a new key.

    ``metadata`` is what else it holds that is not ``NULL``, and the keys of the JSON attribute.
    """

    id: str | None
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    similarity: float | None = None
    vector: VectorValue | None = None


class Documents:
    """A mapped class with an embedding as a collection of documents; arguments as of ``Store``.

    Every function works within a session of the caller's, and commits nothing.
    """

    def __init__(
        self,
        column: Any,
        *,
        content: str | None = None,
        metadata: str | None = None,
        words: str | None = None,
    ) -> None:
        mapper = _mapper_of(column)
        self.column = column
        self.class_: Any = mapper.class_
        self.key: str = mapper.get_property_by_column(mapper.primary_key[0]).key
        self._attribute = next((a for a in attributes_of(mapper) if a.key == column.key), None)
        self.content = content or self._source()
        self.metadata = metadata
        self.words = words
        attributes = {a.key for a in mapper.attrs if isinstance(a, ColumnProperty)}
        taken = {self.content, *filter(None, [metadata, words])}
        if missing := taken - attributes:
            raise DeclarationError(f"{self.class_.__name__} has no attribute {min(missing)!r}.")
        # What the other embeddings of the class say of their rows is written with them too.
        self._companions = [a.companion_key for a in attributes_of(mapper)]
        #: Attributes that are metadata under their own names.
        own = attributes - taken - {self.key}
        self.own = [name for name in plain_attributes(self.class_) if name in own]

    def _source(self) -> str:
        if self._attribute is None or len(self._attribute.source_keys) != 1:
            raise DeclarationError(
                f"The embedding {self.column} is not made of one attribute; say which one is the "
                "text of a document, by content=."
            )
        return self._attribute.source_keys[0]

    @property
    def encoder(self) -> EncoderSpec:
        """The column's encoder, as declared."""
        spec: EncoderSpec = self.column.type.encoder
        return spec

    def upsert(self, rows: Sequence[Row]) -> Work[list[str]]:
        """Write rows, those with the id of an existing row in its place; their ids, in order."""
        values = [self._values(row) for row in rows]

        def work(session: Session) -> list[str]:
            embedded = embed_rows(self.class_, values)
            keyed = {row[self.key]: row for row in embedded if self.key in row}  # the last one wins
            for same in _by_attributes(keyed.values()):
                session.execute(self._upserting(same[0]), same)
            key = getattr(self.class_, self.key)
            new = sa.insert(self.class_).returning(key, sort_by_parameter_order=True)
            for same in _by_attributes(row for row in embedded if self.key not in row):
                for row, made in zip(same, session.scalars(new, same).all(), strict=True):
                    row[self.key] = made
            return [str(row[self.key]) for row in embedded]

        return work

    def _upserting(self, names: Iterable[str]) -> Insert:
        statement = insert(self.class_)
        columns = [self._column(name) for name in {*names, *self._companions} - {self.key}]
        return statement.on_conflict_do_update(
            index_elements=[self._column(self.key)],
            set_={column: statement.excluded[column.key] for column in columns},
        )

    def add(self, rows: Sequence[Row]) -> Work[int]:
        """Write the rows whose ids no row has; how many those are."""
        values = [self._values(row) for row in rows]

        def work(session: Session) -> int:
            embedded = embed_rows(self.class_, values)
            key = getattr(self.class_, self.key)
            statement = insert(self.class_).on_conflict_do_nothing().returning(key)
            return sum(
                len(session.scalars(statement, same).all()) for same in _by_attributes(embedded)
            )

        return work

    def matching(self, conditions: Any = None, ids: Iterable[str] | None = None) -> Work[list[Row]]:
        """The rows that meet conditions and have one of some ids, by their keys."""
        order = getattr(self.class_, self.key)
        statement = sa.select(self.class_).where(self.where(conditions, ids)).order_by(order)
        return lambda session: [self._row(entity) for entity in session.scalars(statement)]

    def count(self, conditions: Any = None) -> Work[int]:
        """How many rows meet conditions."""
        statement = sa.select(sa.func.count()).select_from(self.class_)
        statement = statement.where(self.where(conditions))
        return lambda session: session.scalar(statement) or 0

    def remove(self, conditions: Any = None) -> Work[int]:
        """Delete the rows that meet conditions; how many those were."""
        return self._changed(sa.delete(self.class_).where(self.where(conditions)))

    def update(self, conditions: Any, metadata: Mapping[str, Any]) -> Work[int]:
        """Set fields of the metadata of the rows that meet conditions; how many those are."""
        values, rest = self._split(metadata)
        if rest:
            whole = sa.cast(getattr(self.class_, self.metadata or ""), JSONB)
            values[self.metadata or ""] = whole.concat(sa.cast(rest, JSONB))
        if not values:
            return self.count(conditions)
        return self._changed(sa.update(self.class_).where(self.where(conditions)).values(values))

    def _changed(self, statement: Any) -> Work[int]:
        statement = statement.execution_options(synchronize_session=False)
        return lambda session: cast("sa.CursorResult[Any]", session.execute(statement)).rowcount

    def where(self, conditions: Any, ids: Iterable[str] | None = None) -> sa.ColumnElement[bool]:
        """Conditions as ``filters.condition`` takes them, and ids, as SQL; ``None`` for any."""
        of_conditions = sa.true() if conditions is None else condition(conditions, self.field)
        return of_conditions if ids is None else sa.and_(of_conditions, self.has_id(ids))

    def get(self, ids: Iterable[str]) -> Work[list[Row]]:
        """The rows of some ids, in their order; ids that no row has are left out."""
        keys = [key for key in map(self._key_of, ids) if key is not None]
        statement = sa.select(self.class_).where(self._is_one_of(keys))

        def work(session: Session) -> list[Row]:
            entities = {getattr(e, self.key): e for e in session.scalars(statement)}
            return [self._row(entities[key]) for key in keys if key in entities]

        return work

    def delete(self, ids: Iterable[str] | None, conditions: Any = None) -> Work[int]:
        """Delete the rows of some ids that meet conditions; ids that no row has are passed over."""
        if ids is None and conditions is None:
            raise DeclarationError(
                "A store was given no ids and no filters to delete by, which is every row of the "
                "table; clear() of LlamaIndex's store deletes those, and SQL."
            )
        return self._changed(sa.delete(self.class_).where(self.where(conditions, ids)))

    def search(
        self,
        query: Any,
        limit: int,
        conditions: Any = None,
        *,
        by: str = "meaning",
        vectors: bool = False,
        **how: Any,
    ) -> Work[list[Row]]:
        """The rows nearest to a text or vector, nearest first; by ``"meaning"``, ``"words"`` or
        ``"both"``.

        Scores of the latter are in the place of similarities; ``how`` are arguments of the search.
        """
        how |= {"limit": limit, "where": () if conditions is None else self.where(conditions)}
        statement: Any
        if by == "meaning":
            statement = nearest(self.column, query, **how)
        elif by not in ("words", "both") or self.words is None or not isinstance(query, str):
            raise DeclarationError(
                f"A search by {by!r}: it is 'meaning'; or 'words' or 'both', of a question in "
                "words and a store that is given words=, the name of a text_column()."
            )
        elif by == "words":
            statement = matching(getattr(self.class_, self.words), query, **how)
        else:
            statement = hybrid(self.column, getattr(self.class_, self.words), query, **how)
        if vectors:
            statement = statement.options(undefer(self.column))
        return lambda session: [
            self._row(entity, score, vectors) for entity, score, *_ in session.execute(statement)
        ]

    def diverse(
        self, query: Any, limit: int, conditions: Any = None, *, out_of: int, trade: float, by: str
    ) -> Work[list[Row]]:
        """As ``search``, without what repeats itself: ``sbert_pg.diverse`` of ``out_of`` rows."""
        search = self.search(query, out_of, conditions, by=by, vectors=True)

        def work(session: Session) -> list[Row]:
            text = isinstance(query, str)
            asked = query_vector(self.encoder, query) if text else np.asarray(query, np.float32)
            rows = search(session)
            return diverse(rows, limit, vector=lambda r: r.vector, question=asked, trade=trade)

        return work

    def has_id(self, ids: Iterable[str]) -> sa.ColumnElement[bool]:
        """Whether a row has one of some ids."""
        return self._is_one_of([key for key in map(self._key_of, ids) if key is not None])

    def _is_one_of(self, keys: list[Any]) -> sa.ColumnElement[bool]:
        """One parameter, since a statement has 65,535 at most, and over asyncpg 32,767."""
        key = getattr(self.class_, self.key)
        criterion: sa.ColumnElement[bool] = key == sa.any_(sa.literal(keys, sa.ARRAY(key.type)))
        return criterion

    def field(self, name: str) -> sa.ColumnElement[Any]:
        """The column of a field of the metadata, or its value within the JSON attribute.

        There ``a.b`` is the field of that name, else ``b`` of the object ``a``.
        """
        if name in self.own:
            column: sa.ColumnElement[Any] = getattr(self.class_, name)
            return column
        if self.metadata is None:
            raise DeclarationError(self._unknown(name))
        whole = sa.cast(getattr(self.class_, self.metadata), JSONB)
        value = whole[name]
        if "." in name:
            value = sa.func.coalesce(value, whole[tuple(name.split("."))])
        return sa.func.nullif(value, sa.cast(sa.literal("null"), JSONB), type_=JSONB())

    def _unknown(self, name: str) -> str:
        return (
            f"{self.class_.__name__} has no attribute {name!r} for metadata; it has "
            f"{', '.join(self.own) or 'none'}. Add a column, or give the name of a JSON attribute "
            "for all others, by metadata=."
        )

    def _values(self, row: Row) -> dict[str, Any]:
        """A row by attributes."""
        values, rest = self._split(row.metadata)
        values[self.content] = row.text
        if self.metadata is not None:
            values[self.metadata] = rest
        if row.id is not None:
            values[self.key] = self._key_of(row.id)
            if values[self.key] is None:
                raise DeclarationError(
                    f"{row.id!r} is no {self._key_type.__name__}, as the key of "
                    f"{self.class_.__name__} is."
                )
        elif issubclass(self._key_type, (str, uuid.UUID)):
            values[self.key] = self._key_type(str(uuid.uuid4()))
        return values

    def _split(self, metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What has its own attribute, and what goes into the JSON attribute."""
        values = {name: value for name, value in metadata.items() if name in self.own}
        rest = {name: value for name, value in metadata.items() if name not in self.own}
        if rest and self.metadata is None:
            raise DeclarationError(self._unknown(next(iter(rest))))
        return values, rest

    def _row(self, entity: Any, similarity: float | None = None, vector: bool = False) -> Row:
        own = {name: getattr(entity, name) for name in self.own}
        metadata = {name: value for name, value in own.items() if value is not None}
        if self.metadata is not None:
            metadata |= getattr(entity, self.metadata) or {}
        return Row(
            str(getattr(entity, self.key)),
            getattr(entity, self.content) or "",
            metadata,
            similarity,
            getattr(entity, self.column.key) if vector else None,
        )

    def _column(self, name: str) -> sa.Column[Any]:
        column: sa.Column[Any] = sa.inspect(self.class_).columns[name]
        return column

    @property
    def _key_type(self) -> type[Any]:
        return self._column(self.key).type.python_type

    def _key_of(self, id_: str) -> Any:
        """The key that an id spells; ``None`` where no key is spelled so."""
        try:
            return self._key_type(id_)
        except (TypeError, ValueError):
            return None


class Store:
    """What the stores of other libraries are: documents, and sessions to read and write them in.

    Args:
        column: the embedding column, as in ``Article.embedding``.
        sessions: a ``sessionmaker``, for both synchronous calls and asynchronous ones, which run in
            a thread; or an ``async_sessionmaker``, for asynchronous calls alone.
        content: name of the attribute that is the text; the embedding's source by default.
        metadata: name of a JSON attribute for metadata that has no attribute of its own.
        words: name of a text column's attribute, for searches by words or both.

    Raises:
        DeclarationError: what the class declares cannot be used so.
    """

    def __init__(
        self,
        column: Any,
        sessions: Any,
        *,
        content: str | None = None,
        metadata: str | None = None,
        words: str | None = None,
    ) -> None:
        self.documents = Documents(column, content=content, metadata=metadata, words=words)
        self._runner = Runner(sessions)


def _mapper_of(column: Any) -> Mapper[Any]:
    mapper: Mapper[Any] | None = getattr(column, "parent", None)
    if not isinstance(getattr(column, "type", None), Embedding) or mapper is None:
        raise DeclarationError(
            f"{column} is no embedding column of a mapped class; give one, as in Article.embedding."
        )
    if len(mapper.primary_key) != 1:
        raise DeclarationError(
            f"{mapper.class_.__name__} has a primary key of {len(mapper.primary_key)} columns, "
            "and the id of a document is one value."
        )
    return mapper


def _by_attributes(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that name the same attributes together, as one statement writes them."""
    groups: dict[frozenset[str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(frozenset(row), []).append(row)
    return list(groups.values())


__all__ = ["Documents", "Row", "Store"]
