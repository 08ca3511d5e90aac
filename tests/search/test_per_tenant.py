"""A partial index a tenant: a search within a tenant is served by its own, and is right."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pytest
import sqlalchemy as sa

from sbert_pg import Vector, hnsw_index, indexes_per, ivfflat_index, nearest
from sbert_pg.errors import DeclarationError
from sbert_pg.indexes import vector_indexes
from sbert_pg.types.indexed import description_of

DIMENSIONS, ROWS, QUERIES = 24, 2_500, 25
#: Tenants with an index of their own; a third has none.
TENANTS = ("north", "o'brien & sons 50%")


class Tenants(NamedTuple):
    """A table with the rows of three tenants, and questions."""

    connection: sa.Connection
    row: sa.Table
    queries: Any


@pytest.fixture(scope="module")
def tenants(databases: Any) -> Iterator[Tenants]:
    row = sa.Table(
        "row",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("lang", sa.Text, nullable=False),
        sa.Column("vec", Vector(DIMENSIONS)),
        *indexes_per("tenant", TENANTS, hnsw_index, "row_vec", "vec"),
    )
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((20, DIMENSIONS), dtype=np.float32)
    picked = rng.integers(0, 20, 2 * ROWS + 200)
    noise = rng.standard_normal((len(picked), DIMENSIONS), dtype=np.float32)
    vectors = centres[picked] + 0.6 * noise
    names = [TENANTS[0]] * ROWS + [TENANTS[1]] * ROWS + ["small"] * 200
    url = databases.clone("bare")
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        row.create(connection)
        connection.execute(
            row.insert(),
            [
                {"id": n, "tenant": name, "lang": "de" if n % 3 else "en", "vec": vector}
                for n, (name, vector) in enumerate(zip(names, vectors, strict=True))
            ],
        )
        connection.execute(sa.text("ANALYZE row"))
    with engine.connect() as connection:
        queries = centres[rng.integers(0, 20, QUERIES)] + 0.6 * rng.standard_normal(
            (QUERIES, DIMENSIONS), dtype=np.float32
        )
        yield Tenants(connection, row, queries)
    engine.dispose()
    databases.discard(str(url.database))


def index_names(tenants: Tenants) -> list[str]:
    stored = vector_indexes(tenants.connection, "row")
    return [next(i.name for i in stored if tenant[2:5] in i.definition) for tenant in TENANTS]


def scans(tenants: Tenants, *names: str) -> list[int]:
    """How often indexes were used; of a connection, which has some left from before this moment.

    They are handed on between transactions, so two numbers of one transaction can be compared.
    """
    quote = tenants.connection.dialect.identifier_preparer.quote
    count = sa.text("SELECT pg_stat_get_xact_numscans(CAST(:name AS regclass))")
    return [tenants.connection.scalar(count, {"name": quote(name)}) or 0 for name in names]


@pytest.mark.parametrize("tenant", [0, 1])
def test_recall_within_a_tenant_and_whose_index_it_is(tenants: Tenants, tenant: int) -> None:
    """More often than it takes the server to plan for all values: the index stays the tenant's."""
    row, found = tenants.row, 0
    own, other = index_names(tenants)[tenant], index_names(tenants)[1 - tenant]
    tenants.connection.rollback()
    before = scans(tenants, own, other)
    for query in tenants.queries:
        answers = []
        for exact in (True, False):
            search = nearest(row.c.vec, query, exact=exact).where(row.c.tenant == TENANTS[tenant])
            rows = tenants.connection.execute(search).all()
            assert {r.tenant for r in rows} == {TENANTS[tenant]}
            answers.append({r.id for r in rows})
        found += len(answers[0] & answers[1])
    after = scans(tenants, own, other)
    tenants.connection.rollback()
    assert found >= 0.98 * 10 * QUERIES
    assert [b - a for a, b in zip(before, after, strict=True)] == [QUERIES, 0]


def test_explain_names_the_tenants_index(tenants: Tenants) -> None:
    row = tenants.row
    search = nearest(row.c.vec, tenants.queries[0]).where(row.c.tenant == TENANTS[1])
    written = {"render_postcompile": True}
    compiled = search.compile(tenants.connection, compile_kwargs=written)
    plan = tenants.connection.exec_driver_sql(f"EXPLAIN {compiled}", compiled.params).scalars()
    text = "\n".join(plan)
    tenants.connection.rollback()
    own, other = index_names(tenants)[1], index_names(tenants)[0]
    assert own in text
    assert other not in text


def test_further_criteria_and_tenants_without_an_index(tenants: Tenants) -> None:
    row, shares = tenants.row, []
    criteria = [
        [row.c.tenant == TENANTS[0], row.c.lang == "en"],
        [row.c.tenant == "small"],
        [row.c.tenant.in_([TENANTS[0], "small"])],
        [row.c.lang == "en"],
        [],
    ]
    for query in tenants.queries[:8]:
        for filters in criteria:
            search = nearest(row.c.vec, query).where(*filters)
            exact = nearest(row.c.vec, query, exact=True).where(*filters)
            answers = [{r.id for r in tenants.connection.execute(s)} for s in (search, exact)]
            assert len(answers[0]) == 10
            shares.append(len(answers[0] & answers[1]) / 10)
    tenants.connection.rollback()
    assert np.mean(shares) >= 0.98


