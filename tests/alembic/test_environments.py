"""Alembic environments of every kind: schemas, heads, several metadata, async, Flask-Migrate."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from sbert_pg.cli.schema import prepare_alembic

MODELS = """
class Article(Base):
    __tablename__ = "article"
    __table_args__ = ({indexes}{{"schema": {schema!r}}})
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    {columns}
"""
EMBEDDING = 'embedding = embedding_column(ENCODER, source="title", nullable=True)'


#: A next revision of the library's own history.
NEWER = """
revision, down_revision = "0002", {head!r}


def upgrade(op):
    op.execute("COMMENT ON SCHEMA sbert IS 'newer'")


def downgrade(op):
    op.execute("COMMENT ON SCHEMA sbert IS NULL")
"""


def models(
    *,
    indexes: str = 'hnsw_index("ix_e", "embedding"),',
    columns: str = EMBEDDING,
    schema: Any = None,
) -> str:
    return MODELS.format(indexes=indexes, columns=columns, schema=schema)


def test_newer_version_of_the_schema(
    app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own schema falls behind where the library is updated, and is brought up."""
    from sbert_pg import catalog

    app.models(models())
    app.step("embedding")
    shutil.copytree(catalog.script_location(), tmp_path / "history")
    (tmp_path / "history" / "versions" / "0002_newer.py").write_text(
        NEWER.format(head=(head := catalog.head()))
    )
    for module in (catalog, catalog.migrate):
        monkeypatch.setattr(module, "script_location", lambda: tmp_path / "history")
    assert "upgrade_sbert_schema" in app.check()
    text = app.step("newer")
    assert f"op.upgrade_sbert_schema('{catalog.head()}')" in text
    assert f"op.downgrade_sbert_schema('{head}')" in text
    app.downgrade("-1")
    with app.engine.connect() as connection:
        assert catalog.current(connection) == head
    app.upgrade()
    assert app.check() == ""


def test_several_metadata(app: Any) -> None:
    """Two bases, as when an application and a package of its own each have one."""
    app.env.write_text(
        app.env.read_text().replace(
            "target_metadata = models['Base'].metadata",
            "target_metadata = [models['Base'].metadata, models['Other'].metadata]",
        )
    )
    other = """

class Other(DeclarativeBase):
    pass


class Note(Other):
    __tablename__ = "note"
    __table_args__ = ({indexes}{{}})
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    {columns}
"""
    bare = other.format(indexes="", columns="")
    app.models(models(indexes="", columns="") + bare)
    app.step("tables")
    full = other.format(
        indexes='ivfflat_index("ix_note", "vector", lists=1),',
        columns='vector = embedding_column(ENCODER, source="body", nullable=True)',
    )
    app.models(models() + full)
    text = app.step("embeddings")
    assert text.count("op.add_embedding_column(") == 2
    app.models(models() + bare)
    assert "op.drop_embedding_column('note', 'vector')" in app.step("one less")
    app.downgrade("base")
    app.upgrade()


def test_several_heads(app: Any) -> None:
    """A change is written onto the head that is asked for, and its parts follow one another."""
    app.models(models(indexes="", columns=""))
    app.step("articles")
    root = command.current(app.config())
    assert root is None
    base = app.scalar("SELECT version_num FROM alembic_version")
    for label in ("left", "right"):
        command.revision(
            app.config(), label, head=base, splice=True, branch_label=label, rev_id=f"on_{label}"
        )
    app.upgrade("heads")
    # An ordinary change and an embedding at once make two revisions, on one branch.
    app.models(models(columns=EMBEDDING + "\n    views: Mapped[int | None]"))
    with pytest.raises(Exception, match="Multiple heads"):
        app.revision("ambiguous")
    text = app.revision("both", head="left@head")
    assert text.count("Revision ID") == 2
    app.upgrade("heads")
    assert app.check() == ""
    heads = set(app.execute("SELECT version_num FROM alembic_version"))
    assert "on_right" in heads
    assert len(heads) == 2
    command.merge(app.config(), "heads", message="merge")
    app.upgrade()
    assert app.check() == ""
    app.downgrade("base")
    app.upgrade("heads")


def test_schemas_with_filters(app: Any) -> None:
    """``include_schemas`` sees the library's own schema, and never proposes to drop it."""
    app.execute("CREATE SCHEMA shop")
    app.options("include_schemas=True,")
    app.models(models(schema="shop"))
    text = app.step("in a schema")
    assert "schema='shop'" in text
    assert "sbert" in app.execute("SELECT nspname FROM pg_namespace WHERE nspname = 'sbert'")
    assert "schema='sbert'" not in text
    app.models(models(schema="shop", indexes='hnsw_index("ix_e", "embedding", m=12),'))
    assert "m: 16 to 12" in app.check()
    app.step("index")


