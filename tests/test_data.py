"""data.py: sequences against hand-built ones, media against what was written, the sampler's promises, resuming."""

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

import data
import dvae
import toto
from conftest import ENVIRONMENT, ROOT, fake_tokens


def write_video(path, n_frames, size=(48, 64), fps=30):
    """A video whose frame t is of one grey, 10 + 5 t."""
    frames = np.stack([np.full((*size, 3), 10 + 5 * t, np.uint8) for t in range(n_frames)])
    iio.imwrite(path, frames, plugin="FFMPEG", fps=fps, output_params=["-crf", "0"], macro_block_size=1)


# Sequences.
def test_sequence_by_hand():
    """§3.4: raster scan within a frame, frames in order, [1] before a video, [3] before images, [2] at the end."""
    codes = np.array([[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]], dtype=np.uint16)
    assert data.to_sequence(codes, is_video=True).tolist() == [1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 2]
    assert data.to_sequence(codes, is_video=False)[0] == 3


def test_a_full_sequence_has_4098_ids():
    """16 frames of 16 x 16 codes; the largest id is 8195 and the model's vocabulary holds it."""
    ids = data.to_sequence(np.full((16, 16, 16), 8191, np.uint16), is_video=True)
    assert len(ids) == 4098 and ids.max() == 8195 == toto.SIZES["base"].vocab_size - 1 and ids.dtype == np.int64


def test_source_makes_windows_of_videos_and_groups_of_images(tmp_path):
    tokens = fake_tokens(tmp_path / "t", [9, 1, 3, 1, 1])
    source = data.Source(tokens, n_frames=4, share=0.0)
    assert (source.n_videos, source.n_images, len(source)) == (2 + 1, 1, 4)
    frames = lambda ids: ((ids[1:-1].reshape(-1, 6)[:, 0]) - toto.FIRST_CODE).tolist()
    assert frames(source.sequence(0, source.images)[0]) == [0, 1, 2, 3]
    assert frames(source.sequence(1, source.images)[0]) == [4, 5, 6, 7]
    assert frames(source.sequence(2, source.images)[0]) == [200, 201, 202, 202]  # too short: the last frame repeats
    images, n_real = source.sequence(3, source.images)
    assert images[0] == toto.IMAGE_START and frames(images) == [100, 300, 400, 100] and n_real == 3
    assert [source.sequence(k, source.images)[1] for k in range(3)] == [4, 4, 3]
    # With rng, windows start anywhere, and always inside the clip.
    starts = {frames(source.sequence(1, source.images, 0, np.random.default_rng(s))[0])[0] for s in range(50)}
    assert starts == {2, 3, 4, 5}


def frames_of(source, k, *how):
    """Which stored frames of a fake clip sequence k shows."""
    return ((source.sequence(k, source.images, *how)[0][1:-1:6] - toto.FIRST_CODE) % 100).tolist()


def test_every_fourth_frame_from_every_phase(tmp_path):
    """§3.4 samples every 4 frames. Of a folder that stores all of them, a pass shows each about once."""
    tokens = fake_tokens(tmp_path / "t", [64], stride=1)
    source = data.Source(tokens, 8, share=0.0, step=tokens.step(4))
    assert len(source) == 8
    shown = [frames_of(source, k) for k in range(8)]
    assert all(np.diff(window).tolist() == 7 * [4] for window in shown)
    assert sorted(sum(shown, [])) == list(range(64))
    # In training windows shift, by whole steps, and stay within their phase; over four passes each has had them all.
    mixture, starts = data.Mixture([source], [1.0], seed=0), {}
    for p in range(40):
        passes = [(mixture.sequence(8 * p + i)[0][1:-1:6] - toto.FIRST_CODE).tolist() for i in range(8)]
        assert all(np.diff(window).tolist() == 7 * [4] for window in passes)
        assert Counter(window[0] % 4 for window in passes) == {0: 2, 1: 2, 2: 2, 3: 2}
        starts |= dict.fromkeys(window[0] for window in passes)
    assert set(starts) == set(range(64 - 7 * 4))


