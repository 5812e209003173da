"""Images and videos to token sequences (§3.3, §3.4, Table 2), and the small built-in world that stands in for them.

    media -> frames      read_frames: resize the short side to R pixels, keep every 4th frame (§3.4)
    frames -> tokens     tokenize: crop, encode with the dVAE, store codes in a token folder
    tokens -> sequences  Mixture: sources mixed by weight (§3.3), [start] + F frames in raster order + [end] (§3.4)

    python data.py MEDIA... --out tokens/NAME      tokenize files or folders of images and videos once for all;
                                                   run again, it resumes

A token folder holds numbered shards, each an array NNNNN.npy of uint16 codes (frames, h, w) and an index NNNNN.json of
the clips in it (name, number of frames, labels), and meta.json, which names the tokenizer, the resolution and the
stride it was stored at. An image is a clip of one frame; everything downstream treats the two alike, save the start
token.

Only the program at the end of the file loads a tokenizer; all functions are handed one, and need no more of it than
`encode`, `grid`, `fingerprint`, `config.vocab_size` and `compute_dtype`. The last section has what every
program of this project needs and no paper mentions: processes, stopping and resuming, files, errors, flags.
Shape letters: F frames, R pixels a side, h and w codes, T tokens.
"""

import argparse
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from queue import Queue
from threading import Thread

try:
    import fcntl
except ImportError:  # Windows, where one process alone takes on jobs
    fcntl = None

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from toto import END, FIRST_CODE, IMAGE_START, VIDEO_START


# The built-in world. It stands in for ImageNet and Kinetics on a laptop: its clips are drawn in milliseconds and come
# with labels, masks and positions, so that everything that trains or measures runs without a download.

# Its names as a source: moving shapes, pairs of a frame and its mask (A.8), and single images.
WORLD, WORLD_MASKS, WORLD_IMAGES = "world", "world-masks", "world-images"
WORLD_CLIPS, N_WORLD_IMAGES = 1600, 6400  # how many of them one trains on
HELD_OUT = 0.05  # share of the clips of any source that is kept for validation
SHAPES = {"I": ["1111"], "L": ["111", "100"], "S": ["011", "110"], "T": ["111", "010"]}  # of four cells each
MOTIONS = ("up left", "up right", "down left", "down right")  # the moving object's step after the last frame
COLOURS = ((230, 40, 40), (60, 170, 250), (240, 220, 40))


@dataclass
class WorldClip:
    frames: np.ndarray  # uint8 (F, R, R, 3)
    without: np.ndarray  # the same, but for the moving object
    labels: dict  # {"shape": one of SHAPES, "motion": one of MOTIONS}, of the moving object
    resting_shape: str
    masks: np.ndarray  # bool (F, R, R): where the moving object can be seen
    objects: np.ndarray  # bool (F, R, R): where any object is
    positions: np.ndarray  # float (F, 2): its centre (x, y) in pixels, hidden or not


