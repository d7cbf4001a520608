"""Whole language models of every family that can be patched, for the ways in which models are used."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_style import (
    H3,
    S4D,
    STU,
    FFTConv,
    HyenaCascade,
    ImplicitLongConvolution,
    LongConv,
    LongConvolution,
    ParallelHyenaFilter,
)
from model_factory import dna_ids, tiny_hyena, tiny_hyenadna, tiny_m2bert
from remote_style import (
    BertConfig,
    BertForMaskedLM,
    HyenaConfig,
    HyenaDNAForCausalLM,
    HyenaDnaOperator,
    HyenaOperator,
    Safari,
    build,
)
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hf_flashfftconv.adapters.swap import is_patched

WIDTH, L_MAX = 16, 66
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "hyena": lambda: HyenaOperator(WIDTH, L_MAX),
    "multimolecule": lambda: HyenaDnaOperator(WIDTH, L_MAX),
    "safari": lambda: Safari.HyenaOperator(WIDTH, L_MAX),
    "stripedhyena": lambda: ParallelHyenaFilter(WIDTH),
    "evo2-hcl": lambda: HyenaCascade(WIDTH),
    "evo2-hcm": lambda: HyenaCascade(WIDTH, 128),
    "evo2-hcs": lambda: HyenaCascade(WIDTH, 7),
    "fla": lambda: LongConvolution(WIDTH, L_MAX),
    "fla-implicit": lambda: ImplicitLongConvolution(WIDTH, L_MAX),
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
        super().__init__(**{"tie_word_embeddings": False, "pad_token_id": 4, **kwargs})


class MixerBlock(nn.Module):
    def __init__(self, mixer: nn.Module, index: int):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(WIDTH), mixer
        mixer.layer_idx = index
        self.in_proj = nn.Linear(WIDTH, 3 * WIDTH if hasattr(mixer, "short_filter_weight") else WIDTH)
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, inference_params: Any = None) -> torch.Tensor:
        state = {} if inference_params is None else {"inference_params": inference_params}
        y = self.mixer(self.in_proj(self.norm(x)), **state)
        y = y[0] if isinstance(y, tuple) else y
        return x + self.out_proj(F.layer_norm(y, y.shape[-1:]).to(x.dtype))


class MixerForCausalLM(PreTrainedModel, GenerationMixin):
    """Around any mixer; PlantGFM and the EHR models are other models around HyenaDNA's."""

    config_class = MixerConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["MixerBlock"]  # noqa: RUF012

    def __init__(self, config: MixerConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, WIDTH)
        self.layers = nn.ModuleList([MixerBlock(MIXERS[config.mixer](), i) for i in range(config.n_layer)])
        self.lm_head = nn.Linear(WIDTH, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        inference_params: Any = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput:
        x = self.embeddings(input_ids)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x)
            else:
                x = layer(x, inference_params)
        logits = self.lm_head(x).float()
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}


def family_model(mixer: str, **config: Any) -> MixerForCausalLM:
    """A model of one family in eval mode, the same in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixerForCausalLM(MixerConfig(mixer, **config))
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (nn.Linear, nn.Conv1d)):
                    module.weight.normal_(std=0.3)
            for parameter in (*model.lm_head.parameters(), *model.embeddings.parameters()):
                parameter.normal_()
        return model.eval()


@dataclass(frozen=True)
class Family:
    """A model of some family, and what its published code cannot do.

    Args:
        make (`Callable`): Builds the model in eval mode, the same in every call; `n_layer` is an option.
        filters (`str`): What the names of the parameters that make the filters match.
        longest (`int`, *optional*): The longest sequence that there are filters for.
        narrow (`bool`): Whether the code runs with weights in 16 bits on a CPU, where torch.fft does not take them.
        offloads (`bool`): Whether the code runs behind the hooks of accelerate: it reads no weights past them.
        causal (`bool`): Whether no token acts on earlier ones. Long filters of fla and LongConv wrap around.
        decodes (`bool`): Whether it is a model of the next token.
        stateful (`bool`): Whether it decodes with a state, `inference_params`.
    """

    make: Callable[..., PreTrainedModel]
    filters: str = r"filter_fn"
    longest: int | None = None
    narrow: bool = True
    offloads: bool = True
    causal: bool = True
    decodes: bool = True
    stateful: bool = False


def _mixer(name: str, filters: str = r"filter_fn", **limits: Any) -> Family:
    return Family(lambda **config: family_model(name, **config), filters, **limits)


def _hyenadna(**config: Any) -> PreTrainedModel:
    return build(HyenaDNAForCausalLM, HyenaConfig(**config))


MASKED = {"causal": False, "decodes": False}
FAMILIES = {
    "native-hyenadna": Family(tiny_hyenadna, longest=130),
    "native-hyena": Family(tiny_hyena, longest=128),
    "native-m2": Family(lambda n_layer=2: tiny_m2bert(num_hidden_layers=n_layer), longest=128, **MASKED),
    "hyenadna": Family(_hyenadna, longest=L_MAX),
    "hyenadna-first": Family(lambda **config: _hyenadna(first_revision=True, **config), longest=L_MAX, narrow=False),
    "plantgfm": _mixer("hyena", longest=L_MAX),
    "multimolecule": _mixer("multimolecule", longest=L_MAX),
    "safari": _mixer("safari", longest=L_MAX, narrow=False),
    "m2": Family(lambda **config: build(BertForMaskedLM, BertConfig(**config)), longest=L_MAX, narrow=False, **MASKED),
    "stripedhyena": _mixer("stripedhyena", r"mixer\.(poles|residues)$", stateful=True),
    "evo2-hcl": _mixer("evo2-hcl", r"mixer\.(log_poles|residues)$", stateful=True),
    "evo2-hcm": _mixer("evo2-hcm", r"mixer\.h$", stateful=True),
    "evo2-hcs": _mixer("evo2-hcs", r"mixer\.h$", stateful=True),
    "fla": _mixer("fla", r"mixer\.filter$", causal=False),
    "fla-implicit": _mixer("fla-implicit", r"mixer\.(mlp|pos_emb)\."),
    "s4d": _mixer("s4d", r"mixer\.kernel\.", narrow=False),
    "s4": _mixer("s4", r"mixer\.kernel\.", narrow=False),
    "long-conv": _mixer("long-conv", r"mixer\.kernel\.", narrow=False, causal=False),
    "h3": _mixer("h3", r"mixer\.(ssm_k_)?kernel\.", narrow=False, offloads=False),
    "stu": _mixer("stu", r"mixer\.M_filters$", narrow=False),
}


def families(wanted: Callable[[Family], bool] = lambda family: True) -> Any:
    """Parametrises a test over all families, or over those that can do what it checks."""
    chosen = {name: family for name, family in FAMILIES.items() if wanted(family)}
    return pytest.mark.parametrize("family", chosen.values(), ids=chosen)


def logits(model: nn.Module, length: int = 40, batch: int = 2) -> torch.Tensor:
    return model(dna_ids(batch, length)).logits


def mixers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_patched(module)]


def generation_state() -> SimpleNamespace:
    """What StripedHyena and Evo 2 keep between the steps of a generation."""
    return SimpleNamespace(fir_state_dict={}, fir_inner_state_dict={}, state_dict={})
