"""What users call: outputs, losses, generation, compilation, padding, and the errors for bad input."""

import logging

import pytest
import torch
import torch.nn.functional as F
from model_factory import M2_BERT, dna_ids, tiny_hyena, tiny_hyenadna, tiny_hyenadna_classifier, tiny_m2bert
from transformers import StoppingCriteria, StoppingCriteriaList

from hf_flashfftconv.models import (
    HyenaDNAConfig,
    HyenaDNAModel,
    HyenaLMConfig,
    M2BertConfig,
    M2BertForSequenceClassification,
    M2BertModel,
    modeling_hyenadna,
)

pytestmark = pytest.mark.no_cover

BUILDERS = [tiny_hyenadna, tiny_hyenadna_classifier, tiny_hyena, tiny_m2bert]


def tiny_m2_classifier(**overrides) -> M2BertForSequenceClassification:
    return M2BertForSequenceClassification(M2BertConfig(**{**M2_BERT, "num_labels": 3, **overrides})).eval()


@pytest.mark.parametrize("build", BUILDERS)
def test_hidden_states_and_tuples(build) -> None:
    model, ids = build(), dna_ids()
    outputs = model(ids, output_hidden_states=True)
    layers = model.config.num_hidden_layers
    assert len(outputs.hidden_states) == (layers + 1 if build is tiny_m2bert else layers + 2)
    assert all(state.shape == (2, 60, 16) for state in outputs.hidden_states)
    as_tuple = model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], outputs.logits)
    base = model.base_model(ids, return_dict=False)
    assert torch.equal(base[0], outputs.hidden_states[-1])
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == len(outputs.hidden_states)


@pytest.mark.parametrize("build", BUILDERS)
def test_embeddings_instead_of_ids(build) -> None:
    model, ids = build(), dna_ids()
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


@pytest.mark.parametrize("build", [tiny_hyenadna, tiny_hyena])
def test_causal_loss_shifts_the_labels_and_ignores_minus_100(build) -> None:
    model, ids = build(), dna_ids()
    labels = ids.clone()
    labels[:, :20] = -100
    outputs = model(ids, labels=labels)
    expected = F.cross_entropy(outputs.logits[:, 19:-1].flatten(0, 1), ids[:, 20:].flatten())
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    summed = model(ids, labels=labels, num_items_in_batch=10).loss
    assert summed.item() == pytest.approx(expected.item() * 80 / 10, rel=1e-6)
    assert torch.allclose(model(ids, logits_to_keep=1).logits, outputs.logits[:, -1:], atol=1e-5)


def test_masked_loss_counts_labelled_tokens_only() -> None:
    model, ids = tiny_m2bert(), dna_ids()
    labels = torch.full_like(ids, -100)
    labels[:, 3::7] = ids[:, 3::7]
    outputs = model(ids, labels=labels)
    expected = F.cross_entropy(outputs.logits[:, 3::7].flatten(0, 1), ids[:, 3::7].flatten())
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("build", [tiny_hyenadna_classifier, tiny_m2_classifier])
def test_classification_losses(build) -> None:
    ids = dna_ids()
    model = build()
    outputs = model(ids, labels=torch.tensor([0, 2]))
    assert outputs.loss.item() == pytest.approx(F.cross_entropy(outputs.logits, torch.tensor([0, 2])).item())
    several = build(problem_type="multi_label_classification")(ids, labels=torch.tensor([[1.0, 0, 1], [0, 0, 1]]))
    assert several.loss.item() > 0
    regression = build(num_labels=1)(ids, labels=torch.tensor([0.5, -1.0]))
    expected = F.mse_loss(regression.logits.squeeze(), torch.tensor([0.5, -1.0]))
    assert regression.loss.item() == pytest.approx(expected.item())


def test_the_classifier_reads_the_last_token_that_is_not_padding() -> None:
    model, pad = tiny_hyenadna_classifier(), 4
    ids = dna_ids(2, 30)
    expected = model(ids).logits
    right = torch.cat([ids, torch.full((2, 10), pad)], dim=1)
    assert torch.allclose(model(right).logits, expected, atol=1e-5)
    left = torch.cat([torch.full((2, 10), pad), ids], dim=1)
    states = model.score(model.hyena(left).last_hidden_state)
    assert torch.allclose(model(left).logits, states[:, -1])
    assert torch.allclose(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)
    unpadded = tiny_hyenadna_classifier(pad_token_id=None)
    assert unpadded(ids[:1]).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="pad_token_id"):
        unpadded(ids)


