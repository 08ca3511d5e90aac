"""Qwen3, Mistral, Gemma3 and the encoder half of T5: norms without a mean before each part.

The first three are language models whose token vectors are pooled: heads that share keys and
values, and a token that sees those before it alone, unless the model was trained to see all
(EmbeddingGemma). T5 (sentence-t5, gtr-t5 and their kin) has no biases, scores that are not scaled
but to which a bias by distance is added, the same in all layers, and a feed-forward part with a
gate (T5 1.1) or without. As in ``rotary``, a setting that is not known is refused. Sources:
``modeling_qwen3.py``, ``modeling_mistral.py``, ``modeling_gemma3.py`` (``Gemma3TextModel``) and
``modeling_t5.py`` (``T5EncoderModel``) of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from sbert_pg.encoder.files import Array, Settings, Weights
from sbert_pg.encoder.layers import ACTIVATIONS, Linear, Norm, relative_bias, require_known
from sbert_pg.encoder.rotary import (
    SETTINGS,
    Layer,
    Reader,
    Rotary,
    kinds_of,
    theta_of,
)

#: Settings of the language models that are read here, or say nothing about what is computed.
_SETTINGS = (*SETTINGS, "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling",
             "layer_types", "sliding_window", "hidden_act")  # fmt: skip
#: Further ones of Gemma3.
_GEMMA3 = ("attention_bias", "query_pre_attn_scalar", "final_logit_softcapping",
           "attn_logit_softcapping", "use_bidirectional_attention", "_sliding_window_pattern",
           "sliding_window_pattern", "rope_local_base_freq", "hidden_activation")  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"


class _Reader(Reader):
    _epsilon: float
    #: Added to the scales of all normalisations.
    _offset = 0.0

    def rms(self, name: str, size: int | None = None) -> Norm:
        """A normalisation without a mean; of the model's width by default."""
        scale = self.get(f"{name}.weight", (size or self.width,)) + np.float32(self._offset)
        return Norm(scale, np.zeros_like(scale), self._epsilon, centred=False)


class _Decoder(_Reader):
    """Reads what the language models have alike; ``offset`` as above."""

    def __init__(self, weights: Weights, config: Settings, offset: float = 0.0) -> None:
        super().__init__(weights, config, free=True)
        config.only("rope_scaling", [{}], {})
        self._offset = offset
        self._epsilon = config.number("rms_norm_eps", 1e-6, above=0, below=1)
        self._keys = config.integer("num_key_value_heads")
        if self.heads % self._keys:
            config.refuse("num_key_value_heads", f"a divisor of the {self.heads} heads")

    def model(self, layers: list[Layer], activation: str) -> Rotary:
        """The whole model, causal."""
        return Rotary(
            words=self.words("embed_tokens.weight"),
            norm=None,
            layers=layers,
            heads=self.heads,
            activation=activation,
            norm_first=True,
            final_norm=self.rms("norm"),
            causal=True,
            blocked=True,
        )

    def layer(
        self, number: int, theta: float, window: int | None, *, biases: bool, normed: bool,
        before_feed_forward: str = "post_attention_layernorm",
    ) -> Layer:  # fmt: skip
        """One layer; ``normed`` is whether queries and keys are normalised by head."""
        at, width, inner = f"layers.{number}.", self.width, self.inner
        query, key = self.heads * self.head, self._keys * self.head
        attention = f"{at}self_attn."
        return Layer(
            query=self.linear(f"{attention}q_proj", width, query, bias=biases),
            key=self.linear(f"{attention}k_proj", width, key, bias=biases),
            value=self.linear(f"{attention}v_proj", width, key, bias=biases),
            output=self.linear(f"{attention}o_proj", query, width, bias=biases),
            attention_norm=self.rms(f"{at}input_layernorm"),
            gate=self.linear(f"{at}mlp.gate_proj", width, inner, bias=False),
            up=self.linear(f"{at}mlp.up_proj", width, inner, bias=False),
            down=self.linear(f"{at}mlp.down_proj", inner, width, bias=False),
            norm=self.rms(f"{at}{before_feed_forward}"),
            theta=theta,
            window=window,
            query_norm=self.rms(f"{attention}q_norm", self.head) if normed else None,
            key_norm=self.rms(f"{attention}k_norm", self.head) if normed else None,
        )


