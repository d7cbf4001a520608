"""M2-BERT (Fu et al. 2023, Monarch Mixer, https://arxiv.org/abs/2310.12109), compatible with the Hub's checkpoints."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_m2_bert import M2BertConfig
from .monarch import BlockdiagLinear, MonarchMixerSequenceMixing
from .pretrained import LongConvPreTrainedModel, check_inputs


class M2BertMlp(nn.Module):
    """Feed-forward layer, gated or not, dense or block-diagonal, with residual connection and layer norm."""

    def __init__(self, config: M2BertConfig):
        super().__init__()

        def linear(in_features: int, out_features: int, bias: bool) -> nn.Module:
            if config.use_monarch_mlp:
                return BlockdiagLinear(in_features, out_features, config.monarch_mlp_nblocks, bias)
            return nn.Linear(in_features, out_features, bias)

        self.gated = config.use_glu_mlp
        self.gated_layers = linear(config.hidden_size, config.intermediate_size * (2 if self.gated else 1), bias=False)
        self.wo = linear(config.intermediate_size, config.hidden_size, bias=True)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.gated_layers(x)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.gelu(gate) * hidden
        else:
            hidden = F.gelu(hidden)
        return self.layernorm(self.wo(self.dropout(hidden)) + x)


class M2BertLayer(GradientCheckpointingLayer):
    """Mixer (no residual connection of its own), then feed-forward layer."""

    def __init__(self, config: M2BertConfig):
        super().__init__()
        self.attention = MonarchMixerSequenceMixing(config)
        self.mlp = M2BertMlp(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.attention(hidden_states)[0])


class M2BertEmbeddings(nn.Module):
    """Sum of token, segment and, if configured, position embeddings, normalised."""

    position_ids: torch.Tensor

    def __init__(self, config: M2BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.use_positional_encodings = config.use_positional_encodings
        if self.use_positional_encodings:
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
            self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        length = inputs_embeds.shape[1]
        if token_type_ids is None:
            token_type_ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids)
        if self.use_positional_encodings:
            if length > self.position_embeddings.num_embeddings:
                raise ValueError(
                    f"The sequence length {length} exceeds max_position_embeddings={self.position_ids.shape[1]}."
                )
            ids = self.position_ids[:, :length] if position_ids is None else position_ids
            embeddings = embeddings + self.position_embeddings(ids)
        return self.dropout(self.LayerNorm(embeddings))


class M2BertEncoder(nn.Module):
    """The layers; returns the input and the output of every layer."""

    def __init__(self, config: M2BertConfig):
        super().__init__()
        self.layer = nn.ModuleList([M2BertLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = [hidden_states]
        for layer in self.layer:
            states.append(layer(states[-1]))
        return tuple(states)


class M2BertPooler(nn.Module):
    """Dense layer and tanh on the first token, or on the mean of the tokens that are not masked."""

    def __init__(self, config: M2BertConfig):
        super().__init__()
        self.pool_all = config.pool_all
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if not self.pool_all:
            pooled = hidden_states[:, 0]
        elif attention_mask is None:
            pooled = hidden_states.mean(dim=1)
        else:
            mask = attention_mask.to(hidden_states.dtype).unsqueeze(-1)
            pooled = (hidden_states * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.tanh(self.dense(pooled))


class M2BertPreTrainedModel(LongConvPreTrainedModel):
    """Weight initialisation, loading and embedding access of the M2-BERT models."""

    config_class = M2BertConfig
    base_model_prefix = "bert"
    _no_split_modules = ("M2BertLayer", "M2BertEmbeddings")
    # Constant tables that another FFT library stored in its users' checkpoints.
    _keys_to_ignore_on_load_unexpected = (r"flashfft\.",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BlockdiagLinear):
            bound = module.weight.shape[-1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, M2BertEmbeddings) and module.use_positional_encodings:
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[1])[None])

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.embeddings.word_embeddings = value


class M2BertModel(M2BertPreTrainedModel):
    """M2-BERT without a head: token ids to hidden states and a pooled vector.

    The mixers have no attention to mask, so `attention_mask` changes nothing but the pooled vector of models with
    `pool_all`: padding takes part in the convolutions, as in training. Pad the way the checkpoint was trained, which
    for the published ones is to the full length (`padding="max_length"`).
    """

    def __init__(self, config: M2BertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = M2BertEmbeddings(config)
        self.encoder = M2BertEncoder(config)
        self.pooler = M2BertPooler(config) if add_pooling_layer else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Runs the model.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): Token ids, at most `long_conv_l_max` long.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 for padding, see above.
            token_type_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Segment ids, 0 if not given.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Positions of the tokens.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): Instead of `input_ids`.
            output_hidden_states (`bool`, *optional*): Whether to return the embedding and the output of each layer.
            return_dict (`bool`, *optional*): `False` returns a tuple.

        Raises:
            ValueError: If not exactly one input is given, or if it is empty or too long.
        """
        check_inputs(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.word_embeddings(input_ids)
        states = self.encoder(self.embeddings(inputs_embeds, token_type_ids, position_ids))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=None if self.pooler is None else self.pooler(states[-1], attention_mask),
            hidden_states=states if wanted else None,
        )


