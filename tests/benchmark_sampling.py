"""Sampling speed beside Hugging Face's generate, run by hand: python tests/benchmark_sampling.py [--device cuda]

The same weights, exported by toto.export_hf, and the same number of tokens from the start token alone, drawn from all
codes at temperature 1. Llama runs in float32 and, where the device multiplies it fast, in bfloat16, with its default
cache and with its static one; ours as sample.py does, with a Cache made before. Beside ours stands the floor: what it
takes only to read the weights and the cache from memory once a token.
"""

import argparse
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import toto


def memory_rate(device):
    """Bytes a second that the device reads and writes, by copying 256 MB."""
    x, seconds = torch.ones(2**26, device=device), []
    y = torch.empty_like(x).copy_(x)
    for _ in range(5):
        started = time.perf_counter()
        y.copy_(x)
        y[-1].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * 4 * 2**26 / min(seconds)


def report_speed(name, cache, n_tokens, seconds, rate):
    """The time of a step beside its floor: all weights and the cache, which fills up, unless compiled, read once."""
    c, itemsize = cache.model.config, cache.model.compute_dtype.itemsize
    n_read = len(cache.positions) if cache.compiled_step else n_tokens / 2
    n_bytes = itemsize * (cache.model.count_parameters() + 2 * cache.batch_size * c.n_layers * c.dim * n_read)
    print(
        f"{name}: a token of each of {cache.batch_size} takes {1e6 * seconds / n_tokens:,.0f} µs; only to read weights "
        f"and cache, {n_bytes / 1e6:,.1f} MB at {rate / 1e9:,.0f} GB/s, {1e6 * n_bytes / rate:,.0f} µs"
    )


def main():
    parser = argparse.ArgumentParser(description="Compare sampling with Hugging Face's generate.")
    parser.add_argument("--sizes", nargs="+", default=["tiny"], help="any of toto.SIZES")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--codes", type=int, default=8192, help="of the tokenizer; the laptop one has 512")
    parser.add_argument("--tokens", type=int, default=576, help="tokens to draw; 576 are a clip of the laptop model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device")
    args = parser.parse_args()
    device = data.pick_device(args.device)
    fast, rate = data.fast_dtype(device), memory_rate(device)
    for size in args.sizes:
        torch.manual_seed(0)
        config = replace(toto.SIZES[size], vocab_size=toto.FIRST_CODE + args.codes)
        model = toto.Toto(config, fast).to(device).eval().requires_grad_(False)
        with tempfile.TemporaryDirectory() as folder:
            toto.export_hf(model, folder)
            load = transformers.AutoModelForCausalLM.from_pretrained
            llamas = [load(folder).to(device, dtype).eval() for dtype in sorted({torch.float32, fast}, key=str)]
        for B in args.batches:
            torch.compiler.reset()
            ids = torch.full((B, 1), toto.VIDEO_START, device=device)
            caches = [
                toto.Cache(toto.for_sampling(deepcopy(model), B, compile), B, args.tokens + 1, compile)
                for compile in (False, True)
            ]

            def theirs(llama, **cache):
                with torch.inference_mode():
                    llama.generate(
                        ids, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=True, top_k=0, **cache
                    )

            ours = [lambda cache=cache: cache.model.generate(ids, args.tokens, cache=cache) for cache in caches]
            ways = dict(zip(("ours", "ours, --compile"), ours))
            for llama in llamas:
                name = f"Llama in {str(llama.dtype)[6:]}"
                ways[f"{name}, default cache"] = lambda llama=llama: theirs(llama)
                static = {"cache_implementation": "static", "disable_compile": True}
                ways[f"{name}, static cache"] = lambda llama=llama: theirs(llama, **static)
            seconds = {name: [] for name in ways}
            for turn in range(args.rounds + 1):
                for name, way in ways.items():
                    started = time.perf_counter()
                    way()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    if turn:  # the first warms up
                        seconds[name].append(time.perf_counter() - started)
            best = {name: min(times) for name, times in seconds.items()}
            for name, time_ in best.items():
                print(f"{size}, {B} at a time, {name:<32}{B * args.tokens / time_:>8,.0f} tokens/s  ours is "
                      f"{time_ / best['ours']:.2f} times as fast, compiled {time_ / best['ours, --compile']:.2f}",
                      flush=True)  # fmt: skip
            for (name, time_), cache in zip(best.items(), caches):
                report_speed(f"{size}, {name}", cache, args.tokens, time_, rate)


if __name__ == "__main__":
    data.run(main)