def _qwen3(weights: Weights, config: Settings) -> Rotary:
    require_known(config, [*_SETTINGS, "attention_bias", "use_sliding_window", "max_window_layers"])
    config.only("use_sliding_window", [False], False)
    kinds_of(config, [FULL], lambda number: FULL)
    config.integer("head_dim")  # transformers' default is not the width divided by the heads
    return _uniform(weights, config, None, biases=config.flag("attention_bias", False), normed=True)


def _mistral(weights: Weights, config: Settings) -> Rotary:
    require_known(config, _SETTINGS)
    config.only("layer_types", [], None)
    # A token sees as many tokens, itself included; null is all.
    limited = config.get("sliding_window", 0) is not None
    window = config.integer("sliding_window", 4096) - 1 if limited else None
    return _uniform(weights, config, window, biases=False, normed=False)


def _uniform(
    weights: Weights, config: Settings, window: int | None, *, biases: bool, normed: bool
) -> Rotary:
    reader = _Decoder(weights, config)
    theta = config.number("rope_theta", 10_000.0, above=1, below=1e9)
    theta = theta_of(config, config.object("rope_parameters"), theta)
    layers = [
        reader.layer(number, theta, window, biases=biases, normed=normed)
        for number in range(reader.count)
    ]
    return reader.model(layers, config.only("hidden_act", ACTIVATIONS, "silu"))


