"""What clusters are about: keywords by class-based TF-IDF, and names given by users."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, cast

import sqlalchemy as sa

from sbert_pg.clustering.declaration import Clustering
from sbert_pg.clustering.extras import need
from sbert_pg.errors import ClusteringError

StopWords = Literal["english"] | Collection[str]

#: Keywords kept for each cluster.
KEYWORDS = 10
#: Keywords that make the label of a cluster that nobody has named.
_LABEL_WORDS = 3
#: Texts fetched at a time.
_FETCH = 5_000
# Two characters at least, as scikit-learn's CountVectorizer; a word begins with a letter.
_WORD = re.compile(r"\b[^\W\d_]\w+\b")


def class_tfidf(
    counts: Mapping[int, Mapping[str, int]], number: int = KEYWORDS
) -> dict[int, list[str]]:
    """The words that tell each class from the others, best first.

    A word of a class weighs ``tf * log(1 + A / f)``: ``tf`` its share of the class's words, ``f``
    its frequency in all classes, ``A`` the mean number of words in a class (class-based TF-IDF,
    Grootendorst 2022, "BERTopic").

    Args:
        counts: for each class the frequency of its words.
        number: words for each class, at most.
    """
    everywhere: Counter[str] = Counter()
    sizes: dict[int, int] = {}
    for cluster, words in counts.items():
        everywhere.update(words)
        sizes[cluster] = sum(words.values())
    mean = sum(sizes.values()) / max(len(sizes), 1)
    found: dict[int, list[str]] = {}
    for cluster, words in counts.items():
        weights = {
            word: count / sizes[cluster] * math.log1p(mean / everywhere[word])
            for word, count in words.items()
        }
        found[cluster] = sorted(weights, key=lambda word: (-weights[word], word))[:number]
    return found


def count_words(
    texts: Iterable[tuple[int, str | None]], stop_words: StopWords = "english"
) -> dict[int, Counter[str]]:
    """Frequencies of the words of each class, in lower case, without stop words.

    Args:
        texts: a class and a text, in any order.
        stop_words: words to leave out; ``"english"`` is scikit-learn's list.
    """
    stop: Collection[str] = (
        need("sklearn.feature_extraction.text", "find keywords").ENGLISH_STOP_WORDS
        if stop_words == "english"
        else frozenset(stop_words)
    )
    counts: dict[int, Counter[str]] = {}
    for cluster, text in texts:
        words = [word for word in _WORD.findall((text or "").lower()) if word not in stop]
        counts.setdefault(cluster, Counter()).update(words)
    return counts


def find_keywords(
    connection: sa.Connection,
    clustering: Clustering,
    run_id: int,
    *,
    text: sa.ColumnElement[str] | None = None,
    stop_words: StopWords = "english",
) -> None:
    """Find keywords of the clusters of a run, and label those that nobody has named by them.

    The texts are read in blocks; what is kept is the frequency of each word in each cluster.

    Args:
        connection: a connection in a transaction.
        clustering: what is clustered.
        run_id: the run.
        text: the text of a row; the source of an embedding column by default.
        stop_words: words to leave out, ``"english"`` or a collection.

    Raises:
        ClusteringError: the column has no source, and no text is given.
        MissingExtraError: the English stop words come with scikit-learn, which is not installed.
    """
    if text is None:
        if clustering.source is None:
            raise ClusteringError(
                f"{clustering.column} is a plain vector column, so nothing says what its texts "
                "are. Give text=, as in text=Article.title."
            )
        text = clustering.source.expression(clustering.rows)
    assignment, cluster = clustering.assignment_table, clustering.cluster_table
    statement = (
        sa.select(assignment.c.cluster_id, text)
        .join_from(assignment, clustering.rows, clustering.row_is_assigned())
        .where(assignment.c.run_id == run_id, assignment.c.cluster_id.is_not(None))
        .execution_options(yield_per=_FETCH)
    )
    rows = connection.execute(statement)
    counts = count_words(((row[0], row[1]) for row in rows), stop_words)
    values: list[dict[str, Any]] = [
        {"this": cluster_id, "words": words, "name": ", ".join(words[:_LABEL_WORDS]) or None}
        for cluster_id, words in class_tfidf(counts).items()
    ]
    if values:
        connection.execute(
            sa.update(cluster)
            .where(cluster.c.id == sa.bindparam("this"))
            .values(
                keywords=sa.bindparam("words", type_=cluster.c.keywords.type),
                label=sa.case((cluster.c.is_named, cluster.c.label), else_=sa.bindparam("name")),
            ),
            values,
        )


def name_cluster(
    connection: sa.Connection, clustering: Clustering, number: int, name: str | None
) -> None:
    """Name a current cluster; later runs keep the name where the cluster matches.

    Args:
        connection: a connection in a transaction.
        clustering: what is clustered.
        number: the cluster's number.
        name: its name, or ``None`` to go back to its keywords.

    Raises:
        ClusteringError: there is no current cluster with this number, or the name is empty.
    """
    if name is not None and not name.strip():
        raise ClusteringError("A cluster's name cannot be empty; None takes it back.")
    cluster, run = clustering.cluster_table, clustering.run_table
    keywords = sa.func.array_to_string(
        cast("Any", cluster.c.keywords)[1:_LABEL_WORDS], ", ", type_=sa.Text
    )
    named = connection.execute(
        sa.update(cluster)
        .where(
            cluster.c.number == number,
            cluster.c.run_id == run.c.id,
            run.c.is_current,
            run.c.column_name == clustering.column.name,
        )
        .values(
            label=sa.func.nullif(keywords, "") if name is None else name,
            is_named=name is not None,
        )
    )
    if named.rowcount == 0:
        raise ClusteringError(
            f"There is no current cluster {number} of {clustering.column}. "
            "'sbert-pg cluster show' lists them."
        )