def test_windows_of_uneven_videos(tmp_path):
    """A video that is no whole number of blocks, and two that are too short for one window at this stride."""
    tokens = fake_tokens(tmp_path / "t", [58, 10, 3], stride=1)
    source = data.Source(tokens, 4, share=0.0, step=4)
    assert source.windows.tolist() == [14, 16, 17]
    for k in range(12):
        assert frames_of(source, k) == [16 * (k // 4) + k % 4 + 4 * i for i in range(4)]
    assert frames_of(source, 12) == [44, 48, 52, 56] and frames_of(source, 13) == [45, 49, 53, 57]
    assert frames_of(source, 14) == [2, 6, 6, 6] and frames_of(source, 15) == [3, 7, 7, 7]
    assert [frames_of(source, 16, epoch) for epoch in (1, 2, 3)] == [[2] * 4, [0] * 4, [1] * 4]


def test_a_stride_is_read_from_what_is_stored(tmp_path):
    tokens = fake_tokens(tmp_path / "t", [20], stride=2)
    assert (tokens.step(2), tokens.step(4), tokens.step(8)) == (1, 2, 4)
    for stride in (1, 3, 5):
        with pytest.raises(ValueError, match=f"was stored at stride 2, which cannot give stride {stride}; ask"):
            tokens.step(stride)
    assert fake_tokens(tmp_path / "images", [1, 1], stride=4).step(2) == 1  # images have no stride
    assert tokens.codes(0, 3, 4, 5)[:, 0, 0].tolist() == [3, 8, 13, 18]
    assert tokens.codes(0, 3, 5, 6)[:, 0, 0].tolist() == [3, 9, 15, 15, 15]


def test_validation_does_not_depend_on_what_is_stored(tmp_path, monkeypatch):
    """It sees the first phase alone, so that every 4th of all frames and a folder of every 4th give the same."""
    lengths = [93, 40, 17, 5]
    every = fake_tokens(tmp_path / "every", lengths, stride=1)
    fourth = fake_tokens(tmp_path / "fourth", [-(-n // 4) for n in lengths])
    monkeypatch.setattr(data, "is_held_out", lambda names, share: np.ones(len(names), dtype=bool))
    a, b = (data.Source(tokens, 4, held_out=True, step=tokens.step(4)) for tokens in (every, fourth))
    assert len(a) == len(b) == sum(max(-(-n // 4) // 4, 1) for n in lengths)
    for k in range(len(a)):
        assert frames_of(a, k) == [4 * t for t in frames_of(b, k)]


def test_passes_over_table_2():
    """§3.3 and Table 2: how often one trillion tokens, mixed as stated, go over each source; a folder of all frames.

    Table 2 counts every frame: hours x 3600 s x 30 frames x 256 tokens. Here is a thousandth of its clips.
    """
    table = {  # instances, frames of each, billions of tokens, share of the mix, passes
        "ImageNet": (13.9e6, 1, 3.6, 0.2, 55.6),
        "Kinetics-600": (0.53e6, 1496 * 3600 * 30 / 0.53e6, 41.3, 0.1, 2.4),
        "Ego4D": (52.1e3, 3750 * 3600 * 30 / 52.1e3, 103, 0.1, 0.97),
        "HowTo100m": (1.172e6, 92627 * 3600 * 30 / 1.172e6, 2560, 0.6, 0.23),
    }
    for name, (instances, n_frames, billions, share, passes) in table.items():
        names = [str(i) for i in range(round(instances / 1000))]
        lengths = np.full(len(names), round(n_frames))
        source = data.Source(SimpleNamespace(names=names, length=lengths), 16, share=0.0, step=4)
        tokens = 1000 * len(source) * 16 * 256
        assert tokens == pytest.approx(billions * 1e9, rel=0.02), name
        assert share * 1e12 / tokens == pytest.approx(passes, rel=0.03), name


# The sampler.
def test_mixture_is_exact_over_any_window(tmp_path):
    """§3.3's four sources at 20, 10, 10 and 60 %: every window of every length holds its share, give or take one."""
    weights = [0.2, 0.1, 0.1, 0.6]
    sources = [data.Source(fake_tokens(tmp_path / str(i), [4] * 5), 4, share=0.0) for i in range(4)]
    mixture = data.Mixture(sources, weights, seed=3)
    drawn = np.array([mixture.sequence(i)[1] for i in range(400)])
    for s, weight in enumerate(weights):
        count = np.concatenate(([0], np.cumsum(drawn == s)))
        for length in (1, 2, 3, 7, 10, 33, 100, 256):
            window = count[length:] - count[:-length]
            assert abs(window - weight * length).max() <= 1.3, (weight, length)
        assert (drawn == s).sum() == round(400 * weight)


def test_every_clip_once_per_pass_in_a_new_order(tmp_path):
    tokens = fake_tokens(tmp_path / "t", [4] * 20)
    mixture = data.Mixture([data.Source(tokens, 4, share=0.0)], [1.0], seed=0)
    clip = lambda i: int(mixture.sequence(i)[0][1] - toto.FIRST_CODE) // 100
    passes = [[clip(20 * p + i) for i in range(20)] for p in range(3)]
    assert all(sorted(order) == list(range(20)) for order in passes)
    assert passes[0] != passes[1] != passes[2]


def test_images_once_per_pass(tmp_path):
    tokens = fake_tokens(tmp_path / "t", [1] * 12)
    mixture = data.Mixture([data.Source(tokens, 4, share=0.0)], [1.0], seed=0)
    drawn = [int(c) // 100 for i in range(3) for c in mixture.sequence(i)[0][1:-1:6] - toto.FIRST_CODE]
    assert sorted(drawn) == list(range(12))


def test_sampler_is_a_pure_function_of_seed_and_index(tmp_path):
    sources = [data.Source(fake_tokens(tmp_path / str(i), [40, 7, 1, 1]), 4, share=0.0) for i in range(2)]
    a, b = (data.Mixture(sources, [1, 2], seed=5) for _ in range(2))
    forward = [a.sequence(i)[0] for i in range(60)]
    backward = [b.sequence(i)[0] for i in reversed(range(60))][::-1]
    assert all(np.array_equal(x, y) for x, y in zip(forward, backward))
    other = data.Mixture(sources, [1, 2], seed=6)
    assert any(not np.array_equal(other.sequence(i)[0], forward[i]) for i in range(60))


def test_validation_clips_are_disjoint_and_fixed(tmp_path):
    tokens = fake_tokens(tmp_path / "t", [4] * 300)
    train, held_out = data.Source(tokens, 4, share=0.1), data.Source(tokens, 4, True, share=0.1)
    assert not set(train.videos) & set(held_out.videos) and len(train.videos) + len(held_out.videos) == 300
    assert 15 <= len(held_out.videos) <= 45
    # More clips do not move the old ones to the other side.
    more = fake_tokens(tmp_path / "more", [4] * 600)
    assert set(data.Source(more, 4, True, share=0.1).videos) & set(range(300)) == set(held_out.videos)
    few = fake_tokens(tmp_path / "few", [4, 4, 4])
    assert len(data.Source(few, 4, True, share=0.01)) == 1 and len(data.Source(few, 4, True, share=1.0)) == 1
    one = fake_tokens(tmp_path / "one", [4])
    assert len(data.Source(one, 4, False, share=1.0)) == 1  # a single clip is for training


# Media.
def test_video_frames_stride_and_size(tmp_path):
    write_video(tmp_path / "v.mp4", 18, size=(48, 64))
    frames = list(data.read_frames(tmp_path / "v.mp4", 32, stride=4))
    assert [f.shape for f in frames] == [(32, 43, 3)] * 5
    assert [round(float(f.mean())) for f in frames] == pytest.approx([10, 30, 50, 70, 90], abs=2)


def test_video_agrees_with_pyav(tmp_path):
    """Every frame against another decoder (libav through PyAV), resized by Pillow."""
    av = pytest.importorskip("av", reason="pip install av to compare with another decoder")
    clip = data.world_clip(3, 12, 96).frames
    iio.imwrite(tmp_path / "v.mp4", clip, plugin="FFMPEG", fps=25, quality=9)
    ours = list(data.read_frames(tmp_path / "v.mp4", 64, stride=3))
    with av.open(tmp_path / "v.mp4") as container:
        theirs = [frame.to_image() for frame in container.decode(video=0)][::3]
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs):
        b = np.asarray(b.resize((64, 64), Image.Resampling.BICUBIC), dtype=float)
        assert abs(a - b).mean() < 3


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    grey = Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1)))
    image = Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    (frame,) = data.read_frames(path, 16)
    assert frame.shape == (16, 21, 3) and frame.dtype == np.uint8
    if mode != "1":  # the ramp from black to white is still there
        assert frame[:, 0].mean() < 20 and frame[:, -1].mean() > 235


def test_exif_orientation_and_transparency(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: 90 degrees clockwise to show
    image.save(tmp_path / "turned.jpg", exif=exif)
    (frame,) = data.read_frames(tmp_path / "turned.jpg", 16)
    assert frame.shape == (32, 16, 3)
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    (frame,) = data.read_frames(tmp_path / "clear.png", 16)
    assert (frame == 255).all()


def test_animated_gif_is_a_video(tmp_path):
    frames = [Image.new("RGB", (20, 20), (20 * t, 0, 0)) for t in range(9)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=50)
    assert [int(f[0, 0, 0]) for f in data.read_frames(tmp_path / "a.gif", 8, stride=4)] == pytest.approx(
        [0, 80, 160], abs=5
    )


def test_crop_takes_the_place_asked_for():
    frame = np.arange(4 * 10 * 3).reshape(4, 10, 3)
    assert np.array_equal(data.crop(frame, 4), frame[:, 3:7])
    assert np.array_equal(data.crop(frame, 4, (0, 0)), frame[:, :4])
    assert np.array_equal(data.crop(frame, 4, (1, 1)), frame[:, 6:])


# Token folders.
def make_media(root):
    for name in ("a/one.png", "a/two.png", "b/three.png", "b/.hidden.png", "broken.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(
            root / name
        )
    (root / "broken.jpg").write_bytes((root / "a/one.png").read_bytes()[:100])
    write_video(root / "b/clip é.mp4", 12)


def test_tokenize_a_folder(tmp_path, untrained_tokenizer, capsys):
    make_media(tmp_path / "media")
    shards = data.media_shards(tmp_path / "media", 16, 4)
    data.tokenize(shards, tmp_path / "t", untrained_tokenizer, 16, 4)
    assert "skipped 1 file(s) that cannot be read: broken.jpg" in capsys.readouterr().err
    tokens = data.Tokens(tmp_path / "t")
    assert tokens.names == ["a/one.png", "a/two.png", "b/three.png", "b/clip é.mp4"]
    assert tokens.labels == {"class": ["a", "a", "b", "b"]} and tokens.length.tolist() == [1, 1, 1, 3]
    # What is stored is what the tokenizer says of each file on its own.
    for clip, name in enumerate(tokens.names):
        frames = np.stack([data.crop(f, 16) for f in data.read_frames(tmp_path / "media" / name, 16, 4)])
        assert np.array_equal(tokens.codes(clip), untrained_tokenizer.encode(frames).numpy()), name
    assert tokens.meta["tokenizer"] == untrained_tokenizer.fingerprint() and tokens.meta["precision"] == "float32"


def read_folder(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".tmp"}


def test_tokenizing_again_resumes_and_changes_nothing(tmp_path, untrained_tokenizer, monkeypatch):
    """A stop and a second run give the folder of an undisturbed run, file by file; so do two processes."""
    shards = data.world_shards(range(40), 32, n_frames=3)
    assert len(shards) == 3
    assert data.tokenize(shards, tmp_path / "whole", untrained_tokenizer, 32, 1) == 40
    with monkeypatch.context() as patch:
        patch.setattr(data, "world_size", lambda: 2)
        for rank, n_clips in ((1, 16), (0, 24)):
            patch.setattr(data, "rank", lambda: rank)
            assert data.tokenize(shards, tmp_path / "shared", untrained_tokenizer, 32, 1) == n_clips
    assert read_folder(tmp_path / "shared") == read_folder(tmp_path / "whole")

    encode, calls = dvae.DVAE.encode, []

    def dying_encode(self, frames):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, frames)

    monkeypatch.setattr(dvae.DVAE, "encode", dying_encode)
    with pytest.raises(KeyboardInterrupt):
        data.tokenize(shards, tmp_path / "cut", untrained_tokenizer, 32, 1)
    with pytest.raises(ValueError, match="not a finished token folder"):
        data.Tokens(tmp_path / "cut")
    data.tokenize(shards, tmp_path / "cut", untrained_tokenizer, 32, 1)
    assert read_folder(tmp_path / "cut") == read_folder(tmp_path / "whole")
    n = len(calls)
    data.tokenize(shards, tmp_path / "cut", untrained_tokenizer, 32, 1)
    assert len(calls) == n  # nothing was left to do


def test_tokenizing_killed_resumes_to_the_same_folder(tmp_path, untrained_tokenizer, monkeypatch):
    (tmp_path / "media").mkdir()
    for i in range(40):
        path = tmp_path / "media" / f"{i}.mp4"
        write_video(path, 5 + i) if i < 3 else shutil.copy(tmp_path / "media" / f"{i % 3}.mp4", path)
    dvae.save(untrained_tokenizer, tmp_path / "dvae.pt")

    def command(out):
        command = ["data.py", str(tmp_path / "media"), "--out", str(out), "--resolution", "16", "--device", "cpu"]
        return [*command, "--tokenizer", str(tmp_path / "dvae.pt")]

    def tokenize(out):
        monkeypatch.setattr(sys, "argv", command(out))
        data.main()

    tokenize(tmp_path / "whole")
    killed = subprocess.Popen(
        [sys.executable, *command(tmp_path / "killed")], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    while killed.poll() is None and not (tmp_path / "killed" / "00000.json").exists():
        time.sleep(0.002)
    killed.kill()
    assert killed.wait() != 0, "it was not killed in its middle"
    first = (tmp_path / "killed" / "00000.npy").stat()
    assert not (tmp_path / "killed" / "00002.json").exists()
    tokenize(tmp_path / "killed")
    assert len(read_folder(tmp_path / "whole")) == 7
    assert read_folder(tmp_path / "killed") == read_folder(tmp_path / "whole")
    assert (tmp_path / "killed" / "00000.npy").stat().st_ino == first.st_ino  # finished shards are not made again


def test_a_cache_makes_every_folder_once(tmp_path, untrained_tokenizer, monkeypatch):
    shards = data.world_shards(range(3), 16, n_frames=2)
    cached = lambda *how: data.tokenize_cached("clips", shards, tmp_path, untrained_tokenizer, *how)
    tokens = cached(16, 1)
    assert isinstance(tokens, data.Tokens) and tokens.length.tolist() == [2, 2, 2]
    others = [cached(16, 2), cached(16, 1, 3), cached(8, 1)]
    assert len({tokens.folder, *(other.folder for other in others)}) == 4
    monkeypatch.setattr(dvae.DVAE, "encode", None)
    assert cached(16, 1).folder == tokens.folder


@pytest.mark.parametrize(
    "size, codec",
    [
        ((1, 1), ["ffv1", "-pix_fmt", "bgr0"]),
        ((3, 401), ["ffv1", "-pix_fmt", "bgr0"]),
        ((64, 64), ["ffv1", "-pix_fmt", "gray16le"]),
        ((64, 64), ["prores_ks", "-pix_fmt", "yuva444p10le"]),
    ],
)
def test_odd_sizes_and_pixel_formats(tmp_path, size, codec):
    frames = [Image.fromarray(f).resize(size) for f in data.world_clip(0, 9, 64).frames]
    (tmp_path / "raw").write_bytes(b"".join(f.tobytes() for f in frames))
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-i", str(tmp_path / "raw")]
    ffmpeg = [data.imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
    subprocess.run([*ffmpeg, *raw, "-c:v", *codec, str(tmp_path / "v.mkv")], check=True)
    got = list(data.read_frames(tmp_path / "v.mkv", 16, stride=1))
    assert len(got) == 9
    for frame, original in zip(got, frames):
        assert min(frame.shape[:2]) == 16 and frame.shape[2] == 3
        gray = np.asarray(original.convert("L"), float).mean()
        assert np.asarray(Image.fromarray(frame).convert("L"), float).mean() == pytest.approx(gray, abs=8)


def test_uneven_timestamps_keep_their_frames(tmp_path):
    """ffmpeg must neither repeat a frame that is shown for long nor drop one that is shown briefly."""
    frames = data.world_clip(0, 9, 64).frames
    iio.imwrite(tmp_path / "a.gif", frames, duration=[20, 500, 40, 40, 300, 20, 20, 700, 40])
    ffmpeg = [data.imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
    subprocess.run([*ffmpeg, "-i", str(tmp_path / "a.gif"), "-fps_mode", "vfr", str(tmp_path / "v.mkv")], check=True)
    got = list(data.read_frames(tmp_path / "v.mkv", 64, stride=1))
    assert len(got) == 9
    for frame, original in zip(got, frames):
        assert abs(frame.astype(float) - original).mean() < 12


class RedOfTheCorner:
    """All that data.py asks of a tokenizer: here a code is the red of the first of its 8 x 8 pixels."""

    config, compute_dtype, grid = SimpleNamespace(vocab_size=256), torch.float32, dvae.DVAE.grid
    pixels_per_code = 8

    def encode(self, frames):
        return torch.as_tensor(frames[:, ::8, ::8, 0]).long()

    def fingerprint(self):
        return "red"


def test_crops_are_clips_of_their_own(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (5, 16, 48, 3), dtype=np.uint8)
    shards = [[data.Item("v", lambda: ({"class": "a"}, frames)), data.Item("w", lambda: ({}, frames[:2]))]]
    data.tokenize(shards, tmp_path / "random", RedOfTheCorner(), 16, 1, crops=3)
    tokens = data.Tokens(tmp_path / "random")
    assert tokens.length.tolist() == [5, 5, 5, 2, 2, 2] and tokens.names == [*"vvvwww"]
    assert tokens.labels == {"class": ["a", "a", "a", None, None, None]}
    cut = lambda left: frames[:, ::8, left : left + 16 : 8, 0]
    lefts = [[left for left in range(33) if np.array_equal(tokens.codes(clip), cut(left))] for clip in range(3)]
    # Every crop is the same place in all frames of the clip, and not the same place as another crop.
    assert all(len(found) == 1 for found in lefts) and len({left for (left,) in lefts}) == 3
    data.tokenize(shards, tmp_path / "three", RedOfTheCorner(), 16, 1, crops=data.THREE)
    tokens = data.Tokens(tmp_path / "three")
    for clip, left in enumerate((0, 16, 32)):  # both ends and the middle
        assert np.array_equal(tokens.codes(clip), cut(left)) and np.array_equal(tokens.codes(clip + 3), cut(left)[:2])


def test_a_folder_made_otherwise_is_refused(tmp_path, untrained_tokenizer):
    shards = data.world_shards(range(2), 16, n_frames=2)
    data.tokenize(shards, tmp_path / "t", untrained_tokenizer, 16, 1)
    with pytest.raises(ValueError, match="its stride is 1, here it is 4; use another folder"):
        data.tokenize(shards, tmp_path / "t", untrained_tokenizer, 16, 4)
    with pytest.raises(ValueError, match="its tokenizer is"):
        data.tokenize(shards, tmp_path / "t", dvae.DVAE(untrained_tokenizer.config), 16, 1)
    with pytest.raises(ValueError, match="its source is , here it is other"):
        data.tokenize(shards, tmp_path / "t", untrained_tokenizer, 16, 1, source="other")


def test_damaged_files_are_skipped_and_named(tmp_path, untrained_tokenizer, capsys):
    """Copies of good files, cut short or with bytes changed: each is read or skipped, and nothing else happens."""
    (tmp_path / "media").mkdir()
    clip = data.world_clip(0, 12, 64).frames
    write = {
        "v.mp4": lambda path: iio.imwrite(path, clip, plugin="FFMPEG", fps=10),
        "i.png": lambda path: Image.fromarray(clip[0]).save(path),
        "i.jpg": lambda path: Image.fromarray(clip[0]).save(path),
        "a.gif": lambda path: iio.imwrite(path, clip),
    }
    rng = np.random.default_rng(0)
    for name, make in write.items():
        make(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for i in range(12):
            damaged = bytearray(whole)
            for place in rng.integers(len(whole), size=5):
                damaged[place] = rng.integers(256)
            damaged = damaged if i % 2 else whole[: rng.integers(len(whole))]
            (tmp_path / "media" / f"{i:02d}{name}").write_bytes(damaged)
    data.tokenize(data.media_shards(tmp_path / "media", 16, 4), tmp_path / "t", untrained_tokenizer, 16, 4)
    index = [json.loads((tmp_path / "t" / f"{i:05d}.json").read_text()) for i in range(2)]
    read, skipped = sum((shard["names"] for shard in index), []), {k for shard in index for k in shard["skipped"]}
    assert len(read) + len(skipped) == 48 and len(skipped) >= 16
    assert f"skipped {len(skipped)} file(s)" in capsys.readouterr().err
    assert not list((tmp_path / "t").glob("*.tmp"))


def test_a_damaged_shard_is_refused(tmp_path):
    fake_tokens(tmp_path / "t", [4, 5])
    whole = (tmp_path / "t" / "00000.npy").read_bytes()
    (tmp_path / "t" / "00000.npy").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="00000.npy: is missing or damaged"):
        data.Tokens(tmp_path / "t")


def test_what_is_not_the_files_fault_is_not_its_loss(tmp_path, monkeypatch):
    """Too many open files, or an ffmpeg that is killed, must not make a good file count as damaged."""
    write_video(tmp_path / "v.mp4", 5)
    monkeypatch.setattr(data.imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(tmp_path / "ffmpeg"))
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    with pytest.raises(OSError, match="ffmpeg was killed"):
        list(data.read_frames(tmp_path / "v.mp4", 16))
    monkeypatch.setattr(data.Image, "open", lambda path: open(path, "rb", opener=no_more_files))
    with pytest.raises(OSError, match="Too many open files"):
        list(data.read_frames(tmp_path / "i.png", 16))


def no_more_files(path, flags):
    raise OSError(errno.EMFILE, "Too many open files", path)


def test_a_reader_stays_a_bounded_way_ahead():
    """Threads decode ahead, in order, but no further than the bound: a video of any length fits in memory."""
    count = Counter()

    def frames(name):
        for i in range(1000):
            count[name] += 1
            yield np.full((1, 1, 3), i % 256, np.uint8)

    items = [data.Item(str(k), lambda k=k: ({"k": k}, frames(k))) for k in range(6)]
    for k, (item, entries) in enumerate(data.read_ahead(items, n_items=2, n_frames=10)):
        assert item.name == str(k)
        for i, (labels, frame) in enumerate(entries):
            assert labels == {"k": k} and frame[0, 0, 0] == i % 256
            if i == 500:
                assert count[k] <= 500 + 13 and all(count[later] <= 12 for later in range(k + 1, 6))
        assert i == 999


def test_folders_without_media(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        data.find_media(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="no images or videos here"):
        data.find_media(tmp_path)


# The world.
def test_world_is_deterministic_and_balanced():
    a, b = data.world_clip(7), data.world_clip(7)
    assert np.array_equal(a.frames, b.frames) and a.labels == b.labels
    assert not np.array_equal(a.frames, data.world_clip(8).frames)
    labels = [data.world_clip(i, 1, 16).labels for i in range(600)]
    for task, names in (("shape", data.SHAPES), ("motion", data.MOTIONS)):
        counts = Counter(label[task] for label in labels)
        assert set(counts) == set(names) and min(counts.values()) > 60


def test_world_labels_masks_and_positions_are_true():
    """What can be seen of the moving object has one colour, lies around its position, and moves as the label says."""
    seen, n_hidden, n_partly = set(), 0, 0
    for index in range(120):
        clip = data.world_clip(index, 20)
        steps = np.diff(clip.positions, axis=0) / 8  # cells a frame, across and down
        assert (abs(steps) == 1).all()
        across, down = (data.world_clip(index, 21).positions[-1] - clip.positions[-1]) / 8  # the step that comes next
        assert clip.labels["motion"] == f"{'down' if down > 0 else 'up'} {'right' if across > 0 else 'left'}"
        seen.add(clip.labels["motion"])
        for frame, without, mask, objects, position in zip(
            clip.frames, clip.without, clip.masks, clip.objects, clip.positions
        ):
            assert mask.sum() % 64 == 0 and mask.sum() <= 4 * 64 and (mask <= objects).all()
            assert (frame == without).all(axis=-1)[~mask].all()
            n_hidden += not mask.any()
            n_partly += 0 < mask.sum() < 4 * 64
            if mask.any():
                assert len(np.unique(frame[mask], axis=0)) == 1 and (frame != without).any(axis=-1)[mask].all()
                rows, columns = np.nonzero(mask)
                assert abs(columns + 0.5 - position[0]).max() <= 16 and abs(rows + 0.5 - position[1]).max() <= 16
        cells = clip.without[0][4::8, 4::8]
        resting = abs(cells - data.world_ground(48)[4::8, 4::8]).max(axis=-1) > 1
        assert resting.sum() == 4 and (clip.without == clip.without[0]).all()
    assert seen == set(data.MOTIONS) and n_hidden and n_partly  # the resting object hides it at times


def test_the_shape_of_the_world_is_that_of_what_moves():
    """Cut out of the first frame in which all of it can be seen, and turned, it is the piece that the label names."""
    n_whole = 0
    for index in range(60):
        clip = data.world_clip(index)
        whole = [mask for mask in clip.masks if mask.sum() == 4 * 64]
        n_whole += len(whole) > 0
        if whole:
            cells = whole[0][::8, ::8]
            cut = cells[cells.any(axis=1)][:, cells.any(axis=0)].astype(int)
            turned = [["".join(map(str, row)) for row in np.rot90(cut, k)] for k in range(4)]
            assert data.SHAPES[clip.labels["shape"]] in turned
    assert n_whole > 50


def test_four_frames_of_the_world_decide_the_next():
    following = {}
    for index in range(500):
        clip = data.world_clip(index, 20, 12)  # 2 pixels a cell
        height, width = np.ptp(np.argwhere(clip.masks.any(axis=0)), axis=0)
        states = [tuple(position) for position in clip.positions.tolist()]
        for t in range(4, 20):
            key = clip.labels["shape"], height, width, *states[t - 4 : t]
            following.setdefault(key, set()).add(states[t])
    assert len(following) > 60 and all(len(choices) == 1 for choices in following.values())


def test_no_motion_of_the_world_comes_round_within_16_frames():
    """However many frames back one copies from, no clip is continued so."""
    for index in range(200):
        x = data.world_clip(index).positions
        assert not any((x[lag:] == x[:-lag]).all() for lag in range(1, 13))  # what is left may be too short to tell


def test_the_class_of_a_world_image_is_its_shape():
    """One object, whole, in one of four turns: the class could always be known, and pixels alone decide."""
    turns = {}
    for name, rows in data.SHAPES.items():
        piece = np.array([[cell == "1" for cell in row] for row in rows])
        for k in range(4):
            turns[np.rot90(piece, k).tobytes(), np.rot90(piece, k).shape] = name
    items, ground, counts = sum(data.world_shards(range(400), 24, 1, data.WORLD_IMAGES), []), data.world_ground(24), {}
    for item in items:
        labels, (frame,) = item.read()
        cells = (abs(frame - ground).max(axis=-1) > 1).reshape(6, 4, 6, 4).all(axis=(1, 3))
        piece = cells[cells.any(axis=1)][:, cells.any(axis=0)]
        assert cells.sum() == 4 and turns[piece.tobytes(), piece.shape] == labels["shape"]
        counts[labels["shape"]] = counts.get(labels["shape"], 0) + 1
    assert set(counts) == set(data.SHAPES) and min(counts.values()) > 70
    assert data.shards_of(data.WORLD_IMAGES, 48, 4, 8)[0][0].name == items[0].name


def test_once_does_its_work_once(tmp_path):
    path, calls = tmp_path / "a/x.json", []
    work = lambda: calls.append(1) or {"a": [1, 2.5]}
    assert data.once(path, {"steps": (1, 2)}, work) == data.once(path, {"steps": [1, 2]}, work) == {"a": [1, 2.5]}
    assert len(calls) == 1
    with pytest.raises(ValueError, match="its steps is"):
        data.once(path, {"steps": 3}, work)


@pytest.mark.skipif(data.fcntl is None, reason="Windows has no such locks")
def test_a_dead_process_leaves_its_job(tmp_path):
    """What a process that is killed had claimed is free at once, and what another still has is left alone."""
    code = (
        "import sys, time, data\n"
        "with open(sys.argv[1], 'w') as file, data.claimed(file, 's2') as is_mine:\n"
        "    print(is_mine, flush=True); time.sleep(60)"
    )
    path = tmp_path / "lock"
    other = subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"True\n"
    with open(path, "w") as file:
        with data.claimed(file, "s2") as is_mine, data.claimed(file, "s1") as is_other:
            assert not is_mine and is_other
        other.kill()
        other.wait()
        with data.claimed(file, "s2") as is_mine:
            assert is_mine


JOBS = """
import os, sys, time
from functools import partial
from pathlib import Path
import torch
import data

out = Path(sys.argv[1])

def meet(name, others):
    (out / name).write_text(str(os.getpid()))
    for _ in range(1200):
        if all((out / other).exists() for other in others):
            return torch.get_num_threads()
        time.sleep(0.1)
    raise ValueError(f"{name} is alone")

def main():
    def share(*names, others=()):
        work = lambda name: partial(data.once, out / f"{name}.json", {}, partial(meet, name, [*names, *others]))
        return data.share_jobs(out, {name: work(name) for name in names}, torch.device("cpu"))

    print("begins", flush=True)
    print([share("a", "b"), share("c", "d")], flush=True)
    share("e", "f", others=["never"])

if __name__ == "__main__":
    data.run(main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a helper goes on to the last job")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_helper_shares_jobs_and_ends_with_its_program(tmp_path, number):
    """Each of two jobs waits for the other to begin, so that they end in two processes only; and so do the next two.

    Then the two stop: by Ctrl-C, which reaches both, or by a signal to the program alone.
    """
    (tmp_path / "jobs.py").write_text(JOBS)
    words = ["env", "OMP_NUM_THREADS=2", sys.executable, str(tmp_path / "jobs.py"), str(tmp_path)]
    how = {"cwd": ROOT, "env": ENVIRONMENT, "start_new_session": True, "text": True}
    program = subprocess.Popen(words, **how, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pids = [tmp_path / name for name in "ef"]
    until(lambda: all(path.exists() and path.read_text() for path in pids))
    pids = [int(path.read_text()) for path in pids]
    assert program.pid in pids and pids[0] != pids[1]
    if number == signal.SIGINT:
        os.killpg(program.pid, number)
    else:
        os.kill(program.pid, number)
    shown, errors = program.communicate(timeout=60)
    assert program.returncode == {signal.SIGINT: 130}.get(number, -number) and "Traceback" not in errors
    assert shown == "begins\n[{'a': 1, 'b': 1}, {'c': 1, 'd': 1}]\n"  # in one thread each, and the helper is silent
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def until(is_so):
    for _ in range(600):
        if is_so():
            return
        time.sleep(0.1)
    raise AssertionError("it takes too long")


def test_the_ground_of_the_world_says_where_it_is():
    ground = data.world_ground(48)
    patches = ground.reshape(6, 8, 6, 8, 3).swapaxes(1, 2).reshape(36, -1)
    distances = ((patches[:, None] - patches) ** 2).mean(axis=-1) + 1e9 * np.eye(36)
    assert distances.min() > 4 * dvae.ALIKE


def test_gif_and_strip_can_be_read_back(tmp_path):
    frames = data.world_clip(0, 5).frames
    rows = [[("truth", frames), ("model", frames)], [("truth", frames), ("model", frames)]]
    data.write_gif(tmp_path / "x.gif", rows, n_prompt=2)
    data.write_strip(tmp_path / "x.png", rows, n_prompt=2)
    gif = iio.imread(tmp_path / "x.gif")
    assert gif.shape[0] == 5
    green = lambda picture: (picture[..., 1] > picture[..., 0].astype(int) + 100).sum()
    assert green(gif[1]) > green(gif[2]) + 100  # the given frames are marked
    assert Image.open(tmp_path / "x.png").size[0] == 5 * (144 + 4)


# Files, stopping and resuming, flags.
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_out_of_memory_is_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        data.run(main)
    assert stop.value.code == 2 and "out of memory; try a smaller" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        with data.atomic_open(path) as file:
            file.write(b"half of the new")
            raise RuntimeError
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


class Loop:
    """A training whose state is the list of the steps it has done; `stop(step)` may end it within a step."""

    def __init__(self):
        self.saved, self.calls = [], []

    def resume(self):
        self.done = list(self.saved)
        return len(self.saved)

    def save(self, done):
        assert done == len(self.done)
        self.saved = list(self.done)
        self.calls.append(("save", done))

    def after_save(self, done):
        self.calls.append(("after", done))

    def run(self, n_steps, save_every=3, stop=lambda step: None, after_save=None):
        after_save = after_save or self.after_save
        for step, bar in data.resumable_steps("loop", n_steps, self.resume, self.save, save_every, after_save):
            assert bar.n == step
            stop(step)
            self.done.append(step)


def raise_at(*moments):
    """A callback that raises RuntimeError at each of these moments, the first time it comes."""
    left = set(moments)

    def fail(moment):
        if moment in left:
            left.remove(moment)
            raise RuntimeError(f"stopped at {moment}")

    return fail


def test_an_interrupted_loop_resumes_from_its_last_save():
    loop, stop = Loop(), raise_at(1, 5, 7)
    for moment in (1, 5, 7):
        with pytest.raises(RuntimeError, match=f"stopped at {moment}"):
            loop.run(8, stop=stop)
    assert loop.saved == [0, 1, 2, 3, 4, 5]
    loop.run(8, stop=stop)
    assert loop.saved == list(range(8)) and [done for what, done in loop.calls if what == "save"] == [3, 6, 8]


def test_after_save_is_made_up_for():
    """It may fail: the save it follows is good, and the next run calls it again for that save, before any step."""
    loop, fail = Loop(), raise_at(3, 8)

    def after_save(done):
        fail(done)
        loop.after_save(done)

    for done in (3, 8):
        with pytest.raises(RuntimeError):
            loop.run(8, after_save=after_save)
        assert len(loop.saved) == done
    loop.run(8, after_save=after_save)
    assert loop.calls == [(what, done) for done in (3, 6, 8) for what in ("save", "after")]


def test_a_loop_may_start_late():
    """At a step before which nothing was saved, so that there is nothing to make up for."""
    steps, calls = [], []
    for step, bar in data.resumable_steps("loop", 8, save=calls.append, save_every=3, after_save=calls.append, start=6):
        assert bar.n == step
        steps.append(step)
    assert steps == [6, 7] and calls == [8, 8]


def test_without_a_number_of_steps_a_loop_saves_every_minute(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(data, "time", SimpleNamespace(time=lambda: now[0]))

    def half_a_minute(step):
        now[0] += 25

    loop = Loop()
    loop.run(8, save_every=None, stop=half_a_minute)
    assert loop.calls == [(what, done) for done in (3, 6, 8) for what in ("save", "after")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(number, capsys):
    """Then KeyboardInterrupt, without what follows a save. A second signal would kill; afterwards all is as before."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    loop = Loop()

    def stop(step):
        assert signal.getsignal(number) not in (*before, signal.SIG_DFL)
        if step == 4:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_DFL

    with pytest.raises(KeyboardInterrupt):
        loop.run(8, stop=stop)
    assert loop.saved == [0, 1, 2, 3, 4] and loop.calls == [("save", 3), ("after", 3), ("save", 5)]
    assert "stopped and saved at step 5" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    loop.run(8)
    assert loop.saved == list(range(8))


def test_handlers_of_signals_are_restored():
    handlers = lambda: [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    before = handlers()
    Loop().run(2)
    assert handlers() == before
    with pytest.raises(RuntimeError):
        Loop().run(2, stop=raise_at(1))
    assert handlers() == before
    for _ in data.resumable_steps("no save", 2):  # nothing could be saved: a signal stops it as any program
        assert handlers() == before


def test_a_state_is_restored_or_refused(tmp_path, monkeypatch):
    model, other, path = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3), tmp_path / "state"
    written, read = (data.state_file(path, {"model": m}, {"a": (1, 2)}) for m in (model, other))
    assert read["resume"]() == 0
    monkeypatch.setattr(data, "rank", lambda: 1)
    written["save"](7)
    assert not path.exists()  # one process writes
    monkeypatch.undo()
    written["save"](7)
    assert read["resume"]() == 7 and torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)
    third = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"state: its a is \(1, 2\), here it is 3; remove it to start over"):
        data.state_file(path, {"model": third}, {"a": 3})["resume"]()
    assert data.state_file(path, {"model": third}, {"a": 3}, refuse=False)["resume"]() == 0
    assert not torch.equal(third.weight, model.weight)
    for content in (path.read_bytes()[:-100], b"hello", b"something else", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not the state of a stopped training; remove it to start over"):
            read["resume"]()


@pytest.mark.parametrize(
    "parse, good, bad",
    [
        (data.number(int, at_least=1), {"1": 1, "30": 30}, ["0", "-1", "1.5", "x", ""]),
        (data.number(int, at_least=0), {"0": 0}, ["-1"]),
        (data.number(int, at_least=8, multiple_of=8), {"8": 8, "128": 128}, ["0", "-8", "4", "12"]),
        (data.number(float, above=0), {"1e-9": 1e-9, "3": 3.0}, ["0", "-1", "inf", "nan", "x"]),
        (data.number(float, at_least=0), {"0": 0.0}, ["-1e-9", "inf", "nan"]),
        (data.number(float), {"-1e30": -1e30}, ["inf", "-inf", "nan"]),
    ],
)
def test_numbers_within_bounds(parse, good, bad):
    for text, value in good.items():
        assert parse(text) == value and type(parse(text)) is type(value)
    for text in bad:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            parse(text)


def test_what_a_user_reads_of_a_bad_number(capsys):
    parser = data.Parser()
    parser.add_argument("--n", type=data.number(int, at_least=8, multiple_of=8))
    for text, message in {
        "4": "must be at least 8",
        "12": "must be a multiple of 8",
        "x": "invalid int value: 'x'",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(["--n", text])
        assert capsys.readouterr().err == f"error: argument --n: {message}\n"
