"""How many modules a write passes on its way; a path that grows is noticed here."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session
from ways import modules_of
from write_models import Article


def test_a_write_by_the_orm(session: Session, encoder: Any) -> None:
    for number in range(3):  # the encoder is compared with the column's, and that is committed
        session.add(Article(title=f"before {number}"))
        session.commit()
    session.add(Article(title="new"))
    inserting = modules_of(session.commit)
    assert len(inserting) <= 12, " ".join(sorted(inserting))
    session.scalars(sa.select(Article)).first().title = "changed"  # type: ignore[union-attr]
    updating = modules_of(session.commit)
    assert len(updating) <= 12, " ".join(sorted(updating))


def test_declaring_imports_no_alembic() -> None:
    """Nor an encoder's runtime, nor the command line's libraries."""
    code = (
        "import sys\n"
        "from sbert_pg import Embedding, embedding_column, embed_on_flush, nearest, load, refresh\n"
        "from sbert_pg import create_all, require_ready\n"
        "heavy = {'alembic', 'onnxruntime', 'tokenizers', 'rich', 'typer', 'sklearn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