def test_names_are_short_and_tell_values_apart() -> None:
    values: list[Any] = [7, -7, True, uuid.UUID(int=5), "a-b", "a_b", "A_B", "x" * 200, "ß"]
    made = indexes_per("tenant", values, ivfflat_index, "row_vec", "vec", lists=9)
    names = [str(index.name) for index in made]
    assert names[0] == "row_vec_7"
    assert len({name.lower() for name in names}) == len(values)
    assert max(len(name.encode()) for name in names) <= 63
    assert names == [
        str(index.name)
        for index in indexes_per("tenant", values, ivfflat_index, "row_vec", "vec", lists=9)
    ]


def test_another_predicate_and_a_column_that_is_not_there() -> None:
    def made(column: str) -> sa.Table:
        return sa.Table(
            "row",
            sa.MetaData(),
            sa.Column("tenant no", sa.Integer, key="tenant"),
            sa.Column("lang", sa.Text),
            sa.Column("vec", Vector(8)),
            *indexes_per(column, [4], hnsw_index, "row_vec", "vec", where=sa.text("lang = 'de'")),
        )

    (index,) = made("tenant").indexes
    description = description_of(index)
    assert description is not None
    assert description.where == "\"tenant no\" = 4 AND lang = 'de'"
    with pytest.raises(DeclarationError, match="no column 'shop'"):
        made("shop")


def test_a_named_parameter_keeps_the_value_of_each_execution(tenants: Tenants) -> None:
    row = tenants.row
    named = row.c.tenant == sa.bindparam("tenant", TENANTS[0])
    search = nearest(row.c.vec, tenants.queries[0]).where(named)
    for given in (TENANTS[1], "small"):
        rows = tenants.connection.execute(search, {"tenant": given}).all()
        assert {r.tenant for r in rows} == {given}
        rows = tenants.connection.execute(search.params(tenant=given)).all()
        assert {r.tenant for r in rows} == {given}
    assert {r.tenant for r in tenants.connection.execute(search)} == {TENANTS[0]}
    tenants.connection.rollback()


def test_a_lambda_takes_the_value_of_each_call(tenants: Tenants) -> None:
    row, query = tenants.row, tenants.queries[0]
    search = nearest(row.c.vec, query)
    for tenant in (TENANTS[0], TENANTS[1], "small"):
        statement = sa.lambda_stmt(lambda: search)
        statement += lambda s: s.where(row.c.tenant == tenant)  # noqa: B023
        assert {r.tenant for r in tenants.connection.execute(statement)} == {tenant}
    tenants.connection.rollback()


def search_of_tenant(
    type_: sa.types.TypeEngine[Any], value: Any, *indexes: sa.Index
) -> sa.engine.Compiled:
    """A search of one tenant's rows, compiled, beside partial indexes."""
    row = sa.Table(
        "row",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("tenant", type_),
        sa.Column("vec", Vector(3)),
        *indexes,
    )
    asked = row.c.tenant == sa.literal(value, type_)
    search = nearest(row.c.vec, [1.0, 2.0, 3.0]).where(asked)
    return search.compile(dialect=sa.dialects.postgresql.dialect())


@pytest.mark.parametrize(
    ("type_", "value", "spelled"),
    [
        (sa.Text(), "it's", True),
        (sa.Integer(), 7, True),
        (sa.Uuid(), uuid.UUID(int=7), True),
        (sa.Uuid(as_uuid=False), str(uuid.UUID(int=7)), True),
        (sa.Numeric(), "7 OR true", False),
        (sa.Float(), "7 OR true", False),
        (sa.Uuid(), "7' OR 'a' = 'a", False),
        (sa.Integer(), "7 OR true", False),
    ],
    ids=str,
)
def test_only_values_that_cannot_be_sql_are_written_out(
    type_: sa.types.TypeEngine[Any], value: Any, spelled: bool
) -> None:
    partial = hnsw_index("row_vec", "vec", where=sa.text("tenant IS NOT NULL"))
    compiled = search_of_tenant(type_, value, partial)
    assert (len(compiled.literal_execute_params) == 1) is spelled
    assert value in compiled.params.values()


@pytest.mark.parametrize(
    ("type_", "declared", "other"),
    [
        (sa.Numeric(), Decimal("7.5"), "7.5 OR true"),
        (sa.Date(), datetime.date(2024, 2, 29), datetime.date(2024, 3, 1)),
        (sa.Text(), "it's", "its"),
    ],
    ids=str,
)
def test_values_of_declared_indexes_are_written_out_and_no_others(
    type_: sa.types.TypeEngine[Any], declared: Any, other: Any
) -> None:
    for value in (declared, other):
        each = indexes_per("tenant", [declared], hnsw_index, "row_vec", "vec")
        compiled = search_of_tenant(type_, value, *each)
        assert (len(compiled.literal_execute_params) == 1) is (value is declared)
