"""Encoders trained by sentence-transformers: the only module of tuning that needs torch.

``train`` has the loss of MultipleNegativesRankingLoss: among the answers and the hard negatives of
a batch a question shall choose its own answer (Henderson et al., 2017). With Matryoshka dimensions
it is that of the leading dimensions too, so that vectors may be cut (Kusupati et al., 2022).
``distil`` has a smaller model give a larger one's vectors (Reimers and Gurevych, 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sbert_pg.errors import DeclarationError, needing
from sbert_pg.spec import DOCUMENT, QUERY, Vectors

#: Questions of a step, tokens of a text that are read while training, and the highest rate.
BATCH, TOKENS, RATE = 16, 128, 1e-4
#: Texts of a step of ``distil``, and the rate for a table of token vectors.
_TEXTS, _STATIC_RATE = 64, 3e-3
#: Share of the steps in which the rate rises; it falls in the others.
_RISING = 0.1
_PURPOSE = "train an encoder"


class Example(NamedTuple):
    """A question to train with; those of one group may share an answer: never in one batch."""

    question: str
    answer: str
    negatives: Sequence[str]
    group: int


def train(
    source: Path,
    place: Path,
    examples: Sequence[Example],
    *,
    epochs: int,
    matryoshka: Sequence[int] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Train a model to find answers, on a GPU where torch has one, and write it.

    Returns the settings, and the versions that it was made with.
    """
    with needing("sentence-transformers", "train", _PURPOSE):
        from sentence_transformers.sentence_transformer import losses
    random = np.random.default_rng(seed)
    groups = np.array([example.group for example in examples])
    batches = [batch for _ in range(epochs) for batch in _batches(groups, random)]
    with _Model(source, seed) as model:
        loss = losses.MultipleNegativesRankingLoss(model.model)
        if matryoshka:
            full = int(model.model.get_embedding_dimension())
            if bad := [d for d in matryoshka if not 1 <= d < full]:
                raise DeclarationError(f"matryoshka={bad}: give dimensions from 1 to {full - 1}.")
            dims = [full, *sorted(set(matryoshka), reverse=True)]
            loss = losses.MatryoshkaLoss(model.model, loss, dims)

        def lost(batch: list[int]) -> Any:
            columns = _columns([examples[i] for i in batch], random)
            sides = [QUERY, *[DOCUMENT] * (len(columns) - 1)]
            return loss(list(map(model.features, columns, sides)), None)

        model.optimise(batches, lost, RATE)
        versions = model.save(place)
    settings = {"epochs": epochs, "steps": len(batches), "batch": BATCH, "rate": RATE}
    return {**settings, "tokens": TOKENS, "matryoshka": list(matryoshka)} | versions


def distil(
    source: Path | tuple[Path, Vectors],
    place: Path,
    texts: Sequence[str],
    vectors: Vectors,
    *,
    epochs: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a model to give certain vectors, by cosine, and write it; returns the settings.

    The source is a sentence-transformers directory; or a ``tokenizer.json`` and the vectors of its
    tokens to begin with, for a static model. No epochs write it as it is.
    """
    with needing("torch", "train", _PURPOSE):
        import torch
    random = np.random.default_rng(seed)
    batches = [
        order[first : first + _TEXTS].tolist()
        for order in (random.permutation(len(texts)) for _ in range(epochs))
        for first in range(0, len(order), _TEXTS)
    ]
    rate = RATE if isinstance(source, Path) else _STATIC_RATE
    with _Model(source, seed) as model:

        def lost(batch: list[int]) -> Any:
            student = model.model(model.features([texts[i] for i in batch], DOCUMENT))
            teacher = torch.from_numpy(vectors[batch]).to(model.model.device)
            alike = torch.nn.functional.cosine_similarity(student["sentence_embedding"], teacher)
            return (1 - alike).mean()

        model.optimise(batches, lost, rate)
        versions = model.save(place)
    settings = {"epochs": epochs, "steps": len(batches), "batch": _TEXTS, "rate": rate}
    return {**settings, "texts": len(texts)} | versions


class _Model:
    """A model being trained, with torch's random numbers in a state of their own."""

    def __init__(self, source: Path | tuple[Path, Vectors], seed: int) -> None:
        with needing("sentence-transformers", "train", _PURPOSE):
            import sentence_transformers as st
            import torch
        self._torch, self._st = torch, st
        self._forked, self._source, self._seed = torch.random.fork_rng(), source, seed
        self.model: Any = None

    def __enter__(self) -> _Model:
        self._forked.__enter__()
        self._torch.manual_seed(self._seed)
        make = self._st.SentenceTransformer
        if isinstance(self._source, Path):
            # In float32, whatever it was saved in: steps as small as these are lost in half of it.
            self.model = make(str(self._source), local_files_only=True).float()
        else:
            self.model = make(modules=_static(*self._source))
        return self

    def __exit__(self, *error: Any) -> None:
        self._forked.__exit__(*error)

    def features(self, texts: list[str], side: str) -> dict[str, Any]:
        """Texts as the model takes them, with the prompt of their side."""
        prompt = self.model.prompts.get(side) or None
        features = self.model.preprocess(texts, prompt=prompt)
        return {
            name: value.to(self.model.device) if hasattr(value, "to") else value
            for name, value in features.items()
        }

    def optimise(
        self, batches: Sequence[list[int]], lost: Callable[[list[int]], Any], rate: float
    ) -> None:
        """A step for each batch; the rate rises, then falls to zero."""
        torch, limit = self._torch, self.model.max_seq_length
        if limit is not None and limit > TOKENS and limit != float("inf"):
            self.model.max_seq_length = TOKENS
        rising = max(1, round(_RISING * len(batches)))

        def share(step: int) -> float:
            falling = (len(batches) - step) / max(1, len(batches) - rising)
            return min((step + 1) / rising, falling)

        optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=0.01)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        self.model.train()
        for batch in batches:
            optimizer.zero_grad()
            lost(batch).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            rates.step()
        self.model.eval()
        if limit != self.model.max_seq_length:
            self.model.max_seq_length = limit

    def save(self, place: Path) -> dict[str, str]:
        """Write the model; returns the versions of what made it."""
        self.model.save(str(place), create_model_card=False)
        return {"torch": self._torch.__version__, "sentence-transformers": self._st.__version__}


def _static(tokenizer: Path, rows: Vectors) -> list[Any]:
    """The modules of a static model."""
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer

    whole = Tokenizer.from_file(str(tokenizer))
    whole.no_truncation()
    whole.no_padding()
    return [StaticEmbedding(whole, embedding_weights=rows), Normalize()]


def _batches(groups: npt.NDArray[np.int64], random: np.random.Generator) -> Iterator[list[int]]:
    """All examples in batches by chance, of a group no two in one."""
    left = random.permutation(len(groups)).tolist()
    while left:
        batch: dict[int, int] = {}
        later = []
        for i in left:
            if len(batch) < BATCH and groups[i] not in batch:
                batch[groups[i]] = i
            else:
                later.append(i)
        left = later
        # One alone has nothing to be told from.
        if len(batch) > 1:
            yield list(batch.values())


def _columns(batch: Sequence[Example], random: np.random.Generator) -> list[list[str]]:
    """Questions, answers and, where each has one, hard negatives."""
    columns = [[e.question for e in batch], [e.answer for e in batch]]
    if all(e.negatives for e in batch):
        columns.append([e.negatives[int(random.integers(len(e.negatives)))] for e in batch])
    return columns
