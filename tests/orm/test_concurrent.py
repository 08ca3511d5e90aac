"""Writers of the same rows at the same time, and random work, always with the same invariant."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker
from write_models import Article, Book, Item, Line, Page, pending, require_true_or_pending

from sbert_pg import embed_on_flush
from sbert_pg.errors import EncodingError


def test_each_writes_its_half_of_the_source(
    tables: sa.Engine, sessions: sessionmaker[Any], encoder: Any
) -> None:
    """Both load the row before either writes; the row says that its vector is of another text."""
    with sessions() as session:
        session.add(Page(id=1, title="t", body="b"))
        session.commit()
    one, two = sessions(), sessions()
    ours, theirs = one.get(Page, 1), two.get(Page, 1)
    ours.title = "title of one"
    one.flush()  # holds the row
    theirs.body = "body of two"
    waiting = threading.Thread(target=two.commit)
    waiting.start()
    waits = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND wait_event_type = 'Lock'"
    )
    with tables.connect().execution_options(isolation_level="AUTOCOMMIT") as watch:
        while not watch.scalar(waits):
            assert waiting.is_alive(), "it waits for the row"
    one.commit()
    waiting.join()
    one.close()
    two.close()
    assert pending(tables) == {("page.by_all", "1")}
    assert require_true_or_pending(tables, encoder, Page) == (1, 1)


def test_many_writers(tables: sa.Engine, sessions: sessionmaker[Any], encoder: Any) -> None:
    """Threads change halves of the same few rows in any order; none waits for ever."""
    with sessions() as session:
        session.add_all([Page(id=i, title="t", body="b") for i in range(6)])
        session.commit()
    errors: list[BaseException] = []

    def write(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for turn in range(12):
                with sessions() as session:
                    ids = rng.sample(range(6), 3)
                    pages = session.scalars(sa.select(Page).where(Page.id.in_(ids))).all()
                    for page in pages:
                        setattr(page, rng.choice(["title", "body"]), f"{seed} {turn}")
                    session.commit()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    right, waiting = require_true_or_pending(tables, encoder, Page)
    assert right + waiting == 12
    assert right >= 6, "what is made of one column is never another's"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_work(
    tables: sa.Engine, sessions: sessionmaker[Any], encoder: Any, seed: int
) -> None:
    """Any mixture of sessions, savepoints, rollbacks, statements and refusals keeps the promise."""
    work = _Work(random.Random(seed), encoder)
    for number in range(25):
        with sessions(autoflush=number % 2 == 0) as session:
            work.run(session)
    right, _ = require_true_or_pending(tables, encoder, Article, Page, Line, Item, Book)
    assert right > 20


def test_random_work_without_encoding(tables: sa.Engine, encoder: Any) -> None:
    """Half of the writers do not encode; what they leave is pending."""
    rng = random.Random(7)
    work = _Work(rng, encoder)
    for _ in range(20):
        with Session(tables) as session:
            if rng.random() < 0.5:
                embed_on_flush(session)
            work.run(session)
    right, waiting = require_true_or_pending(tables, encoder, Article, Page, Line, Item, Book)
    assert right > 0
    assert waiting > 0


class _Work:
    """Random changes to everything in ``write_models``."""

    classes: tuple[Any, ...] = (Article, Page, Line, Item, Book)
    texts = {
        Article: ("title",),
        Page: ("title", "body"),
        Line: ("heading", "note"),
        Item: ("title",),
        Book: ("title", "blurb", "note"),
    }

    def __init__(self, rng: random.Random, encoder: Any) -> None:
        self.rng = rng
        self.encoder = encoder
        self.number = 0

    def run(self, session: Session) -> None:
        for _ in range(self.rng.randint(1, 12)):
            try:
                self.rng.choice(self.steps)(self, session)
            except EncodingError:
                if self.rng.random() < 0.5:
                    session.rollback()
                else:
                    self._mend(session)
        for _ in range(20):
            try:
                session.commit()
                return
            except EncodingError:
                self._mend(session)
        session.rollback()

    def _mend(self, session: Session) -> None:
        with session.no_autoflush:
            for instance in [*session.new, *session.dirty]:
                for name in self.texts[type(instance)]:
                    if "refuse" in (vars(instance).get(name) or ""):
                        setattr(instance, name, self.text(refused=False))

    def text(self, name: str = "", refused: bool = True) -> str | None:
        if (
            name not in ("heading",)
            and self.rng.random() < 0.15
            and name in ("body", "note", "blurb")
        ):
            return None
        if refused and self.rng.random() < 0.04:
            return "refuse me"
        return self.rng.choice(["", "red", "blue", "green", "one two", "three"])

    def new(self, class_: Any) -> dict[str, Any]:
        self.number += 1
        row: dict[str, Any] = {name: self.text(name) for name in self.texts[class_]}
        if class_ is Line:
            row["number"] = self.number
        return row

    def add(self, session: Session) -> None:
        class_ = self.rng.choice(self.classes)
        session.add_all([class_(**self.new(class_)) for _ in range(self.rng.randint(1, 4))])

    def change(self, session: Session) -> None:
        class_ = self.rng.choice(self.classes)
        for instance in session.scalars(sa.select(class_)):
            if self.rng.random() < 0.3:
                name = self.rng.choice(self.texts[class_])
                if self.rng.random() < 0.3:
                    session.expire(instance)
                setattr(instance, name, self.text(name))

    def rename(self, session: Session) -> None:
        self.number += 1000
        for article in session.scalars(sa.select(Article).limit(1)):
            article.id = self.number
            article.title = self.text()

    def remove(self, session: Session) -> None:
        for instance in session.scalars(sa.select(self.rng.choice(self.classes)).limit(1)):
            session.delete(instance)

    def drop_vector(self, session: Session) -> None:
        for page in session.scalars(sa.select(Page).limit(2)):
            page.by_all = None

    def flush(self, session: Session) -> None:
        session.flush()

    def commit(self, session: Session) -> None:
        session.commit()

    def rollback(self, session: Session) -> None:
        session.rollback()

    def nested(self, session: Session) -> None:
        with session.begin_nested() as savepoint:
            self.change(session)
            self.add(session)
            session.flush()
            if self.rng.random() < 0.5:
                savepoint.rollback()

    def insert(self, session: Session) -> None:
        class_ = self.rng.choice([Article, Page, Line])
        session.execute(sa.insert(class_), [self.new(class_) for _ in range(3)])

    def update(self, session: Session) -> None:
        rows = []
        for key in session.scalars(sa.select(Page.id)):
            name = self.rng.choice(["title", "body"])
            rows.append({"id": key, name: self.text(name)})
        if rows:
            session.execute(sa.update(Page), rows)

    def plain(self, session: Session) -> None:
        session.execute(sa.update(Article).values(title=sa.func.concat(Article.title, "x")))

    steps = (add, add, change, change, rename, remove, drop_vector, flush, commit, rollback, nested,
             insert, update, plain)  # fmt: skip
