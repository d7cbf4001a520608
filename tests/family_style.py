"""Mixers in the style of further public code: the published class and attribute names, in plain PyTorch."""

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Pair = tuple[torch.Tensor, Any]


def circular(x: torch.Tensor, k: torch.Tensor, size: int) -> torch.Tensor:
    y = torch.fft.irfft(torch.fft.rfft(x.float(), n=size) * torch.fft.rfft(k.float(), n=size), n=size)
    return y[..., : x.shape[-1]]


class HyenaInferenceEngine:
    """The part that is no module; Evo 2's has more arguments and computes in float32."""

    def __init__(self, float32: bool = False):
        self.float32 = float32

    def parallel_fir(
        self,
        fir_fn: Any,
        u: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        L: int,
        dims: Any = None,
        fir_length: int = 3,
        inference_params: Any = None,
        padding_mask: Any = None,
    ) -> Pair:
        u = u.permute(0, 2, 1)
        x, w = (u.float(), weight.float()) if self.float32 else (u, weight)
        z = fir_fn(x, w, bias=None, stride=1, padding=fir_length - 1, groups=u.shape[1])[..., :L].to(u.dtype)
        if bias is not None:
            z = z + bias[None, :, None]
        if type(padding_mask) is torch.Tensor:
            z = z * padding_mask[:, None]
        return z, None if inference_params is None else u[..., -fir_length + 1 :]

    def parallel_iir(self, x2: torch.Tensor, g: torch.Tensor, h: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
        return (circular(g, h, 2 * g.shape[-1]).to(g.dtype) + g * D.unsqueeze(-1)) * x2


def state_of(log_poles: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    state = torch.zeros(*g.shape[:2], log_poles.shape[1], dtype=log_poles.dtype, device=g.device)
    for t in range(g.shape[-1]):
        state = state * log_poles.exp() + g[..., t, None]
    return state


def step_fir(u: torch.Tensor, state: torch.Tensor, weight: torch.Tensor) -> Pair:
    """One position of a convolution with taps (channels, K), the last tap for the newest; and the next state."""
    window = torch.cat([state, u[..., None]], dim=-1)
    y = (window * weight[:, -window.shape[-1] :]).sum(-1)
    return y, window[..., -weight.shape[1] + 1 :]


def by_heads(z: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    batch, channels, length = z.shape
    z = z.reshape(batch, heads, channels // heads, length)
    return tuple(part.reshape(batch, channels // 3, length) for part in z.chunk(3, dim=2))


class ParallelHyenaFilter(nn.Module):
    def __init__(self, hidden_size: int, heads: int = 2, state_size: int = 3, **options: Any):
        super().__init__()
        self.config = {"prefill_style": "fft"}
        self.hidden_size, self.num_attention_heads, self.state_size = hidden_size, heads, state_size
        self.layer_idx = 0
        self.hyena_filter_groups = options.pop("groups", 1)
        self.column_split_hyena = options.pop("column_split_hyena", True)
        self.use_flashfft = options.pop("use_flashfft", False)
        self.long_fir_threshold = options.pop("long_fir_threshold", None)
        self.short_filter_length = 3
        self.D = nn.Parameter(torch.randn(hidden_size))
        self.short_filter_weight = nn.Parameter(torch.randn(3 * hidden_size, 1, 3))
        self.short_filter_bias = nn.Parameter(torch.randn(3 * hidden_size))
        self.engine = HyenaInferenceEngine()
        self.fir_fn = F.conv1d
        angle, radius = (2 * torch.rand(2, hidden_size, state_size, 1) - 1).unbind()
        radius = 0.7 + 0.25 * radius
        self.poles = nn.Parameter(torch.stack([radius * angle.mul(3).cos(), radius * angle.mul(3).sin()], -1))
        self.residues = nn.Parameter(torch.randn(hidden_size, state_size, 1, 2))
        self.h = None

    def forward(self, u: torch.Tensor, inference_params: Any = None, padding_mask: Any = None) -> Pair:
        if inference_params is not None and self.layer_idx in inference_params.fir_state_dict:
            return self.step(u[:, -1], inference_params)
        fir = (self.fir_fn, u, self.short_filter_weight, self.short_filter_bias, u.shape[1])
        options = {"inference_params": inference_params, "padding_mask": padding_mask}
        z, state = self.engine.parallel_fir(*fir, fir_length=3, **options)
        x2, x1, v = self.split(z)
        h = self.compute_filter(u.shape[1]) if self.h is None else self.h
        if inference_params is not None:
            inference_params.fir_state_dict[self.layer_idx] = state
            log_poles = torch.view_as_complex(self.poles.float())[..., 0].log()
            inference_params.state_dict[self.layer_idx] = state_of(log_poles, x1 * v)
        return self.engine.parallel_iir(x2, x1 * v, h, self.D).permute(0, 2, 1), inference_params

    def split(self, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return by_heads(z, self.num_attention_heads) if self.column_split_hyena else z.chunk(3, dim=1)

    def step(self, u: torch.Tensor, params: Any) -> Pair:
        fir, iir = params.fir_state_dict, params.state_dict
        z, fir[self.layer_idx] = step_fir(u, fir[self.layer_idx], self.short_filter_weight[:, 0])
        x2, x1, v = (x[..., 0] for x in self.split((z + self.short_filter_bias)[..., None]))
        poles, residues = (torch.view_as_complex(x.float())[..., 0] for x in (self.poles, self.residues))
        iir[self.layer_idx] = poles * iir[self.layer_idx] + (x1 * v)[..., None]
        y = x2 * ((residues * iir[self.layer_idx]).sum(-1).real + self.D * x1 * v)
        return y[:, None], params

    def compute_filter(self, length: int) -> torch.Tensor:
        self.t = torch.arange(length, device=self.D.device)[None, None]
        log_poles = torch.view_as_complex(self.poles.float()).log()
        return (torch.view_as_complex(self.residues.float()) * (log_poles * self.t).exp()).real.sum(1)


class HyenaCascade(nn.Module):
    """hcl without `taps`, hcm from 128 taps, hcs below."""

    def __init__(self, hidden_size: int, taps: int | None = None, groups: int = 4, heads: int = 2, **options: Any):
        super().__init__()
        self.config = {"interleave": options.pop("interleave", True)}
        self.hidden_size, self.num_attention_heads, self.state_size = hidden_size, heads, 3
        self.hidden_size_per_attention_head = hidden_size // heads
        self.hyena_filter_groups = hidden_size if taps is None else groups
        self.layer_idx, self.fir_inner_filter_length, self.short_filter_length = 0, taps, 3
        self.column_split_hyena = options.pop("column_split_hyena", False)
        self.hyena_flip_x1x2 = options.pop("hyena_flip_x1x2", False)
        self.use_flashfft, self.long_fir_threshold = False, None
        self.print_activations = options.pop("print_activations", False)
        self.short_filter_weight = nn.Parameter(torch.randn(3 * hidden_size, 1, 3))
        self.short_filter_bias = None
        self.engine = HyenaInferenceEngine(float32=True)
        self.fir_fn = self.fir_inner_fn = F.conv1d
        self.D = None
        if taps is None or taps >= 128:
            self.D = nn.Parameter(torch.randn(hidden_size))
        if taps is None:
            self.log_poles = nn.Parameter(-torch.rand(hidden_size, 3, 1))
            self.residues = nn.Parameter(torch.randn(hidden_size, 3))
            self.h = None
        else:
            self.h = nn.Parameter(torch.randn(groups, 1, taps) / taps**0.5)

    def forward(self, u: torch.Tensor, inference_params: Any = None, padding_mask: Any = None) -> Pair:
        if inference_params is not None and self.layer_idx in inference_params.fir_state_dict:
            return self.step(u[:, -1], inference_params)
        length = u.shape[1]
        fir = (self.fir_fn, u, self.short_filter_weight, self.short_filter_bias, length)
        options = {"inference_params": inference_params, "padding_mask": padding_mask}
        z, state = self.engine.parallel_fir(*fir, dims=(), fir_length=3, **options)
        x2, x1, v = self.split(z)
        g = x1 * v
        if inference_params is not None:
            inference_params.fir_state_dict[self.layer_idx] = state
            if self.h is None:
                inference_params.state_dict[self.layer_idx] = state_of(self.log_poles.float()[..., 0], g)
            else:
                inference_params.fir_inner_state_dict[self.layer_idx] = g[..., -self.fir_inner_filter_length + 1 :]
        if self.h is None:
            t = torch.arange(length, device=u.device)
            h = (self.residues.float()[..., None] * (self.log_poles.float() * t).exp()).sum(1)
            return self.engine.parallel_iir(x2, g, h, self.D).permute(0, 2, 1), inference_params
        h = self.taps()
        if self.D is None:
            y = self.fir_inner_fn(g.float(), h[:, None], padding=h.shape[-1] - 1, groups=self.hidden_size)[..., :length]
        else:
            y = circular(g, h[:, :length], 2 * length) + g.float() * self.D.unsqueeze(-1)
        y = y.to(g.dtype)
        if type(padding_mask) is torch.Tensor:
            y = y * padding_mask[:, None]
        return (x2 * y).permute(0, 2, 1), inference_params

    def taps(self) -> torch.Tensor:
        return self.h[:, 0].float().repeat_interleave(self.hidden_size // self.hyena_filter_groups, 0)

    def split(self, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.config["interleave"]:
            z = torch.cat([z[:, 0::3], z[:, 1::3], z[:, 2::3]], dim=1)
        x2, x1, v = by_heads(z, self.num_attention_heads) if self.column_split_hyena else z.chunk(3, dim=1)
        return (x1, x2, v) if self.hyena_flip_x1x2 else (x2, x1, v)

    def step(self, u: torch.Tensor, params: Any) -> Pair:
        fir, inner, iir = params.fir_state_dict, params.fir_inner_state_dict, params.state_dict
        z, fir[self.layer_idx] = step_fir(u, fir[self.layer_idx], self.short_filter_weight[:, 0])
        x2, x1, v = (x[..., 0] for x in self.split(z[..., None]))
        g = x1 * v
        if self.h is None:
            iir[self.layer_idx] = self.log_poles[..., 0].exp() * iir[self.layer_idx] + g[..., None]
            return (x2 * ((self.residues * iir[self.layer_idx]).sum(-1) + self.D * g))[:, None], params
        taps = self.taps() if self.D is None else self.taps().flip(-1)
        y, inner[self.layer_idx] = step_fir(g, inner[self.layer_idx], taps)
        return (x2 * (y if self.D is None else y + self.D * g))[:, None], params


class LongConvolution(nn.Module):
    def __init__(self, hidden_size: int, max_len: int):
        super().__init__()
        self.hidden_size = hidden_size
        self.filter = nn.Parameter(torch.randn(hidden_size, max_len) / 4)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = x.transpose(1, 2)
        return (circular(x, self.filter, 2 * x.shape[-1]) + x).to(x.dtype).transpose(1, 2)


class Positions(nn.Module):
    def __init__(self, length: int):
        super().__init__()
        t = torch.linspace(0, 1, length)[None, :, None]
        self.z = nn.Parameter(torch.cat([t, t.mul(6).cos(), t.mul(6).sin()], dim=-1), requires_grad=False)

    def forward(self, length: int) -> torch.Tensor:
        return self.z[:, :length]


class ImplicitLongConvolution(nn.Module):
    def __init__(self, hidden_size: int, max_len: int):
        super().__init__()
        self.hidden_size = hidden_size
        self.pos_emb = Positions(max_len)
        self.mlp = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, hidden_size))

    def filter(self, seq_len: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.mlp(self.pos_emb(seq_len)).transpose(1, 2)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = x.transpose(1, 2)
        return (circular(x, self.filter(x.shape[-1]), 2 * x.shape[-1]) + x).to(x.dtype).transpose(1, 2)


class DiagonalKernel(nn.Module):
    """S4D's kernel; `channels` of them where a layer asks for several, in a pair with the state of a stream."""

    def __init__(self, width: int, channels: int | None = None):
        super().__init__()
        self.channels = channels
        self.log_dt = nn.Parameter(torch.rand(width) - 3)
        self.C = nn.Parameter(torch.randn(channels or 1, width, 4, 2))
        self.log_A_real = nn.Parameter(torch.zeros(width, 4))
        self.A_imag = nn.Parameter(math.pi * torch.arange(4.0).repeat(width, 1))

    def forward(self, L: int, rate: float = 1.0, state: Any = None) -> Any:
        dtA = (-self.log_A_real.exp() + 1j * self.A_imag) * self.log_dt.exp()[:, None]
        powers = torch.exp(dtA[..., None] * torch.arange(L, device=dtA.device))
        k = 2 * torch.einsum("chn,hnl->chl", torch.view_as_complex(self.C), powers).real
        return k[0] if self.channels is None else (k, None)


class S4D(nn.Module):
    def __init__(self, d_model: int, dropout: float = 0.0, transposed: bool = True):
        super().__init__()
        self.h, self.transposed = d_model, transposed
        self.D = nn.Parameter(torch.randn(d_model))
        self.kernel = DiagonalKernel(d_model)
        self.activation, self.dropout = nn.GELU(), nn.Dropout(dropout)
        self.output_linear = nn.Sequential(nn.Conv1d(d_model, 2 * d_model, 1), nn.GLU(dim=-2))

    def forward(self, u: torch.Tensor, **kwargs: Any) -> Pair:
        u = u if self.transposed else u.transpose(-1, -2)
        y = circular(u, self.kernel(L=u.shape[-1]), 2 * u.shape[-1]) + u * self.D.unsqueeze(-1)
        y = self.output_linear(self.dropout(self.activation(y)))
        return (y if self.transposed else y.transpose(-1, -2)), None


def on_circle(k: torch.Tensor, x: torch.Tensor, taps: int, bidirectional: bool) -> torch.Tensor:
    """Channels of filters on x, (batch, filters, channels, length)."""
    length = x.shape[-1]
    if bidirectional:
        forward, backward = k.chunk(2)
        k = F.pad(forward, (0, length)) + F.pad(backward.flip(-1), (length, 0))
    return circular(x[:, None], k, taps + length)


class FFTConv(nn.Module):
    def __init__(self, d_model: int, l_max: int | None = None, channels: int = 1, **options: Any):
        super().__init__()
        self.d_model, self.L, self.l_max, self.channels = d_model, l_max, l_max, channels
        self.bidirectional = options.pop("bidirectional", False)
        self.transposed = options.pop("transposed", True)
        self.D = nn.Parameter(torch.randn(channels, d_model))
        self.kernel = DiagonalKernel(d_model, (1 + self.bidirectional) * channels)
        self.activation, self.drop = nn.GELU(), nn.Dropout(options.pop("dropout", 0.0))
        self.drop_kernel = nn.Dropout(options.pop("drop_kernel", 0.0))

    def forward(self, x: torch.Tensor, state: Any = None, rate: float = 1.0, **kwargs: Any) -> Pair:
        x = x if self.transposed else x.transpose(-1, -2)
        taps = x.shape[-1] if self.L is None else min(x.shape[-1], round(self.L / rate))
        k = self.drop_kernel(self.kernel(L=taps, rate=rate, state=state)[0])
        y = on_circle(k, x, taps, self.bidirectional) + x[:, None] * self.D[..., None]
        y = self.drop(y.flatten(1, 2))
        return self.activation(y if self.transposed else y.transpose(-1, -2)), None


class SquashedKernel(nn.Module):
    def __init__(self, channels: int, width: int, length: int, dropout: float):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, width, length))
        self.drop = nn.Dropout(dropout)

    def forward(self, **kwargs: Any) -> Pair:
        return self.drop(F.relu(self.kernel.abs() - 0.1) * self.kernel.sign()), None


class LongConv(nn.Module):
    def __init__(self, d_model: int, l_max: int, channels: int = 1, **options: Any):
        super().__init__()
        self.d_model, self.L, self.channels = d_model, l_max, channels
        self.bidirectional = options.pop("bidirectional", False)
        self.transposed = options.pop("transposed", True)
        self.block_fft_conv = options.pop("block_fft_conv", False)
        self.D = nn.Parameter(torch.randn(channels, d_model))
        kernel_dropout = options.pop("kernel_dropout", 0.0)
        self.kernel = SquashedKernel((1 + self.bidirectional) * channels, d_model, l_max, kernel_dropout)
        self.activation, self.dropout = nn.GELU(), nn.Dropout(options.pop("dropout", 0.0))
        self.output_linear = nn.Conv1d(d_model, d_model, 1) if self.transposed else nn.Linear(d_model, d_model)

    def forward(self, u: torch.Tensor, state: Any = None, rate: float = 1.0, lengths: Any = None, **kw: Any) -> Pair:
        u = u if self.transposed else u.transpose(-1, -2)
        if lengths is not None:
            u = u * (torch.arange(u.shape[-1], device=u.device) < lengths[:, None, None])
        taps = min(u.shape[-1], round(self.L / rate))
        y = on_circle(self.kernel(L=taps, rate=rate, state=state)[0], u, taps, self.bidirectional)
        y = (y + u[:, None] * self.D[..., None]).flatten(1, 2)
        return self.output_linear(self.dropout(self.activation(y if self.transposed else y.transpose(-1, -2)))), None


class ShiftKernel(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.C = nn.Parameter(torch.randn(1, width, 3))

    def forward(self, L: int, rate: float = 1.0, state: Any = None) -> Pair:
        return F.pad(self.C, (0, max(L - 3, 0)))[..., :L], None


class H3(nn.Module):
    def __init__(self, d_model: int, head_dim: int = 1, l_max: int | None = None, use_fast_fftconv: bool = False):
        super().__init__()
        self.d_model, self.head_dim, self.H, self.L = d_model, head_dim, d_model // head_dim, l_max
        self.layer_idx, self.use_fast_fftconv = 0, use_fast_fftconv
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model) for _ in range(3))
        self.ssm_k_kernel, self.ssm_k_D = ShiftKernel(d_model), nn.Parameter(torch.randn(d_model))
        self.kernel, self.D = DiagonalKernel(self.H, 1), nn.Parameter(torch.randn(self.H))
        self.output_linear = nn.Linear(d_model, d_model)

    def forward(self, u: torch.Tensor, inference_params: Any = None) -> torch.Tensor:
        if inference_params is not None:
            inference_params[self.layer_idx] = u[:, -1]
        batch, length, _ = u.shape
        taps = length if self.L is None else min(length, self.L)
        q, k, v = ((p.weight @ u.transpose(1, 2)) + p.bias[:, None] for p in (self.q_proj, self.k_proj, self.v_proj))
        k = circular(k, self.ssm_k_kernel(L=taps)[0][0], taps + length) + self.ssm_k_D[:, None] * k
        q, k, v = (x.reshape(batch, self.H, self.head_dim, length).transpose(1, 2) for x in (q, k, v))
        kv = k[:, :, None] * v[:, None]
        y = circular(kv, self.kernel(L=taps)[0][0], taps + length) + kv * self.D[:, None]
        y = (y * q[:, :, None]).sum(1).flatten(1, 2)
        return self.output_linear(y.transpose(1, 2).to(self.output_linear.weight.dtype))


class STU(nn.Module):
    def __init__(self, width: int, seq_len: int, **options: Any):
        super().__init__()
        self.config = SimpleNamespace(seq_len=seq_len)
        # A table of no checkpoint: like linspace, it is the same on every build.
        self.phi = (torch.linspace(0, 9, seq_len)[:, None] * torch.linspace(1, 3, 3) + 1).sin()
        self.n = options.pop("n", 4 * seq_len)
        self.K, self.d_in, self.d_out = 3, width, width
        self.use_hankel_L = options.pop("use_hankel_L", False)
        self.use_approx = options.pop("use_approx", True)
        self.flash_fft = options.pop("flash_fft", None)
        self.M_inputs = nn.Parameter(torch.randn(width, width))
        self.M_filters = nn.Parameter(torch.randn(3, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        u, k = (x @ self.M_inputs).transpose(1, 2), (self.phi @ self.M_filters).transpose(0, 1)
        sign = (-1.0) ** torch.arange(length, device=x.device)
        y = circular(u, k, self.n)
        return (y if self.use_hankel_L else y + circular(u * sign, k, self.n) * sign).transpose(1, 2)
