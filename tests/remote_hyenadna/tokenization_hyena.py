"""A tokenizer in the style of the Hub's HyenaDNA repositories."""

from transformers import PreTrainedTokenizer

VOCAB = {t: i for i, t in enumerate(["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", *"ACGTN"])}


class HyenaDNATokenizer(PreTrainedTokenizer):
    model_input_names = ("input_ids",)

    def __init__(self, model_max_length=1026, padding_side="left", **kwargs):
        special = {"bos": "BOS", "eos": "SEP", "sep": "SEP", "cls": "CLS", "pad": "PAD", "mask": "MASK", "unk": "UNK"}
        tokens = {f"{name}_token": f"[{value}]" for name, value in special.items()}
        super().__init__(model_max_length=model_max_length, padding_side=padding_side, **{**tokens, **kwargs})

    @property
    def vocab_size(self):
        return len(VOCAB)

    def get_vocab(self):
        return VOCAB

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return VOCAB.get(token, VOCAB["[UNK]"])

    def _convert_id_to_token(self, index):
        return list(VOCAB)[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        second = [] if token_ids_1 is None else [*token_ids_1, self.sep_token_id]
        return [*token_ids_0, self.sep_token_id, *second]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return ()
