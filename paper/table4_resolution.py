"""Table 4 (§4.1 "Resolution"): must all of pre-training be at the full resolution, or is a low one enough at first?

    python paper/table4_resolution.py                  on images of the built-in world, in minutes on two cores
    python paper/table4_resolution.py --data IMAGES --probe FOLDER        on your own; FOLDER as for probe.py
    torchrun --nproc_per_node=8 paper/table4_resolution.py --size large --data IMAGES --probe FOLDER --tokenizer dall-e

One trunk, one tokenizer, one task, and images at R pixels or at twice that, which have four times as many tokens:
pre-trained at one of the two, or at the low one and then fine-tuned at the high one, with RoPE's base as it was or five
times as large. Linear probes of every layer, each at the resolution that the model was last trained at, say how good
the features are. The paper's four rows differ in compute; two more, at the compute of the fine-tuned ones, do not.

The built-in images have as much to see at the low resolution, whose tokens are the cells that they are drawn in: there,
what the high one adds cannot show, but what it costs. Photographs have more (--data, --probe).

Prints the paper's table beside ours, and writes to --out: table4.json, table4.png and the models that are fine-tuned,
low-SEED.pt, which are checkpoints for all programs. Run again, it resumes where it stopped.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the six scripts lie in the folder above

import data
import dvae
import probe
import toto
import train


# What is compared.
@dataclass(frozen=True)
class Row:
    """A row of Table 4: how many steps at each resolution, as multiples of --steps, and what the paper found."""

    name: str
    low: float = 0.0
    high: float = 0.0
    rope_factor: float = 1.0  # what multiplies RoPE's base before the steps at the high resolution
    compute: float = None  # the paper's, for `large` on ImageNet-1k
    top1: float = None

    @property
    def is_fine_tuned(self):
        return self.low > 0 and self.high > 0


# A context has 4,096 tokens at either resolution, so 4 images at 32 x 32 where there are 16 at 16 x 16. That the paper
# does so is read off its compute: dVAE/32 has 4.00 times that of dVAE/16 for the same images, where contexts of 16,384
# tokens would cost more, since attention does. So a step costs the same at both, and dVAE/32 takes four times as many.
#
# The text says that fine-tuning takes "only one epoch". The compute says (2.13 - 1.42) / 5.68 = 1/8 of the pre-training
# at 32 x 32, which is 50 of 400 epochs; we follow the compute. Its unit is not named: 1.42e17 is, within 6 %, the
# multiply-adds of one forward pass of `large` over ImageNet-1k at 16 x 16. Ratios are what is compared here.
ROWS = [
    Row("dVAE/16", low=1, compute=1.42e17, top1=53.2),
    Row("dVAE/32", high=4, compute=5.68e17, top1=61.2),
    Row("dVAE/16→32", low=1, high=0.5, compute=2.13e17, top1=63.2),
    # From 10,000 to 50,000. Not in the paper: for `tiny`, whose base is 20, five times as much too.
    Row("dVAE/16→32, base x 5", low=1, high=0.5, rope_factor=5, compute=2.13e17, top1=64.4),
    # Not in the paper: what the compute of the last two buys at one resolution alone.
    Row("dVAE/16, as long", low=1.5),
    Row("dVAE/32, as long", high=1.5),
]
# (what the paper says of the first, the second): top-1 of the first less that of the second should be above 0.
CLAIMS = [
    ("the low resolution is a drop", "dVAE/32", "dVAE/16"),
    ("fine-tuned beats the high resolution", "dVAE/16→32", "dVAE/32"),
    ("a larger RoPE base is better", "dVAE/16→32, base x 5", "dVAE/16→32"),
    ("at equal compute, fine-tuned beats the high resolution", "dVAE/16→32", "dVAE/32, as long"),
    ("at equal compute, fine-tuned beats the low resolution", "dVAE/16→32", "dVAE/16, as long"),
]


# One run.
def images_in_a_sequence(args, is_high):
    """As many tokens a sequence at both resolutions: a fourth of the images at twice the side."""
    return args.frames // 4 if is_high else args.frames


def steps_of(row, args):
    """Optimizer steps at the low and at the high resolution."""
    return math.ceil(row.low * args.steps), math.ceil(row.high * args.steps)


def flops(row, model, n_sequences, n_tokens, args):
    """{"flops" of all training of a row, "macs" of its forward passes alone}, of steps of n_sequences of n_tokens.

    The backward pass costs twice the forward pass and a multiply-add is two FLOPs: the first is six times the other.
    """
    total = sum(steps_of(row, args)) * n_sequences * n_tokens * model.flops_per_token(n_tokens)
    return {"flops": total, "macs": total / 6}


def run(row, seed, sets, tokenizer, args, device):
    """{"loss" on held-out images, in nats a token, "top1" of each layer, "untrained": that before training, "flops"}.

    The first two rows alone are probed before training: the others begin as one of them does, but for RoPE's base.
    `sets` are those of probe.image_sets by resolution, {is_high: …}. A fine-tuned row starts from the weights of the
    first row with the same seed. Not in the paper: fine-tuning has a warm-up and a cosine of its own, from the same
    peak rate; the optimizer's moments start from zero.
    """
    is_high, starts_from = row.high > 0, args.out / f"low-{seed}.pt"
    of, how = sets[is_high], {"frames": images_in_a_sequence(args, is_high), "steps": steps_of(row, args)[is_high]}
    how = SimpleNamespace(**vars(args) | how)
    config = replace(toto.SIZES[args.size], vocab_size=toto.FIRST_CODE + of["pretrain"].meta["vocab_size"])
    config = replace(config, rope_base=row.rope_factor * config.rope_base)

    def work(state, settings):
        if row.is_fine_tuned and not starts_from.exists():
            raise ValueError(f"{starts_from}: is missing; remove {args.out / 'runs'} too, and start over")
        torch.manual_seed(seed)
        model = toto.Toto(config, data.fast_dtype(device)).to(device)
        first = probe.ProbeSet(of["train"], 1)
        labelled = first, probe.ProbeSet(of["val"], 1, classes=first.classes)
        untrained = probe.linear_probes(model, labelled, device) if row in ROWS[:2] else None
        if row.is_fine_tuned:
            model.load_state_dict(toto.load_checkpoint(starts_from)["model"])
        mixture = data.Mixture([data.Source(of["pretrain"], how.frames)], [1.0], seed)
        tokens_per_frame = math.prod(of["pretrain"].meta["grid"])
        n_sequences = train.sequences_in_a_step(how, tokens_per_frame, data.world_size())
        of_run = SimpleNamespace(n_sequences=n_sequences, mixture=mixture)
        read_batch = lambda step: train.read_batch(of_run, step, device)
        train.fit(model, read_batch, how, device, state, settings, f"{row.name}, seed {seed}")
        held_out = {"images": data.Source(of["pretrain"], how.frames, held_out=True)}
        result = {"loss": train.evaluate(model, held_out, args.micro_batch, device)["images"]["loss"]}
        if row is ROWS[0] and data.rank() == 0:
            checkpoint = {"step": how.steps, "tokenizer": tokenizer.fingerprint(), "stride": 1, "frames": how.frames}
            dvae.save_trained(model, tokenizer, checkpoint, args.resolution, starts_from)
        result |= {"top1": probe.linear_probes(model, labelled, device), "untrained": untrained}
        return result | flops(row, model, n_sequences, how.frames * tokens_per_frame, args)

    settings = {"row": row.name, "seed": seed, "tokenizer": of["pretrain"].meta["tokenizer"], "own steps": how.steps}
    name = "".join(c if c.isalnum() else "-" for c in f"{row.name} {seed}")
    return train.kept_run(args, name, settings, work)


# The table and its picture.
def gain(rows, first, second, layer):
    """Top-1 of one row less that of another, seed by seed, in points."""
    of = {row["name"]: row["top1"] for row in rows}
    return [100 * (a[layer] - b[layer]) for a, b in zip(of[first], of[second])]


def print_rows(rows, bounds, args):
    """Table 4, the paper's beside ours: means over seeds and their 95 % intervals; then what it claims."""
    middle = (len(rows[0]["top1"][0]) - 1) // 2
    columns = "{:<24}{:<7}{:<11}{:<9}{:<11}{:<24}{:<24}{:<11}{}"
    print(f"\nTable 4: linear probes on averaged tokens, {args.seeds} seed(s), 95 % intervals over them")
    heads = "x", "paper's", "top-1, %", "PFLOPs", f"layer {middle}, top-1, %", "best layer, %", "untrained"
    print(columns.format("", *heads, "loss, nats a token"))
    for row in rows:
        at = lambda key, l: [100 * top1[l] for top1 in row[key]]
        best = int(np.argmax(np.mean(row["top1"], axis=0)))
        paper = (f"{row['compute']:.3g}", row["paper"]) if row["paper"] else ("", "")
        best_of_untrained = max(np.mean(row["untrained"], axis=0))
        cells = f"{row['flops'] / rows[0]['flops']:.2f}", *paper, f"{row['flops'] / 1e15:.3g}"
        shown = probe.show_seeds(at("top1", middle)), f"{probe.show_seeds(at('top1', best))}, {best}"
        print(columns.format(row["name"], *cells, *shown, f"{100 * best_of_untrained:.1f}",
                             probe.show_seeds(row["loss"], 3)))  # fmt: skip
    print("losses compare at one resolution only: at another there are other codes, and more of them for an image")
    for name, top1 in bounds.items():
        print(f"{name}: {100 * top1:.1f}")
    for words, first, second in CLAIMS:
        values = gain(rows, first, second, middle)
        said = probe.verdict(*probe.over_seeds(values)[1:])
        print(f"{words}: {probe.show_seeds(values)} points at layer {middle}: {said}")


