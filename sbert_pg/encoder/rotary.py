"""ModernBERT, NomicBERT and GTE: rotary positions, gated feed-forward parts, windows.

Each is a table of names and settings that gives one description of a transformer, from which the
graph is written. A setting that the table does not know is refused, since it may change what is
computed. The module is long, since the tables and the graph are about one description. Sources:
``modeling_modernbert.py``, ``modeling_nomic_bert.py`` and ``modeling_gte.py`` of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sbert_pg.encoder.architectures import ACTIVATIONS, Linear, Norm
from sbert_pg.encoder.files import Array, Settings, Weights
from sbert_pg.encoder.products import Products, Range, Seen, best_range, whole_range
from sbert_pg.encoder.transformer import Attention, Batch, write_norm
from sbert_pg.encoder.writer import FLOAT, FLOAT16, Writer, activate
from sbert_pg.errors import UnsupportedEncoderError


@dataclass(slots=True)
class Layer:
    """One layer.

    Attributes:
        query: with ``key`` and ``value``, what attention works on.
        key: see ``query``.
        value: see ``query``.
        output: after attention.
        attention_norm: before attention, or after it and its addition; ``None`` for none.
        gate: multiplied, activated, with ``up``.
        up: see ``gate``.
        down: after the product of the two.
        norm: before the feed-forward part, or after it and its addition.
        theta: base of the rotary frequencies.
        window: tokens to each side that a token sees, or ``None`` for all.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    attention_norm: Norm | None
    gate: Linear
    up: Linear
    down: Linear
    norm: Norm
    theta: float
    window: int | None = None


@dataclass(slots=True)
class Rotary:
    """What the graph is written from.

    Attributes:
        words: word embeddings, with the row of token type 0 added, ``(vocabulary, width)``.
        norm: normalisation of the embeddings.
        layers: the layers.
        heads: attention heads.
        activation: one of ``architectures.ACTIVATIONS``.
        norm_first: whether normalisations stand before their parts or after the additions.
        final_norm: after the last layer, or ``None``.
    """

    words: Array = field(repr=False)
    norm: Norm
    layers: list[Layer]
    heads: int
    activation: str
    norm_first: bool
    final_norm: Norm | None

    @property
    def width(self) -> int:
        """Width of a token's vector."""
        return int(self.words.shape[1])


#: Settings that say nothing about what is computed, or are about training and other tasks.
_IGNORED = frozenset(
    {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "id2label",
     "_name_or_path", "initializer_range", "initializer_cutoff_factor", "label2id", "num_labels",
     "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "use_cache",
     "tie_word_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob",
     "attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout",
     "classifier_pooling", "classifier_bias", "classifier_activation", "decoder_bias",
     "sparse_prediction", "sparse_pred_ignore_index", "deterministic_flash_attn",
     "reference_compile", "gradient_checkpointing", "problem_type", "repad_logits_with_grad",
     "max_position_embeddings"}
)  # fmt: skip
#: Settings that are read.
_READ = frozenset(
    {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
     "rope_parameters", "type_vocab_size", "head_dim"}
)  # fmt: skip


def _require_known(config: Settings, more: Sequence[str]) -> None:
    unknown = set(config) - _IGNORED - _READ - set(more)
    if unknown:
        raise UnsupportedEncoderError(
            f"{config.path}: {', '.join(sorted(unknown))[:300]} in a model of type "
            f"{config['model_type']!r} is not known, and may change what it computes."
        )


class _Reader:
    """Reads tensors; a missing bias is zeros, where the table says that there is none."""

    def __init__(self, weights: Weights, config: Settings) -> None:
        self._weights = weights
        self.config = config
        self.width = config.integer("hidden_size")
        self.inner = config.integer("intermediate_size")
        self.count = config.integer("num_hidden_layers")
        self.heads = config.integer("num_attention_heads")
        head = config.integer("head_dim", self.width // self.heads)
        if self.width % self.heads or head * self.heads != self.width or head % 2:
            raise UnsupportedEncoderError(
                f"{config.path}: {self.heads} heads of {head} do not make the width {self.width}."
            )

    def words(self, name: str, types: str | None = None) -> Array:
        words = self._weights.get(name, (self.config.integer("vocab_size"), self.width))
        rows = self.config.integer("type_vocab_size", 0, least=0) if types else 0
        return words + self._weights.get(types, (rows, self.width))[0] if types and rows else words

    def norm(self, name: str, epsilon: float, *, bias: bool = True) -> Norm:
        shape = (self.width,)
        offset = self._weights.get(f"{name}.bias", shape) if bias else np.zeros(shape, np.float32)
        return Norm(self._weights.get(f"{name}.weight", shape), offset, epsilon)

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool) -> Linear:
        weight = self._weights.get(f"{name}.weight", (outputs, inputs))
        offset = self._weights.get(f"{name}.bias", (outputs,)) if bias else None
        return Linear(
            np.ascontiguousarray(weight.T),
            np.zeros(outputs, np.float32) if offset is None else offset,
        )


