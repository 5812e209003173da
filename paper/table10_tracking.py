"""Table 10 and Figure 5 (§4.5): tracking without training, by carrying the labels of the first frame along.

    python paper/table10_tracking.py                        the built-in world's objects, with the model of `train.py`
    python paper/table10_tracking.py --data DAVIS --checkpoint FILE --resolution 256 512
                                                            DAVIS-2017, or one sequence: .../JPEGImages/480p/NAME
    python paper/table10_tracking.py --data DAVIS --patches 16 8 --protocol dino      raw patches in place of a model
    python paper/table10_tracking.py --benchmark            speed and memory of propagation over 64 x 64 tokens

The model stays frozen and sees each frame alone, as one image (§3.4). A place of a frame takes on the labels of those
places of the frames before it whose features are most like its own (Jabri et al., 2020). All layers are tracked in one
pass. J and F, the overlap of masks and of their outlines, say how much of the objects is left after some frames.

Prints the paper's table beside ours, and writes table10.json, table10.png (Fig. 5) and table10.gif to --out; run again,
it keeps the sequences that are done.

From top to bottom: the protocols, propagation, J and F, sequences, features, one sequence, the table, the program.
Shape letters: h and w tokens of a frame, D width, C frames of context, O labels (0 is the ground), H and W pixels.
"""

import math
import sys
import time
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # the six scripts lie in the folder above

import data
import dvae
import probe
import toto
import train

PAPER = [  # Table 10: method (resolution / pixels of a patch), J&F, J, F
    ("DINO-base (224/8)", 54.3, 52.5, 56.1), ("DINO-base (224/16)", 33.1, 36.2, 30.1),
    ("MAE-base (224/16)", 31.5, 34.1, 28.9), ("Toto-base (256/8)", 42.0, 41.2, 43.1),
    ("Toto-large (256/8)", 44.8, 44.4, 45.1), ("Toto-1b (256/8)", 46.1, 45.8, 46.4),
    ("Toto-large (512/8)", 62.4, 59.2, 65.6),
]  # fmt: skip


# Protocols
@dataclass(frozen=True)
class Protocol:
    """How labels are carried along. The constants are those of the authors' programs; §4.5 names none."""

    name: str
    n_last: int  # how many frames before this one are context, beside the first
    top_k: int  # so many places, of all the context, give their labels
    temperature: float  # of the softmax over their cosine similarities
    reach: int  # a place is compared with others so many rows or columns away
    is_round: bool  # and nearer than `reach` + 1 in a straight line
    sees_all_of_first: bool  # but with all of the first frame
    is_padded: bool  # copies of the first frame stand for frames before it
    is_stretched: bool  # at the end the map of each label is stretched from 0 to 1, at the size that the model sees
    first_mask: dict  # how F.interpolate brings the first mask to the grid
    std: tuple  # of red, green and blue, by which raw patches are normalised

    def is_near(self, dy, dx):
        """Whether places dy rows and dx columns apart are compared."""
        is_in_square = (abs(dy) <= self.reach) & (abs(dx) <= self.reach)
        return is_in_square & (dy**2 + dx**2 < (self.reach + 1) ** 2) if self.is_round else is_in_square


# §4.5 follows videowalk (Jabri et al., 2020; the command of its README). DINO's rows in Table 10 come from the other.
# Not in the paper: videowalk's own bilinear reduction skips most pixels of a mask; here all pixels of a token count.
VIDEOWALK = Protocol("videowalk", n_last=20, top_k=10, temperature=0.05, reach=11, is_round=True,
                     sees_all_of_first=True, is_padded=True, is_stretched=False,
                     first_mask={"mode": "bilinear", "antialias": True}, std=(0.229, 0.224, 0.225))  # fmt: skip
DINO = Protocol("dino", n_last=7, top_k=5, temperature=0.1, reach=12, is_round=False,
                sees_all_of_first=False, is_padded=False, is_stretched=True,
                first_mask={"mode": "nearest-exact"}, std=(0.228, 0.224, 0.225))  # fmt: skip
VOID = 255  # in a mask: nobody knows what this pixel is


# Propagation
FAR = -1e4  # the similarity of places that are not compared: their weight is 0


def weigh(similar, protocol):
    """Similarities (n, m) of n places to m others -> the softmax over the top_k of these, 0 for the rest, (n, m).

    Not in the paper: those as good as the last of the k share what is left of it. There are many of them where a colour
    is plain, or a code frequent, and which of them a top-k takes would decide the labels.
    """
    k = min(protocol.top_k, similar.shape[1])
    best = similar.topk(k).values  # (n, k), the greatest first
    first, last = best[:, :1], best[:, -1:]
    is_above, is_level = similar > last + 1e-6, (similar - last).abs() <= 1e-6
    share = (k - is_above.sum(dim=1, keepdim=True)) / is_level.sum(dim=1, keepdim=True)
    weights = ((similar - first) / protocol.temperature).exp_() * torch.where(is_level, share, is_above)
    return weights / weights.sum(dim=1, keepdim=True)


