"""Measured on one's own questions: evaluate searches, fit weights and encoders, choose an index.

``pairs`` and ``files`` give labelled questions, ``searches`` what is asked of them. ``evaluation``
compares searches, and encoders on lists of texts, ``choosing`` encoders, ``advise`` indexes;
``weight`` fits that of ``hybrid``, ``limits`` shows where an encoder breaks. ``fitting`` fits an
encoder: a ``task`` says to what and proves it, ``adapters`` learn a matrix for queries, ``whole``
and ``training`` a model.
"""

from sbert_pg.tuning.advise import Advice, FormFigures, advise_index
from sbert_pg.tuning.choosing import Choice, Choosable, choose_encoder, local_encoders
from sbert_pg.tuning.evaluation import Evaluation, Score, evaluate
from sbert_pg.tuning.files import (
    pairs_of,
    read_pairs,
    read_run,
    with_attribute,
    write_qrels,
    write_run,
    write_topics,
)
from sbert_pg.tuning.fitting import Method, tune
from sbert_pg.tuning.limits import Limits, limits_of, own_texts
from sbert_pg.tuning.pairs import Split, hard_negatives, of_keys, own_pairs, split_pairs
from sbert_pg.tuning.searches import searches_for
from sbert_pg.tuning.task import Tuning
from sbert_pg.tuning.weight import FittedWeight, fit_weight

__all__ = [
    "Advice",
    "Choice",
    "Choosable",
    "Evaluation",
    "FittedWeight",
    "FormFigures",
    "Limits",
    "Method",
    "Score",
    "Split",
    "Tuning",
    "advise_index",
    "choose_encoder",
    "evaluate",
    "fit_weight",
    "hard_negatives",
    "limits_of",
    "local_encoders",
    "of_keys",
    "own_pairs",
    "own_texts",
    "pairs_of",
    "read_pairs",
    "read_run",
    "searches_for",
    "split_pairs",
    "tune",
    "with_attribute",
    "write_qrels",
    "write_run",
    "write_topics",
]