def _theta(config: Settings, rope: Settings, default: float) -> float:
    """The base of rotary frequencies; no scaling of them is implemented."""
    rope.only("rope_type", ["default"], "default")
    unknown = set(rope) - {"rope_type", "rope_theta"}
    if unknown:
        raise UnsupportedEncoderError(
            f"{config.path}: rotary positions with {', '.join(sorted(unknown))} are not supported."
        )
    return rope.number("rope_theta", default, above=1, below=1e9)


def _modernbert(weights: Weights, config: Settings) -> Rotary:
    _require_known(
        config,
        ["hidden_activation", "norm_eps", "norm_bias", "attention_bias", "mlp_bias", "layer_types",
         "global_attn_every_n_layers", "local_attention", "global_rope_theta", "local_rope_theta",
         "layer_norm_eps", "position_embedding_type"],
    )  # fmt: skip
    reader, ropes = _Reader(weights, config), config.object("rope_parameters")
    epsilon = config.number("norm_eps", 1e-5, above=0, below=1)
    norm_bias, biases = config.flag("norm_bias", False), config.flag("attention_bias", False)
    mlp_bias, width = config.flag("mlp_bias", False), reader.width
    thetas = {}
    for kind, key, base in (("full_attention", "global_rope_theta", 160_000.0),
                            ("sliding_attention", "local_rope_theta", 10_000.0)):  # fmt: skip
        default = config.number(key, base, above=1, below=1e9)
        thetas[kind] = _theta(config, ropes.object(kind), default)
    layers = []
    for number, kind in enumerate(_kinds(config, reader.count)):
        at = f"layers.{number}."
        qkv = reader.linear(f"{at}attn.Wqkv", width, 3 * width, bias=biases)
        wide = reader.linear(f"{at}mlp.Wi", width, 2 * reader.inner, bias=mlp_bias)
        before = reader.norm(f"{at}attn_norm", epsilon, bias=norm_bias) if number else None
        layers.append(
            Layer(
                query=_part(qkv, 0, width),
                key=_part(qkv, width, width),
                value=_part(qkv, 2 * width, width),
                output=reader.linear(f"{at}attn.Wo", width, width, bias=biases),
                attention_norm=before,
                gate=_part(wide, 0, reader.inner),
                up=_part(wide, reader.inner, reader.inner),
                down=reader.linear(f"{at}mlp.Wo", reader.inner, width, bias=mlp_bias),
                norm=reader.norm(f"{at}mlp_norm", epsilon, bias=norm_bias),
                theta=thetas[kind],
                window=None if kind == "full_attention"
                else config.integer("local_attention", 128, least=2) // 2,
            )
        )  # fmt: skip
    return Rotary(
        words=reader.words("embeddings.tok_embeddings.weight"),
        norm=reader.norm("embeddings.norm", epsilon, bias=norm_bias),
        layers=layers,
        heads=reader.heads,
        activation=config.only("hidden_activation", ACTIVATIONS, "gelu"),
        norm_first=True,
        final_norm=reader.norm("final_norm", epsilon, bias=norm_bias),
    )


