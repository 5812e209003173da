"""Sampling: continue, animate, prompt and imagine videos (A.8).

    python sample.py                          continue clips of the built-in world from their first frames
    python sample.py --prompt FILE            a video of yours, or an image, which starts to move
    python sample.py --prompt A B C FOLDER    examples: the frames of all files, in order, are given
    python sample.py --imagine                nothing is given but the start token
    python sample.py --frames 64              beyond the 16 frames the model has seen at once
    python sample.py --score 64               how near the truth 64 continuations come, frame by frame

Reads a checkpoint of train.py and its tokenizer. Writes to --out: sample.gif (the truth beside the continuation),
sample.png (the same as a strip, time from left to right) and sample.npy (the codes).
Shape letters: B samples, F frames, h and w codes, R pixels.
"""

import argparse
import math
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import dvae
import toto

WORLD_CLIPS = range(3_000_000, 4_000_000)  # clips that no training ever sees


def continue_video(model, codes, n_frames, window, start=toto.VIDEO_START, progress=None, **how):
    """Continue codes int64 (B, F, h, w) to n_frames frames: (B, n_frames, h, w). `how` goes to Toto.generate.

    The model has learned windows of `window` frames. Up to there a sequence simply goes on. Beyond (64 frames in A.8),
    not in the paper: at every frame boundary the oldest frame is dropped, and the start token and the kept frames are
    run afresh at their new positions, so that each frame is sampled exactly as the model would after that prompt.
    """
    B, _, h, w = codes.shape
    while codes.shape[1] < n_frames:
        kept = codes[:, -(window - 1) :]
        new = min(window, n_frames) - kept.shape[1] if codes.shape[1] < window else 1
        ids = torch.cat((kept.new_full((B, 1), start), kept.flatten(1) + toto.FIRST_CODE), dim=1)
        ids = model.generate(ids, new * h * w, progress=progress, **how)
        added = ids[:, -new * h * w :].view(B, new, h, w) - toto.FIRST_CODE
        codes = torch.cat((codes, added), dim=1)
    return codes


def world_numbers(seed, n_clips):
    return [WORLD_CLIPS[(seed * n_clips + i) % len(WORLD_CLIPS)] for i in range(n_clips)]


