"""The SQL that a search becomes, letter by letter."""

from __future__ import annotations

import re
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import psycopg

from sbert_pg import Embedding, HalfVector, Vector, hnsw_index, ivfflat_index, nearest
from sbert_pg.errors import DeclarationError, DimensionError, ZeroVectorError

QUERY = [1.0, 0.0, 0.0]
HNSW = (
    "(SELECT concat(set_config('hnsw.ef_search', %(param_2)s::VARCHAR, true), "
    "set_config('hnsw.iterative_scan', 'relaxed_order', true), "
    "set_config('hnsw.max_scan_tuples', '100000', true)) AS concat_1) IS NOT NULL"
)


def table(*indexes: sa.Index, type_: Any = None) -> sa.Table:
    return sa.Table(
        "thing",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("lang", sa.Text),
        sa.Column("vec", Vector(3) if type_ is None else type_),
        *indexes,
    )


def sql(statement: Any) -> str:
    text = str(statement.compile(dialect=psycopg.dialect()))
    return re.sub(r"\s+", " ", text)


def test_without_an_index_it_is_the_plain_statement() -> None:
    thing = table()
    assert sql(nearest(thing.c.vec, QUERY)) == (
        "SELECT thing.id, thing.lang, 1 - (thing.vec <=> %(param_1)s::VECTOR(3)) AS similarity "
        "FROM thing WHERE thing.vec IS NOT NULL "
        "ORDER BY thing.vec <=> %(param_1)s::VECTOR(3), thing.id LIMIT %(param_2)s::INTEGER"
    )


def test_by_an_hnsw_index() -> None:
    thing = table(hnsw_index("i", "vec"))
    assert sql(nearest(thing.c.vec, QUERY)) == (
        "SELECT * FROM (SELECT thing.id, thing.lang, "
        "1 - (thing.vec <=> %(param_1)s::VECTOR(3)) AS similarity FROM thing "
        f"WHERE {HNSW} AND thing.vec IS NOT NULL "
        "ORDER BY thing.vec <=> %(param_1)s::VECTOR(3), thing.id LIMIT %(param_3)s::INTEGER) "
        "AS nearest ORDER BY 3 DESC"
    )


def test_under_a_filter_the_first_stage_is_filtered() -> None:
    thing = table(hnsw_index("i", "vec"))
    assert sql(nearest(thing.c.vec, QUERY).where(thing.c.lang == "de")) == (
        "SELECT * FROM (SELECT thing.id, thing.lang, "
        "1 - (thing.vec <=> %(param_1)s::VECTOR(3)) AS similarity FROM thing, "
        "(SELECT numbered.nearest_key_0 AS nearest_key_0, "
        "numbered.nearest_distance AS nearest_distance, "
        "CASE WHEN bool_and(numbered.follows) OVER () THEN 0 "
        "ELSE (numbered.number - 1) / (%(param_2)s::INTEGER * 2) END AS nearest_place "
        "FROM (SELECT candidates.nearest_key_0 AS nearest_key_0, "
        "candidates.nearest_distance AS nearest_distance, "
        "row_number() OVER () AS number, "
        "candidates.nearest_distance >= lag(candidates.nearest_distance) OVER () AS follows "
        "FROM (SELECT thing.id AS nearest_key_0, "
        "thing.vec <=> %(param_1)s::VECTOR(3) AS nearest_distance "
        f"FROM thing WHERE {HNSW.replace('param_2', 'param_3')} AND thing.vec IS NOT NULL "
        "AND thing.lang = %(lang_1)s::VARCHAR ORDER BY thing.vec <=> %(param_1)s::VECTOR(3) "
        "FETCH FIRST (%(param_2)s::INTEGER * 2) ROWS WITH TIES) AS candidates) "
        "AS numbered) AS nearest_rows "
        "WHERE thing.vec IS NOT NULL AND thing.lang = %(lang_1)s::VARCHAR "
        "AND thing.id = nearest_rows.nearest_key_0 ORDER BY nearest_rows.nearest_place, "
        "nearest_rows.nearest_distance, thing.id "
        "LIMIT %(param_2)s::INTEGER) AS nearest ORDER BY 3 DESC"
    )


