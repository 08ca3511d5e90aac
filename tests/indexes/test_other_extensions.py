"""Indexes of pgvectorscale and VectorChord: what they render, and how a search asks them.

No server with either was at hand. What they take is read off their sources, and here access
methods of their names stand in, which are pgvector's: they show that such an index is read off a
server, compared and searched with its own settings, and nothing about the extensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import psycopg

from sbert_pg import HalfVector, Vector, diskann_index, nearest, vchordrq_index
from sbert_pg.errors import DeclarationError
from sbert_pg.indexes import index_like, same_index, vector_indexes
from sbert_pg.types.indexed import description_of

#: Pgvector's handlers under the names of others.
STAND_INS = """
CREATE ACCESS METHOD diskann TYPE INDEX HANDLER hnswhandler;
CREATE OPERATOR CLASS vector_cosine_ops FOR TYPE vector USING diskann AS
    OPERATOR 1 <=> (vector, vector) FOR ORDER BY float_ops,
    FUNCTION 1 vector_negative_inner_product(vector, vector), FUNCTION 2 vector_norm(vector);
CREATE ACCESS METHOD vchordrq TYPE INDEX HANDLER ivfflathandler;
CREATE OPERATOR CLASS vector_cosine_ops FOR TYPE vector USING vchordrq AS
    OPERATOR 1 <=> (vector, vector) FOR ORDER BY float_ops,
    FUNCTION 1 vector_negative_inner_product(vector, vector), FUNCTION 2 vector_norm(vector),
    FUNCTION 3 vector_spherical_distance(vector, vector), FUNCTION 4 vector_norm(vector);