def propagate_plainly(query, keys, labels, protocol):
    """§4.5, Table 10: a frame's features (h, w, D) and its context's, (C, h, w, D), all of unit length, and the soft
    labels of the context (C, h, w, O) -> those of the frame (h, w, O). Of the context, frame 0 is the sequence's first.

    The definition, with all similarities in memory: several times 1.3 GiB at 64 x 64 tokens. `propagate` is the same.
    """
    h, w, _ = query.shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    is_near = protocol.is_near(*(p.flatten()[:, None] - p.flatten() for p in (y, x))).to(query.device)  # (h·w, h·w)
    similar = torch.einsum("qd,ckd->qck", query.flatten(0, 1), keys.flatten(1, 2))  # (h·w, C, h·w)
    similar[:, int(protocol.sees_all_of_first) :].masked_fill_(~is_near[:, None], FAR)
    return (weigh(similar.flatten(1), protocol) @ labels.flatten(0, 2)).unflatten(0, (h, w))


def propagate(query, keys, labels, protocol, tile=8):
    """`propagate_plainly` for a tile of tile x tile places at a time, compared with what is in reach of them alone."""
    (h, w, _), reach, result = query.shape, protocol.reach, torch.empty_like(labels[0])
    first = int(protocol.sees_all_of_first)
    y, x = torch.arange(h, device=query.device), torch.arange(w, device=query.device)
    for top in range(0, h, tile):
        rows, near_rows = slice(top, top + tile), slice(max(top - reach, 0), top + tile + reach)
        for left in range(0, w, tile):
            columns, near_columns = slice(left, left + tile), slice(max(left - reach, 0), left + tile + reach)
            places = query[rows, columns].flatten(0, 1)  # (n, D)
            near, found = keys[first:, near_rows, near_columns].flatten(1, 2), labels[first:, near_rows, near_columns]
            dy, dx = y[rows, None] - y[near_rows], x[columns, None] - x[near_columns]
            is_near = protocol.is_near(dy[:, None, :, None], dx[:, None]).flatten(2).flatten(0, 1)  # (n, m)
            similar = (places @ near.flatten(0, 1).T).unflatten(1, near.shape[:2])  # (n, C, m)
            similar, found = similar.masked_fill_(~is_near[:, None], FAR).flatten(1), found.flatten(0, 2)
            if first:
                similar = torch.cat((places @ keys[0].flatten(0, 1).T, similar), dim=1)
                found = torch.cat((labels[0].flatten(0, 1), found))
            soft = weigh(similar, protocol) @ found  # (n, O)
            result[rows, columns] = soft.view_as(result[rows, columns])
    return result


class Track:
    """The context of one kind of features: its memory is the same however long a sequence is."""

    def __init__(self, features, labels, protocol):
        """features (h, w, D) and soft labels (h, w, O) of the first frame."""
        self.protocol, self.t = protocol, 0
        self.n_context = 1 + protocol.n_last if protocol.is_padded else 1
        repeat = lambda x: x[None].repeat(1 + protocol.n_last, 1, 1, 1)
        self.keys, self.labels = repeat(F.normalize(features.float(), dim=-1)), repeat(labels)

    def follow(self, features):
        """The next frame's features -> its soft labels (h, w, O), which join the context in place of the oldest."""
        query = F.normalize(features.float(), dim=-1)
        labels = propagate(query, self.keys[: self.n_context], self.labels[: self.n_context], self.protocol)
        place = 1 + self.t % self.protocol.n_last
        self.keys[place], self.labels[place] = query, labels
        self.n_context, self.t = max(self.n_context, place + 1), self.t + 1
        return labels


def place_labels(mask, grid, **how):
    """A mask (H, W) on the grid of tokens: soft labels (h, w, O). `how` is the mode of F.interpolate."""
    one_hot = F.one_hot(torch.tensor(mask).long() * torch.tensor(mask != VOID)).movedim(-1, 0)[None]  # (1, O, H, W)
    return F.interpolate(one_hot.float(), grid, **how)[0].movedim(0, -1)


