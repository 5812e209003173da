"""Sampling speed beside Hugging Face's generate, run by hand: python tests/benchmark_sampling.py [--device cuda]

The same weights, exported by toto.export_hf, and the same number of tokens from the start token alone, drawn from all
codes at temperature 1. Llama runs with its default cache and with its static one. Ours is compiled with the model in
--dtype, as sample.py --compile does with what the device computes fastest in.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import sample
import toto


def main():
    parser = argparse.ArgumentParser(description="Compare sampling with Hugging Face's generate.")
    parser.add_argument("--sizes", nargs="+", default=["tiny"], help="any of toto.SIZES")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--codes", type=int, default=8192, help="of the tokenizer; the laptop one has 512")
    parser.add_argument("--tokens", type=int, default=576, help="tokens to draw; 576 are a clip of the laptop model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device")
    args = parser.parse_args()
    device, dtype = data.pick_device(args.device), getattr(torch, args.dtype)
    for size in args.sizes:
        torch.manual_seed(0)
        config = replace(toto.SIZES[size], vocab_size=toto.FIRST_CODE + args.codes)
        model = toto.Toto(config, dtype).eval().requires_grad_(False)
        with tempfile.TemporaryDirectory() as folder:
            toto.export_hf(model, folder)
            llama = transformers.AutoModelForCausalLM.from_pretrained(folder).to(device, dtype).eval()
        model.to(device, dtype)
        for B in args.batches:
            ids = torch.full((B, 1), toto.VIDEO_START, device=device)

            def theirs(**cache):
                with torch.inference_mode():
                    llama.generate(
                        ids, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=True, top_k=0, **cache
                    )

            decoders = [toto.Decoder(model, B, args.tokens + 1, compile) for compile in (False, True)]
            ways = {
                "ours": lambda: model.generate(ids, args.tokens, decoder=decoders[0]),
                "ours, --compile": lambda: model.generate(ids, args.tokens, decoder=decoders[1]),
                "Llama, default cache": theirs,
                "Llama, static cache": lambda: theirs(cache_implementation="static", disable_compile=True),
            }
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
                print(f"{size}, {B} at a time, {name:<22}{B * args.tokens / time_:>8,.0f} tokens/s  ours is "
                      f"{time_ / best['ours']:.2f} times as fast, compiled {time_ / best['ours, --compile']:.2f}",
                      flush=True)  # fmt: skip
            for name, decoder in zip(("ours", "ours, --compile"), decoders):
                sample.report_speed(model, decoder, B, args.tokens, args.tokens, best[name], device)


if __name__ == "__main__":
    data.run(main)
