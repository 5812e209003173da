"""sample.py: continuation within the window and beyond it, and the pictures."""

import json
import shutil
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

import data
import dvae
import sample
import toto

COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = toto.Toto(toto.Config(dim=32, n_heads=2, n_layers=2, hidden=32, vocab_size=36))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4) if p.dim() == 2 else None
    return model.eval()


def greedy_frame(model, kept):
    """The next frame by fresh uncached passes over [start] + kept frames, one token at a time."""
    B, _, h, w = kept.shape
    start = torch.full((B, 1), toto.VIDEO_START)
    ids = torch.cat((start, kept.flatten(1) + toto.FIRST_CODE), dim=1)
    for _ in range(h * w):
        ids = torch.cat((ids, toto.FIRST_CODE + model(ids)[:, -1:, toto.FIRST_CODE :].argmax(-1)), dim=1)
    return (ids[:, -h * w :] - toto.FIRST_CODE).view(B, 1, h, w)


def check_frames(model, codes, n_given):
    """Within the window of 4 frames after all before it; beyond, after [start] and the last 3, run afresh."""
    with torch.no_grad():
        for f in range(n_given, codes.shape[1]):
            assert torch.equal(codes[:, f : f + 1], greedy_frame(model, codes[:, max(f - 3, 0) : f])), f


@pytest.mark.parametrize("how", ["a cache each time", "one cache"])
def test_every_frame_is_what_the_model_gives_after_the_kept_ones(model, how):
    prompt = torch.randint(0, 32, (3, 2, 2, 3))
    cache = toto.Cache(model, 3, 1 + 4 * 6) if how == "one cache" else None
    codes = toto.continue_video(model, prompt, n_frames=64, window=4, temperature=0, cache=cache)
    assert codes.shape == (3, 64, 2, 3) and torch.equal(codes[:, :2], prompt)
    check_frames(model, codes, 2)


def test_a_prompt_longer_than_the_window(model):
    prompt = torch.randint(0, 32, (1, 6, 2, 3))
    codes = toto.continue_video(model, prompt, 7, window=4, temperature=0)
    with torch.no_grad():
        assert torch.equal(codes[:, 6:], greedy_frame(model, prompt[:, 3:]))


def write_checkpoint(folder, model, tokenizer):
    dvae.save(tokenizer, folder / "dvae.pt")
    checkpoint = {"model": model.state_dict(), "config": vars(model.config), "step": 0}
    checkpoint |= {"tokenizer": tokenizer.fingerprint(), "resolution": 16, "stride": 2, "frames": 4}
    torch.save(checkpoint, folder / "toto.pt")


def run_sample(monkeypatch, folder, *arguments, run=lambda main: main()):
    base = ["sample.py", "--checkpoint", folder / "toto.pt", "--out", folder / "out", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in [*base, "--frames", 6, "--samples", 2, *arguments]])
    run(sample.main)
    return np.load(folder / "out" / "sample.npy")


@pytest.mark.parametrize("prompt", ["world", "video", "image", "folder", "nothing"])
def test_the_program(model, untrained_tokenizer, tmp_path, monkeypatch, prompt):
    write_checkpoint(tmp_path, model, untrained_tokenizer)
    iio.imwrite(tmp_path / "v.mp4", data.world_clip(0, 9, 32).frames, plugin="FFMPEG", fps=10)
    (tmp_path / "folder").mkdir()
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / "folder" / f"{i}.png")
    arguments, n_given = {
        "world": (["--prompt-frames", 2], 2),
        "video": (["--prompt", tmp_path / "v.mp4", "--prompt-frames", 2], 2),
        "image": (["--prompt", tmp_path / "folder" / "1.png"], 1),
        "folder": (["--prompt", tmp_path / "folder" / "2.png", tmp_path / "folder"], 4),
        "nothing": (["--imagine"], 0),
    }[prompt]
    codes = run_sample(monkeypatch, tmp_path, *arguments, "--seed", 1)
    assert codes.shape == (2, 6, 2, 2)
    if prompt == "folder":
        pictures = [Image.open(tmp_path / "folder" / f"{i}.png").resize((21, 16)) for i in (2, 0, 1, 2)]
        expected = untrained_tokenizer.encode(np.stack([np.asarray(p)[:, 2:18] for p in pictures])).numpy()
        assert np.array_equal(codes[0, :4], expected)
    gif, first = iio.imread(tmp_path / "out" / "sample.gif"), (tmp_path / "out" / "sample.gif").read_bytes()
    assert gif.shape[0] == 6 and Image.open(tmp_path / "out" / "sample.png").size[0] == 6 * (144 + 4)
    again = run_sample(monkeypatch, tmp_path, *arguments, "--seed", 1)
    assert (tmp_path / "out" / "sample.gif").read_bytes() == first and np.array_equal(again, codes)
    other = run_sample(monkeypatch, tmp_path, *arguments, "--seed", 2)
    assert not np.array_equal(other[:, n_given:], codes[:, n_given:])


