"""Configuration of HyenaDNA models."""

import json
import os
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..ops.truncation import Truncation


class HyenaDNAConfig(PreTrainedConfig):
    r"""Configuration of [`HyenaDNAModel`], with the fields and defaults of the Hub's `configuration_hyena.HyenaConfig`.

    Args:
        vocab_size (`int`, *optional*, defaults to 12): Number of tokens, see [`HyenaDNATokenizer`].
        d_model (`int`, *optional*, defaults to 256): Width of the hidden states; also called `hidden_size`.
        d_inner (`int`, *optional*, defaults to `4 * d_model`): Width of the feed-forward layers.
        use_bias (`bool`, *optional*, defaults to `True`): Unused, as on the Hub: the skip connection always applies.
        train_freq (`bool`, *optional*, defaults to `True`): Whether the frequencies of the filter network are trained.
        max_seq_len (`int`, *optional*, defaults to 1024): Longest input; filter positions are normalised by it.
        emb_dim (`int`, *optional*, defaults to 3): Features of a filter position, odd and at least 3.
        n_layer (`int`, *optional*, defaults to 12): Number of layers; also called `num_hidden_layers`.
        num_inner_mlps (`int`, *optional*, defaults to 2): Hidden layers of the filter network after the first.
        hyena_order (`int`, *optional*, defaults to 2): Order of the Hyena recurrence. Only 2 is supported.
        short_filter_order (`int`, *optional*, defaults to 3): Taps of the short convolution. Only 3 is supported.
        filter_order (`int`, *optional*, defaults to 64): Width of the filter network.
        activation_freq (`float`, *optional*, defaults to 1): Initial frequency of the sines in the filter network.
        embed_dropout (`float`, *optional*, defaults to 0.1): Unused, as on the Hub.
        hyena_dropout (`float`, *optional*, defaults to 0.0): Dropout between the input gate and the long convolution.
        hyena_filter_dropout (`float`, *optional*, defaults to 0.0): Unused, as on the Hub.
        filter_length (`int`, *optional*): Taps that are kept of each filter, all if not given. Sequences may then be
            longer than `max_seq_len`, at the cost of short filters: see [`patch_model`].
        filter_taper (`float`, *optional*, defaults to 0.0): Share of these taps over which a filter falls to zero.
        layer_norm_epsilon (`float`, *optional*, defaults to 1e-5): Epsilon of the last layer norm.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the initial weights.
        pad_vocab_size_multiple (`int`, *optional*, defaults to 8): The embedding has a multiple of this many rows.
        pad_token_id (`int`, *optional*, defaults to 4): Padding token.
        bos_token_id (`int`, *optional*): First token of a generated sequence.
        eos_token_id (`int`, *optional*): Token that ends generation.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): Whether the head shares the embedding.

    Raises:
        ValueError: If a value is out of range or not supported.
    """

    model_type = "hyenadna"
    # A cache is no prediction: Trainer would gather it.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "intermediate_size": "d_inner",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "max_seq_len",
    }

    # What the Hyena LM leaves open is fixed in HyenaDNA.
    modulate = True
    modulation_shift = 0.05
    train_pos_emb = False
    normalized = False
    apply_embed_dropout = False
    resid_dropout = 0.0

    def __init__(
        self,
        vocab_size: int = 12,
        d_model: int = 256,
        d_inner: int | None = None,
        use_bias: bool = True,
        train_freq: bool = True,
        max_seq_len: int = 1024,
        emb_dim: int = 3,
        n_layer: int = 12,
        num_inner_mlps: int = 2,
        hyena_order: int = 2,
        short_filter_order: int = 3,
        filter_order: int = 64,
        activation_freq: float = 1,
        embed_dropout: float = 0.1,
        hyena_dropout: float = 0.0,
        hyena_filter_dropout: float = 0.0,
        filter_length: int | None = None,
        filter_taper: float = 0.0,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        pad_vocab_size_multiple: int = 8,
        pad_token_id: int | None = 4,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.d_inner = d_inner
        self.use_bias = use_bias
        self.train_freq = train_freq
        self.max_seq_len = max_seq_len
        self.emb_dim = emb_dim
        self.n_layer = n_layer
        self.num_inner_mlps = num_inner_mlps
        self.hyena_order = hyena_order
        self.short_filter_order = short_filter_order
        self.filter_order = filter_order
        self.activation_freq = activation_freq
        self.embed_dropout = embed_dropout
        self.hyena_dropout = hyena_dropout
        self.hyena_filter_dropout = hyena_filter_dropout
        self.filter_length = filter_length
        self.filter_taper = filter_taper
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.pad_vocab_size_multiple = pad_vocab_size_multiple
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        if hyena_order != 2:
            raise ValueError(f"hyena_order={hyena_order} is not supported, only order 2 is.")
        if short_filter_order != 3:
            raise ValueError(f"short_filter_order={short_filter_order} is not supported, only 3 taps are.")
        super().__init__(**without_local_code(kwargs))
        # The names of `attribute_map` have taken effect by now.
        check_filter_fields(self.emb_dim, max_seq_len=self.max_seq_len)
        check_truncation(self.truncation, self.max_seq_len)
        if self.d_inner is None:
            self.d_inner = 4 * self.d_model

    @property
    def truncation(self) -> Truncation | None:
        """How the filters are cut."""
        return truncation_of(self)

    @classmethod
    def from_original_config(cls, config: dict[str, Any] | str | os.PathLike[str], **kwargs: Any) -> "HyenaDNAConfig":
        """Translates the configuration of a checkpoint trained with the authors' code (`safari`, `hyena-dna`).

        Args:
            config (`dict` or path): The model section of the training configuration, with its section `layer`, or a
                JSON file of it.
            kwargs: Further fields, which win.
        """
        original = config if isinstance(config, dict) else json.loads(Path(config).read_text())
        top = {key: original[key] for key in _ORIGINAL_FIELDS if key in original}
        layer = original.get("layer", {})
        renamed = {new: layer[old] for old, new in _ORIGINAL_LAYER_FIELDS.items() if old in layer}
        return cls(**{**top, **renamed, **kwargs})

    @property
    def apply_bias(self) -> bool:
        """Whether the skip connection of the long convolution applies."""
        return True

    @property
    def block_norm_epsilon(self) -> float:
        """Epsilon of the layer norms inside the blocks."""
        return 1e-5

    @property
    def padded_vocab_size(self) -> int:
        """`vocab_size` rounded up to a multiple of `pad_vocab_size_multiple`: the rows of the embedding."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


_ORIGINAL_FIELDS = (
    "d_model",
    "n_layer",
    "d_inner",
    "vocab_size",
    "resid_dropout",
    "embed_dropout",
    "layer_norm_epsilon",
    "pad_vocab_size_multiple",
)
# `local_order`, which some of these files hold, never reached the model: it has 3 taps all the same.
_ORIGINAL_LAYER_FIELDS = {
    "l_max": "max_seq_len",
    "emb_dim": "emb_dim",
    "filter_order": "filter_order",
    "order": "hyena_order",
    "short_filter_order": "short_filter_order",
    "num_inner_mlps": "num_inner_mlps",
    "w": "activation_freq",
    "dropout": "hyena_dropout",
    "bias": "use_bias",
    "modulate": "modulate",
    "shift": "modulation_shift",
    "normalized": "normalized",
}


def without_local_code(fields: dict[str, Any]) -> dict[str, Any]:
    """Drops references to code files beside the configuration, which saving a native model would not copy along."""
    auto_map = fields.pop("auto_map", None) or {}
    kept = {auto_class: target for auto_class, target in auto_map.items() if "--" in str(target)}
    return {**fields, "auto_map": kept} if kept else fields


def check_filter_fields(emb_dim: int, **lengths: int) -> None:
    """Raises `ValueError` for a number of position features or a length that no filter network can have."""
    if emb_dim < 3 or emb_dim % 2 == 0:
        raise ValueError(f"emb_dim={emb_dim} must be odd and at least 3: time, and as many cosines as sines.")
    for name, value in lengths.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


def truncation_of(config: Any) -> Truncation | None:
    """The truncation that the fields `filter_length` and `filter_taper` describe; raises `ValueError` as it does."""
    if config.filter_length is None:
        if config.filter_taper != 0:
            raise ValueError(f"filter_taper={config.filter_taper} needs a filter_length.")
        return None
    return Truncation(config.filter_length, config.filter_taper)


def check_truncation(truncation: Truncation | None, longest: int) -> None:
    """Raises `ValueError` for a filter that would keep more taps than it has."""
    if truncation is not None and truncation.length > longest:
        raise ValueError(f"filter_length={truncation.length} exceeds {longest}, all taps that the filters have.")