@pytest.mark.parametrize("build", [tiny_hyenadna, tiny_hyena])
def test_generate_continues_greedily(build) -> None:
    model, ids = build(), dna_ids(2, 12)
    generated = model.generate(ids, max_new_tokens=9, do_sample=False)
    expected = ids
    for _ in range(9):
        logits = model(expected).logits[:, -1:, : model.config.vocab_size]
        expected = torch.cat([expected, logits.argmax(-1)], dim=1)
    assert torch.equal(generated, expected)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embedded, max_new_tokens=9, do_sample=False), expected[:, 12:])
    with pytest.raises(ValueError, match="not both"):
        model.generate(ids, inputs_embeds=embedded, max_new_tokens=9)


def test_generate_samples_searches_and_stops() -> None:
    model, ids = tiny_hyenadna(), dna_ids(2, 12)
    assert model.generate(ids, max_new_tokens=5, do_sample=True, top_k=3, num_return_sequences=2).shape == (4, 17)
    assert model.generate(ids, max_new_tokens=5, num_beams=3).shape == (2, 17)
    first = model(ids).logits[0, -1].argmax().item()
    assert model.generate(ids[:1], max_new_tokens=5, do_sample=False, eos_token_id=first).shape == (1, 13)

    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 15)

    stopped = model.generate(ids, max_new_tokens=9, stopping_criteria=StoppingCriteriaList([AfterThree()]))
    assert stopped.shape == (2, 15)
    with pytest.raises(ValueError, match="length 131 exceeds 130"):
        model.generate(ids, max_new_tokens=150)


@pytest.mark.parametrize("build", BUILDERS)
def test_a_longer_sequence_than_the_filters_is_an_error(build) -> None:
    model = build()
    longest = model.config.max_position_embeddings
    assert model(dna_ids(1, longest)).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"length {longest + 1} exceeds"):
        model(dna_ids(1, longest + 1))


def test_filters_of_m2_bert_may_be_shorter_than_its_positions() -> None:
    model = tiny_m2bert(long_conv_l_max=40)
    assert model(dna_ids(1, 40)).logits.shape == (1, 40, 48)
    with pytest.raises(ValueError, match="length 41 exceeds 40"):
        model(dna_ids(1, 41))


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(build, reentrant: bool) -> None:
    plain, checkpointed, ids = build().train(), build().train(), dna_ids()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    projections = [m for n, m in checkpointed.named_modules() if n.endswith(("in_proj", "in_linear"))]
    projections[0].register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, checkpointed):
        model(ids).logits.square().sum().backward()
    assert len(calls) == 2, "the block did not run again in the backward pass"
    for (name, a), (_, b) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("build", [tiny_hyenadna, tiny_m2bert])
def test_compiles_to_one_graph(build) -> None:
    torch.compiler.reset()
    model, ids = build(), dna_ids()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    mask = torch.ones_like(ids)
    assert torch.allclose(compiled(ids, attention_mask=mask, labels=ids).loss, model(ids, labels=ids).loss, atol=1e-5)
    compiled(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("build", [tiny_hyenadna, tiny_hyena, tiny_hyenadna_classifier])
def test_resized_embeddings_survive_saving(build, tmp_path) -> None:
    model, ids = build(), dna_ids()
    before = model(ids).logits
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows + 1)
    assert model.get_input_embeddings().num_embeddings == rows + 8 == model.config.vocab_size
    after = model(ids).logits
    assert torch.equal(after[..., : before.shape[-1]], before)
    if build is not tiny_hyenadna_classifier:
        assert model.get_output_embeddings().out_features == rows + 8
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(ids).logits, after)


def test_resizing_to_the_tokenizer_changes_nothing() -> None:
    model = tiny_hyenadna()
    model.resize_token_embeddings(12)
    assert model.get_input_embeddings().num_embeddings == 16


def test_a_tied_head_is_the_embedding() -> None:
    tied = tiny_hyena()
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    free = tiny_hyena(tie_word_embeddings=False)
    assert free.lm_head.weight is not free.get_input_embeddings().weight
    masked = tiny_m2bert()
    assert masked.get_output_embeddings().weight is masked.get_input_embeddings().weight


def test_only_masks_that_hide_earlier_tokens_warn_and_once(caplog) -> None:
    modeling_hyenadna._warn_about_padding.cache_clear()
    model, ids = tiny_hyenadna(), dna_ids(2, 20)
    right, left = torch.ones_like(ids), torch.ones_like(ids)
    right[0, 15:] = 0
    left[0, :5] = 0
    with caplog.at_level(logging.WARNING, "hf_flashfftconv"):
        assert torch.equal(model(ids, attention_mask=right).logits, model(ids).logits)
        assert not caplog.records
        model(ids, attention_mask=left)
        model(ids, attention_mask=left)
    assert len(caplog.records) == 1 and "Pad on the right" in caplog.text


