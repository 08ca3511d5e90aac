"""A sentence-transformers directory with a tiny BERT, written without torch in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

WIDTH, INNER, LAYERS, HEADS, POSITIONS = 8, 16, 1, 2, 48
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz", "hello", "world", "the"]

CONFIG = {
    "model_type": "bert", "architectures": ["BertModel"], "hidden_size": WIDTH,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "vocab_size": len(WORDS), "max_position_embeddings": POSITIONS, "type_vocab_size": 2,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0,
    "position_embedding_type": "absolute",
}  # fmt: skip
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
    "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                   "strip_accents": None, "lowercase": True},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [WORDS.index(name)], "tokens": [name]}
            for name in ("[CLS]", "[SEP]")
        },
    },
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
              "max_input_chars_per_word": 100, "vocab": {word: i for i, word in enumerate(WORDS)}},
}  # fmt: skip
MODULES = [
    {"idx": number, "name": str(number), "path": path,
     "type": f"sentence_transformers.models.{name}"}
    for number, (name, path) in enumerate(
        [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3")]
    )
]  # fmt: skip

#: Content of the directory's JSON files.
FILES: dict[str, Any] = {
    "config.json": CONFIG,
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "model_max_length": POSITIONS,
                              "do_lower_case": True},
    "modules.json": MODULES,
    "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
    "config_sentence_transformers.json": {
        "prompts": {"query": "the ", "document": ""}, "default_prompt_name": None,
        "similarity_fn_name": "cosine", "truncate_dim": None,
    },
    "1_Pooling/config.json": {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True,
                              "include_prompt": True},
    "2_Dense/config.json": {"in_features": WIDTH, "out_features": 6, "bias": True,
                            "activation_function": "torch.nn.modules.activation.Tanh"},
}  # fmt: skip


def write_tiny(path: Path) -> Path:
    """Write the directory; its weights are the same each time."""
    for name, content in FILES.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    random = np.random.default_rng(0)

    def tensor(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32) * 0.3 + (len(shape) == 1)

    tensors = {
        "embeddings.word_embeddings.weight": tensor(len(WORDS), WIDTH),
        "embeddings.position_embeddings.weight": tensor(POSITIONS, WIDTH),
        "embeddings.token_type_embeddings.weight": tensor(2, WIDTH),
    }
    norms = ["embeddings.LayerNorm"]
    for number in range(LAYERS):
        at = f"encoder.layer.{number}"
        shapes = {"attention.self.query": (WIDTH, WIDTH), "attention.self.key": (WIDTH, WIDTH),
                  "attention.self.value": (WIDTH, WIDTH),
                  "attention.output.dense": (WIDTH, WIDTH), "intermediate.dense": (INNER, WIDTH),
                  "output.dense": (WIDTH, INNER)}  # fmt: skip
        for name, shape in shapes.items():
            tensors[f"{at}.{name}.weight"] = tensor(*shape)
            tensors[f"{at}.{name}.bias"] = tensor(shape[0])
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    for name in norms:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = tensor(WIDTH), tensor(WIDTH)
    save_file(tensors, path / "model.safetensors")
    dense = {"linear.weight": tensor(6, WIDTH), "linear.bias": tensor(6)}
    save_file(dense, path / "2_Dense" / "model.safetensors")
    return path


def edit(path: Path, **values: Any) -> None:
    """Change entries of a JSON file; ``...`` takes one away."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
