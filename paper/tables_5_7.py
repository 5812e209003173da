"""Tables 5, 7, 8, 13, 14, 16 (§4.1 to §4.3, A.2 to A.4, A.7): how well can one tell from a trunk what there is to see?

    python paper/tables_5_7.py                         the model of `python train.py`, on the built-in world
    python paper/tables_5_7.py --checkpoint base/toto.pt large/toto.pt --data FOLDER       FOLDER as for probe.py
    torchrun --nproc_per_node=8 paper/tables_5_7.py --tables 7 --checkpoint FILE --data imagenet

Six trainings, of which each table takes a few heads; all heads of one are learned in the same passes (probe.py):

    images, videos: the trunk is frozen   averaged tokens against attention, each at its best             Tables 5, 14
    images: joint, at twice the side      next tokens and probes of every layer, with a stop-gradient     Table 7
    videos: joint                         the same, with two kinds of heads                               Tables 8, 16
    images: all is fine-tuned             by the classes, with full and with causal attention             Table 13, A.2

Images are those of --data, or the world's single frames (which shape lies there); videos those of --data, or the
world's clips (what moves, and how). Each row stands beside the same from random weights, what the paper's table has,
and the share of the most frequent class. Writes tables_5_7.json and tables_5_7.png to --out; run again, it resumes.

The model of `python train.py` has seen clips alone: to it an image is a first frame after a start that it never saw.
"""

import copy
import sys
import zlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the six scripts lie in the folder above

import data
import dvae
import probe
import toto

# Top-1 as printed, for Toto and the rows nearest to it.
PAPER = {
    "5": {"average, large": 53.2, "attention, large": 61.1},
    "7": {"base": 64.7, "large": 71.1, "1b": 75.3, "iGPT-L": 65.2, "iGPT-XL": 72.0, "BEiT-L": 62.2, "AIM 1.2B": 80.6,
          "MAE-H": 80.9, "DINO-B": 80.1, "DINOv2-g": 86.4},
    "8": {"base": 59.3, "large": 65.3, "1b": 74.4, "Hiera-H": 77.0, "MVD-H": 79.4, "VideoMAE-L": 79.8,
          "I-JEPA-H": 74.5, "DINOv2-g": 84.4},
    "13": {"base, full attention": 82.6, "base, causal (A.2)": 82.2, "DINO": 82.8, "MoCo v3": 83.2, "BEiT": 83.2,
           "MAE": 83.6},
    "14": {"1b": 66.2, "iGPT-L": 65.2},
    "16": {"base": 61.2, "large": 65.8, "1b": 74.8, "Hiera-L": 74.2, "Hiera-H": 75.2, "VideoMAE-B": 65.4,
           "VideoMAE-L": 74.8},
}  # fmt: skip
TITLES = {
    "5": "Table 5 (§4.1): frozen, the middle layer, each pooling at its best",
    "7": "Table 7 (§4.2): images, joint fine-tuning at twice the side, attention",
    "8": "Table 8 (§4.3): videos, joint fine-tuning, attention",
    "13": "Table 13, A.2, A.3: images, full fine-tuning of the whole trunk",
    "14": "Table 14 (A.4): images, frozen, linear probing of the middle layer",
    "16": "Table 16 (A.7): videos, as Table 8, attention and an MLP",
}


@dataclass(frozen=True)
class Protocol:
    """How heads are learned: a training of probe.py, by its flags, and the tables that report it."""

    tables: tuple
    medium: str  # "images" or "videos"
    finetune: str | None
    layer: str  # mid, all, or last
    pools: tuple
    attention: str = "causal"
    scale: int = 1  # of the resolution; 2 goes with five times RoPE's base (§4.2)
    # Not in the paper, what suits `tiny` and half an hour; larger models learn for §4.2's 90 epochs.
    epochs: int = 10


