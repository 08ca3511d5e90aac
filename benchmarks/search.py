"""A search through the ORM beside the same SQL in bare psycopg, and beside two other libraries.

    python benchmarks/search.py [--rows N] [--queries N] [--vectors FILE.npy] [--database URL]
                                [--index column|halfvec|binary|ivfflat] [--ef-construction N]
                                [--held-out] [--filters NAME ...] [--json FILE]

Every way asks the same queries for the ten nearest of the same rows by an HNSW index with the same
``m``, ``ef_construction`` and ``ef_search``, one after the other in one process, in turns. Bare
psycopg executes the very SQL that ``nearest`` compiles to, prepared, with the vector in binary.
``transaction`` means that each query has a transaction of its own, as a session has; ``autocommit``
saves its two round trips. Given are the median and the tenth percentile of the wall clock in
microseconds, the processor time of the client (tenth percentile, which other load on the machine
touches least), and recall@10 against exact search.

A second table has filters by relation and share kept: none, drawn at random, the topics farthest
from the query, all but the nearest topics, the query's own topic, two filters at once, tenants by
equality, by a join, by ``IN (SELECT ...)`` and by ``EXISTS``, and an aggregated subquery. It gives
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
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psycopg
import sqlalchemy as sa
from bench_server import cpu_seconds, fresh_server
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column

import sbert_pg
from sbert_pg import catalog, create_all, embedding_column, hnsw_index, ivfflat_index, load, nearest
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types import to_wire_rows

DIMENSIONS = 384
EF_SEARCH = 100
Row = dict[str, Any]


#: Parts of the rows that belong to tenants, each to as many tenants as the second number says.
TENANTS = ((0.3, 1), (0.1, 2), (0.05, 4), (0.01, 20), (0.001, 60), (0.0001, 400))
#: The family of rows that carry one vector.
ISLAND = 0
#: Days, of equally many rows each.
DAYS = 10_000


class Base(DeclarativeBase):
    """The tables of this benchmark."""


class Tenant(Base):
    """Whose rows are, in a table of its own."""

    __tablename__ = "tenant"
    id: Mapped[int] = mapped_column(primary_key=True)
    part: Mapped[float]


class Item(Base):
    """A row as an application has it."""

    __tablename__ = "item"
    __table_args__ = (hnsw_index("item_embedding", "embedding"),)
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    title: Mapped[str]
    lang: Mapped[str]
    part: Mapped[int] = mapped_column(index=True)
    topic: Mapped[int] = mapped_column(index=True)
    family: Mapped[int] = mapped_column(index=True)
    tenant: Mapped[int] = mapped_column(index=True)
    day: Mapped[int] = mapped_column(index=True)
    embedding = embedding_column("deterministic", source="title", dimensions=DIMENSIONS)


class Rows(NamedTuple):
    """What the table holds, a column each.

    A family is of rows made from one text; a tenant has topics or, where it is small, families of
    one topic; days follow the direction in which vectors differ most.
    """

    vectors: np.ndarray
    family: np.ndarray
    topic: np.ndarray
    tenant: np.ndarray
    day: np.ndarray


def related_rows(vectors: np.ndarray, family: np.ndarray) -> Rows:
    topic = topics_of(vectors)
    order = np.lexsort((family, topic))
    owners = np.concatenate([np.full(n, part) for part, n in TENANTS])
    ends = np.round(np.cumsum(owners) * len(vectors)).astype(int)
    tenant = np.empty(len(vectors), dtype=int)
    tenant[order] = np.minimum(
        np.searchsorted(ends, np.arange(len(vectors)), side="right"), len(owners) - 1
    )
    random = np.random.default_rng(3)
    some = vectors[random.choice(len(vectors), min(20_000, len(vectors)), replace=False)]
    direction = np.linalg.svd(some - some.mean(0), full_matrices=False)[2][0]
    along = vectors @ direction
    along = along + 0.3 * along.std() * random.standard_normal(len(along))
    day = np.argsort(np.argsort(along)) * DAYS // len(along)
    return Rows(vectors, family, topic, tenant, day)


def made_vectors(rows: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    basis = random.standard_normal((40, DIMENSIONS)).astype(np.float32)
    centres = random.standard_normal((rows // 50 + 1, 40)).astype(np.float32)
    family = random.integers(0, len(centres), rows)
    inner = centres[family]
    inner = inner + 0.6 * random.standard_normal(inner.shape).astype(np.float32)
    vectors = inner @ basis + random.standard_normal((rows, DIMENSIONS)).astype(np.float32)
    return unit(vectors), family


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def vectors_of(
    path: Path | None, rows: int, apart: int, near: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and what each is made from; with ``near`` none is made from the first ``apart``."""
    if path is None:
        return made_vectors(rows)
    known = unit(np.load(path))[:rows]
    random = np.random.default_rng(0)
    if near:
        return mixed_near(known, rows, apart, random)
    pairs = random.integers(0, len(known), (rows - len(known), 2))
    mixed = unit(known[pairs[:, 0]] + known[pairs[:, 1]])
    return np.concatenate([known, mixed]), np.concatenate([np.arange(len(known)), pairs[:, 0]])