def draw_labels(labels, size, frame_size, protocol):
    """Soft labels (h, w, O) -> a mask (H, W), uint8, of the most probable label of each pixel.

    `size` is that of the mask, `frame_size` that of the frame which the model has seen; DINO decides there.
    """
    labels = labels.cpu().movedim(-1, 0)[None]
    how = {"mode": "bilinear", "align_corners": False}
    if not protocol.is_stretched:
        return F.interpolate(labels, size, **how)[0].argmax(dim=0).byte().numpy()
    labels = F.interpolate(labels, frame_size, **how)
    low, high = labels.amin((2, 3), keepdim=True), labels.amax((2, 3), keepdim=True)
    labels = (labels - low) / (high - low).clamp(min=1e-12)  # each label's from 0 to 1, however faint it became
    mask = labels.argmax(dim=1, keepdim=True).byte()
    return F.interpolate(mask, size, mode="nearest-exact")[0, 0].numpy()


# J and F (Perazzi et al., 2016), as the DAVIS challenge of 2017 computes them
def region_similarity(mask, truth):
    """J of two masks, bool (H, W): what they share of what they cover together; 1 where both are empty."""
    union = (mask | truth).sum()
    return (mask & truth).sum() / union if union else 1.0


def outline(mask):
    """Where a mask, bool (H, W), differs from its right, lower or lower right neighbour."""
    m = np.pad(mask, (0, 1), mode="edge")  # beyond the last row and column nothing changes
    return (m[:-1, :-1] != m[:-1, 1:]) | (m[:-1, :-1] != m[1:, :-1]) | (m[:-1, :-1] != m[1:, 1:])


def widen(pixels, radius):
    """Of pixels, bool (H, W), all that lie at most `radius` away from one of them."""
    dy, dx = np.nonzero(np.hypot(*np.indices(2 * [2 * radius + 1]) - radius) <= radius)  # a disk's
    y, x = np.nonzero(pixels)
    wide = np.pad(np.zeros_like(pixels), radius)
    wide[y[:, None] + dy, x[:, None] + dx] = True
    return wide[radius:-radius, radius:-radius]