# Not in the paper, but where a table's title says so:
# - Table 14's layer and resolution: as Table 5's. Averages are fitted by L-BFGS to the end, which has no rate; by AdamW
#   they stay points below it, and attention's lead would be partly that (probe.linear_probe).
# - A.2 and A.3 say how tokens attend, and nothing else. A head on the last layer, so that all of the trunk learns, with
#   attention pooling as in Table 7, at the resolution of the pre-training.
# - Tables 7 and 8 report the best layer; which images pick it is not said. Here the middle one is compared, and the
#   best on the very images is printed beside it, which favours it a little.
# - A.7 does not say whether the trunk learns beside the larger head: as in Table 8, to which it is compared.
PROTOCOLS = {
    "images, frozen": Protocol(("5", "14"), "images", None, "mid", ("average", "attention")),
    "videos, frozen": Protocol(("5",), "videos", None, "mid", ("average", "attention")),
    "images, joint": Protocol(("7",), "images", "joint", "all", ("attention",), scale=2, epochs=4),
    "videos, joint": Protocol(("8", "16"), "videos", "joint", "all", ("attention", "attention-mlp"), epochs=3),
    "images, full attention": Protocol(("13",), "images", "full", "last", ("attention",), "full", epochs=4),
    "images, causal attention": Protocol(("13",), "images", "full", "last", ("attention",), epochs=4),
}
# Which pooling of a protocol a table reports.
POOLS = {"5": ("average", "attention"), "14": ("average",), "16": ("attention-mlp",)}


# The clips.
def load_sets(protocol, checkpoint, tokenizer, args):
    """The training and validation probe.ProbeSet of a protocol; None where --data is of the other medium."""
    resolution = protocol.scale * checkpoint["resolution"]
    if args.data or protocol.medium == "videos":
        views = args.views if protocol.medium == "videos" else (1, 1)
        how = {"data": args.data, "resolution": resolution, "views": views, "crops": 1, "out": args.out}
        sets = probe.load_sets(SimpleNamespace(**how), checkpoint, tokenizer)
        return sets if (sets[0].n_frames > 1) == (protocol.medium == "videos") else None
    folders = []
    for split, indices in probe.IMAGE_INDICES.items():
        shards = data.world_shards(indices, resolution, 1, data.WORLD_IMAGES)
        source = Path(data.WORLD_IMAGES) / split
        folders.append(data.tokenize_cached(source, shards, args.out / "tokens", tokenizer, resolution, 4))
    first = probe.ProbeSet(folders[0], 1)
    return [first, probe.ProbeSet(folders[1], 1, classes=first.classes)]


def part(split, rows):
    """Some clips of a ProbeSet, as one of its own."""
    some, rows = copy.copy(split), np.asarray(rows)
    some.tokens = copy.copy(split.tokens)
    for name in ("length", "start", "shard"):
        setattr(some.tokens, name, getattr(split.tokens, name)[rows])
    some.names, some.spare = [split.names[i] for i in rows], split.spare[rows]
    some.ids, some.labels = split.ids[rows], {task: y[rows] for task, y in split.labels.items()}
    return some


# Training and testing.
def learn(heads, sets, model, features, how, state, device):
    """Train heads on the first of two sets and test them on the second -> {key: {"top1", "right"}}.

    What probe.py does with the flags that `how` has. `features(split)` are those of a trunk that is, or by then will
    be, frozen. "right" tells for each clip whether its class was found, as a string of 0 and 1: two heads can then be
    compared clip by clip.
    """
    first, val = sets
    settings = {key: str(value) for key, value in vars(how).items()}
    of_train = None if how.finetune else features(first)
    probe.train_heads(heads, of_train, first, settings, state, how, device, model)
    found = {}
    for key, r in probe.evaluate(heads, features(val), val, how, device).items():
        right = (r["classes"] == val.labels[key[0]]).int().tolist()
        found[key] = {"lr": how.lr, "top1": r["top1"], "right": "".join(map(str, right))}
    return found


def learn_averages(sets, features, layer, device):
    """Linear probes of averaged tokens on the first of two sets, tested on the second -> as `learn` does."""
    means = lambda split: torch.cat(
        [features(split)[rows][layer].float().mean(dim=1) for rows in torch.arange(len(split)).split(128)]
    ).to(device)
    (x, x_val), found = map(means, sets), {}
    for task, names in sets[0].classes.items():
        y, y_val = (split.labels[task].to(device) for split in sets)
        right = probe.linear_probe(x, y, x_val, y_val, len(names))
        marks = "".join(map(str, right.int().tolist()))
        found[task, "average", layer] = {"lr": None, "top1": right.float().mean().item(), "right": marks}
    return found


