"""Probing and fine-tuning: how good are the features of each layer (§3.5, §4.2, §4.3, §4.8, A.2 to A.4, A.7)?

    python probe.py --layer all                    the built-in world: what moves (shape) and how it moves (motion)
    python probe.py --layer mid --data FOLDER      your data: FOLDER/train/<class>/* and FOLDER/val/<class>/*
    python probe.py --layer 0,3,6 --pool average   linear probes of three layers
    python probe.py --finetune joint               §4.2: probes beside a trunk that goes on with next-token prediction
    python probe.py --finetune full                A.2, A.3: the classes reach the trunk

Reads checkpoints of train.py and their tokenizer. All layers are probed in one pass, each by heads of its own. Prints
accuracy over depth (as Fig. 4 plots it), and writes probe.json and, to go on after a stop, probe.pt to --out.
Shape letters: B clips, T visual tokens, D width, H heads, C classes.
"""

import argparse
import math
import re
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import data
import dvae
import toto

# §4.2: 90 epochs at a peak rate of 6e-5. Not in the paper: what suits `tiny` and minutes.
PAPER, LAPTOP = {"epochs": 90, "lr": 6e-5}, {"epochs": 10, "lr": 2e-3}
LAYER_DECAY = 0.9  # §4.2
# Frozen features are computed once and kept, up to this size; beyond it they are computed anew in every epoch.
KEEP_BYTES = 4 * 2**30
WORLD_TRAIN, WORLD_VAL = range(1_000_000, 1_002_400), range(2_000_000, 2_000_600)  # clips no training ever sees


def mean_over_processes(x):
    """The mean of x over all processes. What others' losses would add to its gradient is left out."""
    share = x / dist.get_world_size()
    total = share.detach().clone()
    dist.all_reduce(total)
    return share + (total - share.detach())


class FeatureNorm(nn.Module):
    """Batch norm without parameters, as the two vectors (mean, 1/std) that it would apply to features (…, D).

    Not in the paper, as in MAE and AIM: H_l is the residual stream before any normalisation, and its scale differs from
    layer to layer. Under torchrun the statistics are those of all processes' clips, so their number changes nothing.
    """

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))

    def forward(self, x):
        mean, var = self.mean, self.var
        if self.training:
            var, mean = torch.var_mean(x.flatten(0, -2), dim=0, correction=0)
            if dist.is_initialized():
                total = mean_over_processes(mean)
                mean, var = total, mean_over_processes(var + (mean - total) ** 2)
            self.mean.lerp_(mean.detach(), 0.1)
            self.var.lerp_(var.detach(), 0.1)
        return mean, (var + 1e-5).rsqrt()


class AveragePool(nn.Module):
    """Global average pooling over the tokens, then a linear classifier: the linear probe of §3.5."""

    def __init__(self, dim, n_heads, n_classes):
        super().__init__()
        self.norm = FeatureNorm(dim)
        self.classifier = nn.Linear(dim, n_classes)

    def forward(self, x):
        x = x.float().mean(dim=1)  # (B, T, D) -> (B, D)
        mean, scale = self.norm(x)
        return self.classifier((x - mean) * scale)  # (B, C)