def contour_accuracy(mask, truth):
    """F of two masks, bool (H, W): the harmonic mean of two shares, of one's outline that lies near the other's.

    Near is within 0.8 % of the diagonal, rounded up. 1 where neither has an outline, 0 where one has.
    """
    radius = math.ceil(0.008 * math.hypot(*mask.shape))
    ours, theirs = outline(mask), outline(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = (ours & widen(theirs, radius)).sum() / ours.sum()
    recall = (theirs & widen(ours, radius)).sum() / theirs.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def j_and_f(mask, truth, label):
    """[J, F] of one label in two masks, uint8 (H, W); where the truth is VOID, nothing counts.

    So have the challenge's two functions it. Its own masks have no VOID, and its program would take it for the ground.
    """
    counts = truth != VOID
    ours, theirs = (mask == label) & counts, truth == label
    return [region_similarity(ours, theirs), contour_accuracy(ours, theirs)]


def statistics(values):
    """Of one object's J or F in each frame: the mean, the share above 1/2, and the fall from first to last quarter."""
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1  # quarters share the frames at their ends
    first, last = values[: ends[1] + 1], values[ends[3] :]
    return {"mean": np.mean(values), "recall": np.mean(values > 0.5), "decay": np.mean(first) - np.mean(last)}


# Sequences
@dataclass
class Sequence:
    """Frames and their masks; nothing is read before `read` is called."""

    name: str
    n_frames: int
    read: callable  # () -> frames, uint8 (H, W, 3) each, and masks, uint8 (H, W), or None where a frame has none
    version: int = 0  # another where the files are others


def davis_sequences(root):
    """The sequences of a folder as DAVIS-2017 has them, those of its val.txt where it has that; or a single one."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    if (root / "JPEGImages").is_dir():
        names, folder = root / "ImageSets" / "2017" / "val.txt", root / "JPEGImages" / "480p"
        here = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        listed = [line.strip() for line in names.read_text().splitlines() if line.strip()] if names.exists() else here
        folders = [folder / name for name in dict.fromkeys(listed)]
        if not folders:
            raise ValueError(f"{names if names.exists() else folder}: names no sequence")
    else:
        folders = [root.absolute()]
    found = []
    for folder in folders:
        parts = list(folder.absolute().parts)
        if "JPEGImages" not in parts or not folder.is_dir():
            raise ValueError(f"{folder}: no folder of frames; DAVIS has JPEGImages/480p/NAME and Annotations/480p/NAME")
        parts[len(parts) - 1 - parts[::-1].index("JPEGImages")] = "Annotations"
        frames = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        masks = [Path(*parts, f"{path.stem}.png") for path in frames]
        if len(frames) < 3:
            words = "give DAVIS-2017's own folder, or one of 3 frames or more (the first and last are not scored)"
            raise ValueError(f"{folder}: has {len(frames)} frames; {words}")
        if not masks[0].exists():
            raise ValueError(f"{masks[0]}: no such file; tracking starts with a mask of the first frame")
        read = lambda frames=frames, masks=masks: read_sequence(frames, masks)
        stats = [path.stat() for path in frames + [path for path in masks if path.exists()]]
        version = zlib.crc32(repr([(stat.st_size, stat.st_mtime_ns) for stat in stats]).encode())
        found.append(Sequence(folder.name, len(frames), read, version))
    return found


def read_sequence(frames, masks):
    """Of files of frames and masks the pixels. Raises ValueError, naming the file, where one cannot be used."""

    def pixels(path, convert):
        try:
            with Image.open(path) as image:
                return np.asarray(convert(image))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: cannot be read as an image") from error

    size_of = lambda array: "x".join(map(str, array.shape[1::-1] + array.shape[2:]))
    read_frames = [pixels(path, data.upright_rgb) for path in frames]
    read_masks = [pixels(path, np.asarray) if path.exists() else None for path in masks]  # a palette's numbers
    for path, mask_path, frame, mask in zip(frames, masks, read_frames, read_masks):
        if frame.shape != read_frames[0].shape:
            raise ValueError(f"{path}: is of {size_of(frame)} pixels, the first frame of {size_of(read_frames[0])}")
        if mask is not None and mask.shape != frame.shape[:2]:
            words = f"is of {size_of(mask)} pixels, its frame of {frame.shape[1]}x{frame.shape[0]}"
            raise ValueError(f"{mask_path}: {words}; a mask has one number for each pixel of the frame")
        if mask is not None and mask.max() > VOID:
            raise ValueError(f"{mask_path}: has the number {mask.max()}; objects are 1, 2, …, and {VOID} is void")
    labels = set(np.unique(read_masks[0]).tolist())
    if not labels - {0}:
        raise ValueError(f"{masks[0]}: marks no object, and there is nothing to track")
    # 255 is void in DAVIS, but with one object some write 0 and 255.
    number = lambda mask: (mask > 0 if labels <= {0, VOID} else mask).astype(np.uint8)
    return read_frames, [None if mask is None else number(mask) for mask in read_masks]


def world_sequences(n, resolution, n_colours=1):
    """Clips of the built-in world that no training ever sees; `WorldClip.masks` says where the moving object is.

    In two colours, as the world is drawn elsewhere, raw patches come near the ceiling, and nothing better could be told
    from them. So both objects have one colour, and only their shapes tell them apart. What patches do with two colours
    shows how well labels are carried along where features do know the object.
    """
    ground = data.world_ground(resolution).round().astype(np.uint8)

    def read(index):
        clip = data.world_clip(index, 16, resolution)
        one_colour = np.where(clip.objects[..., None], np.uint8(data.COLOURS[0]), ground)
        return list(one_colour if n_colours == 1 else clip.frames), list(clip.masks.astype(np.uint8))

    name = "world" if n_colours == 1 else "world-colours"
    can_be_seen = (i for i in probe.WORLD_VAL if data.world_clip(i, 1, resolution).masks.any())  # in the first frame
    return [Sequence(f"{name}-{i}", 16, lambda i=i: read(i)) for i in islice(can_be_seen, n)]


# Features
def squash(frame, h, w):
    """A frame (H, W, 3) as uint8 (h, w, 3)."""
    return np.array(Image.fromarray(frame).resize((w, h), Image.Resampling.BILINEAR))


def stretch(frame, size):
    """A frame (H, W, 3) at another size, float32, as OpenCV's bilinear resize has it, which both programs use.

    It skips pixels. DINO's then rounds, which changes J and F of car-shadow by 0.001.
    """
    x = torch.tensor(frame).movedim(-1, 0)[None].float()
    return F.interpolate(x, size, mode="bilinear", align_corners=False)[0].movedim(0, -1)


def patch_features(frame, side, protocol):
    """The floor: a place's features are its normalised pixels. (H, W, 3) -> (h, w, 3·side²)."""
    x = torch.as_tensor(frame).float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(protocol.std)
    H, W, _ = frame.shape
    return x.view(H // side, side, W // side, side, 3).transpose(1, 2).flatten(2)


@torch.no_grad()
def layer_features(model, tokenizer, frame, layers, device):
    """§3.5's H_l of a frame alone, [3] + its codes: {l: (h, w, D)}, of each place where its own code goes in."""
    codes = tokenizer.encode(frame[None])  # (1, h, w)
    ids = torch.as_tensor(data.to_sequence(codes.cpu().numpy(), is_video=False)[:-1], device=device)
    features = model.features(ids[None], layers)  # {l: (1, 1 + h·w, D)}
    return {l: x[0, 1:].unflatten(0, codes.shape[1:]) for l, x in features.items()}


def short_side_480(frame):
    """The size (H, W) at which DINO sees a frame: its short side 480 pixels, the long one a multiple of 64."""
    H, W, _ = frame.shape
    return (480, 480 * W // H // 64 * 64) if W >= H else (480 * H // W // 64 * 64, 480)


# One sequence
@dataclass
class View:
    """A way of seeing frames: at which size, and as which features."""

    name: str
    size: callable  # frame (H, W, 3) -> (height, width) that it is brought to
    side: int  # pixels of a token
    see: callable  # frame -> {row of the table: features (h, w, D)}


# The rows of the table; those of models end in ", layer l".
COPY, PATCHES, UNTRAINED, OURS = "first mask copied", "raw RGB patches", "untrained", "Toto"
COLOURED, CEILING = "raw patches, objects in two colours", "ground truth on the grid"


def follow(frames, first_mask, view, protocol):
    """Yield, for each frame after the first, {row: mask (H, W)}: all rows of a view in one pass over the frames."""
    size, tracks = view.size(frames[0]), {}
    for t, frame in enumerate(frames):
        masks = {}
        for row, x in view.see(frame).items():
            if t == 0:
                labels = place_labels(first_mask, x.shape[:2], **protocol.first_mask)
                tracks[row] = Track(x, labels.to(x.device), protocol)
            else:
                masks[row] = draw_labels(tracks[row].follow(x), first_mask.shape, size, protocol)
        if t > 0:
            yield masks


def score(sequence, view, protocol, bar):
    """{row: [{"J": …, "F": …} of each object]}, `statistics` over all frames but the first and the last.

    The floor COPY is the first mask in every frame; the CEILING is the truth, brought to the grid and drawn again.
    """
    frames, truths = sequence.read()
    size = view.size(frames[0])
    grid, labels, values = [side // view.side for side in size], set(np.unique(truths[0])) - {0, VOID}, {}
    for truth, masks in zip(truths[1:-1], follow(frames[:-1], truths[0], view, protocol)):
        if truth is not None:
            shares = place_labels(truth, grid, mode="area")  # of a token, that each label has
            masks |= {COPY: truths[0], CEILING: draw_labels(shares, truth.shape, size, protocol)}
            for row, mask in masks.items():
                values.setdefault(row, []).append([j_and_f(mask, truth, label) for label in sorted(labels)])
            best = max(set(values) - {CEILING}, key=lambda row: np.mean(values[row]))
            bar.set_postfix_str(f"J&F {np.mean(values[best]):.0%} ({best})", refresh=False)
        bar.update()
    of_objects = lambda v: [{"J": statistics(J), "F": statistics(F_)} for J, F_ in np.array(v).transpose(1, 2, 0)]
    return {row: of_objects(v) for row, v in values.items()}


def patch_view(side, protocol, device):
    """Raw patches at the size of DINO's frames."""
    see = lambda frame: {PATCHES: patch_features(stretch(frame, short_side_480(frame)), side, protocol).to(device)}
    return View(f"{side}x{side}", short_side_480, side, see)


def model_view(resolution, models, tokenizer, layers, protocol, device):
    """The layers of models {row: model}, beside raw patches. Not in the paper: frames are squashed to a square."""

    def see(frame):
        frame = squash(frame, resolution, resolution)
        found = {PATCHES: patch_features(frame, tokenizer.pixels_per_code, protocol).to(device)}
        for row, model in models.items():
            of_layers = layer_features(model, tokenizer, frame, layers, device)
            found |= {f"{row}, layer {l}": x for l, x in of_layers.items()}
        return found

    return View(str(resolution), lambda frame: (resolution, resolution), tokenizer.pixels_per_code, see)


# The table
def run_all(sequences, views, protocol, settings, out):
    """{view: {row: [the objects of each sequence with masks]}}; what is done is kept in out/runs, not done again."""
    total = len(views) * sum(sequence.n_frames - 2 for sequence in sequences)
    results = {view.name: {} for view in views}
    with tqdm(total=total, desc="tracking", unit="frame", dynamic_ncols=True) as bar:
        for view in views:
            for sequence in sequences:
                here = settings | {"view": view.name, "sequence": sequence.name, "protocol": protocol.name}
                here |= {"frames": sequence.n_frames, "version": sequence.version}
                name = f"{sequence.name}-{view.name}-{zlib.crc32(repr(here).encode()):08x}.json"
                done = bar.n
                found = data.once(out / "runs" / name, here, lambda: score(sequence, view, protocol, bar))
                bar.update(sequence.n_frames - 2 - (bar.n - done))  # those of an earlier run
                for row, objects in found.items():
                    results[view.name].setdefault(row, []).append(objects)
    return results


def over_objects(sequences, other=None, n_draws=2000):
    """[[mean, low, high] of J&F, of J, of F], per cent: means over the objects of all sequences, as the challenge's.

    The 95 % interval is the bootstrap's: of means over as many sequences, drawn with replacement, since the objects of
    one are no independent trials. A single sequence has none. With `other`, the same of the differences from that.
    """
    picks = np.random.default_rng(0).integers(len(sequences), size=(n_draws, len(sequences)))

    def means(sequences, picks):
        pairs = [[[o["J"]["mean"], o["F"]["mean"]] for o in objects] for objects in sequences]
        sums, counts = np.array([np.sum(p, axis=0) for p in pairs]), np.array([len(p) for p in pairs])
        J, F_ = 100 * (sums[picks].sum(axis=-2) / counts[picks].sum(axis=-1)[..., None]).T
        return np.array([(J + F_) / 2, J, F_])  # (3, …)

    everything = np.arange(len(sequences))
    mean, drawn = means(sequences, everything), means(sequences, picks)
    if other is not None:
        mean, drawn = mean - means(other, everything), drawn - means(other, picks)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=1)
    is_one = len(sequences) == 1
    return [[m, None, None] if is_one else [m, l, h] for m, l, h in zip(*(x.tolist() for x in (mean, low, high)))]


def peak(rows, model):
    """The row of a model's layer with the highest J&F, as Table 10 reports it: picked on the very sequences."""
    return max((row for row in rows if row.startswith(f"{model},")), key=lambda row: over_objects(rows[row])[0][0])


def print_table(results, layers):
    """Table 10, the paper's above ours; "less patches" is J&F less that of raw patches on the same sequences."""
    columns, (rows, *_) = "{:<45}{:<22}{:<22}{:<22}{}", results.values()
    show = lambda v: f"{v[0]:.1f}" + (f" ({v[1]:.1f} to {v[2]:.1f})" if v[1] is not None else "")
    n_sequences, n_objects = len(rows[COPY]), sum(map(len, rows[COPY]))
    words = ", 95 % intervals over sequences" if n_sequences > 1 else ""
    print(f"\nTable 10: {n_objects} object(s) in {n_sequences} sequence(s){words}")
    print(columns.format("", "J&F, %", "J, %", "F, %", "less patches"))
    for name, *values in PAPER:
        print(columns.format(f"paper: {name}", *values, ""))
    for view, rows in results.items():
        shown = {row: row for row in (COPY, PATCHES)}
        if layers:
            shown |= {f"peak, {peak(rows, model)}": peak(rows, model) for model in (UNTRAINED, OURS)}
            shown |= {f"middle, {OURS}, layer {middle(layers)}": f"{OURS}, layer {middle(layers)}"}
        for name, row in (shown | {row: row for row in (COLOURED, CEILING) if row in rows}).items():
            less = "" if row == PATCHES else show(over_objects(rows[row], rows[PATCHES])[0])
            print(columns.format(f"{view}: {name}", *map(show, over_objects(rows[row])), less))
    if layers and len(results) > 1:
        (coarse, first), *_, (fine, last) = results.items()
        of_middle = f"{OURS}, layer {middle(layers)}"
        for what, ours, theirs in (("peak", peak(last, OURS), peak(first, OURS)), ("middle", of_middle, of_middle)):
            gain = show(over_objects(last[ours], first[theirs])[0])
            print(f"{OURS}, {what}: J&F at {fine} less that at {coarse} pixels: {gain}")


def middle(layers):
    """The middle one of those that are tracked; of all, L // 2."""
    return layers[(len(layers) - 1) // 2]


def report(results, layers, sequences, settings, protocol):
    """table10.json: every row with [mean, low, high] of J&F, J and F, and beside them recall and decay."""
    rows = []
    for view, found in results.items():
        for row, of_sequences in found.items():
            name, _, layer = row.partition(", layer ")
            figures = dict(zip(("J&F", "J", "F"), over_objects(of_sequences)))
            for metric in "JF":
                for what in ("recall", "decay"):
                    figures[f"{metric} {what}"] = 100 * np.mean([o[metric][what] for s in of_sequences for o in s])
            rows.append({"view": view, "name": name, "layer": int(layer) if layer else None} | figures)
    names = [sequence.name for sequence in sequences]
    return {"settings": settings, "protocol": protocol.name, "layers": layers, "sequences": names, "rows": rows}


# Figure 5
COLOURS = np.array([(0, 220, 255), (255, 200, 0), (255, 0, 140), (120, 255, 60), (170, 90, 255), (255, 110, 40)])


def paint(frame, mask, truth=None):
    """A frame (H, W, 3) with a mask's objects (H, W) in colour over it and, in white, the outlines of the truth's."""
    if mask is None:
        return frame
    is_object = (mask > 0) & (mask != VOID)
    colours = COLOURS[(mask.astype(int) - 1) % len(COLOURS)]
    painted = np.where(is_object[..., None], 0.45 * frame + 0.55 * colours, frame).astype(np.uint8)
    if truth is not None:
        for label in set(np.unique(truth)) - {0, VOID}:
            painted[outline(truth == label)] = 255
    return painted


def draw(plt, sequence, view, row, results, layers, protocol, out):
    """Fig. 5, table10.png: frames with the masks that were carried to them, and J&F over depth; and table10.gif."""
    frames, truths = sequence.read()
    only = View(view.name, view.size, view.side, lambda frame: {row: view.see(frame)[row]})
    how = {"total": len(frames) - 1, "desc": "drawing", "unit": "frame", "dynamic_ncols": True}
    masks = [truths[0]] + [made[row] for made in tqdm(follow(frames, truths[0], only, protocol), **how)]
    painted = [paint(*triple) for triple in zip(frames, masks, truths)]
    picked = np.linspace(0, len(frames) - 1, 6).round().astype(int)
    figure = plt.figure(figsize=(12, 6 if layers else 2.6))
    grid = figure.add_gridspec(2 if layers else 1, len(picked), height_ratios=[1, 1.6] if layers else None)
    for i, t in enumerate(picked):
        axes = figure.add_subplot(grid[0, i])
        axes.imshow(painted[t])
        axes.set_title(f"{sequence.name}, frame {t}" if i == 0 else f"frame {t}", fontsize="small")
        axes.axis("off")
    if layers:
        draw_depth(figure.add_subplot(grid[1, :]), results, layers)
    words = f"Figure 5: the first mask, carried along by {row} at {view.name} (white: the truth)"
    figure.suptitle(words, fontsize="medium")
    figure.tight_layout()
    figure.savefig(out / "table10.png", dpi=110)
    small = lambda frame: squash(frame, *(max(round(side * min(240 / len(frame), 1)), 1) for side in frame.shape[:2]))
    truth = [small(paint(frame, mask)) for frame, mask in zip(frames, truths)]
    data.write_gif(out / "table10.gif", [[("truth", truth), (row, [small(x) for x in painted])]], n_prompt=1)


def draw_depth(axes, results, layers):
    """J&F over depth, a colour for each resolution: the model's layers with their 95 % interval, floors and ceiling."""
    for i, (view, rows) in enumerate(results.items()):
        colour = f"C{i}"
        for model, line in ((OURS, "-"), (UNTRAINED, "--")):
            mean, low, high = zip(*[over_objects(rows[f"{model}, layer {l}"])[0] for l in layers])
            axes.plot(layers, mean, line, marker="o", markersize=3, color=colour, label=f"{model}, {view} pixels")
            if model == OURS and None not in low:
                axes.fill_between(layers, low, high, color=colour, alpha=0.15)
        for row, line in ((PATCHES, "-."), (COLOURED, (0, (1, 4))), (CEILING, ":")):
            if row not in rows:
                continue
            axes.axhline(over_objects(rows[row])[0][0], linestyle=line, color=colour, label=f"{row}, {view} pixels")
    axes.axhline(over_objects(rows[COPY])[0][0], color="grey", linewidth=0.8, label=COPY)
    words = {"xlabel": "layer (0: the embedding)", "ylabel": "J&F, %", "title": "Table 10, by layer"}
    axes.set(xticks=layers, ylim=(0, 100), **words)
    axes.legend(fontsize="x-small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


# Speed and memory
def benchmark(dim, device, side=64):
    """Carrying two labels to one frame of side x side tokens, by both forms of propagation and with a full context."""
    torch.manual_seed(0)
    keys = torch.randn(1 + VIDEOWALK.n_last, side, side, dim, device=device)
    keys /= keys.norm(dim=-1, keepdim=True)  # in place: what is freed again would hide what comes next
    labels = torch.rand(len(keys), side, side, 2, device=device)
    print(f"{side} x {side} tokens of width {dim}, {len(keys)} frames of context, {device.type}: features "
          f"{keys.nbytes / 2**20:,.0f} MiB")  # fmt: skip
    for form in (propagate, propagate_plainly):  # the first needs less memory, and the most so far is what is known
        before, seconds = train.peak_memory(device), []
        for _ in range(3):
            started = time.perf_counter()
            form(keys[-1], keys, labels, VIDEOWALK).sum().item()  # waits for a GPU
            seconds.append(time.perf_counter() - started)
        more = (train.peak_memory(device) - before) / 2**20
        print(f"{form.__name__:<20}{min(seconds):8.2f} s a frame, {more:8,.0f} MiB beside the features")


# The program
def load_views(args, protocol, device):
    """-> (views, those of raw patches alone, the view of one layer, the layers, what results depend on)."""
    if args.patches:
        return [patch_view(side, protocol, device) for side in dict.fromkeys(args.patches)], [], None, [], {}
    model, tokenizer, checkpoint = dvae.load_trained(args.checkpoint, args.tokenizer, device, args.rope_base)
    layers = probe.parse_layers(args.layer, model.config.n_layers)
    torch.manual_seed(args.seed)  # what of a figure is the architecture's, and what is the training's
    untrained = toto.Toto(model.config, model.compute_dtype).to(device).eval().requires_grad_(False)
    sides, models = list(dict.fromkeys(args.resolution)), {UNTRAINED: untrained, OURS: model}
    view_of = lambda side, models, layers: model_view(side, models, tokenizer, layers, protocol, device)
    weights = data.checksum(*(parameter.detach().cpu() for parameter in model.parameters()))
    settings = {"checkpoint": weights, "tokenizer": checkpoint["tokenizer"], "layers": layers, "seed": args.seed}
    settings |= {"rope_base": model.config.rope_base, "dtype": str(model.compute_dtype)}
    views, of_patches = ([view_of(side, some, layers) for side in sides] for some in (models, {}))
    return views, of_patches, lambda layer: view_of(sides[-1], {OURS: model}, [layer]), layers, settings


def parse_arguments():
    parser = data.make_parser(__doc__)
    add, count = parser.add_argument, data.number(int, at_least=1)
    add("--data", help="folder of DAVIS-2017, or of one sequence's frames in it (default: the built-in world)")
    add("--checkpoint", default="out/toto.pt", type=Path, help="a model of train.py")
    add("--tokenizer", type=Path, help="the model's tokenizer (default: dvae.pt beside the checkpoint)")
    words = "sides of the square that a frame is squashed to"
    add("--resolution", nargs="+", default=[128, 256], type=dvae.frame_side, help=words)
    words = "RoPE's base (default: the checkpoint's; 50,000 at 32 x 32 tokens in §4.2)"
    add("--rope-base", type=data.number(float, above=0), help=words)
    words = "mid (L // 2), a number, numbers with commas, or all; 0 is the embedding. Each needs memory for 21 frames"
    add("--layer", default="all", help=words)
    words = "videowalk: the last 20 frames, 10 places nearer than 12 tokens; dino: 7, 5, in 12 rows and columns"
    add("--protocol", default="videowalk", choices=["videowalk", "dino"], help=words)
    words = "raw patches of so many pixels in place of a model, whose flags are not used; the short side is DINO's 480"
    add("--patches", nargs="+", type=int, choices=[4, 8, 16, 32], help=words)
    add("--clips", type=count, default=20, help="how many clips of the world")
    add("--benchmark", action="store_true", help="no table: time and memory of propagation over 64 x 64 tokens")
    add("--out", default="out/table10", type=data.output_folder, help="folder for results and pictures")
    return parser.parse_args()


def main():
    args = parse_arguments()
    protocol, device = {p.name: p for p in (VIDEOWALK, DINO)}[args.protocol], data.pick_device(args.device)
    if args.benchmark:
        return benchmark(toto.SIZES["large"].dim, device)
    plt = data.pyplot()
    sequences = davis_sequences(args.data) if args.data else world_sequences(args.clips, 256)
    views, of_patches, view_of_layer, layers, settings = load_views(args, protocol, device)
    settings["data"] = str(args.data and Path(args.data).absolute())
    results = run_all(sequences, views, protocol, settings, args.out)
    if not args.data:  # what could be reached: the same clips, the objects told apart by colour
        coloured = run_all(world_sequences(args.clips, 256, n_colours=2), of_patches, protocol, settings, args.out)
        for view, rows in coloured.items():
            results[view][COLOURED] = rows[PATCHES]
    row, view, is_scored = PATCHES, views[-1], any(results.values())
    if is_scored:
        data.write_json(report(results, layers, sequences, settings, protocol), args.out / "table10.json")
        print_table(results, layers)
    if layers:
        layer = int(peak(results[view.name], OURS).rpartition(" ")[2]) if is_scored else middle(layers)
        row, view = f"{OURS}, layer {layer}", view_of_layer(layer)  # of the model no more than what is drawn
    draw(plt, sequences[0], view, row, results, layers if is_scored else [], protocol, args.out)
    files = ["table10.json"] * is_scored + ["table10.png", "table10.gif"]
    print("wrote " + ", ".join(str(args.out / name) for name in files))


if __name__ == "__main__":
    data.run(main)
