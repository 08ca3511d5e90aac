"""BM25 as SQL: the parts of a search by words whose text never varies.

Four parts of a statement are made of the caller's: the questions (``words_questions``), what holds
for all of them (``words_search``), the rows of the table (``words_rows``), and the caller's rows,
with criteria and joins (``words_within``). Those here know them by name. What concerns words is
looked up once for all questions; each question (``words_one``) is then ranked by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa

#: Lucene's and Elasticsearch's defaults.
K1, B = 1.2, 0.75
#: A question is first asked by its rarest words that so many rows have together, or so many for
#: each row wanted; the others score, but bring no candidates of their own before these are known.
#: As in MaxScore (Turtle and Flood, 1995) the answer is the same.
FIRST, FIRST_EACH = 500, 20
#: Words up to which those that are too light alone are asked for in pairs.
PAIRED = 24
#: Pages of a table that are sampled for the mean length, and rows of those that are looked at.
PAGES, ROWS = 16, 128
#: Pages that are sampled where words are of some of the rows: of one language, or of an index.
PAGES_OF_SOME = 160
#: The statistics of a column, by values and not by a join: the view's tables are read by their
#: indexes then, instead of whole.
_STATISTICS = """s.schemaname = (SELECT schema FROM words_table)
   AND s.tablename = (SELECT name FROM words_table)
   AND s.attname = (SELECT vector_column FROM words_search)
   AND s.inherited = (SELECT partitioned FROM words_table)"""


def length_of(vector: str) -> str:
    """SQL of the number of positions in a vector.

    By rank normalisation 2, ``ts_rank`` divides by that number; what it divides is 1e-20 where two
    words are both asked for and not there, as words with blanks never are.
    """
    rank = f"ts_rank({vector}, CAST('''a b'' & ''c d''' AS tsquery), 2)"
    return f"coalesce(round(CAST(CAST(1e-20 AS float4) AS float8) / nullif({rank}, 0)), 0)"


_PARTS: dict[str, tuple[tuple[str, ...], str]] = {
    "words_asked": (
        ("number", "lexeme"),
        """
SELECT q.number, a.lexeme
  FROM words_questions AS q CROSS JOIN words_search AS s
 CROSS JOIN unnest(to_tsvector(s.language, q.words)) AS a
""",
    ),
    # What the server knows of the table; nothing of a view, of one whose rows are not all
    # seen, or with tables that inherit from it. *percent* of its pages are sampled.
    "words_table": (
        ("schema", "name", "partitioned", "rows", "percent"),
        """
SELECT n.nspname AS schema, c.relname AS name, c.relkind = 'p' AS partitioned,
       CASE WHEN leaves.rows > 0 AND NOT row_security_active(c.oid) THEN leaves.rows END AS rows,
       least(100, 100.0 * q.pages / greatest(leaves.pages, 1)) AS percent
  FROM words_search AS q
  JOIN pg_catalog.pg_class AS c ON c.oid = q.relation
   AND (c.relkind IN ('m', 'p') OR c.relkind = 'r' AND NOT c.relhassubclass)
  JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
 CROSS JOIN LATERAL (
       SELECT CASE WHEN min(leaf.reltuples) >= 0
                   THEN sum(CAST(leaf.reltuples AS float8)) END AS rows, sum(leaf.relpages) AS pages
         FROM pg_catalog.pg_class AS leaf
        WHERE leaf.oid = c.oid AND c.relkind <> 'p' OR c.relkind = 'p' AND leaf.oid = ANY (
              ARRAY(SELECT t.relid FROM pg_catalog.pg_partition_tree(c.oid) AS t WHERE t.isleaf))
       ) AS leaves
""",
    ),
    # How many of the table's rows are those whose words count, by the sample.
    "words_share": (
        ("share",),
        """
SELECT CASE WHEN q.whole THEN CAST(1 AS float8)
            WHEN (SELECT rows FROM words_table) IS NOT NULL THEN (
                 SELECT nullif(CAST(avg(CAST(r.own AS integer)) AS float8), 0)
                   FROM words_sample AS r) END AS share
  FROM words_search AS q
""",
    ),
    # The shares of rows that have a lexeme, as ANALYZE kept them: thousands, read once. They are of
    # all rows, and say little of the words of less than half of them.
    "words_kept": (
        ("lexeme", "share"),
        f"""
SELECT kept.lexeme, kept.share
  FROM pg_catalog.pg_stats AS s
 CROSS JOIN unnest(CAST(CAST(s.most_common_elems AS text) AS text[]), s.most_common_elem_freqs)
       AS kept (lexeme, share)
 WHERE kept.lexeme = ANY (ARRAY(SELECT lexeme FROM words_asked))
   AND (SELECT share FROM words_share) >= .5
   AND {_STATISTICS}
