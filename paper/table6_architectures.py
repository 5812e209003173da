"""Table 6 (§4.1): does the architecture matter? GPT-2, with absolute sine-cosine positions, Mamba and LLaMA.

    python paper/table6_architectures.py               on images of the built-in world, under 20 minutes on two cores
    python paper/table6_architectures.py --data IMAGES --probe FOLDER        on your own; FOLDER as for probe.py
    torchrun --nproc_per_node=8 paper/table6_architectures.py --size large --data IMAGES --probe FOLDER
    python paper/table6_architectures.py --benchmark   a training step of Mamba and LLaMA at 1,024 and 4,096 tokens

LLaMA is toto.py. The other two are here, each a `toto.Toto` with other blocks, so that embedding, loss, features and
training stay the same, and of the width at which it has as many parameters (`of_equal_size`). All see the same images
in the same order, at three learning rates each; linear probes of every layer say how good the features are. Prints the
paper's table beside ours, and writes table6.json and table6.png to --out; run again, it resumes where it stopped.

Shape letters are those of toto.py; for Mamba also E = 2 D channels, N = 16 numbers of state for each, R the rank of Δ.
"""

import math
import multiprocessing
import re
import sys
import time
from bisect import bisect_left
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))  # the six scripts lie in the folder above

import data
import probe
import toto
import train


