"""Configuration of M2-BERT models."""

from typing import Any

from transformers import PreTrainedConfig

from ..ops.truncation import Truncation
from .configuration_hyenadna import check_filter_fields, check_truncation, truncation_of, without_local_code


class M2BertConfig(PreTrainedConfig):
    r"""Configuration of [`M2BertModel`], with the fields and defaults of the published `configuration_bert.BertConfig`.

    Further fields of published configurations (learning rates, dropout that is never applied) are kept but unused.

    Args:
        vocab_size (`int`, *optional*, defaults to 30522): Number of tokens.
        hidden_size (`int`, *optional*, defaults to 768): Width of the hidden states.
        num_hidden_layers (`int`, *optional*, defaults to 12): Number of layers.
        intermediate_size (`int`, *optional*, defaults to 3072): Width of the feed-forward layers.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): Activation of the language modelling head.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.1): Dropout after the embedding and in the feed-forward.
        classifier_dropout (`float`, *optional*): Dropout before the classifier, `hidden_dropout_prob` if not given.
        max_position_embeddings (`int`, *optional*, defaults to 512): Longest input.
        type_vocab_size (`int`, *optional*, defaults to 2): Number of segment ids.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the initial weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-12): Epsilon of the layer norms.
        pad_token_id (`int`, *optional*, defaults to 0): Padding token.
        use_glu_mlp (`bool`, *optional*, defaults to `True`): Whether the feed-forward layers are gated.
        use_monarch_mlp (`bool`, *optional*, defaults to `False`): Whether their matrices are block-diagonal.
        monarch_mlp_nblocks (`int`, *optional*, defaults to 4): Blocks of such a matrix.
        use_positional_encodings (`bool`, *optional*, defaults to `False`): Whether position embeddings are added.
        monarch_mixer_sequence_mixing (`bool`, *optional*, defaults to `True`): Must be `True`.
        residual_long_conv (`bool`, *optional*, defaults to `False`): Whether a second long convolution acts on the
            input of each layer, without gates.
        bidirectional (`bool`, *optional*, defaults to `True`): Whether the long convolutions also look ahead.
        long_conv_l_max (`int`, *optional*): Longest filter, `max_position_embeddings` if not given.
        hyena_emb_dim (`int`, *optional*, defaults to 5): Features of a filter position, odd and at least 3.
        hyena_filter_order (`int`, *optional*, defaults to 64): Width of the filter network.
        hyena_w (`float`, *optional*, defaults to 10): Initial frequency of the sines in the filter network.
        hyena_w_mod (`float`, *optional*, defaults to 1): Constant factor of those frequencies.
        filter_length (`int`, *optional*): Taps that are kept of each filter, all if not given. Sequences may then be
            longer than `long_conv_l_max`, at the cost of short filters: see [`patch_model`].
        filter_taper (`float`, *optional*, defaults to 0.0): Share of these taps over which a filter falls to zero.
        hyena_training_additions (`bool`, *optional*, defaults to `False`): Whether each mixer begins with a layer norm.
        pool_all (`bool`, *optional*, defaults to `False`): Whether the pooler averages the tokens instead of taking
            the first.
        use_cls_token (`bool`, *optional*, defaults to `False`): Whether classifier and sentence embedding use the first
            hidden state instead of the pooler's output.
        gather_sentence_embeddings (`bool`, *optional*): Whether [`M2BertForSequenceClassification`] returns a
            sentence embedding; by default it does for checkpoints of the class `BertForTextEncoding`.
        use_normalized_embeddings (`bool`, *optional*, defaults to `False`): Whether that embedding has norm 1.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`): Whether the head shares the embedding.

    Raises:
        ValueError: If a value is out of range or not supported.
    """

    model_type = "m2_bert"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        classifier_dropout: float | None = None,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        pad_token_id: int | None = 0,
        use_glu_mlp: bool = True,
        use_monarch_mlp: bool = False,
        monarch_mlp_nblocks: int = 4,
        use_positional_encodings: bool = False,
        monarch_mixer_sequence_mixing: bool = True,
        residual_long_conv: bool = False,
        bidirectional: bool = True,
        long_conv_l_max: int | None = None,
        hyena_emb_dim: int = 5,
        hyena_filter_order: int = 64,
        hyena_w: float = 10,
        hyena_w_mod: float = 1,
        filter_length: int | None = None,
        filter_taper: float = 0.0,
        hyena_training_additions: bool = False,
        pool_all: bool = False,
        use_cls_token: bool = False,
        gather_sentence_embeddings: bool | None = None,
        use_normalized_embeddings: bool = False,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.pad_token_id = pad_token_id
        self.use_glu_mlp = use_glu_mlp
        self.use_monarch_mlp = use_monarch_mlp
        self.monarch_mlp_nblocks = monarch_mlp_nblocks
        self.use_positional_encodings = use_positional_encodings
        self.monarch_mixer_sequence_mixing = monarch_mixer_sequence_mixing
        self.residual_long_conv = residual_long_conv
        self.bidirectional = bidirectional
        self.long_conv_l_max = max_position_embeddings if long_conv_l_max is None else long_conv_l_max
        self.hyena_emb_dim = hyena_emb_dim
        self.hyena_filter_order = hyena_filter_order
        self.hyena_w = hyena_w
        self.hyena_w_mod = hyena_w_mod
        self.filter_length = filter_length
        self.filter_taper = filter_taper
        self.hyena_training_additions = hyena_training_additions
        self.pool_all = pool_all
        self.use_cls_token = use_cls_token
        if gather_sentence_embeddings is None:
            gather_sentence_embeddings = "BertForTextEncoding" in (kwargs.get("architectures") or ())
        self.gather_sentence_embeddings = gather_sentence_embeddings
        self.use_normalized_embeddings = use_normalized_embeddings
        self.tie_word_embeddings = tie_word_embeddings
        if not monarch_mixer_sequence_mixing:
            raise ValueError("monarch_mixer_sequence_mixing=False is an attention model (MosaicBERT), not an M2-BERT.")
        for field in ("use_flash_mm", "attention_pooling", "sequence_token_planting"):
            if kwargs.get(field):
                raise ValueError(f"{field}=True is not supported.")
        if use_monarch_mlp and (hidden_size % monarch_mlp_nblocks or intermediate_size % monarch_mlp_nblocks):
            raise ValueError(
                f"hidden_size={hidden_size} and intermediate_size={intermediate_size} must be multiples of "
                f"monarch_mlp_nblocks={monarch_mlp_nblocks}."
            )
        check_filter_fields(hyena_emb_dim, long_conv_l_max=self.long_conv_l_max)
        check_truncation(self.truncation, self.long_conv_l_max)
        super().__init__(**without_local_code(kwargs))

    @property
    def truncation(self) -> Truncation | None:
        """How the filters are cut."""
        return truncation_of(self)
