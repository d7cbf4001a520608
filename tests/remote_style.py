"""Models in the style of the Hub's remote code: the published class and attribute names, in plain PyTorch.

The file stands alone, so that a test can also ship it as the modeling file of a repository (`write_repository`).
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, MaskedLMOutput


def fftconv(x: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    size = 2 * x.shape[-1]
    spectrum = torch.fft.rfft(k, n=size)
    if x.ndim > 3:
        spectrum = spectrum.unsqueeze(1)
    y = torch.fft.irfft(torch.fft.rfft(x.to(k.dtype), n=size) * spectrum, n=size)[..., : x.shape[-1]]
    return (y + x * bias.unsqueeze(-1)).to(x.dtype)


class Sin(nn.Module):
    def __init__(self, width: int, w: float):
        super().__init__()
        self.freq = nn.Parameter(w * torch.ones(1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x * self.freq)


class PositionalEmbedding(nn.Module):
    def __init__(self, length: int, trained: bool):
        super().__init__()
        t = torch.linspace(0, 1, length).view(1, -1, 1)
        # linspace, since it alone makes real tensors while transformers builds a model on the meta device.
        position = torch.linspace(0, length - 1, length).view(1, -1, 1)
        angle = 2 * math.pi * position / length * torch.linspace(1e-4, 1.0, 2)
        z = torch.cat([t, angle.cos(), -angle.sin()], dim=-1)
        self.register_buffer("t", t)
        if trained:
            self.z = nn.Parameter(z)
        else:
            self.register_buffer("z", z)

    def forward(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.z[:, :length], self.t[:, :length]


class ExponentialModulation(nn.Module):
    def __init__(self, channels: int, shift: float):
        super().__init__()
        self.shift = shift
        self.register_buffer("deltas", torch.linspace(-3.0, -15.0, channels).view(1, 1, -1))

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x * (self.shift + torch.exp(-self.deltas.abs() * t))


class HyenaFilter(nn.Module):
    """Filter of all families; `use_bias` is honoured, as in safari and M2, whose forward takes k_fwd and k_rev.

    `float32` is what HyenaDNA's later revisions do; all other code leaves the FFT in the dtype of the taps.
    """

    def __init__(self, channels: int, length: int, width: int = 8, trained: bool = False, **options: Any):
        super().__init__()
        self.use_bias = options.get("bias", True)
        self.normalized = options.get("normalized", False)
        self.bidirectional = options.get("bidirectional", False)
        self.float32 = options.get("float32", False)
        self.bias = nn.Parameter(torch.randn(channels))
        self.pos_emb = PositionalEmbedding(length, trained)
        sin = Sin(width, options.get("w", 10))

        def network() -> nn.Sequential:
            hidden = [nn.Linear(5, width), sin, nn.Linear(width, width), sin]
            return nn.Sequential(*hidden, nn.Linear(width, channels, bias=False))

        self.implicit_filter = network()
        if self.bidirectional:
            self.implicit_filter_rev = network()
        self.modulation = ExponentialModulation(channels, options.get("shift", 0.05))

    def _generate(self, network: nn.Sequential, length: int) -> torch.Tensor:
        z, t = self.pos_emb(length)
        h = self.modulation(t, network(z.to(network[0].weight.dtype)))
        return h / h.norm(p=1, dim=-1, keepdim=True) if self.normalized else h

    def filter(self, length: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._generate(self.implicit_filter, length)

    def filter_rev(self, length: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._generate(self.implicit_filter_rev, length)

    def forward(self, x: torch.Tensor, length: int, k: Any = None, bias: Any = None, k_rev: Any = None) -> torch.Tensor:
        bias = bias if self.use_bias else 0 * bias
        k = k.float() if self.float32 else k
        if k_rev is not None:
            # Taps beyond the input length sit at the negative lags of a circle of twice that length.
            size = 2 * length
            taps = F.pad(k, (0, size - length)) + F.pad(k_rev.flip(-1), (size - length, 0))
            y = torch.fft.irfft(torch.fft.rfft(x.to(k.dtype), n=size) * torch.fft.rfft(taps, n=size), n=size)
            return (y[..., :length] + x * bias.unsqueeze(-1)).to(x.dtype)
        return fftconv(x, k, bias)


class HyenaOperator(nn.Module):
    """HyenaDNA's operator, for any order; its first revision trains the positions and does not cast."""

    def __init__(self, d_model: int, l_max: int, order: int = 2, first_revision: bool = False, **options: Any):
        super().__init__()
        self.d_model, self.l_max, self.order = d_model, l_max, order
        width = (order + 1) * d_model
        self.dropout = nn.Dropout(options.get("dropout", 0.0))
        self.in_proj = nn.Linear(d_model, width)
        self.out_proj = nn.Linear(d_model, d_model)
        self.short_filter = nn.Conv1d(width, width, options.get("short_filter_order", 3), padding=2, groups=width)
        self.filter_fn = HyenaFilter(d_model * (order - 1), l_max, trained=first_revision, float32=not first_revision)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        length = min(u.shape[1], self.l_max)
        s = self.short_filter(self.in_proj(u).transpose(1, 2))[..., :length]
        *gates, v = s.split(self.d_model, dim=1)
        filters = self.filter_fn.filter(length)[0].transpose(0, 1).reshape(self.order - 1, self.d_model, length)
        biases = self.filter_fn.bias.reshape(self.order - 1, self.d_model)
        for step, gate in enumerate(reversed(gates[1:])):
            v = self.filter_fn(self.dropout(v * gate), length, k=filters[step], bias=biases[step])
        return self.out_proj((v * gates[0]).transpose(1, 2))


