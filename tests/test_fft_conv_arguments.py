"""What fft_conv refuses, and that each message names the value and what is supported."""

from typing import Any

import pytest
import torch

from hf_flashfftconv import fft_conv

U, K = torch.zeros(2, 3, 8), torch.zeros(3, 8)
META = torch.device("meta")

SHAPES = [
    ({"u": torch.zeros(3, 8)}, r"u must have shape \(batch, channels, length\).*got \(3, 8\)"),
    ({"u": torch.zeros(1, 2, 3, 8)}, r"u must have shape .*got \(1, 2, 3, 8\)"),
    ({"u": torch.zeros(2, 3, 0)}, r"length at least 1, got \(2, 3, 0\)"),
    ({"k": torch.zeros(8)}, r"k must have shape \(3, taps >= 1\) to fit u, got \(8,\)"),
    ({"k": torch.zeros(1, 3, 8)}, r"k must have shape .*got \(1, 3, 8\)"),
    ({"k": torch.zeros(4, 8)}, r"k must have shape .*got \(4, 8\)"),
    ({"k": torch.zeros(1, 8)}, r"k must have shape .*got \(1, 8\)"),
    ({"k": torch.zeros(3, 0)}, r"k must have shape .*got \(3, 0\)"),
    ({"k_rev": torch.zeros(2, 8)}, r"k_rev must have shape .*got \(2, 8\)"),
    ({"k_rev": torch.zeros(3, 0)}, r"k_rev must have shape .*got \(3, 0\)"),
    ({"skip": torch.zeros(4)}, r"skip must have shape \(3,\) to fit u, got \(4,\)"),
    ({"skip": torch.zeros(3, 1)}, r"skip must have shape \(3,\) to fit u, got \(3, 1\)"),
    ({"skip": torch.tensor(1.0)}, r"skip must have shape \(3,\) to fit u, got \(\)"),
    ({"pre_gate": torch.zeros(1, 3, 8)}, r"pre_gate must have shape \(2, 3, 8\) to fit u, got \(1, 3, 8\)"),
    ({"post_gate": torch.zeros(2, 3, 9)}, r"post_gate must have shape \(2, 3, 8\) to fit u, got \(2, 3, 9\)"),
]
COMBINATIONS = [
    ({"causal": False, "k_rev": K}, "k_rev needs causal=True"),
    ({"causal": False, "k": torch.zeros(3, 9)}, "cannot be longer than u: got 9 taps for length 8"),
    ({"backend": "triton"}, "unknown backend 'triton'; supported: 'auto', 'torch', 'cuda'"),
    ({"backend": None}, "unknown backend None; supported"),
]
DEVICES = [
    ({name: x.to(META)}, f"{name} must be on the device of u, cpu, got meta")
    for name, x in {"k": K, "skip": K[:, 0], "pre_gate": U, "post_gate": U, "k_rev": K}.items()
]
DTYPES = [
    ({"u": U.long()}, "u must be one of torch.bfloat16, torch.float16, torch.float32, torch.float64, got torch.int64"),
    ({"u": U.cfloat()}, "u must be one of .*got torch.complex64"),
    ({"u": U.to(torch.float8_e4m3fn)}, "u must be one of .*got torch.float8_e4m3fn"),
    ({"k": K.cfloat()}, "k must be one of .*got torch.complex64"),
    ({"k": K.bool()}, "k must be one of .*got torch.bool"),
    ({"k_rev": K.int()}, "k_rev must be one of .*got torch.int32"),
    ({"skip": K[:, 0].int()}, "skip must be one of .*got torch.int32"),
    ({"pre_gate": U.int()}, "pre_gate must be one of .*got torch.int32"),
    ({"pre_gate": U.half()}, "pre_gate must have the dtype of u, torch.float32, got torch.float16"),
    ({"post_gate": U.double()}, "post_gate must have the dtype of u, torch.float32, got torch.float64"),
]
TYPES = [
    ({"u": None}, "u must be a torch.Tensor, got NoneType"),
    ({"u": [[[1.0]]]}, "u must be a torch.Tensor, got list"),
    ({"k": U.numpy()}, "k must be a torch.Tensor, got ndarray"),
    ({"skip": 1.0}, "skip must be a torch.Tensor, got float"),
    ({"pre_gate": 2}, "pre_gate must be a torch.Tensor, got int"),
]


@pytest.mark.parametrize("change, message", SHAPES + COMBINATIONS + DEVICES)
def test_wrong_values(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fft_conv(**{"u": U, "k": K, **change})


@pytest.mark.parametrize("change, message", DTYPES + TYPES)
def test_wrong_types(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fft_conv(**{"u": U, "k": K, **change})


def test_optional_arguments_are_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        fft_conv(U, K, K[:, 0])
