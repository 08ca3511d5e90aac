"""What clusters are about: words and pairs of words that tell each from the others, and names."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, cast

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from sbert_pg import system
from sbert_pg.clustering.declaration import Clustering
from sbert_pg.clustering.kmeans import need
from sbert_pg.errors import ClusteringError

StopWords = Literal["english"] | Collection[str]

#: Keywords kept for each cluster.
KEYWORDS = 10
#: Keywords that make the label of a cluster without a name of its user's.
_LABEL_WORDS = 3
#: Texts fetched at a time.
_FETCH = 5_000
#: Texts of a cluster that have to have a term.
_LEAST_TEXTS = 2
#: Share of the texts of a cluster's most frequent term, below which a term counts for less: names
#: and habits of a few texts are in no other cluster, and say little of this one.
_RARE = 0.06
#: Terms of a cluster beyond which the pairs that were seen once are forgotten.
_MOST_TERMS = 300_000
#: Of scikit-learn's stop words those that often say what a text is about.
_NO_STOP_WORDS = frozenset({
    "amount", "back", "bill", "bottom", "call", "computer", "cry", "describe", "detail", "empty",
    "fill", "find", "fire", "full", "interest", "mill", "move", "name", "show", "system",
    "thick", "thin", "top",
})  # fmt: skip
#: Further words of questions and habit that say nothing of what a text is about.
_ALSO_STOP_WORDS = frozenset({
    "able", "actually", "ago", "asked", "asking", "came", "certain", "come", "coming", "did",
    "does", "doing", "gave", "getting", "given", "going", "gone", "got", "happened", "having",
    "help", "just", "kept", "kind", "know", "let", "like", "look", "looking", "make", "making",
    "need", "possible", "really", "said", "says", "tell", "thing", "things", "think", "thought",
    "today", "tomorrow", "tried", "try", "trying", "use", "used", "using", "want", "wanted",
    "way", "went", "yesterday",
})  # fmt: skip
#: Stop words that belong to the word before them, as in "top up" and "log out".
_PARTICLES = frozenset({"up", "down", "off", "out"})
#: How many times as frequent a term is in its class as in all others together, at least; and one
#: that is in every one of five classes or more, as what joins words in any language is.
_TELLS, _TELLS_EVERYWHERE = 2.0, 4.0
#: Share of a word's texts that have it in one pair, from which the pair is as good as the word.
_PAIRED = 0.6
#: Share of the texts of the most frequent term of a class that a proper name has to be in.
_CHARACTERISTIC = 0.5
#: Share of a word's places within sentences at which a proper name has a capital; and share of all
#: words beyond which capitals say nothing, as in German and in titles.
_NAMED, _CAPITALS = 0.7, 0.2
#: Words by which a language is known, and the share of them that are its stop words, at least. In
#: German, French and Spanish texts it is .23 to .39; English ones have .003 of another language.
_ASKED, _SPOKEN = 1000, 0.1
_ENGLISH = "english_stem"
# Two characters at least, as scikit-learn's CountVectorizer; a word begins with a letter.
# What stands before n't, or is the rest of I've, says nothing; that of l'hôtel does.
_WORD = re.compile(r"\b(?!(?<=['’])(?:ve|ll|re)\b)[^\W\d_]\w+\b(?!['’]t\b)")
#: A word within a sentence: one or a comma stands before it.
_WITHIN = re.compile(r"(?<=[\w,] )[^\W\d_]\w+\b")


class Capitals:
    """Which words of some texts are proper names, by the capitals within their sentences."""

    def __init__(self) -> None:
        self._capital: Counter[str] = Counter()
        self._all: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Look at one more text."""
        words = _WITHIN.findall(text)
        self._all.update(word.lower() for word in words)
        # Not those in capitals, as PIN and ATM.
        self._capital.update(word.lower() for word in words if word.istitle())

    def names(self) -> frozenset[str]:
        """The proper names; none where so many words have a capital that it says nothing."""
        if self._capital.total() > _CAPITALS * self._all.total():
            return frozenset()
        return frozenset(w for w, n in self._capital.items() if n >= _NAMED * self._all[w])


