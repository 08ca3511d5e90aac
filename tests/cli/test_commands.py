"""The command as a process: output, exit codes, interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from command_line import process, sbert_pg

from sbert_pg import Embedding, bind, create_all, load
from sbert_pg.catalog import downgrade
from sbert_pg.cli import app, common

ROOT = Path(__file__).parents[2]
NOWHERE = "postgresql://127.0.0.1:1/db"


@pytest.fixture
def articles(tmp_path: Path) -> Path:
    path = tmp_path / "articles.csv"
    path.write_text(
        "title,body\n"
        "Refunds,How to get your money back after a purchase\n"
        "Opening hours,When the shop is open\n"
        'Careers,"Jobs, and how to apply"\n'
    )
    return path


def as_process(*arguments: str, url: sa.URL | None = None) -> tuple[int, str, str]:
    """Exit code, output and errors of a process."""
    running = process(*arguments, url=url)
    stdout, stderr = running.communicate(timeout=120)
    return running.returncode, stdout, stderr


def test_help_teaches() -> None:
    code, stdout, _ = as_process("--help")
    assert code == 0
    for command in ("demo", "migrate", "load", "search", "status", "encoder"):
        assert command in stdout
    assert "Exit codes" in stdout


def commands(*prefix: str) -> list[tuple[str, ...]]:
    """Every command, nested ones included."""
    import typer

    from sbert_pg.cli.app import build_app

    root: Any = typer.main.get_command(build_app())
    found: list[tuple[str, ...]] = []

    def visit(command: Any, path: tuple[str, ...]) -> None:
        inner = getattr(command, "commands", None)
        if inner is None:
            found.append(path)
            return
        for name, child in inner.items():
            visit(child, (*path, name))

    visit(root, prefix)
    return found


def test_the_command_line_stays_small() -> None:
    """A command or an option more is a decision: it costs every reader of the help."""
    import typer

    from sbert_pg.cli.app import build_app

    root: Any = typer.main.get_command(build_app())
    options = 0
    for path in commands():
        command = root
        for name in path:
            command = command.commands[name]
        options += sum(p.param_type_name == "option" for p in command.params)
    assert len(commands()) <= 29
    assert options <= 139


def test_an_option_means_the_same_wherever_it_stands() -> None:
    """One spelling, one help, whatever the command; what it is for there, the command says."""
    import typer

    from sbert_pg.cli.app import build_app

    meanings: dict[str, set[tuple[str, ...]]] = {}
    for path in commands():
        command: Any = typer.main.get_command(build_app())
        for name in path:
            command = command.commands[name]
        for option in command.params:
            if option.param_type_name == "option":
                for word in option.opts:
                    meanings.setdefault(word, set()).add((option.help, *sorted(option.opts)))
    several = {word: helps for word, helps in meanings.items() if len(helps) > 1}
    assert not several


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_is_explained(path: tuple[str, ...]) -> None:
    """In its own help, with an example, and on a page."""
    import typer

    from sbert_pg.cli.app import build_app

    command: Any = typer.main.get_command(build_app())
    for name in path:
        command = command.commands[name]
    text = command.help or ""
    assert len(text) > 40, f"{' '.join(path)} has no help"
    assert f"sbert-pg {' '.join(path)}" in text.replace("\n", " "), "the help shows no example"
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        assert getattr(parameter, "help", "x") is not None, f"{path}: {parameter.name} has no help"
    pages = "\n".join(p.read_text() for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert f"sbert-pg {' '.join(path)}" in pages, f"sbert-pg {' '.join(path)} is on no page"


def test_load_and_search(database_url: sa.URL, articles: Path, minilm: Any) -> None:
    loaded = sbert_pg(
        "load", "article", str(articles), "--create", "-s", "title", "-s", "body",
        url=database_url,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr
    assert "3 rows loaded into article" in loaded.stderr
    more = '{"title": "Shipping", "body": "Where is my parcel?"}\n'
    assert sbert_pg("load", "article", "-", url=database_url, stdin=more).returncode == 0
    found = sbert_pg("search", "article", "track a package", "--json", url=database_url)
    assert found.returncode == 0, found.stderr
    rows = json.loads(found.stdout)
    assert rows[0]["title"] == "Shipping"
    assert len(rows) == 4
    assert "embedding" not in rows[0]
    filtered = sbert_pg(
        "search", "article", "money", "--where", "title <> 'Refunds'", "-n", "1", url=database_url
    )
    assert "Refunds" not in filtered.stdout
    assert filtered.returncode == 0
    status = json.loads(sbert_pg("status", "--json", url=database_url).stdout)
    assert len(status) == 1
    assert status[0]["pending"] == 0
    for_readers = sbert_pg("status", "--exact", url=database_url).stdout
    line = next(line for line in for_readers.splitlines() if "article.embe" in line)
    assert line.split("│")[3].strip() == "4", "rows are counted"


def test_documents_are_loaded_cut_and_found_by_passages(
    database_url: sa.URL, tmp_path: Path, minilm: Any
) -> None:
    filler = "The kettle stands on its base, and its lid closes with a click. " * 30
    manuals = [
        {"title": "Kettle", "body": f"{filler}\n\n## Cleaning\n\nRemove limescale by citric acid."},
        {"title": "Radio XJ-4711", "body": "Turn the knob to find a station."},
    ]
    path = tmp_path / "manuals.jsonl"
    path.write_text("".join(json.dumps(manual) + "\n" for manual in manuals))
    loaded = sbert_pg(
        "load", "manual", str(path), "--create", "--passages", "-s", "title", "-s", "body",
        url=database_url,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr
    arguments = ("search", "manual", "how do I get rid of limescale", "--json", "--explain")
    found = sbert_pg(*arguments, "-n", "1", url=database_url)
    assert found.returncode == 0, found.stderr
    row = json.loads(found.stdout)["rows"][0]
    assert (row["title"], row["heading"]) == ("Kettle", "Kettle > Cleaning")
    assert row["text"] == "Remove limescale by citric acid."
    assert row["start"] > 1900
    assert "embedding" not in found.stdout.replace("passages_embedding", "").split('"sql"')[0]
    with sa.create_engine(database_url).begin() as connection:
        connection.exec_driver_sql(
            "ALTER TABLE manual ADD words tsvector GENERATED ALWAYS AS "
            "(to_tsvector('simple', coalesce(title, ''))) STORED"
        )
    where = ("--where", "title <> 'Kettle'")
    both = sbert_pg("search", "manual", "XJ-4711", "--by", "both", "--explain", *where,
                    url=database_url)  # fmt: skip
    assert both.returncode == 0, both.stderr
    assert "Radio XJ-4711" in both.stdout
    assert "weight of meaning" in both.stderr
    shown = sbert_pg("passages", "manual", "1", url=database_url)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"\d+:\d+ +Kettle > Cleaning\nRemove limescale by citric acid", shown.stdout)
    more = '{"title": "Toaster", "body": "Empty the crumb tray."}\n'
    assert sbert_pg("load", "manual", "-", url=database_url, stdin=more).returncode == 0
    found = sbert_pg("search", "manual", "crumbs", "-n", "1", url=database_url)
    assert "Empty the crumb tray." in found.stdout


def test_a_template_is_not_cut_into_passages(database_url: sa.URL, articles: Path) -> None:
    """Its last column would be, and what the template says be lost."""
    arguments = ("load", "manual", str(articles), "--create", "--passages", "-s", "{title}: {body}")
    refused = sbert_pg(*arguments, url=database_url)
    assert refused.returncode == 1
    assert "without braces" in " ".join(refused.stderr.split())


def test_files_that_are_called_like_statements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sbert_pg.cli.target import queries_of

    monkeypatch.chdir(tmp_path)
    engine = sa.create_engine(NOWHERE)
    for name in ("with_gains.csv", "values.csv", "selected.csv"):
        Path(name).write_text("question,id\nwhere is it?,1\n")
        assert [query.text for query in queries_of(engine, name)] == ["where is it?"]
    for statement in ("SELECT 1", "values('a', '1')", "  with a as (SELECT 1) SELECT 1"):
        with pytest.raises(sa.exc.OperationalError):
            queries_of(engine, statement)


def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    from sbert_pg.cli.app import run

    fitted = ["evaluate", "note", "--pairs", "pairs.csv", "--fit-weight", "-d", NOWHERE]
    for more in (["--slice", "lang"], ["--encoder", "all-MiniLM-L6-v2"]):
        assert run([*fitted, *more]) == 1
        assert "leave --slice and --encoder out" in " ".join(capsys.readouterr().err.split())


def test_an_application_that_has_no_metadata(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["backfill", "note", "--app", "json:dumps", "-d", NOWHERE]) == 1
    assert "neither metadata nor a declarative base" in " ".join(capsys.readouterr().err.split())


def test_a_directory_does_not_hide_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same name, as packages of applications have: texts are in files and tables alone."""
    from sbert_pg.cli.app import run

    monkeypatch.chdir(tmp_path)
    Path("article").mkdir()
    unreachable = 3
    limits = [
        "encoder",
        "show",
        "all-MiniLM-L6-v2",
        "--limits",
        "--texts",
        "article",
        "-d",
        NOWHERE,
    ]
    assert run(limits) == unreachable


