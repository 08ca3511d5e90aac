"""ModernBERT, NomicBERT and GTE: rotary positions, gated feed-forward parts, windows.

Each is a table of names and settings that gives one description of a transformer, from which the
graph is written. A setting that the table does not know is refused, since it may change what is
computed. The module is long, since the tables and the graph are about one description. Sources:
``modeling_modernbert.py``, ``modeling_nomic_bert.py`` and ``modeling_gte.py`` of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from sbert_pg.encoder.files import Array, Settings, Weights
from sbert_pg.encoder.layers import ACTIVATIONS, Linear, Norm, require_known
from sbert_pg.encoder.products import Products, Range, Seen, best_range, whole_range
from sbert_pg.encoder.transformer import Attention, Batch, write_norm
from sbert_pg.encoder.writer import BOOL, FLOAT, FLOAT16, INT64, Writer, activate, even_blocks
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
        gate: multiplied, activated, with ``up``; without one ``up`` itself is activated.
        up: see ``gate``.
        down: after the product of the two.
        norm: before the feed-forward part, or after it and its addition.
        theta: base of the rotary frequencies, or ``None`` where nothing is turned.
        window: tokens to each side that a token sees, or ``None`` for all.
        query_norm: of each head of the queries, before they are turned; or ``None``.
        key_norm: the same for keys.
        attention_end: of what attention gives, before it is added; or ``None``.
        end: the same for the feed-forward part.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    attention_norm: Norm | None
    gate: Linear | None
    up: Linear
    down: Linear
    norm: Norm
    theta: float | None
    window: int | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    attention_end: Norm | None = None
    end: Norm | None = None


@dataclass(slots=True)
class Rotary:
    """What the graph is written from.

    Attributes:
        words: word embeddings, with the row of token type 0 added, ``(vocabulary, width)``.
        norm: normalisation of the embeddings, or ``None``.
        heads: attention heads of the queries; several may share a key and a value.
        activation: one of ``layers.ACTIVATIONS``.
        norm_first: whether normalisations stand before their parts or after the additions.
        final_norm: after the last layer, or ``None``.
        causal: whether a token sees those before it alone.
        blocked: whether attention without a window goes through the queries in blocks, and not
            through onnxruntime's operator, which has no form of these that holds no square.
        bias: added to the scores by head and distance, ``(heads, 2 * most + 1)``; what is farther
            away than ``most`` counts as that. Only where attention is ``blocked``.
        slower: divisor of all rotary frequencies.
    """

    words: Array = field(repr=False)
    norm: Norm | None
    layers: list[Layer]
    heads: int
    activation: str
    norm_first: bool
    final_norm: Norm | None
    causal: bool = False
    blocked: bool = False
    bias: Array | None = field(default=None, repr=False)
    slower: float = 1.0

    @property
    def head(self) -> int:
        """Width of a head."""
        return len(self.layers[0].query.bias) // self.heads

    @property
    def shared(self) -> int:
        """Heads that share a key and a value."""
        return len(self.layers[0].query.bias) // len(self.layers[0].key.bias)

    @property
    def width(self) -> int:
        """Width of a token's vector."""
        return int(self.words.shape[1])


#: Settings of all of these that are read.
SETTINGS = ("rope_parameters", "head_dim")
#: Queries whose scores are held at a time where attention goes through them in blocks.
_BLOCK = 256