def class_tfidf(
    counts: Mapping[int, Mapping[str, int]],
    number: int = KEYWORDS,
    *,
    stems: Mapping[str, str] | None = None,
    names: Collection[str] = (),
) -> dict[int, list[str]]:
    """The words and pairs of words that tell each class from the others, best first.

    A term of a class weighs ``tf * log(1 + A / f)``: ``tf`` its share of the class's words, ``f``
    its frequency in all classes, ``A`` the mean number of words in a class (class-based TF-IDF,
    Grootendorst 2022, "BERTopic"). Where there are others, terms are left out that only one text of
    a class has, that are not twice as frequent in it as elsewhere (four times, if every class has
    them, as articles are in any language), and proper names that few of its texts have. No two
    terms of a class share a word, or a form of it (``stems``).
    """
    stems = stems or {}
    folded, forms = _folded(counts, stems)
    named = {stems.get(name, name) for name in names}
    sizes = {cluster: _words(own) for cluster, own in folded.items()}
    total = sum(sizes.values())
    mean = total / max(len(sizes), 1)
    everywhere: Counter[str] = Counter()
    for own in folded.values():
        everywhere.update(own)
    # Of fewer classes a word may be in all by chance.
    in_all = set.intersection(*map(set, folded.values())) if len(folded) >= 5 else set()
    keywords: dict[int, list[str]] = {}
    for cluster, own in folded.items():
        size = sizes[cluster]
        telling = _telling(own, size, everywhere, total, in_all, named) or own
        rare = _RARE * max(own.values(), default=0)
        weights = {
            stem: count / size * math.log1p(mean / everywhere[stem]) * min(1, count / rare)
            for stem, count in telling.items()
        }
        weights = _paired(weights, own)
        # Of a pair and its words, all as frequent, the pair says more.
        ranked = sorted(weights, key=lambda stem: (-weights[stem], -stem.count(" "), stem))
        keywords[cluster] = [
            max(sorted(forms[stem]), key=forms[stem].__getitem__)
            for stem in _without_repetition(ranked, number)
        ]
    return keywords


def _words(own: Mapping[str, int]) -> int:
    """How many words a class has; one with its particle is one, which may be all there is."""
    return sum(
        count
        for stem, count in own.items()
        if " " not in stem or sum(word not in _PARTICLES for word in stem.split(" ")) < 2
    )


def _telling(
    own: Mapping[str, int],
    size: int,
    everywhere: Mapping[str, int],
    total: int,
    in_all: set[str],
    named: set[str],
) -> dict[str, int]:
    """The terms of a class that tell it from the others, and in how many of its texts each is."""
    most, others = max(own.values(), default=0), total - size

    def tells(stem: str, count: int) -> bool:
        least = _TELLS_EVERYWHERE if stem in in_all else _TELLS
        return count * others >= least * (everywhere[stem] - count) * size

    return {
        stem: count
        for stem, count in own.items()
        if count >= min(_LEAST_TEXTS, most)
        and (count >= _CHARACTERISTIC * most or named.isdisjoint(stem.split(" ")))
        and tells(stem, count)
    }


