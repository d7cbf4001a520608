"""Building blocks of Monarch Mixer (Fu et al. 2023, https://arxiv.org/abs/2310.12109)."""

import torch
from torch import nn

from .configuration_m2_bert import M2BertConfig
from .hyena import HyenaFilter, short_conv


class MonarchMixerSequenceMixing(nn.Module):
    """Bidirectional gated long convolution, plus one of the layer's input without gates (paper section 4).

    The mixer of an M2-BERT layer; returns `(output, None)` as an attention layer would.
    """

    def __init__(self, config: M2BertConfig):
        super().__init__()
        self.d_model = config.hidden_size
        self.l_max = config.long_conv_l_max
        self.bidirectional = config.bidirectional
        self.residual_long_conv = config.residual_long_conv
        self.hyena_training_additions = config.hyena_training_additions

        def long_filter() -> HyenaFilter:
            return HyenaFilter(
                config.hidden_size,
                emb_dim=config.hyena_emb_dim,
                order=config.hyena_filter_order,
                seq_len=config.long_conv_l_max,
                w=config.hyena_w,
                w_mod=config.hyena_w_mod,
                train_pos_emb=True,
                bidirectional=config.bidirectional,
                truncation=config.truncation,
            )

        self.filter_fn = long_filter()
        if self.residual_long_conv:
            self.filter_fn2 = long_filter()
        self.in_linear = nn.Linear(self.d_model, 3 * self.d_model)
        self.out_linear = nn.Linear(self.d_model, self.d_model)
        if self.hyena_training_additions:
            self.act = nn.Identity()
            self.drop = nn.Dropout(0.0)
            self.layernorm = nn.LayerNorm(self.d_model)
        self.short_filter = short_conv(3 * self.d_model, 3)

    def forward(self, u: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Mixes `u` of shape `(batch, length, d_model)` along its length."""
        if self.hyena_training_additions:
            u = self.layernorm(u)
        length = u.shape[1]
        mixed = self.short_filter(self.in_linear(u).transpose(1, 2))[..., :length]
        x1, x2, v = mixed.split(self.d_model, dim=1)
        gated = v * x1
        if self.hyena_training_additions:
            gated = self.drop(gated)
        y = self.filter_fn(gated, length) * x2
        if self.residual_long_conv:
            y = y + self.filter_fn2(u.transpose(1, 2), length)
        y = y.transpose(1, 2)
        if self.hyena_training_additions:
            y = self.drop(self.act(y))
        return self.out_linear(y), None


class BlockdiagLinear(nn.Module):
    """Linear layer whose matrix is block-diagonal; `weight` has shape `(blocks, out / blocks, in / blocks)`."""

    def __init__(self, in_features: int, out_features: int, blocks: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(blocks, out_features // blocks, in_features // blocks))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks, _, width = self.weight.shape
        y = torch.einsum("...bi,boi->...bo", x.unflatten(-1, (blocks, width)), self.weight).flatten(-2)
        return y if self.bias is None else y + self.bias.to(y.dtype)