def read_prompts(args, checkpoint, n_clips):
    """A.8's prompts: (frames uint8 (B, F, R, R, 3), how many of them are given to the model).

    For clips of the built-in world and for one video, all of --frames, so that the truth can be shown. Of several files
    the frames that lead up to what is to be made, which has no truth then.
    """
    resolution = checkpoint["resolution"]
    if args.imagine:
        return np.zeros((n_clips, 0, resolution, resolution, 3), np.uint8), 0
    if args.prompt in ([data.WORLD], [data.WORLD_MASKS]):
        n_given = args.prompt_frames or (4 if args.prompt == [data.WORLD] else args.frames - 1)
        clips = world_numbers(args.seed, n_clips)
        items = sum(data.world_shards(clips, resolution, args.frames, args.prompt[0]), [])
        return np.stack([item.read()[1] for item in items]), n_given
    files = []
    for name in args.prompt:
        path = Path(name)
        if not path.exists():
            raise ValueError(f"--prompt {path}: no such file or folder")
        images, videos = data.find_media(path)
        files += sorted(images + videos)
    # Of several files, each gives as many frames as asked for, or an equal share of what leaves room for one more.
    share = args.prompt_frames or max((args.frames - 1) // len(files), 1)
    n_read = args.frames if len(files) == 1 else share
    read = lambda path: islice(data.read_frames(path, resolution, checkpoint["stride"]), n_read)
    frames = [data.crop(frame, resolution) for path in files for frame in read(path)]
    n_given = min(args.prompt_frames or 4, len(frames)) if len(files) == 1 else len(frames)
    return np.repeat(np.stack(frames)[None], n_clips, axis=0), n_given


def psnr(frames, truth, where=None):
    """Peak signal-to-noise ratio in dB, by the mean squared error of all clips, optionally of some pixels only."""
    error = (frames.astype(np.float32) - truth) ** 2
    error = error.mean() if where is None or not where.any() else error[where].mean()
    return 20 * math.log10(255) - 10 * math.log10(max(error, 1e-9))


def score(made, codes, truth, n_given, tokenizer, moving=None):
    """One row for each frame that the model made, against the truth, as clips × frames from made (B, F, h, w).

    psnr of the model, of repeating the last given frame, and of the truth after encoding and decoding, which no model
    can beat; with `moving` (B, F, R, R), the first two again on the pixels where the moving object is, or was in the
    last given frame, and there that frame with the object wiped off: less wrong than an object in the wrong place, so
    that only what beats it has learned to move; and the share of codes that are right, of the model and of repeating.
    """
    decode = lambda codes: tokenizer.decode(codes).cpu().numpy()
    rows, last = [], truth[:, n_given - 1]
    if moving is not None:  # most pixels are ground, so the median is its colour
        wiped = np.where(moving[:, n_given - 1, :, :, None], np.median(last, axis=(1, 2), keepdims=True), last)
    for t in range(n_given, made.shape[1]):
        model, real = decode(made[:, t]), truth[:, t]
        row = {"frame": t, "psnr": psnr(model, real), "psnr_repeat": psnr(last, real)}
        row["psnr_tokenizer"] = psnr(decode(codes[:, t]), real)
        if moving is not None:
            where = moving[:, t] | moving[:, n_given - 1]
            row |= {"psnr_moving": psnr(model, real, where), "psnr_moving_repeat": psnr(last, real, where)}
            row["psnr_moving_wiped"] = psnr(wiped, real, where)
        right = lambda guess: (guess == codes[:, t]).float().mean().item()
        rows.append(row | {"codes": right(made[:, t]), "codes_repeat": right(codes[:, n_given - 1])})
    return rows


def print_score(rows):
    columns = {
        "psnr": "PSNR", "psnr_repeat": "repeat", "psnr_tokenizer": "ceiling", "psnr_moving": "moving",
        "psnr_moving_repeat": "repeat", "psnr_moving_wiped": "wiped", "codes": "codes", "codes_repeat": "repeat",
    }  # fmt: skip
    columns = {key: title for key, title in columns.items() if key in rows[0]}
    print(
        "PSNR, and the share of codes that are right, each beside repeating the last given frame. ceiling: what the\n"
        "tokenizer alone keeps; moving: on the pixels where the moving object is, or was in the last given frame;\n"
        "wiped: that frame without the object"
    )
    print("frame" + "".join(f"{title:>10}" for title in columns.values()))
    cell = lambda key, value: f"{value:>10.1%}" if key.startswith("codes") else f"{value:>7.1f} dB"
    for row in rows:
        print(f"{row['frame']:>5}" + "".join(cell(key, row[key]) for key in columns))
    print(" mean" + "".join(cell(key, np.mean([row[key] for row in rows])) for key in columns))


def memory_rate(device):
    """Bytes a second that the device reads and writes, by copying 256 MB."""
    x, seconds = torch.ones(2**26, device=device), []
    y = torch.empty_like(x).copy_(x)
    for _ in range(5):
        started = time.perf_counter()
        y.copy_(x)
        y[-1].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * 4 * 2**26 / min(seconds)


def report_speed(model, decoder, n_samples, n_ids, n_tokens, seconds, device):
    """Tokens/s beside the floor: all weights and the cache, which fills up, unless compiled, read once a step."""
    c, itemsize = model.config, decoder.dtype.itemsize
    weights = model.count_parameters() * itemsize
    cache = 2 * n_samples * c.n_layers * c.dim * itemsize * (n_ids if decoder.compiled_step else n_ids / 2)
    rate = memory_rate(device)
    print(
        f"{n_samples * n_tokens / seconds:,.0f} tokens/s, {n_samples} samples at a time: drawing a token of each takes "
        f"{1e6 * seconds / n_tokens:,.0f} µs, and only to read weights and cache, {(weights + cache) / 1e6:,.1f} MB at "
        f"{rate / 1e9:,.0f} GB/s, {1e6 * (weights + cache) / rate:,.0f} µs"
    )


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Continue, animate, prompt or imagine a video.", formatter_class=data.HelpFormatter
    )
    add = parser.add_argument
    add(
        "--prompt",
        nargs="+",
        default=[data.WORLD],
        help="a video, an image, several of them, a folder, or world-masks (for a model trained on that)",
    )
    add(
        "--prompt-frames",
        type=data.positive,
        help="how many frames are given, of each file (default: 4; of several files an equal share of --frames)",
    )
    add("--imagine", action="store_true", help="give nothing: the model makes a whole video")
    add("--images", action="store_true", help="start as a sequence of images, for a model that has seen some")
    add("--frames", type=data.positive, default=16, help="frames in all, given and made")
    add("--samples", type=data.positive, default=4, help="how many continuations (with --score: in the pictures)")
    add("--temperature", type=float, default=1.0, help="0 always takes the most probable code")
    add("--top-k", type=int, default=0, help="draw among the k most probable codes only; 0 for all")
    add("--top-p", type=float, default=0.95, help="draw among the fewest codes that have this probability together")
    add("--score", type=data.positive, metavar="N", help="compare N continuations with the truth; also into score.json")
    add("--compile", action="store_true", help="torch.compile first, 5 to 13 s: pays for tens of thousands of tokens")
    add("--mp4", action="store_true", help="write sample.mp4 as well")
    add("--checkpoint", default="out/toto.pt", type=Path, help="a model trained by train.py")
    add("--tokenizer", type=Path, help="the model's tokenizer (default: dvae.pt beside the checkpoint)")
    add("--out", default="out", type=Path, help="folder for sample.gif, sample.png and sample.npy")
    add("--seed", type=data.natural, default=0, help="of everything random")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    args = parser.parse_args()
    if args.prompt_frames and args.prompt_frames >= args.frames:
        raise ValueError("--prompt-frames must be less than --frames")
    if not 0 <= args.temperature < math.inf or args.top_k < 0 or not 0 < args.top_p <= 1:
        raise ValueError("--temperature and --top-k must not be negative, --top-p must lie above 0 and up to 1")
    if args.imagine and (args.prompt != [data.WORLD] or args.prompt_frames):
        raise ValueError("--imagine gives nothing: leave out --prompt and --prompt-frames")
    if args.score and args.imagine:
        raise ValueError("--score: what is imagined has no truth to compare with; leave out --imagine")
    return args