def _kinds(config: Settings, count: int) -> list[str]:
    """The kind of attention of each layer."""
    every = config.integer("global_attn_every_n_layers", 3)
    kinds = config.get("layer_types")
    if kinds is None:
        return ["sliding_attention" if n % every else "full_attention" for n in range(count)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != count or set(kinds) - set(known):
        config.refuse("layer_types", f"a list of {count} of {', '.join(known)}")
    return kinds


def _part(linear: Linear, begin: int, size: int) -> Linear:
    part = slice(begin, begin + size)
    return Linear(np.ascontiguousarray(linear.weight[:, part]), linear.bias[part])


@dataclass(frozen=True, slots=True)
class _Names:
    """Names of tensors of models with the normalisation last; ``{}`` is the layer's number."""

    norm: str
    layer: str
    qkv: str
    output: str
    attention_norm: str
    #: The two halves of the gated part, or both in one tensor.
    up: str
    gate: str
    down: str
    last: str
    bias: bool


_NOMIC = _Names(
    "emb_ln", "encoder.layers.{}.", "attn.Wqkv", "attn.out_proj", "norm1", "mlp.fc11", "mlp.fc12",
    "mlp.fc2", "norm2", bias=False,
)  # fmt: skip
_GTE = _Names(
    "embeddings.LayerNorm", "encoder.layer.{}.", "attention.qkv_proj", "attention.o_proj",
    "attn_ln", "mlp.up_gate_proj", "mlp.up_gate_proj", "mlp.down_proj", "mlp_ln", bias=True,
)  # fmt: skip


def _norm_last(
    weights: Weights, config: Settings, names: _Names, theta: float, activation: str
) -> Rotary:
    """NomicBERT and GTE, with transformers' settings and the tensors' names on the hub."""
    _require_known(config, ["hidden_act", "layer_norm_eps"])
    reader = _Reader(weights, config)
    width, inner, bias = reader.width, reader.inner, names.bias
    epsilon = config.number("layer_norm_eps", 1e-12, above=0, below=1)
    theta = _theta(config, config.object("rope_parameters"), theta)
    layers = []
    for number in range(reader.count):
        at = names.layer.format(number)
        qkv = reader.linear(at + names.qkv, width, 3 * width, bias=bias)
        if names.up == names.gate:
            both = reader.linear(at + names.up, width, 2 * inner, bias=False)
            up, gate = _part(both, 0, inner), _part(both, inner, inner)
        else:
            up, gate = (
                reader.linear(at + name, width, inner, bias=False)
                for name in (names.up, names.gate)
            )
        layers.append(
            Layer(
                query=_part(qkv, 0, width),
                key=_part(qkv, width, width),
                value=_part(qkv, 2 * width, width),
                output=reader.linear(at + names.output, width, width, bias=bias),
                attention_norm=reader.norm(at + names.attention_norm, epsilon),
                gate=gate,
                up=up,
                down=reader.linear(at + names.down, inner, width, bias=bias),
                norm=reader.norm(at + names.last, epsilon),
                theta=theta,
            )
        )
    types = "embeddings.token_type_embeddings.weight"
    return Rotary(
        words=reader.words("embeddings.word_embeddings.weight", types),
        norm=reader.norm(names.norm, epsilon),
        layers=layers,
        heads=reader.heads,
        activation=config.only("hidden_act", ACTIVATIONS, activation),
        norm_first=False,
        final_norm=None,
    )


READERS: Mapping[str, Callable[[Weights, Settings], Rotary]] = {
    "modernbert": _modernbert,
    "nomic_bert": lambda weights, config: _norm_last(weights, config, _NOMIC, 1_000.0, "silu"),
    "gte": lambda weights, config: _norm_last(weights, config, _GTE, 160_000.0, "gelu"),
}


def ranges(model: Rotary, seen: Mapping[str, Seen]) -> dict[str, Range]:
    """The range of each product in int8."""
    chosen = {key: whole_range(values) for key, values in seen.items()}
    for number, layer in enumerate(model.layers):
        key = f"layer{number}.down"
        chosen[key] = best_range(seen[key], (layer.down.weight**2).sum(axis=1))
    return chosen


def write(
    writer: Writer,
    model: Rotary,
    products: Products,
    ids: str,
    mask: str,
    attention: type[Attention],
) -> str:
    """Token vectors, float32 ``(batch, tokens, width)``; arguments as ``transformer.write``."""
    sizes = writer.node("Shape", [ids], "sizes")
    shape = writer.node("Concat", [sizes, writer.ints(model.width)], "shape", axis=0)
    batch = Batch(shape, mask, "")
    words = products.embed(writer, model.words, ids)
    x = writer.node(
        "Reshape", [write_norm(writer, words, model.norm), writer.ints(-1, model.width)]
    )
    half = products.dtype == np.float16
    if half:
        x = writer.node("Cast", [x], "half", to=FLOAT16)
    written = _Layers(writer, model, products, attention(writer, batch, model.heads, model.width),
                      batch)  # fmt: skip
    for number, layer in enumerate(model.layers):
        x = written.layer(x, layer, f"layer{number}")
    if half:
        x = writer.node("Cast", [x], "single", to=FLOAT)
    if model.final_norm is not None:
        x = write_norm(writer, x, model.final_norm)
    return writer.node("Reshape", [x, shape], "tokens")


class _Layers:
    """Writes layers; what they share is written once."""

    def __init__(
        self, writer: Writer, model: Rotary, products: Products, attend: Attention, batch: Batch
    ) -> None:
        self._writer, self._model, self._products = writer, model, products
        self._attend, self._batch = attend, batch
        self._head = model.width // model.heads
        two = writer.node("Slice", [batch.shape, writer.ints(0), writer.ints(2)], "two")
        per_head = writer.ints(model.heads, self._head)
        self._heads = writer.node("Concat", [two, per_head], "head_shape", axis=0)
        self._length = writer.node("Slice", [batch.shape, writer.ints(1), writer.ints(2)], "length")
        self._turns: dict[float, tuple[str, str]] = {}

    def layer(self, x: str, layer: Layer, name: str) -> str:
        """``x``, real ``(batch * tokens, width)``, through a layer."""
        writer, products, first = self._writer, self._products, self._model.norm_first
        before = layer.attention_norm if first else None
        inner = x if before is None else self._normed(x, before)
        qkv = products.linear(
            writer, inner, [layer.query, layer.key, layer.value],
            [f"{name}.query", f"{name}.key", f"{name}.value"],
        )  # fmt: skip
        context = writer.node(
            "Reshape", [self._context(qkv, layer), writer.ints(-1, self._model.width)], "context"
        )
        (output,) = products.linear(writer, context, [layer.output], [f"{name}.output"])
        x = writer.node("Add", [x, output], "residual")
        if not first and layer.attention_norm is not None:
            x = self._normed(x, layer.attention_norm)
        inner = self._normed(x, layer.norm) if first else x
        gate, up = products.linear(
            writer, inner, [layer.gate, layer.up], [f"{name}.gate", f"{name}.up"]
        )
        active = activate(writer, gate, ACTIVATIONS[self._model.activation])
        wide = writer.node("Mul", [active, up], "gated")
        (down,) = products.linear(writer, wide, [layer.down], [f"{name}.down"])
        x = writer.node("Add", [x, down], "residual")
        return x if first else self._normed(x, layer.norm)

    def _normed(self, x: str, norm: Norm) -> str:
        return write_norm(self._writer, x, norm, self._products.dtype)

    def _context(self, qkv: Sequence[str], layer: Layer) -> str:
        query, key, value = (
            self._writer.node("Reshape", [part, self._heads], "heads") for part in qkv
        )
        query, key = self._turned(query, layer.theta), self._turned(key, layer.theta)
        if layer.window is None:
            return self._attend.apply([query, key, value])
        return self._windowed([query, key, value], layer.window)

    def _turned(self, x: str, theta: float) -> str:
        """Rotary positions on ``(batch, tokens, heads, width of a head)``."""
        writer = self._writer
        cosine, sine = self._angles(theta)
        half = writer.ints(self._head // 2)
        left = writer.node("Slice", [x, writer.ints(0), half, writer.ints(3)], "left")
        right = writer.node("Slice", [x, half, writer.ints(self._head), writer.ints(3)], "right")
        other = writer.node("Concat", [writer.node("Neg", [right]), left], "other", axis=3)
        return writer.node(
            "Add",
            [writer.node("Mul", [x, cosine]), writer.node("Mul", [other, sine])],
            "turned",
        )

    def _angles(self, theta: float) -> tuple[str, str]:
        """Cosines and sines, ``(1, tokens, 1, width of a head)``."""
        if theta not in self._turns:
            writer = self._writer
            exponents = np.arange(0, self._head, 2, dtype=np.float32) / np.float32(self._head)
            frequencies = (np.float32(1) / np.float32(theta) ** exponents).astype(np.float32)
            both = writer.tensor(np.concatenate([frequencies, frequencies]), "frequencies")
            length = writer.node("Squeeze", [self._length, writer.ints(0)], "end")
            zero, one = (writer.tensor(np.array(n, np.int64), "int") for n in (0, 1))
            positions = writer.node("Range", [zero, length, one], "range")
            positions = writer.node("Cast", [positions], "positions", to=FLOAT)
            column = writer.node("Unsqueeze", [positions, writer.ints(0, 2, 3)], "column")
            angles = writer.node("Mul", [column, both], "angles")
            turns = [writer.node(op, [angles]) for op in ("Cos", "Sin")]
            if self._products.dtype == np.float16:
                turns = [writer.node("Cast", [turn], to=FLOAT16) for turn in turns]
            self._turns[theta] = (turns[0], turns[1])
        return self._turns[theta]

    def _windowed(self, qkv: Sequence[str], window: int) -> str:
        """Attention within a window, in blocks of its size: each sees itself and its neighbours.

        So no square of the whole length is ever held. All values are ``(batch, tokens, heads,
        width of a head)``.
        """
        writer, heads, head = self._writer, self._model.heads, self._head
        size = writer.ints(window)
        # Tokens that fill the last block, and a block at each end for the keys.
        rest = writer.node("Mod", [writer.node("Neg", [self._length]), size], "rest")
        padded = writer.node("Add", [self._length, rest], "padded")
        end = writer.node("Add", [rest, size], "end")
        zeros = writer.ints(0, 0)
        nothing = writer.ints(0)
        query_pads = [writer.ints(0, 0, 0, 0), nothing, rest, zeros]
        key_pads = [nothing, size, zeros, nothing, end, zeros]
        blocks = writer.ints(0, -1, window, heads, head)
        query = writer.node("Pad", [qkv[0], self._joined(query_pads)], "padded_query")
        query = writer.node("Reshape", [query, blocks], "blocks")
        query = writer.node("Transpose", [query], "query", perm=[0, 3, 1, 2, 4])
        key, value = (
            self._neighbours(
                writer.node("Pad", [part, self._joined(key_pads)], "padded_key"), padded, window,
                blocks,
            )
            for part in qkv[1:]
        )  # fmt: skip
        key = writer.node("Transpose", [key], "key", perm=[0, 3, 1, 4, 2])
        value = writer.node("Transpose", [value], "value", perm=[0, 3, 1, 2, 4])
        real = self._products.dtype
        scale = writer.tensor(np.array(head**-0.5, real), "scale")
        scores = writer.node("Mul", [writer.node("MatMul", [query, key], "scores"), scale])
        distance = np.arange(3 * window)[None, :] - window - np.arange(window)[:, None]
        band = np.where(np.abs(distance) <= window, 0, -60_000).astype(real)
        scores = writer.node("Add", [scores, writer.tensor(band, "band")], "scores")
        # The mask of the keys, in the same blocks.
        mask = writer.node("Pad", [self._batch.mask, self._joined([nothing, size, nothing, end])])
        seen = self._neighbours(mask, padded, window, writer.ints(0, -1, window))
        absent = writer.node("Not", [writer.node("Cast", [seen], to=9)])
        absent = writer.node("Unsqueeze", [absent, writer.ints(1, 3)], "absent")
        least = writer.tensor(np.array(-60_000, real), "least")
        scores = writer.node("Where", [absent, least, scores], "scores")
        weights = writer.node("Softmax", [scores], "weights", axis=-1)
        context = writer.node("MatMul", [weights, value], "context")
        context = writer.node("Transpose", [context], "context", perm=[0, 2, 3, 1, 4])
        context = writer.node("Reshape", [context, writer.ints(0, -1, heads, head)], "context")
        return writer.node(
            "Slice", [context, writer.ints(0), self._length, writer.ints(1)], "context"
        )

    def _joined(self, parts: Sequence[str]) -> str:
        return self._writer.node("Concat", parts, "pads", axis=0)

    def _neighbours(self, x: str, length: str, window: int, blocks: str) -> str:
        """Blocks of ``x``, each with the one before it and the one after it, on axis 2."""
        writer, parts = self._writer, []
        for begin in (0, window, 2 * window):
            end = writer.node("Add", [length, writer.ints(begin)], "end")
            part = writer.node("Slice", [x, writer.ints(begin), end, writer.ints(1)], "part")
            parts.append(writer.node("Reshape", [part, blocks], "blocks"))
        return writer.node("Concat", parts, "neighbours", axis=2)