class Reader:
    """Reads tensors; a missing bias is zeros, where the table says that there is none.

    Args:
        keys: names of settings where they are not BERT's.
        free: whether the heads may be wider or narrower, together, than the model.
    """

    def __init__(
        self,
        weights: Weights,
        config: Settings,
        keys: Mapping[str, str] = MappingProxyType({}),
        *,
        free: bool = False,
    ) -> None:
        self._weights = weights
        self.config = config
        self.width, self.inner, self.count, self.heads = (
            config.integer(keys.get(key, key))
            for key in ("hidden_size", "intermediate_size", "num_hidden_layers",
                        "num_attention_heads")
        )  # fmt: skip
        self.head = config.integer(keys.get("head_dim", "head_dim"), self.width // self.heads)
        width = self.head * self.heads
        if self.head % 2 or not (free or width == self.width):
            raise UnsupportedEncoderError(
                f"{config.path}: {self.heads} heads of {self.head} do not make the width "
                f"{self.width}."
            )

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        """A tensor."""
        return self._weights.get(name, shape)

    def words(self, name: str, types: str | None = None) -> Array:
        """The word embeddings, with the row of token type 0."""
        words = self._weights.get(name, (self.config.integer("vocab_size"), self.width))
        rows = self.config.integer("type_vocab_size", 0, least=0) if types else 0
        return words + self._weights.get(types, (rows, self.width))[0] if types and rows else words

    def norm(self, name: str, epsilon: float, *, bias: bool = True) -> Norm:
        """A normalisation of the model's width."""
        shape = (self.width,)
        offset = self._weights.get(f"{name}.bias", shape) if bias else np.zeros(shape, np.float32)
        return Norm(self._weights.get(f"{name}.weight", shape), offset, epsilon)

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool) -> Linear:
        """A linear layer."""
        return Linear.read(self._weights, name, inputs, outputs, bias=bias)


def theta_of(config: Settings, rope: Settings, default: float) -> float:
    """The base of rotary frequencies; no scaling of them is implemented."""
    rope.only("rope_type", ["default"], "default")
    unknown = set(rope) - {"rope_type", "rope_theta"}
    if unknown:
        raise UnsupportedEncoderError(
            f"{config.path}: rotary positions with {', '.join(sorted(unknown))} are not supported."
        )
    return rope.number("rope_theta", default, above=1, below=1e9)


def _modernbert(weights: Weights, config: Settings) -> Rotary:
    require_known(
        config,
        [*SETTINGS, "hidden_activation", "norm_eps", "norm_bias", "attention_bias", "mlp_bias",
         "layer_types", "global_attn_every_n_layers", "local_attention", "global_rope_theta",
         "local_rope_theta", "layer_norm_eps", "position_embedding_type"],
    )  # fmt: skip
    reader, ropes = Reader(weights, config), config.object("rope_parameters")
    epsilon = config.number("norm_eps", 1e-5, above=0, below=1)
    norm_bias, biases = config.flag("norm_bias", False), config.flag("attention_bias", False)
    mlp_bias, width = config.flag("mlp_bias", False), reader.width
    thetas = {}
    for kind, key, base in (("full_attention", "global_rope_theta", 160_000.0),
                            ("sliding_attention", "local_rope_theta", 10_000.0)):  # fmt: skip
        default = config.number(key, base, above=1, below=1e9)
        thetas[kind] = theta_of(config, ropes.object(kind), default)
    every = config.integer("global_attn_every_n_layers", 3)
    kinds = kinds_of(config, list(thetas), lambda n: list(thetas)[bool(n % every)])
    layers = []
    for number, kind in enumerate(kinds):
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


def kinds_of(
    config: Settings, known: Sequence[str], default: Callable[[int], str]
) -> Sequence[str]:
    """The kind of attention of each layer; ``default`` gives it by the layer's number."""
    count, kinds = config.integer("num_hidden_layers"), config.get("layer_types")
    if kinds is None:
        return [default(number) for number in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or set(map(str, kinds)) - set(known):
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
    require_known(config, [*SETTINGS, "hidden_act", "layer_norm_eps"])
    reader = Reader(weights, config)
    width, inner, bias = reader.width, reader.inner, names.bias
    epsilon = config.number("layer_norm_eps", 1e-12, above=0, below=1)
    theta, slower = _scaled(config, config.object("rope_parameters"), theta, reader.head)
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
        slower=slower,
    )


