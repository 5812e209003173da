"""Table 12 (§4.7): does the model know where a thing is that it cannot see? CATER's snitch, at 16 and at 32 frames.

    python paper/table12_permanence.py                  on a stand-in for CATER that is drawn here, in minutes
    python paper/table12_permanence.py --data max2action --checkpoint FILE    CATER itself, in its published layout
    torchrun --nproc_per_node=8 paper/table12_permanence.py --data max2action --checkpoint FILE

A golden snitch moves among cones and other objects; a cone may be put over it and slide away with it. In which of the
6 x 6 cells of the ground is it in the last frame? Toto is pre-trained on the clips by next tokens, for each seed (or
read from --checkpoint), then fine-tuned: a linear head with 36 classes, whose gradient reaches the whole trunk. Beside
it stands the same trunk from random weights, and what needs no model: the last cell in which the snitch was seen, the
cell of the first frame, the most frequent cell. Only what is above the last seen cell, where the snitch ends hidden, is
permanence.

Writes to --out: table12.json, table12.png, table12.gif, the tokenizer dvae.pt, the pre-trained toto-SEED.pt and the
fine-tuned trunks, finetuned-FRAMES-SEED.pt, as checkpoints for all programs. Run again, it resumes where it stopped.

From top to bottom: the stand-in, CATER, the sets of clips, what is measured, the runs, the table and its pictures.
Shape letters: N clips, F frames, R pixels a side, n objects, T tokens.
"""

import math
import re
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))  # the six scripts lie in the folder above

import data
import dvae
import probe
import toto
import train

PAPER = {"V3D ResNet": (55.2, 69.7), "TFC V3D ResNet": (54.6, 70.2), "Toto-large": (62.8, 72.9)}  # top-1, 16 and 32
# Not in the paper: which frames. 32 are stored, and every second one of them makes 16, so that one folder serves both.
FRAMES = (16, 32)
SIDE, CELLS = 6, 36
STARTS, GAIN = ("pre-trained", "from scratch"), "pre-trained less from scratch"
# §3.2 and §4.2 for all other sizes. Not in the paper: what suits `tiny` and 15 minutes; a step has four sequences of 16
# frames of 6 x 6 tokens.
DEFAULTS = train.PAPER | {"epochs": probe.PAPER["epochs"], "finetune_lr": probe.PAPER["lr"], "batch": 8}
LAPTOP = train.LAPTOP | {"batch_tokens": 2304, "steps": 1500, "epochs": 2}
LAPTOP |= {"finetune_lr": probe.LAPTOP["lr"], "batch": 8}


# The stand-in for CATER: its objects and actions, drawn plainly. The ground is [-3, 3) x [-3, 3), y points to us.
SNITCH, SMALL, LARGE, BALL, TOWER = range(5)  # two sizes of cones; a tower is tall enough to hide what is behind it
OBJECTS = {SNITCH: (0.28, 0.56), SMALL: (0.3, 0.5), LARGE: (0.42, 0.9), BALL: (0.34, 0.68), TOWER: (0.48, 1.9)}
GOLD = (255, 220, 0)
COLOURS = {SNITCH: GOLD, SMALL: (40, 80, 235), LARGE: (150, 50, 190), BALL: (215, 40, 50), TOWER: (25, 25, 40)}
SLOTS = 10  # of time; in each at most two objects act, as in CATER's max2action
# What a snitch (contain, move) or a cone that holds something (uncover, slide, nest) does in a slot; else it rests.
# Calibrated so that a third of the clips end contained, and half of these in another cell than the last visible one.
CONTAIN, MOVE, UNCOVER, SLIDE, NEST = 0.105, 0.25, 0.18, 0.23, 0.05


@dataclass
class CupsClip:
    frames: np.ndarray  # uint8 (F, R, R, 3)
    cell: int  # the label: where the snitch is in the last frame, seen or not
    visible: np.ndarray  # bool (F,): whether any pixel shows the snitch
    contained: np.ndarray  # bool (F,): whether it is under a cone
    positions: np.ndarray  # float (F, n, 3): x, y and height above the ground of all objects, the snitch first
    kinds: list  # of the n objects


def cell_of(x, y):
    """CATER's class of a place on the ground, 0 … 35: row by row."""
    return SIDE * (math.floor(y) + 3) + math.floor(x) + 3


