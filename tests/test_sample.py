"""sample.py: continuation within the window and beyond it, and the pictures."""

import sys

import imageio.v3 as iio
import pytest
import torch
from PIL import Image

import data
import dvae
import sample
import toto


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


def test_every_frame_is_what_the_model_gives_after_the_kept_ones(model):
    """Within the window of 4 frames after all before it; beyond, after [start] and the last 3, run afresh."""
    prompt = torch.randint(0, 32, (3, 2, 2, 3))
    codes = sample.continue_video(model, prompt, n_frames=9, window=4, temperature=0)
    assert codes.shape == (3, 9, 2, 3) and torch.equal(codes[:, :2], prompt)
    with torch.no_grad():
        for f in range(2, 9):
            assert torch.equal(codes[:, f : f + 1], greedy_frame(model, codes[:, max(f - 3, 0) : f])), f


def test_a_prompt_longer_than_the_window(model):
    prompt = torch.randint(0, 32, (1, 6, 2, 3))
    codes = sample.continue_video(model, prompt, 7, window=4, temperature=0)
    with torch.no_grad():
        assert torch.equal(codes[:, 6:], greedy_frame(model, prompt[:, 3:]))


def write_checkpoint(folder, model, tokenizer):
    dvae.save(tokenizer, folder / "dvae.pt")
    checkpoint = {
        "model": model.state_dict(),
        "config": vars(model.config),
        "step": 0,
        "tokenizer": tokenizer.fingerprint(),
    }
    torch.save(checkpoint | {"resolution": 16, "stride": 2, "frames": 4}, folder / "toto.pt")


@pytest.mark.parametrize("prompt", ["world", "video", "image"])
def test_the_program(model, untrained_tokenizer, tmp_path, monkeypatch, prompt):
    write_checkpoint(tmp_path, model, untrained_tokenizer)
    arguments = [
        "sample.py",
        "--checkpoint",
        str(tmp_path / "toto.pt"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    arguments += ["--frames", "6", "--prompt-frames", "2", "--samples", "2"]
    if prompt == "video":
        iio.imwrite(tmp_path / "v.mp4", data.world_clip(0, 9, 32).frames, plugin="FFMPEG", fps=10)
        arguments += ["--prompt", str(tmp_path / "v.mp4")]
    if prompt == "image":
        Image.new("RGB", (40, 30), "red").save(tmp_path / "i.png")
        arguments += ["--prompt", str(tmp_path / "i.png")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--seed", "1"])
    sample.main()
    gif, first = iio.imread(tmp_path / "out" / "sample.gif"), (tmp_path / "out" / "sample.gif").read_bytes()
    assert gif.shape[0] == 6 and Image.open(tmp_path / "out" / "sample.png").size[0] == 6 * (144 + 4)
    sample.main()
    assert (tmp_path / "out" / "sample.gif").read_bytes() == first  # the seed decides everything
    monkeypatch.setattr(sys, "argv", [*arguments, "--seed", "2"])
    sample.main()
    assert (tmp_path / "out" / "sample.gif").read_bytes() != first
