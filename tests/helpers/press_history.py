"""The history of an application that is some years old, for tests: a publisher's database.

Enum types (one grew a value), several schemas, server defaults, a naming convention, check
constraints, generated columns, partial and functional indexes, data migrations, a branch that was
merged, names of its own where somebody was in a hurry.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

#: Slug, upgrade, downgrade. A slug with a plus sign grows on a branch from the revision before the
#: previous one; the next one without it merges both.
REVISIONS: list[tuple[str, str, str]] = [
    (
        "schemas",
        """
        for name in ("content", "crm", "audit"):
            op.execute(f"CREATE SCHEMA {name}")
        """,
        """
        for name in ("content", "crm", "audit"):
            op.execute(f"DROP SCHEMA {name}")
        """,
    ),
    (
        "account",
        """
        op.create_table(
            "account",
            sa.Column("id", sa.Integer(), sa.Identity(), nullable=False),
            sa.Column("email", sa.String(length=254), nullable=False),
            sa.PrimaryKeyConstraint("id", name=op.f("pk_account")),
            schema="crm",
        )
        """,
        'op.drop_table("account", schema="crm")',
    ),
    (
        "account_email_unique",
        'op.create_unique_constraint(op.f("uq_account_email"), "account", ["email"], schema="crm")',
        'op.drop_constraint(op.f("uq_account_email"), "account", schema="crm")',
    ),
    (
        "account_created_at",
        """
        op.add_column(
            "account",
            sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(),
                      nullable=False),
            schema="crm",
        )
        """,
        'op.drop_column("account", "created_at", schema="crm")',
    ),
    (
        "account_role",
        """
        role = postgresql.ENUM("reader", "author", "admin", name="role", schema="crm")
        role.create(op.get_bind())
        op.add_column(
            "account",
            sa.Column("role", postgresql.ENUM(name="role", schema="crm", create_type=False),
                      server_default="reader", nullable=False),
            schema="crm",
        )
        """,
        """
        op.drop_column("account", "role", schema="crm")
        op.execute("DROP TYPE crm.role")
        """,
    ),
    (
        "account_email_check",
        """
        op.create_check_constraint(
            op.f("ck_account_email_has_at"), "account", "position('@' in email) > 1", schema="crm"
        )
        """,
        'op.drop_constraint(op.f("ck_account_email_has_at"), "account", schema="crm")',
    ),
    (
        "category",
        """
        op.create_table(
            "category",
            sa.Column("id", sa.Integer(), nullable=False),
            sa.Column("slug", sa.String(length=60), nullable=False),
            sa.Column("label", sa.String(), nullable=False),
            sa.PrimaryKeyConstraint("id", name=op.f("pk_category")),
            sa.UniqueConstraint("slug", name=op.f("uq_category_slug")),
        )
        """,
        'op.drop_table("category")',
    ),
    (
        "category_seed",
        """
        op.execute(
            "INSERT INTO category (slug, label) VALUES ('news', 'News'), ('food', 'Food'), "
            "('100%-sport', 'Sport')"
        )
        """,
        'op.execute("DELETE FROM category")',
    ),
    (
        "category_position",
        """
        op.add_column(
            "category",
            sa.Column("position", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        )
        op.create_check_constraint(op.f("ck_category_position_sign"), "category", "position >= 0")
        """,
        'op.drop_column("category", "position")',
    ),
    (
        "category_parent",
        """
        op.add_column("category", sa.Column("parent_id", sa.Integer(), nullable=True))
        op.create_foreign_key(
            op.f("fk_category_parent_id_category"), "category", "category", ["parent_id"], ["id"],
            ondelete="SET NULL",
        )
        """,
        'op.drop_column("category", "parent_id")',
    ),
    (
        "author",
        """
        op.create_table(
            "author",
            sa.Column("id", sa.Integer(), sa.Identity(), nullable=False),
            sa.Column("account_id", sa.Integer(), nullable=False),
            sa.Column("pen_name", sa.String(length=80), nullable=False),
            sa.ForeignKeyConstraint(["account_id"], ["crm.account.id"],
                                    name=op.f("fk_author_account_id_account")),
            sa.PrimaryKeyConstraint("id", name=op.f("pk_author")),
            schema="content",
        )
        """,
        'op.drop_table("author", schema="content")',
    ),
    (
        "author_longer_names",
        """
        op.alter_column("author", "pen_name", type_=sa.String(length=120), schema="content")
        """,
        'op.alter_column("author", "pen_name", type_=sa.String(length=80), schema="content")',
    ),
    (
        "author_bio",
        """
        op.add_column("author", sa.Column("about", sa.Text(), nullable=True), schema="content")
        """,
        'op.drop_column("author", "about", schema="content")',
    ),
    (
        "author_about_is_bio",
        'op.alter_column("author", "about", new_column_name="bio", schema="content")',
        'op.alter_column("author", "bio", new_column_name="about", schema="content")',
    ),
    (
        "story",
        """
        op.create_table(
            "story",
            sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
            sa.Column("author_id", sa.Integer(), nullable=False),
            sa.Column("headline", sa.String(length=200), nullable=False),
            sa.Column("body", sa.Text(), nullable=True),
            sa.ForeignKeyConstraint(["author_id"], ["content.author.id"],
                                    name="story_author_fkey"),
            sa.PrimaryKeyConstraint("id", name="story_pkey"),
            schema="content",
        )
        """,
        'op.drop_table("story", schema="content")',
    ),
    (
        "story_is_article",
        """
        op.rename_table("story", "article", schema="content")
        for old, new in (("story_pkey", "pk_article"), ("story_author_fkey",
                                                        "fk_article_author_id_author")):
            op.execute(f"ALTER TABLE content.article RENAME CONSTRAINT {old} TO {new}")
        """,
        """
        for old, new in (("story_pkey", "pk_article"), ("story_author_fkey",
                                                        "fk_article_author_id_author")):
            op.execute(f"ALTER TABLE content.article RENAME CONSTRAINT {new} TO {old}")
        op.rename_table("article", "story", schema="content")
        """,
    ),
    (
        "article_title",
        'op.alter_column("article", "headline", new_column_name="title", schema="content")',
        'op.alter_column("article", "title", new_column_name="headline", schema="content")',
    ),
    (
        "article_status",
        """
        status = postgresql.ENUM("draft", "published", name="article_status", schema="content")
        status.create(op.get_bind())
        op.add_column(
            "article",
            sa.Column("status",
                      postgresql.ENUM(name="article_status", schema="content", create_type=False),
                      server_default="draft", nullable=False),
            schema="content",
        )
        """,
        """
        op.drop_column("article", "status", schema="content")
        op.execute("DROP TYPE content.article_status")
        """,
    ),
    (
        "article_status_archived",
        """
        with op.get_context().autocommit_block():
            op.execute("ALTER TYPE content.article_status ADD VALUE IF NOT EXISTS 'archived'")
        """,
        "pass",
    ),
    (
        "article_published_at",
        """
        op.add_column(
            "article", sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
            schema="content",
        )
        op.create_check_constraint(
            op.f("ck_article_published_has_date"), "article",
            "status <> 'published' OR published_at IS NOT NULL", schema="content",
        )
        """,
        'op.drop_column("article", "published_at", schema="content")',
    ),
    (
        "article_price",
        """
        op.add_column(
            "article",
            sa.Column("price", sa.Numeric(precision=10, scale=2), server_default="0.00",
                      nullable=False),
            schema="content",
        )
        op.create_check_constraint(
            op.f("ck_article_price_sign"), "article", "price >= 0", schema="content"
        )
        """,
        'op.drop_column("article", "price", schema="content")',
    ),
    (
        "article_category",
        """
        op.add_column("article", sa.Column("category_id", sa.Integer(), nullable=True),
                      schema="content")
        op.create_foreign_key(
            op.f("fk_article_category_id_category"), "article", "category", ["category_id"], ["id"],
            source_schema="content",
        )
        op.create_index(op.f("ix_content_article_category_id"), "article", ["category_id"],
                        schema="content")
        """,
        'op.drop_column("article", "category_id", schema="content")',
    ),
    (
        "article_tags",
        """
        op.add_column(
            "article",
            sa.Column("tags", postgresql.ARRAY(sa.Text()), server_default="{}", nullable=False),
            schema="content",
        )
        op.create_index("article_tags_gin", "article", ["tags"], schema="content",
                        postgresql_using="gin")
        """,
        'op.drop_column("article", "tags", schema="content")',
    ),
    (
        "article_meta",
        """
        op.add_column(
            "article",
            sa.Column("meta", postgresql.JSONB(), server_default=sa.text("'{}'::jsonb"),
                      nullable=False),
            schema="content",
        )
        """,
        'op.drop_column("article", "meta", schema="content")',
    ),
    (
        "article_title_lower",
        """
        op.create_index("article_title_lower", "article", [sa.text("lower(title)")],
                        schema="content")
        """,
        'op.drop_index("article_title_lower", "article", schema="content")',
    ),
    (
        "article_published_index",
        """
        op.create_index("article_published", "article", ["published_at"], schema="content",
                        postgresql_where=sa.text("status = 'published'"))
        """,
        'op.drop_index("article_published", "article", schema="content")',
    ),
    (
        "comment",
        """
        op.create_table(
            "comment",
            sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"),
                      nullable=False),
            sa.Column("article_id", sa.BigInteger(), nullable=False),
            sa.Column("body", sa.Text(), server_default="", nullable=False),
            sa.ForeignKeyConstraint(["article_id"], ["content.article.id"], ondelete="CASCADE",
                                    name=op.f("fk_comment_article_id_article")),
            sa.PrimaryKeyConstraint("id", name=op.f("pk_comment")),
            schema="content",
        )
        """,
        'op.drop_table("comment", schema="content")',
    ),
    (
        "event+",
        """
        op.create_table(
            "event",
            sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
            sa.Column("at", sa.DateTime(), server_default=sa.text("now()"), nullable=False),
            sa.Column("kind", sa.Enum("created", "changed", "removed", name="event_kind",
                                      schema="audit"), nullable=False),
            sa.Column("payload", postgresql.JSONB(), nullable=True),
            sa.PrimaryKeyConstraint("id", name=op.f("pk_event")),
            schema="audit",
        )
        """,
        """
        op.drop_table("event", schema="audit")
        op.execute("DROP TYPE audit.event_kind")
        """,
    ),
    ("merge", "pass", "pass"),
    (
        "article_touch",
        '''
        op.execute(
            """
            CREATE FUNCTION content.touch() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN NEW.meta := NEW.meta || '{"touched": true}'; RETURN NEW; END $$
            """
        )
        op.execute(
            "CREATE TRIGGER touch BEFORE UPDATE OF title ON content.article FOR EACH ROW "
            "EXECUTE FUNCTION content.touch()"
        )
        ''',
        'op.execute("DROP FUNCTION content.touch CASCADE")',
    ),
    (
        "article_length",
        """
        op.add_column(
            "article",
            sa.Column("length", sa.Integer(),
                      sa.Computed("char_length(coalesce(body, ''))", persisted=True)),
            schema="content",
        )
        """,
        'op.drop_column("article", "length", schema="content")',
    ),
    (
        "people_and_articles",
        """
        op.execute(
            "INSERT INTO crm.account (email, role) SELECT 'writer' || i || '@example.org', "
            "'author' FROM generate_series(1, 5) i"
        )
        op.execute(
            "INSERT INTO content.author (account_id, pen_name) SELECT id, 'Writer ' || id "
            "FROM crm.account"
        )
        op.execute(
            "INSERT INTO content.article (author_id, category_id, title, body, status, "
            "published_at) SELECT (SELECT min(id) + i % 5 FROM content.author), "
            "(SELECT min(id) + i % 3 FROM category), 'Article ' || i, "
            "CASE WHEN i % 7 > 0 THEN 'What happened on day ' || i END, 'published', now() "
            "FROM generate_series(1, 60) i"
        )
        op.execute(
            "INSERT INTO content.comment (article_id, body) SELECT id, 'Well said' "
            "FROM content.article"
        )
        """,
        """
        op.execute("DELETE FROM content.article")
        op.execute("DELETE FROM content.author")
        op.execute("DELETE FROM crm.account")
        """,
    ),
    (
        "article_author_title_unique",
        """
        op.create_unique_constraint(
            op.f("uq_article_author_id_title"), "article", ["author_id", "title"],
            schema="content",
        )
        """,
        'op.drop_constraint(op.f("uq_article_author_id_title"), "article", schema="content")',
    ),
    (
        "account_role_view",
        """
        op.execute(
            "CREATE VIEW crm.author_account AS SELECT id, email FROM crm.account "
            "WHERE role = 'author'"
        )
        """,
        'op.execute("DROP VIEW crm.author_account")',
    ),
]

#: What the classes look like at the end of that history. ``{indexes}`` and ``{columns}`` are the
#: places for what the tests add to an article.
MODELS = """
from sqlalchemy.dialects.postgresql import ARRAY, ENUM, JSONB