def simulate(rng):
    """One story -> (kinds of n objects, [(start, end, lifted, inside before, inside after)] for each slot).

    start and end are places (n, 2); lifted (n,) tells what is carried through the air and not slid; inside (n,) is the
    cone that covers an object directly, or -1.
    """
    kinds = [SNITCH, SMALL, LARGE] + rng.choice([SMALL, LARGE, BALL, TOWER], rng.integers(2, 8)).tolist()
    n, slots = len(kinds), []
    # Not in the paper: a cell holds one object or one heap of cones, which stand in its middle.
    place_in = lambda cell: np.array([cell % SIDE - 2.5, cell // SIDE - 2.5])
    at, inside = np.stack([place_in(cell) for cell in rng.permutation(CELLS)[:n]]), np.full(n, -1)
    contents = lambda i: np.flatnonzero(inside == i)
    free_place = lambda: place_in(rng.choice(sorted(set(range(CELLS)) - {cell_of(*place) for place in at})))

    def shift(i, place):  # what is inside slides along
        at[i] = place
        for j in contents(i):
            shift(j, place)

    def act(i, busy, lifted):  # one object's action in a slot, if any
        draw = rng.random()
        covers = {SNITCH: draw < CONTAIN, SMALL: draw < 0.1}.get(kinds[i], False)
        if len(contents(i)):
            covers = kinds[i] == SMALL and UNCOVER + SLIDE < draw < UNCOVER + SLIDE + NEST
        if covers:  # contain: a free cone is put over i, a large one over a small cone
            sizes = (SMALL, LARGE) if kinds[i] == SNITCH else (LARGE,)
            free = [c for c in range(n) if kinds[c] in sizes and inside[c] < 0 and not len(contents(c))]
            if free := [c for c in free if c != i and c not in busy]:
                cone = rng.choice(free)
                at[cone], inside[i], lifted[cone] = at[i], cone, True
                busy |= {cone}
        elif len(contents(i)) and draw < UNCOVER:  # the cone alone is lifted
            inside[contents(i)], lifted[i] = -1, True
            at[i] = free_place()
        elif draw < UNCOVER + SLIDE if len(contents(i)) else kinds[i] != SNITCH or draw < CONTAIN + MOVE:
            lifted[i] = not len(contents(i)) and rng.random() < 0.5  # slide, or pick and place
            shift(i, free_place())

    for _ in range(SLOTS):
        start, before, lifted = at.copy(), inside.copy(), np.zeros(n, dtype=bool)
        outermost = 0
        while inside[outermost] >= 0:
            outermost = inside[outermost]
        busy = {outermost}
        act(outermost, busy, lifted)
        if others := [i for i in range(n) if inside[i] < 0 and before[i] < 0 and i not in busy]:
            act(rng.choice(others), busy, lifted)
        slots.append((start, at.copy(), lifted, before, inside.copy()))
    return kinds, slots


def project(resolution, x, y, z=0.0):
    """A place on the ground, and a height, -> pixels across and down: the ground's plan, with heights drawn upwards.

    Not in the paper: by this oblique view, not by CATER's camera, a cell is one code at the default resolution.
    """
    return resolution * (x + 3) / SIDE, resolution * (y + 3 - z) / SIDE


def paint(pen, resolution, kind, place):
    """Draw one object that stands at (x, y, z)."""
    (radius, height), (u, v), colour = OBJECTS[kind], project(resolution, *place), COLOURS[kind]
    r, h = (resolution / SIDE * length for length in (radius, height))  # in pixels
    foot = v + 0.42 * resolution / SIDE
    if kind in (SMALL, LARGE):
        pen.polygon([(u - r, foot), (u + r, foot), (u, foot - h)], fill=colour)
    elif kind == TOWER:
        pen.rectangle((u - r, foot - h, u + r, foot), fill=colour)
    else:
        pen.ellipse((u - r, v - r, u + r, v + r), fill=colour)


def cups_clip(index, n_frames=32, resolution=48, seed=0):
    """Clip number `index` of the stand-in: always the same for the same arguments.

    Frame f shows the moment (f + 1) / F of the story, as in CATER's videos below: the last one is its end.
    """
    rng = np.random.default_rng([seed, index])
    kinds, slots = simulate(rng)
    n = len(kinds)
    ground = Image.fromarray(data.world_ground(resolution).round().astype(np.uint8))
    clip = CupsClip([], 0, [], [], [], kinds)
    for f in range(n_frames):
        slot = ((f + 1) * SLOTS - 1) // n_frames  # a slot's last moment belongs to it
        done = ((f + 1) * SLOTS - slot * n_frames) / n_frames  # above 0, up to 1
        start, end, lifted, before, after = slots[slot]
        hidden = (after >= 0) & ((before >= 0) | (done == 1))  # under a cone, not only about to be
        # What moves goes from cell to cell, as the pieces of the built-in world do, and what is carried a cell higher.
        places = np.column_stack((np.floor(start + done * (end - start)) + 0.5, lifted * (done < 1)))
        image = ground.copy()
        pen = ImageDraw.Draw(image)
        # From back to front; a cone comes after what it is about to cover.
        for i in sorted(range(n), key=lambda i: (round(places[i, 1], 6), kinds[i] in (SMALL, LARGE))):
            if not hidden[i]:
                paint(pen, resolution, kinds[i], places[i])
        clip.frames.append(np.asarray(image))
        clip.visible.append((clip.frames[-1] == GOLD).all(axis=-1).any())
        clip.contained.append(hidden[0])
        clip.positions.append(places)
    lists = {name: np.stack(getattr(clip, name)) for name in ("frames", "visible", "contained", "positions")}
    return replace(clip, **lists, cell=cell_of(*places[0, :2]))


def stand_in_shards(indices, resolution):
    """The stand-in's clips with these indices, each with its label and what the floors and the endings are made of."""

    def read(index):
        clip = cups_clip(index, max(FRAMES), resolution)
        cells = [cell_of(*place) for place in clip.positions[:, 0, :2]]
        labels = {"cell": clip.cell, "first": cells[0], "visible": bool(clip.visible[-1])}
        for n_frames in FRAMES:
            step = max(FRAMES) // n_frames
            seen = np.flatnonzero(clip.visible[step - 1 :: step])
            labels[f"last of {n_frames}"] = cells[step - 1 :: step][seen[-1]] if len(seen) else -1  # -1: never seen
        return labels, clip.frames

    return data.in_shards([data.Item(f"cups/{index:07d}", lambda index=index: read(index)) for index in indices])


# CATER as it is published: FOLDER/videos/*.avi and, for each split, FOLDER/lists/localize/SPLIT.txt.
def spread(frames, n_frames):
    """Not in the paper: the last frame of each of F equal parts of a video, so that the last of all is among them."""
    return [frames[max((i + 1) * len(frames) // n_frames - 1, 0)] for i in range(n_frames)]


def read_squashed(path, resolution):
    """Not in the paper: 320 x 240 pixels are squashed to R x R, since a crop would cut cells away."""
    for frame in spread(list(data.read_frames(path, resolution, stride=1)), max(FRAMES)):
        yield np.asarray(Image.fromarray(frame).resize((resolution, resolution), Image.Resampling.BICUBIC))


def cater_shards(folder, split, resolution):
    """The labelled videos of a split. Raises ValueError, with file and line, where a list is not as it should be."""
    path, items = Path(folder) / "lists" / "localize" / f"{split}.txt", []
    if not path.is_file():
        words = "no such file; --data needs CATER's videos/*.avi and lists/localize/train.txt and val.txt"
        raise ValueError(f"{path}: {words}")
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        found = re.fullmatch(r"\s*(\S+)\s+(-?\d+)\s*", line)
        if not found:
            raise ValueError(f"{path}, line {number}: {line!r} is not a video's name and a cell")
        video, cell = Path(folder) / "videos" / found[1], int(found[2])
        if not 0 <= cell < CELLS:
            raise ValueError(f"{path}, line {number}: cell {cell} is not one of 0 to {CELLS - 1}")
        if not video.is_file():
            raise ValueError(f"{path}, line {number}: {video} does not exist")
        read = lambda video=video, cell=cell: ({"cell": cell}, read_squashed(video, resolution))
        items.append(data.Item(found[1], read))
    if len(items) < 2:
        raise ValueError(f"{path}: names {len(items)} videos; two are needed at least")
    return data.in_shards(items)


# The sets of clips.
def shards_of(args, split):
    """What is tokenized for a split: CATER's videos, or as many clips of the stand-in, the two splits far apart."""
    if args.data:
        return cater_shards(args.data, split, args.resolution)
    n_train = round(0.7 * args.clips)  # CATER's share
    first, n_clips = (0, n_train) if split == "train" else (1_000_000, args.clips - n_train)
    return stand_in_shards(range(first, first + n_clips), args.resolution)


def labelled(tokens, n_frames):
    """The clips of a token folder at 16 or 32 frames, as what probe.py trains heads on; all 36 cells are classes."""
    split, step = probe.ProbeSet(tokens, max(FRAMES), classes=None), max(FRAMES) // n_frames
    start, codes = split.ids.split((1, split.ids.shape[2] - 1), dim=2)  # (N, 1, 1), (N, 1, 32 · h · w)
    codes = codes.unflatten(2, (max(FRAMES), -1))[:, :, step - 1 :: step].flatten(2)  # the last frame is always kept
    split.ids, split.n_frames = torch.cat((start, codes), dim=2), n_frames
    # Some cells may be missing among few clips: a class without an example is no mistake here.
    split.classes, split.labels = {"cell": list(range(CELLS))}, {"cell": torch.tensor(tokens.labels["cell"])}
    return split


# What is measured.
def endings(tokens):
    """{"all", "visible", "hidden"}: which clips end so, bool (N,); of CATER itself only all is known."""
    everything = np.ones(len(tokens), dtype=bool)
    if "visible" not in tokens.labels:
        return {"all": everything}
    visible = np.array(tokens.labels["visible"])
    return {"all": everything, "visible": visible, "hidden": ~visible}


def manhattan(a, b):
    """The distance of cells, numbers 0 … 35, in rows and columns."""
    return abs(a // SIDE - b // SIDE) + abs(a % SIDE - b % SIDE)


def scores(ranked, tokens):
    """{ending: {"n", "top1", "top5", "manhattan"}} of cells ranked (N, 5), the most probable first.

    Each figure is (value, low, high) with its 95 % interval over clips: Wilson's of shares, the normal one of the mean
    distance. A single guess (N, 1) has no top5; a guess of -1, where there was nothing to go by, has no distance.
    """
    cell, found = np.array(tokens.labels["cell"]), {}
    right, distance = ranked == cell[:, None], manhattan(ranked[:, 0], cell)
    for name, which in endings(tokens).items():
        found[name] = row = {"n": int(which.sum())}
        for k in ((1, 5) if ranked.shape[1] > 1 else (1,)) if which.any() else ():
            share = float(right[which, :k].any(axis=1).mean())
            row[f"top{k}"] = [share, *probe.wilson(share, row["n"])]
        guessed = which & (ranked[:, 0] >= 0)
        if guessed.any():
            row["manhattan"] = mean_interval(distance[guessed])
    return found


def mean_interval(values):
    """[mean, low, high] with the normal 95 % interval."""
    mean, half = float(np.mean(values)), 1.96 * float(np.std(values)) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def permanence(ranked, tokens, n_frames):
    """[gain, low, high]: by how much top-1 is above the last visible cell's, where the snitch ends hidden.

    Who says no more than where it was last seen has a gain of 0: only what it takes to follow a thing that is hidden
    counts. The two are compared clip by clip, which makes the interval, for many clips, shorter than from two shares.
    None where no clip ends so, or where nobody knows.
    """
    hidden = endings(tokens).get("hidden", np.zeros(0, dtype=bool))
    if not hidden.any():
        return None
    cell, last = (np.array(tokens.labels[key])[hidden] for key in ("cell", f"last of {n_frames}"))
    return mean_interval((ranked[hidden, 0] == cell).astype(float) - (last == cell))


def floors(sets, n_frames):
    """{name: scores} of what needs no model, and of the ceiling. Seen means: in the frames that the model gets."""
    cell, val = np.array(sets["train"].labels["cell"]), sets["val"]
    guesses = {"most frequent cell": np.full(len(val), np.bincount(cell).argmax())}
    if "visible" in val.labels:
        guesses["first frame's cell"] = np.array(val.labels["first"])
        guesses["last visible cell"] = np.array(val.labels[f"last of {n_frames}"])
        guesses["ceiling: the true state"] = np.array(val.labels["cell"])
    return {name: scores(guess[:, None], val) for name, guess in guesses.items()}


@torch.no_grad()
def rank_cells(model, head, split, args, device):
    """The five most probable cells of every clip, (N, 5), by the head on the last layer."""
    ranked, L = torch.zeros(len(split), 5, dtype=torch.long, device=device), model.config.n_layers
    for rows in torch.arange(data.rank(), len(split), data.world_size()).split(args.batch):
        x = model.features(split.inputs(rows).to(device).long(), [L])[L][:, 1:]
        ranked[rows.to(device)] = head.eval()(x).topk(5).indices
    if data.world_size() > 1:  # each filled in its own rows
        dist.all_reduce(ranked)
    return ranked.cpu().numpy()


# The runs.
class LastFrameHead(nn.Module):
    """A linear classifier of the last frame's tokens, laid out in order; they have looked at all frames before.

    Not in the paper, which describes no head. §3.5's attention pool forgets the order of tokens, so that each must
    first learn to say where it is: after as many steps 59 % of the visible endings were right, and 99.8 % with this.
    """

    def __init__(self, config, tokens_per_frame):
        super().__init__()
        self.tokens_per_frame, self.norm = tokens_per_frame, probe.FeatureNorm(config.dim)
        self.classifier = nn.Linear(tokens_per_frame * config.dim, CELLS)

    def forward(self, x):
        x = x[:, -self.tokens_per_frame :].float()  # (B, T, D) -> (B, h·w, D)
        mean, scale = self.norm(x)
        return self.classifier(((x - mean) * scale).flatten(1))  # (B, 36)


def make_heads(config, layers, sets, seed, device):
    """{(task, pool, layer): head} for probe.train_heads, each from the seed alone."""
    heads = {}
    for l in layers:
        torch.manual_seed(seed)
        heads["cell", "last frame", l] = LastFrameHead(config, math.prod(sets["train"].meta["grid"])).to(device)
    return heads


def rope_base(config, n_frames):
    """§4.2's 50,000 for longer contexts than those of pre-training. Not in the paper: for `tiny`, five times its 20."""
    if n_frames == min(FRAMES):
        return config.rope_base
    return 5 * config.rope_base if toto.is_tiny(config) else 50_000.0


def settings_of(args, sets, checkpoint, config):
    """What a finished run depends on beside its own: the trunk, if any was trained, and the clips."""
    clips = [tokens.labels["cell"] for tokens in sets.values()]
    clips += [tokens.codes(i) for tokens in sets.values() for i in range(len(tokens))]
    weights = [weight.float() for _, weight in sorted(checkpoint.get("model", {}).items())]
    meta = {"contents": data.checksum(*clips, *weights), "tokenizer": sets["train"].meta["tokenizer"]}
    return meta | {"config": asdict(config), "batch": args.batch}


def trunk_of(args, seed):
    """The checkpoint that a seed's runs start from."""
    return args.checkpoint or args.out / f"toto-{seed}.pt"


def fine_tune(name, n_frames, seed, sets, args, device):
    """§4.7: the classes' gradient through the whole trunk, "pre-trained" or "from scratch".

    -> {"scores", "permanence", "shown": {clip: the cell it was given, for the pictures}}
    Not in the paper: the head reads the last layer, so that all of the trunk learns.
    """
    how = SimpleNamespace(finetune="full", attention="causal", batch=args.batch, epochs=args.epochs, seed=seed)
    how.lr, checkpoint = args.finetune_lr, {}
    config = replace(toto.SIZES[args.size], vocab_size=toto.FIRST_CODE + sets["train"].meta["vocab_size"])
    if args.checkpoint or name == "pre-trained":
        checkpoint = toto.load_checkpoint(trunk_of(args, seed))
        config = checkpoint["config"]
    config = replace(config, rope_base=rope_base(config, n_frames))

    def work(state, settings):
        torch.manual_seed(seed)
        model = toto.Toto(config, data.fast_dtype(device)).to(device).eval()
        if name == "pre-trained":
            model.load_state_dict(checkpoint["model"])
        first, val = (labelled(sets[split], n_frames) for split in ("train", "val"))
        heads = make_heads(config, [config.n_layers], sets, seed, device)
        probe.train_heads(heads, None, first, settings, state, how, device, model)
        (head,) = heads.values()
        ranked = rank_cells(model, head, val, args, device)
        if name == "pre-trained" and data.rank() == 0:
            _, tokenizer, _ = dvae.load_trained(trunk_of(args, seed), args.tokenizer, device)
            path = args.out / f"finetuned-{n_frames}-{seed}.pt"
            dvae.save_trained(model, tokenizer, checkpoint | {"frames": n_frames}, args.resolution, path)
        shown = {clip: int(ranked[val.names.index(clip), 0]) for clip in shown_clips(sets["val"])}
        result = {"scores": scores(ranked, sets["val"]), "shown": shown}
        return result | {"permanence": permanence(ranked, sets["val"], n_frames)}

    if data.rank() == 0:
        print(f"fine-tuning at {n_frames} frames, {name}, seed {seed}")
    settings = settings_of(args, sets, checkpoint if name == "pre-trained" else {}, config)
    settings |= {"frames": n_frames, "seed": seed, "start": name}
    settings |= {"epochs": args.epochs, "finetune_lr": args.finetune_lr}
    return train.kept_run(args, f"{name}-{n_frames}-{seed}", settings, work)


def sweep_layers(sets, args, device):
    """§4.8, Fig. 8: the task at 16 frames from each layer of the frozen trunk -> [{"layer", "top1", "interval"}]."""
    how = SimpleNamespace(finetune=None, attention="causal", batch=args.batch, epochs=args.probe_epochs, seed=args.seed)
    checkpoint = toto.load_checkpoint(trunk_of(args, args.seed))

    def work(state, settings):
        model, _, _ = dvae.load_trained(trunk_of(args, args.seed), args.tokenizer, device)
        how.lr = (probe.LAPTOP if toto.is_tiny(model.config) else probe.PAPER)["lr"]
        layers = range(model.config.n_layers + 1)
        first, val = (labelled(sets[split], min(FRAMES)) for split in ("train", "val"))
        heads = make_heads(model.config, layers, sets, args.seed, device)
        features = probe.Features(model, first, layers, how, device)
        probe.train_heads(heads, features, first, settings, state, how, device, model)
        results = probe.evaluate(heads, probe.Features(model, val, layers, how, device, keep=False), val, how, device)
        return [{"layer": l, "top1": r["top1"], "interval": r["interval"]} for (_, _, l), r in results.items()]

    if data.rank() == 0:
        print(f"layer by layer, the frozen trunk at {min(FRAMES)} frames")
    settings = settings_of(args, sets, checkpoint, checkpoint["config"])
    settings |= {"probe_epochs": args.probe_epochs, "seed": args.seed}
    return train.kept_run(args, "layers", settings, work)


# The table and its pictures.
def over_runs(figures):
    """(value, low, high) of several runs, over the clips, which they share, or over seeds where that is wider."""
    over_clips = tuple(np.mean(figures, axis=0).tolist())
    over_seeds = probe.over_seeds([figure[0] for figure in figures]) if len(figures) > 1 else over_clips
    return max(over_clips, over_seeds, key=lambda interval: interval[2] - interval[1])


def summary(runs):
    """{ending: {"top1", "top5", "manhattan": over_runs of what several runs have}}, within what is possible."""
    found = {}
    for ending, key in [(ending, key) for ending, row in runs[0].items() for key in row if key != "n"]:
        most = math.inf if key == "manhattan" else 1.0
        figures = over_runs([run[ending][key] for run in runs])
        found.setdefault(ending, {})[key] = [min(max(x, 0.0), most) for x in figures]
    return found


def lead(runs, others, ending):
    """Top-1 of runs less that of others with the same seeds: (share, low, high) by Student; None of a single seed."""
    pairs = [(run[ending], other[ending]) for run, other in zip(runs, others) if run[ending]["n"]]
    shares = [run["top1"][0] - other["top1"][0] for run, other in pairs]
    return probe.over_seeds(shares) if len(shares) > 1 else None


def show(figures, scale=100, digits=1):
    if not figures:
        return ""
    value, low, high = (f"{scale * x:.{digits}f}" for x in figures)
    return f"{value} ({low} to {high})"


def verdict(n_frames, gains):
    """What Table 12 is about, in words that follow the interval and nothing else."""
    gain = _, low, high = over_runs(gains)
    words = "permanence" if low > 0 else "no permanence: the last visible cell is better" if high < 0 else "cannot tell"
    words += " (one seed; others may differ by more than clips)" if len(gains) == 1 else ""
    return f"{n_frames} frames, hidden endings, pre-trained less last visible cell: {show(gain)} points: {words}"


def print_table(report, args):
    """Table 12, the paper's rows beside ours, by ending; then the verdict."""
    n_clips, over = report["clips"][1], f"{args.seeds} seeds, " if args.seeds > 1 else ""
    print(f"\nTable 12: the snitch's cell in the last frame of {n_clips} clips, {over}95 % intervals")
    line = "{:<26}{:<24}{:<24}{}".format
    print(line("the paper's top-1, %", *(f"{n_frames} frames" for n_frames in FRAMES), "").rstrip())
    for name, row in PAPER.items():
        print(line(name, *row, "the text of §4.7 has 70.9 at 32" if "Toto" in name else "").rstrip())
    for n_frames, rows in report["over runs"].items():
        for ending, n in report["endings"].items():
            print("\n" + line(f"{n_frames} frames, {ending} ({n})", "top-1, %", "top-5, %", "distance in cells"))
            for name, row in rows.items():
                top1, top5, distance = (row.get(ending, {}).get(key) for key in ("top1", "top5", "manhattan"))
                print(line(name, show(top1), show(top5), show(distance, 1, 2)))
    for n_frames, gains in report["permanence"].items():
        if gains:
            print(f"\n{verdict(n_frames, gains)}")
        ending, gain = list(report["endings"])[-1], report[GAIN][n_frames]
        if gain:
            words = f"{show(gain)} points: {probe.verdict(*gain[1:])}"
            print(f"{n_frames} frames, {ending} endings, pre-training helps, pre-trained less from scratch: {words}")


def shown_clips(val, n_clips=4):
    """The clips of the pictures: the first that end hidden, and in another cell than the last visible one."""
    if "visible" not in val.labels:
        return val.names[:n_clips]
    cell, last, visible = (np.array(val.labels[key]) for key in ("cell", f"last of {max(FRAMES)}", "visible"))
    order = np.argsort(np.where(visible, 2, cell == last), kind="stable")
    return [val.names[i] for i in order[:n_clips]]


def pictures_of(args, shown):
    """[{"frames", "true", "predicted", "last visible"}] of the shown clips {name: predicted cell}, at 32 frames."""
    items, pictures = {item.name: item for item in sum(shards_of(args, "val"), [])}, []
    for name, predicted in shown.items():
        labels, frames = items[name].read()
        cells = {"true": labels["cell"], "predicted": predicted, "last visible": labels.get(f"last of {max(FRAMES)}")}
        pictures.append({"frames": np.stack(list(frames)), "cells": cells})
    return pictures


def draw(plt, report, picture, path, args):
    """Top-1 by ending as bars; below, the last frames of a clip that ends hidden, with the cells that matter marked."""
    figure, n_columns = plt.figure(figsize=(13, 6.5)), 6
    grid = figure.add_gridspec(2, n_columns, height_ratios=(1.5, 1))
    for i, (n_frames, rows) in enumerate(report["over runs"].items()):
        axes = figure.add_subplot(grid[0, 3 * i : 3 * i + 3])
        for j, row in enumerate(rows.values()):
            for k, ending in enumerate(report["endings"]):
                if ending in row and "top1" in row[ending]:
                    value, low, high = (100 * x for x in row[ending]["top1"])
                    axes.bar(j + 0.25 * k, value, 0.23, color=f"C{k}", label=ending if j == 0 else None)
                    axes.vlines(j + 0.25 * k, low, high, color="black", linewidth=1)
        paper = PAPER["Toto-large"][i]
        axes.axhline(paper, linestyle=":", color="grey", label=f"paper, all of CATER: {paper}")
        middles = np.arange(len(rows)) + 0.125 * (len(report["endings"]) - 1)
        axes.set_xticks(middles, [name.replace(" ", "\n", 1) for name in rows], fontsize="small")
        axes.set(title=f"{n_frames} frames", ylabel="top-1, %", ylim=(0, 105))
        axes.legend(fontsize="small", frameon=False)
    for i in range(n_columns):
        axes, f = figure.add_subplot(grid[1, i]), max(FRAMES) - 1 - 3 * (n_columns - 1 - i)
        axes.imshow(picture["frames"][f])
        axes.set_title(f"frame {f + 1}", fontsize="small")
        axes.axis("off")
    colours = {"true": "white", "predicted": "red", "last visible": "black"}
    for inset, (key, cell) in enumerate(picture["cells"].items()):
        if not args.data and cell is not None and cell >= 0:  # on the last frame; CATER's camera is not known here
            x, y = cell % SIDE - 3 + 0.08 * inset, cell // SIDE - 3 + 0.08 * inset
            (u, v), side = project(args.resolution, x, y), args.resolution / SIDE * (1 - 0.16 * inset)
            axes.add_patch(plt.Rectangle((u - 0.5, v - 0.5), side, side, fill=False, edgecolor=colours[key]))
    words = [f"{key}: {cell} ({colours[key]})" for key, cell in picture["cells"].items() if cell is not None]
    figure.text(0.5, 0.01, "cells of the last frame, " + ", ".join(words), ha="center")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=100)


# The program.
def parse_arguments():
    words = "CATER's folder, with videos/ and lists/localize/ (default: a stand-in that is drawn here)"
    more = lambda add: add("--probe-epochs", type=data.number(int, at_least=1), default=20, help="of layers' probes")
    return train.parse_task(__doc__, words, "out/table12", DEFAULTS, LAPTOP, clips=1600, seeds=1, more=more)


def main():
    args, plt = parse_arguments(), data.pyplot()
    device, tokenizer = train.open_task(args, DEFAULTS, LAPTOP)
    shards = {split: shards_of(args, split) for split in ("train", "val")}
    if tokenizer is None:
        tokenizer = train.tokenizer_of_clips(args, sum(shards["train"], []), args.data or "cups", device)
    how = args.out / "tokens", tokenizer, args.resolution, 1
    sets = {split: data.tokenize_cached(f"{args.data or 'cups'}-{split}", shards[split], *how) for split in shards}

    report = {"paper": PAPER, "clips": [len(tokens) for tokens in sets.values()]}
    report["endings"] = {name: int(which.sum()) for name, which in endings(sets["val"]).items()}
    seeds, jobs = range(args.seed, args.seed + args.seeds), {}
    if not args.checkpoint:
        # Every second frame: the even ones in one pass, the odd ones, which the task has, in the next.
        source = partial(data.Source, sets["train"], min(FRAMES), step=max(FRAMES) // min(FRAMES))
        jobs = {seed: partial(train.pre_train, args, source, tokenizer, device, seed) for seed in seeds}
    # What waits for no other job comes first, or a process might start from a trunk that another still trains.
    keys = [(n_frames, seed) for n_frames in sorted(FRAMES, reverse=True) for seed in seeds]  # the longest first
    fine_tunings = lambda name: {(name, *key): partial(fine_tune, name, *key, sets, args, device) for key in keys}
    found = data.share_jobs(args.out, jobs | fine_tunings("from scratch"), device)
    report["pre-training"] = [found[seed] for seed in jobs]
    layers = {"layers": partial(sweep_layers, sets, args, device)}
    found |= data.share_jobs(args.out, fine_tunings("pre-trained") | layers, device)
    report |= {key: {} for key in ("rows", "over runs", "permanence", "less last visible cell", GAIN)}
    report |= {"layers": {"permanence": found["layers"]}}
    for n_frames in map(str, FRAMES):
        runs = {name: [found[name, int(n_frames), seed]["scores"] for seed in seeds] for name in STARTS}
        report[GAIN][n_frames] = lead(*runs.values(), list(report["endings"])[-1])
        runs |= {name: [scored] for name, scored in floors(sets, int(n_frames)).items()}
        report["rows"][n_frames] = runs
        report["over runs"][n_frames] = {name: summary(of_name) for name, of_name in runs.items()}
        gains = [found["pre-trained", int(n_frames), seed]["permanence"] for seed in seeds]
        report["permanence"][n_frames] = gains = [gain for gain in gains if gain]
        report["less last visible cell"][n_frames] = over_runs(gains) if gains else None
    if data.rank() == 0:
        data.write_json(report, args.out / "table12.json")
        print_table(report, args)
        pictures = pictures_of(args, found["pre-trained", max(FRAMES), args.seed]["shown"])
        draw(plt, report, pictures[0], args.out / "table12.png", args)
        rows = [[(f"{p['cells']['true']}, said {p['cells']['predicted']}", p["frames"]) for p in pictures]]
        data.write_gif(args.out / "table12.gif", rows, n_prompt=0)
        print(f"wrote table12.json, table12.png and table12.gif to {args.out}")


if __name__ == "__main__":
    data.run(main)