def test_the_help_says_where_a_server_listens(capsys: pytest.CaptureFixture[str]) -> None:
    from sbert_pg.cli.app import run

    assert run(["serve", "--help"]) == 0
    assert "127.0.0.1:8080" in capsys.readouterr().out


def test_a_command_that_went_says_where_to(capsys: pytest.CaptureFixture[str]) -> None:
    for name, place in app.MOVED.items():
        assert app.run([*name.split(), "article"]) == 2
        assert place in " ".join(capsys.readouterr().err.split())
        moved = re.search(r"sbert-pg ([^']*) (--\w+)'", place)
        if moved is not None:
            assert app.run([*moved[1].split(), "--help"]) == 0
            assert moved[2] in capsys.readouterr().out


def test_a_column_is_named_the_same_way_everywhere(database_url: sa.URL, minilm: Any) -> None:
    """By its table while that is enough; with its schema or column where it is not."""
    from sbert_pg.cli.target import resolve
    from sbert_pg.errors import DeclarationError

    engine = sa.create_engine(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA other")
        for schema, columns in (("public", ("a",)), ("other", ("a", "b.c"))):
            metadata = sa.MetaData()
            table = sa.Table(
                "note",
                metadata,
                sa.Column("id", sa.Integer, primary_key=True),
                sa.Column("title", sa.Text),
                *(sa.Column(name, Embedding("all-MiniLM-L6-v2", "title")) for name in columns),
                schema=None if schema == "public" else schema,
            )
            metadata.create_all(connection)
            for name in columns:
                bind(connection, table.c[name])
        for name, column in {
            "note": "public.note.a",
            "note.a": "public.note.a",
            "public.note": "public.note.a",
            "other.note.a": "other.note.a",
            "other.note.b.c": "other.note.b.c",
            "note.b.c": "other.note.b.c",
        }.items():
            target = resolve(connection, name)
            assert str(target.binding) == column, name
            assert isinstance(target.column.type, Embedding)
        with pytest.raises(DeclarationError, match=r"several.*other.note.a, other.note.b.c"):
            resolve(connection, "other.note")
        # A change of one tenant's column does not make its name the other's.
        connection.exec_driver_sql("CREATE SCHEMA far")
        far = table.to_metadata(sa.MetaData(), schema="far")
        far.create(connection)
        bind(connection, far.c.a)
        bind(connection, far.c["b.c"], replaces="a")
        assert str(resolve(connection, "far.note").binding) == "far.note.a"
        with pytest.raises(DeclarationError, match=r"several.*far.note.b.c, other.note.b.c"):
            resolve(connection, "note.b.c")
        with pytest.raises(DeclarationError, match=r"not an embedding column.*public.note.a"):
            resolve(connection, "NOTE")
    engine.dispose()


def test_wide_tables_are_readable(database_url: sa.URL, minilm: Any) -> None:
    engine = sa.create_engine(database_url)
    metadata = sa.MetaData()
    table = sa.Table(
        "wide",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("title", sa.Text),
        *(sa.Column(f"detail_{n}", sa.Text, default=f"value {n} of this row") for n in range(24)),
        sa.Column("embedding", Embedding("all-MiniLM-L6-v2", "title")),
    )
    with engine.begin() as connection:
        metadata.create_all(connection)
        bind(connection, table.c.embedding)
        load(connection, table, [{"id": 1, "title": "Refunds [and] returns"}])
    shown = sbert_pg("search", "wide", "money back", url=database_url).stdout
    assert "value 17 of this row" in shown
    assert "Refunds [and] returns" in shown
    engine.dispose()


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("count", [4, 24, 60])
def test_rows_of_any_table_are_readable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, count: int, width: int
) -> None:
    """Each value in one line of its own or a cell, long ones of any type cut, nothing left out."""
    monkeypatch.setattr(common.out, "_width", width)
    kinds = ["[and] more", "long " * 200, None, 17, {"a": ["x" * 300]}, b"\0" * 200, True]
    row = [kinds[n % len(kinds)] for n in range(count)]
    common.print_rows([f"column_{n}" for n in range(count)], [row, row])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert sum("[and] more" in line for line in lines) == 2 * row.count("[and] more")
    if count > 4:
        assert len(lines) == 2 * (1 + count - row.count(None)), "a line for each value"


