"""Configuration in the style of the Hub's HyenaDNA repositories."""

from transformers import PretrainedConfig

DEFAULTS = {
    "vocab_size": 12,
    "d_model": 256,
    "d_inner": None,
    "use_bias": True,
    "train_freq": True,
    "max_seq_len": 1024,
    "emb_dim": 3,
    "n_layer": 12,
    "num_inner_mlps": 2,
    "hyena_order": 2,
    "short_filter_order": 3,
    "filter_order": 64,
    "activation_freq": 1,
    "embed_dropout": 0.1,
    "hyena_dropout": 0.0,
    "hyena_filter_dropout": 0.0,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "pad_vocab_size_multiple": 8,
}


class HyenaConfig(PretrainedConfig):
    model_type = "hyenadna"

    def __init__(self, **kwargs):
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        self.d_inner = self.d_inner or 4 * self.d_model
        super().__init__(**kwargs)
