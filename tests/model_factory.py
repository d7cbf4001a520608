"""Tiny models with fixed seeds, for all tests of the repository."""

import json
import shutil
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
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
_HUB_FIELDS = {
    *HYENADNA,
    *("d_inner", "embed_dropout", "hyena_dropout", "hyena_filter_dropout", "hyena_order", "layer_norm_epsilon"),
    *("num_inner_mlps", "pad_token_id", "pad_vocab_size_multiple", "short_filter_order", "tie_word_embeddings"),
    *("train_freq", "use_bias", "vocab_size", "id2label", "label2id"),
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


def remote_hyenadna_repo(path: Path, model: PreTrainedModel | None = None) -> Path:
    """Writes a repository as on the Hub: its own code (see `remote_hyenadna/`), tokenizer, and each tensor once.

    Load it with `trust_remote_code=True` for the classes it carries, without for those of this package.

    Args:
        path (`Path`): Folder to write to.
        model (`PreTrainedModel`, *optional*): The native HyenaDNA to store; `tiny_hyenadna()` if not given.
    """
    model = tiny_hyenadna() if model is None else model
    path.mkdir(parents=True, exist_ok=True)
    for source in (Path(__file__).parent / "remote_hyenadna").glob("*.py"):
        shutil.copy(source, path)
    classes = {"AutoModel": "HyenaDNAModel"}
    classes |= {f"AutoModelFor{head}": f"HyenaDNAFor{head}" for head in ("CausalLM", "SequenceClassification")}
    auto_map = {auto: f"modeling_hyena.{name}" for auto, name in classes.items()}
    auto_map["AutoConfig"] = "configuration_hyena.HyenaConfig"
    config = {key: value for key, value in model.config.to_dict().items() if key in _HUB_FIELDS}
    config |= {"architectures": [type(model).__name__], "auto_map": auto_map, "model_type": "hyenadna"}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer = {
        "auto_map": {"AutoTokenizer": ["tokenization_hyena.HyenaDNATokenizer", None]},
        "model_max_length": model.config.max_seq_len,
        "padding_side": "left",
        "tokenizer_class": "HyenaDNATokenizer",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))
    save_file(hub_state_dict(model), path / "model.safetensors", metadata={"format": "pt"})
    return path


def hub_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict with each shared frequency under its first name only, as in the Hub's files."""
    aliases = ("implicit_filter.3.freq", "implicit_filter.5.freq")
    return {name: value.clone() for name, value in model.state_dict().items() if not name.endswith(aliases)}


def _build(model_class: type[Model], config: Any) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config).eval()
