"""paper/table3_tokenizers.py but for its VQGAN: patches, their targets, and n-grams against plain counts."""

import json
import os
import signal
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import dvae
import probe
import toto
import train
from conftest import PAIR, ROOT, fake_tokens
from conftest import run as run_program

sys.path.insert(0, str(ROOT / "paper"))
import table3_tokenizers as table3

R, SIDE = 32, 4  # pixels of an image, and its patches in a row


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """40 images to pre-train on, and a task of two classes."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    for i in range(40):
        for name in (f"images/{i}", f"task/train/{'ab'[i % 2]}/{i}", f"task/val/{'ab'[i % 2]}/{i + 40}"):
            path = folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            frame = data.world_clip(i, 1, 2 * R).frames[0] // 2 + rng.integers(100 if i % 2 else 20, size=3)
            Image.fromarray(frame.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def ways(media, untrained_tokenizer, tmp_path_factory):
    args = SimpleNamespace(data=media / "images", probe=media / "task", out=tmp_path_factory.mktemp("out"), stride=4)
    args.frames, args.side, args.size, args.has_probe = 4, SIDE, "tiny", True
    codes, finer = (probe.image_sets(args, untrained_tokenizer, size) for size in (R, 2 * R))
    pixels = probe.image_sets(args, table3.PixelCodec(), R)
    ways = table3.Way("codes", 0, codes), table3.Way("finer", 0, finer)
    return args, *ways, table3.Way("regress", 0, codes, pixels, True), table3.Way("classify", 0, codes, pixels)


def test_pixels_are_kept_as_they_are():
    frames = np.random.default_rng(0).integers(256, size=(3, R, R, 3), dtype=np.uint8)
    codes = table3.PixelCodec().encode(frames)
    assert list(codes.shape[1:]) == table3.PixelCodec().grid(R) and codes.min() >= 0 and codes.max() < 2**16
    ids = np.arange(10, 10 + 3 * SIDE**2 + 2)
    rows = table3.patch_rows(codes.numpy().astype(np.uint16), ids, SIDE)
    assert (rows[:, -1] == ids).all() and not rows[[0, -1], :-1].any()
    side = R // SIDE
    for f, y, x in ((0, 0, 0), (1, 2, 3), (2, 3, 0)):
        patch = frames[f, y * side : (y + 1) * side, x * side : (x + 1) * side]
        assert (rows[1 + f * SIDE**2 + y * SIDE + x, :-1].reshape(patch.shape) == patch).all()


def test_targets_are_normalised_as_in_mae():
    """(x - mean) / √(var + 1e-6) with the unbiased variance, in float64 and by numpy; a plain patch becomes 0."""
    x = np.random.default_rng(0).random((5, 192))
    x[3] = 0.7
    expected = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(table3.normalised(torch.from_numpy(x)).numpy(), expected, atol=1e-12)
    assert abs(expected[3]).max() < 1e-9


def test_all_ways_see_the_same_images(ways):
    """Sequence by sequence: the patches are those of the images whose codes the other ways see."""
    args, codes, finer, regress, classify = ways
    tokens = codes.codes["pretrain"]
    (n, of_codes), (_, of_finer) = codes.sequences(args, 7), finer.sequences(args, 7)
    (_, of_regress), (_, of_classify) = regress.sequences(args, 7), classify.sequences(args, 7)
    frames = {}
    for item in sum(data.media_shards(args.data, R, 4), []):
        frames[tokens.codes(tokens.names.index(item.name)).tobytes()] = data.crop(next(iter(item.read()[1])), R)
    assert n == len(of_codes(0)) * 9  # 38 of 40 images, 4 in a sequence
    for i in range(n):
        (ids,), (rows,), (short,) = of_codes(i), of_classify(i), of_regress(i)
        assert ids[0] == toto.IMAGE_START and ids[-1] == toto.END and (rows[:, -1] == ids).all()
        assert (short == rows[:-1]).all()
        for f, part in enumerate((ids[1:-1] - toto.FIRST_CODE).reshape(4, SIDE, SIDE)):
            patches = rows[1 + f * SIDE**2 :][: SIDE**2, :-1].astype(np.uint8)
            assert (patches == dvae.cut(frames[part.astype(np.uint16).tobytes()][None], R // SIDE)).all()
        parts = of_finer(i)  # each a sequence of one image of four times as many codes
        assert parts.shape == (4, 4 * SIDE**2 + 2)
        assert (parts[:, 0] == toto.IMAGE_START).all() and (parts[:, -1] == toto.END).all()
    images = [t.tobytes() for t in (of_finer(0)[:, 1:-1] - toto.FIRST_CODE).reshape(4, -1).astype(np.uint16)]
    tokens, coarse = finer.codes["pretrain"], codes.codes["pretrain"]
    names = [tokens.names[[tokens.codes(k).tobytes() for k in range(40)].index(image)] for image in images]
    expected = [coarse.codes(coarse.names.index(name)).ravel() + toto.FIRST_CODE for name in names]
    assert (of_codes(0)[0, 1:-1] == np.concatenate(expected)).all()


def test_patches_go_in_and_come_out(ways):
    """Losses written out; the start's pixels do not matter, a later patch's do; no place sees a later one."""
    args, _, _, *both = ways
    for way in both:
        torch.manual_seed(0)
        model = way.model(args, torch.device("cpu"))
        model.compute_dtype = torch.float32
        rows = torch.from_numpy(way.sequences(args, 0)[1](0))
        x = list(model.residual_stream(rows[:, :-1]))
        pixels, ids = rows[0, 1:, :-1].double() / 255, rows[0, 1:, -1].long()
        if way.predicts_pixels:
            normal = (pixels - pixels.mean(dim=1, keepdim=True)) / (pixels.var(dim=1, keepdim=True) + 1e-6).sqrt()
            expected = ((model.patch_out(model.norm(x[-1]))[0] - normal) ** 2).mean()
        else:
            expected = torch.nn.functional.cross_entropy(model.logits(x[-1])[0], ids)
        assert model(rows[:, :-1], rows[:, 1:]).item() == pytest.approx(expected.item(), rel=1e-4)
        changed = rows.clone()
        changed[:, 0, :-1] += 50
        assert torch.equal(model.features(changed, [2])[2], model.features(rows, [2])[2])
        changed[:, 9, :-1] += 50
        a, b = (model.features(r, [2])[2][0] for r in (rows, changed))
        assert torch.equal(a[:9], b[:9]) and not torch.allclose(a[9], b[9])
        linear = model.patch_in((rows[0, 5, :-1].float() / 255 - 0.5) / 0.25)
        torch.testing.assert_close(x[0][0, 5], linear)
        torch.testing.assert_close(x[0][0, 0], model.start)
        model(rows[:, :-1], rows[:, 1:]).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_n_grams_by_hand(tmp_path):
    """Pairs and triples of raster neighbours, rows wrapped, images apart; counted by Counter, most frequent first."""
    codes = np.random.default_rng(0).integers(4, size=(5, 3, 4), dtype=np.uint16)
    for n in (1, 2, 3):
        flat = [image.ravel().tolist() for image in codes]
        expected = Counter(tuple(image[i : i + n]) for image in flat for i in range(12 - n + 1))
        counts = table3.n_grams(codes, n, 4)
        assert counts.tolist() == sorted(expected.values(), reverse=True)
    figures = table3.describe(fake_tokens(tmp_path / "tokens", [1, 1], grid=(16, 16)))
    assert figures["places"] == [2 * 256, 2 * 255, 2 * 254] and figures["distinct"] == [2, 2, 2]
    assert figures["coverage"] == 2 / 8192 and figures["shares"][0] == [0.5, 0.5]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["table3_tokenizers.py", *map(str, arguments)])
    table3.main()


def test_from_images_to_the_table(media, tmp_path, monkeypatch, capsys, untrained_tokenizer):
    """All of it, tiny: stopped within a run and resumed, and in two processes, the rows are the same."""
    pytest.importorskip("matplotlib", reason="draws by matplotlib: pip install -r paper/requirements.txt")
    dvae.save(untrained_tokenizer, tmp_path / "dvae.pt")
    small = table3.Config(ch=4, ch_mult=(1, 1, 1, 1, 1), blocks=1, z_channels=8, embed_dim=4, vocab_size=8, groups=1)
    for vocab_size in (8, 16):
        torch.manual_seed(0)
        table3.save(table3.VQGAN(table3.replace(small, vocab_size=vocab_size)), tmp_path / f"{vocab_size}.ckpt")
    arguments = ["--data", media / "images", "--probe", media / "task", "--tokenizer", tmp_path / "dvae.pt", "--vqgan"]
    arguments += [tmp_path / "8.ckpt", tmp_path / "16.ckpt", "--resolution", R, "--steps", 3, "--seeds", 1, "--seed", 1]
    arguments += ["--batch-tokens", 256, "--micro-batch", 2, "--lr", 0.002, "--device", "cpu", "--out"]
    steps, take_step = [], train.take_step

    def take_step_and_stop_once(*inputs):
        steps.append(1)
        if len(steps) == 3 * 6 + 5:  # the second step of a run, after one of the same command without a stop
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(*inputs)

    def report(name):
        return json.loads((tmp_path / name / "table3.json").read_text())

    monkeypatch.setattr(train, "take_step", take_step_and_stop_once)
    run(monkeypatch, *arguments, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *arguments, tmp_path / "stopped")
    run(monkeypatch, *arguments, tmp_path / "stopped")
    assert len(steps) == 2 * 3 * 6 and report("stopped") == report("whole")
    run(monkeypatch, *arguments, tmp_path / "stopped")
    assert len(steps) == 2 * 3 * 6  # all is kept
    with pytest.raises(ValueError, match="its lr is 0.002, here it is 0.1"):
        run(monkeypatch, *arguments, tmp_path / "stopped", "--lr", 0.1)

    rows = report("whole")["rows"]
    names = [(row["name"], row["side"], row["vocabulary"]) for row in rows]
    of_dvae, of_vqgan = "dVAE-dVAE", "VQGAN-VQGAN"
    assert names[:4] == [(of_dvae, 4, 32), (of_dvae, 8, 32), (of_vqgan, 4, 8), (of_vqgan, 4, 16)]
    assert names[4:] == [("patch-patch", 4, None), ("patch-dVAE", 4, 32)]
    for row in rows:
        assert np.shape(row["top1"]) == np.shape(row["untrained"]) == (1, 5) and np.isfinite(row["loss"]).all()
    assert (tmp_path / "whole" / "table3.png").stat().st_size > 10_000
    assert not list((tmp_path / "whole" / "runs").glob("*.pt"))
    out = capsys.readouterr().out
    assert "patch-patch" in out and "60.6" in out and "raw pixels" in out and "chance: 50.0" in out

    figures = [a for a in arguments if a not in ("--probe", media / "task")]
    run(monkeypatch, *figures, tmp_path / "whole")  # without --probe the figures alone, of the same images
    alone = json.loads((tmp_path / "whole" / "n_grams.json").read_text())
    assert alone["grams"] == report("whole")["grams"] and not alone["rows"] and report("whole")["rows"] == rows

    run_program(["paper/table3_tokenizers.py", *map(str, arguments), str(tmp_path / "pair")], PAIR)
    for one, two in zip(rows, report("pair")["rows"]):
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=0.01)
        np.testing.assert_allclose(one["untrained"], two["untrained"], atol=0.06)  # one image of 40 is 0.025


def test_vqgans_are_trained_once(media, tmp_path, monkeypatch):
    """Where --vqgan gives none they stay in --out, and other settings are refused there."""
    monkeypatch.setattr(table3, "LARGE", table3.replace(table3.SMALL, vocab_size=16))
    args = SimpleNamespace(data=str(media / "images"), out=tmp_path, seed=0, vqgan=None, vqgan_steps=2, stride=4)
    device, first = torch.device("cpu"), table3.vqgans
    models = first(args, R, device)
    assert [model.config.vocab_size for model in models] == [64, 16] and not list(tmp_path.glob("*.training*"))
    monkeypatch.setattr(table3, "train_vqgan", None)
    assert [model.fingerprint() for model in first(args, R, device)] == [model.fingerprint() for model in models]
    args.vqgan_steps = 3
    with pytest.raises(ValueError, match="its steps is 2, here it is 3; remove it"):
        first(args, R, device)
    args.vqgan = 2 * [tmp_path / "vqgan-64.pt"]
    with pytest.raises(ValueError, match="two models with f = 16, of different vocabularies"):
        first(args, R, device)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--data", "world"], "has videos; of the built-in world these are for world-images"),
        (["--probe", "IMAGES"], "no such folder; --probe needs train/<class>"),
        (["--vqgan", "IMAGES/0.png", "IMAGES/1.png"], "0.png is not a VQGAN checkpoint"),
        (["--data", "nowhere", "--probe", "TASK"], "nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, words, media, tmp_path, monkeypatch, untrained_tokenizer):
    pytest.importorskip("matplotlib", reason="draws by matplotlib: pip install -r paper/requirements.txt")
    dvae.save(untrained_tokenizer, tmp_path / "dvae.pt")
    places = {"IMAGES": str(media / "images"), "TASK": str(media / "task")}
    for name, path in places.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    with pytest.raises((ValueError, OSError), match=words):
        run(monkeypatch, "--tokenizer", tmp_path / "dvae.pt", "--out", tmp_path / "out", *arguments)