def _paired(weights: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
    """The weights, where a pair has that of a word that mostly stands in it: "apple pay"."""

    def best(stem: str) -> float:
        words = (word for word in stem.split(" ") if word in weights)
        paired = (word for word in words if counts[stem] >= _PAIRED * counts[word])
        return max(weights[term] for term in (stem, *paired))

    return {stem: best(stem) for stem in weights}


def _folded(
    counts: Mapping[int, Mapping[str, int]], stems: Mapping[str, str]
) -> tuple[dict[int, Counter[str]], dict[str, Counter[str]]]:
    """How often each stem is in each class, and how often it stands there in which form."""
    folded: dict[int, Counter[str]] = {cluster: Counter() for cluster in counts}
    forms: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for cluster, terms in counts.items():
        for term, count in terms.items():
            stem = " ".join(stems.get(word, word) for word in term.split(" "))
            folded[cluster][stem] += count
            forms[stem][term] += count
    return folded, forms


def _without_repetition(stems: Iterable[str], number: int) -> list[str]:
    """The first terms of which none has a word of another."""
    chosen: list[str] = []
    # Stemmers leave relatives apart, as "verif" and "verifi": a beginning of four
    # letters makes them one.
    taken: list[str] = []
    for stem in stems:
        words = [word for word in stem.split(" ") if word not in _PARTICLES]
        if len(chosen) == number:
            break
        if words and not any(_related(word, other) for word in words for other in taken):
            chosen.append(stem)
            taken += words
    return chosen


def _related(a: str, b: str) -> bool:
    return a == b or (min(len(a), len(b)) >= 4 and (a.startswith(b) or b.startswith(a)))


def count_words(
    texts: Iterable[tuple[int, str | None]],
    stop_words: StopWords = "english",
    capitals: Capitals | None = None,
) -> dict[int, Counter[str]]:
    """In how many texts of each class each word is, and each pair of neighbours, in lower case.

    Stop words part their neighbours; ``"english"`` is scikit-learn's list but for words that often
    say what a text is about, and more verbs. ``capitals`` is shown each text.
    """
    stop: Collection[str] = frozenset(stop_words)
    if stop_words == "english":
        theirs = need("sklearn.feature_extraction.text", "find keywords").ENGLISH_STOP_WORDS
        stop = (theirs - _NO_STOP_WORDS) | _ALSO_STOP_WORDS
    counts: dict[int, Counter[str]] = {}
    for cluster, text in texts:
        own = counts.setdefault(cluster, Counter())
        own.update(_terms(text or "", stop))
        if capitals is not None:
            capitals.add(text or "")
        if len(own) > _MOST_TERMS:
            counts[cluster] = Counter({t: n for t, n in own.items() if n > 1 or " " not in t})
    return counts


def _terms(text: str, stop: Collection[str]) -> set[str]:
    units: list[str] = []
    for word in _WORD.findall(text.lower()):
        if word not in stop:
            units.append(word)
        elif word in _PARTICLES and units and units[-1]:
            units[-1] += f" {word}"
        else:
            units.append("")
    pairs = {f"{a} {b}" for a, b in pairwise(units) if "" not in (a, b) and a != b}
    return {*units, *pairs} - {""}


def _stems(
    connection: sa.Connection, counts: dict[int, Counter[str]], stop_words: StopWords
) -> dict[str, str]:
    """What PostgreSQL's dictionary of the texts' language makes of each word.

    Terms with stop words of that language leave the counts; those of English are gone by now.
    """
    if stop_words != "english":
        return {}
    texts: Counter[str] = Counter()
    for own in counts.values():
        texts.update(own)
    language = _language(connection, texts)
    words = sorted(set(" ".join(texts).split(" ")))
    stemmed = {word: stems for _, word, stems in _lexized(connection, words, language)}
    if language != _ENGLISH:
        _leave_out(counts, {word for word, stems in stemmed.items() if not stems})
    return {word: stems[0] for word, stems in stemmed.items() if stems}


def _leave_out(counts: Mapping[int, Counter[str]], stops: Collection[str]) -> None:
    """Take terms with one of these words out of the counts."""
    for own in counts.values():
        for term in [t for t in own if any(word in stops for word in t.split(" "))]:
            del own[term]


def _language(connection: sa.Connection, texts: Counter[str]) -> str:
    """The dictionary whose stop words the texts have most; English, where that is none."""
    words = Counter({term: n for term, n in texts.items() if " " not in term}).most_common(_ASKED)
    said = Counter({_ENGLISH: _SPOKEN * sum(count for _, count in words)})
    for language, word, stems in _lexized(connection, [word for word, _ in words]):
        said[language] += 0 if stems else texts[word]
    return max(said, key=said.__getitem__)


def _lexized(
    connection: sa.Connection, words: Sequence[str], language: str | None = None
) -> Sequence[Any]:
    """Each word with its stems, none of stop words, in one of PostgreSQL's dictionaries or all."""
    d = system.DICTIONARY.c
    terms = sa.func.unnest(sa.cast(words, ARRAY(sa.Text))).table_valued(sa.column("word", sa.Text))
    terms = terms.render_derived(name="given")
    # Another encoding lacks letters of some dictionary's stop words, which then cannot be read.
    whole = sa.func.current_setting("server_encoding").in_(["UTF8", "SQL_ASCII"])
    own = d.dictnamespace == sa.func.to_regnamespace("pg_catalog")
    row = d.dictname, terms.c.word, sa.func.ts_lexize(d.oid, terms.c.word, type_=ARRAY(sa.Text))
    both = sa.select(*row).join_from(system.DICTIONARY, terms, sa.true())
    named = d.dictname.like(language or sa.case((whole, r"%\_stem"), else_=_ENGLISH))
    return connection.execute(both.where(own, named)).all()


def find_keywords(
    connection: sa.Connection,
    clustering: Clustering,
    run_id: int,
    *,
    text: sa.ColumnElement[str] | None = None,
    stop_words: StopWords = "english",
) -> None:
    """Find keywords of the clusters of a run, and label those without a name by them.

    The texts are read in blocks; what is kept is the frequency of each word, and of each pair of
    neighbours, in each cluster.

    Args:
        connection: a connection in a transaction.
        clustering: what is clustered.
        run_id: the run.
        text: the text of a row; the source of an embedding column by default.
        stop_words: words to leave out, a collection; or ``"english"``, and then those of the
            texts' own language too, where PostgreSQL has a dictionary of it.

    Raises:
        ClusteringError: the column has no source, and no text is given.
        MissingExtraError: the English stop words come with scikit-learn, which is not installed.
    """
    text = clustering.text if text is None else text
    if text is None:
        raise ClusteringError(
            f"{clustering.column} is a plain vector column, so nothing says what its texts are. "
            "Give text=, as in text=Article.title."
        )
    assignment, cluster = clustering.assignment_table, clustering.cluster_table
    statement = (
        sa.select(assignment.c.cluster_id, text)
        .join_from(assignment, clustering.rows, clustering.row_is_assigned())
        .where(assignment.c.run_id == run_id, assignment.c.cluster_id.is_not(None))
        .execution_options(yield_per=_FETCH)
    )
    rows = connection.execute(statement)
    capitals = Capitals()
    counts = count_words(((row[0], row[1]) for row in rows), stop_words, capitals)
    stems = _stems(connection, counts, stop_words)
    values: list[dict[str, Any]] = [
        {"this": cluster_id, "words": words, "name": ", ".join(words[:_LABEL_WORDS]) or None}
        for cluster_id, words in class_tfidf(counts, stems=stems, names=capitals.names()).items()
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
    cluster = clustering.cluster_table
    keywords = sa.func.array_to_string(
        cast("Any", cluster.c.keywords)[1:_LABEL_WORDS], ", ", type_=sa.Text
    )
    label = sa.func.nullif(keywords, "") if name is None else name
    current = sa.and_(cluster.c.run_id == clustering.Run.id, clustering.is_current())
    update = sa.update(cluster).where(cluster.c.number == number, current)
    if connection.execute(update.values(label=label, is_named=name is not None)).rowcount == 0:
        raise ClusteringError(
            f"There is no current cluster {number} of {clustering.column}. "
            "'sbert-pg cluster show' lists them."
        )
