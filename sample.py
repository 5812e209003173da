"""Sampling: continue a video from its first frames (A.8).

    python sample.py                          clips of the built-in world
    python sample.py --prompt FILE            a video or image of yours
    python sample.py --frames 64              beyond the 16 frames the model has seen at once

Reads a checkpoint of train.py and its tokenizer. Writes sample.gif (the truth beside the continuation) and sample.png
(the same as a strip, time from left to right) to --out.
Shape letters: B samples, F frames, h and w codes.
"""

import argparse
import math
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import toto

WORLD_CLIPS = range(3_000_000, 4_000_000)  # clips that no training ever sees


def continue_video(model, codes, n_frames, window, progress=None, **how):
    """Continue codes int64 (B, F, h, w) to n_frames frames: (B, n_frames, h, w). `how` goes to Toto.generate.

    The model has learned windows of `window` frames. Up to there a sequence simply goes on. Beyond (64 frames in A.8),
    not in the paper: at every frame boundary the oldest frame is dropped, and the start token and the kept frames are
    run afresh at their new positions, so that each frame is sampled exactly as the model would after that prompt.
    """
    B, _, h, w = codes.shape
    while codes.shape[1] < n_frames:
        kept = codes[:, -(window - 1) :]
        new = min(window, n_frames) - kept.shape[1] if codes.shape[1] < window else 1
        start = kept.new_full((B, 1), toto.VIDEO_START)
        ids = torch.cat((start, kept.flatten(1) + toto.FIRST_CODE), dim=1)
        ids = model.generate(ids, new * h * w, progress=progress, **how)
        added = ids[:, -new * h * w :].view(B, new, h, w) - toto.FIRST_CODE
        codes = torch.cat((codes, added), dim=1)
    return codes


def read_prompts(args, checkpoint):
    """Frames uint8 (B, F, R, R, 3) whose first ones are given to the model; F is at most --frames."""
    resolution = checkpoint["resolution"]
    if args.prompt is None:
        clips = WORLD_CLIPS[args.seed * args.samples :][: args.samples]
        return np.stack([data.world_clip(i, args.frames, resolution).frames for i in clips])
    if not args.prompt.is_file():
        raise ValueError(f"--prompt {args.prompt}: {'is a folder, not a' if args.prompt.is_dir() else 'no such'} file")
    frames = data.read_frames(args.prompt, resolution, checkpoint["stride"])
    frames = np.stack([data.crop(frame, resolution) for frame in islice(frames, args.frames)])
    return np.repeat(frames[None], args.samples, axis=0)


def main():
    parser = argparse.ArgumentParser(description="Continue a video.", formatter_class=data.HelpFormatter)
    add = parser.add_argument
    add("--prompt", type=Path, help="a video or image file (default: clips of the built-in world)")
    add("--prompt-frames", type=data.positive, default=4, help="how many of its frames the model is given")
    add("--frames", type=data.positive, default=16, help="frames in all, given and made")
    add("--samples", type=data.positive, default=4, help="how many continuations")
    add("--temperature", type=float, default=1.0, help="0 always takes the most probable code")
    add("--top-k", type=int, default=0, help="draw among the k most probable codes only; 0 for all")
    add("--top-p", type=float, default=0.95, help="draw among the fewest codes that have this probability together")
    add("--checkpoint", default="out/toto.pt", type=Path, help="a model trained by train.py")
    add("--tokenizer", type=Path, help="the model's tokenizer (default: dvae.pt beside the checkpoint)")
    add("--out", default="out", type=Path, help="folder for sample.gif and sample.png")
    add("--seed", type=int, default=0, help="of everything random")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    args = parser.parse_args()
    if args.prompt_frames >= args.frames:
        raise ValueError("--prompt-frames must be less than --frames")
    if not 0 <= args.temperature < math.inf or args.top_k < 0 or not 0 < args.top_p <= 1:
        raise ValueError("--temperature and --top-k must not be negative, --top-p must lie above 0 and up to 1")

    args.out.mkdir(parents=True, exist_ok=True)
    device = data.pick_device(args.device)
    model, tokenizer, checkpoint = data.load_model(args.checkpoint, args.tokenizer, device)
    truth = read_prompts(args, checkpoint)
    prompt = torch.stack([tokenizer.encode(frames[: args.prompt_frames]) for frames in truth])  # (B, F, h, w)
    _, n_given, h, w = prompt.shape
    with tqdm(total=(args.frames - n_given) * h * w, desc="sampling", unit="token", dynamic_ncols=True) as bar:
        codes = continue_video(
            model, prompt, args.frames, checkpoint["frames"], progress=bar.update,
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            generator=torch.Generator(device).manual_seed(args.seed),
        )  # fmt: skip
    rows = []
    for frames, sample in zip(truth, codes):
        if len(frames) < args.frames:  # the truth ends before the continuation does
            rest = np.zeros((args.frames - len(frames), *frames.shape[1:]), np.uint8)
            frames = np.concatenate((frames, rest))
        rows.append([("truth", frames), ("model", tokenizer.decode(sample).cpu().numpy())])
    data.write_gif(args.out / "sample.gif", rows, n_given)
    data.write_strip(args.out / "sample.png", rows, n_given)
    print(f"wrote {args.out / 'sample.gif'} and {args.out / 'sample.png'}; the first {n_given} frames were given")


if __name__ == "__main__":
    data.run(main)