class Base(DeclarativeBase):
    metadata = sa.MetaData(naming_convention={{
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }})


class Status(enum.Enum):
    draft = "draft"
    published = "published"
    archived = "archived"


class Account(Base):
    __tablename__ = "account"
    __table_args__ = (
        sa.CheckConstraint("position('@' in email) > 1", name="email_has_at"),
        {{"schema": "crm"}},
    )
    id: Mapped[int] = mapped_column(sa.Identity(), primary_key=True)
    email: Mapped[str] = mapped_column(sa.String(254), unique=True)
    created_at = mapped_column(
        sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False
    )
    role = mapped_column(
        sa.Enum("reader", "author", "admin", name="role", schema="crm"),
        server_default="reader", nullable=False,
    )


class Category(Base):
    __tablename__ = "category"
    __table_args__ = (sa.CheckConstraint("position >= 0", name="position_sign"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    slug: Mapped[str] = mapped_column(sa.String(60), unique=True)
    label: Mapped[str]
    position = mapped_column(sa.SmallInteger, server_default=sa.text("0"), nullable=False)
    parent_id = mapped_column(sa.ForeignKey("category.id", ondelete="SET NULL"))


class Author(Base):
    __tablename__ = "author"
    __table_args__ = {{"schema": "content"}}
    id: Mapped[int] = mapped_column(sa.Identity(), primary_key=True)
    account_id: Mapped[int] = mapped_column(sa.ForeignKey("crm.account.id"))
    pen_name: Mapped[str] = mapped_column(sa.String(120))
    bio: Mapped[str | None] = mapped_column(sa.Text)


class Article(Base):
    __tablename__ = "article"
    __table_args__ = (
        sa.UniqueConstraint("author_id", "title"),
        sa.CheckConstraint(
            "status <> 'published' OR published_at IS NOT NULL", name="published_has_date"
        ),
        sa.CheckConstraint("price >= 0", name="price_sign"),
        sa.Index("article_tags_gin", "tags", postgresql_using="gin"),
        sa.Index("article_title_lower", sa.text("lower(title)")),
        sa.Index("article_published", "published_at",
                 postgresql_where=sa.text("status = 'published'")),
        {indexes}
        {{"schema": "content"}},
    )
    id: Mapped[int] = mapped_column(
        sa.BigInteger, sa.Identity(always=True), primary_key=True
    )
    author_id: Mapped[int] = mapped_column(sa.ForeignKey("content.author.id"))
    category_id = mapped_column(sa.ForeignKey("category.id"), index=True)
    title: Mapped[str] = mapped_column(sa.String(200))
    body: Mapped[str | None] = mapped_column(sa.Text)
    status = mapped_column(
        sa.Enum(Status, name="article_status", schema="content"),
        server_default="draft", nullable=False,
    )
    published_at = mapped_column(sa.DateTime(timezone=True))
    price = mapped_column(sa.Numeric(10, 2), server_default="0.00", nullable=False)
    tags = mapped_column(ARRAY(sa.Text), server_default="{{}}", nullable=False)
    meta = mapped_column(JSONB, server_default=sa.text("'{{}}'::jsonb"), nullable=False)
    length = mapped_column(
        sa.Integer, sa.Computed("char_length(coalesce(body, ''))", persisted=True)
    )
    {columns}


class Comment(Base):
    __tablename__ = "comment"
    __table_args__ = {{"schema": "content"}}
    id = mapped_column(sa.Uuid, primary_key=True, server_default=sa.text("gen_random_uuid()"))
    article_id: Mapped[int] = mapped_column(
        sa.ForeignKey("content.article.id", ondelete="CASCADE")
    )
    body = mapped_column(sa.Text, server_default="", nullable=False)


class Event(Base):
    __tablename__ = "event"
    __table_args__ = {{"schema": "audit"}}
    id: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(), primary_key=True)
    at = mapped_column(sa.DateTime, server_default=sa.text("now()"), nullable=False)
    kind = mapped_column(
        sa.Enum("created", "changed", "removed", name="event_kind", schema="audit"), nullable=False
    )
    payload = mapped_column(JSONB)
"""

_FILE = '''"""{slug}"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = {revision!r}
down_revision = {down!r}
branch_labels = None
depends_on = None


def upgrade():
{upgrade}


def downgrade():
{downgrade}
'''


def models(indexes: str = "", columns: str = "") -> str:
    """The application's classes, with what is to be added to an article."""
    return MODELS.format(indexes=indexes, columns=columns)


def write_history(versions: Path) -> list[str]:
    """Write the revisions into a directory; returns their identifiers, the last one being the head.

    Args:
        versions: the directory of an Alembic environment.
    """
    made: list[str] = []
    merged: tuple[str, str] | None = None
    for number, (slug, upgrade, downgrade) in enumerate(REVISIONS):
        revision = f"{number:04d}"
        down: str | tuple[str, str] | None = merged or (made[-1] if made else None)
        merged = None
        if slug.endswith("+"):
            # Two people began from the same revision.
            down, merged = made[-2], (made[-1], revision)
        text = _FILE.format(
            slug=slug.strip("+"),
            revision=revision,
            down=down,
            upgrade=_body(upgrade),
            downgrade=_body(downgrade),
        )
        (versions / f"{revision}_{slug.strip('+')}.py").write_text(text)
        made.append(revision)
    return made


def _body(text: str) -> str:
    return textwrap.indent(textwrap.dedent(text.strip("\n")), "    ").rstrip()