class AttentionPool(nn.Module):
    """One learned query q cross-attends to the tokens through learned W_k and W_v (§3.5), then a linear classifier.

    softmax(q · K / √(D/H)) V with K = x W_k and V = x W_v, with as many heads as the trunk has. Not in the paper, as in
    AIM: no biases, q from N(0, 0.02), and a batch norm without parameters on the tokens.
    """

    def __init__(self, dim, n_heads, n_classes):
        super().__init__()
        self.n_heads = n_heads
        self.norm = FeatureNorm(dim)
        self.query = nn.Parameter(0.02 * torch.randn(dim))
        self.key, self.value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.classifier = nn.Linear(dim, n_classes)

    def pool(self, x):
        """(B, T, D) -> (B, D)."""
        B, T, D = x.shape
        x = x.float()
        mean, scale = self.norm(x)
        # q_h · (W_k,h x_t) = (W_k,hᵀ q_h) · x_t, and W_v can wait until after the sum over tokens: the same function
        # without ever making K and V, for H/D of the multiplications. The norm can wait likewise: its scale goes to the
        # query, and its mean adds the same to every token's score, which the softmax ignores.
        q = self.query.view(self.n_heads, 1, -1) @ self.key.weight.view(self.n_heads, -1, D)  # (H, 1, D)
        weights = (x @ (q[:, 0] * scale).t() / math.sqrt(D // self.n_heads)).softmax(dim=1)  # (B, T, H)
        pooled = (weights.transpose(1, 2) @ x - mean) * scale  # (B, H, D)
        return torch.einsum("bhd,hcd->bhc", pooled, self.value.weight.view(self.n_heads, -1, D)).flatten(1)

    def forward(self, x):
        return self.classifier(self.pool(x))


class AttentionMLPPool(AttentionPool):
    """A.7, Table 16: the same cross-attention, then a residual MLP before the classifier."""

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
    """One split of a task: ids int16 (N, views, 1 + T) of N clips and, for each task, their class numbers (N,).

    §4.3 and Table 8, the views of SlowFast: n_views windows of n_frames, the i-th starting at
    (length - n_frames) · i / n_views, of each of n_crops crops, which the token folder stores as clips that follow one
    another. Not in the paper: one view is the middle one. Windows start at frames that the stride keeps.
    """

    def __init__(self, tokens, n_frames, n_views=1, n_crops=1, classes=None, shots=None, seed=0):
        is_video = tokens.length > 1
        if is_video.any() and not is_video.all():
            raise ValueError(f"{tokens.meta['source']}: has both images and videos; probe one kind at a time")
        if not tokens.labels or None in tokens.labels.get("class", []):
            raise ValueError(f"{tokens.meta['source']}: files must lie in one sub-folder per class")
        if (n_views, n_crops) != (1, 1) and not is_video.all():
            raise ValueError(f"{tokens.meta['source']}: --views are for videos; here are images")
        frames = n_frames if is_video.all() else 1
        labels = {task: names[::n_crops] for task, names in tokens.labels.items()}
        self.classes = classes or {task: sorted(set(names)) for task, names in labels.items()}
        for task, names in self.classes.items():
            here = set(labels.get(task, []))
            for what, difference in (("that train has not", here - set(names)), ("missing", set(names) - here)):
                if difference:
                    raise ValueError(f"{tokens.meta['source']}: has a {task} {what}: {', '.join(sorted(difference))}")
        self.labels = {t: torch.tensor([names.index(l) for l in labels[t]]) for t, names in self.classes.items()}
        clips = np.arange(len(tokens) // n_crops)
        if shots:
            clips = self.few(shots, seed)
            self.labels = {task: classes[clips] for task, classes in self.labels.items()}
        spare = np.maximum(tokens.length - frames, 0)
        starts = [spare // 2] if n_views == 1 else [spare * i // n_views for i in range(n_views)]

        self.names = [tokens.names[clip * n_crops] for clip in clips]

        def sequences(clip):
            crops = range(clip * n_crops, (clip + 1) * n_crops)
            views = [tokens.codes(i, start[i], frames) for i in crops for start in starts]
            return [data.to_sequence(codes, is_video.all())[:-1].astype(np.int16) for codes in views]

        self.ids = torch.from_numpy(np.array([sequences(clip) for clip in clips]))

    def few(self, shots, seed):
        """Numbers of `shots` clips of every class, or of every combination of classes where there are several tasks."""
        order = np.random.default_rng(seed).permutation(len(next(iter(self.labels.values()))))
        taken, picked = Counter(), []
        for clip in order:
            group = tuple(classes[clip].item() for classes in self.labels.values())
            taken[group] += 1
            if taken[group] <= shots:
                picked.append(clip)
        return np.sort(picked)

    def __len__(self):
        return len(self.ids)


def load_sets(args, checkpoint, tokenizer):
    """The training and validation ProbeSet of --data, or of the built-in world."""
    sets, resolution = [], args.resolution or checkpoint["resolution"]
    n_views, n_crops = args.views
    for split, world in (("train", WORLD_TRAIN), ("val", WORLD_VAL)):
        crops = n_crops if split == "val" else 1
        if args.data is None:
            source, shards = f"world-{split}", data.world_shards(world, resolution, checkpoint["frames"])
        else:
            source = Path(args.data) / split
            if not Path(args.data).is_dir():
                raise ValueError(f"{args.data}: no such folder")
            if not source.is_dir():
                raise ValueError(f"{source}: no such folder; --data needs train/<class>/* and val/<class>/*")
            shards = data.media_shards(source, resolution, checkpoint["stride"])
        folder = data.tokenize_cached(
            source, shards, args.out / "tokens", tokenizer, resolution, checkpoint["stride"],
            args.rank, args.world_size, data.THREE if crops == 3 else 1,
        )  # fmt: skip
        if args.world_size > 1:
            dist.barrier()
        tokens = data.Tokens(folder)
        if split == "train":
            sets.append(ProbeSet(tokens, checkpoint["frames"], shots=args.shots, seed=args.seed))
        else:
            sets.append(ProbeSet(tokens, checkpoint["frames"], n_views, crops, sets[0].classes))
        sets[-1].name = split
    if len(sets[0]) < 2:
        raise ValueError("probing needs at least 2 training clips")
    return sets


class Features:
    """H_l for the asked layers, {l: (B, T, D)}, of any sequences (N, 1 + T); kept if they fit in KEEP_BYTES."""

    def __init__(self, model, ids, layers, args, device):
        self.model, self.ids, self.layers, self.args, self.device = model, ids, layers, args, device
        self.kept = None
        n_bytes = ids.numel() * model.config.dim * len(layers) * model.compute_dtype.itemsize
        if n_bytes <= KEEP_BYTES and len(ids) >= args.world_size:
            shape = len(ids), ids.shape[1] - 1, model.config.dim
            self.kept = {l: torch.empty(shape, dtype=model.compute_dtype, device=device) for l in layers}
            shares = torch.arange(len(ids)).tensor_split(args.world_size)  # each process computes one
            batches = shares[args.rank].split(args.batch)
            for rows in tqdm(batches, desc="features", unit="batch", dynamic_ncols=True, disable=args.rank > 0):
                for l, x in self.compute(ids[rows]).items():
                    self.kept[l][rows[0] : rows[-1] + 1] = x
            for rank, rows in enumerate(shares if args.world_size > 1 else ()):
                for x in self.kept.values():
                    dist.broadcast(x[rows[0] : rows[-1] + 1], src=rank)

    @torch.no_grad()
    def compute(self, ids):
        features = self.model.features(ids.to(self.device).long(), self.layers, self.args.attention == "causal")
        return {l: x[:, 1:] for l, x in features.items()}  # the start token is no visual token

    def __getitem__(self, rows):
        if self.kept is None:
            return self.compute(self.ids[rows])
        return {l: x[rows] for l, x in self.kept.items()}


class Pixels:
    """What `Features` is for a model, for the pixels themselves: {0: (B, 1, pixels)}, to see what tokens are worth."""

    def __init__(self, split, folder, resolution):
        paths = [folder / name for name in split.names]
        frames = [data.crop(next(iter(data.read_frames(path, resolution))), resolution) for path in paths]
        self.x = torch.from_numpy(np.stack(frames)).flatten(1)[:, None]

    def __getitem__(self, rows):
        return {0: self.x[rows].float() / 255}


def make_heads(dim, n_heads, layers, pools, classes, seed, device):
    """{(task, pool, layer): head}. Each starts from the seed alone: what is probed beside it does not matter."""
    heads = {}
    for task, names in classes.items():
        for pool in pools:
            for l in layers:
                torch.manual_seed(seed)
                heads[task, pool, l] = POOLS[pool](dim, n_heads, len(names)).to(device)
    return heads


def layer_scales(model):
    """{name of a weight: what its rate is multiplied by}, §4.2's layer decay as MAE counts it: 0.9^(L + 1 - i).

    i is 0 for the embedding, l + 1 for block l, and L + 1, so 1, for the last norm and the heads.
    """
    n_layers, scales = model.config.n_layers, {}
    for name, _ in model.named_parameters():
        block = re.match(r"blocks\.(\d+)\.", name)
        i = 0 if name.startswith("embedding") else int(block[1]) + 1 if block else n_layers + 1
        scales[name] = LAYER_DECAY ** (n_layers + 1 - i)
    return scales


def fine_tuned_features(model, ids, layers, mode, causal):
    """The features of a trunk that learns -> ({l: (B, T, D)}, its own loss).

    joint (§4.2, Table 7): the loss is Eq. 2, and the classes' gradient stops at the features. full (A.2, A.3,
    Table 13): the classes' loss alone.
    """
    features, x = {}, None
    for l, x in enumerate(model.residual_stream(ids, causal)):
        if l in layers:
            features[l] = x[:, 1:].detach() if mode == "joint" else x[:, 1:]
        if mode == "full" and l == max(layers):
            return features, 0.0
    return features, model.loss(x, torch.cat((ids[:, 1:], ids.new_full((len(ids), 1), toto.END)), dim=1))


def checksum(tensors):
    """A number that changes with what is in the tensors."""
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.contiguous().numpy(), total)
    return total


def train_heads(heads, features, split, args, device, model=None):
    """Every head gets its own cross-entropy; their sum has just their gradients, since no parameter is shared.

    With --finetune, `model` learns too, and `features` is not used. Goes on from probe.pt if that has the same plan.
    """
    groups = [{"params": [p for head in heads.values() for p in head.parameters()], "scale": 1.0}]
    modules = {"|".join(map(str, key)): head for key, head in heads.items()}
    if args.finetune:
        scales = layer_scales(model)
        for scale in sorted(set(scales.values())):
            group = [p for name, p in model.named_parameters() if scales[name] == scale]
            groups.append({"params": group, "scale": scale})
        modules["trunk"] = model.requires_grad_(True)
    # Not in the paper: AdamW with weight decay 0.05, and a cosine to zero without a warm-up.
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.05)
    parameters = [p for group in groups for p in group["params"]]
    batches_per_epoch = max(len(split) // args.batch, 1)
    n_steps = args.epochs * batches_per_epoch
    contents = [split.ids, *split.labels.values(), *([p.detach().cpu() for p in model.parameters()] if model else [])]
    plan = args.plan | {"steps": n_steps, "contents": checksum(contents)}
    if min(args.batch, len(split)) % args.world_size:
        raise ValueError(f"--batch {args.batch}: {args.world_size} processes cannot share it evenly")
    path, first_step = args.out / args.state, 0
    if path.exists():
        stored = torch.load(path, map_location="cpu", weights_only=True)
        if stored["plan"] == plan:
            for name, module in modules.items():
                module.load_state_dict(stored["modules"][name])
            optimizer.load_state_dict(stored["optimizer"])
            first_step = stored["step"]
        del stored

    def save(step):
        if args.rank == 0:
            states = {name: module.state_dict() for name, module in modules.items()}
            with dvae.atomic_open(path) as file:
                torch.save({"plan": plan, "modules": states, "optimizer": optimizer.state_dict(), "step": step}, file)

    signals, saved, right = dvae.listen_for_stop(), time.time(), {}
    progress = tqdm(
        range(first_step, n_steps), initial=first_step, total=n_steps, desc="probing", unit="step", dynamic_ncols=True,
        disable=args.rank > 0,
    )  # fmt: skip
    for step in progress:
        epoch, batch = divmod(step, batches_per_epoch)
        if batch == 0 or step == first_step:
            order = torch.randperm(len(split), generator=torch.Generator().manual_seed(args.seed + epoch))
        rows = order[batch * args.batch :][: args.batch][args.rank :: args.world_size]
        for group in optimizer.param_groups:
            group["lr"] = args.lr * group["scale"] * (1 + math.cos(math.pi * step / n_steps)) / 2
        if args.finetune:
            ids = split.ids[rows, 0].to(device).long()
            layers = {l for _, _, l in heads}
            x, loss = fine_tuned_features(model, ids, layers, args.finetune, args.attention == "causal")
        else:
            x, loss = features[rows], 0.0
        for (task, pool, l), head in heads.items():
            logits, labels = head(x[l].to(device)), split.labels[task][rows].to(device)
            loss = loss + F.cross_entropy(logits, labels)
            if step % 10 == 0:
                hits = (logits.argmax(dim=1) == labels).float().mean().item()
                right[task, pool, l] = 0.9 * right.get((task, pool, l), hits) + 0.1 * hits
        loss.backward()
        if args.world_size > 1:  # one exchange of all gradients in a row
            gradients = [p.grad for p in parameters if p.grad is not None]
            row = parameters_to_vector(gradients)
            dist.all_reduce(row)
            vector_to_parameters(row / args.world_size, gradients)
        optimizer.step()
        optimizer.zero_grad()
        if right:
            best = max(right, key=right.get)
            progress.set_postfix_str(f"training accuracy {right[best]:.0%} ({best[0]}, {best[1]}, layer {best[2]})")
        stop = dvae.agree(len(signals), device, args.world_size)
        if stop or step + 1 == n_steps or time.time() - saved > 60:
            save(step + 1)
            saved = time.time()
        if stop:
            progress.close()
            if args.world_size > 1:
                dist.barrier()  # where one process ends, torchrun ends the others, which may still write
            if args.rank == 0:
                print(f"stopped and saved at step {step + 1:,}; the same command goes on from there")
            raise KeyboardInterrupt
    dvae.stop_listening()
    if args.finetune:
        model.requires_grad_(False)


@torch.no_grad()
def evaluate(heads, features, split, args, device):
    """For every head: top1 and top5 (0 to 1), top1's 95 % interval, and the classes it gave (N,).

    The class probabilities of a clip's views are averaged (§4.3, Table 8).
    """
    n_views = split.ids.shape[1]
    predicted = {key: torch.zeros(len(split), dtype=torch.long, device=device) for key in heads}
    in_top5 = {key: torch.zeros(len(split), device=device) for key in heads}
    for head in heads.values():
        head.eval()
    mine = torch.arange(args.rank, len(split), args.world_size)
    for rows in mine.split(max(args.batch // n_views, 1)):
        views = (rows[:, None] * n_views + torch.arange(n_views)).flatten()
        x = features[views]
        for (task, pool, l), head in heads.items():
            p = head(x[l].to(device)).softmax(dim=1).unflatten(0, (len(rows), n_views)).mean(dim=1)  # (clips, C)
            key, labels, rows_ = (task, pool, l), split.labels[task][rows].to(device), rows.to(device)
            predicted[key][rows_] = p.argmax(dim=1)
            top5 = p.topk(min(5, p.shape[1])).indices
            in_top5[key][rows_] = (top5 == labels[:, None]).any(dim=1).float()
    results = {}
    for key in heads:
        if args.world_size > 1:
            dist.all_reduce(predicted[key])
            dist.all_reduce(in_top5[key])
        classes, n = predicted[key].cpu(), len(split)
        top1 = (classes == split.labels[key[0]]).float().mean().item()
        results[key] = {
            "top1": top1,
            "top5": in_top5[key].mean().item(),
            "interval": wilson(top1, n),
            "classes": classes,
        }
    return results


def wilson(share, n, z=1.96):
    """The 95 % confidence interval of a share that was seen in n trials (Wilson, 1927)."""
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def best_layer(results, task, pool):
    return max((l for t, p, l in results if (t, p) == (task, pool)), key=lambda l: results[task, pool, l]["top1"])


def print_table(results, classes, n_layers):
    """§4.8: accuracy over depth, one row a layer and one text bar a head: Fig. 4, Fig. 8 and Fig. 14 on their side."""
    layers, pools = (list(dict.fromkeys(key[i] for key in results)) for i in (2, 1))
    for task, names in classes.items():
        print(f"\n{task}: {len(names)} classes, chance {1 / len(names):.1%}; top-1 and its 95 % interval")
        print("layer  " + "".join(f"{pool:<38}" for pool in pools))
        for l in layers:
            row = ""
            for pool in pools:
                r = results[task, pool, l]
                low, high = r["interval"]
                row += f"{r['top1']:6.1%} {f'({low:.0%} to {high:.0%})':<15}{'█' * round(14 * r['top1']):<14}  "
            print(f"{l:>5}  {row}")
        for pool in pools if len(layers) > 1 else ():
            best = best_layer(results, task, pool)
            r = results[task, pool, best]
            top5 = f", top-5 {r['top5']:.1%}" if len(names) > 5 else ""
            print(f"best with {pool}: layer {best} of {n_layers}, {r['top1']:.1%}{top5}")


def print_beside_the_paper(results, classes, n_layers, args):
    """The paper's rows that these results have something to say to, theirs (ImageNet, Kinetics) beside ours."""
    pools = {pool for _, pool, _ in results}
    rows = []
    for task in classes:
        best = {pool: best_layer(results, task, pool) for pool in pools}
        top1 = {pool: f"{results[task, pool, l]['top1']:.1%}" for pool, l in best.items()}
        add = lambda what, theirs, *ours: rows.append((what, theirs, f"{', '.join(ours)} ({task})"))
        if {"average", "attention"} <= pools and not args.finetune:
            add("Table 5, ImageNet, large: average, attention", "53.2, 61.1", top1["average"], top1["attention"])
        if {"attention", "attention-mlp"} <= pools:
            add("Tables 8, 16, K400, base: attention, + MLP", "59.3, 61.2", top1["attention"], top1["attention-mlp"])
        if len({l for _, _, l in results}) > 2 and "attention" in pools:
            add("Fig. 4, ImageNet: best layer of all", "about 50 %", f"{best['attention']} of {n_layers}")
        if args.finetune == "full":
            theirs = {"causal": "82.2", "full": "82.6"}[args.attention]
            add(f"A.2, ImageNet, base: {args.attention} attention", theirs, *top1.values())
    if rows:
        print(f"\n{'for orientation, since the data differ':<46}{'the paper':<14}here")
        for what, theirs, ours in rows:
            print(f"{what:<46}{theirs:<14}{ours}")


def print_confusion(results, split, n_worst=5):
    """The classes that the best head of each task gets wrong most, and what it takes them for."""
    for task, names in split.classes.items():
        keys = [key for key in results if key[0] == task]
        key = max(keys, key=lambda key: results[key]["top1"])
        given, true = results[key]["classes"], split.labels[task]
        print(f"\n{task}, worst classes of {key[1]} at layer {key[2]}:")
        recall = {c: (given[true == c] == c).float().mean().item() for c in range(len(names))}
        for c in sorted(recall, key=recall.get)[:n_worst]:
            wrong = Counter(given[(true == c) & (given != c)].tolist()).most_common(2)
            print(f"  {names[c]}: {recall[c]:.0%} right" + "".join(f", {n} taken for {names[k]}" for k, n in wrong))


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Probe the layers of a frozen model, or fine-tune it.", formatter_class=data.HelpFormatter
    )
    add = parser.add_argument
    add("--layer", default="mid", help="mid (L // 2), a number, numbers with commas, or all; 0 is the embedding")
    add(
        "--pool", nargs="+", default=["attention", "average"], choices=POOLS, help="how tokens become one vector (§3.5)"
    )
    add("--data", help="folder with train/<class>/* and val/<class>/* (default: the built-in world)")
    add("--checkpoint", nargs="+", default=["out/toto.pt"], type=Path, help="models trained by train.py")
    add("--tokenizer", type=Path, help="the models' tokenizer (default: dvae.pt beside the checkpoint)")
    add("--out", default="out", type=Path, help="folder for probe.json, probe.pt and cached tokens")
    add("--finetune", choices=["joint", "full"], help="train the model too (default: it stays frozen)")
    add("--attention", default="causal", choices=["causal", "full"], help="full: every token sees every other (A.2)")
    add(
        "--views",
        type=views,
        default="1x1",
        metavar="VxS",
        help="clips and crops (1 or 3) of each video: 10x3 in §4.3",
    )
    add("--shots", type=data.positive, help="train on so many clips of each class only")
    add("--baselines", action="store_true", help="probe an untrained model too, and with images their raw pixels")
    add("--confusion", action="store_true", help="list the classes that are confused most")
    add("--resolution", type=data.resolution, help="side of the frames in pixels (default: that of the training)")
    add(
        "--rope-base",
        type=data.rate,
        help="RoPE's base (default: that of the checkpoint; 50,000 at 32 x 32 tokens, §4.2)",
    )
    add("--epochs", type=data.positive, help=f"passes over the training set (default: {about('epochs')})")
    add("--batch", type=data.positive, default=32, help="clips in a step, over all processes")
    add("--lr", type=data.rate, help=f"peak learning rate (default: {about('lr')})")
    add("--seed", type=data.natural, default=0, help="of everything random")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    args = parser.parse_args()
    if args.attention == "full" and args.finetune != "full":
        raise ValueError("--attention full needs --finetune full: the model has learned to predict from the past only")
    if args.baselines and args.finetune:
        raise ValueError("--baselines are frozen: leave out --finetune")
    if args.views != (1, 1) and args.data is None:
        raise ValueError("--views: a clip of the built-in world is one view; give videos with --data")
    return args


def views(text):
    """For argparse: VxS -> (V, S)."""
    found = re.fullmatch(r"([1-9]\d*)x([13])", text)
    if not found:
        raise argparse.ArgumentTypeError("give clips x crops, with 1 or 3 crops, as 10x3")
    return int(found[1]), int(found[2])


def about(name):
    return f"{PAPER[name]:g}, or {LAPTOP[name]:g} for tiny"


def probe_run(name, model, layers, pools, dim, sets, args, device, checkpoint):
    """Train and evaluate the heads of one model, or of raw pixels -> results by (task, pool, layer)."""
    train, val = sets
    settings = {
        key: str(value) for key, value in vars(args).items() if key not in ("rank", "world_size", "plan", "state")
    }
    args.plan = settings | {"model": name, "checkpoint_step": checkpoint["step"], "tokenizer": checkpoint["tokenizer"]}
    heads = make_heads(dim, checkpoint["config"].n_heads, layers, pools, train.classes, args.seed, device)
    if name == "raw pixels":
        resolution = args.resolution or checkpoint["resolution"]
        of_train, of_val = (Pixels(part, Path(args.data) / part.name, resolution) for part in sets)
        train_heads(heads, of_train, train, args, device)
    else:
        of_train = None if args.finetune else Features(model, train.ids[:, 0], layers, args, device)
        train_heads(heads, of_train, train, args, device, model)
        del of_train
        of_val = Features(model, val.ids.flatten(0, 1), layers, args, device)
    return evaluate(heads, of_val, val, args, device)


def main():
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    device = data.pick_device(args.device)
    args.rank, args.world_size = dvae.start_processes(device)
    report, asked = {"runs": {}, "accuracy": []}, {name: getattr(args, name) for name in PAPER}
    for path in args.checkpoint:
        model, tokenizer, checkpoint = data.load_model(path, args.tokenizer, device, args.rope_base)
        config, resolution = model.config, args.resolution or checkpoint["resolution"]
        tiny = (config.dim, config.n_layers) == (toto.SIZES["tiny"].dim, toto.SIZES["tiny"].n_layers)
        for name, default in (LAPTOP if tiny else PAPER).items():
            setattr(args, name, asked[name] or default)
        layers = parse_layers(args.layer, config.n_layers)
        if args.finetune == "full" and (len(layers) > 1 or len(args.pool) > 1):
            raise ValueError("--finetune full: the trunk learns for one head; give one --layer and one --pool")
        sets = train, val = load_sets(args, checkpoint, tokenizer)
        report |= {"clips": [len(train), len(val)], "classes": train.classes}
        if args.rank == 0:
            n_tokens = train.ids.shape[2] - 1
            print(f"{len(train)} training and {len(val)} validation clips of {n_tokens} tokens; layers {layers}")
        runs = {str(path): (model, layers, args.pool, config.dim)}
        if args.baselines:
            torch.manual_seed(args.seed)
            untrained = toto.Toto(config, model.compute_dtype).to(device).eval().requires_grad_(False)
            runs["an untrained model"] = (untrained, layers, args.pool, config.dim)
            if args.data and train.ids[0, 0, 0] == toto.IMAGE_START:
                runs["raw pixels"] = (None, [0], ["average"], 3 * resolution**2)
        for name, run in runs.items():
            number = len(report["runs"]) + 1
            args.state = "probe.pt" if number == 1 else f"probe-{number}.pt"  # of each run its own
            results = probe_run(name, *run, sets, args, device, checkpoint)
            report["runs"][name] = args.plan
            report["accuracy"] += [
                {"model": name, "task": t, "pool": p, "layer": l}
                | {key: r[key] for key in ("top1", "top5", "interval")}
                for (t, p, l), r in results.items()
            ]
            if args.rank == 0:
                data.write_json(report, args.out / "probe.json")
                words = [name, f"{args.finetune} fine-tuning" if args.finetune else "frozen"]
                print("\n" + ", ".join([*words, f"{val.ids.shape[1]} view(s)"]))
                print_table(results, train.classes, config.n_layers)
                if name == str(path):
                    print_beside_the_paper(results, train.classes, config.n_layers, args)
                if args.confusion:
                    print_confusion(results, val)
    if args.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run(main)
