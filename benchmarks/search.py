"""A search through the ORM beside the same SQL in bare psycopg, and beside two other libraries.

    python benchmarks/search.py [--rows N] [--queries N] [--vectors FILE.npy] [--database URL]
                                [--index column|halfvec|binary|ivfflat] [--ef-construction N]
                                [--held-out] [--json FILE]

Every way asks the same queries for the ten nearest of the same rows by an HNSW index with the same
``m``, ``ef_construction`` and ``ef_search``, one after the other in one process, in turns. Bare
psycopg executes the very SQL that ``nearest`` compiles to, prepared, with the vector in binary.
``transaction`` means that each query has a transaction of its own, as a session has; ``autocommit``
saves its two round trips. Given are the median and the tenth percentile of the wall clock in
microseconds, the processor time of the client (tenth percentile, which other load on the machine
touches least), and recall@10 against exact search.

A second table has filters by relation and share kept: none, drawn at random, the topics farthest
from the query, all but the nearest topics, the query's own topic, and two filters at once. It gives
recall@10 (mean and worst query) and the median time of ``nearest``, of exact search, and of plain
``ORDER BY ... LIMIT`` by pgvector's iterative scan with ``ef_search`` 100 and twice as many rows,
all of the index that ``--index`` names.

langchain-postgres' ``PGVectorStore`` and ``vecs`` take part where they are installed. Without
``--vectors`` (a float32 array, one row a vector) the vectors are made: topics in a subspace of 40
dimensions. Where the file has fewer rows than wanted, the rest are means of two of its rows. With
``--held-out`` the queries are rows of the file that are not in the table, though in means of it:
what such a query asks for lies between two topics, and is what a graph loses first.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import sbert_pg
from sbert_pg import catalog, create_all, embedding_column, hnsw_index, ivfflat_index, load, nearest
from sbert_pg.embedded import embedded_server
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types import to_wire_rows

DIMENSIONS = 384
EF_SEARCH = 100
Row = dict[str, Any]


class Base(DeclarativeBase):
    """The tables of this benchmark."""


class Item(Base):
    """A row as an application has it."""

    __tablename__ = "item"
    __table_args__ = (hnsw_index("item_embedding", "embedding"),)
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    title: Mapped[str]
    lang: Mapped[str]
    part: Mapped[int] = mapped_column(index=True)
    topic: Mapped[int] = mapped_column(index=True)
    embedding = embedding_column("deterministic", source="title", dimensions=DIMENSIONS)


def made_vectors(rows: int) -> np.ndarray:
    random = np.random.default_rng(0)
    basis = random.standard_normal((40, DIMENSIONS)).astype(np.float32)
    centres = random.standard_normal((rows // 50 + 1, 40)).astype(np.float32)
    inner = centres[random.integers(0, len(centres), rows)]
    inner = inner + 0.6 * random.standard_normal(inner.shape).astype(np.float32)
    vectors = inner @ basis + random.standard_normal((rows, DIMENSIONS)).astype(np.float32)
    return unit(vectors)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def vectors_of(path: Path | None, rows: int) -> np.ndarray:
    if path is None:
        return made_vectors(rows)
    given = unit(np.load(path))[:rows]
    random = np.random.default_rng(0)
    pairs = random.integers(0, len(given), (rows - len(given), 2))
    return np.concatenate([given, unit(given[pairs[:, 0]] + given[pairs[:, 1]])])


def topics_of(vectors: np.ndarray) -> np.ndarray:
    """The nearest of two hundred rows, for each row."""
    centres = vectors[np.random.default_rng(2).choice(len(vectors), 200, replace=False)].T
    parts = [
        np.argmax(vectors[n : n + 20_000] @ centres, 1) for n in range(0, len(vectors), 20_000)
    ]
    return np.concatenate(parts)


def choose_index(kind: str, rows: int, ef_construction: int) -> None:
    """Put another vector index in the place of the declared one."""
    table: Any = Item.__table__
    (declared,) = [index for index in table.indexes if index.name == "item_embedding"]
    table.indexes.discard(declared)
    if kind == "ivfflat":
        ivfflat = ivfflat_index("item_embedding", "embedding", lists=max(10, int(rows**0.5)))
        table.append_constraint(ivfflat)
    else:
        options: Row = {"form": kind, "ef_construction": ef_construction}
        table.append_constraint(hnsw_index("item_embedding", "embedding", **options))


def fill(engine: sa.Engine, vectors: np.ndarray, topics: np.ndarray) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE EXTENSION IF NOT EXISTS vector"))
        catalog.upgrade(connection)
        connection.execute(sa.text("DROP TABLE IF EXISTS item"))
        connection.execute(sa.schema.CreateTable(Item.__table__))
        rows = (
            {
                "id": number,
                "title": f"title of item {number}",
                "lang": "de" if number % 2 else "en",
                "part": number * 7919 % 10_000,
                "topic": int(topics[number]),
                "embedding": vector,
            }
            for number, vector in enumerate(vectors)
        )
        create_all(connection, Base.metadata)
        load(connection, Item, rows)
        for index in Item.__table__.indexes:
            connection.execute(sa.schema.CreateIndex(index))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM ANALYZE item"))


def true_keys(vectors: np.ndarray, query: np.ndarray, keep: np.ndarray | None = None) -> set[int]:
    similarity = vectors @ query
    if keep is not None:
        similarity = np.where(keep, similarity, -np.inf)
    return {int(n) for n in np.argpartition(-similarity, 10)[:10]}


def sql_of(engine: sa.Engine, statement: Any) -> tuple[str, dict[str, Any], str]:
    """The SQL that a statement becomes, its parameters, and the name of the vector's."""
    sent: list[Any] = []

    def note(_c: Any, _cursor: Any, text: str, parameters: Any, *_rest: Any) -> None:
        sent.append((text, parameters))

    with Session(engine) as session:
        session.execute(statement).all()
        sa.event.listen(engine, "before_cursor_execute", note)
        session.execute(statement).all()
        sa.event.remove(engine, "before_cursor_execute", note)
    text, parameters = sent[-1]
    name = next(key for key, value in parameters.items() if isinstance(value, list))
    return text, dict(parameters), name


