"""Qwen3, Mistral and Gemma3: language models whose token vectors are pooled.

Norms without a mean before each part, heads that share keys and values, and a token that sees those
before it alone, unless the model was trained to see all (EmbeddingGemma). As in ``rotary``, a
setting that is not known is refused. Sources: ``modeling_qwen3.py``, ``modeling_mistral.py`` and
``modeling_gemma3.py`` (``Gemma3TextModel``) of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from sbert_pg.encoder.blocks import ACTIVATIONS, Norm, require_known
from sbert_pg.encoder.files import Settings, Weights
from sbert_pg.encoder.rotary import (
    SETTINGS,
    Layer,
    Reader,
    Rotary,
    kinds_of,
    theta_of,
)

#: Settings of all of them that are read here, or say nothing about what is computed.
_SETTINGS = (*SETTINGS, "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling",
             "layer_types", "sliding_window", "hidden_act")  # fmt: skip
#: Further ones of Gemma3.
_GEMMA3 = ("attention_bias", "query_pre_attn_scalar", "final_logit_softcapping",
           "attn_logit_softcapping", "use_bidirectional_attention", "_sliding_window_pattern",
           "sliding_window_pattern", "rope_local_base_freq", "hidden_activation")  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"


class _Decoder(Reader):
    """Reads what the three have alike.

    Args:
        offset: added to the scales of all normalisations.
    """

    def __init__(self, weights: Weights, config: Settings, offset: float = 0.0) -> None:
        super().__init__(weights, config, free=True)
        config.only("rope_scaling", [{}], {})
        self._offset = offset
        self._epsilon = config.number("rms_norm_eps", 1e-6, above=0, below=1)
        self._keys = config.integer("num_key_value_heads")
        if self.heads % self._keys:
            config.refuse("num_key_value_heads", f"a divisor of the {self.heads} heads")

    def rms(self, name: str, size: int | None = None) -> Norm:
        """A normalisation without a mean; of the model's width by default."""
        scale = self.get(f"{name}.weight", (size or self.width,)) + np.float32(self._offset)
        return Norm(scale, np.zeros_like(scale), self._epsilon, centred=False)

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


READERS: Mapping[str, Callable[[Weights, Settings], Rotary]] = {
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma3_text": _gemma3,
}
