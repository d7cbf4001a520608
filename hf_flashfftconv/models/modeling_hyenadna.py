"""HyenaDNA (Nguyen et al. 2023, https://arxiv.org/abs/2306.15794), as in the `LongSafari/hyenadna-*-hf` repos."""

import logging
import math
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithNoAttention, CausalLMOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_hyenadna import HyenaDNAConfig
from .hyena import HyenaFilter, HyenaOperator
from .pretrained import LongConvPreTrainedModel, check_inputs

logger = logging.getLogger(__name__)


class HyenaMlp(nn.Module):
    """Feed-forward layer with the tanh form of GELU."""

    def __init__(self, config: HyenaDNAConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.d_inner)
        self.fc2 = nn.Linear(config.d_inner, config.d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class HyenaBlock(GradientCheckpointingLayer):
    """Pre-norm block: Hyena operator, then feed-forward layer, on a residual stream of at least float32."""

    def __init__(self, config: HyenaDNAConfig):
        super().__init__()
        filter_fn = HyenaFilter(
            config.d_model,
            emb_dim=config.emb_dim,
            order=config.filter_order,
            seq_len=config.max_seq_len,
            w=config.activation_freq,
            num_inner_mlps=config.num_inner_mlps,
            train_freq=config.train_freq,
            train_pos_emb=config.train_pos_emb,
            modulate=config.modulate,
            shift=config.modulation_shift,
            normalized=config.normalized,
            use_bias=config.apply_bias,
            truncation=config.truncation,
        )
        self.mixer = HyenaOperator(config.d_model, filter_fn, config.short_filter_order, config.hyena_dropout)
        self.norm1 = nn.LayerNorm(config.d_model, eps=config.block_norm_epsilon)
        self.mlp = HyenaMlp(config)
        self.norm2 = nn.LayerNorm(config.d_model, eps=config.block_norm_epsilon)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = _at_least_float32(hidden_states)
        residual = residual + self.dropout(self.mixer(self.norm1(residual.to(self.norm1.weight.dtype))))
        return residual + self.dropout(self.mlp(self.norm2(residual.to(self.norm2.weight.dtype))))


class HyenaEmbeddings(nn.Module):
    """Token embedding; positions are known to the filters alone."""

    def __init__(self, config: HyenaDNAConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.d_model)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.word_embeddings(input_ids)


class HyenaBackbone(nn.Module):
    """Embedding, blocks and last norm."""

    def __init__(self, config: HyenaDNAConfig):
        super().__init__()
        self.embeddings = HyenaEmbeddings(config)
        self.dropout = nn.Dropout(config.embed_dropout if config.apply_embed_dropout else 0.0)
        self.layers = nn.ModuleList([HyenaBlock(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = [hidden_states]
        hidden_states = self.dropout(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            states.append(hidden_states)
        states.append(self.ln_f(hidden_states.to(self.ln_f.weight.dtype)))
        return tuple(states)


class HyenaDNAPreTrainedModel(LongConvPreTrainedModel):
    """Weight initialisation, loading and embedding access of the HyenaDNA models."""

    config_class: type[PreTrainedConfig] = HyenaDNAConfig
    base_model_prefix = "hyena"
    _no_split_modules = ("HyenaBlock",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # GPT-2 scheme: the layers that write to the residual stream start smaller, the more of them there are.
        std = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
        if isinstance(module, HyenaOperator):
            init.normal_(module.out_proj.weight, std=std)
        elif isinstance(module, HyenaMlp):
            init.normal_(module.fc2.weight, std=std)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.backbone.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.backbone.embeddings.word_embeddings = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resizes the embedding, always to a multiple of `config.pad_vocab_size_multiple` rows."""
        multiple = math.lcm(self.config.pad_vocab_size_multiple, pad_to_multiple_of or 1)
        return super().resize_token_embeddings(new_num_tokens, multiple, mean_resizing)


class HyenaDNAModel(HyenaDNAPreTrainedModel):
    """HyenaDNA without a head: token ids to hidden states.

    A causal model. `attention_mask` is accepted and ignored: tokens padded on the right never reach the tokens before
    them, tokens padded on the left do, as in the published models; a warning says so once.
    """

    def __init__(self, config: HyenaDNAConfig):
        super().__init__(config)
        self.backbone = HyenaBackbone(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithNoAttention:
        """Runs the model.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): Token ids, at most `config.max_seq_len` long.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): Ignored, see above.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, d_model)`): Instead of `input_ids`.
            output_hidden_states (`bool`, *optional*): Whether to return all hidden states: the embedding, the output
                of each layer, and the normalised last one, `n_layer + 2` in all as in the Hub's code.
            return_dict (`bool`, *optional*): `False` returns a tuple.

        Raises:
            ValueError: If not exactly one input is given, or if it is empty or too long.
        """
        check_inputs(input_ids, inputs_embeds)
        _warn_if_padded_before_tokens(attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self.backbone.embeddings(input_ids)
        states = self.backbone(inputs_embeds)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithNoAttention(last_hidden_state=states[-1], hidden_states=states if wanted else None)


class HyenaDNAForCausalLM(HyenaDNAPreTrainedModel, GenerationMixin):
    """HyenaDNA with a language modelling head. `generate` has no cache: each token costs one forward pass."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "lm_head.weight": "hyena.backbone.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: HyenaDNAConfig):
        super().__init__(config)
        self.hyena = HyenaDNAModel(config)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Always passes the whole sequence: there is no cache. A prompt is either `input_ids` or `inputs_embeds`."""
        if inputs_embeds is None:
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        if is_first_iteration and input_ids.shape[1]:
            raise ValueError("Without a cache a prompt is either input_ids or inputs_embeds, not both.")
        generated = self.get_input_embeddings()(input_ids)
        return {"inputs_embeds": torch.cat([inputs_embeds, generated], dim=1), "attention_mask": attention_mask}

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Runs the model; see [`HyenaDNAModel.forward`] for the other arguments.

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): The token ids themselves; they are
                shifted inside, and -100 is ignored.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Number of last positions, or the
                positions, to compute logits for; 0 means all.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutput`]: `logits` of shape `(batch, length, padded vocabulary)`
            in at least float32, and the mean cross-entropy `loss` where `labels` are given.
        """
        outputs = self.hyena(
            input_ids, attention_mask, inputs_embeds, output_hidden_states=output_hidden_states, return_dict=True
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = _at_least_float32(self.lm_head(outputs.last_hidden_state[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class HyenaDNAForSequenceClassification(HyenaDNAPreTrainedModel):
    """HyenaDNA with a linear head on the last token of each sequence that is not padding."""

    def __init__(self, config: HyenaDNAConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.hyena = HyenaDNAModel(config)
        self.score = nn.Linear(config.d_model, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Runs the model; see [`HyenaDNAModel.forward`] for the other arguments.

        Args:
            labels (`torch.Tensor` of shape `(batch,)`, or `(batch, num_labels)` for several labels at once,
                *optional*): Classes for cross-entropy, or values for regression where `num_labels` is 1.

        Returns:
            [`~transformers.modeling_outputs.SequenceClassifierOutput`]: `logits` of shape `(batch, num_labels)`.
        """
        outputs = self.hyena(
            input_ids, attention_mask, inputs_embeds, output_hidden_states=output_hidden_states, return_dict=True
        )
        token_logits = self.score(outputs.last_hidden_state)
        rows = torch.arange(token_logits.shape[0], device=token_logits.device)
        logits = token_logits[rows, self._last_token(input_ids, token_logits)]
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def _last_token(self, input_ids: torch.Tensor | None, token_logits: torch.Tensor) -> torch.Tensor | int:
        if input_ids is None or self.config.pad_token_id is None:
            if token_logits.shape[0] > 1 and self.config.pad_token_id is None:
                raise ValueError("Batches of more than one sequence need config.pad_token_id to find the last token.")
            return -1
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return (positions * (input_ids != self.config.pad_token_id)).argmax(-1).to(token_logits.device)


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _warn_if_padded_before_tokens(attention_mask: torch.Tensor | None) -> None:
    # Looking at the mask waits for the device, which neither a compiled graph nor a CUDA graph may do.
    if attention_mask is None or attention_mask.ndim != 2 or torch.compiler.is_compiling():
        return
    if attention_mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        _warn_about_padding()


@cache
def _warn_about_padding() -> None:
    logger.warning(
        "attention_mask hides tokens that come before others. Hyena models have no attention to mask: those tokens "
        "change the outputs after them. Pad on the right, or use sequences of one length."
    )