class RawVector:
    """A vector's bytes in pgvector's binary format."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload


class RawDumper(psycopg.adapt.Dumper):
    """Send them as they are."""

    format = psycopg.pq.Format.BINARY
    oid = 0

    def dump(self, obj: Any) -> bytes:
        """The payload."""
        payload: bytes = obj.payload
        return payload


def bare(engine: sa.Engine, autocommit: bool) -> Callable[[np.ndarray], list[int]]:
    text, parameters, name = sql_of(
        engine, nearest(Item.embedding, np.ones(DIMENSIONS), ef_search=EF_SEARCH)
    )
    dsn = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    connection = psycopg.connect(dsn, autocommit=autocommit)
    connection.adapters.register_dumper(RawVector, RawDumper)

    def ask(query: np.ndarray) -> list[int]:
        parameters[name] = RawVector(to_wire_rows(query[None], "vector")[0])
        cursor = connection.cursor(binary=True)
        rows = cursor.execute(text, parameters, prepare=True).fetchall()
        if not autocommit:
            connection.rollback()
        return [row[0] for row in rows]

    return ask


def ours(engine: sa.Engine) -> dict[str, Callable[[np.ndarray], list[int]]]:
    quick = engine.execution_options(isolation_level="AUTOCOMMIT")
    kept = Session(engine)
    kept_connection = engine.connect()

    def by_nearest(bind: Any) -> Callable[[np.ndarray], list[int]]:
        def ask(query: np.ndarray) -> list[int]:
            with Session(bind) as session:
                rows = session.execute(nearest(Item.embedding, query, ef_search=EF_SEARCH))
                return [item.id for item, _ in rows]

        return ask

    def by_distance(query: np.ndarray) -> list[int]:
        statement = sa.select(Item).order_by(Item.embedding.distance(query)).limit(10)
        with Session(engine) as session:
            return [item.id for item in session.scalars(statement)]

    def by_kept_session(query: np.ndarray) -> list[int]:
        rows = kept.execute(nearest(Item.embedding, query, ef_search=EF_SEARCH))
        return [item.id for item, _ in rows]

    def by_core(query: np.ndarray) -> list[int]:
        column = Item.__table__.c.embedding
        with engine.connect() as connection:
            rows = connection.execute(nearest(column, query, ef_search=EF_SEARCH))
            return [row[0] for row in rows]

    def by_kept_connection(query: np.ndarray) -> list[int]:
        column = Item.__table__.c.embedding
        rows = kept_connection.execute(nearest(column, query, ef_search=EF_SEARCH))
        return [row[0] for row in rows]

    return {
        "ORM nearest(), session per query": by_nearest(engine),
        "ORM nearest(), session per query, autocommit": by_nearest(quick),
        "ORM nearest(), session kept": by_kept_session,
        "ORM order_by(distance), session per query": by_distance,
        "Core nearest(), connection per query": by_core,
        "Core nearest(), connection kept": by_kept_connection,
    }


def vecs_way(engine: sa.Engine, keep: bool) -> Callable[[np.ndarray], list[int]] | None:
    try:
        import vecs
    except ImportError:
        return None
    url = engine.url.set(drivername="postgresql+psycopg2")
    client = vecs.create_client(url.render_as_string(hide_password=False))
    exists = "item" in [collection.name for collection in client.list_collections()]
    if exists and not keep:
        client.delete_collection("item")
    collection = client.get_or_create_collection("item", dimension=DIMENSIONS)
    if not (exists and keep):
        fill_vecs(engine, collection)

    def ask(query: np.ndarray) -> list[int]:
        rows = collection.query(
            query, limit=10, ef_search=EF_SEARCH, include_value=True, include_metadata=True
        )
        return [int(row[0]) for row in rows]

    return ask


def fill_vecs(engine: sa.Engine, collection: Any) -> None:
    import vecs

    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO vecs.item (id, vec, metadata) SELECT id::text, embedding, "
                "jsonb_build_object('title', title, 'lang', lang, 'part', part) FROM item "
                "ORDER BY item.id"
            )
        )
    collection.create_index(
        vecs.IndexMeasure.cosine_distance,
        vecs.IndexMethod.hnsw,
        vecs.IndexArgsHNSW(m=16, ef_construction=256),
    )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM ANALYZE vecs.item"))


def langchain_way(engine: sa.Engine, _keep: bool) -> Callable[[np.ndarray], list[int]] | None:
    """On the very table and index of ``Item``."""
    try:
        from langchain_core.embeddings import DeterministicFakeEmbedding
        from langchain_postgres import PGEngine, PGVectorStore
        from langchain_postgres.v2.indexes import HNSWQueryOptions
    except ImportError:
        return None
    url = engine.url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    store = PGVectorStore.create_sync(
        PGEngine.from_connection_string(url),
        DeterministicFakeEmbedding(size=DIMENSIONS),
        "item",
        content_column="title",
        embedding_column="embedding",
        id_column="id",
        metadata_columns=["lang", "part"],
        metadata_json_column="",
        index_query_options=HNSWQueryOptions(ef_search=EF_SEARCH),
    )

    def ask(query: np.ndarray) -> list[int]:
        rows = store.similarity_search_with_score_by_vector(query.tolist(), k=10)
        return [int(document.page_content.rpartition(" ")[2]) for document, _ in rows]

    return ask


def measure(
    ways: dict[str, Callable[[np.ndarray], list[int]]],
    queries: np.ndarray,
    truth: list[set[int]],
) -> list[Row]:
    wall: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    hits: dict[str, list[float]] = {name: [] for name in ways}
    for ask in ways.values():
        for query in queries[:12]:
            ask(query)
    for number, query in enumerate(queries):
        names = list(ways)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            spent, began = time.process_time(), time.perf_counter()
            found = ways[name](query)
            wall[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - spent)
            hits[name].append(len(truth[number].intersection(found)) / 10)
    baseline = float(np.median(wall["psycopg, transaction"]))
    base_spent = float(np.percentile(processor["psycopg, transaction"], 10))
    rows = []
    for name in ways:
        p50 = float(np.median(wall[name]))
        spent = float(np.percentile(processor[name], 10))
        # Differences of neighbours in time, so that load on the machine cancels out.
        pairs = np.array(wall[name]) - np.array(wall["psycopg, transaction"])
        rows.append(
            {
                "way": name,
                "p50 µs": round(p50 * 1e6),
                "p10 µs": round(float(np.percentile(wall[name], 10)) * 1e6),
                "over bare, p50": round((p50 - baseline) * 1e6),
                "over bare, paired": round(float(np.median(pairs)) * 1e6),
                "client CPU µs": round(spent * 1e6),
                "CPU over bare": round((spent - base_spent) * 1e6),
                "recall@10": round(float(np.mean(hits[name])), 4),
            }
        )
        print(rows[-1], flush=True)
    return rows


def filters(
    query: np.ndarray, centres: np.ndarray, topics: np.ndarray
) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Criteria by how they are related to a query, with the rows that pass."""
    part = np.arange(len(topics)) * 7919 % 10_000
    sizes = np.bincount(topics, minlength=len(centres))
    near = np.argsort(-(centres @ query))
    shares = np.cumsum(sizes[near]) / len(topics)
    yield "none", sa.true(), np.ones(len(topics), dtype=bool)
    for share in (0.5, 0.1, 0.05, 0.01, 0.001, 0.0001):
        most = round(share * 10_000)
        yield f"random {share:.2%}", Item.part < most, part < most
    for share in (0.5, 0.1, 0.05, 0.01):
        far = near[::-1][: 1 + np.searchsorted(np.cumsum(sizes[near[::-1]]), share * len(topics))]
        far_rows = np.isin(topics, far)
        yield f"farthest topics {share:.0%}", Item.topic.in_(far.tolist()), far_rows
        if share == 0.01:
            both = Item.topic.in_(far.tolist()) & (Item.part < 1000)
            yield "farthest topics and random .1%", both, far_rows & (part < 1000)
    for share in (0.1, 0.5):
        out = near[: 1 + np.searchsorted(shares, share)]
        yield (
            f"all but the nearest {share:.0%}",
            Item.topic.not_in(out.tolist()),
            ~np.isin(topics, out),
        )
    yield "the own topic", Item.topic == int(near[0]), topics == near[0]