"""


def table(*indexes: sa.Index, type_: Any = None) -> sa.Table:
    columns = sa.Column("id", sa.Integer, primary_key=True), sa.Column("vec", type_ or Vector(8))
    return sa.Table("thing", sa.MetaData(), *columns, *indexes)


def ddl(index: sa.Index) -> str:
    return str(sa.schema.CreateIndex(index).compile(dialect=psycopg.dialect()))


CASES: dict[str, tuple[Any, Any, str]] = {
    "diskann": (
        lambda: diskann_index("i", "vec"),
        None,
        "diskann (vec vector_cosine_ops)",
    ),
    "diskann plain": (
        lambda: diskann_index("i", "vec", similarity="euclidean", storage_layout="plain"),
        None,
        "diskann (vec vector_l2_ops) WITH (storage_layout = plain)",
    ),
    "diskann of a part": (
        lambda: diskann_index("i", "vec", num_neighbors=30, max_alpha=1.5, where=sa.text("id > 5")),
        None,
        ("diskann (vec vector_cosine_ops) WITH (num_neighbors = 30, max_alpha = 1.5) WHERE id > 5"),
    ),
    "vchordrq without lists": (
        lambda: vchordrq_index("i", "vec", similarity="dot"),
        HalfVector(8),
        "vchordrq (vec halfvec_ip_ops)",
    ),
    "vchordrq": (
        lambda: vchordrq_index("i", "vec", lists=[1000]),
        None,
        (
            "vchordrq (vec vector_cosine_ops) WITH (options = '[build.internal]\n"
            "lists = [1000]\nspherical_centroids = true', probes = 502)"
        ),
    ),
    "vchordrq of two levels": (
        lambda: vchordrq_index(
            "i", "vec", lists=[40, 1600], probes=[10, 80], form="halfvec", similarity="euclidean"
        ),
        None,
        (
            "vchordrq (CAST(vec AS HALFVEC(8)) halfvec_l2_ops) WITH (options = "
            "'residual_quantization = true\n[build.internal]\nlists = [40, 1600]\n"
            "spherical_centroids = false', probes = '10,80')"
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_ddl(case: str) -> None:
    make, type_, expected = CASES[case]
    index = make()
    copied = table(index, type_=type_).to_metadata(sa.MetaData())
    assert ddl(index) == f"CREATE INDEX i ON thing USING {expected}"
    assert ddl(next(iter(copied.indexes))) == ddl(index)


@pytest.mark.parametrize("case", CASES)
def test_what_a_migration_builds_is_what_is_declared(case: str) -> None:
    make, type_, _ = CASES[case]
    index = make()
    table(index, type_=type_)
    description = description_of(index)
    assert description is not None
    again = description_of(description.to_index())
    assert again is not None
    assert again.effective_options == description.effective_options
    assert (again.method, again.opclass) == (description.method, description.opclass)
    other = sa.Table("other", sa.MetaData(), sa.Column("new", type_ or Vector(8)))
    beside = index_like(description, other.c.new, "j")
    assert (
        ddl(beside).partition(" WITH ")[2].partition(" WHERE ")[0]
        == (ddl(index).partition(" WITH ")[2].partition(" WHERE ")[0])
    )


def test_lists_and_probes_are_read_off_the_options() -> None:
    described = {}
    for case, (make, type_, _) in CASES.items():
        index = make()
        table(index, type_=type_)
        description = description_of(index)
        assert description is not None
        described[case] = (description.lists, description.probes)
    assert described["vchordrq"] == (1000, (502,))
    assert described["vchordrq of two levels"] == (1600, (10, 80))
    assert described["diskann"] == (None, ())


def test_a_text_that_is_written_differently_is_the_same() -> None:
    by_hand = sa.Index(
        "i",
        "vec",
        postgresql_using="vchordrq",
        postgresql_ops={"vec": "vector_cosine_ops"},
        postgresql_with={
            "options": "$$\n  [build.internal]\n  lists = [9]\n  spherical_centroids = true\n$$",
            "probes": "'8'",
        },
    )
    table(by_hand)
    declared = vchordrq_index("i", "vec", lists=[9])
    table(declared)
    descriptions = [description_of(index) for index in (by_hand, declared)]
    assert descriptions[0] is not None
    assert descriptions[1] is not None
    assert descriptions[0].effective_options == descriptions[1].effective_options


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "half precision": (lambda: diskann_index("i", "vec"), HalfVector(8), "no index on halfvec"),
    "manhattan": (lambda: diskann_index("i", "vec", similarity="manhattan"), None, "hnsw_index"),
    "a level without probes": (
        lambda: vchordrq_index("i", "vec", lists=[3, 9], probes=[2]),
        None,
        "2 levels",
    ),
    "signs": (lambda: vchordrq_index("i", "vec", form="binary"), None, "one of column, halfvec"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense(case: str) -> None:
    make, type_, says = REFUSED[case]
    with pytest.raises(DeclarationError, match=says):
        table(make(), type_=type_)


def test_wider_than_pgvector_indexes() -> None:
    for make in (diskann_index, vchordrq_index):
        table(make("i", "vec"), type_=Vector(3072))


@pytest.mark.parametrize("override", [None, 5])
def test_settings_of_a_search(override: int | None) -> None:
    made = table(vchordrq_index("i", "vec", lists=[40, 1600], probes=[10, 80]))
    text = str(nearest(made.c.vec, [1.0] * 8, probes=override).compile(dialect=psycopg.dialect()))
    assert "set_config('vchordrq.max_scan_tuples', '-1'" in text
    # What VectorChord reads while it plans is the index's own, unless the caller says more.
    assert ("set_config('vchordrq.probes', '10,5'" in text) is (override is not None)
    made = table(diskann_index("i", "vec"))
    text = str(nearest(made.c.vec, [1.0] * 8).compile(dialect=psycopg.dialect()))
    assert "set_config('diskann.query_search_list_size', '100'" in text
    assert "set_config('diskann.query_rescore', '100'" in text


@pytest.mark.parametrize("method", ["diskann", "vchordrq"])
def test_on_a_server_with_a_stand_in(bare_database_url: sa.URL, method: str) -> None:
    """Read, compared, and searched: the rows of the index are the answer, under its settings."""
    index = sa.Index(
        "i", "vec", postgresql_using=method, postgresql_ops={"vec": "vector_cosine_ops"}
    )
    made = table(index)
    vectors = np.random.default_rng(1).standard_normal((3000, 8), dtype=np.float32)
    engine = sa.create_engine(bare_database_url)
    with engine.begin() as connection:
        for statement in STAND_INS.split(";")[:-1]:
            connection.execute(sa.text(statement))
        made.create(connection)
        connection.execute(
            made.insert(), [{"id": n, "vec": vector} for n, vector in enumerate(vectors)]
        )
        connection.execute(sa.text("REINDEX TABLE thing"))
        connection.execute(sa.text("ANALYZE thing"))
        (stored,) = vector_indexes(connection, "thing")
        declared = description_of(index)
        assert declared is not None
        assert (stored.method, stored.column, stored.opclass) == (method, "vec", declared.opclass)
        assert same_index(connection, declared, stored)
    names = {"diskann": "query_search_list_size", "vchordrq": "max_scan_tuples"}
    setting = sa.text(f"SELECT current_setting('{method}.{names[method]}')")
    with engine.begin() as connection:
        connection.execute(sa.text(f"SET LOCAL {method}.{names[method]} = 7"))
        search = nearest(made.c.vec, vectors[7])
        rows = connection.execute(search).all()
        assert connection.scalar(setting) == "", "set back behind the scan"
        scans = connection.scalar(sa.text("SELECT pg_stat_get_xact_numscans('i'::regclass)"))
        assert scans == 1
    assert rows[0].id == 7
    engine.dispose()
