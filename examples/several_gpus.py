"""Train a HyenaDNA on a sequence of which each GPU holds a slice, with torchrun or with accelerate.

    torchrun --nproc-per-node 2 examples/several_gpus.py
    accelerate launch --num_processes 2 examples/several_gpus.py
    torchrun --nproc-per-node 2 examples/several_gpus.py --compare --length 1048576 --width 256 --layers 8

Without GPUs torchrun's processes run on CPU cores. `--compare` first runs one process alone on the whole sequence, and
then tells how much faster all of them are together; add `--dtype bfloat16` for autocast.
"""

import argparse
import gc
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh

from hf_flashfftconv import patch_model, shard_sequence
from hf_flashfftconv.models import HyenaDNAConfig, HyenaDNAForCausalLM
from hf_flashfftconv.sequences import enable_long_sequences, split_sequence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="length of the whole sequence (default: 4096)")
    parser.add_argument("--width", type=int, default=32, help="channels, a multiple of the processes (default: 32)")
    parser.add_argument("--layers", type=int, default=2, help="layers (default: 2)")
    parser.add_argument("--steps", type=int, default=3, help="steps, of which the first is not timed (default: 3)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of autocast")
    parser.add_argument("--positions", type=int, default=1 << 16, help="positions in a slice (default: 65536)")
    parser.add_argument("--channels", type=int, default=32, help="channels in a block (default: 32)")
    parser.add_argument("--compare", action="store_true", help="also run on the first GPU alone")
    args = parser.parse_args()

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="bf16" if args.dtype == "bfloat16" else "no"
    )
    processes = accelerator.num_processes
    if processes < 2:
        parser.error("start it by torchrun or accelerate launch, with at least two processes")
    mesh = init_device_mesh(accelerator.device.type, (processes,), mesh_dim_names=("sequence",))
    ids = torch.randint(7, 11, (1, args.length), generator=torch.Generator().manual_seed(0)).to(accelerator.device)

    alone = None
    if args.compare and accelerator.is_main_process:
        model = new_model(args).to(accelerator.device)
        alone = run(model, torch.optim.AdamW(model.parameters()), ids, args.steps, accelerator)
        del model
        torch.cuda.empty_cache()
    accelerator.wait_for_everyone()

    model = new_model(args)
    shard_sequence(model, mesh["sequence"])  # the one switch: from here on each rank passes its slice
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    together = run(model, optimizer, split_sequence(ids, mesh["sequence"]), args.steps, accelerator)

    if accelerator.is_main_process:
        print(f"{args.length:,} positions, {processes} processes on {accelerator.device.type}, {args.dtype}")
        for i, name in enumerate(("forward", "training step")):
            faster = f", alone {alone[i]:.3f} s: {alone[i] / together[i]:.2f} times as fast" if alone else ""
            print(f"  {name:<14} {together[i]:.3f} s{faster}")
        print(f"  loss           {together[2]:.5f}" + (f", alone {alone[2]:.5f}" if alone else ""))
        print(f"  memory         {together[3]:.1f} GB" + (f", alone {alone[3]:.1f} GB" if alone else ""))
    # Data parallelism that outlives the process group may wait for gloo's threads for ever, and they for Python.
    del model, optimizer
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def new_model(args: argparse.Namespace) -> HyenaDNAForCausalLM:
    torch.manual_seed(0)  # the same weights on every rank
    config = HyenaDNAConfig(d_model=args.width, n_layer=args.layers, max_seq_len=args.length)
    model = patch_model(HyenaDNAForCausalLM(config), float32_filters=True)
    enable_long_sequences(model, args.positions, args.channels)
    model.gradient_checkpointing_enable()
    return model.train()


def run(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    steps: int,
    accelerator: Accelerator,
) -> tuple[float, float, float, float]:
    """Seconds of a forward pass and of a training step, the last step's loss, and the memory in GB."""

    def loss() -> torch.Tensor:
        with accelerator.autocast():
            return model(ids, labels=ids).loss

    def train() -> torch.Tensor:
        value = loss()
        accelerator.backward(value)
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    forward, _ = timed(torch.no_grad()(loss), steps)
    training, last = timed(train, steps)
    return forward, training, last, torch.cuda.max_memory_allocated() / 1e9 if ids.is_cuda else 0.0


def timed(step: Callable[[], torch.Tensor], steps: int) -> tuple[float, float]:
    """The fastest of several runs but the first, and the last result."""
    fastest, value = float("inf"), 0.0
    for i in range(steps):
        start = time.perf_counter()
        value = step().item()  # waits for the GPU
        if i or steps == 1:
            fastest = min(fastest, time.perf_counter() - start)
    return fastest, value


if __name__ == "__main__":
    main()