def test_by_a_binary_index_an_exact_distance_ranks() -> None:
    thing = table(hnsw_index("i", "vec", form="binary"))
    assert sql(nearest(thing.c.vec, QUERY)) == (
        "SELECT * FROM (SELECT thing.id, thing.lang, "
        "1 - (thing.vec <=> %(param_1)s::VECTOR(3)) AS similarity FROM thing, "
        "(SELECT candidates.nearest_key_0 AS nearest_key_0, 0 AS nearest_place "
        "FROM (SELECT thing.id AS nearest_key_0 FROM thing "
        f"WHERE {HNSW} AND thing.vec IS NOT NULL "
        "ORDER BY CAST(binary_quantize(thing.vec) AS BIT(3)) <~> "
        "CAST(binary_quantize(%(param_1)s::VECTOR(3)) AS BIT(3)) "
        "LIMIT %(param_3)s::INTEGER * %(param_4)s::BIGINT) AS candidates) AS nearest_rows "
        "WHERE thing.vec IS NOT NULL AND thing.id = nearest_rows.nearest_key_0 "
        "ORDER BY nearest_rows.nearest_place, (thing.vec <=> %(param_1)s::VECTOR(3)) + 0, "
        "thing.id LIMIT %(param_3)s::INTEGER) AS nearest ORDER BY 3 DESC"
    )


def test_by_a_halfvec_index_the_similarity_is_the_columns() -> None:
    thing = table(hnsw_index("i", "vec", form="halfvec"))
    text = sql(nearest(thing.c.vec, QUERY))
    assert (
        "ORDER BY CAST(thing.vec AS HALFVEC(3)) <=> "
        "CAST(%(param_1)s::VECTOR(3) AS HALFVEC(3)), thing.id" in text
    )
    assert "1 - (thing.vec <=> %(param_1)s::VECTOR(3)) AS similarity" in text


def test_by_an_ivfflat_index() -> None:
    thing = table(ivfflat_index("i", "vec", lists=100))
    text = sql(nearest(thing.c.vec, QUERY))
    assert "set_config('ivfflat.iterative_scan', 'relaxed_order', true)" in text
    assert "set_config('ivfflat.probes', %(param_2)s::VARCHAR, true)" in text
    compiled = nearest(thing.c.vec, QUERY).compile(dialect=psycopg.dialect())
    assert compiled.params["param_2"] == "10"
    compiled = nearest(thing.c.vec, QUERY, probes=3).compile(dialect=psycopg.dialect())
    assert compiled.params["param_2"] == "3"


def test_exact_search_leaves_indexes_aside() -> None:
    thing = table(hnsw_index("i", "vec", form="binary"))
    text = sql(nearest(thing.c.vec, QUERY, exact=True))
    assert "set_config" not in text
    assert "ORDER BY (thing.vec <=> %(param_1)s::VECTOR(3)) + 0" in text


@pytest.mark.parametrize(
    ("similarity", "operator", "shown"),
    [
        ("cosine", "<=>", "1 - (thing.vec <=> %(param_1)s::VECTOR(3))"),
        ("dot", "<#>", "0 - (thing.vec <#> %(param_1)s::VECTOR(3))"),
        ("euclidean", "<->", "0 - (thing.vec <-> %(param_1)s::VECTOR(3))"),
        ("manhattan", "<+>", "0 - (thing.vec <+> %(param_1)s::VECTOR(3))"),
    ],
)
def test_each_metric(similarity: Any, operator: str, shown: str) -> None:
    thing = table(hnsw_index("i", "vec", similarity=similarity))
    text = sql(nearest(thing.c.vec, QUERY))
    assert f"{shown} AS similarity" in text
    assert f"ORDER BY thing.vec {operator} %(param_1)s::VECTOR(3)" in text
    plain = sql(sa.select(thing.c.id).order_by(thing.c.vec.distance(QUERY)))
    assert f"ORDER BY thing.vec {operator} %(vec_1)s::VECTOR(3)" in plain.replace("param", "vec")


