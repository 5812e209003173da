"""Probing and fine-tuning: how good are the features of each layer (§3.5, §4.2 to §4.4, §4.8, A.2 to A.4, A.7)?

    python probe.py --layer all                    the built-in world: what moves (shape) and how it moves (motion)
    python probe.py --layer mid --data FOLDER      your data: FOLDER/train/<class>/* and FOLDER/val/<class>/*, or token
                                                   folders of the two (data.py), FOLDER/train and FOLDER/val
    python probe.py --layer 0,3,6 --pool average   linear probes of three layers
    python probe.py --finetune joint               §4.2: probes beside a trunk that keeps learning next-token prediction
    python probe.py --finetune full                A.2, A.3: the classes reach the trunk
    python probe.py --finetune both                §4.4: next-token prediction and the classes reach it together

Reads checkpoints of train.py and their tokenizer. All layers are probed in one pass, each by heads of its own. Prints
accuracy over depth (as Fig. 4 plots it), and writes to --out: probe.json, probe.pt to resume after a stop, and of a
fine-tuned trunk finetuned.pt, a checkpoint like those that it reads.

From top to bottom: the heads, the clips, the features, training, evaluation, the program.
Shape letters: B clips, T visual tokens, D width, H heads, C classes.
"""

import argparse
import math
import re
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
IMAGE_INDICES = {"train": range(1_000_000, 1_002_000), "val": range(2_000_000, 2_001_000)}  # and images


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
            if dist.is_initialized():  # the variance over all is that within processes and that between their means
                total = MeanOverProcesses.apply(mean)
                mean, var = total, MeanOverProcesses.apply(var + (mean - total) ** 2)
            self.mean.lerp_(mean.detach(), 0.1)
            self.var.lerp_(var.detach(), 0.1)
        return mean, (var + 1e-5).rsqrt()


class MeanOverProcesses(torch.autograd.Function):
    """The mean of x over all processes. Its gradient is such a mean too: dist.all_reduce itself passes none."""

    @staticmethod
    def forward(ctx, x):
        total = x / data.world_size()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return MeanOverProcesses.forward(ctx, grad)


class AveragePool(nn.Module):
    """§3.5's linear probe: global average pooling over the tokens, then a linear classifier."""

    def __init__(self, dim, n_heads, n_classes):
        super().__init__()
        self.norm = FeatureNorm(dim)
        self.classifier = nn.Linear(dim, n_classes)

    def forward(self, x):
        x = x.float().mean(dim=1)  # (B, T, D) -> (B, D)
        mean, scale = self.norm(x)
        return self.classifier((x - mean) * scale)  # (B, C)


class AttentionPool(nn.Module):
    """§3.5's attention pooling: one learned query cross-attends to all tokens, then a linear classifier.

    Video tokens look at their past alone, so the later ones know more, and which of them matter differs from clip to
    clip: a mean cannot choose, a query can. Not in the paper, as in AIM: q, one vector of width D from N(0, 0.02), is
    split over as many heads as the trunk has; no biases; a batch norm without parameters on the tokens.
    """

    def __init__(self, dim, n_heads, n_classes):
        super().__init__()
        self.n_heads = n_heads
        self.norm = FeatureNorm(dim)
        self.query = nn.Parameter(0.02 * torch.randn(dim))
        self.key, self.value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.classifier = nn.Linear(dim, n_classes)

    def plain_pool(self, x):
        """softmax(q · K / √(D/H)) V, with K = x W_k and V = x W_v, in every head: (B, T, D) -> (B, D)."""
        mean, scale = self.norm(x.float())
        x = (x.float() - mean) * scale
        k, v = (y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for y in (self.key(x), self.value(x)))
        q = self.query.view(self.n_heads, 1, -1)  # (H, 1, D/H); k and v are (B, H, T, D/H)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)  # (B, H, 1, T)
        return (weights @ v).flatten(1)  # (B, H, 1, D/H) -> (B, D)

    def pool(self, x):
        """The same without ever making K and V: on a CPU 1.5 (D = 1,024) to 2 times (768) as fast, at 128 0.8 times.

        q_h · (W_k,h x_t) = (W_k,hᵀ q_h) · x_t, and W_v can wait until after the sum over tokens. So can the norm: its
        scale goes to the query, and its mean adds the same to every token's score, which the softmax ignores.
        """
        x, D = x.float(), x.shape[-1]
        mean, scale = self.norm(x)
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


