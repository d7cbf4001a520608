"""Tiny models with fixed seeds, for all tests of the repository."""

from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from hf_flashfftconv.models.configuration_hyena_lm import HyenaLMConfig
from hf_flashfftconv.models.configuration_hyenadna import HyenaDNAConfig
from hf_flashfftconv.models.configuration_m2_bert import M2BertConfig
from hf_flashfftconv.models.modeling_hyena_lm import HyenaLMForCausalLM
from hf_flashfftconv.models.modeling_hyenadna import HyenaDNAForCausalLM, HyenaDNAForSequenceClassification
from hf_flashfftconv.models.modeling_m2_bert import M2BertForMaskedLM

Model = TypeVar("Model", bound=PreTrainedModel)

# Large enough that filters, gates and logits are of order 1, unlike those of a real model before training.
INITIALIZER_RANGE = 0.2

HYENADNA = {
    "d_model": 16,
    "n_layer": 2,
    "max_seq_len": 130,
    "emb_dim": 5,
    "filter_order": 16,
    "activation_freq": 10,
    "initializer_range": INITIALIZER_RANGE,
}
HYENA = {
    "vocab_size": 50,
    "d_model": 16,
    "d_inner": 32,
    "n_layer": 2,
    "max_seq_len": 128,
    "emb_dim": 33,
    "filter_order": 16,
    "activation_freq": 14,
    "initializer_range": INITIALIZER_RANGE,
}
M2_BERT = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "hyena_filter_order": 16,
    "hidden_dropout_prob": 0.0,
    "use_monarch_mlp": True,
    "use_positional_encodings": True,
    "residual_long_conv": True,
    "initializer_range": INITIALIZER_RANGE,
}


def tiny_hyenadna(**overrides: Any) -> HyenaDNAForCausalLM:
    """A HyenaDNA language model of about 10,000 parameters in eval mode; `overrides` are configuration fields."""
    return _build(HyenaDNAForCausalLM, HyenaDNAConfig(**{**HYENADNA, **overrides}))


def tiny_hyenadna_classifier(num_labels: int = 3, **overrides: Any) -> HyenaDNAForSequenceClassification:
    """The same with a classification head."""
    config = HyenaDNAConfig(**{**HYENADNA, "num_labels": num_labels, **overrides})
    return _build(HyenaDNAForSequenceClassification, config)


def tiny_hyena(**overrides: Any) -> HyenaLMForCausalLM:
    """A Hyena language model (trained positions, no decay, tied head)."""
    return _build(HyenaLMForCausalLM, HyenaLMConfig(**{**HYENA, **overrides}))


def tiny_m2bert(**overrides: Any) -> M2BertForMaskedLM:
    """A bidirectional M2-BERT with residual long convolution and block-diagonal feed-forward layers."""
    return _build(M2BertForMaskedLM, M2BertConfig(**{**M2_BERT, **overrides}))


def dna_ids(batch: int = 2, length: int = 60, seed: int = 0) -> torch.Tensor:
    """Random token ids of the bases A, C, G, T; also valid for the text models."""
    return torch.randint(7, 11, (batch, length), generator=torch.Generator().manual_seed(seed))


def _build(model_class: type[Model], config: Any) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config).eval()