def mixed_near(
    known: np.ndarray, rows: int, apart: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The rest lies between two rows of one topic, and a little beside."""
    topics = topics_of(known[apart:])
    order, sizes = np.argsort(topics, kind="stable"), np.bincount(topics, minlength=200)
    first = random.integers(0, len(topics), rows - len(known))
    within = (random.random(len(first)) * sizes[topics[first]]).astype(int)
    second = order[(np.cumsum(sizes) - sizes)[topics[first]] + within]
    vectors = np.empty((rows, DIMENSIONS), dtype=np.float32)
    vectors[: len(known)] = known
    for n in range(0, len(first), 20_000):
        a, b = known[apart + first[n : n + 20_000]], known[apart + second[n : n + 20_000]]
        noise = random.standard_normal(a.shape, dtype=np.float32) * (0.3 / DIMENSIONS**0.5)
        weight = random.random((len(a), 1), dtype=np.float32)
        vectors[len(known) + n : len(known) + n + len(a)] = unit(a + weight * b + noise)
    family = np.concatenate([np.arange(len(known)), apart + first])
    order = np.concatenate([np.arange(apart), apart + random.permutation(rows - apart)])
    return vectors[order], family[order]


def centres_of(vectors: np.ndarray) -> np.ndarray:
    """Two hundred rows, each the middle of a topic."""
    return vectors[np.random.default_rng(2).choice(len(vectors), 200, replace=False)]


def topics_of(vectors: np.ndarray) -> np.ndarray:
    """The nearest of two hundred rows, for each row."""
    centres = centres_of(vectors).T
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


def fill(engine: sa.Engine, made: Rows) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE EXTENSION IF NOT EXISTS vector"))
        catalog.upgrade(connection)
        connection.execute(sa.text("DROP TABLE IF EXISTS item, tenant"))
        connection.execute(sa.schema.CreateTable(Item.__table__))
        rows = (
            {
                "id": number,
                "title": f"title of item {number}",
                "lang": "de" if number % 2 else "en",
                "part": number * 7919 % 10_000,
                "topic": int(made.topic[number]),
                "family": int(made.family[number]),
                "tenant": int(made.tenant[number]),
                "day": int(made.day[number]),
                "embedding": vector,
            }
            for number, vector in enumerate(made.vectors)
        )
        create_all(connection, Base.metadata)
        load(connection, Item, rows)
        parts = [part for part, count in TENANTS for _ in range(count)]
        tenants = [{"id": number, "part": part} for number, part in enumerate(parts)]
        connection.execute(sa.insert(Tenant), tenants)
        for index in Item.__table__.indexes:
            connection.execute(sa.schema.CreateIndex(index))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM ANALYZE item"))


def true_keys(vectors: np.ndarray, query: np.ndarray) -> set[int]:
    similarity = vectors @ query
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


SHARES = (0.5, 0.1, 0.05, 0.01, 0.001, 0.0001)


class Related:
    """Filters by how they are related to a query, each as calls of a search and the rows it keeps.

    A call is the name of a method of ``nearest`` with its arguments.
    """

    def __init__(self, made: Rows) -> None:
        self.made = made
        self.part = np.arange(len(made.topic)) * 7919 % 10_000
        self.tenant_part = np.concatenate([np.full(n, part) for part, n in TENANTS])
        self.sizes = np.bincount(made.family)
        self.family_topic = np.full(len(self.sizes), -1)
        self.family_topic[made.family] = made.topic
        self.topic_sizes = np.bincount(made.topic, minlength=200)
        self.centres = centres_of(made.vectors)

    def of(self, query: np.ndarray, number: int) -> Iterator[tuple[str, list[Any], np.ndarray]]:
        """Name, calls, and rows kept, in the order of the report."""
        for name, calls, keep in (*self._simple(query), *self._tenants(query, number)):
            yield (
                name,
                [("where", call) if not isinstance(call, tuple) else call for call in calls],
                keep,
            )

    def _simple(self, query: np.ndarray) -> Iterator[tuple[str, list[Any], np.ndarray]]:
        topic, part, day = self.made.topic, self.part, self.made.day
        near = np.argsort(-(self.centres @ query))
        yield "none", [], np.ones(len(topic), dtype=bool)
        for share in SHARES:
            most = round(share * 10_000)
            yield f"at random, {share:.2%}", [Item.part < most], part < most
        far: dict[float, tuple[Any, np.ndarray]] = {}
        for share in SHARES:
            far[share] = self._farthest(near[::-1], share)
            yield f"farthest topics, {share:.2%}", [far[share][0]], far[share][1]
        for share in (0.1, 0.5):
            few = near[: 1 + np.searchsorted(np.cumsum(self.topic_sizes[near]), share * len(topic))]
            kept = ~np.isin(topic, few)
            yield (
                f"all but the nearest topics, {1 - share:.0%}",
                [Item.topic.not_in(few.tolist())],
                kept,
            )
        yield "the own topic", [Item.topic == int(near[0])], topic == near[0]
        late = np.median(day[topic == near[0]]) < DAYS / 2
        days: dict[float, tuple[Any, np.ndarray]] = {}
        for share in SHARES:
            edge = round((1 - share if late else share) * DAYS)
            criterion = Item.day >= edge if late else Item.day < edge
            days[share] = criterion, (day >= edge if late else day < edge)
            yield f"days of other topics, {share:.2%}", [criterion], days[share][1]
        some = self.part < 1000
        for name, (criterion, keep) in (
            ("far topics 10%", far[0.1]),
            ("far topics 1%", far[0.01]),
            ("other days 50%", days[0.5]),
        ):
            yield f"{name}, a tenth at random", [criterion, Item.part < 1000], keep & some
        yield (
            "far topics 50%, other days 50%",
            [far[0.5][0], days[0.5][0]],
            far[0.5][1] & days[0.5][1],
        )

    def _farthest(self, topics: np.ndarray, share: float) -> tuple[Any, np.ndarray]:
        wanted = share * len(self.made.topic)
        if wanted < self.topic_sizes[topics[0]]:
            families = np.flatnonzero(self.family_topic == topics[0])
            families = families[: 1 + np.searchsorted(np.cumsum(self.sizes[families]), wanted)]
            return Item.family.in_(families.tolist()), np.isin(self.made.family, families)
        far = topics[: 1 + np.searchsorted(np.cumsum(self.topic_sizes[topics]), wanted)]
        return Item.topic.in_(far.tolist()), np.isin(self.made.topic, far)

    def _tenants(
        self, query: np.ndarray, number: int
    ) -> Iterator[tuple[str, list[Any], np.ndarray]]:
        tenant = self.made.tenant
        own = int(tenant[np.argmax(self.made.vectors @ query)])
        random = np.random.default_rng(number)
        yield "all but the own tenant", [Item.tenant != own], tenant != own
        for part, _ in TENANTS:
            others = np.flatnonzero(self.tenant_part == part)
            other = int(random.choice(others[others != own] if len(others) > 1 else others))
            keep = tenant == other
            yield f"a tenant of {part:.2%}", [Item.tenant == other], keep
            joined = [("join", Tenant, Tenant.id == Item.tenant), Tenant.id == other]
            yield f"a tenant of {part:.2%}, by a join", joined, keep
        for part, _ in TENANTS[2:]:
            keep = self.tenant_part[tenant] == part
            joined = [("join", Tenant, Tenant.id == Item.tenant), Tenant.part == part]
            yield f"tenants of {part:.2%} each, by a join", joined, keep
        keep = self.tenant_part[tenant] == TENANTS[2][0]
        theirs = sa.select(Tenant.id).where(Tenant.part == TENANTS[2][0])
        yield "tenants of 5 % each, by IN (SELECT)", [Item.tenant.in_(theirs)], keep
        exists = theirs.where(Tenant.id == Item.tenant).correlate(Item).exists()
        yield "tenants of 5 % each, by EXISTS", [exists], keep
        other, usual = aliased(Item), int(np.median(self.sizes[self.made.family]))
        large = sa.select(other.family).group_by(other.family).having(sa.func.count() > usual)
        keep = self.sizes[self.made.family] > usual
        yield "large families, by an aggregated subquery", [Item.family.in_(large)], keep


def narrowed(statement: Any, calls: list[Any]) -> Any:
    for name, *arguments in calls:
        statement = getattr(statement, name)(*arguments)
    return statement


def plain_search(query: np.ndarray, calls: list[Any]) -> Any:
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
    return narrowed(sa.select(Item).where(once), calls).order_by(order).limit(20)


def alone(engine: sa.Engine, autocommit: bool) -> sa.Engine:
    """Connections whose processes do all of the work themselves, so that it can be measured."""
    options = f"-c max_parallel_workers_per_gather=0 -c hnsw.ef_search={EF_SEARCH}"
    made = sa.create_engine(engine.url, connect_args={"options": options})
    return made.execution_options(isolation_level="AUTOCOMMIT") if autocommit else made


def unfiltered(engine: sa.Engine, queries: np.ndarray) -> list[Row]:
    """The server's processor time of a search without a filter, beside the index scan alone.

    In turns, each prepared (psycopg does it from the sixth time on) and parsed each time.
    """
    rows = []
    for prepared in (True, False):
        with alone(engine, prepared).connect() as connection:
            driver: Any = connection.connection.driver_connection
            driver.prepare_threshold = 5 if prepared else None
            pid = connection.scalar(sa.select(sa.func.pg_backend_pid()))
            columns = [Item.id, Item.title, Item.lang]
            spent: dict[str, list[float]] = {"nearest": [], "plain": []}
            for query in np.concatenate([queries[:8], queries]):
                distance = Item.embedding.distance(query)
                plain = sa.select(*columns, distance).order_by(distance).limit(10)
                search = nearest(Item.embedding, query, ef_search=EF_SEARCH)
                ways = {"nearest": search.with_only_columns(*columns), "plain": plain}
                for way, statement in ways.items():
                    began = cpu_seconds(pid)
                    connection.execute(statement).all()
                    spent[way].append(cpu_seconds(pid) - began)
        kept = {way: np.array(times[8:]) for way, times in spent.items()}
        row: Row = {"without a filter": "prepared" if prepared else "parsed each time"}
        row |= {f"{way} ms": round(float(np.median(v)) * 1e3, 2) for way, v in kept.items()}
        row["by plain"] = round(float(np.median(kept["nearest"] / kept["plain"])), 2)
        print(row, flush=True)
        rows.append(row)
    return rows


def filtered(
    engine: sa.Engine,
    made: Rows,
    queries: np.ndarray,
    timed: int,
    autocommit: bool,
    names: tuple[str, ...],
) -> list[Row]:
    """Recall of all queries, and the server's processor time of the first ``timed``."""
    related = Related(made)
    noted: dict[str, dict[str, list[float]]] = {}
    with Session(alone(engine, autocommit)) as session:
        pid = session.scalar(sa.select(sa.func.pg_backend_pid()))
        session.rollback()

        def ask(statement: Any, times: int) -> tuple[list[int], float]:
            spent = []
            for _ in range(times):
                began = cpu_seconds(pid)
                keys = [item.id for item in session.scalars(statement)][:10]
                session.rollback()
                spent.append(cpu_seconds(pid) - began)
            return keys, min(spent) * 1e3

        for number, query in enumerate(queries):
            similarity = made.vectors @ query
            for name, calls, keep in related.of(query, number):
                kept = np.flatnonzero(keep)
                best = min(10, len(kept))
                if not best or not name.startswith(names):
                    continue
                truth = set(kept[np.argsort(-similarity[kept])[:best]].tolist())
                ways = {"nearest": narrowed(nearest(Item.embedding, query), calls)}
                if number < timed:
                    exact = nearest(Item.embedding, query, exact=True)
                    ways |= {
                        "exact": narrowed(exact, calls),
                        "iterative": plain_search(query, calls),
                    }
                row = noted.setdefault(name, {})
                row.setdefault("kept", []).append(len(kept) / len(keep))
                for way, statement in ways.items():
                    keys, spent_ms = ask(statement, 2 if number < timed else 1)
                    share = len(truth.intersection(keys)) / best
                    row.setdefault(f"{way} recall", []).append(share)
                    if number < timed:
                        row.setdefault(f"{way} ms", []).append(spent_ms)
            print(f"{number + 1} queries", file=sys.stderr, flush=True)
    return [summary(name, columns) for name, columns in noted.items()]


def never_short(engine: sa.Engine, made: Rows, queries: np.ndarray) -> list[Row]:
    """Whether as many rows come as are asked for where a graph alone gives fewer, and the right."""
    related = Related(made)
    noted: dict[str, list[tuple[int, int, float]]] = {}

    def ask(
        name: str, session: Session, query: np.ndarray, keep: np.ndarray, statement: Any
    ) -> None:
        similarity = made.vectors @ query
        keys = [item.id for item in session.scalars(statement)]
        right = np.sort(similarity[keep])[::-1][: statement.search.limit]
        # As near as the last exact one, since equal vectors are equally right.
        near = int((similarity[keys] >= right[-1] - 1e-5).sum()) if keys else 0
        noted.setdefault(name, []).append((len(right), len(set(keys)), near / len(right)))

    with Session(engine) as session:
        for query in queries:
            everything = np.ones(len(made.topic), dtype=bool)
            filters = {name: (calls, keep) for name, calls, keep in related.of(query, 0)}
            filters["all but the island"] = (
                [("where", Item.family != ISLAND)],
                made.family != ISLAND,
            )
            for limit in (10, 5000):
                ask(
                    f"{limit} rows",
                    session,
                    query,
                    everything,
                    nearest(Item.embedding, query, limit=limit),
                )
                for name in (
                    "at random, 50.00%",
                    "days of other topics, 50.00%",
                    "all but the island",
                ):
                    calls, keep = filters[name]
                    asked = narrowed(nearest(Item.embedding, query, limit=limit), calls)
                    ask(f"{limit} rows, {name}", session, query, keep, asked)
            session.rollback()
        near = np.argsort(-(related.centres @ queries[0]))
        parts = np.cumsum(related.topic_sizes[near]) / len(made.topic)
        gone = near[: 1 + np.searchsorted(parts, 0.3)]
        for name, criterion, keep in (
            (
                "30 % deleted, of the nearest topics",
                Item.topic.in_(gone.tolist()),
                ~np.isin(made.topic, gone),
            ),
            ("the island deleted", Item.family == ISLAND, made.family != ISLAND),
        ):
            session.execute(
                sa.delete(Item).where(criterion).execution_options(synchronize_session=False)
            )
            for query in queries:
                for limit in (10, 100, 5000):
                    ask(
                        f"{limit} rows, {name}",
                        session,
                        query,
                        keep,
                        nearest(Item.embedding, query, limit=limit),
                    )
            session.rollback()
    rows = []
    for name, values in noted.items():
        wanted, came, recalls = zip(*values, strict=True)
        rows.append(
            {
                "search": name,
                "wanted": min(wanted),
                "came, least": min(came),
                "recall": f"{np.mean(recalls):.3f} / {min(recalls):.2f}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def summary(name: str, columns: dict[str, list[float]]) -> Row:
    """A row of the report: recall as mean, worst in a hundred and worst, medians of time."""
    row: Row = {"filter": name, "kept": f"{np.mean(columns.pop('kept')):.3%}"}
    for column, values in columns.items():
        if column.endswith("ms"):
            row[column] = round(float(np.median(values)), 2)
        else:
            hundredth = np.percentile(values, 1, method="lower")
            row[column] = f"{np.mean(values):.3f} / {hundredth:.1f} / {min(values):.1f}"
    pure = (
        columns["iterative ms"]
        if np.mean(columns["iterative recall"]) >= 0.98
        else columns["exact ms"]
    )
    best = np.minimum(columns["exact ms"], pure)
    row["by exact"] = round(
        float(np.median(np.array(columns["nearest ms"]) / columns["exact ms"])), 2
    )
    row["by best"] = round(float(np.median(np.array(columns["nearest ms"]) / best)), 2)
    print(row, flush=True)
    return row


def run(url: sa.URL, options: argparse.Namespace) -> Row:
    sbert_pg.use_encoder(DeterministicEncoder())
    engine = sa.create_engine(url)
    apart = options.queries if options.held_out else 0
    vectors, family = vectors_of(options.vectors, options.rows + apart, apart, options.near)
    held, vectors = vectors[:apart], vectors[apart:]
    family = family[apart:]
    island = np.random.default_rng(4).random(len(vectors)) < options.island
    vectors[island], family[island] = vectors[0], ISLAND
    made = related_rows(vectors, family)
    choose_index(options.index, options.rows, options.ef_construction)
    if not options.keep:
        fill(engine, made)
    if options.no_btree:
        forget_btrees(engine)
    random = np.random.default_rng(1)
    chosen = random.choice(len(vectors), options.queries, replace=False)
    noise = 0.02 * random.standard_normal((options.queries, DIMENSIONS)).astype(np.float32)
    queries = held if options.held_out else unit(vectors[chosen] + noise)
    results: Row = {"rows": len(vectors), "index": options.index}
    if not options.only_filters:
        results["ways"] = beside_others(engine, vectors, queries, options.keep)
        queries = queries[: max(10, options.queries // 8)]
    names = tuple(options.filters)
    if not names:
        results["unfiltered"] = unfiltered(engine, queries)
    filters = filtered(engine, made, queries, options.timed, options.autocommit, names or ("",))
    results["filtered"] = filters
    if not names:
        results["never short"] = never_short(engine, made, queries[: options.timed])
    engine.dispose()
    return results


def beside_others(
    engine: sa.Engine, vectors: np.ndarray, queries: np.ndarray, keep: bool
) -> list[Row]:
    truth = [true_keys(vectors, query) for query in queries]
    ways = {
        "psycopg, transaction": bare(engine, False),
        "psycopg, autocommit": bare(engine, True),
        **ours(engine),
    }
    for name, make in (("vecs", vecs_way), ("PGVectorStore", langchain_way)):
        way = make(engine, keep)
        if way is not None:
            ways[name] = way
        else:
            print(f"{name} is not installed", flush=True)
    return measure(ways, queries, truth)


def forget_btrees(engine: sa.Engine) -> None:
    """Leave the filtered columns without an index, in the database and in the declaration."""
    table: Any = Item.__table__
    with engine.begin() as connection:
        for index in list(table.indexes):
            if index.name != "item_embedding":
                connection.execute(sa.schema.DropIndex(index, if_exists=True))
                table.indexes.discard(index)


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
    parser.add_argument("--near", action="store_true", help="mix rows of one topic, not of any two")
    parser.add_argument("--only-filters", action="store_true", help="the second table, all queries")
    parser.add_argument(
        "--filters", nargs="+", default=[], help="those whose names begin so, alone"
    )
    parser.add_argument("--island", type=float, default=0, help="part of the rows with one vector")
    parser.add_argument("--timed", type=int, default=10, help="queries by which filters are timed")
    parser.add_argument(
        "--no-btree", action="store_true", help="drop the filtered columns' indexes"
    )
    parser.add_argument(
        "--autocommit", action="store_true", help="time filters without a transaction each"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="vecs")
    if options.database:
        results = run(sa.make_url(options.database).set(drivername="postgresql+psycopg"), options)
    else:
        settings = {"shared_buffers": "1GB", "max_wal_size": "4GB", "maintenance_work_mem": "1GB"}
        with fresh_server(settings) as server:
            results = run(server.ensure_database("benchmark"), options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