def world_ground(resolution):
    """What lies behind all objects, float32 (R, R, 3): redder to the right and greener towards the bottom.

    No two places look the same, so that a code of the ground says where it is: a model that knows positions in the
    flat sequence alone could hardly see the walls.
    """
    shade = 25 + 165 * (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
    return np.stack(np.broadcast_arrays(shade[None, :], shade[:, None], np.float32(110)), axis=-1)


def world_clip(index, n_frames=16, resolution=48, seed=0):
    """Clip number `index` of the moving-shapes world: always the same for the same arguments.

    The board has 6 x 6 cells, one code each at the default resolution. There are two pieces of four cells: one rests;
    the other moves one cell a frame both across and down, in front or behind, and bounces off the walls. Both are drawn
    from the same shapes and colours, so that only motion tells which is which, and nothing else which way it goes. Four
    frames decide the next. No motion repeats within 16 frames, or copying would look like prediction: no piece is as
    wide as it is high, so the two directions have different periods.
    """
    rng = np.random.default_rng([seed, index])
    t, names = np.arange(n_frames + 1), list(SHAPES)
    shapes, colours = rng.choice(names, 2), rng.permutation(COLOURS).astype(np.uint8)
    boards = np.zeros((2, n_frames, 6, 6), dtype=bool)  # the cells of the resting and of the moving object
    for board, name, speed in zip(boards, shapes, (0, 1)):
        piece = np.rot90([[cell == "1" for cell in row] for row in SHAPES[name]], rng.integers(4))
        # To and fro between the walls, a triangle wave: the object's first row and column at each time.
        turns = 6 - np.array(piece.shape)[:, None]
        y, x = turns - abs((rng.integers(120, size=(2, 1)) + speed * t) % (2 * turns) - turns)  # (F + 1,) each
        for f in range(n_frames):
            board[f, y[f] : y[f] + piece.shape[0], x[f] : x[f] + piece.shape[1]] = piece
    centre = np.stack((x[:-1] + piece.shape[1] / 2, y[:-1] + piece.shape[0] / 2), axis=1)  # of the moving one, in cells
    motion = MOTIONS[2 * (y[-1] > y[-2]) + (x[-1] > x[-2])]  # y points down

    cell, ground = np.arange(resolution) * 6 // resolution, world_ground(resolution).round().astype(np.uint8)
    resting, moving = boards[:, :, cell][..., cell]  # each (F, R, R)
    seen = moving & ~resting if rng.integers(2) else moving  # behind or in front
    without = np.where(resting[..., None], colours[0], ground)
    frames, labels = np.where(seen[..., None], colours[1], without), {"shape": str(shapes[1]), "motion": motion}
    return WorldClip(frames, without, labels, str(shapes[0]), seen, moving | resting, centre * resolution / 6)


def world_pairs(index, n_frames=16, resolution=48):
    """A.8's fine-tuning for prompts: frames (F, R, R, 3) of which every second one answers the one before.

    The question is a frame of a clip of its own, the answer where its objects are: a mask, painted in the world's own
    colours, which a tokenizer of the world can draw.
    """
    frames, ground = [], world_ground(resolution)
    for k in range(-(-n_frames // 2)):
        clip = world_clip(index * n_frames + k, 1, resolution, seed=1)
        answer = np.where(clip.objects[0][..., None], COLOURS[0], ground).round().astype(np.uint8)
        frames += [clip.frames[0], answer]
    return np.stack(frames[:n_frames])


# Media -> frames.

IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
VIDEO_TYPES = {".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp", ".ogv"}


def find_media(root):
    """[image files, video files] below a folder (or the file itself), each in the order of their paths.

    Links are followed, hidden files are not. Raises ValueError where there is nothing to read.
    """
    root = Path(root)
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder")
    files = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names]
    is_hidden = lambda path: any(part.startswith(".") for part in path.relative_to(root).parts)
    files = [root] if root.is_file() else sorted(path for path in files if not is_hidden(path))
    media = [[path for path in files if path.suffix.lower() in types] for types in (IMAGE_TYPES, VIDEO_TYPES)]
    if not any(media):
        raise ValueError(f"{root}: no images or videos here ({', '.join(sorted(IMAGE_TYPES | VIDEO_TYPES))})")
    return media


def read_frames(path, resolution, stride=4):
    """Yield every stride-th frame of a video or image as uint8 (H, W, 3), upright, its short side `resolution` pixels.

    §3.4: "resize it such that its shortest size is R pixels" and "sample every 4 frames". Raises ValueError where the
    file cannot be decoded or has no frames.
    """
    decode = decode_image if Path(path).suffix.lower() in IMAGE_TYPES else decode_video
    n_frames = 0
    try:
        for frame in decode(path, resolution, stride):
            yield frame
            n_frames += 1
    except Exception as error:  # whatever a damaged file makes a decoder raise
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR):
            raise  # not the file's fault: it must not be left out for good
        raise ValueError(f"{path}: cannot be read as an image or a video") from error
    if n_frames == 0:
        raise ValueError(f"{path}: has no frames")


def decode_image(path, resolution, stride):
    """The frames of an image file; several for what is animated."""
    with Image.open(path) as image:
        # Only these are animated; further pictures in a JPEG are previews.
        n_frames = getattr(image, "n_frames", 1) if image.format in ("GIF", "WEBP", "PNG") else 1
        for i in range(0, n_frames, stride):
            image.seek(i)
            yield np.asarray(ImageOps.cover(upright_rgb(image), (resolution, resolution)))  # bicubic


def decode_video(path, resolution, stride):
    """The frames of a video file, by ffmpeg in a process of its own.

    It drops, rotates and scales frames there, so that only what is kept comes through the pipe, and names the size of
    each in a PPM header. Every stored frame counts once, whatever its time stamp (-fps_mode passthrough). A damaged
    file fails (-xerror), where ffmpeg would rather invent what is missing. A playlist that calls itself a video cannot
    make it open a network address (-protocol_whitelist).
    """
    keep = f"select=not(mod(n\\,{stride}))"
    scale = f"scale={resolution}:{resolution}:force_original_aspect_ratio=increase:flags=bicubic"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-xerror", "-protocol_whitelist", "file"]
    command += ["-i", f"file:{path}", "-an", "-vf", f"{keep},{scale}", "-fps_mode", "passthrough"]
    command += ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1"]
    # In a session of its own, or a Ctrl-C would kill it while this program still finishes its work.
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(command, **how) as process:
        try:
            while process.stdout.readline():  # "P6"
                width, height = map(int, process.stdout.readline().split())
                process.stdout.readline()  # "255"
                pixels = process.stdout.read(3 * width * height)
                yield np.frombuffer(pixels, dtype=np.uint8).reshape(height, width, 3)
            if process.wait() < 0:
                raise OSError(errno.EINTR, "ffmpeg was killed", str(path))
            if process.returncode:
                raise ValueError(f"ffmpeg ended with status {process.returncode}")
        finally:
            process.kill()


def upright_rgb(image):
    """Any Pillow image as RGB: EXIF orientation applied, transparency laid on white, 16-bit values scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def crop(frame, resolution, place=(0.5, 0.5)):
    """§3.4: R x R of a frame (H, W, 3) whose short side is R, at a place (down, across) from 0 to 1."""
    top, left = (round(share * (side - resolution)) for share, side in zip(place, frame.shape))
    return frame[top : top + resolution, left : left + resolution]


# Frames -> tokens.

# A shard is the unit of work: what processes share out among themselves, and what a stop can lose. So it is small.
IMAGES_PER_SHARD, VIDEOS_PER_SHARD = 512, 16
NPY_HEADER = 128  # bytes before the data in a .npy file of numpy's format 1.0


@dataclass
class Item:
    """Something to tokenize: a media file, or a clip of the world. Nothing is read before `read` is called."""

    name: str  # relative to the folder it came from
    read: callable  # () -> ({task: class}, iterable of frames (H, W, 3) whose short side is R)


def in_shards(items, size=VIDEOS_PER_SHARD):
    """Items as lists of a shard's size, in their order."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def media_shards(root, resolution, stride):
    """The shards of a folder, each a list of Items. A file in a sub-folder has its name as a class."""
    root, shards = Path(root), []
    for files, size in zip(find_media(root), (IMAGES_PER_SHARD, VIDEOS_PER_SHARD)):
        items = []
        for path in files:
            name = path.relative_to(root) if path != root else Path(path.name)
            labels = {"class": name.parts[0]} if len(name.parts) > 1 else {}
            read = lambda path=path, labels=labels: (labels, read_frames(path, resolution, stride))
            items.append(Item(name.as_posix(), read))
        shards += in_shards(items, size)
    return shards


def world_shards(indices, resolution, n_frames=16, name=WORLD):
    """The shards of the built-in world's clips, pairs or images with these indices.

    One frame does not tell what moves, so an image has the resting object alone. Its shape is its class: what is there,
    wherever it is and however it is turned, as in ImageNet.
    """

    def read(index):
        if name == WORLD_MASKS:
            return {}, world_pairs(index, n_frames, resolution)
        clip = world_clip(index, n_frames, resolution)
        if name == WORLD_IMAGES:
            return {"shape": clip.resting_shape}, clip.without
        return clip.labels, clip.frames

    return in_shards([Item(f"{name}-{n_frames}/{index:07d}", lambda index=index: read(index)) for index in indices])


def checksum(*contents):
    """What the settings of a run know of weights, ids (as arrays) and labels (for JSON): paths and counts may lie."""
    total = 0
    for x in contents:
        is_array = isinstance(x, (np.ndarray, torch.Tensor))
        total = zlib.crc32(np.ascontiguousarray(x) if is_array else json.dumps(x).encode(), total)
    return total


def gather_frames(items, count, resolution, seed=0, per_item=16, quiet=False):
    """Up to `count` frames (N, R, R, 3) in memory, at most per_item of an item: what a tokenizer trains on."""
    rng, frames, skipped = np.random.default_rng(seed), [], {}
    total = min(count, per_item * len(items))
    with tqdm(total=total, desc="reading frames", unit="frame", dynamic_ncols=True, disable=quiet) as bar:
        for i in rng.permutation(len(items)):
            place = rng.random(2)
            try:
                new = [crop(frame, resolution, place) for frame in islice(items[i].read()[1], per_item)]
            except ValueError as error:
                skipped[items[i].name] = str(error)
                continue
            frames += new
            bar.update(len(new))
            if len(frames) >= count:
                break
    if not quiet:
        report_skipped(skipped)
    if not frames:
        raise ValueError("none of the media files could be read")
    return np.stack(frames[:count])


def report_skipped(skipped):
    if skipped:
        names = ", ".join(list(skipped)[:5]) + (", ..." if len(skipped) > 5 else "")
        print(f"skipped {len(skipped)} file(s) that cannot be read: {names}", file=sys.stderr)


def tokenize(shards, out, tokenizer, resolution, stride, crops=1, source=""):
    """Encode the shards into the token folder `out`, resuming an earlier call; processes share the work.

    crops = 1 takes the centre of every frame; more take that many places at random, the same for all frames of a clip
    (§3.4: "a random crop of R x R x T"), and THREE those of §4.3, each stored as a clip of its own. Returns the number
    of this process's clips. Raises ValueError where `out` holds anything else.
    """
    out = Path(out)
    meta = {"source": str(source), "resolution": resolution, "stride": stride, "crops": crops}
    meta |= {"grid": tokenizer.grid(resolution)}
    meta |= {"tokenizer": tokenizer.fingerprint(), "vocab_size": tokenizer.config.vocab_size}
    meta |= {"precision": str(tokenizer.compute_dtype).removeprefix("torch.")}  # rounding may move a code in a hundred
    if (out / "meta.json").exists():
        check_same(out, json.loads((out / "meta.json").read_text()), meta, "use another folder")
    ours = re.compile(r"(meta|\d+)\.(json|npy)(\.\d+\.tmp)?")
    for path in out.iterdir() if out.exists() else ():
        if not ours.fullmatch(path.name):
            raise ValueError(f"{out}: holds {path.name}, which is none of a token folder's files; use another folder")
    write_json({**meta, "shards": len(shards)}, out / "meta.json")

    mine = range(rank(), len(shards), world_size())
    todo = [i for i in mine if not is_finished(out, i, shards[i])]
    n_items, n_frames = sum(len(shards[i]) for i in todo), 0
    with tqdm(total=n_items, desc="tokenizing", unit="file", dynamic_ncols=True, disable=not todo) as bar:
        for i in todo:
            codes, index = encode_shard(shards[i], tokenizer, resolution, crops, bar)
            (out / f"{i:05d}.json").unlink(missing_ok=True)  # an index of other files than these
            with atomic_open(out / f"{i:05d}.npy") as file:
                np.save(file, codes)
            write_json(index, out / f"{i:05d}.json")  # last: a shard with an index is finished
            n_frames += len(codes)
            bar.set_postfix_str(f"{n_frames / max(bar.format_dict['elapsed'], 1e-9):.0f} frames/s")
    finished = [json.loads((out / f"{i:05d}.json").read_text()) for i in mine]
    report_skipped({name: why for index in finished for name, why in index["skipped"].items()})
    return sum(len(index["names"]) for index in finished)


def read_ahead(items, n_items=4, n_frames=64):
    """Yield (item, iterator of (labels, frame)) in order, while threads decode the next n_items.

    Decoding then overlaps with encoding. Each thread waits when it is n_frames ahead, so that memory stays bounded for
    videos of any length. What an item's reader raises is raised by its iterator.
    """

    def read(item, entries):
        try:
            labels, frames = item.read()
            for frame in frames:
                entries.put((labels, frame))  # waits while n_frames are in the queue
            entries.put(None)
        except Exception as error:
            entries.put(error)

    def drain(entries):
        while (entry := entries.get()) is not None:
            if isinstance(entry, Exception):
                raise entry
            yield entry

    waiting, started = iter(items), deque()
    while True:
        for item in islice(waiting, n_items + 1 - len(started)):
            started.append((item, Queue(n_frames)))
            Thread(target=read, args=started[-1], daemon=True).start()
        if not started:
            return
        item, entries = started.popleft()
        yield item, drain(entries)


THREE = "three"  # crops at both ends and in the middle of the long side


def crop_places(name, crops):
    """Where to crop, [(down, across)] from 0 to 1: the centre, §4.3's three views, or as many random places.

    Those depend on nothing but the clip's name, so that tokenizing again gives the same folder.
    """
    if crops == THREE:
        return [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)]
    return np.random.default_rng(zlib.crc32(name.encode())).random((crops, 2)) if crops > 1 else [(0.5, 0.5)]