def test_a_bad_row_leaves_nothing(database_url: sa.URL, tmp_path: Path, minilm: Any) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"title": "fine"}\nnot json\n')
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"title": "caf\xe9"}\n')
    refused = sbert_pg("load", "a", str(latin), "--create", "-s", "title", url=database_url)
    assert (refused.returncode, "UTF-8" in refused.stderr) == (1, True), refused.stderr
    result = sbert_pg("load", "a", str(path), "--create", "-s", "title", url=database_url)
    assert result.returncode == 1
    assert "line 2" in result.stderr
    engine = sa.create_engine(database_url)
    assert not sa.inspect(engine).has_table("a")
    engine.dispose()


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("title,title", "names a column twice"),
        ("title,embedding", "cannot be called 'embedding'"),
        ("title,embedding_of", "cannot be called 'embedding_of'"),
        ("title,", "cannot be called ''"),
        (f"title,{'é' * 32}", "1 to 63 bytes"),
    ],
)
def test_headers_that_make_no_table(
    header: str, words: str, database_url: sa.URL, tmp_path: Path
) -> None:
    path = tmp_path / "odd.csv"
    path.write_text(f"{header}\na,b\n")
    result = sbert_pg("load", "a", str(path), "--create", "-s", "title", url=database_url)
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert words in " ".join(result.stderr.split())