def test_objects_that_env_py_leaves_out(app: Any) -> None:
    """``include_object`` and ``include_name`` count for columns and indexes of this library too."""
    app.models(models(indexes="", columns=""))
    app.step("articles")
    app.options(
        "include_object=lambda o, name, kind, reflected, other: name not in ('embedding', 'ix_e'),"
    )
    app.models(models())
    assert app.check() == ""


@pytest.mark.slow
def test_naming_conventions(app: Any) -> None:
    convention = """
Base.metadata.naming_convention = {"ix": "ix_%(table_name)s_%(column_0_name)s"}
"""
    app.models(convention + models(indexes='hnsw_index(None, "embedding"),'))
    text = app.step("named by convention")
    assert "op.f('ix_article_embedding')" in text
    assert app.scalar("SELECT to_regclass('ix_article_embedding') IS NOT NULL")
    app.models(convention + models(indexes='hnsw_index(None, "embedding", m=12),'))
    text = app.step("changed")
    assert "replace=True" in text
    app.downgrade("base")
    app.upgrade()


def test_async_env(app: Any, tmp_path: Path) -> None:
    """The environment that ``alembic init -t async`` makes."""
    root = tmp_path / "async"
    root.mkdir()
    config = Config(root / "alembic.ini", stdout=io.StringIO())
    command.init(config, str(root / "migrations"), template="async")
    env = root / "migrations" / "env.py"
    env.write_text(
        env.read_text()
        .replace(
            "target_metadata = None",
            f"import runpy\ntarget_metadata = runpy.run_path({str(app.root / 'models.py')!r})"
            "['Base'].metadata\n",
        )
        .replace("fileConfig(config.config_file_name)", "pass")
    )
    prepare_alembic(root / "migrations", write=True)
    assert "autogenerate_plugins=autogenerate_plugins()" in env.read_text()
    app.env = env
    app.models(models(indexes="", columns=""))
    plain = app.config

    def configured() -> Config:
        made = plain()
        made.set_main_option("script_location", str(root / "migrations"))
        return made

    app.config = configured
    app.step("articles")
    app.execute("INSERT INTO article (title) VALUES ('a'), ('b')")
    app.models(models())
    assert "op.add_embedding_column(" in app.step("embedding")
    app.downgrade("-1")
    app.upgrade()
    assert app.check() == ""


FLASK = """
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Mapped, mapped_column

from sbert_pg import EncoderSpec, embedding_column, hnsw_index

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = {url!r}
db = SQLAlchemy(app)
migrate = Migrate(app, db)


class Article(db.Model):
    {arguments}
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    {columns}
"""