def _scaled(config: Settings, rope: Settings, default: float, head: int) -> tuple[float, float]:
    """Base and divisor of the rotary frequencies, of which GTE's own code knows one scaling."""
    if rope.get("rope_type") != "ntk":
        return theta_of(config, rope, default), 1.0
    factor = rope.number("factor", 1.0, above=1, below=1e4)
    return rope.number("rope_theta", default, above=1, below=1e9) * factor, factor ** (2 / head)


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
    x = products.embed(writer, model.words, ids)
    x = x if model.norm is None else write_norm(writer, x, model.norm)
    x = writer.node("Reshape", [x, writer.ints(-1, model.width)])
    half = products.dtype == np.float16
    if half:
        x = writer.node("Cast", [x], "half", to=FLOAT16)
    attend = None if model.blocked else attention(writer, batch, model.heads, model.width)
    written = _Layers(writer, model, products, attend, batch)
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
        self,
        writer: Writer,
        model: Rotary,
        products: Products,
        attend: Attention | None,
        batch: Batch,
    ) -> None:
        self._writer, self._model, self._products = writer, model, products
        self._attend, self._batch = attend, batch
        self._head = model.head
        two = writer.node("Slice", [batch.shape, writer.ints(0), writer.ints(2)], "two")
        per_head = writer.ints(-1, self._head)
        self._heads = writer.node("Concat", [two, per_head], "head_shape", axis=0)
        self._length = writer.node("Slice", [batch.shape, writer.ints(1), writer.ints(2)], "length")
        self._turns: dict[float, tuple[str, str]] = {}
        self._ranges: dict[str, str] = {}

    def layer(self, x: str, layer: Layer, name: str) -> str:
        """``x``, real ``(batch * tokens, width)``, through a layer."""
        writer, products, first = self._writer, self._products, self._model.norm_first
        before = layer.attention_norm if first else None
        inner = x if before is None else self._normed(x, before)
        qkv = products.linear(
            writer, inner, [layer.query, layer.key, layer.value],
            [f"{name}.query", f"{name}.key", f"{name}.value"],
        )  # fmt: skip
        flat = writer.ints(-1, len(layer.query.bias))
        context = writer.node("Reshape", [self._context(qkv, layer), flat], "context")
        (output,) = products.linear(writer, context, [layer.output], [f"{name}.output"])
        output = (
            output if layer.attention_end is None else self._normed(output, layer.attention_end)
        )
        x = writer.node("Add", [x, output], "residual")
        if not first and layer.attention_norm is not None:
            x = self._normed(x, layer.attention_norm)
        down = self._feed_forward(self._normed(x, layer.norm) if first else x, layer, name)
        down = down if layer.end is None else self._normed(down, layer.end)
        x = writer.node("Add", [x, down], "residual")
        return x if first else self._normed(x, layer.norm)

    def _feed_forward(self, x: str, layer: Layer, name: str) -> str:
        writer, products, activation = self._writer, self._products, self._model.activation
        if layer.gate is None:
            return products.feed_forward(writer, x, layer.up, layer.down, activation, name)
        gate, up = products.linear(
            writer, x, [layer.gate, layer.up], [f"{name}.gate", f"{name}.up"]
        )
        active = activate(writer, gate, ACTIVATIONS[activation])
        wide = writer.node("Mul", [active, up], "gated")
        return products.linear(writer, wide, [layer.down], [f"{name}.down"])[0]

    def _normed(self, x: str, norm: Norm) -> str:
        return write_norm(self._writer, x, norm, self._products.dtype)

    def _context(self, qkv: Sequence[str], layer: Layer) -> str:
        query, key, value = (
            self._writer.node("Reshape", [part, self._heads], "heads") for part in qkv
        )
        query = query if layer.query_norm is None else self._normed(query, layer.query_norm)
        key = key if layer.key_norm is None else self._normed(key, layer.key_norm)
        if layer.theta is not None:
            query, key = self._turned(query, layer.theta), self._turned(key, layer.theta)
        qkv = [query, self._for_all(key), self._for_all(value)]
        if layer.window is not None and not self._model.causal:
            return self._windowed(qkv, layer.window)
        return self._blocked(qkv, layer.window) if self._attend is None else self._attend.apply(qkv)

    def _for_all(self, x: str) -> str:
        """Keys or values, once for each head that shares them."""
        writer, shared = self._writer, self._model.shared
        if shared == 1:
            return x
        column = writer.node("Unsqueeze", [x, writer.ints(3)])
        wide = writer.node("Expand", [column, writer.ints(1, 1, 1, shared, 1)], "shared")
        return writer.node("Reshape", [wide, self._heads], "heads")

    def _blocked(self, qkv: Sequence[str], window: int | None) -> str:
        """Attention that goes through the queries in blocks; each sees all keys that it may.

        All values are ``(batch, tokens, heads, width of a head)``. Blocks are of one size and no
        longer than they must be; what is held grows with the length of a text.
        """
        writer, real = self._writer, self._products.dtype
        kind = FLOAT16 if real == np.float16 else FLOAT
        key = writer.node("Transpose", [qkv[1]], "key", perm=[0, 2, 3, 1])
        value = writer.node("Transpose", [qkv[2]], "value", perm=[0, 2, 1, 3])
        count, size, rest = even_blocks(writer, self._length, _BLOCK)
        pads = self._joined([writer.ints(0, 0, 0, 0, 0), rest, writer.ints(0, 0)])
        query = writer.node("Pad", [qkv[0], pads], "padded_query")
        shape = self._joined([writer.ints(0), count, size, writer.ints(-1, self._head)])
        query = writer.node("Reshape", [query, shape], "blocks")
        scale = writer.tensor(np.array(self._head**-0.5, real), "scale")
        query = writer.node("Mul", [query, scale], "query")
        end = writer.node("Add", [self._length, rest])
        numbers = self._joined([writer.ints(1), count, size])
        numbers = writer.node("Reshape", [self._range(end), numbers], "numbers")
        body = writer.inner()
        some, at = body.name("queries"), body.name("at")
        rows = body.node("Transpose", [some], "rows", perm=[0, 2, 1, 3])
        scores = body.node("MatMul", [rows, key], "scores")
        if self._model.bias is not None:
            scores = body.node("Add", [scores, self._bias(body, at, self._model.bias)], "scores")
        nothing = body.tensor(np.array(-60_000, real), "nothing")
        scores = body.node("Where", [self._seen(body, at, window), scores, nothing], "scores")
        weights = body.node("Softmax", [scores], "weights", axis=-1)
        context = body.node("MatMul", [weights, value], "context")
        out = body.node("Transpose", [context], "part", perm=[0, 2, 1, 3])
        parts = writer.scan([(query, kind), (numbers, INT64)], body, [some, at], out, "parts",
                            state=False)  # fmt: skip
        heads = writer.ints(0, -1, self._model.heads, self._head)
        joined = writer.node("Reshape", [parts, heads], "context")
        return writer.node("Slice", [joined, writer.ints(0), self._length, writer.ints(1)])

    def _seen(self, body: Writer, at: str, window: int | None) -> str:
        """Which keys the queries at ``at``, ``(1, queries)``, see; true or false."""
        if not self._model.causal:
            seen = body.node("Cast", [self._batch.mask], "seen", to=BOOL)
            return body.node("Unsqueeze", [seen, body.ints(1, 2)], "seen")
        # What stands before a token is not padding.
        column = body.node("Unsqueeze", [at, body.ints(2)], "column")
        distance = body.node("Sub", [column, self._range(self._length)], "distance")
        seen = body.node("GreaterOrEqual", [distance, body.ints(0)], "seen")
        if window is None:
            return seen
        near = body.node("LessOrEqual", [distance, body.ints(window)], "near")
        return body.node("And", [seen, near], "seen")

    def _bias(self, body: Writer, at: str, table: Array) -> str:
        """The bias of the queries at ``at``, ``(1, queries)``: ``(heads, queries, tokens)``."""
        most = table.shape[1] // 2
        column = body.node("Reshape", [at, body.ints(-1, 1)], "column")
        distance = body.node("Sub", [self._range(self._length), column], "distance")
        ends = [body.tensor(np.array(end, np.int64), "end") for end in (-most, most)]
        place = body.node("Add", [body.node("Clip", [distance, *ends]), ends[1]], "place")
        rows = self._writer.tensor(table.astype(self._products.dtype), "bias")
        return body.node("Gather", [rows, place], "bias", axis=1)

    def _range(self, end: str) -> str:
        """0, 1, 2... before ``end``, a vector of one; made once for each."""
        if end not in self._ranges:
            zero, one = (self._writer.tensor(np.array(n, np.int64), "int") for n in (0, 1))
            last = self._writer.node("Squeeze", [end, self._writer.ints(0)], "end")
            self._ranges[end] = self._writer.node("Range", [zero, last, one], "range")
        return self._ranges[end]

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
            frequencies = np.float32(1) / np.float32(theta) ** exponents
            frequencies = (frequencies / np.float32(self._model.slower)).astype(np.float32)
            both = writer.tensor(np.concatenate([frequencies, frequencies]), "frequencies")
            positions = self._range(self._length)
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
        absent = writer.node("Not", [writer.node("Cast", [seen], to=BOOL)])
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
