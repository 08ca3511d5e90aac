"""``alembic check`` notices each changed detail; nothing is written that would mix two spaces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.util import CommandError
from alembic_application import Application

from sbert_pg import registry
from sbert_pg.errors import EncoderMismatchError
from sbert_pg.freshness import backfill
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder

MODEL = """
def spec(**given):
    return EncoderSpec(**{{"name": "deterministic", "dimensions": 64, **given}})


class Article(Base):
    __tablename__ = "article"
    __table_args__ = ({indexes}{{}})
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    body: Mapped[str | None]
    lang: Mapped[str | None]
    plain = mapped_column(Vector({plain}))
    embedding = embedding_column({embedding}, nullable=True)
    {more}
"""
EMBEDDING = 'spec(), source=["title", "body"]'
EXPRESSION = "(subvector(embedding, 1, 32)::halfvec(32))"
#: One index for each way of writing one.
INDEXES = {
    "hnsw": 'hnsw_index("hnsw", "embedding", m=16, ef_construction=64)',
    "partial": 'hnsw_index("partial", "embedding", where=sa.text("lang = \'en\'"))',
    "ivf": 'ivfflat_index("ivf", "embedding", lists=10)',
    "cast": f'sa.Index("cast", sa.text("{EXPRESSION}"), postgresql_using="hnsw", '
    'postgresql_ops={"x": "halfvec_cosine_ops"})',
    "binary": 'hnsw_index("binary", "embedding", form="binary")',
}


def model(
    *, embedding: str = EMBEDDING, plain: int = 3, more: str = "", **indexes: str | None
) -> str:
    wanted = [text for text in {**INDEXES, **indexes}.values() if text is not None]
    return MODEL.format(
        indexes="".join(f"{text}, " for text in wanted), plain=plain, embedding=embedding, more=more
    )


@pytest.fixture(scope="module")
def shared(databases: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One application for the whole module, whose database is as its models say.

    The column has met its encoder, so all that decides the space is known, and holds vectors.
    """
    url = databases.clone("bare")
    root: Path = tmp_path_factory.mktemp("details")
    app = Application(root, url)
    app.models(model())
    app.step("all")
    registry.use_encoder(DeterministicEncoder("deterministic", 64))
    app.execute(
        "INSERT INTO article (title, body, plain) SELECT 'text ' || i, 'body', '[1,2,3]' "
        "FROM generate_series(1, 12) i"
    )
    backfill(app.engine, ColumnIdentity(None, "article", "embedding"))
    registry.forget_encoders()
    yield app
    app.engine.dispose()
    databases.drop(str(url.database))


def test_unchanged_model_is_clean(shared: Any) -> None:
    shared.models(model())
    assert shared.check() == ""
    # The same said otherwise: a default spelled out, a cast, blanks and brackets of the predicate.
    cast = (
        INDEXES["cast"]
        .replace("::halfvec(32))", ")::halfvec ( 32 ))")
        .replace("(subvector", "((subvector")
    )
    partial = INDEXES["partial"].replace("lang = 'en'", "((lang)::text='en'::text)")
    assert cast != INDEXES["cast"]
    shared.models(model(cast=cast, partial=partial))
    assert shared.check() == ""


def changed(name: str, old: str, new: str) -> dict[str, str]:
    assert old in INDEXES[name]
    return {name: INDEXES[name].replace(old, new)}


INDEX_CHANGES: dict[str, tuple[dict[str, str | None], str]] = {
    "method": (
        {"hnsw": INDEXES["ivf"].replace('"ivf"', '"hnsw"')},
        "method: hnsw to ivfflat",
    ),
    "opclass": (
        changed("hnsw", "m=16", 'similarity="dot", m=16'),
        "opclass: vector_cosine_ops to vector_ip_ops",
    ),
    "m": (changed("hnsw", "m=16", "m=17"), "m: 16 to 17"),
    "ef_construction": (
        changed("hnsw", "ef_construction=64", "ef_construction=65"),
        "ef_construction: 64 to 65",
    ),
    "lists": (changed("ivf", "lists=10", "lists=11"), "lists: 10 to 11"),
    "predicate": (changed("partial", "'en'", "'de'"), "lang = 'de'"),
    "predicate's column": (changed("partial", "lang =", "body ="), "body = 'en'"),
    "predicate gone": (changed("partial", ", where=sa.text(\"lang = 'en'\")", ""), "to None"),
    "predicate new": (
        changed("hnsw", "ef_construction=64", "ef_construction=64, where=sa.text('id > 5')"),
        "id > 5",
    ),
    "expression": (changed("cast", "embedding, 1, 32", "embedding, 2, 32"), "embedding, 2, 32"),
    "cast width": (
        changed("cast", "1, 32)::halfvec(32)", "1, 16)::halfvec(16)"),
        "halfvec(16)",
    ),
    "form": (changed("binary", '"binary")', '"halfvec")').copy(), "halfvec"),
    "indexed column": (
        {"hnsw": INDEXES["hnsw"].replace('"embedding"', '"plain", similarity="cosine"')},
        "column: embedding to plain",
    ),
    "removed": ({"hnsw": None}, "drop_vector_index"),
    "new": (
        {"further": 'hnsw_index("further", "embedding", form="halfvec")'},
        "create_vector_index",
    ),
}


