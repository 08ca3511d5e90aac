"""The SQL that a search becomes, letter by letter."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import psycopg
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from ways import modules_of

from sbert_pg import Embedding, HalfVector, Vector, hnsw_index, ivfflat_index, nearest
from sbert_pg.errors import DeclarationError, DimensionError, ZeroVectorError

QUERY = [1.0, 0.0, 0.0]


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


PLAIN = (
    "SELECT thing.id, thing.lang, 1 - (thing.vec <=> %(param_1)s::VECTOR(3)) AS similarity "
    "FROM thing WHERE thing.vec IS NOT NULL AND vector_norm(thing.vec) != 0 "
    "ORDER BY (thing.vec <=> %(param_1)s::VECTOR(3)) + 0, thing.id LIMIT %(param_2)s::INTEGER"
)


def test_without_an_index_every_row_is_compared() -> None:
    thing = table()
    assert sql(nearest(thing.c.vec, QUERY)) == PLAIN
    indexed = table(hnsw_index("i", "vec"))
    assert sql(nearest(indexed.c.vec, QUERY, exact=True)) == PLAIN
    assert sql(nearest(indexed.c.vec, QUERY, limit=5000)) == PLAIN
    assert sql(nearest(indexed.c.vec, QUERY, limit=None)) == PLAIN.rpartition(" LIMIT")[0]


def test_by_an_hnsw_index() -> None:
    """One scan of the index, again only where it is no answer, as is a comparison of all rows."""
    text = sql(nearest(table(hnsw_index("i", "vec")).c.vec, QUERY))
    assert text.startswith(
        "WITH RECURSIVE nearest_query AS (SELECT %(param_1)s::VECTOR(3) AS vector, "
        "%(param_2)s::INTEGER AS needed), nearest_looks("
    )
    assert text.count("nearest_near AS MATERIALIZED (SELECT") == 1
    assert (
        "WHERE (SELECT concat(set_config('hnsw.ef_search', CASE WHEN (nearest_looks.look = 1) "
        "THEN '1000' ELSE '100' END, true), set_config('hnsw.iterative_scan', 'off', true)) "
        "AS concat_1) IS NOT NULL AND nearest_row.vec IS NOT NULL "
        "ORDER BY nearest_row.vec <=> (SELECT nearest_query.vector FROM nearest_query) LIMIT 50"
    ) in text
    assert "nearest_within" not in text
    assert "WHERE thing.id = ANY (coalesce((SELECT nearest_looks.nearest_key_0" in text
    assert "set_config('hnsw.ef_search', NULL, true), set_config('hnsw.iter" in text
    assert "AND count(*) >= 50 AND min(nearest_near.nearest_distance) + 1e-06 <" in text
    assert text.endswith("ORDER BY similarity DESC, thing.id LIMIT 10")
    assert text.count("JOIN") == text.count("nearest_looks JOIN LATERAL (WITH nearest_near") == 1


def test_a_filter_chooses_the_rows_once_and_its_share_is_estimated() -> None:
    text = sql(nearest(table(hnsw_index("i", "vec")).c.vec, QUERY).where(sa.column("lang") == "de"))
    assert (
        "nearest_within AS NOT MATERIALIZED (SELECT thing.id AS nearest_key_0, "
        "thing.vec AS nearest_vector FROM thing WHERE lang = %(lang_1)s::VARCHAR AND "
        "thing.vec IS NOT NULL)"
    ) in text
    assert text.count("lang_1") == 1
    assert "FROM thing AS nearest_tried TABLESAMPLE system(" in text
    # Asked behind the limits, where the planner knows of how few rows; and once.
    assert text.count("nearest_taken.nearest_key_0 = nearest_within.nearest_key_0") == 1
    assert "LIMIT nearest_looks.looked) AS nearest_taken LIMIT ALL OFFSET 0)" in text
    # Few of the rows of a page that holds many.
    assert "22 = 0 LIMIT ALL OFFSET 0) AS nearest_tries" in text


def test_criteria_about_columns_of_the_row_are_asked_of_it_as_they_are() -> None:
    thing = table(hnsw_index("i", "vec"))
    text = sql(nearest(thing.c.vec, QUERY).where(thing.c.lang == "de", thing.c.id > 3))
    assert "(WHERE nearest_tried.lang = %(lang_" in text
    assert "AND nearest_tried.id > %(id_" in text
    assert ", nearest_row.lang AS nearest_own_0 FROM" in text
    assert ", nearest_taken.nearest_own_0 = %(lang_" in text
    # Once, where the rows are compared.
    assert text.count("FROM nearest_within") == 1
    other = sa.table("other", sa.column("thing_id"))
    known = sa.exists().where(other.c.thing_id == thing.c.id)
    assert sql(nearest(thing.c.vec, QUERY).where(known)).count("FROM other") == 1


def test_rows_that_are_said_one_by_one_are_compared() -> None:
    thing = table(hnsw_index("i", "vec"), sa.Index("l", "lang"))
    key, lang = thing.c.id, thing.c.lang
    for criterion in (key == 7, key.in_([1, 2, 3]), sa.and_(key.in_([1, 2]), lang == "de")):
        assert "nearest_near" not in sql(nearest(thing.c.vec, QUERY).where(criterion))
    several = sa.or_(key == 7, lang == "de")
    for criterion in (lang == "de", key > 7, key.not_in([1]), key.in_(range(2000)), several):
        assert "FROM nearest_looks" in sql(nearest(thing.c.vec, QUERY).where(criterion))
    # A partner's key says which rows go together, and not that they are few.
    other = sa.table("other", sa.column("thing_id"))
    for criterion in (key == other.c.thing_id, key == lang):
        assert "nearest_near" in sql(nearest(thing.c.vec, QUERY).where(criterion))
    asked = sa.table("asked", sa.column("id"), sa.column("vec", Vector(3)))
    near = nearest(thing.c.vec, asked.c.vec).where(key == asked.c.id)
    assert "nearest_near" not in sql(sa.select(asked.c.id).join(near.lateral(), sa.true()))


def test_what_is_computed_of_many_rows_is_computed_once() -> None:
    thing = table(hnsw_index("i", "vec"))
    other = sa.table("other", sa.column("thing_id", sa.Integer), sa.column("size", sa.Integer))
    popular = sa.select(other.c.thing_id).group_by(other.c.thing_id).having(sa.func.count() > 2)
    largest = sa.select(sa.func.max(other.c.size)).scalar_subquery()
    text = sql(nearest(thing.c.vec, QUERY).where(thing.c.lang.in_(popular), thing.c.id < largest))
    assert "nearest_set_0 AS MATERIALIZED (SELECT other.thing_id AS thing_id FROM other" in text
    assert "thing.lang IN (SELECT nearest_set_0.thing_id FROM nearest_set_0)" in text
    assert "thing.id < (SELECT nearest_set_1.max_1 FROM nearest_set_1)" in text
    # The server asks this one of a single key, and one that is about the row is another for each.
    assert "nearest_set_0" not in sql(nearest(thing.c.vec, QUERY).where(thing.c.id.in_(popular)))
    own = sa.select(sa.func.count()).where(other.c.thing_id == thing.c.id).scalar_subquery()
    another = sa.table("another", sa.column("id"))
    theirs = sa.select(sa.func.count()).where(other.c.size == another.c.id).scalar_subquery()
    for criterion in (own > 2, sa.and_(another.c.id == thing.c.id, theirs.correlate(another) > 2)):
        assert "nearest_set_0" not in sql(nearest(thing.c.vec, QUERY).where(criterion))


def test_what_is_about_rows_of_a_subquery_stays_there() -> None:
    """Each of these would count other rows, or be no SQL, as a part of its own."""
    thing = table(hnsw_index("i", "vec"))
    note = sa.table("note", sa.column("id", sa.Integer), sa.column("thing_id", sa.Integer))
    vote = sa.table("vote", sa.column("note_id", sa.Integer), sa.column("size", sa.Integer))
    votes = sa.select(sa.func.count()).select_from(vote)
    of_note = votes.where(vote.c.note_id == note.c.id).scalar_subquery()
    in_words = votes.where(sa.text("note_id = thing.id")).scalar_subquery()
    by_name = votes.where(vote.c.note_id == sa.literal_column("thing.id")).scalar_subquery()
    popular = sa.exists().where(note.c.thing_id == thing.c.id, of_note > 2)
    for criterion in (popular, in_words > 2, by_name > 2):
        assert "nearest_set_0" not in sql(nearest(thing.c.vec, QUERY).where(criterion))
    assert "FROM vote WHERE vote.note_id = note.id" in sql(
        nearest(thing.c.vec, QUERY).where(popular)
    )
    # What the subquery itself is from is computed once nevertheless.
    groups = sa.select(vote.c.note_id).group_by(vote.c.note_id).having(sa.func.count() > 2)
    sets = groups.subquery()
    known = sa.exists().where(sets.c.note_id == thing.c.id)
    assert sql(nearest(thing.c.vec, QUERY).where(known)).count("FROM vote") == 1


def test_what_is_about_a_table_that_the_class_inherits_from_stays_there() -> None:
    class Base(DeclarativeBase):
        pass

    class Item(Base):
        __tablename__ = "item"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]

    class Thing(Item):
        __tablename__ = "thing"
        __table_args__ = (hnsw_index("i", "vec"),)
        id: Mapped[int] = mapped_column(sa.ForeignKey("item.id"), primary_key=True)
        vec: Mapped[Any] = mapped_column(Vector(3))

    vote = sa.table("vote", sa.column("title"))
    own = sa.select(sa.func.count()).where(vote.c.title == Thing.title).scalar_subquery()
    assert "nearest_set_0" not in sql(nearest(Thing.vec, QUERY).where(own > 2))


def test_a_criterion_may_be_a_plain_truth() -> None:
    thing = table(hnsw_index("i", "vec"))
    assert "FROM thing WHERE thing.vec IS" in sql(nearest(thing.c.vec, QUERY).where(True))


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("way", ["join", "exists"])
def test_what_comparing_costs_beside_another_table_depends_on_an_index(
    indexed: bool, way: str
) -> None:
    thing = table(hnsw_index("i", "vec"), *([sa.Index("l", "lang")] if indexed else []))
    other = sa.table("other", sa.column("lang"))
    same = other.c.lang == thing.c.lang
    search = nearest(thing.c.vec, QUERY)
    narrowed = search.join(other, same) if way == "join" else search.where(sa.exists().where(same))
    text = sql(narrowed)
    reading = "least(nearest_share.share * nearest_share.rows, 0.2 * nearest_share.rows) AS reading"
    assert (reading in text) is indexed


@pytest.mark.parametrize("width", [384, 768])
def test_vectors_that_are_stored_apart_are_rarely_fetched_for_an_estimate(width: int) -> None:
    thing = table(hnsw_index("i", "vec"), type_=Vector(width))
    text = sql(nearest(thing.c.vec, [1.0] * width).where(thing.c.id > 3))
    part = "AND hashtext(CAST(nearest_tried.id AS TEXT)) %% 8 = 0) AS closest"
    assert (part in text) == (width == 768)
    assert f"({48 if width == 384 else 24} * current_setting" in text


def test_by_a_binary_index_an_exact_distance_ranks() -> None:
    text = sql(nearest(table(hnsw_index("i", "vec", form="binary")).c.vec, QUERY))
    assert "nearest_row.vec <=> (SELECT nearest_query.vector" in text
    assert (
        "ORDER BY CAST(binary_quantize(nearest_row.vec) AS BIT(3)) <~> "
        "CAST(binary_quantize((SELECT nearest_query.vector FROM nearest_query)) AS BIT(3)) "
        "LIMIT 2000"
    ) in text
    # Of which a first look keeps four hundred.
    assert "'hnsw.ef_search', CASE WHEN (nearest_looks.look = 1) THEN '1000' ELSE '400' END" in text


def test_by_a_halfvec_index_the_similarity_is_the_columns() -> None:
    text = sql(nearest(table(hnsw_index("i", "vec", form="halfvec")).c.vec, QUERY))
    assert (
        "ORDER BY CAST(nearest_row.vec AS HALFVEC(3)) <=> "
        "CAST((SELECT nearest_query.vector FROM nearest_query) AS HALFVEC(3)) LIMIT 50" in text
    )
    assert "nearest_row.vec <=> (SELECT nearest_query.vector" in text


def test_by_an_ivfflat_index() -> None:
    thing = table(ivfflat_index("i", "vec", lists=100))
    text = sql(nearest(thing.c.vec, QUERY))
    assert "set_config('ivfflat.iterative_scan', 'off', true)" in text
    assert "set_config('ivfflat.probes', '51', true)" in text
    assert "set_config('ivfflat.probes', '3', true)" in sql(nearest(thing.c.vec, QUERY, probes=3))


@pytest.mark.parametrize("form", ["column", "binary"])
@pytest.mark.parametrize("filtered", [False, True])
def test_candidates_of_a_graph_mean_nothing_to_lists(form: Any, filtered: bool) -> None:
    """How many rows have to come is not what another kind of index would keep."""
    thing = table(ivfflat_index("i", "vec", lists=100, form=form))
    searches = (nearest(thing.c.vec, QUERY, ef_search=ef) for ef in (None, 15))
    texts = [sql(one.where(thing.c.lang == "de") if filtered else one) for one in searches]
    assert texts[0] == texts[1]


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
    assert f"{shown} AS similarity" in sql(nearest(thing.c.vec, QUERY, exact=True))
    text = sql(nearest(thing.c.vec, QUERY))
    assert f"ORDER BY nearest_row.vec {operator} (SELECT nearest_query.vector" in text
    distance = f"thing.vec {operator} (SELECT nearest_query.vector FROM nearest_query)"
    assert f"{shown[0]} - ({distance}) AS similarity" in text
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
        made = (
            r"'hnsw.ef_search', (?:CASE WHEN \(nearest_looks.look = 1\) THEN '1000' ELSE )?'(\d+)'"
        )
        found = re.search(made, sql(nearest(thing.c.vec, QUERY, **options)))
        return found[1] if found else ""

    assert ef_search() == "100"
    assert ef_search(limit=300) == "1000"
    assert ef_search(limit=5000) == ""
    assert ef_search(ef_search=20) == "20"


def test_statements_of_one_shape_share_a_compilation() -> None:
    """Told from outside: by the statements that an engine compiles."""
    thing = table(hnsw_index("i", "vec", form="binary"))

    def compiled(*arguments: Any, **options: Any) -> str:
        return sql(nearest(thing.c.vec, *arguments, **options))

    assert compiled(QUERY, limit=7) == compiled([0, 1, 0], limit=7)
    assert compiled(QUERY, offset=10) == compiled(QUERY, offset=500)
    assert compiled(QUERY) != compiled(QUERY, max_distance=0.5)
    assert compiled(QUERY, max_distance=0.5) == compiled(QUERY, max_distance=0.7)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"limit": -1}, "limit=-1"),
        ({"offset": -1}, "offset=-1"),
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
    for none in ([], np.zeros((0, 3), np.float32)):
        with pytest.raises(DeclarationError, match="an empty list"):
            nearest(thing.c.vec, none)
    known = table(type_=Embedding("deterministic", "lang", dimensions=3))
    with pytest.raises(ZeroVectorError, match="all zeros"):
        nearest(known.c.vec, [0, 0, 0])


def test_a_table_without_a_key_is_compared() -> None:
    keyless = sa.Table(
        "thing", sa.MetaData(), sa.Column("vec", Vector(3)), hnsw_index("i", "vec", form="binary")
    )
    assert "set_config" not in sql(nearest(keyless.c.vec, QUERY))
    assert HalfVector(3).get_col_spec() == "HALFVEC(3)"


@pytest.mark.parametrize(
    "name",
    ["order_by", "group_by", "having", "distinct", "fetch", "union", "union_all", "except_",
     "except_all", "intersect", "intersect_all"],
)  # fmt: skip
def test_what_would_work_on_a_page_alone_is_refused(name: str) -> None:
    thing = table(hnsw_index("i", "vec"))
    argument: Any = {"fetch": 3, "union": sa.select(thing)}.get(name, thing.c.lang)
    with pytest.raises(DeclarationError, match=f"{name}\\(\\) would work on what"):
        getattr(nearest(thing.c.vec, QUERY), name)(argument)


def test_a_search_passes_few_modules() -> None:
    """A path that grows is noticed here."""
    thing = table(hnsw_index("i", "vec"))
    lang = thing.c.lang == "de"
    for _ in range(2):
        plain = modules_of(lambda: nearest(thing.c.vec, QUERY), leave_out=())
        filtered = modules_of(lambda: nearest(thing.c.vec, QUERY).where(lang), leave_out=())
    assert max(len(plain), len(filtered)) <= 8, sorted(plain | filtered)


@pytest.mark.parametrize(
    "name", ["nearest_query", "nearest_within", "nearest_near", "nearest_page"]
)
def test_a_table_that_is_called_as_a_part_of_the_statement(engine: sa.Engine, name: str) -> None:
    def made(schema: str | None) -> sa.Table:
        columns = [sa.Column("id", sa.Integer, primary_key=True), sa.Column("vec", Vector(3))]
        return sa.Table(name, sa.MetaData(), *columns, hnsw_index("i", "vec"), schema=schema)

    with pytest.raises(DeclarationError, match="schema="):
        nearest(made(None).c.vec, QUERY)
    told_apart = made("public")
    told_apart.create(engine)
    with engine.begin() as connection:
        connection.execute(told_apart.insert(), [{"id": n, "vec": [n, 1, 0]} for n in (1, 2, 3)])
        for search in (
            nearest(told_apart.c.vec, QUERY),
            nearest(told_apart.c.vec, QUERY, exact=True),
        ):
            for one in (search, search.where(told_apart.c.id > 0)):
                assert len(connection.execute(one).all()) == 3
