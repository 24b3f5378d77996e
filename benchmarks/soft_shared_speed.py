"""How much slower than the dense model a soft-shared model is that was not exported: prefill and decode.

    python benchmarks/soft_shared_speed.py [--rank 8] [--repeats 15] [--threads 2]

GPT-2-small shape, random weights, one process, models interleaved; median and ratio of medians, with quartiles. Beside
x W_c + (x A) B, which is what we do: the peer's way, W_c + A B formed at every call.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from compressor.alignment import identity
from compressor.modeling.shared_ffn import LayerDelta, SharedConv1D
from compressor.rewrites.compose import apply
from compressor.rewrites.soft_shared import SoftShared


def materialised(self: LayerDelta, x: Tensor, shared: SharedConv1D) -> Tensor:
    """The source's forward: an in x out product at every call."""
    weight = shared.weight + self.delta_a @ self.delta_b
    return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), weight).view(*x.shape[:-1], -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument("--decode", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config()).eval()
    rewrite = SoftShared(n=options.n, rank=options.rank, delta_init="svd").resolved(dense.config)
    ours = apply([rewrite], dense, identity(dense.config))
    peer = copy.deepcopy(ours)
    for module in peer.modules():
        if isinstance(module, LayerDelta):
            module.forward = materialised.__get__(module)  # type: ignore[method-assign]
    models = {"dense": dense, "x W + (x A) B": ours, "W + A B formed": peer}
    ids = torch.randint(0, 50257, (1, options.prefill))

    def prefill(model: GPT2LMHeadModel) -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    def decode(model: GPT2LMHeadModel) -> None:
        cache, token = caches[id(model)], ids[:, :1]
        if cache.get_seq_length() > options.prefill:
            cache.crop(options.prefill - cache.get_seq_length())
        for _ in range(options.decode):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    with torch.inference_mode():
        caches = {id(model): model(ids, use_cache=True).past_key_values for model in models.values()}
        print(
            f"GPT-2-small shape, n={options.n}, rank={options.rank}, float32, {options.threads} threads, "
            f"{options.repeats} interleaved repeats\n"
        )
        print("| regime | model | median ms | quartiles ms | ratio to dense |\n| --- | --- | ---: | ---: | ---: |")
        regimes: dict[str, tuple[Callable[[GPT2LMHeadModel], None], int]] = {
            f"prefill {options.prefill}": (prefill, 1),
            f"decode, per token after {options.prefill}": (decode, options.decode),
        }
        for regime, (run, units) in regimes.items():
            times: dict[str, list[float]] = {name: [] for name in models}
            for repeat in range(options.repeats + 2):
                for name, model in models.items():
                    start = time.perf_counter()
                    run(model)
                    if repeat >= 2:  # the first two warm up
                        times[name].append((time.perf_counter() - start) / units * 1e3)
            for name, measured in times.items():
                low, middle, high = torch.tensor(measured).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
                base = torch.tensor(times["dense"]).quantile(0.5).item()
                print(f"| {regime} | {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {middle / base:.3f} |")


if __name__ == "__main__":
    main()
