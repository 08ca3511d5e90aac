"""The pages of admin interfaces over a class with an embedding, asked for as a browser does."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from sbert_pg import create_all, embed_on_flush, embedding_column
from sbert_pg.orm import plain_attributes


class Base(DeclarativeBase):
    pass


class Article(Base):
    __tablename__ = "article"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    embedding = embedding_column("deterministic", source="title", nullable=True, dimensions=384)


class _Form(HTMLParser):
    """What a browser would send of the fields of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.fields: dict[str, str] = {}
        self._area: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        name = given.get("name")
        if tag == "input" and name and given.get("type") in (None, "text", "hidden", "number"):
            self.fields[name] = given.get("value") or ""
        if tag == "textarea" and name:
            self._area = name
            self.fields[name] = ""

    def handle_data(self, data: str) -> None:
        if self._area:
            self.fields[self._area] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "textarea":
            self._area = None


def sent_by_browser(page: str) -> dict[str, str]:
    """The fields of a page, without those of its search."""
    form = _Form()
    form.feed(page)
    return {k: v.removeprefix("\r\n") for k, v in form.fields.items() if k != "search"}


#: GET and POST of a path with a form; the text of the answer, after any redirect.
Ask = Callable[..., str]


def answered(response: Any) -> str:
    assert response.status_code == 200, response.text[-2000:]
    text: str = response.text
    return text


def sqladmin(engine: sa.Engine, sessions: Any) -> Ask:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from sqladmin import Admin, ModelView

    class ArticleView(ModelView, model=Article):
        column_list = "__all__"  # the vector too
        column_details_list = "__all__"
        form_columns = [name for name in plain_attributes(Article) if name != "id"]

    app = FastAPI()
    Admin(app, session_maker=sessions).add_view(ArticleView)
    client = TestClient(app)
    paths = {"list": "list", "detail": "details/1", "create": "create", "edit": "edit/1"}

    def ask(page: str, form: dict[str, str] | None = None) -> str:
        path = f"/admin/article/{paths[page]}"
        return answered(client.get(path) if form is None else client.post(path, data=form))

    return ask


def starlette_admin(engine: sa.Engine, sessions: Any) -> Ask:
    from starlette.applications import Starlette
    from starlette.testclient import TestClient
    from starlette_admin.contrib.sqla import Admin, ModelView

    app = Starlette()
    admin = Admin(engine)

    class ArticleView(ModelView):
        fields = plain_attributes(Article)

    admin.add_view(ArticleView(Article))
    admin.mount_to(app)
    client = TestClient(app)
    paths = {"list": "list", "detail": "detail?pk=1", "create": "create", "edit": "edit?pk=1"}

    def ask(page: str, form: dict[str, str] | None = None) -> str:
        path = f"/admin/article/{paths[page]}"
        if form is None:
            return answered(client.get(path))
        # It asks for a token that its page has set as a cookie.
        token = client.cookies.get("starlette_admin_csrftoken", "")
        return answered(client.post(path, data=form, headers={"X-CSRFToken": token}))

    return ask


def flask_admin(engine: sa.Engine, sessions: Any) -> Ask:
    from flask import Flask
    from flask_admin import Admin
    from flask_admin.contrib.sqla import ModelView

    class ArticleView(ModelView):
        can_view_details = True
        column_list = column_details_list = form_columns = plain_attributes(Article)[1:]

    app = Flask(__name__)
    app.config.update(SECRET_KEY="test", TESTING=True)
    Admin(app).add_view(ArticleView(Article, sessions()))
    client = app.test_client()
    paths = {"list": "", "detail": "details/?id=1", "create": "new/", "edit": "edit/?id=1"}

    def ask(page: str, form: dict[str, str] | None = None) -> str:
        path = f"/admin/article/{paths[page]}"
        sent = client.get(path) if form is None else client.post(path, data=form)
        assert sent.status_code in (200, 302), sent.text[-2000:]
        if form is not None:
            assert sent.status_code == 302, sent.text[-2000:]
        return sent.text

    return ask


@pytest.fixture(params=[sqladmin, starlette_admin, flask_admin])
def ask(request: pytest.FixtureRequest, engine: sa.Engine, fake_encoder: Any) -> Ask:
    pytest.importorskip(request.param.__name__)
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session:
        embed_on_flush(session)
        session.add(Article(id=1, title="first"))
        session.commit()
    with engine.begin() as connection:
        connection.execute(sa.text("SELECT setval('article_id_seq', 1)"))
    return request.param(engine, sessionmaker(engine))


def test_pages_and_forms(ask: Ask, engine: sa.Engine) -> None:
    assert "first" in ask("list")
    assert "first" in ask("detail")
    ask("create", sent_by_browser(ask("create")) | {"title": "made"})
    ask("edit", sent_by_browser(ask("edit")) | {"title": "edited"})
    with engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT id, title FROM article ORDER BY id")).all()
    assert rows == [(1, "edited"), (2, "made")]


def test_why_sqladmin_has_to_hear_of_columns(engine: sa.Engine) -> None:
    """What keeps an embedding out of its forms is its own, with columns of SQLAlchemy's alone."""
    module = pytest.importorskip("sqladmin")
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from sqlalchemy.orm.exc import DetachedInstanceError

    class Own(DeclarativeBase):
        pass

    class Deferred(Own):
        __tablename__ = "deferred"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str | None] = mapped_column(deferred=True)

    class Loaded(Own):
        __tablename__ = "loaded"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str | None]

    Own.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Deferred(id=1, text="a"), Loaded(id=1, text="a")])
        session.commit()
    app = FastAPI()
    admin = module.Admin(app, engine)
    for class_ in (Deferred, Loaded):
        admin.add_view(type("View", (module.ModelView,), {}, model=class_))
    client = TestClient(app)
    with pytest.raises(DetachedInstanceError):
        client.get("/admin/deferred/edit/1")
    answered(client.post("/admin/loaded/edit/1", data={"save": "Save"}))
    with Session(engine) as session:
        assert session.get_one(Loaded, 1).text is None, "it writes NULL for what was not sent"


def test_sqladmin_refuses_a_form_with_a_vector(engine: sa.Engine, fake_encoder: Any) -> None:
    """No page shows a vector in a field that a browser would send back."""
    module = pytest.importorskip("sqladmin")
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from sqladmin.exceptions import NoConverterFound

    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session:
        embed_on_flush(session)
        session.add(Article(id=1, title="first"))
        session.commit()
    view = type("View", (module.ModelView,), {}, model=Article)
    app = FastAPI()
    module.Admin(app, session_maker=sessionmaker(engine)).add_view(view)
    client = TestClient(app)
    for path in ("create", "edit/1"):
        for ask in (client.get, client.post):
            with pytest.raises(NoConverterFound, match="embedding"):
                ask(f"/admin/article/{path}")
