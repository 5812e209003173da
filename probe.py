"""Probing: how good are the frozen features of each layer (§3.5, §4.8)?

    python probe.py --layer all                    the built-in world: what moves (shape) and how it moves (motion)
    python probe.py --layer mid --data FOLDER      your data: FOLDER/train/<class>/* and FOLDER/val/<class>/*
    python probe.py --layer 0,3,6 --pool average   linear probes of three layers

Reads a checkpoint of train.py and its tokenizer; the transformer stays frozen. All layers are probed in one pass, each
by heads of its own. Prints accuracy over depth (as Fig. 4 plots it) and writes probe.json to --out.
Shape letters: B clips, T visual tokens, D width, H heads, C classes.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data

# Frozen features are computed once and kept, up to this size; beyond it they are computed anew in every epoch.
KEEP_BYTES = 4 * 2**30
WORLD_TRAIN, WORLD_VAL = range(1_000_000, 1_002_400), range(2_000_000, 2_000_600)  # clips no training ever sees


class AveragePool(nn.Module):
    """Global average pooling over the tokens, then a linear classifier: the linear probe of §3.5.

    Not in the paper, as in MAE: the pooled feature passes a batch norm without parameters, since H_l is the residual
    stream before any normalisation and its scale differs from layer to layer.
    """

    def __init__(self, dim, n_heads, n_classes):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.classifier = nn.Linear(dim, n_classes)

    def forward(self, x):
        return self.classifier(self.norm(x.float().mean(dim=1)))  # (B, T, D) -> (B, D) -> (B, C)


class AttentionPool(nn.Module):
    """One learned query q cross-attends to the tokens through learned W_k and W_v (§3.5), then a linear classifier.

    softmax(q · K / √(D/H)) V with K = x W_k and V = x W_v, with as many heads as the trunk has. Not in the paper, as in
    AIM: no biases, q from N(0, 0.02), and a batch norm without parameters on the tokens.
    """

    def __init__(self, dim, n_heads, n_classes):
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.query = nn.Parameter(0.02 * torch.randn(dim))
        self.key, self.value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.classifier = nn.Linear(dim, n_classes)

    def pool(self, x):
        """(B, T, D) -> (B, D)."""
        B, T, D = x.shape
        x = self.norm(x.float().flatten(0, 1)).view(B, T, D)
        # q_h · (W_k,h x_t) = (W_k,hᵀ q_h) · x_t, and W_v can wait until after the sum over tokens: the same function
        # without ever making K and V, for H/D of the multiplications.
        q = self.query.view(self.n_heads, 1, -1)  # (H, 1, D/H)
        q = q @ self.key.weight.view(self.n_heads, -1, D)  # (H, 1, D)
        weights = (x @ q[:, 0].t() / math.sqrt(D // self.n_heads)).softmax(dim=1)  # (B, T, H)
        pooled = weights.transpose(1, 2) @ x  # (B, H, D)
        return torch.einsum("bhd,hcd->bhc", pooled, self.value.weight.view(self.n_heads, -1, D)).flatten(1)

    def forward(self, x):
        return self.classifier(self.pool(x))


class AttentionMLPPool(AttentionPool):
    """A.7: the same cross-attention, then a residual MLP before the classifier."""

    def __init__(self, dim, n_heads, n_classes):
        super().__init__(dim, n_heads, n_classes)
        # Not in the paper: four times as wide inside, GELU, and a layer norm before it.
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        pooled = self.pool(x)
        return self.classifier(pooled + self.mlp(pooled))


POOLS = {"attention": AttentionPool, "average": AveragePool, "attention-mlp": AttentionMLPPool}


def parse_layers(text, n_layers):
    """mid, all, a number or a list of numbers -> sorted layers. Layer l is H_l; 0 is the embedding (§3.2)."""
    if text == "all":
        return list(range(n_layers + 1))
    try:
        layers = sorted({n_layers // 2 if part == "mid" else int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"--layer {text}: give mid, all, a number, or numbers with commas") from None
    if layers[0] < 0 or layers[-1] > n_layers:
        raise ValueError(f"--layer {text}: this model has layers 0 (the embedding) to {n_layers}")
    return layers


class ProbeSet:
    """One split of a task: sequences of ids (N, 1 + T) and, for each task, the class numbers (N,)."""

    def __init__(self, tokens, n_frames, classes=None):
        is_video = tokens.length > 1
        if is_video.any() and not is_video.all():
            raise ValueError(f"{tokens.meta['source']}: has both images and videos; probe one kind at a time")
        # Not in the paper: one view, the middle n_frames of a clip.
        frames = n_frames if is_video.all() else 1
        middle = np.maximum(tokens.length - frames, 0) // 2
        ids = [data.to_sequence(tokens.codes(i, middle[i], frames), is_video.all())[:-1] for i in range(len(tokens))]
        self.ids = torch.as_tensor(np.stack(ids))
        self.classes = classes or {task: sorted(set(names)) for task, names in tokens.labels.items()}
        for task, names in self.classes.items():
            unknown = set(tokens.labels.get(task, [])) - set(names)
            if unknown:
                raise ValueError(
                    f"{tokens.meta['source']}: has a {task} that train has not: {', '.join(sorted(unknown))}"
                )
        self.labels = {
            task: torch.tensor([names.index(label) for label in tokens.labels[task]])
            for task, names in self.classes.items()
        }

    def __len__(self):
        return len(self.ids)


def load_sets(args, checkpoint, tokenizer):
    """The training and validation ProbeSet of --data, or of the built-in world."""
    sets = []
    for split, world in (("train", WORLD_TRAIN), ("val", WORLD_VAL)):
        if args.data is None:
            source, shards = f"world-{split}", data.world_shards(world, checkpoint["resolution"], checkpoint["frames"])
        else:
            source = Path(args.data) / split
            if not source.is_dir():
                raise ValueError(f"{source}: no such folder; --data needs train/<class>/* and val/<class>/*")
            shards = data.media_shards(source, checkpoint["resolution"], checkpoint["stride"])
        folder = data.tokenize_cached(
            source, shards, args.out / "tokens", tokenizer, checkpoint["resolution"], checkpoint["stride"]
        )
        tokens = data.Tokens(folder)
        if not tokens.labels or None in tokens.labels.get("class", []):
            raise ValueError(f"{source}: files must lie in one sub-folder per class")
        sets.append(ProbeSet(tokens, checkpoint["frames"], sets[0].classes if sets else None))
    return sets


class Features:
    """H_l for the asked layers of every sequence of a ProbeSet, computed once if they fit in KEEP_BYTES."""

    def __init__(self, model, ids, layers, device):
        self.model, self.ids, self.layers, self.device = model, ids, layers, device
        n_bytes = ids.numel() * model.config.dim * len(layers) * model.compute_dtype.itemsize
        self.kept = None
        if n_bytes <= KEEP_BYTES:
            batches = tqdm(ids.split(32), desc="features", unit="batch", dynamic_ncols=True)
            parts = [self.compute(batch) for batch in batches]
            self.kept = {l: torch.cat([part[l] for part in parts]) for l in layers}

    @torch.no_grad()
    def compute(self, ids):
        features = self.model.features(ids.to(self.device), self.layers)
        return {l: x[:, 1:] for l, x in features.items()}  # the start token is no visual token

    def __getitem__(self, rows):
        if self.kept is None:
            return self.compute(self.ids[rows])
        return {l: x[rows] for l, x in self.kept.items()}


def make_heads(config, layers, pools, classes, seed, device):
    """{(task, pool, layer): head}. Each starts from the seed alone: what is probed beside it does not matter."""
    heads = {}
    for task, names in classes.items():
        for pool in pools:
            for l in layers:
                torch.manual_seed(seed)
                heads[task, pool, l] = POOLS[pool](config.dim, config.n_heads, len(names)).to(device)
    return heads


def train_heads(heads, features, split, args, device):
    """Every head gets its own cross-entropy; their sum has just their gradients, since no parameter is shared."""
    optimizer = torch.optim.AdamW(
        [p for head in heads.values() for p in head.parameters()], lr=args.lr, weight_decay=0.05
    )
    batches_per_epoch = max(len(split) // args.batch, 1)
    n_steps = args.epochs * batches_per_epoch
    generator = torch.Generator().manual_seed(args.seed)
    progress = tqdm(range(n_steps), desc="probing", unit="step", dynamic_ncols=True)
    for step in progress:
        if step % batches_per_epoch == 0:
            order = torch.randperm(len(split), generator=generator)
        rows = order[(step % batches_per_epoch) * args.batch :][: args.batch]
        optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * step / n_steps)) / 2
        x = features[rows]
        losses = {
            key: F.cross_entropy(head(x[key[2]]), split.labels[key[0]][rows].to(device)) for key, head in heads.items()
        }
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            progress.set_postfix_str(f"best loss {min(losses.values()).item():.3f}")


@torch.no_grad()
def accuracy(heads, features, split, batch, device):
    """Top-1 accuracy of every head, 0 to 1."""
    correct = dict.fromkeys(heads, 0)
    for head in heads.values():
        head.eval()
    for rows in torch.arange(len(split)).split(batch):
        x = features[rows]
        for key, head in heads.items():
            correct[key] += (head(x[key[2]]).argmax(dim=1).cpu() == split.labels[key[0]][rows]).sum().item()
    return {key: n / len(split) for key, n in correct.items()}


def print_table(results, layers, pools, classes, n_layers):
    """§4.8: accuracy over depth, one row a layer and one text bar a head: Fig. 4 and Fig. 8 on their side."""
    for task, names in classes.items():
        print(f"\n{task}: {len(names)} classes, chance {1 / len(names):.1%}")
        print("layer  " + "".join(f"{pool:<32}" for pool in pools))
        for l in layers:
            cells = [
                f"{results[task, pool, l]:6.1%} " + f"{'█' * round(24 * results[task, pool, l]):<25}" for pool in pools
            ]
            print(f"{l:>5}  " + "".join(cells))
        for pool in pools if len(layers) > 1 else ():
            best = max(layers, key=lambda l: results[task, pool, l])
            print(f"best with {pool}: layer {best} of {n_layers}, {results[task, pool, best]:.1%}")


def main():
    parser = argparse.ArgumentParser(
        description="Probe the layers of a frozen model.", formatter_class=data.HelpFormatter
    )
    add = parser.add_argument
    add("--layer", default="mid", help="mid (L // 2), a number, numbers with commas, or all; 0 is the embedding")
    add(
        "--pool", nargs="+", default=["attention", "average"], choices=POOLS, help="how tokens become one vector (§3.5)"
    )
    add("--data", help="folder with train/<class>/* and val/<class>/* (default: the built-in world)")
    add("--checkpoint", default="out/toto.pt", type=Path, help="a model trained by train.py")
    add("--tokenizer", type=Path, help="the model's tokenizer (default: dvae.pt beside the checkpoint)")
    add("--out", default="out", type=Path, help="folder for probe.json and cached tokens")
    add("--epochs", type=data.positive, default=10, help="passes over the training set")
    add("--batch", type=data.positive, default=32, help="clips in a step")
    add("--lr", type=data.rate, default=2e-3, help="peak learning rate of the heads")
    add("--seed", type=int, default=0, help="of everything random")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    device = data.pick_device(args.device)
    model, tokenizer, checkpoint = data.load_model(args.checkpoint, args.tokenizer, device)
    layers = parse_layers(args.layer, model.config.n_layers)
    train, val = load_sets(args, checkpoint, tokenizer)
    if len(train) < 2:
        raise ValueError("probing needs at least 2 training clips")
    heads = make_heads(model.config, layers, args.pool, train.classes, args.seed, device)
    print(f"{len(train)} training and {len(val)} validation clips of {train.ids.shape[1] - 1} tokens; layers {layers}")
    train_heads(heads, Features(model, train.ids, layers, device), train, args, device)
    results = accuracy(heads, Features(model, val.ids, layers, device), val, args.batch, device)
    print_table(results, layers, args.pool, train.classes, model.config.n_layers)
    report = {
        "settings": {key: str(value) for key, value in vars(args).items()},
        "checkpoint_step": checkpoint["step"],
        "clips": [len(train), len(val)],
        "classes": train.classes,
        "accuracy": [{"task": t, "pool": p, "layer": l, "top1": top1} for (t, p, l), top1 in results.items()],
    }
    data.write_json(report, args.out / "probe.json")


if __name__ == "__main__":
    data.run(main)