def test_a_table_needs_the_catalog(bare_database_url: sa.URL, articles: Path) -> None:
    result = sbert_pg("load", "a", str(articles), "--create", "-s", "title", url=bare_database_url)
    assert (result.returncode, "sbert-pg migrate" in result.stderr) == (1, True), result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["search", "nowhere", "x"], 1, "is not an embedding column"),
        (["load", "a", "missing.csv"], 1, "missing.csv"),
        (["search"], 2, "Missing argument"),
        (["no-such-command"], 2, "No such command"),
        (["migrate", "--check"], 0, ""),
        (["search", "a", "b", "--limit", "0"], 2, "limit"),
        (["serve", "--http", "127.0.0.1:99999"], 2, "up to 65535"),
    ],
)
def test_exit_codes(database_url: sa.URL, arguments: list[str], code: int, words: str) -> None:
    result = sbert_pg(*arguments, url=database_url)
    assert result.returncode == code, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_unreachable_database() -> None:
    url = sa.make_url("postgresql+psycopg://nobody@127.0.0.1:9/none?connect_timeout=2")
    code, _, stderr = as_process("status", url=url)
    assert code == 3
    assert "Traceback" not in stderr, stderr


def test_not_postgres() -> None:
    result = sbert_pg("status", "-d", "mysql://somewhere/else")
    assert result.returncode == 1
    assert "PostgreSQL" in result.stderr


def test_schema_up_and_down(bare_database_url: sa.URL) -> None:
    assert sbert_pg("migrate", "--check", url=bare_database_url).returncode == 1
    assert sbert_pg("migrate", url=bare_database_url).returncode == 0
    assert sbert_pg("migrate", "--check", url=bare_database_url).returncode == 0
    assert "CREATE SCHEMA" in sbert_pg("migrate", "--sql").stdout
    engine = sa.create_engine(bare_database_url)
    with engine.begin() as connection:
        downgrade(connection, "base")
    assert sbert_pg("migrate", "--check", url=bare_database_url).returncode == 1
    engine.dispose()
    engine = sa.create_engine(bare_database_url)
    assert "encoder" not in sa.inspect(engine).get_table_names(schema="sbert")
    engine.dispose()