def main():
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    device = data.pick_device(args.device)
    model, tokenizer, checkpoint = data.load_model(args.checkpoint, args.tokenizer, device)
    n_samples = args.score or args.samples
    truth, n_given = read_prompts(args, checkpoint, n_samples)
    if n_given >= args.frames:
        raise ValueError(f"--frames {args.frames}: the prompt gives {n_given}; ask for more, or less --prompt-frames")
    if args.score and truth.shape[1] < args.frames:
        raise ValueError(f"--score: the prompt has {truth.shape[1]} frames; give --frames as many, or fewer")
    grid = checkpoint["resolution"] // dvae.PIXELS_PER_CODE
    encode = lambda frames: torch.stack([tokenizer.encode(clip) for clip in frames])
    prompt = encode(truth[:, :n_given]) if n_given else torch.zeros(n_samples, 0, grid, grid, dtype=torch.long)
    prompt = prompt.to(device)
    if n_given:
        kept = psnr(np.stack([tokenizer.decode(codes).cpu().numpy() for codes in prompt]), truth[:, :n_given])
        warning = ": little; it was trained on other things" if kept < 18 else ""
        print(f"the tokenizer keeps {kept:.1f} dB of the given frames{warning}")
    _, _, h, w = prompt.shape
    n_new = (args.frames - n_given) * h * w
    n_ids = min(args.frames, checkpoint["frames"]) * h * w
    decoder = toto.Decoder(model, n_samples, 1 + n_ids, args.compile)
    started = time.perf_counter()
    with tqdm(total=n_new, desc="sampling", unit="token", dynamic_ncols=True) as bar:
        codes = continue_video(
            model, prompt, args.frames, checkpoint["frames"], toto.IMAGE_START if args.images else toto.VIDEO_START,
            progress=bar.update, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            generator=torch.Generator(device).manual_seed(args.seed), decoder=decoder,
        )  # fmt: skip
    codes[-1].max().item()  # waits for the device
    report_speed(model, decoder, n_samples, n_ids, n_new, time.perf_counter() - started, device)

    if args.score:
        moving = None
        if args.prompt == [data.WORLD]:
            clips = (
                data.world_clip(i, args.frames, checkpoint["resolution"]) for i in world_numbers(args.seed, n_samples)
            )
            moving = np.stack([clip.masks for clip in clips])
        rows = score(codes, encode(truth), truth, n_given, tokenizer, moving)
        print_score(rows)
        data.write_json(
            {"settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, "frames": rows},
            args.out / "score.json",
        )
        print(f"wrote {args.out / 'score.json'}")
    rows = []
    for frames, sample in list(zip(truth, codes))[: args.samples]:
        made = ("model", tokenizer.decode(sample).cpu().numpy())
        if 0 < len(frames) < args.frames:  # the truth ends before the continuation does
            rest = np.full((args.frames - len(frames), *frames.shape[1:]), 255, np.uint8)
            frames = np.concatenate((frames, rest))
        rows.append([("truth", frames), made] if len(frames) else [made])
    with dvae.atomic_open(args.out / "sample.npy") as file:
        np.save(file, codes.cpu().numpy().astype(np.uint16))
    data.write_gif(args.out / "sample.gif", rows, n_given)
    data.write_strip(args.out / "sample.png", rows, n_given)
    if args.mp4:
        data.write_video(args.out / "sample.mp4", rows, n_given)
    also = "sample.mp4, " if args.mp4 else ""
    print(f"wrote {args.out / 'sample.gif'}, {also}sample.png and sample.npy; frames given: {n_given}")


if __name__ == "__main__":
    data.run(main)
