"""The encoder half of T5: sentence-t5, gtr-t5 and their kin.

A norm without a mean before each part, no biases, scores that are not scaled but to which a bias by
distance is added, the same in all layers, and a feed-forward part with a gate (T5 1.1) or without.
As in ``rotary``, a setting that is not known is refused. Source: ``modeling_t5.py``
(``T5EncoderModel``) of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from sbert_pg.encoder.blocks import ACTIVATIONS, Linear, Norm, relative_bias, require_known
from sbert_pg.encoder.files import Array, Settings, Weights
from sbert_pg.encoder.rotary import Layer, Reader, Rotary

#: T5's names of settings.
_KEYS = {"hidden_size": "d_model", "intermediate_size": "d_ff", "num_hidden_layers": "num_layers",
         "num_attention_heads": "num_heads", "head_dim": "d_kv"}  # fmt: skip
#: Settings that are read, or are about its decoder, generation and training.
_SETTINGS = (*_KEYS.values(), "relative_attention_num_buckets", "relative_attention_max_distance",
             "layer_norm_epsilon", "feed_forward_proj", "dense_act_fn", "is_gated_act",
             "is_decoder", "is_encoder_decoder", "num_decoder_layers", "decoder_start_token_id",
             "scale_decoder_outputs", "dropout_rate", "initializer_factor", "n_positions",
             "task_specific_params")  # fmt: skip


class _T5(Reader):
    """Reads the tensors of one."""

    def __init__(self, weights: Weights, config: Settings) -> None:
        super().__init__(weights, config, _KEYS, free=True)
        self._epsilon = config.number("layer_norm_epsilon", 1e-6, above=0, below=1)

    def rms(self, name: str) -> Norm:
        """A normalisation without a mean."""
        scale = self.get(f"{name}.weight", (self.width,))
        return Norm(scale, np.zeros_like(scale), self._epsilon, centred=False)

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
    require_known(config, _SETTINGS)
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


READERS: Mapping[str, Callable[[Weights, Settings], Rotary]] = {"t5": _t5}
