"""Small language models around the mixers of `family_style`, for the ways in which models are used."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from family_style import H3, S4D, STU, FFTConv, HyenaCascade, LongConv, LongConvolution, ParallelHyenaFilter
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

WIDTH, L_MAX = 16, 66
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "stripedhyena": lambda: ParallelHyenaFilter(WIDTH),
    "evo2-hcl": lambda: HyenaCascade(WIDTH),
    "evo2-hcm": lambda: HyenaCascade(WIDTH, 128),
    "fla": lambda: LongConvolution(WIDTH, L_MAX),
    "s4d": lambda: S4D(WIDTH, transposed=False),
    "s4": lambda: FFTConv(WIDTH, L_MAX, transposed=False),
    "long-conv": lambda: LongConv(WIDTH, L_MAX, transposed=False),
    "h3": lambda: H3(WIDTH),
    "stu": lambda: STU(WIDTH, L_MAX),
}


class MixerConfig(PreTrainedConfig):
    model_type = "mixer_lm"

    def __init__(self, mixer: str = "stripedhyena", n_layer: int = 2, vocab_size: int = 16, **kwargs: Any):
        self.mixer, self.n_layer, self.vocab_size = mixer, n_layer, vocab_size
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


class MixerBlock(nn.Module):
    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(WIDTH), mixer
        self.in_proj = nn.Linear(WIDTH, 3 * WIDTH if hasattr(mixer, "short_filter_weight") else WIDTH)
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mixer(self.in_proj(self.norm(x)))
        y = y[0] if isinstance(y, tuple) else y
        return x + self.out_proj(F.layer_norm(y, y.shape[-1:]).to(x.dtype))


class MixerForCausalLM(PreTrainedModel):
    config_class = MixerConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["MixerBlock"]  # noqa: RUF012

    def __init__(self, config: MixerConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, WIDTH)
        self.layers = nn.ModuleList([MixerBlock(MIXERS[config.mixer]()) for _ in range(config.n_layer)])
        self.lm_head = nn.Linear(WIDTH, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> CausalLMOutput:
        x = self.embeddings(input_ids)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x)
            else:
                x = layer(x)
        logits = self.lm_head(x).float()
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def family_model(mixer: str, **config: Any) -> MixerForCausalLM:
    """A model of one family in eval mode, the same in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixerForCausalLM(MixerConfig(mixer, **config))
        with torch.no_grad():
            for parameter in (*model.lm_head.parameters(), *model.embeddings.parameters()):
                parameter.normal_()
            for layer in model.layers:
                layer.in_proj.weight.normal_(std=0.3)
        return model.eval()