def plain_search(query: np.ndarray, criterion: Any) -> Any:
    """What pgvector's documentation has: an iterative scan, here of twice as many rows."""
    settings = {
        "hnsw.ef_search": str(EF_SEARCH),
        "hnsw.iterative_scan": "relaxed_order",
        "hnsw.max_scan_tuples": "100000",
        "ivfflat.iterative_scan": "relaxed_order",
    }
    made = [sa.func.set_config(name, value, True) for name, value in settings.items()]
    once = sa.select(sa.func.concat(*made)).scalar_subquery().is_not(None)
    order = Item.embedding.distance(query)
    return sa.select(Item).where(once, criterion).order_by(order).limit(20)


def filtered(
    engine: sa.Engine, vectors: np.ndarray, topics: np.ndarray, queries: np.ndarray
) -> list[Row]:
    centres = vectors[np.random.default_rng(2).choice(len(vectors), 200, replace=False)]
    found: dict[str, dict[str, list[float]]] = {}
    with Session(engine) as session:
        for query in queries:
            for name, criterion, keep in filters(query, centres, topics):
                truth = true_keys(vectors, query, keep)
                truth = {key for key in truth if keep[key]}
                searched = nearest(Item.embedding, query)
                exact = nearest(Item.embedding, query, exact=True)
                if name != "none":
                    searched, exact = searched.where(criterion), exact.where(criterion)
                ways = {
                    "nearest": searched,
                    "exact": exact,
                    "iterative": plain_search(query, criterion),
                }
                row = found.setdefault(name, {})
                for way, statement in ways.items():
                    times = []
                    for _ in range(3):
                        began = time.perf_counter()
                        keys = [item.id for item in session.scalars(statement)][:10]
                        times.append(time.perf_counter() - began)
                        session.rollback()
                    row.setdefault(f"{way} ms", []).append(min(times) * 1e3)
                    share = len(truth.intersection(keys)) / max(1, len(truth))
                    row.setdefault(f"{way} recall", []).append(share)
    rows = []
    for name, columns in found.items():
        row_: Row = {"filter": name}
        for column, values in columns.items():
            if column.endswith("ms"):
                row_[column] = round(float(np.median(values)), 2)
            else:
                row_[column] = f"{np.mean(values):.3f} / {min(values):.1f}"
        rows.append(row_)
        print(row_, flush=True)
    return rows