def draw(plt, rows, chance, path):
    """Top-1 over compute, the paper's and ours, each relative to the first row; bars are 95 % intervals over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    middle = (len(rows[0]["top1"][0]) - 1) // 2
    for i, row in enumerate(rows):
        if row["paper"]:
            axes[0].plot(row["compute"] / rows[0]["compute"], row["paper"], "o", color=f"C{i}")
        mean, low, high = probe.over_seeds([100 * top1[middle] for top1 in row["top1"]])
        x = row["flops"] / rows[0]["flops"] * (1 + 0.015 * i)  # side by side where they are equal
        axes[1].plot(x, mean, "o", color=f"C{i}", label=row["name"])
        if len(row["top1"]) > 1:  # one seed has no interval
            axes[1].vlines(x, max(low, 0), min(high, 100), color=f"C{i}")
    axes[1].axhline(100 * chance, linestyle=":", color="grey")
    for axis, title in zip(axes, ("the paper, ImageNet", f"here, layer {middle}")):
        axis.set(xscale="log", xlabel="compute, of dVAE/16's", ylabel="top-1 of a linear probe, %", title=title)
        axis.set_xticks([1, 1.5, 4], ["1", "1.5", "4"], minor=False)
        axis.minorticks_off()
    axes[1].legend(fontsize="small", frameon=False, loc="lower center", bbox_to_anchor=(0.68, 0.07))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = data.make_parser(__doc__)
    args, plt = train.parse_study(parser, "out/table4", steps=400), data.pyplot()
    if not args.has_probe:
        raise ValueError("--data needs --probe, a folder with train/<class>/* and val/<class>/*")
    device = data.pick_device(args.device)
    data.start_processes(device)
    tokenizer = train.study_tokenizer(args, device)
    sets = {high: probe.image_sets(args, tokenizer, args.resolution * (1 + high)) for high in (False, True)}
    rows = []
    for row in ROWS:  # the first makes the models that others start from
        runs = [run(row, seed, sets, tokenizer, args, device) for seed in range(args.seed, args.seed + args.seeds)]
        figures = {key: [of_seed[key] for of_seed in runs] for key in ("loss", "top1", "untrained")}
        if row not in ROWS[:2]:
            figures["untrained"] = rows[row.high > 0]["untrained"]
        costs = {"flops": runs[0]["flops"], "macs": runs[0]["macs"]}
        rows.append({"name": row.name, "compute": row.compute, "paper": row.top1} | costs | figures)
    if data.rank() == 0:
        bounds = probe.floor_and_ceiling(sets[False], args, device)
        data.write_json({"rows": rows, "bounds": bounds}, args.out / "table4.json")
        print_rows(rows, bounds, args)
        draw(plt, rows, bounds["chance"], args.out / "table4.png")
        print(f"wrote {args.out / 'table4.json'} and {args.out / 'table4.png'}")


if __name__ == "__main__":
    data.run(main)
