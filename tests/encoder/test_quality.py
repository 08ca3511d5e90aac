"""The published figures, reproduced; and the measures themselves against known values."""

from __future__ import annotations

from pathlib import Path

import encoder_quality as benchmark
import numpy as np
import pytest
from scipy import stats

from sbert_pg.encoder import Encoder
from sbert_pg.tuning.evaluation import (
    compare_on_pairs,
    compare_on_questions,
    score_retrieval,
    spearman,
)

#: How far int8 may be from fp32 on a task.
INT8_WITHIN = {
    "sts17 en-en": 0.003,
    "sts17 es-es": 0.003,
    "xquad en": 0.003,
    "banking77": 0.003,
}


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_scipys(seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random.integers(0, 9, 200).astype(float), random.normal(size=200)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_spearman_of_a_constant_is_no_number() -> None:
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_retrieval_by_hand() -> None:
    texts = np.eye(4, dtype=np.float32)
    questions = np.array([[1, 0.9, 0.5, 0], [0, 0.1, 0.2, 1]], dtype=np.float32)
    found = score_retrieval(questions, texts, [{1}, {3, 2}], "dot")
    # The first answer stands second; the second question has both of its answers in front.
    assert found["ndcg@10"] == pytest.approx((1 / np.log2(3) + 1) / 2)
    assert found["recall@1"] == pytest.approx(0.5)
    assert found["recall@10"] == pytest.approx(1)
    assert found["mrr"] == pytest.approx((1 / 2 + 1) / 2)


def test_equal_answers_are_one_text(int8: Encoder) -> None:
    found = compare_on_questions("int8", int8, [("a b", "a b e"), ("c d", "a b e")])
    assert found["ndcg@10"] == found["recall@1"] == 1


@pytest.mark.parametrize("task", ["sts17 en-en", "sts17 es-es"])
def test_published_figures_of_similarity(
    data_dir: Path, fp32: Encoder, int8: Encoder, task: str
) -> None:
    published, tolerance = benchmark.PUBLISHED[task]
    reached = benchmark.TASKS[task](fp32, data_dir)
    assert reached == pytest.approx(published, abs=tolerance)
    assert benchmark.TASKS[task](int8, data_dir) == pytest.approx(reached, abs=INT8_WITHIN[task])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["xquad en", "banking77"])
def test_published_figures_of_retrieval_and_classification(
    data_dir: Path, fp32: Encoder, int8: Encoder, task: str
) -> None:
    published, tolerance = benchmark.PUBLISHED[task]
    reached = benchmark.TASKS[task](fp32, data_dir)
    assert reached == pytest.approx(published, abs=tolerance)
    assert benchmark.TASKS[task](int8, data_dir) == pytest.approx(reached, abs=INT8_WITHIN[task])


def test_two_lists_of_texts_are_enough(minilm: Encoder) -> None:
    """For those who have no table yet."""
    questions = [
        ("how do I get my money back", "Refunds are paid to your card within five days."),
        ("when are you open", "The shop opens at nine and closes at six."),
        ("do you have vacancies", "Send your application to the careers page."),
    ]
    row = compare_on_questions("one", minilm, questions)
    assert (row["encoder"], row["recall@1"], row["ndcg@10"]) == ("one", 1.0, 1.0)
    assert row["texts/s"] > 0
    scored = [("a cat", "a kitten", 5.0), ("a cat", "a lorry", 0.0), ("rain", "wet weather", 4.0)]
    assert compare_on_pairs("one", minilm, scored)["spearman"] > 0.4