def _gemma3(weights: Weights, config: Settings) -> Rotary:
    require_known(config, [*_SETTINGS, *_GEMMA3])
    config.only("attn_logit_softcapping", [], None)
    config.integer("head_dim")
    reader, ropes = _Decoder(weights, config, 1.0), config.object("rope_parameters")
    every = config.integer("sliding_window_pattern", 0, least=0)
    every = every or config.integer("_sliding_window_pattern", 6)
    kinds = kinds_of(config, [FULL, SLIDING], lambda n: SLIDING if (n + 1) % every else FULL)
    thetas = {
        kind: theta_of(config, ropes.object(kind), config.number(key, base, above=1, below=1e9))
        for kind, key, base in (
            (FULL, "rope_theta", 1_000_000.0), (SLIDING, "rope_local_base_freq", 10_000.0)
        )
    }  # fmt: skip
    both = config.flag("use_bidirectional_attention", False)
    window = config.integer("sliding_window", 4096)
    windows = {FULL: None, SLIDING: window // 2 if both else window - 1}
    # Scores are divided by the root of this, and not of the width of a head.
    scalar = config.number("query_pre_attn_scalar", 256, above=0, below=1e6)
    factor = np.float32((reader.head / scalar) ** 0.5)
    layers = []
    for number, kind in enumerate(kinds):
        layer = reader.layer(
            number, thetas[kind], windows[kind], biases=config.flag("attention_bias", False),
            normed=True, before_feed_forward="pre_feedforward_layernorm",
        )  # fmt: skip
        assert layer.query_norm is not None
        layer.query_norm.scale = layer.query_norm.scale * factor
        layer.attention_end = reader.rms(f"layers.{number}.post_attention_layernorm")
        layer.end = reader.rms(f"layers.{number}.post_feedforward_layernorm")
        layers.append(layer)
    activation = config.only("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")
    model = reader.model(layers, activation)
    model.words = model.words * np.float32(reader.width**0.5)
    model.causal = not both
    return model


#: T5's names of settings.
_KEYS = {"hidden_size": "d_model", "intermediate_size": "d_ff", "num_hidden_layers": "num_layers",
         "num_attention_heads": "num_heads", "head_dim": "d_kv"}  # fmt: skip
#: Settings that are read, or are about its decoder, generation and training.
_T5_SETTINGS = (
    *_KEYS.values(), "relative_attention_num_buckets", "relative_attention_max_distance",
    "layer_norm_epsilon", "feed_forward_proj", "dense_act_fn", "is_gated_act", "is_decoder",
    "is_encoder_decoder", "num_decoder_layers", "decoder_start_token_id", "scale_decoder_outputs",
    "dropout_rate", "initializer_factor", "n_positions", "task_specific_params",
)  # fmt: skip


class _T5(_Reader):
    """Reads the tensors of one."""

    def __init__(self, weights: Weights, config: Settings) -> None:
        super().__init__(weights, config, _KEYS, free=True)
        self._epsilon = config.number("layer_norm_epsilon", 1e-6, above=0, below=1)

    def layer(self, number: int, *, gated: bool) -> Layer:
        """One layer of the encoder."""
        at, inside = f"encoder.block.{number}.layer.", self.heads * self.head
        query, key, value = (
            self._plain(f"{at}0.SelfAttention.{name}", self.width, inside) for name in "qkv"
        )
        # Scores are not scaled here, and divided by the root of this in every graph.
        query.weight = query.weight * np.float32(self.head**0.5)
        wide = f"{at}1.DenseReluDense."
        gate = self._plain(f"{wide}wi_0", self.width, self.inner) if gated else None
        return Layer(
            query=query,
            key=key,
            value=value,
            output=self._plain(f"{at}0.SelfAttention.o", inside, self.width),
            attention_norm=self.rms(f"{at}0.layer_norm"),
            gate=gate,
            up=self._plain(f"{wide}wi_1" if gated else f"{wide}wi", self.width, self.inner),
            down=self._plain(f"{wide}wo", self.inner, self.width),
            norm=self.rms(f"{at}1.layer_norm"),
            theta=None,
        )

    def bias(self) -> Array:
        """The bias by head and distance."""
        count = self.config.integer("relative_attention_num_buckets", 32, least=4, most=10_000)
        most = self.config.integer("relative_attention_max_distance", 128, most=100_000)
        if count % 4 or most <= count // 4:
            self.config.refuse(
                "relative_attention_num_buckets",
                "a multiple of four, less than four times 'relative_attention_max_distance'",
            )
        name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return relative_bias(self.get(name, (count, self.heads)), most + 1, count, most)

    def _plain(self, name: str, inputs: int, outputs: int) -> Linear:
        return self.linear(name, inputs, outputs, bias=False)


def _t5(weights: Weights, config: Settings) -> Rotary:
    require_known(config, _T5_SETTINGS)
    config.only("is_decoder", [False], False)
    reader = _T5(weights, config)
    gated, activation = _feed_forward(config)
    # sentence-transformers saves the one, and T5 with its decoder has both.
    names = ("shared.weight", "encoder.embed_tokens.weight")
    return Rotary(
        words=reader.words(next((name for name in names if name in weights), names[0])),
        norm=None,
        layers=[reader.layer(number, gated=gated) for number in range(reader.count)],
        heads=reader.heads,
        activation=activation,
        norm_first=True,
        final_norm=reader.rms("encoder.final_layer_norm"),
        blocked=True,
        bias=reader.bias(),
    )


def _feed_forward(config: Settings) -> tuple[bool, str]:
    """Whether the feed-forward part has a gate, and its activation."""
    kinds = {
        **{name: (False, name) for name in ACTIVATIONS},
        **{f"gated-{name}": (True, name) for name in ACTIVATIONS},
        "gated-gelu": (True, "gelu_new"),
    }
    gated, activation = kinds[config.only("feed_forward_proj", kinds, "relu")]
    # transformers writes both beside it.
    config.only("is_gated_act", [gated], gated)
    config.only("dense_act_fn", [activation], activation)
    return gated, activation


READERS: Mapping[str, Callable[[Weights, Settings], Rotary]] = {
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma3_text": _gemma3,
    "t5": _t5,
}