class HyenaDnaPositionalEmbedding(nn.Module):
    """Tables that are in no checkpoint, and are made again in the first call."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self._initialized = length, False
        self._build(None)

    def _build(self, device: torch.device | None) -> None:
        t = torch.linspace(0, 1, self.length, device=device).view(1, -1, 1)
        angle = 2 * math.pi * t * torch.linspace(1e-4, 1.0, 2, device=device)
        self.register_buffer("t", t, persistent=False)
        self.register_buffer("z", torch.cat([t, angle.cos(), -angle.sin()], dim=-1), persistent=False)

    def forward(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._initialized:
            self._build(device)
            self._initialized = True
        return self.z[:, :length], self.t[:, :length]


class HyenaDnaFilter(nn.Module):
    """Multimolecule's filter: a sine module of its own after each layer."""

    def __init__(self, channels: int, length: int, width: int = 8):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(channels))
        self.pos_emb = HyenaDnaPositionalEmbedding(length)
        hidden = [nn.Linear(5, width), Sin(width, 10), nn.Linear(width, width), Sin(width, 10)]
        self.implicit_filter = nn.Sequential(*hidden, nn.Linear(width, channels, bias=False))
        self.modulation = ExponentialModulation(channels, 0.05)

    def filter(self, L: int) -> torch.Tensor:
        weight = self.implicit_filter[0].weight
        z, t = self.pos_emb(L, device=weight.device)
        return self.modulation(t, self.implicit_filter(z.to(weight.dtype)))

    def forward(self, x: torch.Tensor, L: int, k: Any = None, bias: Any = None) -> torch.Tensor:
        return fftconv(x, k.float(), bias)


class HyenaDnaOperator(nn.Module):
    """Multimolecule's operator."""

    def __init__(self, d_model: int, l_max: int):
        super().__init__()
        self.d_model, self.l_max, self.order = d_model, l_max, 2
        self.dropout = nn.Dropout(0.0)
        self.in_proj, self.out_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.short_filter = nn.Conv1d(3 * d_model, 3 * d_model, 3, padding=2, groups=3 * d_model)
        self.filter_fn = HyenaDnaFilter(d_model, l_max)

    forward = HyenaOperator.forward