# GPT-2
class BiasedLinear(toto.Linear):
    """toto.Linear with a bias, 0 at the start: what GPT-2 has everywhere and LLaMA nowhere."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(variance + 1e-5) · weight + bias, in the dtype of x."""

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class GPT2Block(nn.Module):
    """One layer of GPT-2. Eq. 3 and 4 hold as in LLaMA, with LayerNorm, GELU, biases, and no positions in attention."""

    def __init__(self, config):
        super().__init__()
        D, self.n_heads = config.dim, config.n_heads
        self.attention_norm, self.mlp_norm = LayerNorm(D), LayerNorm(D)
        self.qkv, self.attention_out = BiasedLinear(D, 3 * D), BiasedLinear(D, D)
        self.up, self.mlp_out = BiasedLinear(D, config.hidden), BiasedLinear(config.hidden, D)

    def forward(self, x, rope, causal=True, past=None):
        """x (B, T, D) -> (B, T, D). `rope` is empty, and `past` is None: see GPT2."""
        # Ĥ = H + MHSA(LayerNorm(H))
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D/H) each
        x = x + self.attention_out(toto.attend(q, k, v, causal).transpose(1, 2).flatten(2))  # -> (B, T, D)
        # H' = Ĥ + W₂ GELU(W₁ LayerNorm(Ĥ)), with the tanh form of GELU
        return x + self.mlp_out(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


def sine_cosine(n_tokens, dim, device=None):
    """The positions of Vaswani et al. (2017), (T, D): sines in the even columns, cosines in the odd ones.

    Columns 2i and 2i + 1 at position p are sin and cos of p · 10000^(-2i / D); p is the index in the flat sequence.
    """
    frequencies = 10_000 ** (-torch.arange(0, dim, 2, device=device) / dim)  # (D/2,)
    angles = torch.arange(n_tokens, device=device)[:, None] * frequencies  # (T, D/2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)  # (T, D/2, 2) -> (T, D)


class GPT2(toto.Toto):
    """Table 6's GPT-2. Fixed sine-cosine positions are added to the tokens' embeddings once, before the first block.

    It starts as toto.Toto does, which took that from GPT-2.
    """

    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__(config, compute_dtype, block=GPT2Block, norm=LayerNorm)

    def residual_stream(self, ids, causal=True):  # no `rope` and no `pasts`: it is not made to generate with a Cache
        x = ids if ids.is_floating_point() else F.embedding(ids, self.embedding.weight)  # (B, T) -> (B, T, D)
        # Not in the paper: as in Vaswani et al., √D brings the embeddings, which start at 0.02, nearer to the sines.
        # A table shrunk to the embeddings' size instead fades as these grow: 1.80 nats a token against 1.56 after 250
        # steps of `tiny` on the built-in world, and without either 2.03.
        x = math.sqrt(x.shape[2]) * x + sine_cosine(x.shape[1], x.shape[2], x.device)
        yield from super().residual_stream(x, causal, rope=())


# Mamba
class SelectiveScan(torch.autograd.Function):
    """Mamba's recurrence. For each channel e and each number n of its state, with v_t = Δ_t x_t:

        h_t = exp(Δ_t A) h_{t-1} + B_t v_t        (Gu & Dao, 2023, Eq. 2a, discretised as their code does)
        y_t = Σ_n C_t h_t                         (Eq. 2b)

    v, Δ (B, T, E), A (N, E), B_t and C_t (B, T, N) -> y (B, T, E).

    All states, (T, B, N, E), would be by far the largest tensor of a step. They are made in chunks of 32 tokens, which
    stay in a processor's cache; only the state before each chunk is kept, and the backward pass makes the others again.
    It is written out because it is 2.5 times as fast as autograd's through checkpointed chunks, forward and backward.
    A GPU would want one kernel for all of it: here it starts three for each token and layer, some 390,000 for a step of
    `large` on 4,096 tokens.
    """

    CHUNK = 32

    @staticmethod
    def states(h, v, delta, A, B_t):
        """The decays exp(Δ_t A) (t, B, N, E) and the states (t + 1, B, N, E) of a chunk; the first is h, before it."""
        # exp(x) = 2^(x · log2 e), which torch computes almost three times as fast on a CPU.
        decay = (delta[:, :, None] * (A * math.log2(math.e))).exp2_()
        states = h.new_empty(len(v) + 1, *h.shape)
        states[0] = h
        torch.mul(B_t[..., None], v[:, :, None], out=states[1:])  # (t, B, N, 1) · (t, B, 1, E)
        rows = states.unbind()
        for before, now, a in zip(rows, rows[1:], decay.unbind()):
            now.addcmul_(a, before)  # h_t = B_t v_t + exp(Δ_t A) h_{t-1}
        return decay, states

    @staticmethod
    def chunks(*tensors):
        """Each (B, T, …) -> chunks (t, B, …): time comes first, so that what belongs to a moment lies together."""
        return list(zip(*(x.transpose(0, 1).contiguous().split(SelectiveScan.CHUNK) for x in tensors)))

    @staticmethod
    def forward(ctx, v, delta, A, B_t, C_t):
        h, starts, out = v.new_zeros(len(v), *A.shape), [], []
        for v_part, delta_part, B_part, C_part in SelectiveScan.chunks(v, delta, B_t, C_t):
            starts.append(h)
            states = SelectiveScan.states(h, v_part, delta_part, A, B_part)[1]
            out.append((C_part[:, :, None] @ states[1:])[:, :, 0])  # (t, B, 1, N) @ (t, B, N, E) -> (t, B, E)
            h = states[-1].clone()  # a copy: the chunk's other states are given up
        ctx.save_for_backward(v, delta, A, B_t, C_t, *starts)
        return torch.cat(out).transpose(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        v, delta, A, B_t, C_t, *starts = ctx.saved_tensors
        carried, grad_A, grads = torch.zeros_like(starts[0]), torch.zeros_like(A), []
        parts = zip(starts, SelectiveScan.chunks(v, delta, B_t, C_t, grad_y))
        for h, (v, delta, B_t, C_t, dy) in reversed(list(parts)):
            decay, states = SelectiveScan.states(h, v, delta, A, B_t)
            # With G_t for ∂L/∂h_t: G_t = C_t ∂L/∂y_t + exp(Δ_{t+1} A) G_{t+1}, the recurrence backwards.
            grad = C_t[..., None] * dy[:, :, None]  # (t, B, N, E)
            rows, decays = grad.unbind(), decay.unbind()
            rows[-1].add_(carried)
            for t in reversed(range(len(rows) - 1)):
                rows[t].addcmul_(decays[t + 1], rows[t + 1])
            carried = decays[0] * rows[0]
            # ∂L/∂v_t = Σ_n B_t G_t,  ∂L/∂B_t = Σ_e v_t G_t,  ∂L/∂C_t = Σ_e h_t ∂L/∂y_t
            grad_v, grad_B = (B_t[:, :, None] @ grad)[:, :, 0], (v[:, :, None] @ grad.mT)[:, :, 0]
            grad_C = (dy[:, :, None] @ states[1:].mT)[:, :, 0]
            # ∂L/∂(Δ_t A) = G_t exp(Δ_t A) h_{t-1}: summed over n with A for Δ, over batch and time with Δ for A
            grad.mul_(decay).mul_(states[:-1])
            grad_delta = torch.mul(grad, A, out=decay).sum(dim=2)
            grad_A += grad.mul_(delta[:, :, None]).sum(dim=(0, 1))
            grads.append((grad_v, grad_delta, grad_B, grad_C))
        grad_v, grad_delta, grad_B, grad_C = (torch.cat(parts[::-1]).transpose(0, 1) for parts in zip(*grads))
        return grad_v, grad_delta, grad_A, grad_B, grad_C


class MambaBlock(nn.Module):
    """One layer of Mamba, with the names, sizes and initial values of Gu & Dao's code."""

    def __init__(self, config):
        super().__init__()
        D, E, N, R = config.dim, 2 * config.dim, 16, math.ceil(config.dim / 16)
        self.norm, self.sizes = toto.RMSNorm(D), (R, N, N)
        self.in_proj = toto.Linear(D, 2 * E)  # x and its gate z
        self.conv1d = nn.Conv1d(E, E, kernel_size=4, groups=E)  # each channel by itself
        self.x_proj = toto.Linear(E, R + 2 * N)  # what makes the scan selective: Δ, B and C depend on the token
        self.dt_proj = nn.Linear(R, E)
        self.out_proj = toto.Linear(E, D)
        nn.init.uniform_(self.dt_proj.weight, -(R**-0.5), R**-0.5)
        # Δ starts log-uniform between 0.001 and 0.1; this is the inverse of softplus.
        delta = torch.exp(torch.empty(E).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_proj.bias = nn.Parameter(delta + torch.log(-torch.expm1(-delta)))
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(E, 1))  # (E, N): A = -1 … -16 in each channel
        self.D = nn.Parameter(torch.ones(E))
        self.A_log.no_weight_decay = self.D.no_weight_decay = True  # for train.make_optimizer

    def forward(self, x, rope, causal=True, past=None):
        """x (B, T, D) -> (B, T, D). `rope` and `past` belong to attention."""
        if not causal:
            raise ValueError("Mamba reads in one direction only; causal=False is for the other architectures")
        residual, dtype = x, x.dtype
        x, z = self.in_proj(self.norm(x)).chunk(2, dim=-1)  # (B, T, E) each
        # x_t = SiLU(bias + Σ_i w_i x_{t-3+i}), channel by channel: the convolution as four products, which on a CPU is
        # twice as fast as F.conv1d, forward and backward. In float32 from here to y, since errors add up over time.
        padded, w = F.pad(x.float(), (0, 0, 3, 0)), self.conv1d.weight[:, 0]  # (B, 3 + T, E), (E, 4)
        x = F.silu(sum((w[:, i] * padded[:, i : i + x.shape[1]] for i in range(4)), self.conv1d.bias))
        # Δ_t = softplus(W x_t + bias), B_t and C_t = W x_t
        delta, B_t, C_t = self.x_proj(x.to(dtype)).float().split(self.sizes, dim=-1)  # (B, T, R), (B, T, N) twice
        delta, A = F.softplus(self.dt_proj(delta)), -torch.exp(self.A_log.T).contiguous()  # (B, T, E), (N, E)
        # y_t = C_t h_t + D x_t, then H' = H + W (y · SiLU(z))
        y = SelectiveScan.apply(delta * x, delta, A, B_t, C_t) + self.D * x
        return residual + self.out_proj(y.to(dtype) * F.silu(z))


class Mamba(toto.Toto):
    """Table 6's Mamba: RMSNorm and a MambaBlock in each layer in place of attention and MLP, and no positions."""

    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__(config, compute_dtype, block=MambaBlock)

    def init_weights(self):
        """From Gu & Dao's code: embeddings N(0, 0.02); matrices uniform ± 1 / √n_in, which is torch's own, and those
        that write into the residual stream smaller by √L.
        """
        nn.init.normal_(self.embedding.weight, std=0.02)
        bound = (2 * self.config.dim * self.config.n_layers) ** -0.5
        for block in self.blocks:
            nn.init.uniform_(block.out_proj.weight, -bound, bound)

    def residual_stream(self, ids, causal=True):  # as in GPT2: not made to generate with a Cache
        yield from super().residual_stream(ids, causal, rope=())


# Equal sizes
def of_equal_size(build, config):
    """The config with which `build`, GPT2 or Mamba, has about as many parameters as a LLaMA with `config`.

    Only the width is chosen. GPT-2 keeps layers and heads, and its MLP is 4 D wide. Mamba has two layers for one of a
    transformer's, since each of its blocks is about half of an attention and an MLP (Gu & Dao, §3.4).
    """
    if build is Mamba:
        step, changes = 4, lambda D: {"n_layers": 2 * config.n_layers, "hidden": 2 * D}
    else:
        step, changes = math.lcm(2, config.n_heads), lambda D: {"hidden": 4 * D}
    of_width = lambda D: replace(config, dim=D, **changes(D))

    def count(build, config):
        with torch.device("meta"):  # shapes without memory
            return build(config).count_parameters()

    widths, target = range(step, 2 * config.dim + 1, step), count(toto.Toto, config)
    i = bisect_left(widths, target, key=lambda D: count(build, of_width(D)))  # the narrowest with at least as many
    return min(map(of_width, widths[max(i - 1, 0) : i + 1]), key=lambda c: abs(count(build, c) - target))


# Time and memory by length
def benchmark(config, device, lengths=(1024, 4096)):
    """A training step on one sequence of each length: a row {model, tokens, seconds, bytes} for LLaMA and for Mamba.

    `config` is LLaMA's; Mamba gets as many parameters. Each row comes from a process of its own, so that none finds
    memory that another has left behind.
    """
    rows = []
    for build, c in ((toto.Toto, config), (Mamba, of_equal_size(Mamba, config))):
        for n_tokens in lengths:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, n_bytes = pool.apply(measure_step, (build, c, device, n_tokens, torch.get_num_threads()))
            rows.append({"model": build.__name__, "tokens": n_tokens, "seconds": seconds, "bytes": n_bytes})
    return rows


def measure_step(build, config, device, n_tokens, n_threads):
    """The best of three steps' seconds, and the most bytes held in them beyond weights, gradients and moments."""
    torch.set_num_threads(n_threads)
    data.keep_freed_memory()  # as train.py does
    model = build(config, data.fast_dtype(device)).to(device)
    optimizer = train.make_optimizer(model, lr=1e-4)

    def step(n_tokens):
        started = time.perf_counter()
        ids = torch.randint(toto.FIRST_CODE, config.vocab_size, (1, n_tokens + 1))
        train.take_step(model, optimizer, ids, 1, device).tolist()  # waits for the GPU
        return time.perf_counter() - started

    step(16)  # makes the moments, and loads what torch loads at first use
    before = held_bytes(device, "VmRSS")
    seconds = min(step(n_tokens) for _ in range(3))
    return seconds, held_bytes(device, "VmHWM") - before


def held_bytes(device, what):
    """Bytes of memory in use now ("VmRSS"), or the most so far ("VmHWM"); nan on a CPU without Linux's /proc.

    train.peak_memory would do for the most, but Linux starts that count from what the parent process had used.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if what == "VmHWM" else torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", status.read_text())[1]) if status.exists() else math.nan


def print_benchmark(rows):
    print(f"{'model':8}{'tokens':>8}{'ms/step':>10}{'tokens/s':>10}{'MiB':>8}")
    for row in rows:
        ms, speed, memory = 1e3 * row["seconds"], row["tokens"] / row["seconds"], row["bytes"] / 2**20
        print(f"{row['model']:8}{row['tokens']:8,}{ms:10,.0f}{speed:10,.0f}{memory:8,.0f}")


# One run: train on the same images in the same order, then probe every layer.
ARCHITECTURES = {"GPT-2": (GPT2, 48.5), "Mamba": (Mamba, 40.7), "LLaMA": (toto.Toto, 53.2)}  # the paper's top-1


def run(name, lr, seed, sets, args, device):
    """{"loss" on held-out images, "top1" of each layer, "untrained": the same before training, "parameters"}.

    Where the rate is so high that training diverges, there is no loss and no top1.
    """
    build, tokens = ARCHITECTURES[name][0], sets["pretrain"]
    config = replace(toto.SIZES[args.size], vocab_size=toto.FIRST_CODE + tokens.meta["vocab_size"])
    config = config if build is toto.Toto else of_equal_size(build, config)
    args, title = SimpleNamespace(**vars(args) | {"lr": lr}), f"{name}, rate {lr:g}, seed {seed}"

    def work(state, settings):
        torch.manual_seed(seed)
        model = build(config, data.fast_dtype(device)).to(device)
        first = probe.ProbeSet(sets["train"], 1)
        labelled = first, probe.ProbeSet(sets["val"], 1, classes=first.classes)
        untrained = probe.linear_probes(model, labelled, device)
        mixture = data.Mixture([data.Source(tokens, args.frames)], [1.0], seed)
        n_sequences = train.sequences_in_a_step(args, math.prod(tokens.meta["grid"]), data.world_size())
        of_run = SimpleNamespace(n_sequences=n_sequences, mixture=mixture)
        read_batch = lambda step: train.read_batch(of_run, step, device)
        result = {"parameters": model.count_parameters(), "untrained": untrained}
        try:
            train.fit(model, read_batch, args, device, state, settings, title)
        except FloatingPointError:
            return result | {"loss": None, "top1": None}
        held_out = {"images": data.Source(tokens, args.frames, held_out=True)}
        loss = train.evaluate(model, held_out, args.micro_batch, device)["images"]["loss"]
        return result | {"loss": loss, "top1": probe.linear_probes(model, labelled, device)}

    settings = {"architecture": name, "seed": seed, "tokenizer": tokens.meta["tokenizer"]}
    return train.kept_run(args, f"{name}-{lr:g}-{seed}", settings, work)


def compare(sets, args, device):
    """A row for each architecture: three rates with the first seed, then the other seeds at the rate of least loss."""
    rows, rates, seeds = [], [args.lr / 3, args.lr, args.lr * 3], range(args.seed, args.seed + args.seeds)
    for name, (_, paper) in ARCHITECTURES.items():
        tried = {lr: run(name, lr, seeds[0], sets, args, device) for lr in rates}
        lr = min(rates, key=lambda lr: math.inf if tried[lr]["loss"] is None else tried[lr]["loss"])
        runs = [tried[lr]] + [run(name, lr, seed, sets, args, device) for seed in seeds[1:]]
        if None in [run["loss"] for run in runs]:
            raise ValueError(f"{name} diverges at {lr:g}, the best of the three rates; try a lower --lr")
        row = {"name": name, "paper": paper, "lr": lr, "losses": {f"{lr:g}": r["loss"] for lr, r in tried.items()}}
        rows.append(row | {key: [run[key] for run in runs] for key in runs[0]})
    return rows


# The table and its picture.
def best_layer(row, key="top1"):
    return int(np.argmax(np.mean(row[key], axis=0)))


def print_rows(rows, bounds, args):
    """Table 6, the paper's beside ours: means over seeds and their 95 % intervals.

    As in the paper, the best layer is picked on the images that are reported. Mamba has twice as many to pick from.
    """
    columns = "{:<8}{:<12}{:<7}{:<25}{:<26}{:<26}{:<12}{}"
    print(f"\nTable 6: linear probes of all layers, {args.seeds} seeds at the best of three rates, 95 % intervals")
    heads = "loss, nats a token", "best layer's top-1, %", "less LLaMA's", "untrained"
    print(columns.format("", "parameters", "paper", *heads, "loss at each rate, first seed"))
    for row in rows:
        at = lambda row, key: [100 * top1[best_layer(row, key)] for top1 in row[key]]
        gain = [ours - llamas for ours, llamas in zip(at(row, "top1"), at(rows[-1], "top1"))]
        top1 = f"{probe.show_seeds(at(row, 'top1'))}, {best_layer(row)}"
        untrained = f"{np.mean(at(row, 'untrained')):.1f}"
        shown = {lr: "diverged" if loss is None else f"{loss:.3f}" for lr, loss in row["losses"].items()}
        losses = ", ".join(f"{lr}: {loss}" for lr, loss in shown.items())
        cells = row["paper"], probe.show_seeds(row["loss"], 3), top1, probe.show_seeds(gain), untrained, losses
        print(columns.format(row["name"], f"{row['parameters'][0] / 1e6:,.2f} M", *cells))
    for name, top1 in bounds.items():
        print(f"{name}: {100 * top1:.1f}")


def draw(plt, rows, chance, path):
    """Top-1 over relative depth, bands as 95 % intervals over seeds, and the loss at each rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for row in rows:
        depth = np.linspace(0, 1, len(row["top1"][0]))
        mean, low, high = zip(*[probe.over_seeds([100 * x for x in of_layer]) for of_layer in zip(*row["top1"])])
        left.plot(depth, mean, marker="o", markersize=3)
        if len(row["top1"]) > 1:  # one seed has no interval
            left.fill_between(depth, np.maximum(low, 0), np.minimum(high, 100), alpha=0.15)
        rates, losses = zip(*[(float(lr), loss) for lr, loss in row["losses"].items() if loss is not None])
        right.plot(rates, losses, marker="o", label=f"{row['name']} (paper: {row['paper']} %)")
    left.axhline(100 * chance, linestyle=":", color="grey")
    left.set(xlabel="depth (0: the embedding)", ylabel="top-1 of a linear probe, %", title="Table 6, by layer")
    right.set(xscale="log", xlabel="peak learning rate", ylabel="loss, nats a token", title="held-out images")
    right.legend(fontsize="small", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = data.make_parser(__doc__)
    words = "no table: a training step's time and memory, Mamba beside LLaMA, at 1,024 and 4,096 tokens"
    parser.add_argument("--benchmark", action="store_true", help=words)
    args, plt = train.parse_study(parser, "out/table6", steps=300), data.pyplot()
    device = data.pick_device(args.device)
    if args.benchmark:
        config = toto.SIZES[args.size]
        return print_benchmark(benchmark(config, device))
    if not args.has_probe:
        raise ValueError("--data needs --probe, a folder with train/<class>/* and val/<class>/*")
    data.start_processes(device)
    sets = probe.image_sets(args, train.study_tokenizer(args, device), args.resolution)
    rows = compare(sets, args, device)
    if data.rank() == 0:
        bounds = probe.floor_and_ceiling(sets, args, device)
        data.write_json({"rows": rows, "bounds": bounds}, args.out / "table6.json")
        print_rows(rows, bounds, args)
        draw(plt, rows, bounds["chance"], args.out / "table6.png")
        print(f"wrote {args.out / 'table6.json'} and {args.out / 'table6.png'}")


if __name__ == "__main__":
    data.run(main)
