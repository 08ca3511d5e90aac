"""Every architecture in every form against sentence-transformers, as a table for the docs.

PYTHONPATH=tests/helpers python -m architectures        writes the table into docs/encoder.md
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from encoder_models import SMALL, TEXTS, Wish, worst, write_cross_encoder, write_model

from sbert_pg.encoder import Encoder, Reranker
from sbert_pg.encoder.engines import ONNXRUNTIME
from sbert_pg.encoder.kinds import _HEADS
from sbert_pg.errors import EncoderError

HEADS = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
NARROW = {**SMALL, "embedding_size": 16}
#: One model of each architecture.
ARCHITECTURES: Mapping[str, Wish] = {
    "bert": Wish("bert"),
    "distilbert": Wish("distilbert"),
    "roberta": Wish("roberta"),
    "xlm-roberta": Wish("xlm-roberta"),
    "camembert": Wish("camembert"),
    "mpnet": Wish("mpnet"),
    "albert": Wish("albert", config={**NARROW, "num_hidden_layers": 4, "num_hidden_groups": 2}),
    "electra": Wish("electra", config=NARROW),
    "modernbert": Wish(
        "modernbert", config={**SMALL, "num_hidden_layers": 4, "local_attention": 16}
    ),
    "nomic_bert": Wish("nomic_bert"),
    "gte": Wish("gte"),
    "t5": Wish("t5", config={**SMALL, "head_dim": 8}, layers=((32, "Identity", False),)),
    "qwen3": Wish("qwen3", config=HEADS, pooling="lasttoken"),
    "mistral": Wish("mistral", config={**HEADS, "sliding_window": 20}, pooling="lasttoken"),
    "gemma3_text": Wish(
        "gemma3_text", config={**HEADS, "sliding_window": 12, "use_bidirectional_attention": True}
    ),
    "deberta-v2": Wish("deberta-v2"),
}
FORMS = ("fp32", "fp32-plain", "fp16", "int8")
#: What is said of a cosine: the largest of these that it is at least half way above.
STEPS = (0.999999, 0.99999, 0.9999, 0.999, 0.99, 0.98, 0.95)
#: Each text with another one.
PAIRS = [(TEXTS[n], TEXTS[(n * 7 + 3) % len(TEXTS)]) for n in range(len(TEXTS))]
COLUMNS = ("`model_type`", "built from", "`fp32`", "`fp32-plain`", "`fp16`", "`int8`, mean",
           "cross-encoder, `fp32`")  # fmt: skip
BEGIN, END = "<!-- architectures -->", "<!-- end of architectures -->"
DOCS = Path(__file__).parents[2] / "docs" / "encoder.md"

#: A cell: what was measured, or a word.
Cell = float | str


def measure(name: str, folder: Path) -> dict[str, Cell]:
    """The row of an architecture: the worst cosine of a text in each form, in int8 the mean."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)
    wish = ARCHITECTURES[name]
    write_model(wish, folder / "transformer", folder / "model")
    expected = SentenceTransformer(str(folder / "model"), device="cpu").encode(TEXTS)
    row: dict[str, Cell] = {"`model_type`": f"`{name}`"}
    for form, column in zip(FORMS, COLUMNS[2:], strict=False):
        try:
            # Not by whatever engine is installed and was fastest: each rounds in its own way.
            ours = Encoder.load(
                folder / "model", precision=form, cache_dir=folder / "cache", engine=ONNXRUNTIME
            )
        except EncoderError:
            row[column] = "refused"
            continue
        row["built from"] = {"graph": "weights", "torch": "torch"}[ours.manifest.exporter]
        pairs = zip(ours.encode(TEXTS), expected, strict=True)
        cosines = [worst(a[None], b[None])[0] for a, b in pairs]
        row[column] = float(np.mean(cosines)) if form == "int8" else min(cosines)
    row[COLUMNS[-1]] = _of_scores(wish, folder) if name in _HEADS else "-"
    return row


def _of_scores(wish: Wish, folder: Path) -> float:
    """Correlation of a cross-encoder's scores, before their sigmoid."""
    from sentence_transformers import CrossEncoder

    identity = {"activation_fn": "torch.nn.modules.linear.Identity"}
    path = folder / "cross"
    write_cross_encoder(replace(wish, layers=(), general=identity), path)
    theirs = np.asarray(CrossEncoder(str(path), device="cpu").predict(PAIRS))
    ours = Reranker.load(
        path, precision="fp32", cache_dir=folder / "cache", engine=ONNXRUNTIME
    ).score_pairs(PAIRS)
    return float(np.corrcoef(ours, theirs)[0, 1])


def shown(cell: Cell) -> str:
    """A cell as the docs have it."""
    if isinstance(cell, str):
        return cell
    step = next((step for step in STEPS if 1 - cell <= (1 - step) / 2), None)
    return "less" if step is None else f"{step:g}".removeprefix("0")


def documented() -> dict[str, dict[str, str]]:
    """The rows of the table in the docs, by architecture."""
    table = DOCS.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = re.findall(r"^\| `[a-z0-9_-]+` \|.*\|$", table, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {row[0].strip("`"): dict(zip(COLUMNS, row, strict=True)) for row in rows}


def main() -> int:
    """Write the table."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(name, Path(folder))
        print(row)
        lines.append(f"| {' | '.join(shown(row[column]) for column in COLUMNS)} |")
    before, begin, rest = DOCS.read_text("utf-8").partition(BEGIN)
    table = "\n\n" + "\n".join(lines) + "\n\n"
    DOCS.write_text(before + begin + table + END + rest.partition(END)[2], "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
