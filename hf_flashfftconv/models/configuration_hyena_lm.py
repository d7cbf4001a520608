"""Configuration of the Hyena language model."""

from typing import Any

from .configuration_hyenadna import HyenaDNAConfig


class HyenaLMConfig(HyenaDNAConfig):
    r"""Configuration of [`HyenaLMModel`]; the defaults are those of the published 150 M model of the Pile.

    It has the fields of [`HyenaDNAConfig`], where `use_bias` and `embed_dropout` take effect, and these:

    Args:
        modulate (`bool`, *optional*, defaults to `False`): Whether a decay window multiplies the filters.
        modulation_shift (`float`, *optional*, defaults to 0.0): Added to that window.
        train_pos_emb (`bool`, *optional*, defaults to `True`): Whether the position features of the filters are
            parameters.
        normalized (`bool`, *optional*, defaults to `False`): Whether each tap is divided by its l1 norm over channels.
        resid_dropout (`float`, *optional*, defaults to 0.0): Dropout on what a layer adds to the residual stream.

    Raises:
        ValueError: If a value is out of range or not supported.
    """

    model_type = "hyena_lm"
    apply_embed_dropout = True

    def __init__(
        self,
        vocab_size: int = 50257,
        d_model: int = 864,
        d_inner: int | None = 1728,
        n_layer: int = 18,
        max_seq_len: int = 2048,
        emb_dim: int = 33,
        activation_freq: float = 14,
        embed_dropout: float = 0.0,
        resid_dropout: float = 0.0,
        modulate: bool = False,
        modulation_shift: float = 0.0,
        train_pos_emb: bool = True,
        normalized: bool = False,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        self.modulate = modulate
        self.modulation_shift = modulation_shift
        self.train_pos_emb = train_pos_emb
        self.normalized = normalized
        self.resid_dropout = resid_dropout
        super().__init__(
            vocab_size=vocab_size,
            d_model=d_model,
            d_inner=d_inner,
            n_layer=n_layer,
            max_seq_len=max_seq_len,
            emb_dim=emb_dim,
            activation_freq=activation_freq,
            embed_dropout=embed_dropout,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @property
    def apply_bias(self) -> bool:
        return self.use_bias

    @property
    def block_norm_epsilon(self) -> float:
        return self.layer_norm_epsilon