def encode_shard(items, tokenizer, resolution, crops, bar, batch_size=32):
    """Encode a list of Items: codes uint16 (frames, h, w), and the index of the clips in them."""
    codes, pending, clips, skipped, n_frames = [], [], [], {}, 0
    n_crops = len(crop_places("", crops))

    def encode_pending():
        if pending:
            codes.append(tokenizer.encode(np.stack(pending)).cpu().numpy().astype(np.uint16))
            pending.clear()

    for item, frames in read_ahead(items):
        first, labels = n_frames, {}
        places = crop_places(item.name, crops)
        try:
            for labels, frame in frames:
                pending += [crop(frame, resolution, place) for place in places]
                n_frames += n_crops
                if len(pending) >= batch_size:
                    encode_pending()
        except ValueError as error:
            skipped[item.name] = str(error)
        else:
            clips.append((item.name, labels, first, n_frames))
        bar.update()
    encode_pending()
    codes = np.concatenate([np.zeros((0, *tokenizer.grid(resolution)), np.uint16), *codes])
    # Frame by frame, crop by crop, as they were encoded -> clip by clip; frames of skipped items fall out.
    order = [np.arange(first, last).reshape(-1, n_crops).T.ravel() for _, _, first, last in clips]
    tasks = sorted({task for _, labels, _, _ in clips for task in labels})
    index = {
        "items": names_checksum(items),
        "names": [name for name, *_ in clips for _ in range(n_crops)],
        "lengths": [(last - first) // n_crops for *_, first, last in clips for _ in range(n_crops)],
        "labels": {task: [labels.get(task) for _, labels, _, _ in clips for _ in range(n_crops)] for task in tasks},
        "skipped": skipped,
    }
    return codes[np.concatenate([np.zeros(0, int), *order])], index


def names_checksum(items):
    """A number that tells whether a stored shard is of these files."""
    return zlib.crc32("\n".join(item.name for item in items).encode())


def is_finished(out, i, items):
    path = out / f"{i:05d}.json"
    return path.exists() and json.loads(path.read_text())["items"] == names_checksum(items)


# Tokens -> sequences.
class Tokens:
    """A token folder, opened for reading. Clip i has `length[i]` frames, the name `names[i]` and labels[task][i]."""

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            shards = [json.loads((self.folder / f"{i:05d}.json").read_text()) for i in range(self.meta["shards"])]
        except FileNotFoundError as error:
            name = Path(error.filename).name
            raise ValueError(f"{folder}: not a finished token folder ({name} is missing)") from None
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder}: not a token folder of data.py ({error})") from None
        self.names = [name for shard in shards for name in shard["names"]]
        tasks = sorted({task for shard in shards for task in shard["labels"]})
        of_shard = lambda shard, task: shard["labels"].get(task, len(shard["names"]) * [None])
        self.labels = {task: [label for shard in shards for label in of_shard(shard, task)] for task in tasks}
        lengths = [np.array(shard["lengths"], dtype=np.int64) for shard in shards]
        h, w = self.meta["grid"]
        for i, length in enumerate(lengths):
            path = self.folder / f"{i:05d}.npy"
            if not path.exists() or path.stat().st_size != NPY_HEADER + 2 * h * w * length.sum():
                raise ValueError(f"{path}: is missing or damaged; remove its .json too and tokenize again")
        self.length = np.concatenate(lengths)
        self.start = np.concatenate([np.cumsum(l) - l for l in lengths])  # in frames from the shard's first
        self.shard = np.repeat(np.arange(len(shards)), [len(l) for l in lengths])
        if not len(self.length):
            raise ValueError(f"{folder}: holds no clips; could none of the media files be read?")

    def __len__(self):
        return len(self.length)

    def step(self, stride):
        """How many stored frames to advance for one frame at `stride` (§3.4: "sample every 4 frames")."""
        stored = self.meta["stride"]
        if stride % stored and self.length.max() > 1:
            words = f"was stored at stride {stored}, which cannot give stride {stride}; ask for a multiple of {stored}"
            raise ValueError(f"{self.folder}: {words}")
        return max(stride // stored, 1)

    def codes(self, clip, first=0, n_frames=None, step=1):
        """n_frames of a clip, from `first` on in steps, uint16 (F, h, w); past its end the last one repeats."""
        n_left = (int(self.length[clip]) - first - 1) // step + 1
        frames = np.minimum(np.arange(n_left if n_frames is None else n_frames), n_left - 1) * step
        # A plain read: no header to parse, a seventh of the time of opening a memory map, and nothing that stays in
        # memory, as a map of all that was ever read through it would.
        path = self.folder / f"{self.shard[clip]:05d}.npy"
        h, w = self.meta["grid"]
        offset = NPY_HEADER + 2 * h * w * int(self.start[clip] + first)
        stored = np.fromfile(path, dtype=np.uint16, count=int(frames[-1] + 1) * h * w, offset=offset)
        return stored.reshape(-1, h, w)[frames]


def is_held_out(names, share=HELD_OUT):
    """Which clips are for validation, bool (N,): about `share` of them, and at least one of several.

    A hash of the name decides, so that a clip stays on its side when others are added.
    """
    place = np.array([int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in names])
    held_out = place < share
    if share > 0 and held_out.all() or not held_out.any():
        held_out = (place == place.min()) & (len(set(names)) > 1) & (share > 0)
    return held_out


def to_sequence(codes, is_video):
    """§3.4: codes (F, h, w) -> ids int64 (F·h·w + 2,): [1] for a video or [3] for images, raster scan, [2]."""
    start = VIDEO_START if is_video else IMAGE_START
    return np.concatenate(([start], codes.astype(np.int64).ravel() + FIRST_CODE, [END]))


class Source:
    """The sequences of one token folder: of its training clips, or of the held-out ones.

    §3.4 samples every 4th frame. A folder stored at a finer stride holds 4 (`step`) such samplings of each video, its
    phases, each starting one frame later. Not in the paper: a video of n stored frames gives max(n // F, 1) windows, so
    that a pass shows each stored frame about once. Training cycles through the phases, over windows and passes;
    validation uses the first only. F images make a sequence. Short videos repeat their last frame.
    """

    def __init__(self, tokens, n_frames, held_out=False, share=HELD_OUT, step=1):
        self.tokens, self.n_frames, self.step = tokens, n_frames, step
        self.n_phases = 1 if held_out else step
        clips = np.flatnonzero(is_held_out(tokens.names, share) == held_out)
        self.images, self.videos = clips[tokens.length[clips] == 1], clips[tokens.length[clips] > 1]
        shown = -(-tokens.length[self.videos] * self.n_phases // step)  # frames of these phases, rounded up
        self.windows = np.cumsum(np.maximum(shown // n_frames, 1))  # up to each video
        self.n_videos = int(self.windows[-1]) if len(self.windows) else 0
        self.n_images = max(len(self.images) // n_frames, min(len(self.images), 1))

    def __len__(self):
        return self.n_videos + self.n_images

    def sequence(self, k, images, epoch=0, rng=None):
        """Sequence k of pass `epoch` -> (ids (F·h·w + 2,), how many of its frames come before the repeats).

        `images` is the pass's order of images; rng shifts the windows.
        """
        if k >= self.n_videos:
            k = (k - self.n_videos) * self.n_frames
            picked = images[np.arange(k, k + self.n_frames) % len(images)]  # fewer than F images start over
            codes = np.concatenate([self.tokens.codes(i) for i in picked])
            return to_sequence(codes, is_video=False), min(len(images), self.n_frames)
        video = np.searchsorted(self.windows, k, side="right")
        clip, window = self.videos[video], k - (self.windows[video - 1] if video else 0)
        phase = (k + epoch) % min(self.n_phases, self.tokens.length[clip])
        length = -(-(self.tokens.length[clip] - phase) // self.step)  # of the phase, in frames
        first = window // self.n_phases * self.n_frames
        if rng is not None:
            first += rng.integers(-self.n_frames // 2, self.n_frames // 2 + 1)
        first = phase + self.step * np.clip(first, 0, max(length - self.n_frames, 0))
        codes = self.tokens.codes(clip, first, self.n_frames, self.step)
        return to_sequence(codes, is_video=True), min(length, self.n_frames)


class Mixture:
    """Training sequences from several sources, mixed by weight (§3.3), as a pure function of the seed and the index.

    There is no state to save: a run that resumes, or that changes its number of processes, sees at every step what an
    undisturbed run would have seen.
    """

    def __init__(self, sources, weights, seed=0):
        self.sources, self.seed = sources, seed
        shares = [Fraction(weight).limit_denominator(10_000) for weight in weights]
        shares = [share / sum(shares) for share in shares]
        period = min(math.lcm(*(share.denominator for share in shares)), 10_000)
        # Weights are kept by a fixed schedule, not by chance: each slot of its period goes to the source that is
        # furthest behind, so that no window of any length is off by more than about one sequence per source.
        given = np.zeros(len(sources), dtype=np.int64)
        self.schedule, self.given = [], []
        for slot in range(period):
            self.given.append(given.copy())
            behind = [float(share * (slot + 1)) - n for share, n in zip(shares, given)]
            self.schedule.append(int(np.argmax(behind)))
            given[self.schedule[-1]] += 1
        self.per_period = given
        self.order = lru_cache(maxsize=2 * len(sources))(self._order)

    def _order(self, s, epoch):
        """The shuffled sequences and images of pass `epoch` over source s."""
        rng = np.random.default_rng([self.seed, s, epoch])
        return rng.permutation(len(self.sources[s])), rng.permutation(self.sources[s].images)

    def sequence(self, index):
        """Sequence number `index` of training -> (ids, which source it is from)."""
        period, slot = divmod(index, len(self.schedule))
        s = self.schedule[slot]
        draw = int(period * self.per_period[s] + self.given[slot][s])  # sequences drawn from s before this one
        epoch, k = divmod(draw, len(self.sources[s]))
        order, images = self.order(s, epoch)
        rng = np.random.default_rng([self.seed, s, epoch, k])
        return self.sources[s].sequence(order[k], images, epoch, rng)[0], s


def is_token_folder(path):
    """Whether a path is a token folder, and not a folder of media."""
    meta = Path(path) / "meta.json"
    return meta.exists() and '"tokenizer"' in meta.read_text()


def is_world(path):
    """Whether a path is a name of the built-in world, and not a folder that is called so."""
    return str(path) in (WORLD, WORLD_MASKS, WORLD_IMAGES) and not Path(path).exists()


def shards_of(path, resolution, stride, n_frames):
    """The shards of a path; is_world() names stand for the built-in clips, whose frames count as kept ones.

    Those have 16 frames at least, so that shorter sequences are windows of them.
    """
    if is_world(path) and str(path) == WORLD_IMAGES:
        return world_shards(range(N_WORLD_IMAGES), resolution, 1, WORLD_IMAGES)
    if is_world(path):
        return world_shards(range(WORLD_CLIPS), resolution, max(n_frames, 16), str(path))
    return media_shards(path, resolution, stride)


def tokenize_cached(source, shards, cache, tokenizer, resolution, stride, crops=1):
    """Tokenize into a folder of `cache` that is named after the source and all that its codes depend on -> Tokens."""
    settings = f"{Path(source).absolute()} {tokenizer.fingerprint()} {tokenizer.compute_dtype} {resolution} {stride}"
    settings += f" {crops}" if crops != 1 else ""
    folder = Path(cache) / f"{Path(source).name}-{zlib.crc32(settings.encode()):08x}"
    tokenize(shards, folder, tokenizer, resolution, stride, crops, Path(source).absolute())
    wait_for_all()
    return Tokens(folder)


# Pictures: the truth beside the model, as a GIF to watch and as a strip to look at.
def label_frame(frame, text, is_given):
    """Enlarge a frame to about 144 pixels, with text above it and a green border where it was given to the model."""
    image = ImageOps.scale(Image.fromarray(frame), max(144 // len(frame), 1), Image.Resampling.NEAREST)
    image = ImageOps.expand(image, 2, (0, 170, 0) if is_given else "white")
    image = ImageOps.expand(image, (0, 14, 0, 0), "white")
    ImageDraw.Draw(image).text((3, 2), text, fill="black")
    return np.asarray(image)


def lay_out(rows, n_prompt, t):
    """Frame t of each (label, frames) in each row, side by side."""
    draw = lambda label, frames: label_frame(frames[t], f"{label} {t}", t < n_prompt)
    return np.concatenate([np.concatenate([draw(*pair) for pair in row], axis=1) for row in rows], axis=0)


def write_gif(path, rows, n_prompt, fps=6):
    """An animated GIF of rows of (label, uint8 frames (F, R, R, 3)); the first n_prompt frames are marked as given."""
    pictures = [lay_out(rows, n_prompt, t) for t in range(len(rows[0][0][1]))]
    with atomic_open(path) as file:
        iio.imwrite(file, np.stack(pictures), extension=".gif", duration=1000 / fps, loop=0)


def write_strip(path, rows, n_prompt):
    """A PNG of the same with time from left to right, one line for each (label, frames)."""
    flat = [pair for row in rows for pair in row]
    columns = [lay_out([[pair] for pair in flat], n_prompt, t) for t in range(len(flat[0][1]))]
    with atomic_open(path) as file:
        Image.fromarray(np.concatenate(columns, axis=1)).save(file, format="PNG")


def pyplot():
    """matplotlib's, which the scripts of paper/ draw by, into files: on machines without a screen too."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is missing; pip install -r paper/requirements.txt") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


# What every program needs.
def rank():
    """This process's number among those that torchrun started; 0 where there is one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


PATIENT = None  # under torchrun, all processes as a group in which one may wait a day for another


def wait_for_all():
    """Let every process come to this line before any of them continues, hours later if one has media to read."""
    if dist.is_initialized():
        dist.barrier(PATIENT)


def start_processes(device):
    """Under torchrun, which starts a process per GPU (or several on a CPU), connect the processes.

    If one is lost, the next exchange of the others fails after 20 minutes, which is longer than any save, and they end.
    """
    global PATIENT
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    limit = timedelta(minutes=20)
    store, rank, n = next(dist.rendezvous("env://", timeout=limit))
    # After a restart (--max-restarts), torchrun's store still holds the addresses of dead processes (PyTorch issue
    # 135712). So rank 0 draws a new prefix for all keys. Each other rank asks for it under a key of its own, new in
    # every start, and confirms; rank 0 answers each rank's latest request until that rank has confirmed.
    prefix = request = os.urandom(8).hex()
    if rank > 0:
        store.set(f"request {rank}", request)
        prefix = store.get(request).decode()  # waits for it
        store.set(f"{prefix} {rank}", "")
    for other in range(1, n) if rank == 0 else ():
        while not store.check([f"{prefix} {other}"]):
            store.set(store.get(f"request {other}").decode(), prefix)
            time.sleep(0.01)
    backend, store = "nccl" if device.type == "cuda" else "gloo", dist.PrefixStore(prefix, store)
    dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=n)
    PATIENT = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # NCCL's barriers have no time-out of their own


def pick_device(name=None):
    """The device asked for, else the best there is; under torchrun every process has a GPU of its own, or the CPU."""
    has_mps = torch.backends.mps.is_available() and "RANK" not in os.environ
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("choose cpu, cuda or mps")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("this machine, or this build of PyTorch, has none")
        if device.type == "cuda" and (device.index is None or "LOCAL_RANK" in os.environ):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def fast_dtype(device):
    """bfloat16 where the hardware multiplies it fast, float32 elsewhere (a CPU without the instructions is slower)."""
    has_bf16 = False
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


@contextmanager
def atomic_open(path):
    """A binary file that appears under its name whole and on disk, or not at all."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides the file's own error
        if not isinstance(reason, OSError) or reason.filename:
            raise
        raise OSError(reason.errno, reason.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(value, path):
    with atomic_open(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def check_same(path, there, here, advice):
    """A run that resumes must see the same data in the same way as the one that was stopped: `here` as in `there`."""
    for what in here:
        if there.get(what) != here[what]:
            raise ValueError(f"{path}: its {what} is {there.get(what)}, here it is {here[what]}; {advice}")


def state_file(path, parts, settings, refuse=True):
    """The `resume` and `save` of `resumable_steps`, for a file with the state of `parts` {name: module or optimizer}.

    A file of other settings than these raises ValueError, or with refuse=False counts as none.
    """

    def resume():
        if not Path(path).exists():
            return 0
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            there, states, step = dict(state["settings"]), state["parts"], state["step"]
        except (OSError, MemoryError):
            raise
        except Exception as error:  # whatever a damaged or an older file makes torch raise
            if not refuse:
                return 0
            raise ValueError(f"{path} is not the state of a stopped training; remove it to start over") from error
        if not refuse and there != settings:
            return 0
        check_same(path, there, settings, "remove it to start over")
        for name, part in parts.items():
            part.load_state_dict(states[name])
        return step

    def save(done):
        if rank() == 0:
            with atomic_open(path) as file:
                states = {name: part.state_dict() for name, part in parts.items()}
                torch.save({"settings": settings, "parts": states, "step": done}, file)

    return {"resume": resume, "save": save}


def is_stop_asked(signals):
    """Whether any of the processes has received a signal: all of them must stop at the same step."""
    if world_size() == 1:
        return bool(signals)
    count = torch.tensor(len(signals), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(count)
    return count.item() > 0


def once(path, settings, work):
    """What work() returns, kept in the JSON file `path`: a second call with the same settings reads it there.

    Under torchrun all processes call it, and must do some of the work together, as a training does: then none of them
    is so late that it finds the file of this very call.
    """
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    if Path(path).exists():
        kept = json.loads(Path(path).read_text())
        check_same(path, kept["settings"], settings, "remove it, or give another --out")
        return kept["result"]
    result = work()
    if rank() == 0:
        write_json({"settings": settings, "result": result}, path)
    wait_for_all()
    return result


@contextmanager
def claimed(file, name, waits=False):
    """Whether this process alone has `name`, until the block ends; with `waits`, once nobody else has it.

    A lock on one byte of an open file. The system gives it up when its process dies, whatever the cause, so that
    nothing stays claimed; and when the process closes this file anywhere, which nothing may do inside the block.
    """
    if fcntl is None:
        yield True
        return
    byte, is_mine = zlib.crc32(name.encode()), True  # should two names share a byte, one waits for the other
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB), 1, byte)
    except (BlockingIOError, PermissionError):
        is_mine = False
    except OSError as error:
        raise ValueError(f"{file.name}: its file system has no locks; give another --out") from error
    try:
        yield is_mine
    finally:
        if is_mine:
            fcntl.lockf(file, fcntl.LOCK_UN, 1, byte)


CALLS, HELPS_WITH = count(), None  # of share_jobs; in a helper, with which of them


def share_jobs(folder, jobs, device, n=None):
    """{name: work()} for `jobs` {name: work}, which processes share: unlike threads, they do not wait for one another.

    What a work() returns it must keep in a file, as `once` does, and find there when it is called again. On a CPU the
    program starts helpers, until there are n processes or as many as PyTorch would take threads; at most 8, so as not
    to fill the memory. A helper runs the program from the top, in silence, finds all that comes before there already,
    and ends here. Should it fail, this process will come to the same job, and say why. Under torchrun its processes
    share the jobs; where they are connected (`start_processes`), they do each job together. What is claimed stands in
    `folder`/lock.
    """
    call, results, n_threads = next(CALLS), {}, torch.get_num_threads()
    can_start = device.type == "cpu" and fcntl is not None and "WORLD_SIZE" not in os.environ and HELPS_WITH is None
    n = min(n or n_threads, len(jobs), 8) if can_start else 1
    if dist.is_initialized() or n == 1 and HELPS_WITH is None and "WORLD_SIZE" not in os.environ:
        return {name: work() for name, work in jobs.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    helpers, says_so = start_helpers(n - 1, call, max(n_threads // n, 1)) if n > 1 else [], True
    try:
        with open(Path(folder) / "lock", "w") as lock:
            while len(results) < len(jobs):
                before = len(results)
                for name in jobs:
                    with claimed(lock, str(name)) as is_mine:
                        if is_mine and name not in results:
                            results[name] = jobs[name]()
                if len(results) == before:
                    if says_so:
                        print("waiting for what other processes have begun", file=sys.stderr)
                    says_so = False
                    time.sleep(1)
        for helper in helpers:
            helper.join(5)  # it sees the same, and ends
    finally:
        for helper in helpers:
            helper.terminate()
        for helper in helpers:
            helper.join(60)  # one in the middle of a training first saves
            helper.kill()
        torch.set_num_threads(n_threads)
    if call == HELPS_WITH:
        sys.exit()
    return {name: results[name] for name in jobs}


def start_helpers(n, call, n_threads):
    """n processes, which on Linux end with this one even where it is killed; elsewhere they would do what is left."""
    torch.set_num_threads(n_threads)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # until a helper has imported all
    context = torch.multiprocessing.spawn(help_with, (call, n_threads), nprocs=n, join=False)
    signal.signal(signal.SIGINT, ignored)
    return context.processes


def help_with(_, call, n_threads):
    global HELPS_WITH
    HELPS_WITH = call
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(n_threads)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    run(sys.modules["__main__"].main)


def resumable_steps(title, n_steps, resume=None, save=None, save_every=None, after_save=None, start=0):
    """Yield (step, progress bar) for every step of a training that can be stopped at any moment and resumed exactly.

    resume() restores what an earlier run saved and returns its step, or 0: then steps begin at `start`. save(done) is
    called after every `save_every` steps (or every minute where that is None), after the last, and when Ctrl-C or
    SIGTERM asks to stop: the step is finished and saved first. A second signal kills. after_save(done) may fail without
    any loss; where a run ended between the two, the next one makes up for it. Without `save` there is only a bar.
    """
    first = (resume() if resume else 0) or start
    signals, handlers, saved = [], {}, time.time()
    is_due = lambda done: done >= n_steps or (done % save_every == 0 if save_every else time.time() - saved > 60)

    def receive(number, _):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; once more stops at once, without saving\n")  # print may be at work

    if save:
        handlers = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if after_save and first > start and is_due(first):
            after_save(first)
        how = {"unit": "step", "dynamic_ncols": True, "disable": rank() > 0}
        with tqdm(total=n_steps, initial=first, desc=title, **how) as bar:
            for step in range(first, n_steps):
                yield step, bar
                bar.update()
                is_stopped = save and is_stop_asked(signals)
                if not save or not (is_stopped or is_due(step + 1)):
                    continue
                save(step + 1)
                saved = time.time()
                if is_stopped:
                    wait_for_all()  # where one process ends, torchrun ends the others, which may still write
                    bar.close()
                    if rank() == 0:
                        print(f"stopped and saved at step {step + 1:,}; the same command resumes there")
                    raise KeyboardInterrupt
                if after_save:
                    after_save(step + 1)
            if first < n_steps and save and is_stop_asked(signals):  # it came during the last save or after it
                raise KeyboardInterrupt
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def keep_freed_memory():
    """Keep up to 32 MB of freed memory at a time, which makes a training step on a CPU 1.2 times as fast.

    glibc gives every large tensor's memory back to the kernel, and then pays for each page of the next one anew.
    """
    try:
        libc, trim_threshold, mmap_threshold = ctypes.CDLL("libc.so.6"), -1, -3  # the numbers are those of malloc.h
        libc.mallopt(mmap_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):  # another system, another allocator
        pass


def run(main):
    """Run a program. Errors that its user can mend end in one line and status 2; python -X dev shows the traceback."""
    keep_freed_memory()
    try:
        main()
        wait_for_all()  # the first process may still write
        if dist.is_initialized():
            dist.destroy_process_group()  # not after an error: the others would have to take part
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError, FloatingPointError) as error:
        from_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        is_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if sys.flags.dev_mode or isinstance(error, RuntimeError) and not (from_compiler or is_memory):
            raise
        if is_memory:
            error = "out of memory; try a smaller --micro-batch, --batch, --samples or --frames"
        if from_compiler:
            error = "torch.compile failed, for which a C++ compiler is needed ($CXX, or g++); leave out --compile"
        if isinstance(error, OSError) and error.filename:
            error = f"{error.filename}: {error.strerror.lower()}"
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with the lines as they are, and the defaults but for flags whose own text says what happens without."""

    def _get_help_string(self, action):
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """What is wrong with a flag is said as everything else is: in one line."""

    def error(self, message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def make_parser(description, has_seed=True):
    """A parser with the flags that all programs have."""
    parser = Parser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    if has_seed:
        parser.add_argument("--seed", type=number(int, at_least=0), default=0, help="of everything random")
    return parser


def output_folder(text):
    """For argparse: a folder to write to. It is made when something is written, so that no mistake leaves it empty."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file")
    return Path(text)


def number(kind, at_least=-math.inf, above=-math.inf, multiple_of=None):
    """For argparse: a finite number of a kind, int or float, within bounds."""

    def parse(text):
        value = kind(text)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError("must be finite")
        if value < at_least or value <= above:
            words = f"at least {at_least}" if value < at_least else f"above {above}"
            raise argparse.ArgumentTypeError(f"must be {words}")
        if multiple_of and value % multiple_of:
            raise argparse.ArgumentTypeError(f"must be a multiple of {multiple_of}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def main():
    import dvae  # the one exception to the direction of imports: only this program loads a tokenizer

    parser = make_parser(__doc__, has_seed=False)
    add, count = parser.add_argument, number(int, at_least=1)
    add("media", nargs="+", help="files, or folders, of images and videos")
    add("--out", required=True, type=Path, help="the token folder to write")
    add("--tokenizer", default="out/dvae.pt", help="a tokenizer of dvae.py, or a folder with OpenAI's two files")
    add("--resolution", type=dvae.frame_side, default=128, help="R of §3.4, as in the training to come; tiny has 48")
    add("--stride", type=count, default=4, help="store every n-th frame of a video; training can ask for its multiples")
    crops = lambda text: THREE if text == THREE else count(text)
    words = "1: the centre of each frame; more: as many random crops of each item; three: for views of videos (§4.3)"
    add("--crops", type=crops, default=1, help=words)
    args = parser.parse_args()
    device = pick_device(args.device)
    start_processes(device)
    tokenizer = dvae.load(args.tokenizer, device, fast_dtype(device))
    shards = [shard for path in args.media for shard in media_shards(path, args.resolution, args.stride)]
    source = " ".join(str(Path(path).absolute()) for path in args.media)
    n = tokenize(shards, args.out, tokenizer, args.resolution, args.stride, args.crops, source)
    if world_size() == 1 and n == 0:
        raise ValueError("none of the media files could be read")
    print(f"{args.out} holds {n:,} clips" + (f" of process {rank()}" if world_size() > 1 else ""))


if __name__ == "__main__":
    run(main)
