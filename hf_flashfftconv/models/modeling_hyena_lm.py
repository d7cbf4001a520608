"""The Hyena language model (Poli et al. 2023, https://arxiv.org/abs/2302.10866): HyenaDNA's architecture for text."""

from .configuration_hyena_lm import HyenaLMConfig
from .modeling_hyenadna import HyenaDNAForCausalLM, HyenaDNAModel


class HyenaLMModel(HyenaDNAModel):
    """Hyena language model without a head; see [`HyenaDNAModel`]."""

    config_class = HyenaLMConfig


class HyenaLMForCausalLM(HyenaDNAForCausalLM):
    """Hyena language model with a language modelling head; see [`HyenaDNAForCausalLM`]."""

    config_class = HyenaLMConfig
