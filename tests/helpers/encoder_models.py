"""Models with random weights and made-up vocabularies, written by sentence-transformers itself."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sbert_pg.probes import PROBES, SAMPLE_TEXTS

#: What every encoder is compared on: probes, ordinary texts, and oddities.
TEXTS = [
    *PROBES,
    *SAMPLE_TEXTS,
    " ",
    "\n\t ",
    "a" * 500,
    "word " * 700,
    "nul\x00inside",
    "[SEP] [CLS] [MASK] </s> <s> <pad>",
    "ﬁ ligature, Ａ full width, e\u0301 combining",
]

#: Sizes of a small model; every architecture reads the names it knows.
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}


@dataclass
class Wish:
    """What a made-up model shall be like.

    Attributes:
        architecture: ``model_type`` of transformers.
        pooling: pooling mode or modes.
        include_prompt: whether pooling sees the prompt.
        layers: ``"normalize"`` or ``(out_features, activation, bias)``.
        max_seq_length: limit of texts, in tokens.
        do_lower_case: of sentence-transformers.
        cased: whether the tokenizer keeps case.
        config: further settings of the transformer.
        general: further content of ``config_sentence_transformers.json``.
        seed: of the weights.
        scale: standard deviation of the weights; larger makes layers differ more.
    """

    architecture: str = "bert"
    pooling: str | tuple[str, ...] = "mean"
    include_prompt: bool = True
    layers: Sequence[str | tuple[int, str, bool]] = ("normalize",)
    max_seq_length: int | None = 64
    do_lower_case: bool = False
    cased: bool = False
    config: dict[str, Any] = field(default_factory=lambda: dict(SMALL))
    general: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = 600
    seed: int = 0
    scale: float = 0.15


#: Writes a model and gives its directory.
Make = Callable[[Wish], Path]


def write_model(wish: Wish, transformer: Path, target: Path) -> None:
    import torch
    from sentence_transformers import SentenceTransformer

    models = sentence_transformers_modules()

    _write_transformer(wish, transformer)
    torch.manual_seed(wish.seed + 1)
    first = models.Transformer(str(transformer), max_seq_length=wish.max_seq_length)
    config = first.auto_model.config
    width = getattr(config, "hidden_size", None) or config.dim
    modes = (wish.pooling,) if isinstance(wish.pooling, str) else wish.pooling
    modules: list[Any] = [first, models.Pooling(width, pooling_mode=wish.pooling)]
    modules[1].include_prompt = wish.include_prompt
    width *= len(modes)
    for layer in wish.layers:
        if layer == "normalize":
            modules.append(models.Normalize())
        else:
            size, activation, bias = layer
            function = getattr(torch.nn, activation)()
            modules.append(models.Dense(width, size, bias=bias, activation_function=function))
            width = size
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(
        str(target), create_model_card=False
    )
    settings_path = target / "sentence_bert_config.json"
    settings = json.loads(settings_path.read_text())
    settings["do_lower_case"] = wish.do_lower_case
    if wish.max_seq_length is None:
        settings.pop("max_seq_length", None)
    else:
        settings["max_seq_length"] = wish.max_seq_length
    settings_path.write_text(json.dumps(settings))
    general_path = target / "config_sentence_transformers.json"
    general = json.loads(general_path.read_text()) | wish.general
    general_path.write_text(json.dumps(general))


def write_cross_encoder(wish: Wish, target: Path, *, labels: int = 1, kind: str = "") -> None:
    """A classifier of pairs; ``kind`` is the tokenizer's class."""
    from sentence_transformers import CrossEncoder

    plain = target.with_name(f"{target.name}-transformer")
    _write_transformer(wish, plain, labels)
    edit(plain / "tokenizer_config.json", tokenizer_class=kind or "PreTrainedTokenizerFast")
    model = CrossEncoder(str(plain), max_length=wish.max_seq_length, device="cpu")
    model.save_pretrained(str(target), create_model_card=False)
    edit(target / "tokenizer_config.json", tokenizer_class=kind or "PreTrainedTokenizerFast")
    if wish.general:
        edit(target / "config_sentence_transformers.json", **wish.general)


