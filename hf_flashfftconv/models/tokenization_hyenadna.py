"""Character-level DNA tokenizer of the HyenaDNA models."""

from typing import Any, ClassVar

from transformers import PreTrainedTokenizer

_SPECIAL_TOKENS = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
_BASES = "ACGTN"


class HyenaDNATokenizer(PreTrainedTokenizer):
    r"""One token a base, with the ids of the Hub's `tokenization_hyena.HyenaDNATokenizer`.

    `[CLS]` 0, `[SEP]` 1, `[BOS]` 2, `[MASK]` 3, `[PAD]` 4, `[RESERVED]` 5, `[UNK]` 6, A 7, C 8, G 9, T 10, N 11. Every
    other character is unknown, lower case bases included: genomes that mark repeats by lower case need `.upper()`.
    A sequence is closed by `[SEP]` and opened by nothing. Padding goes to the left and only `input_ids` are returned,
    since the models have no attention to mask.

    Args:
        model_max_length (`int`, *optional*): Longest sequence, `[SEP]` included, that truncation leaves.
        bos_token, eos_token, sep_token, cls_token, pad_token, mask_token, unk_token (`str`, *optional*): Special
            tokens; `[SEP]` is also the end of a sequence.
        padding_side (`str`, *optional*, defaults to `"left"`): Where padding goes.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids"]

    def __init__(
        self,
        model_max_length: int | None = None,
        bos_token: str = "[BOS]",
        eos_token: str = "[SEP]",
        sep_token: str = "[SEP]",
        cls_token: str = "[CLS]",
        pad_token: str = "[PAD]",
        mask_token: str = "[MASK]",
        unk_token: str = "[UNK]",
        padding_side: str = "left",
        **kwargs: Any,
    ):
        self._ids = {token: i for i, token in enumerate((*_SPECIAL_TOKENS, *_BASES))}
        self._tokens = tuple(self._ids)
        super().__init__(
            model_max_length=model_max_length,
            bos_token=bos_token,
            eos_token=eos_token,
            sep_token=sep_token,
            cls_token=cls_token,
            pad_token=pad_token,
            mask_token=mask_token,
            unk_token=unk_token,
            padding_side=padding_side,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids["[UNK]"])

    def _convert_id_to_token(self, index: int) -> str:
        # The embedding is padded to a multiple of 8 rows, so that a model can name ids that have no token.
        return self._tokens[index] if index < len(self._tokens) else "[UNK]"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        pair = [] if token_ids_1 is None else [*token_ids_1, self.sep_token_id]
        return [*token_ids_0, self.sep_token_id, *pair]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        pair = [] if token_ids_1 is None else [0] * len(token_ids_1) + [1]
        return [0] * len(token_ids_0) + [1, *pair]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes nothing: the vocabulary is fixed."""
        return ()