@pytest.mark.parametrize("detail", INDEX_CHANGES)
def test_check_fails_on_a_changed_index(shared: Any, detail: str) -> None:
    indexes, said = INDEX_CHANGES[detail]
    shared.models(model(**indexes))
    found = shared.check()
    assert "New upgrade operations detected" in found
    assert said in found
    shared.models(model())
    assert shared.check() == ""


#: The changed declaration; what is named; the line that is to be written instead.
COLUMN_CHANGES: dict[str, tuple[str, str, str]] = {
    "encoder": (
        'spec(name="other"), source=["title", "body"]',
        "encoder 'deterministic' became 'other'",
        (
            "embedding_v2 = embedding_column('other', dimensions=64, source=['title', 'body'], "
            "replaces='embedding', nullable=True)"
        ),
    ),
    "width": (
        'spec(dimensions=32), source=["title", "body"]',
        "64 dimensions became 32",
        (
            "embedding_v2 = embedding_column('deterministic', dimensions=32, "
            "source=['title', 'body'], replaces='embedding', nullable=True)"
        ),
    ),
    "encoder and width": (
        '"all-MiniLM-L6-v2", source=["title", "body"]',
        "became 'all-MiniLM-L6-v2'",
        (
            "embedding_v2 = embedding_column('all-MiniLM-L6-v2', "
            "source=['title', 'body'], replaces='embedding', nullable=True)"
        ),
    ),
    "source": (
        'spec(), source="title"',
        "source title + body became title",
        (
            "embedding_v2 = embedding_column('deterministic', dimensions=64, source='title', "
            "replaces='embedding', nullable=True)"
        ),
    ),
    "order of the source": (
        'spec(), source=["body", "title"]',
        "source title + body became body + title",
        "source=['body', 'title'], replaces='embedding'",
    ),
    "separator": (
        'spec(), source=["title", "body"], separator=" - "',
        "separator '\\n\\n' became ' - '",
        "separator=' - ', replaces='embedding'",
    ),
    "template": (
        'spec(), source=Source.template("{title}: {body}")',
        "{title}: {body}",
        "source=Source.template('{title}: {body}'), replaces='embedding'",
    ),
    "storage": (
        'spec(), source=["title", "body"], storage="halfvec"',
        "storage 'vector' became 'halfvec'",
        "storage='halfvec', replaces='embedding'",
    ),
    "pooling": ('spec(pooling="cls"), source=["title", "body"]', "pooling", "replaces='embedding'"),
    "prompt": (
        'spec(prompts=(("document", "passage: "),)), source=["title", "body"]',
        "prompts",
        "replaces='embedding'",
    ),
    "max_seq_length": (
        'spec(max_seq_length=128), source=["title", "body"]',
        "max_seq_length",
        "replaces='embedding'",
    ),
}


@pytest.mark.parametrize("detail", COLUMN_CHANGES)
def test_changed_column_under_its_name_is_refused(shared: Any, detail: str) -> None:
    embedding, said, line = COLUMN_CHANGES[detail]
    shared.models(model(embedding=embedding))
    found = shared.check()
    assert said in found
    assert line in found
    with pytest.raises(CommandError) as caught:
        shared.revision()
    assert isinstance(caught.value, EncoderMismatchError)
    shared.models(model())
    assert shared.check() == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"embedding": EMBEDDING.replace("spec()", "spec(dimensions=32)")},
        {"plain": 4},
    ],
    ids=["embedding column", "plain vector column"],
)
def test_populated_column_is_never_altered(shared: Any, changes: dict[str, Any]) -> None:
    versions = shared.root / "migrations" / "versions"
    before = sorted(versions.glob("*.py"))
    without: dict[str, Any] = dict.fromkeys(INDEXES)
    shared.models(model(**without, **changes))
    with pytest.raises(CommandError, match=r"dimensions|width"):
        shared.revision()
    assert sorted(versions.glob("*.py")) == before
    shared.models(model())
    assert shared.check() == ""