@COMPILER
def test_compiled_samples_are_the_same(model, untrained_tokenizer, tmp_path, monkeypatch):
    """Three at a time, far beyond the window, each frame against a fresh pass of the uncompiled model."""
    write_checkpoint(tmp_path, model, untrained_tokenizer)
    monkeypatch.setattr(data, "fast_dtype", lambda device: torch.float32)
    torch.compiler.reset()
    how = ["--compile", "--samples", 3, "--frames", 24, "--prompt-frames", 2, "--temperature", 0]
    codes = torch.as_tensor(run_sample(monkeypatch, tmp_path, *how).astype(np.int64))
    assert codes.shape == (3, 24, 2, 2)
    check_frames(model, codes, 2)


def test_without_a_compiler(model, untrained_tokenizer, tmp_path, monkeypatch, capsys):
    from torch._inductor import config  # takes seconds: only where something is compiled

    write_checkpoint(tmp_path, model, untrained_tokenizer)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    with config.patch({"cpp.cxx": (None, "/nonexistent")}), pytest.raises(SystemExit) as stop:  # as $CXX would be
        run_sample(monkeypatch, tmp_path, "--compile", run=data.run)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("error: torch.compile failed")


def test_images_start_with_their_token(model, untrained_tokenizer, tmp_path, monkeypatch):
    write_checkpoint(tmp_path, model, untrained_tokenizer)
    codes = run_sample(monkeypatch, tmp_path, "--imagine", "--images", "--frames", 3, "--temperature", 0)
    ids = torch.full((1, 1), toto.IMAGE_START)
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat((ids, toto.FIRST_CODE + model(ids)[:, -1:, toto.FIRST_CODE :].argmax(-1)), dim=1)
    assert np.array_equal(codes[0].ravel(), ids[0, 1:].numpy() - toto.FIRST_CODE)


def test_score_by_hand():
    """One clip of 4 frames of 2 x 2 pixels, a code each, which decodes to a grey of 10 times the code."""

    class tokenizer:
        decode = lambda codes: (10 * codes)[..., None].expand(*codes.shape, 3).to(torch.uint8)

    codes = torch.tensor([[[1, 2], [3, 4]], [[1, 2], [3, 5]], [[2, 2], [3, 5]], [[2, 2], [3, 4]]])[None]
    made = codes.clone()
    made[0, 2, 0, 0], made[0, 3, 1, 1] = 1, 8
    truth = tokenizer.decode(codes).numpy() + np.uint8(2)
    moving = np.zeros((1, 4, 2, 2), bool)
    moving[0, 1, 1, 1] = moving[0, 2, 0, 0] = True
    wiped = np.full((1, 2, 2, 3), 27, np.uint8)
    rows = sample.score(made, codes, truth, 2, tokenizer, moving, wiped)
    decibel = lambda *errors: 10 * np.log10(255**2 / np.mean(np.square(errors)))
    assert [row["frame"] for row in rows] == [2, 3]
    assert rows[0]["codes"] == 0.75 and rows[0]["codes_repeat"] == 0.75 and rows[1]["codes_repeat"] == 0.5
    assert rows[0]["psnr"] == pytest.approx(decibel(12, 2, 2, 2), abs=1e-4)
    assert rows[0]["psnr_repeat"] == pytest.approx(decibel(10, 0, 0, 0), abs=1e-4)
    assert rows[0]["psnr_tokenizer"] == pytest.approx(decibel(2), abs=1e-4)
    assert rows[0]["psnr_moving"] == pytest.approx(decibel(12, 2), abs=1e-4)
    assert rows[1]["psnr_moving"] == pytest.approx(decibel(38), abs=1e-4)
    assert rows[0]["psnr_moving_wiped"] == pytest.approx(decibel(22 - 27, 52 - 27), abs=1e-4)
    assert rows[0]["codes_copy"] == 0.75 and rows[1]["codes_any"] == 0.75  # two given frames: copying repeats the last


