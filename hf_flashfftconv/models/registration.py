"""Makes the Auto classes of transformers find the models of this package."""

import logging
from functools import cache
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..kernel_repository import offer_kernels
from .configuration_hyena_lm import HyenaLMConfig
from .configuration_hyenadna import HyenaDNAConfig
from .configuration_m2_bert import M2BertConfig
from .hyena import HyenaOperator
from .modeling_hyena_lm import HyenaLMForCausalLM, HyenaLMModel
from .modeling_hyenadna import HyenaDNAForCausalLM, HyenaDNAForSequenceClassification, HyenaDNAModel
from .modeling_m2_bert import M2BertForMaskedLM, M2BertForSequenceClassification, M2BertModel
from .monarch import MonarchMixerSequenceMixing
from .tokenization_hyenadna import HyenaDNATokenizer

logger = logging.getLogger(__name__)

_MODELS = (
    (AutoModel, HyenaDNAConfig, HyenaDNAModel),
    (AutoModelForCausalLM, HyenaDNAConfig, HyenaDNAForCausalLM),
    (AutoModelForSequenceClassification, HyenaDNAConfig, HyenaDNAForSequenceClassification),
    (AutoModel, HyenaLMConfig, HyenaLMModel),
    (AutoModelForCausalLM, HyenaLMConfig, HyenaLMForCausalLM),
    (AutoModel, M2BertConfig, M2BertModel),
    (AutoModelForMaskedLM, M2BertConfig, M2BertForMaskedLM),
    (AutoModelForSequenceClassification, M2BertConfig, M2BertForSequenceClassification),
)


def register() -> None:
    """Registers the models, their configurations and the tokenizer; calling it again changes nothing.

    A `model_type` that somebody else has registered stays theirs. Repositories that carry their own code still load
    it with `trust_remote_code=True`; without, the classes of this package load them.
    """
    for config_class in (HyenaDNAConfig, HyenaLMConfig, M2BertConfig):
        model_type = config_class.model_type
        if model_type not in CONFIG_MAPPING:
            AutoConfig.register(model_type, _yielding(config_class))
        elif not issubclass(CONFIG_MAPPING[model_type], config_class):
            logger.info("model_type %r is already registered for %r", model_type, CONFIG_MAPPING[model_type])
    for auto_class, config_class, model_class in _MODELS:
        auto_class.register(config_class, model_class, exist_ok=True)
    offer_kernels(HyenaOperator, MonarchMixerSequenceMixing)
    AutoTokenizer.register(HyenaDNAConfig, slow_tokenizer_class=_yielding(HyenaDNATokenizer), exist_ok=True)


@cache
def _yielding(target: type) -> type:
    """A stand-in for `target` that gives way to the code of a repository when the user trusts it.

    transformers lets a registered class override remote code, even with `trust_remote_code=True`, unless its module
    belongs to transformers itself. The stand-in claims such a module and is never instantiated: it constructs `target`.
    """

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    module = f"transformers.models.{target.__module__.rpartition('.')[2]}"
    namespace = {"__module__": module, "__qualname__": target.__qualname__, "__doc__": target.__doc__}
    return type(target)(target.__name__, (target,), {**namespace, "__new__": new})
