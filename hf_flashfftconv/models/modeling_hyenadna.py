"""HyenaDNA (Nguyen et al. 2023, https://arxiv.org/abs/2306.15794), as in the `LongSafari/hyenadna-*-hf` repos."""

import logging
import math
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from ..slices import over_slices
from .cache import CACHE, HyenaCache, HyenaCacheLayer
from .configuration_hyenadna import HyenaDNAConfig
from .generation import HyenaGenerationMixin
from .hyena import HyenaFilter, HyenaOperator
from .pretrained import LongConvPreTrainedModel, check_inputs

logger = logging.getLogger(__name__)


class HyenaMlp(nn.Module):
    """Feed-forward layer with the tanh form of GELU."""

    # Positions that are computed at a time, all if `None`; see `hf_flashfftconv.sequences.enable_long_sequences`.
    slice_size: int | None = None

    def __init__(self, config: HyenaDNAConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.d_inner)
        self.fc2 = nn.Linear(config.d_inner, config.d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (y,) = over_slices(lambda x, _: (self.fc2(F.gelu(self.fc1(x), approximate="tanh")),), x, self.slice_size)
        return y


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

    def forward(self, hidden_states: torch.Tensor, past: HyenaCacheLayer | None = None) -> torch.Tensor:
        residual = _at_least_float32(hidden_states)
        normed = self.norm1(residual.to(self.norm1.weight.dtype))
        residual = residual + self.dropout(self.mixer(normed) if past is None else self.mixer(normed, past))
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

    def forward(
        self, hidden_states: torch.Tensor, past: HyenaCache | None = None, keep_all: bool = True
    ) -> tuple[torch.Tensor, ...]:
        states = [hidden_states] if keep_all else []
        hidden_states = self.dropout(hidden_states)
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states) if past is None else layer(hidden_states, past.layers[index])
            if keep_all:
                states.append(hidden_states)
        return *states, self.ln_f(hidden_states.to(self.ln_f.weight.dtype))


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
        past_key_values: HyenaCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: HyenaCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the model.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): Token ids, at most `config.max_seq_len` long
                together with those in the cache.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): Ignored, see above.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, d_model)`): Instead of `input_ids`.
            past_key_values ([`HyenaCache`], *optional*): Holds the positions before these, and holds these as well
                afterwards.
            use_cache (`bool`, *optional*, defaults to `False`): Whether to make a cache, if none is given. A model in
                training mode makes none.
            output_hidden_states (`bool`, *optional*): Whether to return all hidden states: the embedding, the output
                of each layer, and the normalised last one, `n_layer + 2` in all as in the Hub's code.
            cache ([`HyenaCache`], *optional*): What transformers calls `past_key_values` from 5.24 on.
            return_dict (`bool`, *optional*): `False` returns a tuple.

        Raises:
            ValueError: If not exactly one input is given, if it is empty or too long, or if the cache is of another
                model or cannot be used in training mode.
        """
        check_inputs(input_ids, inputs_embeds)
        past = self._past(cache if past_key_values is None else past_key_values, use_cache)
        _warn_if_padded_before_tokens(attention_mask, past)
        if inputs_embeds is None:
            inputs_embeds = self.backbone.embeddings(input_ids)
        wanted = bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        states = self.backbone(inputs_embeds, past, wanted)
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1], hidden_states=states if wanted else None, **{CACHE: past}
        )

    def _past(self, given: HyenaCache | None, use_cache: bool | None) -> HyenaCache | None:
        if given is None:
            return HyenaCache(self.config) if use_cache and not self.training else None
        if not isinstance(given, HyenaCache) or len(given) != self.config.n_layer:
            wanted = f"a HyenaCache of {self.config.n_layer} layers"
            raise ValueError(f"past_key_values must be {wanted}, got a {type(given).__name__} of {len(given)}.")
        if self.training:
            raise ValueError("A model in training mode cannot use past_key_values: call model.eval() first.")
        return given


class HyenaDNAForCausalLM(HyenaDNAPreTrainedModel, HyenaGenerationMixin):
    """HyenaDNA with a language modelling head; `generate` decodes step by step with a [`HyenaCache`]."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "lm_head.weight": "hyena.backbone.embeddings.word_embeddings.weight"
    }
    # Positions whose logits exist at a time while the loss is computed; see `enable_long_sequences`.
    slice_size: int | None = None

    def __init__(self, config: HyenaDNAConfig):
        super().__init__(config)
        self.hyena = HyenaDNAModel(config)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        past_key_values: HyenaCache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        vocab_to_keep: int | None = None,
        cache: HyenaCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Runs the model; see [`HyenaDNAModel.forward`] for the other arguments.

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): The token ids themselves; they are
                shifted inside, and -100 is ignored.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Number of last positions, or the
                positions, to compute logits for; 0 means all.
            vocab_to_keep (`int`, *optional*): Number of first tokens to return logits of, all rows of the embedding if
                not given. `generate` asks for `config.vocab_size`: the rows that pad the vocabulary name no token.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`]: `logits` of shape `(batch, length, padded
            vocabulary)` in at least float32, and the mean cross-entropy `loss` where `labels` are given. With long
            sequences enabled it is either the one or the other.
        """
        outputs = self.hyena(
            input_ids,
            attention_mask,
            inputs_embeds,
            past_key_values,
            use_cache,
            output_hidden_states=output_hidden_states,
            cache=cache,
            return_dict=True,
        )
        if labels is not None and self.slice_size is not None:
            loss = self._loss_over_slices(outputs.last_hidden_state, labels, **kwargs)
            return CausalLMOutputWithPast(loss=loss, hidden_states=outputs.hidden_states)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = _at_least_float32(self.lm_head(outputs.last_hidden_state[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits[..., :vocab_to_keep],
            hidden_states=outputs.hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _loss_over_slices(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The loss as a sum over slices, each of which makes its logits and drops them."""
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
        count = (shift_labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch

        def part(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = _at_least_float32(self.lm_head(hidden_states))
            options = {"num_items_in_batch": count, "ignore_index": ignore_index, **kwargs}
            return self.loss_function(
                logits=logits, labels=None, shift_labels=targets.contiguous(), vocab_size=logits.shape[-1], **options
            )

        slices = zip(hidden_states.split(self.slice_size, 1), shift_labels.split(self.slice_size, 1), strict=True)
        return torch.stack([checkpoint(part, *pair, use_reentrant=False) for pair in slices]).sum()


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


def _warn_if_padded_before_tokens(attention_mask: torch.Tensor | None, past: HyenaCache | None) -> None:
    # Looking at the mask waits for the device, which neither a compiled graph nor a CUDA graph may do.
    if attention_mask is None or attention_mask.ndim != 2 or torch.compiler.is_compiling():
        return
    if attention_mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if past is not None and past.get_seq_length() > 0:
        return
    if (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        _warn_about_padding()


@cache
def _warn_about_padding() -> None:
    logger.warning(
        "attention_mask hides tokens that come before others. Hyena models have no attention to mask: those tokens "
        "change the outputs after them. Pad on the right, or use sequences of one length."
    )
