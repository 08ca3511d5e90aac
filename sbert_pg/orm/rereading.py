"""Lock rows and read their source again, before a part of a source is changed.

Where a text is made of several columns and a writer changes one of them, the others may have been
changed by somebody else since they were loaded. Locked and read again, the text that is encoded is
the text that the row will have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapper, Session

from sbert_pg.orm.attributes import EmbeddingAttribute

#: Rows locked by one statement.
BLOCK = 1000

Key = tuple[Any, ...]


def locked_sources(
    session: Session, mapper: Mapper[Any], attribute: EmbeddingAttribute, keys: Sequence[Key]
) -> dict[Key, dict[str, Any]]:
    """The source of some rows as it is now, held until the transaction ends.

    The rows are locked ``FOR NO KEY UPDATE``, as the ``UPDATE`` to come locks them, in the order of
    their keys, so that two sessions do not wait for each other.

    Args:
        session: the session that will write the rows.
        mapper: decides the session's connection.
        attribute: the embedding column.
        keys: values of its table's primary key.

    Returns:
        By key, the values of the source by attribute name. A row that is gone is left out.
    """
    columns, width = attribute.row_columns, len(attribute.row_columns)
    left = columns[0] if width == 1 else sa.tuple_(*columns)
    found: dict[Key, dict[str, Any]] = {}
    for start in range(0, len(keys), BLOCK):
        block = keys[start : start + BLOCK]
        statement = (
            sa.select(*columns, *attribute.filling.source_columns)
            .where(left.in_([key[0] for key in block] if width == 1 else block))
            .order_by(*columns)
            .with_for_update(key_share=True)
        )
        for row in session.execute(statement, bind_arguments={"mapper": mapper}):
            values = zip(attribute.source_keys, row[width:], strict=True)
            found[tuple(row[:width])] = dict(values)
    return found
