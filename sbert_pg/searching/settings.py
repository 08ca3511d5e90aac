"""Index settings for one statement."""

from __future__ import annotations

import math
from functools import lru_cache

import sqlalchemy as sa

from sbert_pg.distance import IndexMethod

MAX_EF_SEARCH = 1000
#: Rows that an iterative scan looks at before it gives up; pgvector's default is 20,000, which
#: returns too few rows under a filter that keeps less than one row in 2,000.
MAX_SCAN_TUPLES = 100_000


@lru_cache(maxsize=256)
def index_settings(
    method: IndexMethod, lists: int | None, ef_search: int, probes: int | None
) -> sa.ColumnElement[bool]:
    """A criterion that is always true, and sets what an index reads before its scan begins.

    The planner runs a subquery that hangs on no row once, ahead of the scan below it, and HNSW and
    IVFFlat read their settings when the first row is asked for.

    Args:
        method: access method of the index.
        lists: inverted lists of an IVFFlat index, where known.
        ef_search: HNSW candidates.
        probes: IVFFlat lists to look into; the square root of ``lists`` by default.
    """
    # What never varies is part of the text: a parameter costs a microsecond or two on its way.
    values: dict[str, sa.ColumnElement[str]]
    if method == "hnsw":
        values = {
            "'hnsw.ef_search'": sa.literal(str(ef_search), sa.Text()),
            "'hnsw.iterative_scan'": sa.literal_column("'relaxed_order'"),
            "'hnsw.max_scan_tuples'": sa.literal_column(f"'{MAX_SCAN_TUPLES:d}'"),
        }
    else:
        values = {"'ivfflat.iterative_scan'": sa.literal_column("'relaxed_order'")}
        number = probes or (math.isqrt(lists) if lists else None)
        if number is not None:
            values["'ivfflat.probes'"] = sa.literal(str(number), sa.Text())
    calls = [
        sa.func.set_config(sa.literal_column(name), value, sa.true(), type_=sa.Text())
        for name, value in values.items()
    ]
    return sa.select(sa.func.concat(*calls)).scalar_subquery().is_not(None)