""",  # noqa: S608 (a constant of this module)
    ),
    # Rows and their mean length: by statistics and a sample, where there are both, else counted.
    "words_corpus": (
        ("rows", "mean"),
        f"""
SELECT coalesce(t.rows * s.share, CAST((SELECT count(*) FROM words_rows) AS float8)) AS rows,
       coalesce(nullif(coalesce(
           CASE WHEN t.rows * s.share IS NOT NULL THEN (
               SELECT avg({length_of("r.vector")}) FROM words_sample AS r
                WHERE r.own AND r.place % (
                      SELECT CAST(greatest(1, floor(t.rows * s.share * t.percent / 100 / {ROWS}))
                                  AS bigint)) = 0) END,
           (SELECT avg({length_of("r.vector")}) FROM words_rows AS r)), 0), 1) AS mean
  FROM words_share AS s LEFT JOIN words_table AS t ON true
""",  # noqa: S608 (a constant of this module)
    ),
    # Each lexeme in quotes (quotes and backslashes doubled), and in how many rows it is; those that
    # are not kept are rare, and counted.
    "words_df": (
        ("lexeme", "quoted", "rows", "df"),
        r"""
SELECT a.lexeme, a.quoted, c.rows,
       least(CASE WHEN k.share IS NOT NULL THEN k.share * coalesce(t.rows, c.rows)
                  ELSE (SELECT count(*) FROM words_rows AS r
                         WHERE r.vector @@ CAST(a.quoted AS tsquery)) END, c.rows) AS df
  FROM (SELECT DISTINCT lexeme, concat('''', replace(replace(
               lexeme, E'\\', E'\\\\'), '''', ''''''), '''') AS quoted
          FROM words_asked) AS a
 CROSS JOIN words_corpus AS c LEFT JOIN words_table AS t ON true
  LEFT JOIN words_kept AS k ON k.lexeme = a.lexeme
""",
    ),
    # The words of each question. *reach* is what a row can score at most by a word and those that
    # weigh less; *common* are those behind the rarest.
    "words_idf": (
        ("number", "lexeme", "quoted", "query", "df", "idf", "common", "reach"),
        f"""
SELECT i.number, i.lexeme, i.quoted, CAST(i.quoted AS tsquery) AS query, i.df, i.idf,
       sum(i.df) OVER rarest > greatest({FIRST}, {FIRST_EACH} * (SELECT needed FROM words_search))
       AND sum(i.df) OVER rarest > i.df AS common,
       {K1 + 1} * sum(i.idf) OVER (PARTITION BY i.number ORDER BY i.idf, i.lexeme COLLATE "C")
       AS reach
  FROM (SELECT a.number, d.*, ln(1 + (d.rows - d.df + .5) / (d.df + .5)) AS idf
          FROM words_asked AS a JOIN words_df AS d ON d.lexeme = a.lexeme) AS i
WINDOW rarest AS (PARTITION BY i.number ORDER BY i.idf DESC, i.lexeme COLLATE "C")
""",  # noqa: S608 (a constant of this module)
    ),
    # ts_rank of one lexeme half-way between tf - 1 and tf, for tf from 1 to 255.
    "words_levels": (
        ("bounds",),
        """
SELECT array_agg(0.1 * (total - 0.5 / (n * n)) / 1.64493406685 ORDER BY n) AS bounds
  FROM (SELECT n, CAST(sum(1.0 / (n * n)) OVER (ORDER BY n) AS float8) AS total
          FROM generate_series(1, 255) AS n) AS levels
""",
    ),
}

#: The words of one question, always in one order: sums of floats depend on it, and so do ties.
_TERMS = """
SELECT quoted, query, idf, common, reach FROM words_idf
 WHERE number = words_one.number ORDER BY lexeme COLLATE "C"
"""
#: tf of a lexeme, of the whole vector or of one weight class.
_TF = (
    "CAST(width_bucket(CAST(ts_rank(CAST('{{.1,.1,.1,.1}}' AS real[]), v.{vector}, t.query) "
    "AS float8), (SELECT bounds FROM words_levels)) AS float8)"
)
#: Rows of the caller's that have one of some lexemes, with their score and the share of the
#: question's idf that they hold. A long vector is stored compressed, and each function that reads
#: it expands it: *v* is expanded once for all words. OFFSET 0 keeps what is computed once from
#: being put in the place of each of its uses.
_RANKED = """
SELECT {keys}, s.score, s.held
  FROM words_within AS w CROSS JOIN LATERAL (SELECT {vectors} OFFSET 0) AS v
 CROSS JOIN LATERAL (SELECT {length} AS length OFFSET 0) AS l
 CROSS JOIN LATERAL (
       SELECT sum(t.idf * c.tf * {k1_1} / (c.tf + {k1} * ({b_1} + {b} * l.length
                  / (SELECT mean FROM words_corpus)))) AS score,
              sum(t.idf) FILTER (WHERE c.tf > 0) / sum(t.idf) AS held
         FROM words_terms AS t CROSS JOIN LATERAL (SELECT {tf} AS tf OFFSET 0) AS c) AS s
 WHERE w.vector @@ (SELECT CAST(string_agg({asked}, ' | ') AS tsquery) FROM {some})
   AND (numnode(words_one.required) = 0 OR w.vector @@ words_one.required){more}
 ORDER BY s.score DESC, {keys}
 LIMIT (SELECT needed FROM words_search)
"""
#: A word as it is asked for where *least* is the score to reach: alone where it can be enough, else
#: with a lesser word by which it can. Of rows with common words most have one of them alone, and so
#: the index leaves them out. Pairs of very many words would be more work than rows.
_PAIRED = f"""CASE WHEN coalesce({K1 + 1} * t.idf >= least, true)
           OR (SELECT count(*) FROM words_terms) > {PAIRED} THEN t.quoted
           ELSE t.quoted || ' & (' || (
                SELECT string_agg(lesser.quoted, ' | ') FROM words_terms AS lesser
                 WHERE lesser.reach < t.reach
                   AND {K1 + 1} * t.idf + lesser.reach >= least) || ')' END"""  # noqa: S608 (a constant)
#: Rows of the other words alone are looked at where they can score more than the last row found.
_BEYOND = "common AND coalesce(reach > least, true)"
_VERDICT = f"""
SELECT least, NOT EXISTS (SELECT FROM words_terms WHERE {_BEYOND}) AS suffice
  FROM (SELECT CASE WHEN count(*) >= (SELECT needed FROM words_search) THEN min(score) END AS least
          FROM words_rare) AS last
"""  # noqa: S608 (a constant of this module)
_CHOSEN = """
SELECT * FROM words_rare WHERE (SELECT suffice FROM words_verdict)
UNION ALL
(SELECT * FROM ({every}) AS every)
"""
_PAGE = """
SELECT * FROM words_chosen ORDER BY score DESC, {keys}
 LIMIT (SELECT wanted FROM words_search) OFFSET (SELECT skipped FROM words_search)
"""


@cache
def looked_up() -> tuple[sa.CTE, ...]:
    """The parts that are the same for all questions."""
    return tuple(_part(name, columns, text) for name, (columns, text) in _PARTS.items())


@cache
def ranking(keys: int, weights: tuple[tuple[str, float], ...], exhaustive: bool) -> Any:
    """The rows of one question, best first: ``key_0``.., ``score`` and ``held``."""
    names = tuple(f"key_{n}" for n in range(keys))
    vectors, tf = ["setweight(w.vector, 'D') AS whole"], [_TF.format(vector="whole")]
    if weights:
        tf = [f"{weight:g} * {_TF.format(vector=name)}" for name, weight in weights]
        vectors += [
            f"ts_filter(w.vector, CAST('{{{name}}}' AS \"char\"[])) AS {name}"
            for name, _ in weights
        ]
    values: dict[str, Any] = {
        "keys": ", ".join(f"w.{name}" for name in names),
        "vectors": ", ".join(vectors),
        "tf": " + ".join(tf),
    }
    values |= {"length": length_of("v.whole"), "k1": K1, "k1_1": K1 + 1, "b": B, "b_1": 1 - B}
    ranked = (*names, "score", "held")
    parts = [_part("words_terms", ("quoted", "query", "idf", "common", "reach"), _TERMS)]
    if exhaustive:
        all_of = {"asked": "quoted", "some": "words_terms", "more": ""}
        parts.append(_part("words_chosen", ranked, _RANKED.format(**values, **all_of)))
    else:
        unless = "\n   AND NOT (SELECT suffice FROM words_verdict)"
        some = "words_terms AS t, words_verdict WHERE coalesce(t.reach >= least, true)"
        every = _RANKED.format(**values, asked=_PAIRED, some=some, more=unless)
        some = "words_terms WHERE NOT common"
        rare = _RANKED.format(**values, asked="quoted", some=some, more="")
        parts.append(_part("words_rare", ranked, rare))
        parts.append(_part("words_verdict", ("least", "suffice"), _VERDICT))
        parts.append(_part("words_chosen", ranked, _CHOSEN.format(every=every)))
    parts.append(_part("words_page", ranked, _PAGE.format(keys=", ".join(names))))
    page = sa.table("words_page", *(sa.column(name) for name in ranked))
    return sa.select(*page.c).add_cte(*parts, nest_here=True).lateral("words_ranked")


def _part(name: str, columns: Sequence[str], text: str) -> sa.CTE:
    select = sa.text(text).columns(*(sa.column(column) for column in columns))
    part: sa.CTE = select.cte(name).prefix_with("MATERIALIZED")
    return part