def test_dropout_acts_in_training_only() -> None:
    ids = dna_ids()
    for model in (
        tiny_hyenadna(hyena_dropout=0.5),
        tiny_hyena(resid_dropout=0.5),
        tiny_m2bert(hidden_dropout_prob=0.5),
    ):
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
    quiet = tiny_hyenadna(embed_dropout=0.5).train()
    assert torch.equal(quiet(ids).logits, quiet(ids).logits)


def test_sentence_embeddings_of_m2_bert() -> None:
    ids = dna_ids()
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    encoder = tiny_m2_classifier(architectures=["BertForTextEncoding"])
    assert encoder(ids)["sentence_embedding"].shape == (2, 16)
    assert encoder(ids).logits is None
    pooled = encoder.bert(ids).pooler_output
    assert torch.equal(encoder(ids).sentence_embedding, pooled)
    unit = tiny_m2_classifier(gather_sentence_embeddings=True, use_normalized_embeddings=True, use_cls_token=True)
    expected = F.normalize(unit.bert(ids).last_hidden_state[:, 0], dim=1)
    assert torch.equal(unit(ids).sentence_embedding, expected)
    average = M2BertModel(M2BertConfig(**M2_BERT, pool_all=True)).eval()
    states = average(ids).last_hidden_state
    means = torch.stack([states[0, :30].mean(0), states[1].mean(0)])
    outputs = average(ids, attention_mask=mask).pooler_output
    assert torch.allclose(outputs, torch.tanh(average.pooler.dense(means)), atol=1e-6)
    assert torch.allclose(average(ids).pooler_output[1], outputs[1], atol=1e-6)


def test_frequencies_that_are_not_trained_are_numbers(tmp_path) -> None:
    model, ids = tiny_hyenadna(train_freq=False), dna_ids()
    assert not [name for name, _ in model.named_parameters() if name.endswith("freq")]
    assert torch.allclose(model(ids).logits, tiny_hyenadna()(ids).logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (HyenaDNAConfig, {"hyena_order": 3}, "hyena_order=3 is not supported, only order 2"),
        (HyenaDNAConfig, {"short_filter_order": 4}, "short_filter_order=4 is not supported"),
        (HyenaDNAConfig, {"emb_dim": 4}, "emb_dim=4 must be odd"),
        (HyenaLMConfig, {"emb_dim": 1}, "emb_dim=1 must be odd and at least 3"),
        (HyenaDNAConfig, {"max_seq_len": 0}, "max_seq_len=0 must be at least 1"),
        (M2BertConfig, {"long_conv_l_max": -1}, "long_conv_l_max=-1"),
        (M2BertConfig, {"monarch_mixer_sequence_mixing": False}, "attention model"),
        (M2BertConfig, {"use_flash_mm": True}, "use_flash_mm=True is not supported"),
        (M2BertConfig, {"use_monarch_mlp": True, "hidden_size": 30}, "monarch_mlp_nblocks=4"),
    ],
)
def test_impossible_configurations_are_refused(config_class: type, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_class(**fields)


def test_configurations_answer_to_the_usual_names() -> None:
    config = HyenaDNAConfig(hidden_size=24, num_hidden_layers=3, max_position_embeddings=40)
    assert (config.d_model, config.n_layer, config.max_seq_len, config.intermediate_size) == (24, 3, 40, 96)
    assert HyenaDNAModel(config).backbone.layers[2].mixer.l_max == 40


def test_an_empty_batch_gives_empty_logits_and_an_empty_sequence_an_error() -> None:
    for build in (tiny_hyenadna, tiny_hyena, tiny_m2bert):
        model = build()
        assert model(dna_ids(2, 10)[:0]).logits.shape[:2] == (0, 10)
        with pytest.raises(ValueError, match=r"shape \(2, 0\) has no tokens"):
            model(dna_ids(2, 10)[:, :0])


@pytest.mark.gpu
@pytest.mark.parametrize("build", BUILDERS)
def test_on_a_gpu(build) -> None:
    model, ids = build(), dna_ids()
    expected = model(ids).logits
    model.cuda()
    assert torch.allclose(model(ids.cuda()).logits.cpu(), expected, rtol=1e-3, atol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(ids.cuda(), attention_mask=torch.ones_like(ids).cuda()).logits.float().cpu()
    assert (logits - expected).norm() < 0.05 * expected.norm()