class M2BertPredictionHead(nn.Module):
    """Transform and decoder of the masked language modelling head."""

    def __init__(self, config: M2BertConfig):
        super().__init__()
        self.transform = nn.ModuleDict(
            {
                "dense": nn.Linear(config.hidden_size, config.hidden_size),
                "LayerNorm": nn.LayerNorm(config.hidden_size, eps=1e-12),
            }
        )
        self.act = ACT2FN[config.hidden_act]
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.act(self.transform["dense"](hidden_states))
        return self.decoder(self.transform["LayerNorm"](hidden_states))


class M2BertForMaskedLM(M2BertPreTrainedModel):
    """M2-BERT with a masked language modelling head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: M2BertConfig):
        super().__init__(config)
        self.bert = M2BertModel(config, add_pooling_layer=False)
        self.cls = nn.ModuleDict({"predictions": M2BertPredictionHead(config)})
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.cls["predictions"].decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls["predictions"].decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Runs the model; see [`M2BertModel.forward`] for the other arguments.

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): The tokens to predict, -100 where
                nothing is to be predicted.

        Returns:
            [`~transformers.modeling_outputs.MaskedLMOutput`]: `logits` of shape `(batch, length, vocab_size)`.
        """
        outputs = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.cls["predictions"](outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


@dataclass
class M2BertClassifierOutput(SequenceClassifierOutput):
    """Output of [`M2BertForSequenceClassification`].

    Args:
        sentence_embedding (`torch.FloatTensor` of shape `(batch, hidden_size)`): In place of `loss` and `logits` where
            `config.gather_sentence_embeddings` is set.
    """

    sentence_embedding: torch.FloatTensor | None = None


class M2BertForSequenceClassification(M2BertPreTrainedModel):
    """M2-BERT with a linear classifier, or as a sentence encoder (`config.gather_sentence_embeddings`)."""

    def __init__(self, config: M2BertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = M2BertModel(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> M2BertClassifierOutput:
        """Runs the model; see [`M2BertModel.forward`] for the other arguments.

        Args:
            labels (`torch.Tensor` of shape `(batch,)`, or `(batch, num_labels)` for several labels at once,
                *optional*): Classes for cross-entropy, or values for regression where `num_labels` is 1.

        Returns:
            [`M2BertClassifierOutput`]: `logits` of shape `(batch, num_labels)`, or `sentence_embedding`.
        """
        outputs = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        pooled = outputs.last_hidden_state[:, 0] if self.config.use_cls_token else outputs.pooler_output
        if self.config.gather_sentence_embeddings:
            embedding = F.normalize(pooled, dim=1) if self.config.use_normalized_embeddings else pooled
            return M2BertClassifierOutput(sentence_embedding=embedding, hidden_states=outputs.hidden_states)
        logits = self.classifier(pooled if self.config.use_cls_token else self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return M2BertClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