def make_heads(dim, n_heads, layers, pools, classes, seed, device):
    """{(task, pool, layer): head}. Each starts from the seed alone: what is probed beside it does not matter."""
    heads = {}
    for task, names in classes.items():
        for pool in pools:
            for l in layers:
                torch.manual_seed(seed)
                heads[task, pool, l] = POOLS[pool](dim, n_heads, len(names)).to(device)
    return heads


# What is probed: labelled clips, and their features.
class ProbeSet:
    """One split of a task: ids int16 (N, views, 1 + T) of N clips and, for each task, their class numbers (N,).

    §4.3 and Table 8, the views of SlowFast: n_views windows of n_frames, the i-th starting at
    (length - n_frames) · i / n_views, of each of n_crops crops, which the token folder stores as clips that follow one
    another. Not in the paper: one view is the middle one. Frames lie `step` stored ones apart; a window may start at
    any stored one.

    Training sees §3.4's "random crop of R x R x T": in each epoch one of the crops, and of a longer video any window.
    """

    def __init__(self, tokens, n_frames, n_views=1, n_crops=1, classes=None, step=1):
        is_video, source = tokens.length > 1, tokens.meta["source"]
        if is_video.any() and not is_video.all():
            raise ValueError(f"{source}: has both images and videos; probe one kind at a time")
        if not tokens.labels or None in tokens.labels.get("class", []):
            raise ValueError(f"{source}: files must lie in one sub-folder per class")
        labels = {task: names[::n_crops] for task, names in tokens.labels.items()}
        self.classes = classes or {task: sorted(set(names)) for task, names in labels.items()}
        for task, names in self.classes.items():  # a class without an example, or without a head, is a mistake
            here = set(labels.get(task, []))
            for what, difference in (("that train has not", here - set(names)), ("missing", set(names) - here)):
                if difference:
                    raise ValueError(f"{source}: has a {task} {what}: {', '.join(sorted(difference))}")
        self.labels = {t: torch.tensor([names.index(l) for l in labels[t]]) for t, names in self.classes.items()}
        self.names, self.tokens, self.n_crops, self.step = tokens.names[::n_crops], tokens, n_crops, step
        self.n_frames = n_frames if is_video.all() else 1  # an image is a clip of one frame
        span = (self.n_frames - 1) * step + 1  # of a window, in stored frames
        self.spare = np.maximum(tokens.length[::n_crops] - span, 0)  # a window may start at 0 … spare
        starts = [self.spare // 2] if n_views == 1 else [self.spare * i // n_views for i in range(n_views)]
        views = [(crop, start) for crop in range(n_crops) for start in starts]
        clips = range(len(self.names))
        ids = [[self.sequence(clip, crop, start[clip]) for crop, start in views] for clip in clips]
        self.ids = torch.from_numpy(np.array(ids))
        self.is_longer = bool(self.spare.any())  # than one window: an epoch may see others than those in ids

    def __len__(self):
        return len(self.ids)

    def sequence(self, clip, crop, start):
        """ids int16 (1 + T,), without the end token: a probe reads H_l where codes are inputs."""
        codes = self.tokens.codes(clip * self.n_crops + crop, start, self.n_frames, self.step)
        return data.to_sequence(codes, self.n_frames > 1)[:-1].astype(np.int16)

    def inputs(self, rows):
        """What goes through a trunk for the rows clip · views + i: ids (B, 1 + T)."""
        return self.ids.flatten(0, 1)[rows]

    def draw(self, generator):
        """What an epoch sees of the clips: a crop and a window's first frame of each, two (N,).

        Not in the paper: the crops are K stored ones (--crops), since new ones would need the tokenizer; no flips.
        """
        crops, starts = torch.randint(2**62, (2, len(self)), generator=generator)
        return crops % self.n_crops, starts % torch.from_numpy(self.spare + 1)

    def drawn(self, rows, crops, starts):
        """The ids (B, 1 + T) of some clips, of the crops and windows that are drawn for all."""
        if not self.is_longer:
            return self.ids[rows, crops[rows]]
        drawn = zip(*(x.tolist() for x in (rows, crops[rows], starts[rows])))
        return torch.from_numpy(np.array([self.sequence(*key) for key in drawn]))


def load_sets(args, checkpoint, tokenizer):
    """The training and validation ProbeSet of --data, or of the built-in world."""
    sets, resolution, stride = [], args.resolution or checkpoint["resolution"], checkpoint["stride"]
    n_views, n_crops = args.views
    folders = [Path(args.data) / "train", Path(args.data) / "val"] if args.data else []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; --data needs train/<class>/* and val/<class>/*")
    # Both are looked through before the first is tokenized, which may take hours.
    media = [folder for folder in folders if not data.is_token_folder(folder)]
    media = {folder: data.media_shards(folder, resolution, stride) for folder in media}
    for split, world in (("train", WORLD_TRAIN), ("val", WORLD_VAL)):
        how = (1, args.crops) if split == "train" else (n_views, n_crops, sets[0].classes)
        crops = data.THREE if split == "val" and n_crops == 3 else how[1]
        source, step = Path(args.data) / split if args.data else f"world-{split}", 1
        if args.data and source not in media:
            tokens, grid = data.Tokens(source), tokenizer.grid(resolution)
            made = {"tokenizer": checkpoint["tokenizer"], "resolution": resolution, "grid": grid, "crops": crops}
            data.check_same(source, tokens.meta, made, "a token folder keeps what it was made with")
            step = tokens.step(stride)
        else:
            shards = media.get(source) or data.world_shards(world, resolution, checkpoint["frames"])
            tokens = data.tokenize_cached(source, shards, args.out / "tokens", tokenizer, resolution, stride, crops)
        if split == "val" and args.views != (1, 1) and tokens.length.max() == 1:
            raise ValueError(f"{source}: --views are for videos; here are images")
        sets.append(ProbeSet(tokens, checkpoint["frames"], *how, step=step))
    if len(sets[0]) < 2:
        raise ValueError("probing needs at least 2 training clips")
    return sets


class Features:
    """§3.5: H_l of the asked layers, {l: (B, T, D)}, of the sequences of a set; kept if they fit in KEEP_BYTES.

    A frozen trunk gives the same features in every epoch, and one pass gives those of all layers. Row clip · views + i
    is view i of a clip. Windows drawn anew in each epoch are not stored here: they go through `compute`.
    """

    def __init__(self, model, split, layers, args, device, keep=True):
        ids = split.ids.flatten(0, 1)
        self.model, self.split, self.layers, self.device = model, split, layers, device
        self.causal, self.kept = args.attention == "causal", None
        n_bytes = ids.numel() * model.config.dim * len(layers) * model.compute_dtype.itemsize
        if keep and n_bytes <= KEEP_BYTES and len(ids) >= data.world_size():
            shape = len(ids), ids.shape[1] - 1, model.config.dim
            self.kept = {l: torch.empty(shape, dtype=model.compute_dtype, device=device) for l in layers}
            shares = torch.arange(len(ids)).tensor_split(data.world_size())  # each process computes one
            batches = shares[data.rank()].split(args.batch)
            for rows in tqdm(batches, desc="features", unit="batch", dynamic_ncols=True, disable=data.rank() > 0):
                for l, x in self.compute(split.inputs(rows)).items():
                    self.kept[l][rows[0] : rows[-1] + 1] = x
            for rank, rows in enumerate(shares if data.world_size() > 1 else ()):
                for x in self.kept.values():
                    dist.broadcast(x[rows[0] : rows[-1] + 1], src=rank)

    @torch.no_grad()
    def compute(self, ids):
        features = self.model.features(ids.to(self.device).long(), self.layers, self.causal)
        return {l: x[:, 1:] for l, x in features.items()}  # the start token is no visual token

    def __getitem__(self, rows):
        if self.kept is None:
            return self.compute(self.split.inputs(rows))
        return {l: x[rows] for l, x in self.kept.items()}


class Pixels:
    """The pixels themselves as the features of layer 0, {0: (B, 1, pixels)}: what is there before any tokens."""

    def __init__(self, split, items, resolution):
        crops, items = [], {item.name: item for item in items}
        for name in split.names:
            image = next(iter(items[name].read()[1]))
            crops += [data.crop(image, resolution, place) for place in data.crop_places(name, split.n_crops)]
        self.x = torch.from_numpy(np.stack(crops)).flatten(1)[:, None]

    def __getitem__(self, rows):
        return {0: self.x[rows].float() / 255}


# Training: heads on frozen features, or beside or through a trunk that learns too.
def layer_scales(model):
    """§4.2's layer decay as MAE counts it, [(part, what scales its rate)]: 0.9^(L + 1 - i) for part i.

    Part 0 is the embedding, l + 1 is block l, and L + 1 the last norm, which keeps the full rate, as the heads do.
    """
    # Not in the paper: the embedding is tied, so the output layer has the smallest rate too, though it comes last. In
    # joint fine-tuning Eq. 2 trains it at that: 0.9^(L + 1) of the rate of the last norm, right before it.
    parts = [model.embedding, *model.blocks, model.norm]
    return [(part, LAYER_DECAY ** (len(parts) - 1 - i)) for i, part in enumerate(parts)]


def fine_tuned_features(model, ids, layers, mode, causal):
    """The features of a trunk that learns -> ({l: (B, T, D)}, its own loss).

    joint (§4.2, Table 7): the loss is Eq. 2, and the classes' gradient stops at the features. full (A.2, A.3,
    Table 13): the classes' loss alone, with causal or full attention. both: Eq. 2 and, with no stop-gradient, the
    classes' loss, as §4.4 found better for forecasting. Not in the paper: they weigh the same.
    """
    features, x = {}, None
    for l, x in enumerate(model.residual_stream(ids, causal)):
        if l in layers:
            features[l] = x[:, 1:].detach() if mode == "joint" else x[:, 1:]
        if mode == "full" and l == max(layers):
            return features, 0.0
    targets = ids[:, 1:]
    if ids[0, 0] == toto.VIDEO_START:  # an end follows; in pre-training it follows 16 images (§3.4), not one
        targets = torch.cat((targets, ids.new_full((len(ids), 1), toto.END)), dim=1)
    return features, model.loss(x[:, : targets.shape[1]], targets)


def make_optimizer(heads, model, args):
    """Not in the paper: AdamW with weight decay 0.05 on matrices and kernels, not on norms, biases and the query.

    `scale` is what multiplies a group's rate: the layer decay and, on the blocks' matrices, µP's ratio (A.5). AdamW
    decays by rate · weight decay, so the latter is divided by the ratio: no width decays faster than another.
    """
    groups, trunk = [], layer_scales(model) if args.finetune else []
    for part, scale in [(nn.ModuleList(heads.values()), 1.0), *trunk]:
        ratio = model.config.mup_ratio if isinstance(part, toto.Block) else 1.0
        matrices = [p for p in part.parameters() if p.dim() >= 2]
        vectors = [p for p in part.parameters() if p.dim() < 2]
        groups.append({"params": matrices, "scale": scale * ratio, "weight_decay": 0.05 / ratio})
        groups.append({"params": vectors, "scale": scale, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=args.lr)


def average_gradients(optimizer):
    """The mean of all gradients over the processes, in one exchange. Not DDP: heads and trunk are no one module."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    row = parameters_to_vector(gradients)
    dist.all_reduce(row)
    vector_to_parameters(row / data.world_size(), gradients)


def train_heads(heads, features, split, settings, path, args, device, model=None):
    """Every head gets its own cross-entropy; their sum has just their gradients, since no parameter is shared.

    With --finetune, `model` learns too, and `features` is not used. Resumes from `path` if that has the same settings.
    """
    if min(args.batch, len(split)) % data.world_size():
        raise ValueError(f"--batch {args.batch}: {data.world_size()} processes cannot share it evenly")
    optimizer, layers = make_optimizer(heads, model, args), {l for _, _, l in heads}
    parts = {"|".join(map(str, key)): head for key, head in heads.items()} | {"optimizer": optimizer}
    parts |= {"trunk": model.requires_grad_(True)} if args.finetune else {}  # a frozen one is not saved again
    batches_per_epoch, order, accuracy = max(len(split) // args.batch, 1), None, {}
    n_steps = args.epochs * batches_per_epoch
    contents = [split.ids, *split.labels.values(), *([p.detach().cpu() for p in model.parameters()] if model else [])]
    settings = settings | {"steps": n_steps, "contents": data.checksum(*contents)}
    file = data.state_file(path, parts, settings, refuse=False)
    for step, bar in data.resumable_steps("probing", n_steps, **file):
        epoch, batch = divmod(step, batches_per_epoch)  # the last, incomplete batch of an epoch is left out
        if batch == 0 or order is None:  # the seed and the epoch alone decide what a step sees
            generator = torch.Generator().manual_seed(args.seed + epoch)
            order, (crops, starts) = torch.randperm(len(split), generator=generator), split.draw(generator)
        rows = order[batch * args.batch :][: args.batch][data.rank() :: data.world_size()]  # this process's clips
        for group in optimizer.param_groups:  # not in the paper: a cosine to zero, without a warm-up
            group["lr"] = args.lr * group["scale"] * (1 + math.cos(math.pi * step / n_steps)) / 2
        ids, loss = split.drawn(rows, crops, starts), 0.0
        if args.finetune:
            ids = ids.to(device).long()
            x, loss = fine_tuned_features(model, ids, layers, args.finetune, args.attention == "causal")
        else:
            x = features.compute(ids) if split.is_longer else features[rows * split.n_crops + crops[rows]]
        for (task, pool, l), head in heads.items():  # one loss a head; joint adds the trunk's own
            logits, labels = head(x[l].to(device)), split.labels[task][rows].to(device)
            loss = loss + F.cross_entropy(logits, labels)
            if step % 10 == 0:  # a running mean, for the bar
                right = (logits.argmax(dim=1) == labels).float().mean().item()
                accuracy[task, pool, l] = 0.9 * accuracy.get((task, pool, l), right) + 0.1 * right
        loss.backward()
        if data.world_size() > 1:
            average_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        if accuracy:
            task, pool, l = best = max(accuracy, key=accuracy.get)
            words = f"training accuracy {accuracy[best]:.0%} ({task}, {pool}, layer {l})"
            bar.set_postfix_str(words, refresh=False)
    if args.finetune:
        model.requires_grad_(False)


# Evaluation.
@torch.no_grad()
def evaluate(heads, features, split, args, device):
    """For every head: top1 (0 to 1), its 95 % interval, and the classes it gave (N,).

    The class probabilities of a clip's views are averaged (§4.3, Table 8).
    """
    n_views, results = split.ids.shape[1], {}
    predicted = {key: torch.zeros(len(split), dtype=torch.long, device=device) for key in heads}
    for head in heads.values():
        head.eval()
    mine = torch.arange(data.rank(), len(split), data.world_size())
    for rows in mine.split(max(args.batch // n_views, 1)):  # as many sequences at a time as in training
        x = features[(rows[:, None] * n_views + torch.arange(n_views)).flatten()]
        for key, head in heads.items():
            p = head(x[key[2]].to(device)).softmax(dim=1)  # (clips · views, C): probabilities, not logits, are averaged
            p = p.unflatten(0, (len(rows), n_views)).mean(dim=1)  # (clips, C)
            predicted[key][rows.to(device)] = p.argmax(dim=1)
    for key, classes in predicted.items():
        if data.world_size() > 1:  # each filled in its own rows
            dist.all_reduce(classes)
        top1 = (classes.cpu() == split.labels[key[0]]).float().mean().item()
        results[key] = {"top1": top1, "interval": wilson(top1, len(split)), "classes": classes.cpu()}
    return results


def wilson(share, n, z=1.96):
    """The 95 % confidence interval of a share that was seen in n trials (Wilson, 1927)."""
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), (centre + spread) / (1 + z * z / n)


def over_seeds(values):
    """(mean, low, high) of what a few runs gave that differ in their seeds: Student's 95 % confidence interval."""
    quantiles = (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # for 1, 2, … 10 runs or more
    mean, n = float(np.mean(values)), len(values)
    half = quantiles[min(n, 10) - 1] * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return mean, mean - half, mean + half


def verdict(low, high):
    """Whether a claim that something is above 0 holds, by its 95 % interval and nothing else."""
    return "holds" if low > 0 else "does not hold" if high < 0 else "cannot tell"


# §4.1's study on images, for the scripts of paper/.
def image_shards(args, split, resolution):
    """The shards of "pretrain", images of --data, or of "train" or "val", those of --probe: media, or the world's."""
    if split == "pretrain":
        return data.shards_of(args.data, resolution, args.stride, 1)
    if args.probe:
        return data.media_shards(Path(args.probe) / split, resolution, args.stride)
    return data.world_shards(IMAGE_INDICES[split], resolution, 1, data.WORLD_IMAGES)


def image_sets(args, tokenizer, resolution):
    """{"pretrain", "train", "val"}: their token folders; without a task to probe the first alone."""
    sets, how = {}, (args.out / "tokens", tokenizer, resolution, args.stride)
    for split in ("pretrain", "train", "val") if args.has_probe else ("pretrain",):
        source = args.data if split == "pretrain" else Path(args.probe or data.WORLD_IMAGES) / split
        sets[split] = data.tokenize_cached(source, image_shards(args, split, resolution), *how)
    if not data.is_held_out(sets["pretrain"].names).any():
        raise ValueError(f"{args.data}: needs two readable images at least, since one is held out")
    return sets


@torch.no_grad()
def mean_features(model, split, rows, device):
    """§3.5's global average pooling: the mean of H_l over the tokens of some images, float32 (L + 1, len(rows), D)."""
    means = []
    for some in rows.split(128):
        stream = model.residual_stream(split.inputs(some).to(device).long())
        means.append(torch.stack([x[:, 1:].float().mean(dim=1).cpu() for x in stream]))
    return torch.cat(means, dim=1)


def linear_probe(x, y, x_val, y_val, n_classes):
    """Logistic regression on vectors x (N, D) with classes y (N,) -> whether it is right on others, bool (N,).

    Not in the paper: by L-BFGS, up to 200 iterations, so that no rate or number of epochs favours features whose
    directions differ less in scale. On the world Adam is 20 points lower after 100 epochs, and still 10 after 400. The
    weights' squares are added with 1e-5, on features of unit variance.
    """
    mean, scale = x.mean(dim=0), x.std(dim=0) + 1e-6
    x, x_val, classifier = (x - mean) / scale, (x_val - mean) / scale, nn.Linear(x.shape[1], n_classes).to(x.device)
    nn.init.zeros_(classifier.weight)
    how = {"max_iter": 200, "history_size": 20, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(classifier.parameters(), **how)

    def loss():
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(x), y) + 1e-5 * classifier.weight.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(loss)
    return classifier(x_val).argmax(dim=1) == y_val


def linear_probes(model, sets, device):
    """§3.5's linear probes of all layers: [top-1 of layer 0, 1, … L], learned from the first of two sets of a task.

    Under torchrun each process passes its share of the images through the model, and fits its share of the layers.
    """
    ((task, names),), rank, n, mine = sets[0].classes.items(), data.rank(), data.world_size(), {}
    shares = [torch.arange(rank, len(split), n) for split in sets]
    parts = [mean_features(model, split, rows, device) for split, rows in zip(sets, shares)]
    for l in range(len(parts[0])):
        of_layer = [torch.zeros(len(split), part.shape[2]) for split, part in zip(sets, parts)]
        for whole, part, rows in zip(of_layer, parts, shares):
            whole[rows] = part[l]
            if n > 1:
                dist.reduce(whole, l % n, group=data.PATIENT)
        if l % n == rank:
            mine[l] = of_layer
    top1 = torch.zeros(len(parts[0]), dtype=torch.float64)
    y, y_val = (split.labels[task].to(device) for split in sets)
    for l, (x, x_val) in mine.items():
        top1[l] = linear_probe(x.to(device), y, x_val.to(device), y_val, len(names)).float().mean()
    if n > 1:
        dist.all_reduce(top1, group=data.PATIENT)
    return top1.tolist()


def floor_and_ceiling(sets, args, device):
    """{what: top-1}: chance, a linear classifier on the pixels if memory holds them, and what could be known."""
    split = ProbeSet(sets["train"], 1)
    labelled = split, ProbeSet(sets["val"], 1, classes=split.classes)
    ((task, names),) = split.classes.items()
    found = {"chance": 1 / len(names)}
    if 24 * args.resolution**2 * len(split) <= KEEP_BYTES:  # as float32, twice
        items = (sum(image_shards(args, name, args.resolution), []) for name in ("train", "val"))
        x, x_val = (Pixels(s, some, args.resolution).x[:, 0].float() / 255 for s, some in zip(labelled, items))
        y, y_val = (s.labels[task] for s in labelled)
        right = linear_probe(*(t.to(device) for t in (x, y, x_val, y_val)), len(names))
        found["raw pixels"] = right.float().mean().item()
    return found | ({"ceiling: every object is whole": 1.0} if not args.probe else {})


def show_seeds(values, digits=1):
    """`over_seeds` in words, of per cent or less; of one run its value alone."""
    mean, low, high = over_seeds(values)
    interval = f" ({max(low, -100):.{digits}f} to {min(high, 100):.{digits}f})" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{interval}"


def print_table(results, classes, n_layers):
    """§4.8: accuracy over depth, one row a layer and one text bar a head: Fig. 4, Fig. 8 and Fig. 14 on their side."""
    layers, pools = (list(dict.fromkeys(key[i] for key in results)) for i in (2, 1))
    for task, names in classes.items():
        print(f"\n{task}: {len(names)} classes, chance {1 / len(names):.1%}; top-1 and its 95 % interval")
        print("layer  " + "".join(f"{pool:<38}" for pool in pools))
        for l in layers:
            row = ""
            for pool in pools:
                top1, (low, high) = results[task, pool, l]["top1"], results[task, pool, l]["interval"]
                row += f"{top1:6.1%} {f'({low:.0%} to {high:.0%})':<15}{'█' * round(14 * top1):<14}  "
            print(f"{l:>5}  {row}")
        for pool in pools if len(layers) > 1 else ():
            best = max(layers, key=lambda l: results[task, pool, l]["top1"])
            print(f"best with {pool}: layer {best} of {n_layers}, {results[task, pool, best]['top1']:.1%}")


def probe_run(name, model, layers, pools, dim, sets, args, device, checkpoint, path):
    """Train and evaluate the heads of one model, or of raw pixels -> (results by (task, pool, layer), settings)."""
    train, val = sets
    settings = {key: str(value) for key, value in vars(args).items()}
    settings |= {"model": name, "checkpoint_step": checkpoint["step"], "tokenizer": checkpoint["tokenizer"]}
    heads = make_heads(dim, checkpoint["config"].n_heads, layers, pools, train.classes, args.seed, device)
    if model is None:
        folder, resolution = Path(args.data), args.resolution or checkpoint["resolution"]
        items = [sum(data.media_shards(folder / split, resolution, 1), []) for split in ("train", "val")]
        of_train, of_val = Pixels(train, items[0], resolution), Pixels(val, items[1], resolution)
        train_heads(heads, of_train, train, settings, path, args, device)
    else:
        of_train = None if args.finetune else Features(model, train, layers, args, device, not train.is_longer)
        train_heads(heads, of_train, train, settings, path, args, device, model)
        del of_train  # makes room
        of_val = Features(model, val, layers, args, device)
    return evaluate(heads, of_val, val, args, device), settings


# The program.
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


def parse_views(text):
    """For argparse: VxS -> (V, S)."""
    found = re.fullmatch(r"([1-9]\d*)x([13])", text)
    if not found:
        raise argparse.ArgumentTypeError("give clips x crops, with 1 or 3 crops, as 10x3")
    return int(found[1]), int(found[2])


def parse_arguments():
    parser = data.make_parser(__doc__)
    add, count, positive = parser.add_argument, data.number(int, at_least=1), data.number(float, above=0)
    about = lambda name: f"(default: {PAPER[name]:g}, or {LAPTOP[name]:g} for tiny)"
    add("--layer", default="mid", help="mid (L // 2), a number, numbers with commas, or all; 0 is the embedding")
    add("--pool", nargs="+", default=["attention", "average"], choices=POOLS, help="from tokens to one vector (§3.5)")
    add("--data", help="folder with train/<class>/* and val/<class>/*, or with two token folders (default: the world)")
    add("--checkpoint", nargs="+", default=[Path("out/toto.pt")], type=Path, help="models trained by train.py")
    add("--tokenizer", type=Path, help="the models' tokenizer (default: dvae.pt beside the checkpoint)")
    words = "folder for probe.json, probe.pt, finetuned.pt and cached tokens"
    add("--out", default="out", type=data.output_folder, help=words)
    words = "train the model too, by next tokens, the classes, or both losses (default: it stays frozen)"
    add("--finetune", choices=["joint", "full", "both"], help=words)
    add("--attention", default="causal", choices=["causal", "full"], help="full: every token sees every other (A.2)")
    add("--views", type=parse_views, default="1x1", metavar="VxS", help="clips and crops of a video: 10x3 in §4.3")
    add("--crops", type=count, default=1, help="random crops of each training clip, of which an epoch sees one")
    add("--baselines", action="store_true", help="probe an untrained model too, and of image files raw pixels")
    add("--resolution", type=dvae.frame_side, help="side of the frames in pixels (default: that of the training)")
    add("--rope-base", type=positive, help="RoPE's base (default: the checkpoint's; 50,000 at 32 x 32 tokens, §4.2)")
    add("--epochs", type=count, help=f"passes over the training set {about('epochs')}")
    add("--batch", type=count, default=32, help="clips in a step, over all processes")
    add("--lr", type=positive, help=f"peak learning rate {about('lr')}")
    args = parser.parse_args()
    if args.attention == "full" and args.finetune != "full":
        raise ValueError("--attention full needs --finetune full: the model has learned to predict from the past only")
    is_written = lambda path: path.name.startswith("finetuned") and path.parent.resolve() == args.out.resolve()
    if args.finetune and any(map(is_written, args.checkpoint)):
        raise ValueError(f"--finetune writes finetuned.pt to {args.out}, where it is read from; give another --out")
    if args.baselines and args.finetune:
        raise ValueError("--baselines are frozen: leave out --finetune")
    if (args.views, args.crops) != ((1, 1), 1) and args.data is None:
        raise ValueError("--views, --crops: a clip of the built-in world is one view; give --data")
    return args


def main():
    args = parse_arguments()
    device = data.pick_device(args.device)
    data.start_processes(device)
    report, asked = {"runs": {}, "accuracy": []}, {name: getattr(args, name) for name in PAPER}
    for path in args.checkpoint:
        model, tokenizer, checkpoint = dvae.load_trained(path, args.tokenizer, device, args.rope_base)
        # Each model has its own defaults and its own layers; flags that were given hold for all.
        config = model.config
        for name, default in (LAPTOP if toto.is_tiny(config) else PAPER).items():
            setattr(args, name, asked[name] or default)
        layers = parse_layers(args.layer, config.n_layers)
        if args.finetune in ("full", "both") and (len(layers) > 1 or len(args.pool) > 1):
            words = "the trunk learns for one head; give one --layer and one --pool"
            raise ValueError(f"--finetune {args.finetune}: {words}")
        beside = args.out / "dvae.pt"
        if args.finetune and beside.exists() and dvae.load(beside).fingerprint() != checkpoint["tokenizer"]:
            raise ValueError(f"{beside}: is another tokenizer than that of {path}; give another --out")
        sets = train, val = load_sets(args, checkpoint, tokenizer)
        report |= {"clips": [len(train), len(val)], "classes": train.classes}
        if data.rank() == 0:
            n_tokens = train.ids.shape[2] - 1
            print(f"{len(train)} training and {len(val)} validation clips of {n_tokens} tokens; layers {layers}")
        runs = {str(path): (model, layers, args.pool, config.dim)}
        if args.baselines:
            torch.manual_seed(args.seed)  # what of an accuracy is the architecture's, and what is the training's
            untrained = toto.Toto(config, model.compute_dtype).to(device).eval().requires_grad_(False)
            runs[f"{path}, untrained"] = (untrained, layers, args.pool, config.dim)
            folders = [Path(args.data) / split for split in ("train", "val")] if args.data else []
            if folders and not any(map(data.is_token_folder, folders)) and train.ids[0, 0, 0] == toto.IMAGE_START:
                n_pixels = 3 * (args.resolution or checkpoint["resolution"]) ** 2
                runs[f"{path}, raw pixels"] = (None, [0], ["average"], n_pixels)
        for name, run in runs.items():
            suffix = f"-{len(report['runs']) + 1}.pt" if report["runs"] else ".pt"  # of each run its own files
            state = args.out / f"probe{suffix}"
            results, report["runs"][name] = probe_run(name, *run, sets, args, device, checkpoint, state)
            if args.finetune and data.rank() == 0:
                path, resolution = args.out / f"finetuned{suffix}", args.resolution or checkpoint["resolution"]
                dvae.save_trained(model, tokenizer, checkpoint, resolution, path)
            for (task, pool, l), r in results.items():
                row = {"model": name, "task": task, "pool": pool, "layer": l, "top1": r["top1"]}
                report["accuracy"].append(row | {"interval": r["interval"]})
            if data.rank() == 0:
                data.write_json(report, args.out / "probe.json")
                how = f"{args.finetune} fine-tuning" if args.finetune else "frozen"
                print(f"\n{name}, {how}, {val.ids.shape[1]} view(s)")
                print_table(results, train.classes, config.n_layers)


if __name__ == "__main__":
    data.run(main)
