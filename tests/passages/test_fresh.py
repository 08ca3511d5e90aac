"""Passages belong to the text as it is, whoever changed it, and are encoded as seldom as can be."""

from __future__ import annotations

import subprocess
import sys
import threading

import psycopg
import pytest
import sqlalchemy as sa
from passage_documents import CHUNKER, Document, Passage, require_whole, text, work
from sqlalchemy.orm import Session

from sbert_pg.catalog import all_bindings, require_binding
from sbert_pg.errors import DeclarationError
from sbert_pg.freshness import audit, counts
from sbert_pg.testing import DeterministicEncoder


def stored(session: Session, document: int = 1) -> dict[int, tuple[int, str, bytes]]:
    """Place, digest and vector of the passages of a document, by their keys."""
    session.expire_all()
    found = session.scalars(sa.select(Passage).where(Passage.document_id == document))
    return {p.id: (p.ordinal, p.digest, p.embedding.tobytes()) for p in found}


def add(session: Session, *bodies: str | None, title: str | None = "Title") -> None:
    session.add_all([Document(title=title, body=body) for body in bodies])
    session.commit()


def test_an_edit_keeps_the_other_passages(session: Session, encoder: DeterministicEncoder) -> None:
    sentences = text(1, 60)
    add(session, " ".join(sentences))
    work(session.get_bind())
    before = stored(session)
    document = session.get_one(Document, 1)
    sentences[30] = (
        "Somebody wrote this sentence again, and it is longer now than it has been before."
    )
    document.body = " ".join(sentences)
    session.commit()
    encoder.encoded.clear()
    work(session.get_bind())
    after = stored(session)
    kept = before.keys() & after.keys()
    assert len(before) >= 12
    assert len(kept) >= len(before) - 3
    assert all(before[key][1:] == after[key][1:] for key in kept)
    # The whole document, and the passages that are new.
    assert len(encoder.encoded) == 1 + len(after.keys() - kept)
    require_whole(session.get_bind(), encoder)


def test_an_inserted_beginning_only_moves_passages(
    session: Session, encoder: DeterministicEncoder
) -> None:
    body = " ".join(text(1, 60))
    add(session, body)
    work(session.get_bind())
    before = stored(session)
    session.get_one(Document, 1).body = f"This is new. {body}"
    session.commit()
    work(session.get_bind())
    after = stored(session)
    assert len(before.keys() - after.keys()) <= 2
    require_whole(session.get_bind(), encoder)


def test_equal_paragraphs_in_one_document_and_in_two(
    session: Session, encoder: DeterministicEncoder
) -> None:
    section = "# Same\n\n" + " ".join(text(1, 3)) + "\n\n"
    add(session, section * 4, section * 2, section * 4)
    encoder.encoded.clear()
    work(session.get_bind())
    assert len(encoder.encoded) == 3  # two whole texts and one passage
    require_whole(session.get_bind(), encoder)
    keys = stored(session, 1).keys()
    session.get_one(Document, 1).body = section * 3
    session.commit()
    work(session.get_bind())
    assert len(keys & stored(session, 1).keys()) == 3
    require_whole(session.get_bind(), encoder)


def test_documents_that_swap_texts_keys_and_titles(
    session: Session, plain: psycopg.Connection, encoder: DeterministicEncoder
) -> None:
    add(session, " ".join(text(1)), " ".join(text(2)))
    engine = session.get_bind()
    work(engine)
    plain.execute(
        "UPDATE document SET body = (SELECT d.body FROM document d WHERE d.id <> document.id)"
    )
    work(engine)
    require_whole(engine, encoder)
    before = stored(session, 1)
    plain.execute("UPDATE document SET id = id + 10")
    session.expire_all()
    assert stored(session, 11) == before
    work(engine)
    require_whole(engine, encoder)
    plain.execute("UPDATE document SET title = 'Another' WHERE id = 11")
    work(engine)
    assert not before.keys() & stored(session, 11).keys()
    require_whole(engine, encoder)