def test_no_copy_passes_for_skill():
    """A motion that comes round after two frames is known to copying, which then has all codes right."""
    there_and_back = torch.tensor([[[1, 2]], [[2, 1]]]).repeat(4, 1, 1)  # (8, 1, 2)
    turns_late = torch.tensor([1, 2, 3, 4, 1, 2, 3, 4]).view(8, 1, 1).expand(8, 1, 2)
    codes = torch.stack((there_and_back, turns_late))
    assert sample.best_copies(codes, 4).tolist() == [[0, 1, 2, 3, 2, 3, 2, 3], [0, 1, 2, 3, 3, 3, 3, 3]]
    assert sample.best_copies(codes, 5)[1].tolist() == [0, 1, 2, 3, 4, 1, 2, 3]  # the fifth gives it away
    assert sample.best_copies(codes, 1).tolist() == 2 * [8 * [0]]

    class tokenizer:
        decode = lambda codes: codes[..., None].expand(*codes.shape, 3).to(torch.uint8)

    truth = tokenizer.decode(codes).numpy()
    rows = sample.score(codes.roll(1, 0), codes, truth, 4, tokenizer, np.ones(truth.shape[:-1], bool), truth[:, 3])
    assert rows[1]["codes_copy"] == 0.5 and rows[1]["codes_repeat"] == 0.5 and rows[0]["codes_copy"] == 0.5
    assert rows[1]["psnr_moving_copy"] == pytest.approx(10 * np.log10(255**2 / 2), abs=1e-3)  # in one of two, 2 for 4
    assert rows[0]["codes_any"] == 1.0 and rows[1]["codes_any"] == 1.0


def test_score_of_the_program(model, untrained_tokenizer, tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path, model, untrained_tokenizer)
    run_sample(monkeypatch, tmp_path, "--score", 5, "--frames", 4, "--prompt-frames", 2)
    rows = json.loads((tmp_path / "out" / "score.json").read_text())["frames"]
    assert [row["frame"] for row in rows] == [2, 3]
    output = capsys.readouterr().out
    assert "ceiling" in output and " mean" in output and "tokens/s" in output
    run_sample(monkeypatch, tmp_path, "--score", 2, "--frames", 4, "--prompt", "world-masks")
    assert [row["frame"] for row in json.loads((tmp_path / "out" / "score.json").read_text())["frames"]] == [3]


def test_pairs_of_the_world():
    """Every second frame shows where the objects of the one before are: those pixels differ from the ground."""
    frames = data.world_pairs(5, 6, 48)
    assert frames.shape == (6, 48, 48, 3)
    for question, answer in zip(frames[::2], frames[1::2]):
        ground = data.world_ground(48)
        differs = np.abs(question - ground).max(axis=-1) > 1
        marked = (answer == data.COLOURS[0]).all(axis=-1)
        assert marked.any() and np.array_equal(differs, marked) and (abs(answer - ground)[~marked] <= 0.5).all()
    assert (frames[0] != frames[2]).any() and np.array_equal(data.world_pairs(5, 4, 48), data.world_pairs(5, 4, 48))
