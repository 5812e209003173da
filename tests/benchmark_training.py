"""Training speed beside Hugging Face's Llama, run by hand: python tests/benchmark_training.py [--device cuda]

The same sizes, bfloat16 products, ids and loss, fused AdamW on both sides; rounds alternate between the competitors, so
that a busy machine slows all of them, and medians are printed. Llama runs with weights in bfloat16, and under autocast
with float32 weights as ours are.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import toto
import train

# Beside `tiny`, a model that is as small but wide enough for a CPU's matrix units.
SIZES = {"tiny": toto.SIZES["tiny"], "12M": toto.Config(dim=256, n_heads=8, n_layers=8, hidden=1024)}


def competitors(config, device):
    """{name: (model, its loss as a function of ids (B, T + 1))}"""
    llama = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.hidden,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, tie_word_embeddings=True,
        max_position_embeddings=8192,
    )  # fmt: skip

    def llama_loss(model, ids):
        labels = ids[:, 1:].contiguous()
        return model(input_ids=ids[:, :-1], labels=labels, shift_labels=labels, use_cache=False).loss

    def autocast_loss(model, ids):
        with torch.autocast(device.type, torch.bfloat16):
            return llama_loss(model, ids)

    def our_loss(model, ids):
        return model(ids[:, :-1], ids[:, 1:])

    compiled = toto.Toto(config, torch.bfloat16)
    for block in compiled.blocks:
        block.compile()
    return {
        "ours": (toto.Toto(config, torch.bfloat16), our_loss),
        "ours, --compile": (compiled, our_loss),
        "Llama, bfloat16 weights": (transformers.LlamaForCausalLM(llama).bfloat16(), llama_loss),
        "Llama, autocast": (transformers.LlamaForCausalLM(llama), autocast_loss),
    }


def main():
    parser = argparse.ArgumentParser(description="Compare training steps with Hugging Face's Llama.")
    parser.add_argument("--sizes", nargs="+", default=["tiny", "12M"], help="tiny, 12M, or any of toto.SIZES")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096], help="tokens in a sequence")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens in a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device")
    args = parser.parse_args()
    device = data.pick_device(args.device)
    peak = train.peak_flops_per_second(device, torch.bfloat16)
    for size in args.sizes:
        config = SIZES[size] if size in SIZES else toto.SIZES[size]
        for T in args.tokens:
            B = max(args.batch_tokens // T, 1)
            ids = torch.randint(toto.FIRST_CODE, config.vocab_size, (B, T + 1), device=device)
            models = competitors(config, device)
            seconds = {name: [] for name in models}
            optimizers = {
                name: torch.optim.AdamW(model.to(device).parameters(), lr=1e-4, fused=True)
                for name, (model, _) in models.items()
            }
            for turn in range(args.rounds + 2):  # the first two compile and allocate
                for name, (model, loss_of) in models.items():
                    started = time.perf_counter()
                    loss = loss_of(model, ids)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizers[name].step()
                    optimizers[name].zero_grad()
                    loss.item()  # waits for the device
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    if turn >= 2:
                        seconds[name].append(time.perf_counter() - started)
            flops = models["ours"][0].flops_per_token(T) * B * T
            best = min(median(times) for name, times in seconds.items() if name.startswith("Llama"))
            print(f"{size}, {B} x {T} tokens; matrix rate {peak / 1e12:.2f} TFLOP/s", flush=True)
            for name, times in seconds.items():
                time_ = median(times)
                speed = f"{B * T / time_:>9,.0f} tokens/s  MFU {flops / time_ / peak:4.0%}"
                print(f"  {name:<24}{speed}  {best / time_:.2f} times Llama's", flush=True)


if __name__ == "__main__":
    data.run(main)
