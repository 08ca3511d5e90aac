"""An application with an Alembic history of its own, for tests on a real server."""

from __future__ import annotations

import copy
import io
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from sbert_pg.cli.schema import prepare_alembic

#: What every models.py begins with.
PRELUDE = """
import enum
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sbert_pg import (
    EncoderSpec, HalfVector, Source, Vector, diskann_index, embedding_column, hnsw_index,
    indexes_per, ivfflat_index, vchordrq_index,
)

ENCODER = EncoderSpec(name="deterministic", dimensions=384)


class Base(DeclarativeBase):
    pass
"""


def command_head(config: Config) -> Any:
    script = ScriptDirectory.from_config(config)
    return script.get_revision(script.get_current_head())


class Application:
    """A directory with models.py and migrations, and a database."""

    def __init__(self, root: Path, url: sa.URL, *, plugin: bool = True) -> None:
        self.root = root
        self.url = url.render_as_string(hide_password=False)
        self.engine = sa.create_engine(url, poolclass=sa.NullPool)
        self.configure: dict[str, Any] = {}
        config = Config(root / "alembic.ini", stdout=io.StringIO())
        command.init(config, str(root / "migrations"))
        self.env = root / "migrations" / "env.py"
        text = self.env.read_text().replace(
            "target_metadata = None",
            "import runpy\n\n"
            f"models = runpy.run_path({str(root / 'models.py')!r})\n"
            "target_metadata = models['Base'].metadata\n",
        )
        self.env.write_text(text.replace("fileConfig(config.config_file_name)", "pass"))
        if plugin:
            prepare_alembic(root / "migrations", write=True)
        self.models("")

    def copied(self, root: Path, url: sa.URL) -> Application:
        """The same application in another directory, with a clone of its database."""
        shutil.copytree(self.root, root, ignore=shutil.ignore_patterns("__pycache__"))
        twin = copy.copy(self)
        twin.root, twin.env = root, root / "migrations" / "env.py"
        twin.env.write_text(twin.env.read_text().replace(str(self.root), str(root)))
        twin.url = url.render_as_string(hide_password=False)
        twin.engine = sa.create_engine(url, poolclass=sa.NullPool)
        return twin

    def models(self, text: str) -> None:
        """Write models.py."""
        (self.root / "models.py").write_text(PRELUDE + textwrap.dedent(text))

    def options(self, text: str) -> None:
        """Add arguments to the online context.configure()."""
        self.env.write_text(
            self.env.read_text().replace(
                "connection=connection,", f"connection=connection,\n            {text}"
            )
        )

    def config(self) -> Config:
        self.output = io.StringIO()
        config = Config(self.root / "alembic.ini", stdout=self.output, output_buffer=self.output)
        config.set_main_option("script_location", str(self.root / "migrations"))
        config.set_main_option("sqlalchemy.url", self.url.replace("%", "%%"))
        return config

    def revision(self, message: str = "change", **arguments: Any) -> str:
        """Autogenerate; returns what was written, revision after revision, without headers."""
        made = command.revision(self.config(), message, autogenerate=True, **arguments)
        scripts = made if isinstance(made, list) else [made]
        return "\n".join(Path(s.path).read_text() for s in scripts if s is not None)

    def empty_revision(self, message: str, upgrade: str, downgrade: str = "pass") -> None:
        """A revision written by hand."""
        script = command.revision(self.config(), message)
        path = Path(script.path)
        text = path.read_text()
        body = textwrap.indent(textwrap.dedent(upgrade), "    ")
        back = textwrap.indent(textwrap.dedent(downgrade), "    ")
        text = re.sub(r"def upgrade\(\).*", "", text, flags=re.DOTALL)
        text += f"def upgrade() -> None:\n{body}\n\n\ndef downgrade() -> None:\n{back}\n"
        path.write_text(text)

    def upgrade(self, revision: str = "head") -> None:
        command.upgrade(self.config(), revision)

    def downgrade(self, revision: str) -> None:
        command.downgrade(self.config(), revision)

    def undo(self) -> None:
        """Downgrade by one revision, and forget that it was ever written."""
        head = command_head(self.config())
        self.downgrade("-1")
        Path(head.path).unlink()

    def sql(self, revision: str = "head") -> str:
        command.upgrade(self.config(), revision, sql=True)
        return self.output.getvalue()

    def sql_down(self, revisions: str) -> str:
        command.downgrade(self.config(), revisions, sql=True)
        return self.output.getvalue()

    def check(self) -> str:
        """``alembic check``: an empty text where it is clean, else what it says."""
        try:
            command.check(self.config())
        except CommandError as error:
            return str(error)
        return ""

    def step(self, message: str = "change") -> str:
        """Autogenerate, upgrade, and find nothing left to do."""
        text = self.revision(message)
        self.upgrade()
        assert self.check() == ""
        return text

    def process(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The alembic command as a process, to its end."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"it did not end: {process.communicate()}") from None
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """The alembic command as a process that is under way."""
        ini = self.root / "alembic.ini"
        if not ini.exists() or "sqlalchemy.url = driver" in ini.read_text():
            ini.write_text(
                "[alembic]\nscript_location = %(here)s/migrations\n"
                f"sqlalchemy.url = {self.url.replace('%', '%%')}\n"
            )
        return subprocess.Popen(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(self.root), *sys.path])}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def execute(self, statement: str, **parameters: Any) -> Any:
        """Run a statement and commit; the first column of the rows it returns."""
        with self.engine.begin() as connection:
            result = connection.execute(sa.text(statement), parameters)
            return list(result.scalars()) if result.returns_rows else None

    def pending(
        self, column: str = "embedding", table: str = "article", where: str = "true"
    ) -> int:
        """Rows of a bound column that wait for their vector, by what they say themselves."""
        stale = self.scalar(
            "SELECT x.stale FROM sbert.binding b CROSS JOIN sbert.expressions_v1(b.id) x "
            "WHERE b.relation = CAST(:t AS regclass) AND b.column_name = :c",
            t=table,
            c=column,
        ).replace(":", r"\:")
        return int(self.scalar(f"SELECT count(*) FROM {table} WHERE {stale} AND {where}"))

    def scalar(self, statement: str, **parameters: Any) -> Any:
        return self.execute(statement, **parameters)[0]
