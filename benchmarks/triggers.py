"""What noticing and the guard cost: each statement with and without the triggers, side by side.

    python benchmarks/triggers.py [--rows 100000] [--rounds 5]

Variants: no triggers; the library's own; and the other kind, that is, by row where the library has
one trigger for an INSERT statement, and by statement where it has one for each deleted row. Runs on
the embedded server, variants interleaved, the best of the rounds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.embedded import EmbeddedServer, embedded_server
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types.guard import ColumnIdentity

SETTINGS = {"shared_buffers": "1GB", "max_wal_size": "8GB", "synchronous_commit": "off"}
VARIANTS = ("none", "own", "other")
#: The same work by the other kind of trigger.
OTHER_KIND = """
CREATE FUNCTION row_inserted() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NEW.e IS NOT NULL
        AND NOT coalesce(strpos(current_setting('sbert.attested', true), ',1,') > 0, false)
    THEN
        PERFORM sbert.refuse_v1(1);
    END IF;
    IF (NEW.e IS NULL) <> (NEW.body IS NULL) THEN
        INSERT INTO sbert.pending AS p (column_id, key) VALUES (1, NEW.id::text)
        ON CONFLICT (column_id, key) DO UPDATE SET version = excluded.version;
        PERFORM pg_notify('sbert_pending', '1');
    END IF;
    RETURN NULL;
END $$;
CREATE FUNCTION statement_deleted() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    DELETE FROM sbert.pending p USING deleted d WHERE column_id = 1 AND key = d.id::text;
    RETURN NULL;
END $$;
"""
OTHER_TRIGGERS = [
    """CREATE TRIGGER b AFTER DELETE ON note REFERENCING OLD TABLE AS deleted
       FOR EACH STATEMENT EXECUTE FUNCTION statement_deleted()""",
    """CREATE TRIGGER a AFTER INSERT ON note FOR EACH ROW
       WHEN ((NEW.e IS NULL) <> (NEW.body IS NULL)
             OR NOT coalesce(strpos(current_setting('sbert.attested', true), ',1,') > 0, false))
       EXECUTE FUNCTION row_inserted()""",
]
TABLE = (
    "CREATE TABLE note (id bigserial PRIMARY KEY, body text, views int NOT NULL DEFAULT 0, "
    "e vector(384))"
)
TEXT = "'text number ' || i || repeat(' lorem ipsum', 6)"

Connection = psycopg.Connection


def prepare(server: EmbeddedServer) -> tuple[Connection, list[str]]:
    engine = sa.create_engine(server.ensure_database("bench"))
    with engine.begin() as connection:
        catalog.upgrade(connection)
        connection.exec_driver_sql(TABLE)
        identity = ColumnIdentity(None, "note", "e")
        catalog.bind(connection, identity, EncoderSpec(name="x", dimensions=384), Source.of("body"))
        connection.exec_driver_sql(OTHER_KIND)
    engine.dispose()
    connection = psycopg.connect(server.dsn("bench"), autocommit=True)
    connection.execute(
        "CREATE TABLE vectors AS SELECT i, (SELECT array_agg(random() * 0.1)::vector(384) "
        "AS v FROM generate_series(1, 384) AS d WHERE d + i > 0) FROM generate_series(1, 500) AS i"
    )
    connection.execute("SET sbert.attested = ',1,'")
    own = connection.execute(
        "SELECT pg_get_triggerdef(oid) FROM pg_trigger "
        "WHERE tgrelid = 'note'::regclass AND NOT tgisinternal"
    ).fetchall()
    return connection, [row[0] for row in own]


def use(connection: Connection, variant: str, own: list[str]) -> None:
    names = connection.execute(
        "SELECT quote_ident(tgname) FROM pg_trigger "
        "WHERE tgrelid = 'note'::regclass AND NOT tgisinternal"
    ).fetchall()
    for (name,) in names:
        connection.execute(f"DROP TRIGGER {name} ON note")
    if variant == "own":
        wanted = own
    elif variant == "other":
        wanted = [trigger for trigger in own if "AFTER UPDATE" in trigger]
        wanted += OTHER_TRIGGERS
    else:
        wanted = []
    for trigger in wanted:
        connection.execute(trigger)


def steps(connection: Connection, rows: int) -> list[tuple[str, int, Callable[[], object]]]:
    """Name, rows touched, and the statement, in the order in which they are run."""
    run = connection.execute
    some = rows // 4

    def copy() -> None:
        with connection.cursor() as cursor, cursor.copy("COPY note (body) FROM STDIN") as stream:
            for number in range(some):
                stream.write_row([f"text number {number} lorem ipsum"])

    def singly(statement: str) -> Callable[[], None]:
        def work() -> None:
            with connection.transaction():
                for number in range(2_000):
                    run(statement, [number], prepare=True)

        return work

    def statement(text: str) -> Callable[[], object]:
        return lambda: run(text)

    series = f"generate_series(1, {rows}) AS i"
    with_vectors = (
        f"INSERT INTO note (body, e) SELECT {TEXT.replace('|| i ||', '|| g ||')}, v "
        f"FROM generate_series(1, {some}) AS g JOIN vectors ON vectors.i = 1 + g % 500"
    )
    texts = f"INSERT INTO note (body) SELECT {TEXT} FROM {series}"
    views = "UPDATE note SET views = views + 1 WHERE e IS NOT NULL"
    body = "UPDATE note SET body = body || 'x' WHERE e IS NOT NULL"
    one_text = "INSERT INTO note (body) VALUES (%s::text)"
    one_vector = "INSERT INTO note (body, e) SELECT %s::text, v FROM vectors WHERE i = 1"
    return [
        ("INSERT ... SELECT, texts", rows, statement(texts)),
        ("COPY, texts", some, copy),
        ("INSERT ... SELECT, with vectors", some, statement(with_vectors)),
        ("UPDATE of another column", some, statement(views)),
        ("UPDATE of the text", some, statement(body)),
        ("DELETE, with vectors", some, statement("DELETE FROM note WHERE e IS NOT NULL")),
        ("INSERT of one row, text", 2_000, singly(one_text)),
        ("INSERT of one row, with vector", 2_000, singly(one_vector)),
        ("DELETE of one row", 2_000, singly("DELETE FROM note WHERE id = %s::bigint + 1")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    best: dict[tuple[str, str], float] = {}
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # the server may run as a user of its own
        with embedded_server(Path(folder) / "data", settings=SETTINGS) as server:
            connection, own = prepare(server)
            for _ in range(given.rounds):
                for variant in VARIANTS:
                    use(connection, variant, own)
                    connection.execute("TRUNCATE note, sbert.pending RESTART IDENTITY")
                    for name, count, work in steps(connection, given.rows):
                        connection.execute("CHECKPOINT")
                        start = time.perf_counter()
                        work()
                        spent = time.perf_counter() - start
                        key = name, variant
                        best[key] = min(spent, best.get(key, spent))
                        counts[name] = count
            connection.close()
    print(f"{'µs per row':32}{'none':>8}{'own':>8}{'other':>8}   own/none other/none")
    for name, count in counts.items():
        none, mine, other = (best[name, variant] / count * 1e6 for variant in VARIANTS)
        print(f"{name:32}{none:8.2f}{mine:8.2f}{other:8.2f}{mine / none:11.2f}{other / none:11.2f}")


if __name__ == "__main__":
    main()
