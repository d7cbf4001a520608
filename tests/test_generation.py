"""Step-by-step decoding: with a cache the models compute what they compute without, whatever becomes of the cache."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.big_modeling import disk_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from model_factory import HYENADNA, dna_ids, tiny_hyena, tiny_hyenadna
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_flashfftconv import patch_model, sparsify_model
from hf_flashfftconv.models import HyenaCache, modeling_hyenadna
from hf_flashfftconv.models.cache import CACHE

pytestmark = pytest.mark.no_cover

BUILDERS = [tiny_hyenadna, tiny_hyena]
every_model = pytest.mark.parametrize("build", BUILDERS)
Builder = Callable[..., PreTrainedModel]


@torch.no_grad()
def decoded(model: PreTrainedModel, ids: Tensor, pieces: list[int], cache: HyenaCache | None = None) -> Tensor:
    """Logits of all positions, computed piece by piece."""
    cache = HyenaCache(model.config, block_size=4) if cache is None else cache
    return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)], dim=1)


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest difference at any position, relative to the largest logit."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def norm_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def both_ways(model: PreTrainedModel, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """What `generate` returns with and without a cache, from the same random numbers."""
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outputs.append(model.generate(ids, use_cache=use_cache, **options))
    return outputs[0], outputs[1]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    build=st.sampled_from(BUILDERS),
    pieces=st.lists(st.one_of(st.just(1), st.integers(1, 40)), min_size=1, max_size=30),
    batch=st.integers(1, 3),
    block_size=st.sampled_from([1, 4, 16, 128]),
    seed=st.integers(0, 9),
)
def test_every_position_is_that_of_the_full_forward(
    build: Builder, pieces: list[int], batch: int, block_size: int, seed: int
) -> None:
    model, ids = build(max_seq_len=300), dna_ids(batch, 300, seed)
    with torch.no_grad():
        expected = model(ids).logits
    cut = [min(n, 300 - sum(pieces[:i])) for i, n in enumerate(pieces) if sum(pieces[:i]) < 300]
    logits = decoded(model, ids[:, : sum(cut)], cut, HyenaCache(model.config, block_size))
    assert relative(logits, expected[:, : sum(cut)]) <= 1e-5


@every_model
def test_long_sequences_at_the_usual_block_size(build: Builder) -> None:
    model, ids = build(max_seq_len=1100), dna_ids(1, 1100)
    with torch.no_grad():
        expected = model(ids).logits
    assert relative(decoded(model, ids, [300, *[1] * 600, 200], HyenaCache(model.config)), expected) <= 1e-5


@every_model
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 4},
    ],
    ids=lambda options: "-".join(options),
)
def test_generate_gives_the_same_tokens(build: Builder, options: dict) -> None:
    with_cache, without = both_ways(build(), dna_ids(2, 20), max_new_tokens=70, **options)
    assert torch.equal(with_cache, without)
    assert len(with_cache.unique()) > 2


@every_model
def test_generate_decodes_one_position_at_a_time(build: Builder) -> None:
    model, lengths = build(), []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    model.generate(dna_ids(1, 20), max_new_tokens=5, do_sample=False)
    assert lengths == [20, 1, 1, 1, 1]
    lengths.clear()
    model.generate(dna_ids(1, 20), max_new_tokens=3, do_sample=False, use_cache=False)
    assert lengths == [20, 21, 22]
    lengths.clear()
    model.generate(dna_ids(1, 20), max_new_tokens=3, do_sample=False, prefill_chunk_size=8)
    assert lengths == [8, 8, 4, 1, 1]
    lengths.clear()
    model.train().generate(dna_ids(1, 20), max_new_tokens=2, do_sample=False)
    assert lengths == [20, 21], "dropout of another position each time: no cache"


@every_model
def test_generate_up_to_the_longest_sequence(build: Builder) -> None:
    model = build(vocab_size=16)
    longest, ids = model.config.max_seq_len, dna_ids(1, 20)
    # The last token is never an input.
    with_cache, without = both_ways(model, ids, max_new_tokens=longest - 19, do_sample=False)
    assert with_cache.shape[1] == longest + 1
    assert torch.equal(with_cache, without)
    with pytest.raises(ValueError, match=f"length {longest + 1} exceeds {longest}"):
        model.generate(ids, max_new_tokens=longest - 18, do_sample=False)


@every_model
@pytest.mark.parametrize("helper", ["prompt lookup", "smaller model", "the same model"])
def test_assisted_generation(build: Builder, helper: str) -> None:
    model, ids = build(vocab_size=16), dna_ids(1, 20)
    assistant = build(vocab_size=16, n_layer=1 if helper == "smaller model" else 2)
    options = {"prompt_lookup_num_tokens": 6} if helper == "prompt lookup" else {"assistant_model": assistant}
    expected = model.generate(ids, max_new_tokens=70, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=70, do_sample=False, **options), expected)


def with_padding_rows(model: PreTrainedModel, weight: float) -> PreTrainedModel:
    """The model with one weight in all the rows that pad its vocabulary, and with hidden states of a positive sum."""
    torch.nn.init.ones_(model.hyena.backbone.ln_f.bias)
    torch.nn.init.constant_(model.lm_head.weight[model.config.vocab_size :], weight)
    return model


@every_model
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"do_sample": True},
        {"num_beams": 3},
        {"num_beams": 3, "use_cache": False},
        {"num_beams": 3, "do_sample": True},
        {"guidance_scale": 1.5},
        {"prompt_lookup_num_tokens": 6},
        {"assistant_model": None, "do_sample": True},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_rows_that_pad_the_vocabulary_are_never_generated(build: Builder, options: dict) -> None:
    ids, outputs = dna_ids(1, 20), []
    for weight in (-1e3, 1e3):
        model = with_padding_rows(build(), weight)
        size = model.config.vocab_size
        assert (model(ids).logits.argmax(-1) >= size).all() == (weight > 0)
        if "assistant_model" in options:
            options = {**options, "assistant_model": with_padding_rows(build(n_layer=1), weight)}
        torch.manual_seed(0)
        outputs.append(model.generate(ids, **{"do_sample": False, **options}, max_new_tokens=30))
    assert torch.equal(*outputs) and outputs[1].max() < size


@every_model
def test_scores_of_tokens_make_up_those_of_beams(build: Builder) -> None:
    model, options = build(), {"return_dict_in_generate": True, "output_scores": True, "do_sample": False}
    beams = model.generate(dna_ids(), max_new_tokens=30, num_beams=3, **options)
    scores = model.compute_transition_scores(beams.sequences, beams.scores, beams.beam_indices)
    torch.testing.assert_close(scores.mean(dim=1), beams.sequences_scores)


def test_a_prompt_of_embeddings_and_hidden_states() -> None:
    model, ids = tiny_hyenadna(), dna_ids(2, 20)
    embedded = model.get_input_embeddings()(ids)
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True}
    outputs = model.generate(inputs_embeds=embedded, **options)
    expected = model.generate(inputs_embeds=embedded, use_cache=False, **options)
    assert torch.equal(outputs.sequences, expected.sequences)
    assert [step[-1].shape[1] for step in outputs.hidden_states] == [20, *[1] * 19]
    for step, whole in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert relative(step[-1][:, -1], whole[-1][:, -1]) <= 1e-5


@every_model
def test_a_conversation_in_several_calls(build: Builder) -> None:
    model, first, second = build(), dna_ids(2, 20), dna_ids(2, 15, seed=1)
    options = {"do_sample": False, "max_new_tokens": 30}
    start = model.generate(first, return_dict_in_generate=True, **options)
    whole = torch.cat([start.sequences, second], dim=1)
    expected = model.generate(whole, use_cache=False, **options)
    kept = copy.deepcopy(start.past_key_values)
    assert kept.get_seq_length() == 49
    assert torch.equal(model.generate(whole, past_key_values=start.past_key_values, **options), expected)
    assert torch.equal(model.generate(whole, past_key_values=kept, **options), expected), "the copy was not touched"


@every_model
def test_left_padding_acts_as_without_a_cache(build: Builder, caplog: pytest.LogCaptureFixture) -> None:
    modeling_hyenadna._warn_about_padding.cache_clear()
    model, ids = build(), dna_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7], ids[0, :7] = 0, 4
    with caplog.at_level(logging.WARNING, "hf_flashfftconv"):
        with_cache, without = both_ways(model, ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    assert torch.equal(with_cache, without)
    assert len(caplog.records) == 1


@every_model
def test_patched_and_sparse_models_decode_too(build: Builder) -> None:
    ids = dna_ids(2, 100)
    model = patch_model(sparsify_model(build(), 0.3))
    with torch.no_grad():
        expected = model(ids).logits
    assert relative(expected, build()(ids).logits) > 1e-3, "sparsity changes something"
    assert relative(decoded(model, ids, [30, *[1] * 50, 20]), expected) <= 1e-5
    with_cache, without = both_ways(model, ids[:, :20], max_new_tokens=60, do_sample=False)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_no_worse_than_in_the_full_forward(
    dtype: torch.dtype, autocast: bool, tmp_path: Path
) -> None:
    model, ids = tiny_hyenadna(), dna_ids(4, 128)
    model.save_pretrained(tmp_path)
    half = model if autocast else type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    with torch.no_grad():
        reference = copy.deepcopy(model).double()(ids).logits
        with torch.autocast("cpu", dtype, enabled=autocast):
            full, cached = half(ids).logits, decoded(half, ids, [30, *[1] * 98])
    assert norm_error(cached, reference) <= 1.05 * norm_error(full, reference)
    with torch.autocast("cpu", dtype, enabled=autocast):
        assert half.generate(ids, max_new_tokens=2, do_sample=True, num_beams=2).shape == (4, 130)


@every_model
def test_cut_filters_decode_past_the_cut_and_the_longest_filter(build: Builder) -> None:
    model, ids = build(max_seq_len=130), dna_ids(2, 400)
    # The cache was made for the whole filters: the same, with room as it is needed.
    before = HyenaCache(model.config, block_size=4)
    patch_model(model, filter_length=24, taper=0.25)
    with torch.no_grad():
        expected = model(ids).logits
    pieces = [7, *[1] * 40, 90, *[1] * 20, 143, 100]
    assert relative(decoded(model, ids, pieces), expected) <= 1e-5
    assert relative(decoded(model, ids, pieces, before), expected) <= 1e-5
    cached, plain = both_ways(model, ids[:, :20], max_new_tokens=150, do_sample=False)
    assert torch.equal(cached, plain)


def test_double_precision_stays() -> None:
    model, ids = tiny_hyenadna().double(), dna_ids(1, 100)
    assert relative(decoded(model, ids, [9, *[1] * 91]), model(ids).logits.detach()) <= 1e-13


def test_offloaded_weights(tmp_path: Path) -> None:
    model, ids = tiny_hyenadna(), dna_ids(2, 20)
    expected = model.generate(ids, max_new_tokens=30, do_sample=False, use_cache=False)
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.hyena.backbone.layers[0].mixer.filter_fn.bias.is_meta
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False), expected)


def test_compiled_models_decode_without_compiling_each_step() -> None:
    torch.compiler.reset()
    model, ids, graphs = tiny_hyenadna(), dna_ids(2, 60), []
    expected = model(ids).logits.detach()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    cache = HyenaCache(model.config, block_size=4)
    decoded(compiled, ids[:, :43], [40, 1, 1, 1], cache)
    compiled_before = len(graphs)
    assert relative(decoded(compiled, ids[:, 43:], [1] * 17, cache), expected[:, 43:]) <= 1e-5
    assert len(graphs) == compiled_before


def test_nothing_is_cached_unless_asked_for() -> None:
    model, ids = tiny_hyenadna(), dna_ids()
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=False).past_key_values is None
    assert [type(x) for x in model(ids, use_cache=True, return_dict=False)] == [Tensor, HyenaCache]
    assert model.hyena(ids, use_cache=True).past_key_values.get_seq_length() == 60
    assert model.train()(ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match=r"training mode cannot use past_key_values: call model.eval\(\)"):
        model(ids, past_key_values=HyenaCache(model.config))


@torch.no_grad()
def test_a_cache_goes_by_both_names() -> None:
    model, ids = tiny_hyenadna().eval(), dna_ids(2, 60)
    expected = model(ids).logits[:, 20:]
    for name in ("past_key_values", "cache"):
        cache = HyenaCache(model.config)
        start = model(ids[:, :20], **{name: cache})
        assert start[CACHE] is cache
        torch.testing.assert_close(model(ids[:, 20:], **{name: cache}).logits, expected, rtol=1e-5, atol=1e-5)


def test_training_with_checkpointing_does_as_it_did() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_hyenadna().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        outputs = model(dna_ids(), labels=dna_ids(), use_cache=True)
        outputs.loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_gradients_through_a_cache_are_an_error() -> None:
    model, ids = tiny_hyenadna(), dna_ids()
    with pytest.raises(RuntimeError, match="No gradients flow through a cache"):
        model(ids, use_cache=True, labels=ids).loss.backward()
    model(ids, labels=ids).loss.backward()


@every_model
def test_batches_are_reordered_repeated_and_cut(build: Builder) -> None:
    model, ids = build(), dna_ids(3, 60)
    expected = model(ids).logits.detach()
    cache = HyenaCache(model.config, block_size=4)
    decoded(model, ids[:, :30], [25, 1, 1, 1, 1, 1], cache)
    rows = torch.tensor([2, 0, 0, 1])
    cache.reorder_cache(rows)
    assert relative(decoded(model, ids[rows, 30:36], [1] * 6, cache), expected[rows, 30:36]) <= 1e-5
    cache.batch_repeat_interleave(2)
    rows = rows.repeat_interleave(2)
    assert relative(decoded(model, ids[rows, 36:50], [9, 5], cache), expected[rows, 36:50]) <= 1e-5
    keep = torch.tensor([True, False] * 4)
    cache.batch_select_indices(keep)
    assert relative(decoded(model, ids[rows[keep], 50:], [1] * 10, cache), expected[rows[keep], 50:]) <= 1e-5
    cache.reset()
    assert cache.get_seq_length() == 0
    assert relative(decoded(model, ids, [60], cache), expected) <= 1e-5


@settings(max_examples=15, deadline=None, derandomize=True)
@given(steps=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=12))
def test_positions_are_taken_back(steps: list[tuple[int, int]]) -> None:
    model, ids = tiny_hyenadna(max_seq_len=200), dna_ids(1, 200)
    with torch.no_grad():
        expected = model(ids).logits
    cache = HyenaCache(model.config, block_size=4)
    decoded(model, ids[:, :5], [5], cache)
    cache.activate_past_recording()
    for added, removed in steps:
        start, removed = cache.get_seq_length(), min(added, removed)
        # What will be taken back is not what the sequence goes on with.
        wrong = ids[:, start : start + added].clone()
        wrong[:, added - removed :] = 7
        decoded(model, wrong, [added], cache)
        cache.crop(-removed)
        assert cache.get_seq_length() == start + added - removed
        assert cache.layers[0]._short.shape[-1] == min(2, cache.get_seq_length())
    start = cache.get_seq_length()
    logits = decoded(model, ids[:, start : start + 12], [1, 3, *[1] * 8], cache)
    assert relative(logits, expected[:, start : start + 12]) <= 1e-5


def test_what_was_not_recorded_cannot_be_taken_back() -> None:
    model, ids = tiny_hyenadna(), dna_ids(1, 40)
    cache = model(ids[:, :20], use_cache=True).past_key_values
    assert not cache.layers[0].is_croppable
    with pytest.raises(RuntimeError, match=r"Cannot remove 3 positions .* `activate_past_recording`"):
        cache.crop(-3)
    cache.crop(0)
    cache.activate_past_recording()
    decoded(model, ids[:, 20:30], [10], cache)
    # The length to keep, as the first releases of transformers 5 pass it.
    cache.crop(25)
    assert cache.layers[0].is_croppable
    assert (cache.get_seq_length(), cache.get_max_length()) == (25, HYENADNA["max_seq_len"])
    with pytest.raises(RuntimeError, match="Cannot remove 1 positions"):
        cache.crop(-1)
    assert relative(decoded(model, ids[:, 25:], [1] * 15, cache), model(ids).logits[:, 25:].detach()) <= 1e-5


def test_errors_leave_the_cache_as_it_was() -> None:
    model, ids = tiny_hyenadna(), dna_ids(2, 130)
    expected = model(ids).logits.detach()
    with pytest.raises(ValueError, match="must be a HyenaCache of 2 layers, got a DynamicCache of 0"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="a HyenaCache of 2 layers, got a HyenaCache of 1"):
        model(ids, past_key_values=HyenaCache(tiny_hyenadna(n_layer=1).config))
    cache = HyenaCache(model.config, block_size=4)
    decoded(model, ids[:, :100], [90, *[1] * 10], cache)
    with pytest.raises(ValueError, match="length 131 exceeds 130"):
        model(ids[:, :31], past_key_values=cache)
    with pytest.raises(ValueError, match="holds a batch of 2 sequences, got 1"):
        model(ids[:1, :1], past_key_values=cache)
    with pytest.raises(NotImplementedError, match="no keys and values"):
        cache.update(ids, ids, 0)
    assert cache.get_mask_sizes(1, 0) == (101, 0)
    assert relative(decoded(model, ids[:, 100:], [10, *[1] * 20], cache), expected[:, 100:]) <= 1e-5


def test_memory_follows_the_length() -> None:
    model = tiny_hyenadna(max_seq_len=100_000)
    cache = model(dna_ids(3, 1000), use_cache=True).past_key_values
    decoded(model, dna_ids(3, 100), [1] * 100, cache)
    for layer in cache.layers:
        tensors = [x for x in (*vars(layer._long).values(), layer._short) if isinstance(x, Tensor)]
        held = sum(x.untyped_storage().nbytes() for x in (*tensors, *layer._long._spectra.values()))
        assert held <= 16 * 2048 * (3 * 4 + 3 * 4 + 12)


@pytest.mark.gpu
@every_model
def test_on_a_gpu(build: Builder) -> None:
    model, ids = build(max_seq_len=1200).cuda(), dna_ids(2, 1200).cuda()
    with torch.no_grad():
        expected = model(ids).logits
        assert relative(decoded(model, ids, [700, *[1] * 400, 100], HyenaCache(model.config)), expected) <= 1e-5
        with_cache, without = both_ways(model, ids[:, :700], max_new_tokens=50, num_beams=2, do_sample=False)
        assert torch.equal(with_cache, without)
        with torch.autocast("cuda", torch.bfloat16):
            full = model(ids).logits
            cached = decoded(model, ids, [700, *[1] * 400, 100], HyenaCache(model.config))
        assert norm_error(cached, expected) <= 1.05 * norm_error(full, expected)
