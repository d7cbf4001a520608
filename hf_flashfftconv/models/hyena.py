"""The Hyena operator (Poli et al. 2023, https://arxiv.org/abs/2302.10866), shared by all models of this package.

Everything here is plain PyTorch: the long convolution is a product of `torch.fft` spectra of twice the length.
Module and attribute names are those of the checkpoints on the Hub, which [`patch_model`] recognises.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.truncation import Truncation, kept_taps


def long_conv(x: torch.Tensor, k: torch.Tensor, skip: torch.Tensor, k_rev: torch.Tensor | None = None) -> torch.Tensor:
    """Causal convolution along the last dimension plus a skip connection, through the Fourier domain.

    `y[t] = sum_{s<=t} k[t-s] x[s] + sum_{s>t} k_rev[s-t-1] x[s] + skip * x[t]`; the second sum only with `k_rev`.

    Args:
        x (`torch.Tensor` of shape `(batch, channels, length)`): The signal.
        k (`torch.Tensor` of shape `(channels, taps)`): The causal taps, lag 0 first, at most `length`.
        skip (`torch.Tensor` of shape `(channels,)`): Weight of the signal itself.
        k_rev (`torch.Tensor` of shape `(channels, taps)`, *optional*): The anticausal taps, lag -1 first.

    Returns:
        `torch.Tensor`: Shape and dtype of `x`; computed in float32, or in float64 where an operand is float64.
    """
    if x.numel() == 0:
        return x.clone()
    length = x.shape[-1]
    fft_size = 2 * length
    dtype = torch.promote_types(torch.promote_types(x.dtype, k.dtype), torch.float32)
    taps = F.pad(k.to(dtype), (0, fft_size - k.shape[-1]))
    if k_rev is not None:
        taps = taps + F.pad(k_rev.to(dtype).flip(-1), (fft_size - k_rev.shape[-1], 0))
    spectrum = torch.fft.rfft(x.to(dtype), n=fft_size) * torch.fft.rfft(taps, n=fft_size)
    y = torch.fft.irfft(spectrum, n=fft_size)[..., :length]
    return (y + x * skip.unsqueeze(-1)).to(x.dtype)


def short_conv(channels: int, kernel_size: int) -> nn.Conv1d:
    """Depthwise convolution that is causal once its output is cut to the length of its input."""
    return nn.Conv1d(channels, channels, kernel_size, padding=kernel_size - 1, groups=channels)


class HyenaSin(nn.Module):
    """Sine activation with one frequency a channel, trainable or the constant `w`."""

    def __init__(self, channels: int, w: float, w_mod: float = 1, train_freq: bool = True):
        super().__init__()
        self.w = w
        self.w_mod = w_mod
        # A constant stays a number: a plain tensor attribute would be left on the meta device by `from_pretrained`.
        self.freq = nn.Parameter(torch.full((1, channels), float(w))) if train_freq else float(w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.w_mod * self.freq * x)


class HyenaPositionalEmbedding(nn.Module):
    """Time and complex exponentials of the positions `0 .. seq_len - 1`, the input of the filter network.

    Args:
        emb_dim (`int`): Features a position: time, then `(emb_dim - 1) / 2` cosines and as many sines.
        seq_len (`int`): Longest length; positions are normalised by it, so a shorter filter is a prefix.
        trainable (`bool`, *optional*, defaults to `False`): Whether the features `z` are a parameter.
    """

    t: torch.Tensor

    def __init__(self, emb_dim: int, seq_len: int, trainable: bool = False):
        super().__init__()
        self.emb_dim = emb_dim
        self.seq_len = seq_len
        z, t = self.table()
        if trainable:
            self.z = nn.Parameter(z)
        else:
            self.register_buffer("z", z)
        self.register_buffer("t", t)

    def table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the features `(1, seq_len, emb_dim)` and the times `(1, seq_len, 1)` in float32."""
        bands = (self.emb_dim - 1) // 2
        t = torch.linspace(0, 1, self.seq_len, dtype=torch.float32)[None, :, None]
        position = torch.linspace(0, self.seq_len - 1, self.seq_len, dtype=torch.float32)[None, :, None]
        angle = 2 * math.pi * position / self.seq_len
        f = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float32)[None, None]
        return torch.cat([t, torch.cos(f * angle), -torch.sin(f * angle)], dim=-1), t

    def forward(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        if length > self.seq_len:
            raise ValueError(
                f"The sequence length {length} exceeds {self.seq_len}, the longest that the filters of this model are "
                "defined for (`max_seq_len` or `long_conv_l_max` of its configuration)."
            )
        return self.z[:, :length], self.t[:, :length]


class HyenaExponentialModulation(nn.Module):
    """Window over the filter: exponential decays from slow (first channel) to fast (last channel), plus `shift`."""

    deltas: torch.Tensor

    def __init__(self, channels: int, modulate: bool = True, shift: float = 0.0):
        super().__init__()
        self.channels = channels
        self.modulate = modulate
        self.shift = shift
        self.register_buffer("deltas", self.table())

    def table(self) -> torch.Tensor:
        """Computes the decay rates `(1, 1, channels)` in float32."""
        target, slow, fast = math.log(1e-2), 1.5, 0.3
        return torch.linspace(target / slow, target / fast, self.channels, dtype=torch.float32)[None, None]

    def forward(self, t: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return h * (torch.exp(-t * self.deltas.abs()) + self.shift) if self.modulate else h


class HyenaFilter(nn.Module):
    """Implicit long filter: a small sine network of the position, times a decay (paper section 3.3).

    The network runs in the dtype of its weights, under autocast too.

    Args:
        channels (`int`): Number of filters.
        emb_dim (`int`): Features of a position, odd and at least 3.
        order (`int`): Width of the filter network.
        seq_len (`int`): Longest filter length.
        w (`float`): Initial frequency of the sines.
        w_mod (`float`, *optional*, defaults to 1): Constant factor of the frequencies.
        num_inner_mlps (`int`, *optional*, defaults to 2): Hidden layers after the first.
        train_freq (`bool`, *optional*, defaults to `True`): Whether the frequencies are trained.
        train_pos_emb (`bool`, *optional*, defaults to `False`): Whether the position features are trained.
        modulate (`bool`, *optional*, defaults to `True`): Whether the decay window applies.
        shift (`float`, *optional*, defaults to 0.0): Added to the decay window.
        normalized (`bool`, *optional*, defaults to `False`): Whether each tap is divided by its l1 norm over channels.
        use_bias (`bool`, *optional*, defaults to `True`): Whether the skip connection `bias` applies.
        bidirectional (`bool`, *optional*, defaults to `False`): Whether a second network gives anticausal taps.
        truncation (`Truncation`, *optional*): What is kept of the filters, so that sequences may exceed `seq_len`.
    """

    def __init__(
        self,
        channels: int,
        emb_dim: int,
        order: int,
        seq_len: int,
        w: float,
        w_mod: float = 1,
        num_inner_mlps: int = 2,
        train_freq: bool = True,
        train_pos_emb: bool = False,
        modulate: bool = True,
        shift: float = 0.0,
        normalized: bool = False,
        use_bias: bool = True,
        bidirectional: bool = False,
        truncation: Truncation | None = None,
    ):
        super().__init__()
        self.truncation = truncation
        self.d_model = channels
        self.emb_dim = emb_dim
        self.seq_len = seq_len
        self.normalized = normalized
        self.use_bias = use_bias
        self.bidirectional = bidirectional
        self.bias = nn.Parameter(torch.randn(channels))
        self.pos_emb = HyenaPositionalEmbedding(emb_dim, seq_len, train_pos_emb)
        # One activation serves every layer of both networks; checkpoints hold its frequencies once.
        sine = HyenaSin(order, w, w_mod, train_freq)

        def network() -> nn.Sequential:
            layers: list[nn.Module] = [nn.Linear(emb_dim, order), sine]
            for _ in range(num_inner_mlps):
                layers += [nn.Linear(order, order), sine]
            return nn.Sequential(*layers, nn.Linear(order, channels, bias=False))

        self.implicit_filter = network()
        if bidirectional:
            self.implicit_filter_rev = network()
        self.modulation = HyenaExponentialModulation(channels, modulate, shift)

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """The further names of the shared frequencies and the first one, which alone is saved (`{alias: name}`)."""
        first: dict[int, str] = {}
        named = [(name, p) for name, p in self.named_parameters(remove_duplicate=False) if name.endswith(".freq")]
        return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}

    def _taps(self, network: nn.Sequential, length: int) -> torch.Tensor:
        z, t = self.pos_emb(kept_taps(length, self.truncation))
        # Sines of high frequency do not survive bfloat16, and autocast would gain nothing on a network this small.
        device = z.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            h = self.modulation(t, network(z.to(network[0].weight.dtype)))
        if self.normalized:
            h = h / torch.linalg.vector_norm(h, ord=1, dim=-1, keepdim=True)
        return h if self.truncation is None else self.truncation.apply(h)

    def filter(self, length: int) -> torch.Tensor:
        """Returns the causal taps, shape `(1, length, channels)`, lag 0 first; raises `ValueError` if too long.

        There are fewer where the filters are truncated, and then no length is too long.
        """
        return self._taps(self.implicit_filter, length)

    def filter_rev(self, length: int) -> torch.Tensor:
        """Returns the anticausal taps, shape `(1, length, channels)`, lag -1 first."""
        return self._taps(self.implicit_filter_rev, length)

    def forward(
        self,
        x: torch.Tensor,
        length: int,
        k: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        k_rev: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Convolves `x` of shape `(batch, channels, length)` with its own filters or with the taps passed."""
        if k is None:
            k = self.filter(length)[0].transpose(0, 1)
            k_rev = self.filter_rev(length)[0].transpose(0, 1) if self.bidirectional else None
        skip = self.bias if bias is None else bias
        return long_conv(x, k, skip if self.use_bias else torch.zeros_like(skip), k_rev)


class HyenaOperator(nn.Module):
    """Hyena operator of order 2: `out_proj(x0 * conv(x1 * v))` with `x0, x1, v` short convolutions of projections.

    Args:
        d_model (`int`): Width of input and output.
        filter_fn (`HyenaFilter`): The long filter.
        short_filter_order (`int`, *optional*, defaults to 3): Taps of the short convolution.
        dropout (`float`, *optional*, defaults to 0.0): Dropout on the gated input of the long convolution.
    """

    def __init__(self, d_model: int, filter_fn: HyenaFilter, short_filter_order: int = 3, dropout: float = 0.0):
        super().__init__()
        self.d_model = d_model
        self.l_max = filter_fn.seq_len
        self.order = 2
        self.dropout = nn.Dropout(dropout)
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.short_filter = short_conv(3 * d_model, short_filter_order)
        self.filter_fn = filter_fn

    def forward(self, u: torch.Tensor, past: Any = None) -> torch.Tensor:
        """Mixes `u` of shape `(batch, length, d_model)` along its length, after what a `HyenaCacheLayer` holds."""
        if past is not None:
            return past.mix(self, u)
        length = u.shape[1]
        mixed = self.short_filter(self.in_proj(u).transpose(1, 2))[..., :length]
        x0, x1, v = mixed.split(self.d_model, dim=1)
        y = x0 * self.filter_fn(self.dropout(v * x1), length)
        return self.out_proj(y.transpose(1, 2))