def edit(path: Path, **values: Any) -> None:
    """Give entries of a JSON file other values."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sentence_transformers_modules() -> Any:
    """The module classes, where this version of sentence-transformers has them."""
    try:
        from sentence_transformers.sentence_transformer import modules
    except ImportError:
        from sentence_transformers import models as modules
    return modules


def _write_transformer(wish: Wish, path: Path, labels: int | None = None) -> None:
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    tokenizer = _tokenizer(wish)
    torch.manual_seed(wish.seed)
    pad = tokenizer.pad_token_id
    config = AutoConfig.for_model(
        wish.architecture,
        **{"vocab_size": len(tokenizer), "pad_token_id": pad, **_native(wish)},
    )
    if labels is not None:
        config.num_labels = labels
    kind = AutoModel if labels is None else AutoModelForSequenceClassification
    if wish.architecture == "t5":
        from transformers import T5EncoderModel

        model = T5EncoderModel(config).float().eval()
    else:
        model = kind.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Nothing stays at a value that would hide a missing bias or a missing scale.
            centre = parameter.mean() if parameter.dim() == 1 else 0.0
            parameter.copy_(torch.randn_like(parameter) * wish.scale + centre)
    model.save_pretrained(str(path))
    tokenizer.save_pretrained(str(path))


def _native(wish: Wish) -> dict[str, Any]:
    """Settings under the names that the architecture has for them."""
    config = dict(wish.config)
    if wish.architecture == "distilbert":
        names = {
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
        }
        config = {names.get(key, key): value for key, value in config.items()}
    if wish.architecture == "t5":
        names = {"intermediate_size": "d_ff", "hidden_size": "d_model", "head_dim": "d_kv",
                 "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}  # fmt: skip
        config = {names.get(key, key): value for key, value in config.items()}
    if wish.architecture in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        config.setdefault("max_position_embeddings", 514)
    return config


def _tokenizer(wish: Wish) -> Any:
    import tokenizers as tk
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [*SAMPLE_TEXTS, *PROBES]
    if wish.architecture in ("roberta",):
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = tk.Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=wish.vocabulary,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif wish.architecture in ("xlm-roberta", "camembert", "t5"):
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = tk.Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC()])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        )
        trainer = trainers.UnigramTrainer(
            vocab_size=wish.vocabulary,
            special_tokens=specials,
            unk_token="<unk>",
            show_progress=False,
        )
    else:
        mpnet = wish.architecture == "mpnet"
        specials = (
            ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
            if mpnet
            else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        )
        tokenizer = tk.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not wish.cased)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=wish.vocabulary, special_tokens=specials, show_progress=False
        )
    tokenizer.train_from_iterator(texts, trainer)
    if len(tokenizer.get_vocab()) < wish.vocabulary:
        _fill_vocabulary(tokenizer, wish)
    first, last = ("[CLS]", "[SEP]") if "[CLS]" in specials else ("<s>", "</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        # T5 puts a token at the end alone.
        single=f"$A {last}" if wish.architecture == "t5" else f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in (first, last)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token=first,
        sep_token=last,
        bos_token=first,
        eos_token=last,
        pad_token=next(t for t in specials if "pad" in t.lower()),
        unk_token=next(t for t in specials if "unk" in t.lower()),
        mask_token=next(t for t in specials if "mask" in t.lower()),
        model_max_length=512,
    )


def _fill_vocabulary(tokenizer: Any, wish: Wish) -> None:
    """Made-up words, so that a vocabulary has its true size."""
    letters = random.Random(wish.seed)
    missing = wish.vocabulary - len(tokenizer.get_vocab())
    words = [f"zq{letters.getrandbits(64):x}{i:x}" for i in range(missing)]
    tokenizer.add_tokens(words)


def worst(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Worst cosine of a row, and the largest absolute difference."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(1) / np.maximum(lengths, 1e-12)
    return float(cosine.min()), float(np.abs(a - b).max())
