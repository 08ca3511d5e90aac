"""Passages with their texts as a view, for readers in SQL.

Alembic's autogenerate does not see views: create it in a migration, or by an explicit call.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles

from sbert_pg.errors import DeclarationError
from sbert_pg.passages.cutting import DIGITS
from sbert_pg.passages.declaring import PASSAGE_COLUMNS, Declared, declared_passages
from sbert_pg.source import GAP


def text_of(declared: Declared) -> sa.ColumnElement[str]:
    """A passage's part of its document; ``NULL`` where the document has changed since it was cut.

    For a statement that joins both tables.
    """
    passage: Any = sa.inspect(declared.passage).local_table.c
    body: Any = sa.inspect(declared.document).columns[declared.source_keys[-1]]
    part = sa.func.substr(body, passage.start + 1, passage.stop - passage.start)
    whole = sa.func.concat_ws(GAP, sa.func.nullif(passage.heading, ""), part)
    hashed = sa.func.encode(sa.func.sha256(sa.func.convert_to(whole, "UTF8")), "hex")
    return sa.case((sa.func.substr(hashed, 1, DIGITS) == passage.digest, part))


class PassageView(sa.schema.ExecutableDDLElement):
    """``CREATE OR REPLACE VIEW`` of the passages of a class, each with its text.

    In a migration: ``op.execute(PassageView(Document.passages))``. The view has the passages' key,
    the document's, their places and ``text``, which is ``NULL`` while a changed document waits for
    being cut again.

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
        table = sa.inspect(declared.passage).local_table
        assert isinstance(table, sa.Table)
        self.name = name or f"{table.name}_text"
        self.schema = table.schema
        mapper = sa.inspect(declared.document)
        body = mapper.columns[declared.source_keys[-1]]
        keys = [ours for ours, _ in declared.keys]
        self.query = sa.select(
            table.c.id,
            *keys,
            *(table.c[name] for name in PASSAGE_COLUMNS),
            text_of(declared).label("text"),
        ).join_from(table, body.table, sa.and_(*(a == b for a, b in declared.keys)))


@compiles(PassageView)
def _create(element: PassageView, compiler: Any, **options: Any) -> str:
    name = compiler.preparer.format_table(
        sa.Table(element.name, sa.MetaData(), schema=element.schema)
    )
    query = compiler.sql_compiler.process(element.query, literal_binds=True)
    return f"CREATE OR REPLACE VIEW {name} AS {query}"