def test_a_text_that_changes_back_is_not_cut_again(
    session: Session, plain: psycopg.Connection, encoder: DeterministicEncoder
) -> None:
    add(session, " ".join(text(1)))
    work(session.get_bind())
    encoder.encoded.clear()
    plain.execute("UPDATE document SET body = body || ' More.'")
    plain.execute("UPDATE document SET body = left(body, -6)")
    work(session.get_bind())
    assert encoder.encoded == []


@pytest.mark.parametrize(("title", "body", "number"), [
    (None, None, 0), ("Title", None, 1), ("Title", "", 1), (None, "", 1), (None, " \n ", 1),
    ("Title", "One sentence.", 1),
])  # fmt: skip
def test_little_text(
    session: Session,
    encoder: DeterministicEncoder,
    title: str | None,
    body: str | None,
    number: int,
) -> None:
    add(session, body, title=title)
    work(session.get_bind())
    assert len(stored(session)) == number
    require_whole(session.get_bind(), encoder)
    for binding in all_bindings(session.connection()):
        assert audit(session.get_bind(), binding, encoder, sample=None).wrong == 0, binding


def test_a_text_that_goes_takes_its_passages(session: Session, plain: psycopg.Connection) -> None:
    add(session, " ".join(text(1)), " ".join(text(2)), title=None)
    work(session.get_bind())
    plain.execute("UPDATE document SET body = NULL WHERE id = 1")
    plain.execute("DELETE FROM document WHERE id = 2")
    work(session.get_bind())
    assert session.scalar(sa.select(sa.func.count()).select_from(Passage)) == 0


def test_nobody_but_who_cuts_makes_a_document_fresh(
    session: Session, plain: psycopg.Connection, encoder: DeterministicEncoder
) -> None:
    """Neither a vector that comes with its text, nor a proof that SQL asks for."""
    vector = encoder.encode_document(["Title\n\nA body."])[0]
    session.execute(
        sa.insert(Document.__table__),
        [{"title": "Title", "body": "A body.", "passages_embedding": vector}],
    )
    session.commit()
    binding = require_binding(session.connection(), Document.__table__.c.passages_embedding)
    assert counts(session.connection(), binding).pending == 1
    session.rollback()
    work(session.get_bind())
    plain.execute("UPDATE document SET body = 'Another body.'")
    plain.execute(
        "UPDATE document SET passages_embedding_of = sbert.proof_v1('document', "
        "'passages_embedding', (SELECT fingerprint FROM sbert.encoder), "
        "E'Title\n\nAnother body.', passages_embedding)"
    )
    assert counts(session.connection(), binding).pending == 1
    session.rollback()
    work(session.get_bind())
    require_whole(session.get_bind(), encoder)


def test_a_document_that_changed_meanwhile_is_noticed(
    session: Session, plain: psycopg.Connection
) -> None:
    add(session, " ".join(text(1)))
    work(session.get_bind())
    plain.execute("UPDATE document SET body = 'x' || body")
    session.expire_all()
    passages = session.get_one(Document, 1).passages
    assert [p.text for p in passages] == [None] * len(passages)
    assert passages[0].highlight("topic7") is None
    [(shown,)] = plain.execute(
        "SELECT x.text FROM sbert.binding b, sbert.expressions_v1(b.id) x "
        "WHERE b.relation = 'document_passage'::regclass"
    ).fetchall()
    assert plain.execute(f"SELECT count({shown}) FROM document_passage").fetchone() == (0,)


def test_a_refused_text_fails_and_leaves_no_passages_of_the_old_one(
    session: Session, documents: sa.Engine
) -> None:
    add(session, " ".join(text(1)), " ".join(text(2)))
    work(documents)
    from sbert_pg import WorkerSettings, use_encoder
    from sbert_pg.freshness import Worker

    use_encoder(DeterministicEncoder(dimensions=32, refuse="poison"))
    session.get_one(Document, 1).body = "This is poison."
    session.commit()
    Worker(documents, WorkerSettings(max_attempts=1, columns=("document.passages_embedding",))).run(
        until_empty=True
    )
    assert len(stored(session, 1)) == 0
    assert len(stored(session, 2)) > 5


