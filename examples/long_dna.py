"""Run a whole genome through a HyenaDNA in one piece, and print how much memory and time it takes.

    python examples/long_dna.py                            the genome of phage lambda, with a small model
    python examples/long_dna.py genome.fna.gz --width 256 --layers 8 --dtype bfloat16
    python examples/long_dna.py genome.fna.gz --train --steps 3 --length 1000000 --width 256 --layers 8
    python examples/long_dna.py genome.fna.gz --model REPO --length 450000

Without `--model` the weights are random: memory and time are those of a trained model of this size. The records of the
FASTA file are read one after the other, up to `--length` bases.
"""

import argparse
import gzip
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hf_flashfftconv import patch_model
from hf_flashfftconv.models import HyenaDNAConfig, HyenaDNAForCausalLM, HyenaDNATokenizer
from hf_flashfftconv.sequences import enable_long_sequences

GENOME = Path(__file__).parent / "data" / "lambda_phage_NC_001416.fa.gz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", nargs="?", type=Path, default=GENOME, help="FASTA file, may be compressed by gzip")
    parser.add_argument("--model", help="repository or folder of a HyenaDNA; without, random weights")
    parser.add_argument("--length", type=int, help="number of bases (default: all of the file)")
    parser.add_argument("--width", type=int, default=64, help="channels of a model with random weights (default: 64)")
    parser.add_argument("--layers", type=int, default=2, help="layers of a model with random weights (default: 2)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument(
        "--train", action="store_true", help="train, with gradient checkpointing and autocast to --dtype"
    )
    parser.add_argument("--steps", type=int, default=1, help="number of passes (default: 1)")
    parser.add_argument("--positions", type=int, default=1 << 16, help="positions in a slice (default: 65536)")
    parser.add_argument("--channels", type=int, default=32, help="channels in a block (default: 32)")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = tokens(args.fasta, args.length).to(device)
    model = load(args, ids.shape[1]).to(device)
    enable_long_sequences(model, args.positions, args.channels)  # the one switch: memory no longer explodes
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{ids.shape[1]:,} bases in one piece, {parameters:,} parameters, {args.dtype} on {device}")

    passing = train(model, ids, getattr(torch, args.dtype)) if args.train else predict(model, ids)
    for step in range(args.steps):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = passing().item()  # waits for the GPU
        seconds = time.perf_counter() - start
        memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if device.type == "cuda" else ""
        print(f"  pass {step}: {seconds:.2f} s{memory}, perplexity per base {math.exp(loss):.3f}")


def tokens(fasta: Path, length: int | None) -> torch.Tensor:
    """The bases as token ids, `(1, length)`; what is none of A, C, G and T becomes N."""
    tokenizer = HyenaDNATokenizer()
    table = torch.full((256,), tokenizer.convert_tokens_to_ids("N"))
    for base in "ACGTacgt":
        table[ord(base)] = tokenizer.convert_tokens_to_ids(base.upper())
    with (gzip.open if fasta.suffix == ".gz" else open)(fasta, "rb") as lines:
        bases = b"".join(line.strip() for line in lines if not line.startswith(b">"))[:length]
    if length is not None and len(bases) < length:
        raise SystemExit(f"{fasta} has {len(bases):,} bases, fewer than {length:,}")
    return table[torch.frombuffer(bytearray(bases), dtype=torch.uint8).int()][None]


def load(args: argparse.Namespace, length: int) -> HyenaDNAForCausalLM:
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        torch.manual_seed(0)
        model = HyenaDNAForCausalLM(HyenaDNAConfig(d_model=args.width, n_layer=args.layers, max_seq_len=length))
    if args.train:
        return model  # trained in float32, under autocast
    # Positions of millions mean nothing in 16 bits: the filters stay in float32.
    return patch_model(model, float32_filters=True).to(getattr(torch, args.dtype))


def predict(model: HyenaDNAForCausalLM, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    model.eval()
    return torch.no_grad()(lambda: model(ids, labels=ids).loss)


def train(model: HyenaDNAForCausalLM, ids: torch.Tensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    model.train().gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)

    def step() -> torch.Tensor:
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


if __name__ == "__main__":
    main()
