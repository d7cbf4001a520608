"""The models against direct O(L^2) sums in float64, written from the formulae and fed with the state dict alone."""

import math

import pytest
import torch
from model_factory import dna_ids, tiny_hyena, tiny_hyenadna, tiny_m2bert
from torch import Tensor

from hf_flashfftconv.models.hyena import HyenaPositionalEmbedding, long_conv

State = dict[str, Tensor]


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def layer_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]


def positions(length: int, longest: int, emb_dim: int) -> tuple[Tensor, Tensor]:
    bands = (emb_dim - 1) // 2
    t = torch.tensor([i / (longest - 1) for i in range(length)], dtype=torch.float64)[:, None]
    f = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)
    phase = torch.tensor([2 * math.pi * i / longest for i in range(length)], dtype=torch.float64)[:, None] * f
    return torch.cat([t, phase.cos(), -phase.sin()], dim=1), t


def taps(state: State, name: str, net: str, length: int, shift: float | None, w_mod: float = 1) -> Tensor:
    """Filter taps (length, channels); `shift=None` switches the decay window off."""
    h = state[f"{name}.pos_emb.z"][0, :length]
    for layer in (0, 2, 4):
        h = torch.sin(w_mod * state[f"{name}.{net}.{layer + 1}.freq"] * linear(state, f"{name}.{net}.{layer}", h))
    h = linear(state, f"{name}.{net}.6", h)
    if shift is None:
        return h
    t = state[f"{name}.pos_emb.t"][0, :length]
    return h * (torch.exp(-t * state[f"{name}.modulation.deltas"][0].abs()) + shift)


def direct_conv(x: Tensor, k: Tensor, skip: Tensor, k_rev: Tensor | None = None) -> Tensor:
    """The sums of the definition; x (batch, length, channels), k and k_rev (length, channels)."""
    y = x * skip
    for t in range(x.shape[1]):
        for s in range(x.shape[1]):
            if s <= t:
                y[:, t] += k[t - s] * x[:, s]
            elif k_rev is not None:
                y[:, t] += k_rev[s - t - 1] * x[:, s]
    return y


def direct_short_conv(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"][:, 0]
    padded = torch.cat([x.new_zeros(x.shape[0], 2, x.shape[2]), x], dim=1)
    return sum(weight[:, j] * padded[:, j : j + x.shape[1]] for j in range(3)) + state[f"{name}.bias"]


def hyena_logits(state: State, ids: Tensor, config, shift: float | None, use_bias=True, normalized=False) -> Tensor:
    x = state["hyena.backbone.embeddings.word_embeddings.weight"][ids]
    for i in range(config.n_layer):
        name = f"hyena.backbone.layers.{i}"
        u = layer_norm(state, f"{name}.norm1", x, 1e-5)
        mixed = direct_short_conv(state, f"{name}.mixer.short_filter", linear(state, f"{name}.mixer.in_proj", u))
        x0, x1, v = mixed.chunk(3, dim=-1)
        k = taps(state, f"{name}.mixer.filter_fn", "implicit_filter", ids.shape[1], shift)
        if normalized:
            k = k / k.abs().sum(-1, keepdim=True)
        y = x0 * direct_conv(v * x1, k, state[f"{name}.mixer.filter_fn.bias"] * use_bias)
        x = x + linear(state, f"{name}.mixer.out_proj", y)
        h = linear(state, f"{name}.mlp.fc1", layer_norm(state, f"{name}.norm2", x, 1e-5))
        gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(state, f"{name}.mlp.fc2", gelu)
    return linear(state, "lm_head", layer_norm(state, "hyena.backbone.ln_f", x, config.layer_norm_epsilon))


def double_state(model: torch.nn.Module) -> State:
    return {name: value.detach().double() for name, value in model.state_dict().items()}


def check_logits(model: torch.nn.Module, ids: Tensor, expected: Tensor) -> None:
    # The sines multiply rounding errors by their frequency, layer by layer: hence 5e-5 in float32.
    assert relative(model(ids).logits, expected) < 5e-5
    assert relative(model.double()(ids).logits, expected) < 1e-11


@pytest.mark.parametrize("length", [1, 2, 37, 130])
def test_hyenadna_is_the_direct_sum(length: int) -> None:
    model, ids = tiny_hyenadna(), dna_ids(2, length)
    expected = hyena_logits(double_state(model), ids, model.config, shift=0.05)
    check_logits(model, ids, expected)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {"shift": None}),
        ({"modulate": True}, {"shift": 0.0}),
        ({"modulate": True, "modulation_shift": 0.02, "normalized": True}, {"shift": 0.02, "normalized": True}),
        ({"use_bias": False, "tie_word_embeddings": False}, {"shift": None, "use_bias": False}),
    ],
    ids=["released", "modulated", "normalised", "no-skip"],
)
def test_hyena_lm_is_the_direct_sum(fields: dict, options: dict) -> None:
    model, ids = tiny_hyena(**fields), dna_ids(2, 33)
    check_logits(model, ids, hyena_logits(double_state(model), ids, model.config, **options))