class Safari:
    """Namespace: safari's operator has the same name."""

    class HyenaOperator(nn.Module):
        def __init__(self, d_model: int, l_max: int, order: int = 2, dropout: float = 0.0, **options: Any):
            super().__init__()
            self.d_model, self.l_max, self.order = d_model, l_max, order
            self.num_heads = options.pop("num_heads", 1)
            self.num_blocks = options.pop("num_blocks", 1)
            self.inner_factor = options.pop("inner_factor", 1)
            self.outer_mixing = options.pop("outer_mixing", False)
            self.post_order_ffn = options.pop("post_order_ffn", False)
            self.return_state = options.pop("return_state", False)
            self.activation = options.pop("activation", nn.Identity())
            width = (order + 1) * d_model
            self.dropout = nn.Dropout(dropout)
            self.in_proj = nn.Linear(d_model, width)
            self.out_proj = nn.Linear(d_model, d_model)
            self.short_filter = nn.Conv1d(width, width, 4, padding=3, groups=width)
            self.filter_fn = HyenaFilter(d_model * (order - 1), l_max, trained=True, **options)

        def forward(self, u: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            length = min(u.shape[1], self.l_max)
            s = self.short_filter(self.in_proj(u).transpose(1, 2))[..., :length]
            # One head and one block: (batch, heads, channels, blocks, length).
            x0, x1, v = s[:, None, :, None].split(self.d_model, dim=2)
            k = self.filter_fn.filter(length)[0].transpose(0, 1)
            v = self.filter_fn(self.dropout(v * x1), length, k=k, bias=self.filter_fn.bias[None, :, None])
            y = self.out_proj(self.activation((v * x0)[:, 0, :, 0].transpose(1, 2)))
            return (y, None) if self.return_state else y


class MonarchMixerSequenceMixing(nn.Module):
    def __init__(self, d_model: int, l_max: int, dropout: float = 0.0, **flags: bool):
        super().__init__()
        self.d_model, self.l_max = d_model, l_max
        self.bidirectional = flags.get("bidirectional", False)
        self.residual_long_conv = flags.get("residual_long_conv", False)
        self.hyena_training_additions = flags.get("hyena_training_additions", False)
        options = {"trained": True, "shift": 0.0, "bidirectional": self.bidirectional}
        self.filter_fn = HyenaFilter(d_model, l_max, **options)
        self.filter_fn.flashfft = None
        if self.residual_long_conv:
            self.filter_fn2 = HyenaFilter(d_model, l_max, **options)
        self.in_linear = nn.Linear(d_model, 3 * d_model)
        self.out_linear = nn.Linear(d_model, d_model)
        if self.hyena_training_additions:
            self.act, self.drop, self.layernorm = nn.Identity(), nn.Dropout(dropout), nn.LayerNorm(d_model)
        self.short_filter = nn.Conv1d(3 * d_model, 3 * d_model, 3, groups=3 * d_model, padding=2)

    def _long_conv(self, filter_fn: HyenaFilter, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[-1]
        k = filter_fn.filter(length)[0].transpose(0, 1)
        k_rev = filter_fn.filter_rev(length)[0].transpose(0, 1) if self.bidirectional else None
        return filter_fn(x, length, k=k, bias=filter_fn.bias, k_rev=k_rev)

    def forward(self, u: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        if self.hyena_training_additions:
            u = self.layernorm(u)
        s = self.short_filter(self.in_linear(u).transpose(1, 2))[..., : u.shape[1]]
        x1, x2, v = s.split(self.d_model, dim=1)
        g = v * x1
        if self.hyena_training_additions:
            g = self.drop(g)
        y = self._long_conv(self.filter_fn, g) * x2
        if self.residual_long_conv:
            y = y + self._long_conv(self.filter_fn2, u.transpose(1, 2))
        y = y.transpose(1, 2)
        if self.hyena_training_additions:
            y = self.drop(self.act(y))
        return self.out_linear(y), None


class HyenaConfig(PreTrainedConfig):
    model_type = "hyenadna"

    def __init__(self, d_model: int = 16, n_layer: int = 2, max_seq_len: int = 66, vocab_size: int = 16, **kwargs: Any):
        self.d_model, self.n_layer, self.max_seq_len, self.vocab_size = d_model, n_layer, max_seq_len, vocab_size
        self.first_revision = kwargs.pop("first_revision", False)
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


class HyenaBlock(nn.Module):
    def __init__(self, config: HyenaConfig):
        super().__init__()
        self.mixer = HyenaOperator(config.d_model, config.max_seq_len, first_revision=config.first_revision)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.mlp = nn.Sequential(nn.Linear(config.d_model, 32), nn.GELU(), nn.Linear(32, config.d_model))
        self.norm2 = nn.LayerNorm(config.d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class HyenaDNAForCausalLM(PreTrainedModel):
    config_class = HyenaConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["HyenaBlock"]  # noqa: RUF012
    # What remote code written for transformers 4 has; version 5 wants a dictionary.
    _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012

    def __init__(self, config: HyenaConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList([HyenaBlock(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> CausalLMOutput:
        x = self.embeddings(input_ids)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x)
            else:
                x = layer(x)
        logits = self.lm_head(self.ln_f(x)).float()
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class BertConfig(PreTrainedConfig):
    model_type = "m2_bert"

    def __init__(self, hidden_size: int = 16, long_conv_l_max: int = 66, vocab_size: int = 16, **kwargs: Any):
        self.hidden_size, self.long_conv_l_max, self.vocab_size = hidden_size, long_conv_l_max, vocab_size
        self.n_layer = kwargs.pop("n_layer", 2)
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


class BertForMaskedLM(PreTrainedModel):
    """The weight of the head is that of the embedding, set in the constructor and declared nowhere."""

    config_class = BertConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["MonarchMixerSequenceMixing"]  # noqa: RUF012

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        flags = {"bidirectional": True, "residual_long_conv": True}
        mixers = [
            MonarchMixerSequenceMixing(config.hidden_size, config.long_conv_l_max, **flags)
            for _ in range(config.n_layer)
        ]
        self.attention = nn.ModuleList(mixers)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.decoder.weight = self.word_embeddings.weight
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> MaskedLMOutput:
        x = self.word_embeddings(input_ids)
        for mixer in self.attention:
            if self.gradient_checkpointing and self.training:
                y, _ = self._gradient_checkpointing_func(mixer.__call__, x)
            else:
                y, _ = mixer(x)
            x = F.layer_norm(x + y, x.shape[-1:])
        logits = self.decoder(x).float()
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


def build(model_class: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A model with weights large enough that filters, gates and outputs are of order 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(*args, **kwargs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def write_repository(folder: Path, model: PreTrainedModel) -> str:
    """Writes a repository of remote code with the weights of `model`, as the Hub's are laid out; returns its path."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, folder / "modeling_remote.py")
    model_class, config_class = type(model).__name__, type(model.config).__name__
    auto_class = "AutoModelForCausalLM" if "Causal" in model_class else "AutoModelForMaskedLM"
    auto_map = {"AutoConfig": f"modeling_remote.{config_class}", auto_class: f"modeling_remote.{model_class}"}
    config = model.config.to_dict() | {"auto_map": auto_map, "architectures": [model_class]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: p.clone() for name, p in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return str(folder)
