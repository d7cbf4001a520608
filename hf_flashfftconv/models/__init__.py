"""HyenaDNA, the Hyena language model and M2-BERT as plain transformers models that load the Hub's checkpoints."""

from .cache import HyenaCache
from .configuration_hyena_lm import HyenaLMConfig
from .configuration_hyenadna import HyenaDNAConfig
from .configuration_m2_bert import M2BertConfig
from .conversion import convert_state_dict
from .modeling_hyena_lm import HyenaLMForCausalLM, HyenaLMModel
from .modeling_hyenadna import HyenaDNAForCausalLM, HyenaDNAForSequenceClassification, HyenaDNAModel
from .modeling_m2_bert import M2BertForMaskedLM, M2BertForSequenceClassification, M2BertModel
from .registration import register
from .tokenization_hyenadna import HyenaDNATokenizer

__all__ = [
    "HyenaCache",
    "HyenaDNAConfig",
    "HyenaDNAForCausalLM",
    "HyenaDNAForSequenceClassification",
    "HyenaDNAModel",
    "HyenaDNATokenizer",
    "HyenaLMConfig",
    "HyenaLMForCausalLM",
    "HyenaLMModel",
    "M2BertConfig",
    "M2BertForMaskedLM",
    "M2BertForSequenceClassification",
    "M2BertModel",
    "convert_state_dict",
    "register",
]