def run(url: sa.URL, options: argparse.Namespace) -> Row:
    sbert_pg.use_encoder(DeterministicEncoder())
    engine = sa.create_engine(url)
    apart = options.queries if options.held_out else 0
    vectors = vectors_of(options.vectors, options.rows + apart)
    held, vectors = vectors[:apart], vectors[apart:]
    topics = topics_of(vectors)
    choose_index(options.index, options.rows, options.ef_construction)
    if not options.keep:
        fill(engine, vectors, topics)
    random = np.random.default_rng(1)
    chosen = random.choice(len(vectors), options.queries, replace=False)
    noise = 0.02 * random.standard_normal((options.queries, DIMENSIONS)).astype(np.float32)
    queries = held if options.held_out else unit(vectors[chosen] + noise)
    truth = [true_keys(vectors, query) for query in queries]
    ways = {
        "psycopg, transaction": bare(engine, False),
        "psycopg, autocommit": bare(engine, True),
        **ours(engine),
    }
    for name, make in (("vecs", vecs_way), ("PGVectorStore", langchain_way)):
        way = make(engine, options.keep)
        if way is not None:
            ways[name] = way
        else:
            print(f"{name} is not installed", flush=True)
    results: Row = {"rows": len(vectors), "index": options.index}
    results["ways"] = measure(ways, queries, truth)
    few = queries[: max(10, options.queries // 8)]
    results["filtered"] = filtered(engine, vectors, topics, few)
    engine.dispose()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--vectors", type=Path, help="float32 array of shape (n, 384)")
    parser.add_argument("--database", help="a database with pgvector; tables are made in it")
    parser.add_argument("--keep", action="store_true", help="the table is filled already")
    parser.add_argument(
        "--index", choices=["column", "halfvec", "binary", "ivfflat"], default="column"
    )
    parser.add_argument("--ef-construction", type=int, default=256)
    parser.add_argument("--held-out", action="store_true", help="queries that are not in the table")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="vecs")
    if options.database:
        results = run(sa.make_url(options.database).set(drivername="postgresql+psycopg"), options)
    else:
        settings = {"shared_buffers": "1GB", "max_wal_size": "4GB", "maintenance_work_mem": "1GB"}
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)
            with embedded_server(Path(folder) / "data", settings=settings) as server:
                results = run(server.ensure_database("benchmark"), options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