def m2_logits(state: State, ids: Tensor, config) -> Tensor:
    embeddings, length = "bert.embeddings", ids.shape[1]
    x = state[f"{embeddings}.word_embeddings.weight"][ids] + state[f"{embeddings}.token_type_embeddings.weight"][0]
    if config.use_positional_encodings:
        x = x + state[f"{embeddings}.position_embeddings.weight"][:length]
    x = layer_norm(state, f"{embeddings}.LayerNorm", x, config.layer_norm_eps)

    def filters(name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        both = [
            taps(state, name, f"implicit_filter{end}", length, 0.0, config.hyena_w_mod)
            for end in ("", "_rev")[: 1 + config.bidirectional]
        ]
        return both[0], state[f"{name}.bias"], both[1] if config.bidirectional else None

    for i in range(config.num_hidden_layers):
        name = f"bert.encoder.layer.{i}"
        u = layer_norm(state, f"{name}.attention.layernorm", x, 1e-5) if config.hyena_training_additions else x
        projected = linear(state, f"{name}.attention.in_linear", u)
        x1, x2, v = direct_short_conv(state, f"{name}.attention.short_filter", projected).chunk(3, dim=-1)
        y = x2 * direct_conv(x1 * v, *filters(f"{name}.attention.filter_fn"))
        if config.residual_long_conv:
            y = y + direct_conv(u, *filters(f"{name}.attention.filter_fn2"))
        x = linear(state, f"{name}.attention.out_linear", y)
        h = x @ dense(state[f"{name}.mlp.gated_layers.weight"]).T
        width = config.intermediate_size
        h = gelu(h[..., :width]) * h[..., width:] if config.use_glu_mlp else gelu(h)
        h = h @ dense(state[f"{name}.mlp.wo.weight"]).T + state[f"{name}.mlp.wo.bias"]
        x = layer_norm(state, f"{name}.mlp.layernorm", h + x, config.layer_norm_eps)
    x = gelu(linear(state, "cls.predictions.transform.dense", x))
    return linear(state, "cls.predictions.decoder", layer_norm(state, "cls.predictions.transform.LayerNorm", x, 1e-12))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def dense(weight: Tensor) -> Tensor:
    return torch.block_diag(*weight) if weight.ndim == 3 else weight


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bidirectional": False},
        {"residual_long_conv": False, "use_positional_encodings": False},
        {"hyena_training_additions": True, "hyena_w_mod": 2},
        {"use_monarch_mlp": False},
        {"use_glu_mlp": False, "bidirectional": False, "residual_long_conv": False},
    ],
    ids=["published", "causal", "no-residual", "additions", "dense-mlp", "plain-mlp"],
)
def test_m2_bert_is_the_direct_sum(fields: dict) -> None:
    model, ids = tiny_m2bert(**fields), dna_ids(2, 37)
    check_logits(model, ids, m2_logits(double_state(model), ids, model.config))


@pytest.mark.parametrize(("longest", "emb_dim"), [(1026, 5), (32770, 5), (2048, 33)])
def test_position_tables_follow_the_formula(longest: int, emb_dim: int) -> None:
    z, t = HyenaPositionalEmbedding(emb_dim, longest).table()
    expected_z, expected_t = positions(longest, longest, emb_dim)
    # float32 rounds the angle, which reaches 2 pi (emb_dim - 3) / 2, before the sine is taken.
    assert (z[0] - expected_z).abs().max() < 1e-6 * emb_dim
    assert (t[0] - expected_t).abs().max() < 1e-7


def test_decay_rates_of_the_first_and_last_channel() -> None:
    model = tiny_hyenadna()
    deltas = model.hyena.backbone.layers[0].mixer.filter_fn.modulation.deltas.flatten()
    # A decay of rate |delta| reaches 1 % at 1.5 times the longest length in the slowest channel, at 0.3 in the fastest.
    assert torch.exp(-1.5 * deltas[0].abs()).item() == pytest.approx(0.01, rel=1e-5)
    assert torch.exp(-0.3 * deltas[-1].abs()).item() == pytest.approx(0.01, rel=1e-5)


def test_a_shorter_filter_is_a_prefix() -> None:
    for model, name in (
        (tiny_hyenadna(), "hyena.backbone.layers.1.mixer"),
        (tiny_m2bert(), "bert.encoder.layer.1.attention"),
    ):
        filter_fn = model.get_submodule(f"{name}.filter_fn")
        assert torch.equal(filter_fn.filter(17), filter_fn.filter(128)[:, :17])


def test_long_conv_keeps_the_dtype_and_gradients_are_exact() -> None:
    x, k, skip = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 7), (3, 7), (3,)))
    k_rev = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(long_conv, (x, k, skip, k_rev))
    assert long_conv(x.bfloat16(), k.float(), skip.float()).dtype is torch.bfloat16


def test_filter_module_convolves_with_its_own_taps_or_those_passed() -> None:
    filter_fn = tiny_hyenadna().hyena.backbone.layers[0].mixer.filter_fn
    x = torch.randn(2, 16, 40)
    k = filter_fn.filter(40)[0].T
    assert torch.equal(filter_fn(x, 40), filter_fn(x, 40, k=k, bias=filter_fn.bias))
    assert not torch.allclose(filter_fn(x, 40), filter_fn(x, 40, k=2 * k, bias=filter_fn.bias))


def test_causality() -> None:
    ids = dna_ids(1, 60)
    changed = ids.clone()
    changed[:, 40:] = 11
    for model in (tiny_hyenadna(), tiny_hyena()):
        assert relative(model(changed).logits[:, :40], model(ids).logits[:, :40].double()) < 1e-5
    bidirectional = tiny_m2bert()
    assert relative(bidirectional(changed).logits[:, :40], bidirectional(ids).logits[:, :40].double()) > 1e-2