def test_a_passage_without_a_vector_is_pending_itself(
    session: Session, plain: psycopg.Connection, encoder: DeterministicEncoder
) -> None:
    add(session, " ".join(text(1)))
    work(session.get_bind())
    plain.execute("UPDATE document_passage SET embedding = NULL WHERE ordinal = 1")
    encoder.encoded.clear()
    work(session.get_bind())
    assert len(encoder.encoded) == 1
    require_whole(session.get_bind(), encoder)


def test_readers_see_one_text_or_the_other(session: Session, documents: sa.Engine) -> None:
    """While documents are cut again and again, no snapshot mixes two cuts."""
    bodies = [" ".join(text(1, 40)), " ".join(text(2, 40))]
    add(session, bodies[0])
    work(documents)
    stop = threading.Event()
    seen: list[str] = []

    def read() -> None:
        with Session(documents) as reader:
            while not stop.is_set():
                digests = reader.scalars(
                    sa.select(Passage.heading).where(Passage.document_id == 1).distinct()
                ).all()
                seen.append(",".join(sorted(digests)))
                reader.rollback()

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(6):
        document = session.get_one(Document, 1)
        document.title, document.body = f"T{number}", bodies[number % 2]
        session.commit()
        work(documents)
    stop.set()
    thread.join()
    assert seen
    assert all(one and "," not in one for one in seen)


def test_the_audit_finds_passages_that_somebody_changed(
    session: Session, plain: psycopg.Connection, encoder: DeterministicEncoder
) -> None:
    add(session, " ".join(text(1)), " ".join(text(2)))
    work(session.get_bind())
    column = Document.__table__.c.passages_embedding
    binding = require_binding(session.connection(), column)
    session.rollback()
    assert audit(session.get_bind(), binding, encoder, sample=None).wrong == 0
    plain.execute("DELETE FROM document_passage WHERE document_id = 1 AND ordinal = 2")
    found = audit(session.get_bind(), binding, encoder, sample=None, requeue=True)
    assert (found.stale, found.requeued) == (1, 1)
    work(session.get_bind())
    require_whole(session.get_bind(), encoder)


def test_a_killed_worker_leaves_documents_whole_or_pending(
    session: Session, documents: sa.Engine, encoder: DeterministicEncoder
) -> None:
    add(session, *(" ".join(text(n, 60)) for n in range(20)))
    script = (
        "import os, sys, threading, sqlalchemy as sa\n"
        "from sbert_pg import use_encoder, WorkerSettings\n"
        "from sbert_pg.freshness import Worker\n"
        "from sbert_pg.testing import DeterministicEncoder\n"
        "from sbert_pg.freshness.passages import StoredPassages\n"
        "use_encoder(DeterministicEncoder(dimensions=32))\n"
        "exchange, calls = StoredPassages.exchange, []\n"
        "def killed(*arguments):\n"
        "    exchange(*arguments)\n"
        "    calls.append(1)\n"
        "    if len(calls) == 5: os.kill(os.getpid(), 9)\n"
        "StoredPassages.exchange = killed\n"
        "settings = WorkerSettings(batch_size=4)\n"
        "Worker(sa.create_engine(sys.argv[1]), settings).run(until_empty=True)\n"
    )
    url = documents.url.render_as_string(hide_password=False)
    done = subprocess.run([sys.executable, "-c", script, url], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    cut_already = session.scalar(sa.select(sa.func.count(Passage.document_id.distinct())))
    session.rollback()
    assert cut_already == 4
    with documents.begin() as connection:
        connection.execute(sa.text("DELETE FROM sbert.claim"))
    work(documents)
    require_whole(documents, encoder)


def test_chunkers_are_part_of_the_identity(session: Session) -> None:
    from sbert_pg import Source, bind
    from sbert_pg.errors import AlreadyBoundError

    column = Document.__table__.c.passages_embedding
    data = column.type.source.to_json()
    data["passages"]["chunker"]["most"] = 61
    with pytest.raises(AlreadyBoundError):
        bind(session.connection(), column, source=Source.from_json(data))


def test_an_unknown_chunker_blocks_its_column_alone(session: Session, documents: sa.Engine) -> None:
    from sbert_pg.passages.cutting import chunker_of

    with pytest.raises(DeclarationError, match="use_chunker"):
        chunker_of({"kind": "named", "name": "mine"})
    assert chunker_of(CHUNKER.identity) == CHUNKER
