"""The DNA tokenizer: ids, special tokens, padding and files as on the Hub."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from hf_flashfftconv.models import HyenaDNATokenizer

VOCABULARY = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N"]


@pytest.fixture
def tokenizer() -> HyenaDNATokenizer:
    return HyenaDNATokenizer(model_max_length=20)


def test_ids_are_those_of_the_hub(tokenizer: HyenaDNATokenizer) -> None:
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(VOCABULARY)}
    assert len(tokenizer) == tokenizer.vocab_size == 12
    assert tokenizer.convert_tokens_to_ids(list("ACGTN")) == [7, 8, 9, 10, 11]
    specials = ("cls", "sep", "bos", "mask", "pad", "unk", "eos")
    assert [getattr(tokenizer, f"{name}_token_id") for name in specials] == [0, 1, 2, 3, 4, 6, 1]


def test_a_sequence_ends_with_sep_and_begins_with_nothing(tokenizer: HyenaDNATokenizer) -> None:
    assert tokenizer("ACGT") == {"input_ids": [7, 8, 9, 10, 1]}
    assert tokenizer("ACGT", add_special_tokens=False)["input_ids"] == [7, 8, 9, 10]
    assert tokenizer("AC", "GT")["input_ids"] == [7, 8, 1, 9, 10, 1]
    assert tokenizer("")["input_ids"] == [1]
    assert tokenizer("AC[MASK]T")["input_ids"] == [7, 8, 3, 10, 1]


def test_lower_case_and_other_letters_are_unknown(tokenizer: HyenaDNATokenizer) -> None:
    assert tokenizer("aRU-")["input_ids"] == [6, 6, 6, 6, 1]


def test_padding_goes_to_the_left(tokenizer: HyenaDNATokenizer) -> None:
    batch = tokenizer(["ACG", "ACGTT"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[4, 4, 7, 8, 9, 1], [7, 8, 9, 10, 10, 1]]
    assert list(batch) == ["input_ids"]
    masked = tokenizer(["ACG", "ACGTT"], padding=True, return_attention_mask=True)
    assert masked["attention_mask"][0] == [0, 0, 1, 1, 1, 1]
    right = HyenaDNATokenizer(padding_side="right")
    assert right(["A", "AC"], padding=True)["input_ids"][0] == [7, 1, 4]


def test_truncation_keeps_sep(tokenizer: HyenaDNATokenizer) -> None:
    ids = tokenizer("A" * 50, truncation=True)["input_ids"]
    assert ids == [7] * 19 + [1]


def test_decoding(tokenizer: HyenaDNATokenizer) -> None:
    ids = tokenizer("ACGTN")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ACGTN"
    assert tokenizer.decode(ids) == "ACGTN[SEP]"
    assert tokenizer.batch_decode([[7, 8], [9]]) == ["AC", "G"]
    # The model's embedding has 16 rows: ids without a token are unknown rather than an error.
    assert tokenizer.decode([7, 15]) == "A[UNK]"


def test_special_tokens_mask(tokenizer: HyenaDNATokenizer) -> None:
    assert tokenizer("AC", return_special_tokens_mask=True)["special_tokens_mask"] == [0, 0, 1]
    assert tokenizer("AC", "G", return_special_tokens_mask=True)["special_tokens_mask"] == [0, 0, 1, 0, 1]
    assert tokenizer.get_special_tokens_mask([7, 4, 1], already_has_special_tokens=True) == [0, 1, 1]


def test_collating_for_language_modelling(tokenizer: HyenaDNATokenizer) -> None:
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collator([tokenizer("ACG"), tokenizer("AC")])
    assert batch["labels"].tolist() == [[7, 8, 9, 1], [-100, 7, 8, 1]]


def test_saved_tokenizers_load(tokenizer: HyenaDNATokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for loaded in (HyenaDNATokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert type(loaded) is HyenaDNATokenizer
        assert loaded.model_max_length == 20 and loaded.padding_side == "left"
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded(["ACGTNx", "A"], padding=True) == tokenizer(["ACGTNx", "A"], padding=True)


def test_added_tokens_come_after_the_vocabulary(tokenizer: HyenaDNATokenizer, tmp_path: Path) -> None:
    assert tokenizer.add_tokens(["R"]) == 1
    assert tokenizer("AR")["input_ids"] == [7, 12, 1]
    tokenizer.save_pretrained(tmp_path)
    assert HyenaDNATokenizer.from_pretrained(tmp_path)("AR")["input_ids"] == [7, 12, 1]
    assert torch.tensor(tokenizer.convert_tokens_to_ids(["R"])).item() == 12
