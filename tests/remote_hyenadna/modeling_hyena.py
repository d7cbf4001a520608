"""A model in the style of the Hub's HyenaDNA repositories: their class and attribute names, and their quirks.

One frequency parameter under three names, no tied-weight declaration (so that saving fails), no `generate`, no
`attention_mask`, FFT always in float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithNoAttention, CausalLMOutput, SequenceClassifierOutput

from .configuration_hyena import HyenaConfig


def fftconv(u, k, D):
    n = 2 * u.shape[-1]
    product = torch.fft.rfft(u.to(torch.float32), n=n) * (torch.fft.rfft(k.to(torch.float32), n=n) / n)
    y = torch.fft.irfft(product, n=n, norm="forward")[..., : u.shape[-1]]
    return (y + u * D.unsqueeze(-1)).to(u.dtype)


class HyenaSin(nn.Module):
    def __init__(self, config):
        super().__init__()
        freq = config.activation_freq * torch.ones(1, config.filter_order)
        self.freq = nn.Parameter(freq) if config.train_freq else freq

    def forward(self, x):
        return torch.sin(self.freq * x)


class HyenaPositionalEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.seq_len = config.max_seq_len
        bands = (config.emb_dim - 1) // 2
        t = torch.linspace(0, 1, self.seq_len)[None, :, None]
        angle = 2 * math.pi * torch.linspace(0, self.seq_len - 1, self.seq_len)[None, :, None] / self.seq_len
        phase = torch.linspace(1e-4, bands - 1, bands)[None, None] * angle
        self.register_buffer("z", torch.cat([t, torch.cos(phase), -torch.sin(phase)], dim=-1))
        self.register_buffer("t", t)

    def forward(self, L):
        return self.z[:, :L], self.t[:, :L]


class HyenaExponentialModulation(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.modulate = True
        self.shift = 0.05
        low, high = math.log(0.01) / 1.5, math.log(0.01) / 0.3
        self.register_buffer("deltas", torch.linspace(low, high, d_model)[None, None])

    def forward(self, t, x):
        return x * (torch.exp(-t * self.deltas.abs()) + self.shift)


class HyenaFilter(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.d_model = config.d_model
        self.use_bias = config.use_bias
        self.bias = nn.Parameter(torch.randn(self.d_model))
        self.dropout = nn.Dropout(config.hyena_filter_dropout)
        self.emb_dim = config.emb_dim
        self.seq_len = config.max_seq_len
        self.pos_emb = HyenaPositionalEmbedding(config)
        sine = HyenaSin(config)
        self.implicit_filter = nn.Sequential(nn.Linear(config.emb_dim, config.filter_order), sine)
        for _ in range(config.num_inner_mlps):
            self.implicit_filter.append(nn.Linear(config.filter_order, config.filter_order))
            self.implicit_filter.append(sine)
        self.implicit_filter.append(nn.Linear(config.filter_order, config.d_model, bias=False))
        self.modulation = HyenaExponentialModulation(config.d_model)
        self.normalized = False

    def filter(self, L, *args, **kwargs):
        z, t = self.pos_emb(L)
        return self.modulation(t, self.implicit_filter(z.to(self.implicit_filter[0].weight.dtype)))

    def forward(self, x, L, k=None, bias=None, *args, **kwargs):
        return fftconv(x, self.filter(L) if k is None else k, bias)


class HyenaOperator(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.d_model = config.d_model
        self.l_max = config.max_seq_len
        self.order = config.hyena_order
        width = config.d_model * (self.order + 1)
        self.dropout = nn.Dropout(config.hyena_dropout)
        self.in_proj = nn.Linear(self.d_model, width)
        self.out_proj = nn.Linear(self.d_model, self.d_model)
        self.short_filter = nn.Conv1d(width, width, config.short_filter_order, padding=2, groups=width)
        self.filter_fn = HyenaFilter(config)

    def forward(self, u):
        length = min(u.size(-2), self.l_max)
        mixed = self.short_filter(self.in_proj(u).transpose(1, 2))[..., :length]
        *gates, v = mixed.split(self.d_model, dim=1)
        k = self.filter_fn.filter(length)[0].transpose(0, 1).reshape(self.order - 1, self.d_model, length)
        bias = self.filter_fn.bias.reshape(self.order - 1, self.d_model)
        for o, gate in enumerate(reversed(gates[1:])):
            v = self.filter_fn(self.dropout(v * gate), length, k=k[o], bias=bias[o])
        return self.out_proj((v * gates[0]).transpose(1, 2))


class HyenaMlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.d_inner)
        self.fc2 = nn.Linear(config.d_inner, config.d_model)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class HyenaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mixer = HyenaOperator(config)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.mlp = HyenaMlp(config)
        self.norm2 = nn.LayerNorm(config.d_model)

    def forward(self, hidden_states):
        residual = hidden_states.to(torch.float32)
        residual = self.mixer(self.norm1(residual.to(self.norm1.weight.dtype))) + residual
        return self.mlp(self.norm2(residual.to(self.norm2.weight.dtype))) + residual.to(torch.float32)


def padded_vocab_size(config):
    return -(-config.vocab_size // config.pad_vocab_size_multiple) * config.pad_vocab_size_multiple


class HyenaEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(padded_vocab_size(config), config.d_model)

    def forward(self, input_ids):
        return self.word_embeddings(input_ids)


class HyenaLMBackbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = HyenaEmbeddings(config)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList([HyenaBlock(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False

    def forward(self, input_ids, inputs_embeds=None, output_hidden_states=False):
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        states = [hidden_states]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                hidden_states = self._gradient_checkpointing_func(layer.__call__, hidden_states)
            else:
                hidden_states = layer(hidden_states)
            states.append(hidden_states)
        states.append(self.ln_f(hidden_states.to(self.ln_f.weight.dtype)))
        return states[-1], states if output_hidden_states else None


class HyenaDNAPreTrainedModel(PreTrainedModel):
    config_class = HyenaConfig
    base_model_prefix = "hyena"
    supports_gradient_checkpointing = True
    _no_split_modules = ("HyenaBlock",)
    _keys_to_ignore_on_load_missing = (r"freq",)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


class HyenaDNAModel(HyenaDNAPreTrainedModel):
    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.backbone = HyenaLMBackbone(config)
        self.post_init()

    def forward(self, input_ids, inputs_embeds=None, output_hidden_states=None, return_dict=None):
        last, states = self.backbone(input_ids, inputs_embeds, output_hidden_states or self.config.output_hidden_states)
        return BaseModelOutputWithNoAttention(last_hidden_state=last, hidden_states=states)


class HyenaDNAForCausalLM(HyenaDNAPreTrainedModel):
    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.hyena = HyenaDNAModel(config)
        self.vocab_size = padded_vocab_size(config)
        self.lm_head = nn.Linear(config.d_model, self.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.hyena.backbone.embeddings.word_embeddings

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, inputs_embeds=None, labels=None, output_hidden_states=None, return_dict=None):
        outputs = self.hyena(input_ids, inputs_embeds, output_hidden_states, return_dict)
        logits = self.lm_head(outputs[0]).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class HyenaDNAForSequenceClassification(HyenaDNAPreTrainedModel):
    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.num_labels = config.num_labels
        self.hyena = HyenaDNAModel(config)
        self.score = nn.Linear(config.d_model, self.num_labels, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.hyena.backbone.embeddings.word_embeddings

    def forward(self, input_ids=None, inputs_embeds=None, labels=None, output_hidden_states=None, return_dict=None):
        outputs = self.hyena(input_ids, inputs_embeds, output_hidden_states, return_dict)
        last = torch.eq(input_ids, self.config.pad_token_id).long().argmax(-1) - 1
        logits = self.score(outputs[0])[torch.arange(len(input_ids)), last]
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