def test_distance_is_in_the_form_that_the_index_serves() -> None:
    half = table(hnsw_index("i", "vec", form="halfvec"))
    assert "CAST(thing.vec AS HALFVEC(3)) <=> CAST(" in sql(
        sa.select(half.c.id).order_by(half.c.vec.distance(QUERY))
    )
    binary = table(hnsw_index("i", "vec", form="binary"))
    assert "ORDER BY thing.vec <=> " in sql(
        sa.select(binary.c.id).order_by(binary.c.vec.distance(QUERY))
    )


def test_an_index_of_the_encoders_metric_is_preferred() -> None:
    """Whatever their names: another metric, a part of the rows and coarse forms come last."""
    kind = Embedding("deterministic", "lang", dimensions=3)
    thing = table(
        hnsw_index("a", "vec", similarity="manhattan"),
        hnsw_index("b", "vec", where=sa.text("lang = 'de'")),
        hnsw_index("c", "vec", form="binary"),
        hnsw_index("d", "vec", form="halfvec"),
        type_=kind,
    )
    assert "AS HALFVEC(3)) <=> " in sql(nearest(thing.c.vec, QUERY))


def test_settings_follow_what_is_asked() -> None:
    thing = table(hnsw_index("i", "vec"))

    def ef_search(**options: Any) -> str:
        compiled = nearest(thing.c.vec, QUERY, **options).compile(dialect=psycopg.dialect())
        return str(compiled.params["param_2"])

    assert ef_search() == "100"
    assert ef_search(limit=300) == "300"
    assert ef_search(limit=5000) == "1000"
    assert ef_search(ef_search=20) == "20"


def test_statements_of_one_shape_share_a_compilation() -> None:
    thing = table(hnsw_index("i", "vec", form="binary"))

    def key(*arguments: Any, **options: Any) -> Any:
        return nearest(thing.c.vec, *arguments, **options)._generate_cache_key()

    assert key(QUERY) is not None
    assert key(QUERY) == key([0, 1, 0], limit=7, overfetch=5)
    assert key(QUERY) != key(QUERY, offset=10)
    assert key(QUERY) != key(QUERY, max_distance=0.5)
    assert key(QUERY, max_distance=0.5) == key(QUERY, max_distance=0.7)
    assert key(QUERY) != sa.select(thing.c.id)._generate_cache_key()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"limit": 0}, "limit starts at 1"),
        ({"offset": -1}, "offset at 0"),
        ({"ef_search": 1001}, "1 to 1000"),
        ({"probes": 0}, "1 to 32768"),
        ({"overfetch": 0}, "starts at 1"),
        ({"max_distance": 1, "min_similarity": 0}, "not both"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(DeclarationError, match=says):
        nearest(table().c.vec, QUERY, **options)


def test_queries_that_make_no_sense() -> None:
    thing = table()
    with pytest.raises(DeclarationError, match="no vector column"):
        nearest(thing.c.lang, QUERY)
    with pytest.raises(DeclarationError, match="has no encoder"):
        nearest(thing.c.vec, "a text")
    with pytest.raises(DeclarationError, match="compared with None"):
        nearest(thing.c.vec, None)
    with pytest.raises(DimensionError, match="2 dimensions and 3 are expected"):
        nearest(thing.c.vec, [1, 2])
    known = table(type_=Embedding("deterministic", "lang", dimensions=3))
    with pytest.raises(ZeroVectorError, match="all zeros"):
        nearest(known.c.vec, [0, 0, 0])


def test_stages_need_a_key_to_join_by() -> None:
    keyless = sa.Table(
        "thing", sa.MetaData(), sa.Column("vec", Vector(3)), hnsw_index("i", "vec", form="binary")
    )
    with pytest.raises(DeclarationError, match="primary key"):
        nearest(keyless.c.vec, QUERY)
    assert HalfVector(3).get_col_spec() == "HALFVEC(3)"