def pick_rates(rates, train, learn_at):
    """Table 5, Table 14: {key: the rate at which attention is best on a fifth of the training clips, held out of them}.

    learn_at(rate, sets) is `learn` at one rate. The clips that the tables report are not even given to this function.
    """
    held_out = data.is_held_out(train.names, share=0.2)
    sets = [part(train, np.flatnonzero(held_out == out)) for out in (False, True)]
    tried = {rate: learn_at(rate, sets) for rate in rates}
    return {key: max(rates, key=lambda rate: tried[rate][key]["top1"]) for key in tried[rates[0]]}


def load_model(path, start, seed, protocol, args, device):
    """The trunk of a checkpoint, or one of its size with random weights; with five times RoPE's base at twice the side.

    §4.2 has 50,000 there, five times its 10,000. Not in the paper: for `tiny` five times its 20.
    """
    base = toto.load_checkpoint(path)["config"].rope_base * (5 if protocol.scale == 2 else 1)
    model, _, checkpoint = dvae.load_trained(path, args.tokenizer, device, base)
    if start == "trained":
        return model
    torch.manual_seed(seed)
    return toto.Toto(checkpoint["config"], model.compute_dtype).to(device).eval().requires_grad_(False)


def run(name, path, start, seed, load, args, device):
    """One protocol, of one checkpoint and seed, from its weights ("trained") or from random ones ("untrained").

    -> [{"task", "pool", "layer", "lr", "top1", "right"}], kept in --out/runs.
    """
    protocol, checkpoint, runs = PROTOCOLS[name], toto.load_checkpoint(path), args.out / "runs"
    sets = load(name, path)
    config, words = checkpoint["config"], name.replace(", ", "-").replace(" ", "-")
    title = f"{words}-{zlib.crc32(str(path).encode()):08x}-{start}-{seed}"  # several checkpoints may be called toto.pt
    L, is_tiny = config.n_layers, toto.is_tiny(config)
    layers = {"mid": [L // 2], "all": list(range(L + 1)), "last": [L]}[protocol.layer]
    epochs = args.epochs or (protocol.epochs if is_tiny else probe.PAPER["epochs"])
    lr = args.lr or (probe.LAPTOP if is_tiny else probe.PAPER)["lr"]
    how = {"finetune": protocol.finetune, "attention": protocol.attention, "batch": args.batch}
    how |= {"epochs": epochs, "lr": lr, "seed": seed}

    def work():
        model = load_model(path, start, seed, protocol, args, device)
        # Frozen, one pass over a set serves all layers, poolings, tasks and rates.
        features = lru_cache(maxsize=2)(
            lambda split: probe.Features(model, split, layers, SimpleNamespace(**how), device, not split.is_longer)
        )

        def learn_at(rate, sets, keys=None):
            pools = protocol.pools if protocol.finetune else [pool for pool in protocol.pools if pool != "average"]
            heads = probe.make_heads(config.dim, config.n_heads, layers, pools, sets[0].classes, seed, device)
            heads = {key: heads[key] for key in keys or heads}
            state = runs / f"{title}-{len(sets[0])}-{rate:g}.pt"
            return learn(heads, sets, model, features, SimpleNamespace(**how | {"lr": rate}), state, device)

        if protocol.finetune:
            found = learn_at(lr, sets)
        else:  # Table 5: each head at the best of three rates
            rates = pick_rates([lr / 3, lr, lr * 3], sets[0], learn_at)
            found = learn_averages(sets, features, layers[0], device)
            for rate in sorted(set(rates.values())):
                found |= learn_at(rate, sets, [key for key in rates if rates[key] == rate])
        return [dict(zip(("task", "pool", "layer"), key)) | found[key] for key in sorted(found)]

    settings = {"protocol": name, "checkpoint": str(path), "step": checkpoint["step"], "start": start, **how}
    contents = [part for split in sets for part in (split.ids, *split.labels.values())]
    weights = [weight.float() for _, weight in sorted(checkpoint["model"].items())]
    settings |= {"data": args.data, "views": args.views, "contents": data.checksum(*contents, *weights)}
    if data.rank() == 0 and not (runs / f"{title}.json").exists():
        print(f"{name}: {path}, {start}, seed {seed}")
    result = data.once(runs / f"{title}.json", settings, work)
    for state in runs.glob(f"{title}-*.pt"):
        state.unlink(missing_ok=True)
    return result


# Intervals.
def wider(of_seeds, over_clips):
    """Of two 95 % intervals (mean, low, high) the wider: Student's over several runs, or that over the clips.

    Runs with other seeds are tested on the same clips: what they agree on may still be chance. One run has the second
    interval alone, which says nothing of other seeds.
    """
    if len(of_seeds) == 1:
        return over_clips
    return max(probe.over_seeds(of_seeds), over_clips, key=lambda interval: interval[2] - interval[1])


def figure(runs):
    """(top-1, low, high) in per cent; over the clips the interval is Wilson's."""
    shares = [run["top1"] for run in runs]
    share = float(np.mean(shares))
    over_clips = share, *probe.wilson(share, len(runs[0]["right"]))
    return tuple(100 * min(max(x, 0), 1) for x in wider(shares, over_clips))


def difference(runs, others):
    """(points, low, high) of the first less the second; over the clips, which both share, clip by clip."""
    first, second = (np.array([list(run["right"]) for run in some], dtype=int) for some in (runs, others))
    values = 100.0 * (first - second)  # (seeds, clips)
    of_clips, of_seeds = values.mean(axis=0), values.mean(axis=1)
    mean, half = of_clips.mean(), 1.96 * of_clips.std() / len(of_clips) ** 0.5
    return wider(of_seeds, (mean, mean - half, mean + half))


def show(figures):
    value, low, high = figures
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


# The report.
def collect(args, device):
    """All runs -> {"bounds": {medium: {task: the most frequent class's share}}, "clips", "rows"}.

    A row is a head of a checkpoint: its protocol, task, pool and layer, and "trained" and "untrained", a run for each
    seed.
    """

    @lru_cache(maxsize=1)  # or those of all would be in memory
    def load(name, path):
        _, tokenizer, checkpoint = dvae.load_trained(path, args.tokenizer, device)
        return load_sets(PROTOCOLS[name], checkpoint, tokenizer, args)

    report, models, jobs = {"paper": PAPER, "bounds": {}, "clips": {}, "rows": []}, {}, {}
    for name, protocol in PROTOCOLS.items():
        for path in args.checkpoint if set(args.tables) & set(protocol.tables) else ():
            sets, config = load(name, path), toto.load_checkpoint(path)["config"]
            if sets is None:
                continue
            for task, y in sets[1].labels.items():
                most = sets[0].labels[task].bincount().argmax()
                report["bounds"].setdefault(protocol.medium, {})[task] = (y == most).float().mean().item()
            report["clips"][protocol.medium] = [len(split) for split in sets]
            with torch.device("meta"):
                parameters = toto.Toto(config).count_parameters()
            models[path] = {"parameters": parameters, "n_layers": config.n_layers}
            seeds = range(args.seed, args.seed + args.seeds)
            for key in ((name, path, start, seed) for start in ("trained", "untrained") for seed in seeds):
                jobs[key] = partial(run, *key, load, args, device)
    done, heads = data.share_jobs(args.out, jobs, device), {}
    for (name, path, start, _), found in done.items():
        for r in found:
            head = name, path, r["task"], r["pool"], r["layer"]
            heads.setdefault(head, {}).setdefault(start, []).append({key: r[key] for key in ("lr", "top1", "right")})
    for (name, path, *head), runs in heads.items():
        row = {"protocol": name, "model": str(path)} | models[path] | dict(zip(("task", "pool", "layer"), head)) | runs
        report["rows"].append(row | {"top1": figure(runs["trained"]), "floor": figure(runs["untrained"])})
    if not report["rows"]:
        kind = "images" if {"8", "16"} & set(args.tables) else "videos"
        raise ValueError(f"--data {args.data}: holds {kind}, which no table of {', '.join(args.tables)} is about")
    report["claims"] = claims(report["rows"], args.tables)
    return report


def main_layer(row):
    """Which layer a table compares: the middle one, or the only one there is."""
    return PROTOCOLS[row["protocol"]].layer != "all" or row["layer"] == row["n_layers"] // 2


def rows_of(table, rows):
    pools = POOLS.get(table, ("attention",))
    return [row for row in rows if table in PROTOCOLS[row["protocol"]].tables and row["pool"] in pools]


def claims(rows, tables):
    """[{"claim", "points": (value, low, high), "verdict"}], by the intervals alone."""
    found, at_middle = [], [row for row in rows if main_layer(row)]

    def compare(words, row, other):
        figures = difference(row["trained"], other["trained"])
        words += f", {row['task']} ({PROTOCOLS[row['protocol']].medium}), {row['model']}"
        # An interval over clips says nothing of other seeds.
        said = probe.verdict(*figures[1:]) if len(row["trained"]) > 1 else "cannot tell by one seed"
        found.append({"claim": words, "points": figures, "verdict": said})

    def other_of(row, **changes):
        same = row | changes
        keys = "protocol", "model", "task", "pool"
        return next((r for r in at_middle if all(r[key] == same[key] for key in keys)), None)

    for row in at_middle:
        name, protocol = row["protocol"], PROTOCOLS[row["protocol"]]
        if "5" in tables and protocol.finetune is None and row["pool"] == "attention":
            compare("Table 5: attention less average", row, other_of(row, pool="average"))
        if "16" in tables and row["pool"] == "attention-mlp":
            compare("Table 16: attention and MLP less attention", row, other_of(row, pool="attention"))
        if "13" in tables and protocol.attention == "full":
            compare("A.2: full less causal attention", row, other_of(row, protocol="images, causal attention"))
        models = sorted({(r["parameters"], r["model"]) for r in at_middle if r["protocol"] == name})
        if len(models) > 1 and row["model"] == models[-1][1]:
            compare(f"larger is better, {name}, {row['pool']}: largest less smallest", row,
                    other_of(row, model=models[0][1]))  # fmt: skip
    return found


def head_of(row):
    """Its pooling, or for Table 13, where all pool alike, how the trunk attends."""
    protocol = PROTOCOLS[row["protocol"]]
    return f"{protocol.attention} trunk" if protocol.finetune == "full" else row["pool"]


def print_report(report, args):
    """The paper's rows, then ours, for every table; then what they claim."""
    line = "{:<30}{:<11}{:<9}{:<16}{:<7}{:<24}{:<24}{}".format
    for table in args.tables:
        rows = rows_of(table, report["rows"])
        if not rows:
            print(f"\n{TITLES[table]}: --data has no such media")
            continue
        print(f"\n{TITLES[table]}")
        print("the paper: " + ", ".join(f"{name} {top1}" for name, top1 in PAPER[table].items()))
        print(line("model", "parameters", "task", "head", "layer", "top-1, %", "from random weights", "rate"))
        for row in rows:
            same = [r for r in rows if all(r[key] == row[key] for key in ("protocol", "model", "task", "pool"))]
            best = max(same, key=lambda r: r["top1"][0])
            if not (main_layer(row) or row is best):
                continue
            head = head_of(row)
            layer = f"{row['layer']}" + (" best" if row is best and len(same) > 1 else "")
            rates = ", ".join(sorted({f"{r['lr']:.2g}" if r["lr"] else "L-BFGS" for r in row["trained"]}))
            size = f"{row['parameters'] / 1e6:,.2f} M"
            print(line(row["model"], size, row["task"], head, layer, show(row["top1"]), show(row["floor"]), rates))
    print("\n95 % intervals: over the clips, or over seeds where that is wider")
    for medium, of_task in report["bounds"].items():
        for task, share in of_task.items():
            n_train, n_val = report["clips"][medium]
            words = "100, since what is drawn decides" if not args.data else "not known"
            print(f"{medium}, {task}: {n_train:,} to learn from, {n_val:,} to test; most frequent class "
                  f"{100 * share:.1f}; ceiling {words}")  # fmt: skip
    for claim in report["claims"]:
        print(f"{claim['claim']}: {show(claim['points'])} points: {claim['verdict']}")


def draw(plt, report, args, path):
    """A panel for each table: our rows as bars with intervals, random weights as grey ones."""
    tables = [table for table in args.tables if rows_of(table, report["rows"])]
    height, n_columns = -(-len(tables) // 2), min(len(tables), 2)
    plot, axes = plt.subplots(height, n_columns, figsize=(6.5 * n_columns, 3.4 * height), squeeze=False)
    for table, axis in zip(tables, axes.flat):
        rows = [row for row in rows_of(table, report["rows"]) if main_layer(row)]
        for i, row in enumerate(rows):
            kinds = (-0.2, "top1", "C0", "trained"), (0.2, "floor", "lightgrey", "random weights")
            for offset, key, colour, label in kinds:
                value, low, high = (min(max(x, 0), 100) for x in row[key])
                axis.bar(i + offset, value, 0.38, color=colour, label=label if i == 0 else None)
                axis.vlines(i + offset, low, high, color="black", linewidth=1)
        several = len({row["model"] for row in rows}) > 1
        medium = lambda row: PROTOCOLS[row["protocol"]].medium
        model = lambda row: f"\n{Path(row['model']).parent.name}" if several else ""
        names = [f"{medium(row)}\n{row['task']}\n{head_of(row)}{model(row)}" for row in rows]
        axis.set_xticks(range(len(rows)), names, fontsize="x-small")
        axis.set_title(TITLES[table], fontsize="small")
        axis.set(ylabel="top-1, %", ylim=(0, 105))
        axis.legend(fontsize="x-small", frameon=False)
    for axis in axes.flat[len(tables) :]:
        axis.axis("off")
    plot.tight_layout()
    plot.savefig(path, dpi=100)


def parse_arguments():
    parser = data.make_parser(__doc__)
    add, count = parser.add_argument, data.number(int, at_least=1)
    words = "models trained by train.py, a row for each"
    add("--checkpoint", nargs="+", default=[Path("out/toto.pt")], type=Path, help=words)
    add("--tokenizer", type=Path, help="the models' tokenizer (default: dvae.pt beside the checkpoint)")
    add("--data", help="folder with train/<class>/* and val/<class>/*, of images or of videos (default: the world's)")
    add("--tables", nargs="+", default=list(PAPER), choices=PAPER, help="which of them")
    add("--views", type=probe.parse_views, default="1x1", metavar="VxS", help="of a video of --data: 10x3 in §4.3")
    add("--epochs", type=count, help="of every training (default: 90, §4.2; for tiny 3 to 10)")
    add("--lr", type=data.number(float, above=0), help="peak rate (default: 6e-5, §4.2, or 0.002 for tiny)")
    add("--batch", type=count, default=32, help="clips in a step, over all processes")
    add("--seeds", type=count, default=3, help="runs of each kind, from --seed on")
    add("--out", default="out/tables_5_7", type=data.output_folder, help="folder for results, states and cached tokens")
    args = parser.parse_args()
    if args.views != (1, 1) and args.data is None:
        raise ValueError("--views: a clip of the built-in world is one view; give --data")
    return args


def main():
    args, plt = parse_arguments(), data.pyplot()
    device = data.pick_device(args.device)
    data.start_processes(device)
    report = collect(args, device)
    if data.rank() == 0:
        data.write_json(report, args.out / "tables_5_7.json")
        print_report(report, args)
        draw(plt, report, args, args.out / "tables_5_7.png")
        print(f"wrote {args.out / 'tables_5_7.json'} and {args.out / 'tables_5_7.png'}")


if __name__ == "__main__":
    data.run(main)
