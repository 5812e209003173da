"""Sampling: continue, animate, prompt and imagine videos (A.8).

    python sample.py                          continue clips of the built-in world from their first frames
    python sample.py --prompt FILE            a video of yours, or an image, which starts to move
    python sample.py --prompt A B C FOLDER    examples: the frames of all files, in order, are given
    python sample.py --imagine                nothing is given but the start token
    python sample.py --frames 64              beyond the frames the model has seen at once
    python sample.py --score 64               how near the truth 64 continuations come, frame by frame

Reads a checkpoint of train.py and its tokenizer. Writes to --out: sample.gif (the truth beside the continuation),
sample.png (the same as a strip, time from left to right) and sample.npy (the codes).
Shape letters: B samples, F frames, h and w codes, R pixels.
"""

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

UNSEEN = range(3_000_000, 4_000_000)  # clips of the built-in world that no training or probing ever sees


# Prompts.
def world_numbers(seed, n_clips):
    """Which clips of the built-in world a run with this seed continues."""
    return [UNSEEN[(seed * n_clips + i) % len(UNSEEN)] for i in range(n_clips)]


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
        images, videos = data.find_media(name)
        files += sorted(images + videos)
    # Of several files, each gives as many frames as asked for, or an equal share of what leaves room for one more.
    share = args.prompt_frames or max((args.frames - 1) // len(files), 1)
    n_read = args.frames if len(files) == 1 else share
    read = lambda path: islice(data.read_frames(path, resolution, checkpoint["stride"]), n_read)
    frames = [data.crop(frame, resolution) for path in files for frame in read(path)]
    n_given = min(args.prompt_frames or 4, len(frames)) if len(files) == 1 else len(frames)
    return np.repeat(np.stack(frames)[None], n_clips, axis=0), n_given


def encode_prompts(tokenizer, truth, n_given, device):
    """The codes (B, F, h, w) of the given frames; says how well the tokenizer knows such pictures."""
    if not n_given:
        return torch.zeros(len(truth), 0, *tokenizer.grid(truth.shape[2]), dtype=torch.long, device=device)
    prompt = torch.stack([tokenizer.encode(clip) for clip in truth[:, :n_given]])
    kept = psnr(np.stack([tokenizer.decode(codes).cpu().numpy() for codes in prompt]), truth[:, :n_given])
    warning = ": little; it was trained too briefly, or on other things" if kept < 18 else ""
    print(f"the tokenizer keeps {kept:.1f} dB of the given frames{warning}")
    return prompt


# The score: how near the truth a continuation comes.
def psnr(frames, truth, where=None):
    """Peak signal-to-noise ratio in dB, by the mean squared error of all clips, optionally of some pixels only."""
    error = (frames.astype(np.float32) - truth) ** 2
    error = error.mean() if where is None or not where.any() else error[where].mean()
    return 20 * math.log10(255) - 10 * math.log10(max(error, 1e-9))


def best_copies(codes, n_given):
    """For each frame of codes (B, F, h, w) the index of the given frame that the best copying would show, (B, F).

    It repeats the last `lag` given frames for ever: right where a motion comes round. Each clip has the lag that tells
    its own given frames best; a lag of 1 repeats the last one.
    """
    B, F = codes.shape[:2]
    given, lags = codes[:, :n_given].flatten(2), range(1, max(n_given, 2))
    right = [(given[:, lag:] == given[:, :-lag]).float().mean(dim=(1, 2)) for lag in lags]  # (B,) each
    lag = 1 + torch.stack(right).nan_to_num(0).argmax(dim=0)[:, None]  # (B, 1); of one given frame there is one copy
    t = torch.arange(F, device=codes.device).expand(B, F)
    return torch.where(t < n_given, t, n_given - lag + (t - n_given) % lag)


def score(made, codes, truth, n_given, tokenizer, moving=None, wiped=None):
    """One row for each frame that the model made, against the truth, as clips × frames from made (B, F, h, w).

    psnr of the model, of repeating the last given frame, and of the truth after encoding and decoding, which no model
    can beat. With `moving` (B, F, R, R), on the pixels where the moving object is, or was in the last given frame: of
    the model, of repeating, of `best_copies`, and of `wiped` (B, R, R, 3), that frame without the moving object, which
    is less wrong than an object in the wrong place, so that only what beats it has learned to move. And the share of
    codes that are right: of the model, of repeating, of best_copies, and (`any`) of the given frame that is nearest the
    truth, the most that any copy could have if it knew which.
    """
    decode = lambda codes: tokenizer.decode(codes).cpu().numpy()
    rows, last, clips, copies = [], truth[:, n_given - 1], torch.arange(len(codes)), best_copies(codes, n_given).cpu()
    for t in range(n_given, made.shape[1]):
        model, real, copy = decode(made[:, t]), truth[:, t], copies[:, t]
        row = {"frame": t, "psnr": psnr(model, real), "psnr_repeat": psnr(last, real)}
        row["psnr_tokenizer"] = psnr(decode(codes[:, t]), real)
        if moving is not None:
            where = moving[:, t] | moving[:, n_given - 1]
            row |= {"psnr_moving": psnr(model, real, where), "psnr_moving_repeat": psnr(last, real, where)}
            row["psnr_moving_copy"] = psnr(truth[clips, copy], real, where)
            row["psnr_moving_wiped"] = psnr(wiped, real, where)
        right = lambda guess: (guess == codes[:, t]).float().mean(dim=(1, 2))  # (B,)
        best_given = torch.stack([right(codes[:, given]) for given in range(n_given)]).amax(dim=0)
        row |= {"codes": right(made[:, t]), "codes_repeat": right(codes[:, n_given - 1])}
        row |= {"codes_copy": right(codes[clips, copy]), "codes_any": best_given}
        rows.append({key: value.mean().item() if torch.is_tensor(value) else value for key, value in row.items()})
    return rows


def print_score(rows):
    columns = {
        "psnr": "PSNR", "psnr_repeat": "repeat", "psnr_tokenizer": "ceiling", "psnr_moving": "moving",
        "psnr_moving_repeat": "repeat", "psnr_moving_copy": "copy", "psnr_moving_wiped": "wiped", "codes": "codes",
        "codes_repeat": "repeat", "codes_copy": "copy", "codes_any": "any",
    }  # fmt: skip
    columns = {key: title for key, title in columns.items() if key in rows[0]}
    print(
        "PSNR, and the share of codes that are right. ceiling: what the tokenizer alone keeps; moving: on the pixels\n"
        "where the moving object is, or was in the last given frame; repeat: the last given frame; copy: from as many\n"
        "frames back as was best over the given frames; wiped: the last one without the object; any: the best of the\n"
        "given frames for each to come, which only the truth could tell"
    )
    print("frame" + "".join(f"{title:>9}" for title in columns.values()))
    cell = lambda key, value: f"{value:>9.1%}" if key.startswith("codes") else f"{value:>6.1f} dB"
    for row in rows:
        print(f"{row['frame']:>5}" + "".join(cell(key, row[key]) for key in columns))
    print(" mean" + "".join(cell(key, np.mean([row[key] for row in rows])) for key in columns))


def write_score(args, made, truth, n_given, tokenizer):
    """--score: print the table, and write it to score.json."""
    codes, what_moves = torch.stack([tokenizer.encode(clip) for clip in truth]), ()
    if args.prompt == [data.WORLD]:
        clips = [data.world_clip(i, args.frames, truth.shape[2]) for i in world_numbers(args.seed, args.score)]
        what_moves = [np.stack(of) for of in zip(*((clip.masks, clip.without[n_given - 1]) for clip in clips))]
    rows = score(made, codes, truth, n_given, tokenizer, *what_moves)
    print_score(rows)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    data.write_json({"settings": settings, "frames": rows}, args.out / "score.json")
    print(f"wrote {args.out / 'score.json'}")


def write_pictures(args, codes, truth, n_given, tokenizer):
    """sample.npy, sample.gif and sample.png: the truth, as far as there is one, beside what the model made."""
    rows = []
    for frames, sample in list(zip(truth, codes))[: args.samples]:
        made = ("model", tokenizer.decode(sample).cpu().numpy())
        if 0 < len(frames) < args.frames:  # the truth ends before the continuation does: white frames
            rest = np.full((args.frames - len(frames), *frames.shape[1:]), 255, np.uint8)
            frames = np.concatenate((frames, rest))
        rows.append([("truth", frames), made] if len(frames) else [made])
    with data.atomic_open(args.out / "sample.npy") as file:
        np.save(file, codes.cpu().numpy().astype(np.uint16))
    data.write_gif(args.out / "sample.gif", rows, n_given)
    data.write_strip(args.out / "sample.png", rows, n_given)
    print(f"wrote {args.out / 'sample.gif'}, sample.png and sample.npy; frames given: {n_given}")


# The program.
def parse_arguments():
    parser = data.make_parser(__doc__)
    add, count = parser.add_argument, data.number(int, at_least=1)
    add("--prompt", nargs="+", default=[data.WORLD], help="videos, images, a folder, or world-masks (A.8)")
    add("--prompt-frames", type=count, help="frames given, of each file (default: 4; of several an equal share)")
    add("--imagine", action="store_true", help="give nothing: the model makes a whole video")
    add("--images", action="store_true", help="start as a sequence of images, for a model that has seen some")
    add("--frames", type=count, default=16, help="frames in all, given and made")
    add("--samples", type=count, default=4, help="how many continuations (with --score: in the pictures)")
    add("--temperature", type=data.number(float, at_least=0), default=1.0, help="0 takes the most probable code")
    add("--top-k", type=data.number(int, at_least=0), default=0, help="draw among the k most probable codes; 0 for all")
    add("--top-p", type=data.number(float, above=0), default=0.95, help="draw among codes of this probability together")
    add("--score", type=count, metavar="N", help="compare N continuations with the truth; also into score.json")
    add("--compile", action="store_true", help="torch.compile first, 5 to 13 s: pays for tens of thousands of tokens")
    add("--checkpoint", default="out/toto.pt", type=Path, help="a model trained by train.py")
    add("--tokenizer", type=Path, help="the model's tokenizer (default: dvae.pt beside the checkpoint)")
    add("--out", default="out", type=data.output_folder, help="folder for sample.gif, sample.png and sample.npy")
    args = parser.parse_args()
    if args.top_p > 1:
        raise ValueError("--top-p: a probability, at most 1")
    if args.prompt_frames and args.prompt_frames >= args.frames:
        raise ValueError("--prompt-frames must be less than --frames")
    if args.imagine and (args.prompt != [data.WORLD] or args.prompt_frames):
        raise ValueError("--imagine gives nothing: leave out --prompt and --prompt-frames")
    if args.score and args.imagine:
        raise ValueError("--score: what is imagined has no truth to compare with; leave out --imagine")
    return args


def main():
    args = parse_arguments()
    device = data.pick_device(args.device)
    model, tokenizer, checkpoint = dvae.load_trained(args.checkpoint, args.tokenizer, device)
    n_samples, window = args.score or args.samples, checkpoint["frames"]
    truth, n_given = read_prompts(args, checkpoint, n_samples)
    if n_given >= args.frames:
        raise ValueError(f"--frames {args.frames}: the prompt gives {n_given}; ask for more, or less --prompt-frames")
    if args.score and truth.shape[1] < args.frames:
        raise ValueError(f"--score: the prompt has {truth.shape[1]} frames; give --frames as many, or fewer")
    prompt = encode_prompts(tokenizer, truth, n_given, device)
    tokens_per_frame = prompt.shape[2] * prompt.shape[3]
    n_new = (args.frames - n_given) * tokens_per_frame
    model = toto.for_sampling(model, n_samples, args.compile)
    cache = toto.Cache(model, n_samples, 1 + min(args.frames, window) * tokens_per_frame, args.compile)
    started = time.perf_counter()
    with tqdm(total=n_new, desc="sampling", unit="token", dynamic_ncols=True) as bar:
        codes = toto.continue_video(
            model, prompt, args.frames, window, toto.IMAGE_START if args.images else toto.VIDEO_START,
            progress=bar.update, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            generator=torch.Generator(device).manual_seed(args.seed), cache=cache,
        )  # fmt: skip
    codes.max().item()  # waits for the device
    speed = n_samples * n_new / (time.perf_counter() - started)
    print(f"{speed:,.0f} tokens/s, {n_samples} samples at a time")
    if args.score:
        write_score(args, codes, truth, n_given, tokenizer)
    write_pictures(args, codes, truth, n_given, tokenizer)


if __name__ == "__main__":
    data.run(main)
