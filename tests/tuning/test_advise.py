"""Forms of index measured on a sample; indexes over fewer dimensions and over centred signs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from sbert_pg import advise_index, explain_search, hnsw_index, nearest
from sbert_pg.errors import DeclarationError
from sbert_pg.indexes import index_like, same_index, vector_indexes
from sbert_pg.types import Vector
from sbert_pg.types.indexed import description_of

ROWS, WIDTH = 600, 128


def table(*indexes: sa.Index) -> sa.Table:
    return sa.Table(
        "thing",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("tenant", sa.Integer, index=True),
        sa.Column("embedding", Vector(WIDTH)),
        *indexes,
    )


@pytest.fixture
def engine(bare_database_url: sa.URL) -> Any:
    """Vectors that share a direction, as those of encoders do; a third of one tenant."""
    engine = sa.create_engine(bare_database_url)
    random = np.random.default_rng(1)
    # Most variance in the first dimensions, as Matryoshka encoders have it.
    scale = np.linspace(2, 0.1, WIDTH)
    vectors = (random.normal(size=(ROWS, WIDTH)) * scale + 1.5).astype(np.float32)
    things = table()
    with engine.begin() as connection:
        things.metadata.create_all(connection)
        rows = [{"id": n, "tenant": n % 3, "embedding": v} for n, v in enumerate(vectors)]
        connection.execute(sa.insert(things), rows)
    yield engine
    engine.dispose()


def test_forms_side_by_side(engine: sa.Engine) -> None:
    before = _relations(engine)
    advice = advise_index(engine, table().c.embedding, queries=5, sample=ROWS - 5)
    forms = {form.name: form for form in advice.forms}
    assert list(forms) == [
        "exact",
        "column",
        "halfvec",
        "subvector 64",
        "binary",
        "binary, centred",
    ]
    assert forms["exact"].recall == 1
    assert forms["column"].recall >= 0.98
    assert forms["binary, centred"].share == pytest.approx(forms["binary"].share, rel=0.1)
    assert forms["binary"].share < forms["halfvec"].share < forms["column"].share == 1
    assert min(form.recall for form in advice.forms) >= 0.9
    names = [each.filter for each in forms["column"].measured]
    assert names[0] is None
    assert [name[:-1] for name in names[1:] if name] == ["tenant = ", "tenant = "]
    assert advice.recommended in forms
    assert _relations(engine) == before, "the sample is gone"
    assert "op.create_vector_index" in forms["halfvec"].operation
    assert str(advice).startswith("thing.embedding: 595 of about")


def test_what_is_recommended(engine: sa.Engine) -> None:
    filters = {"mine": table().c.tenant == 1}
    column = table().c.embedding
    impossible = advise_index(engine, column, filters=filters, queries=5, sample=300, least=1.01)
    assert impossible.recommended == "exact"
    assert "no form reaches" in impossible.reason
    assert impossible.migration == ""
    with pytest.raises(DeclarationError, match="no vector column"):
        advise_index(engine, table().c.tenant)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "subvector", "dimensions": 64},
        {"form": "binary", "mean": [1.5] * WIDTH},
        {"form": "binary", "mean": (np.linspace(-2, 2, WIDTH) / 3).tolist()},
    ],
)
def test_forms_serve_searches_and_compare_equal(engine: sa.Engine, options: Any) -> None:
    things = table(hnsw_index("thing_index", "embedding", **options))
    (index,) = (i for i in things.indexes if i.name == "thing_index")
    with engine.begin() as connection:
        query = connection.execute(
            sa.select(things.c.embedding).where(things.c.id == 5)
        ).scalar_one()
        connection.execute(sa.schema.CreateIndex(index))
        connection.execute(sa.text("ANALYZE thing"))
        declared = description_of(index)
        (stored,) = vector_indexes(connection, "thing")
        assert declared is not None
        assert same_index(connection, declared, stored)
        assert declared.width == stored.width == options.get("dimensions")
        assert (stored.mean is None) == ("mean" not in options)
        statement = nearest(things.c.embedding, query, limit=10)
        explanation = explain_search(connection, statement)
        # By their bits these rows, which are all but random, come late.
        assert explanation.way == "index" or "come late" in explanation.reason
        near = [row.id for row in connection.execute(statement)]
        exact = [
            row.id for row in connection.execute(nearest(things.c.embedding, query, exact=True))
        ]
        assert len(set(near) & set(exact)) >= 8
        # What was chosen for these vectors does not go to another column.
        other = sa.Table("other", sa.MetaData(), sa.Column("vector", Vector(32)))
        alike = description_of(index_like(stored, other.c.vector, "other_index"))
        assert alike is not None
        assert alike.width is None
        assert alike.mean is None


@pytest.mark.parametrize(
    "options",
    [
        {"form": "subvector"},
        {"form": "subvector", "dimensions": WIDTH + 1},
        {"form": "column", "dimensions": 64},
        {"form": "halfvec", "mean": [0.0] * WIDTH},
        {"form": "binary", "mean": [0.0]},
    ],
)
def test_forms_that_contradict_themselves(options: Any) -> None:
    with pytest.raises(DeclarationError):
        table(hnsw_index("thing_index", "embedding", **options))


def _relations(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(sa.text("SELECT count(*) FROM pg_class")).scalar_one()
