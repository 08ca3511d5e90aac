"""Flask-SQLAlchemy: declare on ``db.Model``, search with ``db.session``.

pip install 'sbert-pg[convert]' flask-sqlalchemy
export DATABASE_URL=postgresql+psycopg://localhost/shop
flask --app flask_search run
"""

import os

from flask import Flask, jsonify, request
from flask.typing import ResponseReturnValue
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg import create_all, embed_on_flush, embedding_column, hnsw_index, nearest


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)


class Ticket(db.Model):  # type: ignore[name-defined,misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    subject: Mapped[str]
    embedding = embedding_column("all-MiniLM-L6-v2", source="subject", nullable=True)

    __table_args__ = (hnsw_index("ticket_embedding", "embedding"),)


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    db.init_app(app)
    embed_on_flush(db.session)
    # A real application does this in a migration; Flask-Migrate's autogenerate writes it.
    with app.app_context(), db.engine.begin() as connection:
        create_all(connection, db.metadata)

    @app.post("/tickets")
    def create() -> ResponseReturnValue:
        ticket = Ticket(subject=request.get_json()["subject"])
        db.session.add(ticket)
        db.session.commit()
        return jsonify(id=ticket.id), 201

    @app.get("/search")
    def search() -> ResponseReturnValue:
        found = db.session.execute(nearest(Ticket.embedding, request.args["q"], limit=5))
        return jsonify([{"subject": t.subject, "similarity": s} for t, s in found])

    return app