@pytest.mark.slow
def test_flask_migrate(bare_database_url: sa.URL, tmp_path: Path) -> None:
    """The commands that a Flask application has, in an environment that ``flask db init`` made."""
    pytest.importorskip("flask_migrate")
    pytest.importorskip("flask_sqlalchemy")
    url = bare_database_url.render_as_string(hide_password=False)
    encoder = 'EncoderSpec(name="deterministic", dimensions=384)'

    def write(arguments: str = "", columns: str = "") -> None:
        (tmp_path / "app.py").write_text(
            FLASK.format(url=url, arguments=arguments, columns=columns)
        )

    def flask(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flask", "db", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    write()
    flask("init")
    # The command takes the directory that 'flask db init' made.
    prepare_alembic(tmp_path / "migrations", write=True)
    text = (tmp_path / "migrations" / "env.py").read_text()
    assert text.count("autogenerate_plugins=autogenerate_plugins()") == 2
    flask("migrate", "-m", "articles")
    flask("upgrade")
    write(
        '__table_args__ = (hnsw_index("ix_e", "embedding"),)',
        f'embedding = embedding_column({encoder}, source="title", nullable=True)',
    )
    flask("migrate", "-m", "embedding")
    flask("upgrade")
    flask("check")
    flask("downgrade")
    flask("upgrade")


def _without_random(text: str) -> str:
    text = re.sub(r"Create Date: .*", "", text)
    return re.sub(r"\b[0-9a-f]{12}\b", "", text)


UNDISTURBED = textwrap.dedent(
    """
    import sqlalchemy as sa
    from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


    class Base(DeclarativeBase):
        pass


    class Thing(Base):
        __tablename__ = "thing"
        __table_args__ = (sa.Index("ix_name", "name"),)
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        kind = mapped_column(sa.Enum("a", "b", name="kind"), server_default="a")
    """
)


@pytest.mark.slow
def test_without_the_plugin_nothing_is_different(
    make_app: Callable[..., Any], bare_database_url: sa.URL
) -> None:
    """Autogenerate writes the same, be this library imported, registered elsewhere, or absent."""
    written = {}
    for kind, first in {
        "without": "",
        "imported": "import sbert_pg, sbert_pg.alembic, sbert_pg.alembic.compare",
        "registered elsewhere": "import sbert_pg.alembic; sbert_pg.alembic.register()",
    }.items():
        app = make_app(bare_database_url, kind.replace(" ", "_"), plugin=False)
        (app.root / "models.py").write_text(first + UNDISTURBED)
        made = app.process("revision", "--autogenerate", "-m", "things")
        assert made.returncode == 0, made.stderr
        (path,) = (app.root / "migrations" / "versions").glob("*.py")
        written[kind] = _without_random(path.read_text())
    assert written["without"] == written["imported"] == written["registered elsewhere"]
    assert "sbert" not in written["without"]


@pytest.mark.filterwarnings("ignore:Did not recognize type")
def test_embedding_columns_without_the_plugin(
    make_app: Callable[..., Any], bare_database_url: sa.URL
) -> None:
    """Embedding columns are vector columns to an environment that does not register the plugin."""
    with_plugin = make_app(bare_database_url, "with")
    without = make_app(bare_database_url, "without", plugin=False)
    for app in (with_plugin, without):
        app.models(models())
    with_plugin.step("all")
    # The same database, looked at by an environment without the plugin: nothing to complain of.
    without.empty_revision("nothing", "pass")
    without.execute("UPDATE alembic_version SET version_num = :v", v=_head(without))
    without.options("include_schemas=True,")
    # Left to itself it would drop what it does not know.
    said = without.check()
    assert "sbert_queue" in said
    assert "binding" in said
    without.env.write_text("from sbert_pg.alembic import include_name\n" + without.env.read_text())
    without.options("include_name=include_name,")
    assert without.check() == ""
    # And one that begins without it has migrations that run, given the import that Alembic leaves
    # to the author for every type that is not SQLAlchemy's.
    mako = without.root / "migrations" / "script.py.mako"
    mako.write_text(
        mako.read_text().replace(
            "import sqlalchemy as sa", "import sbert_pg\nimport sqlalchemy as sa"
        )
    )
    without.execute("DROP TABLE article")
    without.execute("SELECT sbert.prune_v1()")
    text = without.revision("by itself")
    assert "sa.Column('embedding', sbert_pg.Embedding('deterministic', 'title', " in text
    without.upgrade()
    assert without.check() == ""


def _head(app: Any) -> str:
    from alembic.script import ScriptDirectory

    return str(ScriptDirectory.from_config(app.config()).get_current_head())


@pytest.mark.slow
def test_several_databases(app: Any, databases: Any, tmp_path: Path) -> None:
    """The environment that ``alembic init -t multidb`` makes, of which one database has vectors."""
    second = databases.clone("bare")
    root = tmp_path / "multi"
    root.mkdir()
    config = Config(root / "alembic.ini", stdout=io.StringIO())
    command.init(config, str(root / "migrations"), template="multidb")
    env = root / "migrations" / "env.py"
    env.write_text(
        env.read_text()
        .replace(
            "target_metadata = {}",
            f"import runpy\nmodels = runpy.run_path({str(app.root / 'models.py')!r})\n"
            "target_metadata = {'first': models['Base'].metadata, "
            "'second': models['Other'].metadata}",
        )
        .replace("fileConfig(config.config_file_name)", "pass")
    )
    prepare_alembic(root / "migrations", write=True)
    ini = root / "alembic.ini"
    text = ini.read_text()
    text = re.sub(r"databases = .*", "databases = first, second", text)
    text = re.sub(r"\[engine1\]\nsqlalchemy.url = .*", f"[first]\nsqlalchemy.url = {app.url}", text)
    other = second.render_as_string(hide_password=False)
    text = re.sub(r"\[engine2\]\nsqlalchemy.url = .*", f"[second]\nsqlalchemy.url = {other}", text)
    ini.write_text(text.replace("%2F", "%%2F"))

    def config_() -> Config:
        made = Config(ini, stdout=io.StringIO())
        made.set_main_option("script_location", str(root / "migrations"))
        return made

    app.config = config_
    plain = """

class Other(DeclarativeBase):
    pass


class Note(Other):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
"""
    app.models(models(indexes="", columns="") + plain)
    app.step("tables")
    app.models(models() + plain)
    text = app.step("embedding")
    assert text.count("op.add_embedding_column(") == 1
    app.downgrade("-1")
    app.upgrade()
    assert app.check() == ""
    databases.drop(str(second.database))
