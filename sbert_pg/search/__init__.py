"""Searching by meaning, by words, and by both, under any filter."""

from sbert_pg.search.entry import nearest
from sbert_pg.search.explain import (
    SearchExplanation,
    WordsExplanation,
    explain_search,
    explain_words,
)
from sbert_pg.search.fusion import hybrid
from sbert_pg.search.looks import DEFAULT_EF_SEARCH, DEFAULT_OVERFETCH
from sbert_pg.search.words import matching

__all__ = [
    "DEFAULT_EF_SEARCH",
    "DEFAULT_OVERFETCH",
    "SearchExplanation",
    "WordsExplanation",
    "explain_search",
    "explain_words",
    "hybrid",
    "matching",
    "nearest",
]