def test_interrupt_leaves_nothing_half_done(
    database_url: sa.URL, tmp_path: Path, minilm: Any
) -> None:
    path = tmp_path / "many.jsonl"
    with path.open("w") as file:
        for number in range(20_000):
            file.write(json.dumps({"title": f"article number {number} about things"}) + "\n")
    running = process("load", "many", str(path), "--create", "-s", "title", url=database_url)
    engine = sa.create_engine(database_url)
    while running.poll() is None:
        with engine.connect() as connection:
            busy = connection.execute(
                sa.text("SELECT count(*) FROM pg_stat_progress_copy")
            ).scalar_one()
        if busy:
            break
        time.sleep(0.02)
    else:
        pytest.fail("the load ended before it was seen to write")
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=300)
    assert running.returncode == 130, stderr
    assert "Traceback" not in stderr, stderr
    assert not sa.inspect(engine).has_table("many")
    engine.dispose()


@pytest.mark.slow
def test_demo_twice(tmp_path: Path, minilm: Any) -> None:
    """On an embedded server of its own; the second start finds everything in place."""
    arguments = ["demo", "compare two files line by line"]
    os.chmod(tmp_path, 0o755)
    first = sbert_pg(*arguments, XDG_DATA_HOME=str(tmp_path))
    assert first.returncode == 0, first.stderr
    assert re.search(r"difflib\.|filecmp\.", first.stdout)
    second = sbert_pg(*arguments, XDG_DATA_HOME=str(tmp_path))
    assert second.returncode == 0, second.stderr
    timed = re.compile(r"[\d.]+ ms")
    assert timed.sub("", second.stdout) == timed.sub("", first.stdout)
    assert "Embedding" not in second.stderr


def test_an_interrupt_in_a_copy_is_no_error_of_the_database(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The connection cannot even be rolled back then, and that is what comes out at last."""

    def interrupted(**_: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            words = "another command is already in progress"
            raise sa.exc.OperationalError("ROLLBACK", {}, Exception(words))  # noqa: B904

    monkeypatch.setattr(app, "build_app", lambda: interrupted)
    assert app.run([]) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_the_database_may_be_named_as_for_psql(database_url: sa.URL) -> None:
    given = {
        "PGHOST": database_url.host or database_url.query.get("host"),
        "PGPORT": database_url.port,
        "PGUSER": database_url.username,
        "PGPASSWORD": database_url.password,
        "PGDATABASE": database_url.database,
    }
    embedding = sa.Column("embedding", Embedding("deterministic", source="title", dimensions=384))
    title = sa.Column("title", sa.Text, primary_key=True)
    table = sa.Table("only_here", sa.MetaData(), title, embedding)
    engine = sa.create_engine(database_url)
    with engine.begin() as connection:
        create_all(connection, table.metadata)
    engine.dispose()
    result = sbert_pg("status", "--json", **{k: str(v) for k, v in given.items() if v})
    assert "only_here" in result.stdout, result


def test_a_database_in_sql_ascii(bare_database_url: sa.URL, fake_encoder: Any) -> None:
    """Where psycopg gives texts as bytes unless the client names its encoding."""
    name = f"{bare_database_url.database}_ascii"
    server = sa.create_engine(bare_database_url, isolation_level="AUTOCOMMIT")
    made = f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0"
    with server.connect() as connection:
        connection.exec_driver_sql(made)
    url = bare_database_url.set(database=name)
    engine = sa.create_engine(url, connect_args={"client_encoding": "utf8"}, poolclass=sa.NullPool)
    note = sa.Table(
        "note",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("body", sa.Text),
        sa.Column("e", Embedding("deterministic", source="body", dimensions=384)),
    )
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE EXTENSION vector")
        create_all(connection, note.metadata)
        connection.execute(
            note.insert(), [{"id": 1, "body": "grün \u2603"}, {"id": 2, "body": "b"}]
        )
    said = sbert_pg("worker", "--once", "--http", "127.0.0.1:0", url=url)
    assert "2 rows embedded" in said.stdout
    assert "with --once nothing is served" in said.stderr
    shown = sbert_pg("search", "note.e", "grün \u2603", url=url).stdout
    assert "grün \u2603" in shown
    assert "0 wrong" in sbert_pg("audit", "note.e", url=url).stdout
    assert sbert_pg("status", url=url).returncode == 0
    with server.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    server.dispose()
