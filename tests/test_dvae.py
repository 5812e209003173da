"""dvae.py against OpenAI's DALL-E package, its published sizes, and what its functions promise."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import dvae
from conftest import ENVIRONMENT, ROOT, run

TINY = dvae.Config(n_hid=8, blocks_per_group=2, n_init=8, vocab_size=32)
NARROW = dvae.Config(n_hid=8, blocks_per_group=1, n_init=16, vocab_size=64, residual_gain=1.0)


def test_published_sizes_and_names():
    """§3.4's tokenizer: 53,786,240 + 43,829,766 parameters, under the names of the published files."""
    with torch.device("meta"):
        model = dvae.DVAE(dvae.Config())
    assert sum(p.numel() for p in model.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in model.decoder.parameters()) == 43_829_766
    names = set(model.encoder.state_dict())
    assert {"blocks.input.w", "blocks.group_2.block_1.id_path.b", "blocks.group_4.block_2.res_path.conv_4.w"} < names
    assert "blocks.group_1.block_1.id_path.w" not in names and "blocks.output.conv.w" in names


def test_matches_the_dall_e_package():
    """The same weights give the same logits and the same output as OpenAI's own code."""
    theirs = pytest.importorskip("dall_e", reason="pip install --no-deps DALL-E attrs requests to compare with it")
    ours = dvae.DVAE(TINY)
    encoder = theirs.encoder.Encoder(n_hid=8, vocab_size=32)
    decoder = theirs.decoder.Decoder(n_init=8, n_hid=8, vocab_size=32)
    ours.encoder.load_state_dict(encoder.state_dict())
    ours.decoder.load_state_dict(decoder.state_dict())
    frames = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    x = theirs.map_pixels(frames.permute(0, 3, 1, 2) / 255)
    with torch.no_grad():
        torch.testing.assert_close(ours.prepare(frames), x)
        logits = encoder(x)
        torch.testing.assert_close(ours.encoder(x), logits, atol=1e-4, rtol=1e-4)
        codes = logits.argmax(dim=1)
        assert torch.equal(ours.encode(frames), codes) and codes.shape == (2, 4, 6)
        one_hot = torch.nn.functional.one_hot(codes, 32).permute(0, 3, 1, 2).float()
        output = decoder(one_hot)
        torch.testing.assert_close(ours.decoder(ours.decoder.embed(codes)), output, atol=1e-4, rtol=1e-4)
        pixels = theirs.unmap_pixels(torch.sigmoid(output[:, :3])).permute(0, 2, 3, 1)
        assert (ours.decode(codes) / 255 - pixels).abs().max() <= 0.51 / 255


@pytest.mark.parametrize("n_hid, n_init, vocab_size", [(8, 8, 32), (256, 128, 8192)])
def test_openai_files_are_read_without_the_package(tmp_path, monkeypatch, n_hid, n_init, vocab_size):
    """Whole modules pickled by the DALL-E package, as the published files are: same codes, same pixels."""
    theirs = pytest.importorskip("dall_e", reason="pip install --no-deps DALL-E attrs requests to compare with it")
    if n_hid == 256 and "FULL_SIZE" not in os.environ:
        pytest.skip("half a minute and 2 GB: FULL_SIZE=1 python -m pytest runs it")
    encoder = theirs.encoder.Encoder(n_hid=n_hid, vocab_size=vocab_size)
    decoder = theirs.decoder.Decoder(n_init=n_init, n_hid=n_hid, vocab_size=vocab_size)
    for module, name in ((encoder, "encoder"), (decoder, "decoder")):
        for parameter in module.parameters() if n_hid == 8 else ():
            torch.nn.init.normal_(parameter, std=0.1)  # biases too
        torch.save(module, tmp_path / f"{name}.pkl")
    frames = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        logits = encoder(theirs.map_pixels(frames.permute(0, 3, 1, 2) / 255))
        codes, (first, second) = logits.argmax(dim=1), logits.topk(2, dim=1).values.unbind(dim=1)
        clear = first - second > 1e-4 * logits.std()
        output = decoder(torch.nn.functional.one_hot(codes, vocab_size).permute(0, 3, 1, 2).float())
        pixels = theirs.unmap_pixels(torch.sigmoid(output[:, :3])).permute(0, 2, 3, 1)
    for name in [name for name in sys.modules if name.split(".")[0] == "dall_e"]:
        monkeypatch.setitem(sys.modules, name, None)  # as if the package were not installed
    model = dvae.load(tmp_path)
    dvae.save(model, tmp_path / "copy.pt")
    for model in (model, dvae.load(tmp_path / "copy.pt")):
        assert model.config == dvae.Config(n_hid, 2, n_init, vocab_size)
        assert torch.equal(model.encode(frames)[clear], codes[clear]) and clear.float().mean() > 0.9
        assert (model.decode(codes) / 255 - pixels).abs().max() <= 0.51 / 255


def test_openai_files_execute_nothing(tmp_path):
    for bomb in (Bomb(tmp_path / "proof"), {"blocks": Bomb(tmp_path / "proof")}):
        torch.save(bomb, tmp_path / "encoder.pkl")
        torch.save(bomb, tmp_path / "decoder.pkl")
        with pytest.raises(ValueError, match="OpenAI's encoder.pkl and decoder.pkl"):
            dvae.load(tmp_path)
    assert not (tmp_path / "proof").exists()
    (tmp_path / "decoder.pkl").unlink()
    torch.save(torch.zeros(3), tmp_path / "encoder.pkl")
    with pytest.raises(ValueError, match="OpenAI"):
        dvae.load(tmp_path)


def test_initial_weights():
    """N(0, 1/√fan-in) and no bias."""
    conv = dvae.Conv2d(64, 128, 3)
    assert conv.w.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.03) and not conv.b.any()


def random_frames(n, side=16):
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def world_frames(n, side=16, first=0):
    return np.concatenate([data.world_clip(first + i, 4, side).frames for i in range(-(-n // 4))])[:n]


def test_gumbel_softmax_draws_from_the_softmax():
    """Its argmax, over 20,000 draws, is as frequent as the softmax says: a χ² of 5 codes, above 25 in 1 of 20,000."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    expected = 20_000 * logits.softmax(dim=0)
    many = logits[None, :, None, None].expand(200, 5, 10, 10)
    codes = dvae.gumbel_softmax(many, 0.5, torch.Generator().manual_seed(0))
    counts = torch.bincount(codes.argmax(dim=1).flatten(), minlength=5)
    assert ((counts - expected) ** 2 / expected).sum() < 25
    # Each place draws on its own: two neighbours are the same as often as chance has it.
    same = (codes.argmax(dim=1)[..., 1:] == codes.argmax(dim=1)[..., :-1]).float().mean()
    assert same.item() == pytest.approx(logits.softmax(dim=0).pow(2).sum().item(), abs=0.02)


def test_gumbel_softmax_at_a_temperature():
    """Nearly one-hot where it is low, near to even where it is high, and between the two what PyTorch's own gives."""
    logits = torch.randn(8, 32, 5, 5, generator=torch.Generator().manual_seed(0))
    draw = lambda temperature: dvae.gumbel_softmax(logits, temperature, torch.Generator().manual_seed(1))
    cold, hot = draw(1e-3), draw(1e3)
    assert (cold.amax(dim=1) > 0.99).float().mean() > 0.95 and torch.equal(cold.argmax(dim=1), hot.argmax(dim=1))
    assert hot.amax() < 1.1 / 32
    torch.testing.assert_close(hot.sum(dim=1), torch.ones(8, 5, 5))
    torch.manual_seed(2)
    theirs = F.gumbel_softmax(logits, 0.7, dim=1)
    torch.manual_seed(2)
    torch.testing.assert_close(dvae.gumbel_softmax(logits, 0.7), theirs)


def test_a_cold_relaxation_decodes_codes():
    """At a temperature near 0 a training pass decodes what `decode` does; at 1 gradients reach the encoder."""
    torch.manual_seed(0)
    model, frames = dvae.DVAE(TINY), random_frames(2)
    draw = lambda: torch.Generator().manual_seed(1)
    output, logits = model(frames, 1e-6, draw())
    torch.testing.assert_close(logits, model.encoder(model.prepare(frames)))
    codes = dvae.gumbel_softmax(logits, 1.0, draw()).argmax(dim=1)
    assert not torch.equal(codes, model.encode(frames))  # they are drawn
    pixels = 255 * dvae.to_pixels(output).clamp(0, 1).permute(0, 2, 3, 1)
    assert (pixels - model.decode(codes)).abs().max() < 0.51
    model(frames, 1.0, draw())[0].sum().backward()
    assert model.encoder.blocks.input.w.grad.abs().sum() > 0


def test_place_codes_folds_the_codebook_into_the_dvae(monkeypatch):
    """The plain dVAE picks the nearest entry of the codebook and decodes it as the autoencoder would."""
    monkeypatch.setattr(dvae, "ALIKE", 0)
    torch.manual_seed(0)
    warm, frames = dvae.WarmStart(dvae.DVAE(TINY), width=5), random_frames(40, 32)
    with torch.no_grad():
        for bias in (warm.squeeze.b, warm.expand.b):
            bias.normal_()  # as after training
        z = torch.cat([warm.latents(frames[:32]), warm.latents(frames[32:])]).permute(0, 2, 3, 1)
        E, s = dvae.k_means(z.flatten(0, 2), 32, torch.Generator().manual_seed(0))
    warm.place_codes(frames, torch.Generator().manual_seed(0))
    plain = warm.model
    with torch.no_grad():
        distances = (z[..., None, :] - E).pow(2).sum(dim=-1)
        logits = plain.encoder(plain.prepare(frames)).permute(0, 2, 3, 1)
        torch.testing.assert_close(logits.softmax(dim=-1), (-s * distances).softmax(dim=-1), atol=1e-4, rtol=1e-3)
        codes = plain.encode(frames)
        assert (codes == distances.argmin(dim=-1)).float().mean() > 0.99  # rounding may move a near tie
        assert len(codes.unique()) > 16
        expected = dvae.to_pixels(plain.decoder(warm.expand(E[codes].permute(0, 3, 1, 2))))
    assert (plain.decode(codes).permute(0, 3, 1, 2) / 255 - expected.clamp(0, 1)).abs().max() < 0.51 / 255


def test_codes_that_look_alike_become_one(monkeypatch):
    """Of 32 codes that decode to 3 pictures the most frequent of each picture stays, where patches are the same."""
    torch.manual_seed(2)  # with which the three pictures differ
    model, frames = dvae.DVAE(TINY), np.full((40, 32, 32, 3), 99, np.uint8)
    pictures = 100 * torch.randn(3, TINY.n_init)
    model.decoder.embed = lambda codes: pictures[codes % 3].permute(0, 3, 1, 2)  # each code has one of three looks
    shown = model.decode(torch.arange(3)[:, None, None].expand(-1, 5, 5))[:, 16:24, 16:24].float()
    assert min((shown[i] - shown[j]).pow(2).mean() for i, j in ((0, 1), (0, 2), (1, 2))) > dvae.ALIKE
    codes = torch.randint(32, (40, 4, 4))
    monkeypatch.setattr(model, "encode", lambda some: codes[: len(some)])
    counts = torch.bincount(torch.cat((codes[:32], codes[:8])).flatten(), minlength=32)
    stay = [max(range(k, 32, 3), key=lambda code: counts[code]) for k in range(3)]
    assert (~dvae.redundant(model, frames)).nonzero().flatten().tolist() == sorted(stay)
    assert not dvae.redundant(model, random_frames(40, 32)).any()  # their patches differ: each code means several


def test_redundant_codes_are_never_drawn(monkeypatch):
    torch.manual_seed(0)
    warm, frames = dvae.WarmStart(dvae.DVAE(TINY), width=5), random_frames(40, 32)
    monkeypatch.setattr(dvae, "redundant", lambda model, frames: torch.arange(32) % 4 > 0)
    warm.place_codes(frames, torch.Generator().manual_seed(0))
    assert (warm.model.encode(frames) % 4 == 0).all() and len(warm.model.encode(frames).unique()) > 4
    p = warm.model.encoder(warm.model.prepare(frames)).softmax(dim=1)
    assert (p.amax(dim=(0, 2, 3)) == 0).sum() == 24


def test_k_means_finds_what_is_rare():
    """Eight heaps far apart, one of nearly all points: each has a code close by, and the scale is of the heaps."""
    rng = torch.Generator().manual_seed(0)
    sizes = torch.tensor([20_000, *[30] * 7])
    heap = torch.arange(8).repeat_interleave(sizes)
    z = 100 * torch.eye(8)[heap] + torch.randn(len(heap), 8, generator=rng)
    E, s = dvae.k_means(z, 32, rng)
    assert E.shape == (32, 8) and torch.cdist(z, E).amin(dim=1).max() < 10
    assert 1 / 16 < s < 1  # 1 / the squared distance to a code, which is up to 8 in eight dimensions
    E, s = dvae.k_means(torch.ones(50, 4), 8, rng)  # a single point
    assert torch.equal(E, torch.ones(8, 4)) and s.isfinite()


@pytest.mark.parametrize("change, steps, n_codes", [({}, 100, 5), ({"laplace": True}, 150, 2)])
def test_training_learns_and_uses_its_codes(change, steps, n_codes):
    """On the world at 32 pixels a short training must beat the best constant picture by far and use several codes.

    So early, most patches still decode alike, and those that do share a code.
    """
    frames = world_frames(400, 32)
    model = dvae.train(lambda i: frames, NARROW, replace(dvae.LAPTOP, steps=steps, **change), seed=1)
    score = dvae.measure(model, frames[:64])
    mean = frames.mean(axis=(0, 1, 2))
    constant = 20 * np.log10(255) - 10 * np.log10(((frames - mean) ** 2).mean())
    assert score["psnr"] > constant + 2
    assert score["codes_in_use"] >= n_codes


def test_openai_recipe():
    """The numbers of Ramesh et al., appendix A.2, and what the KL term does to a short training."""
    r = dvae.OPENAI
    assert (r.steps, r.batch, r.lr, r.lr_end) == (1_200_000, 512, 1e-4, 1.25e-6)
    assert (r.betas, r.kl, r.ema) == ((0.9, 0.999), 6.6, 0.999)
    assert r.laplace and not r.warm_start
    frames = world_frames(32)
    short = replace(r, steps=40, batch=4, lr=3e-3, ema=0)
    trained = lambda weight: dvae.train(lambda i: frames, NARROW, replace(short, kl=weight))
    kl = lambda model: dvae.kl_to_uniform(model.encoder(model.prepare(frames)))
    assert kl(trained(100)) < kl(trained(0)) / 2


def test_the_running_mean_of_the_weights(tmp_path):
    """OpenAI's recipe keeps w̄ ← 0.9 w̄ + 0.1 w, here by hand from the weights after every step."""
    frames, weights = world_frames(32), []
    recipe = replace(dvae.OPENAI, steps=8, batch=4, lr=3e-3, ema=0)
    keep = lambda model: weights.append({name: w.clone() for name, w in model.state_dict().items()})
    dvae.train(lambda i: frames, NARROW, recipe, path=tmp_path / "state", settings={}, save_every=1, show=keep)
    assert len(weights) == 8
    mean = weights[0]
    for later in weights[1:]:
        mean = {name: 0.9 * w + 0.1 * later[name] for name, w in mean.items()}
    kept = dvae.train(lambda i: frames, NARROW, replace(recipe, ema=0.9)).state_dict()
    for name in mean:
        torch.testing.assert_close(kept[name], mean[name])
    assert not torch.allclose(kept["encoder.blocks.input.w"], weights[-1]["encoder.blocks.input.w"])


def test_losses_against_torch_distributions():
    torch.manual_seed(0)
    output, target = torch.randn(2, 6, 8, 8), torch.rand(2, 3, 8, 8)
    mu, log_b = output.chunk(2, dim=1)
    laplace = torch.distributions.Laplace(mu, log_b.exp())
    likelihood = torch.distributions.TransformedDistribution(laplace, torch.distributions.SigmoidTransform())
    expected = -likelihood.log_prob(0.1 + 0.8 * target).mean()
    torch.testing.assert_close(dvae.reconstruction_loss(output, target, laplace=True), expected)
    logits = torch.randn(2, 32, 3, 5)
    q = torch.distributions.Categorical(logits=logits.permute(0, 2, 3, 1))
    uniform = torch.distributions.Categorical(probs=torch.full((32,), 1 / 32))
    torch.testing.assert_close(dvae.kl_to_uniform(logits), torch.distributions.kl_divergence(q, uniform).mean())


@pytest.mark.parametrize("recipe", [replace(dvae.LAPTOP, warm_start=0.5), replace(dvae.OPENAI, ema=0.5)])
def test_training_resumes_exactly(tmp_path, monkeypatch, recipe):
    """Stopped by an error after every save, in each phase and around changes of the pool: the same weights."""
    monkeypatch.setattr(dvae, "POOL", 8)  # a pool for 8 steps
    recipe = replace(recipe, steps=20, batch=4)
    pools = [world_frames(8, first=8 * i) for i in range(3)]
    read_pool = lambda i: pools[i % 3]
    train = lambda path, **how: dvae.train(read_pool, NARROW, recipe, path=path, settings={"a": 1}, **how)
    whole = train(tmp_path / "whole", save_every=1000).fingerprint()
    saves, atomic_open = [], data.atomic_open

    @contextmanager
    def write_and_stop(path):
        with atomic_open(path) as file:
            yield file
        saves.append((path.name, torch.load(path, weights_only=True)["step"]))
        raise RuntimeError("stopped")

    monkeypatch.setattr(data, "atomic_open", write_and_stop)
    expected = [("x-warm-start", step) for step in (3, 6, 9, 10)] + [("x", step) for step in (12, 15, 18, 20)]
    if not recipe.warm_start:
        expected = [("x", step) for step in (3, 6, 9, 12, 15, 18, 20)]
    for _ in expected:
        with pytest.raises(RuntimeError, match="stopped"):
            train(tmp_path / "x", save_every=3)
    assert train(tmp_path / "x", save_every=3).fingerprint() == whole and saves == expected
    for state in sorted(tmp_path.glob("x*")):  # the second phase's, and where there is none, the first's
        with pytest.raises(ValueError, match=f"{state.name}: its a is 1, here it is 2; remove it to start over"):
            dvae.train(read_pool, NARROW, recipe, path=tmp_path / "x", settings={"a": 2})
        state.unlink()


@pytest.mark.parametrize("recipe", [dvae.LAPTOP, dvae.OPENAI])
def test_what_is_no_number_is_not_saved(tmp_path, recipe):
    frames = world_frames(8)
    recipe = replace(recipe, steps=60, batch=4, lr=1e30)
    with pytest.raises(ValueError, match="step 2: the loss is .*, its gradient"):
        dvae.train(lambda i: frames, NARROW, recipe, path=tmp_path / "x", settings={}, save_every=1)
    (path,) = tmp_path.iterdir()
    state = torch.load(path, weights_only=True)
    assert state["step"] == 1
    assert all(w.isfinite().all() for w in state["parts"]["warm" if recipe.warm_start else "model"].values())


def test_processes_draw_frames_of_their_own(monkeypatch):
    """Each a share of the batch, from the pool whose turn it is; the same again whenever the same step is drawn."""
    pools = [world_frames(200), world_frames(200, first=100)]
    monkeypatch.setattr(data, "world_size", lambda: 2)
    monkeypatch.setattr(dvae, "POOL", 8)  # eight steps of four frames are four times as many
    recipe, draws = replace(dvae.LAPTOP, batch=8), {}
    for rank in (0, 1):
        monkeypatch.setattr(data, "rank", lambda: rank)
        for step in (0, 1, 7, 8):
            draw = lambda: dvae.draw_frames(pools.__getitem__, recipe, 0, step, torch.device("cpu"))
            (pixels, target, noise_seed), again = draw(), draw()
            assert pixels.shape == (4, 16, 16, 3) and torch.equal(again[0], pixels) and again[2] == noise_seed
            torch.testing.assert_close(255 * target.permute(0, 2, 3, 1), pixels.float())
            pool = pools[step // 8].reshape(200, -1)
            assert all((pool == frame.flatten().numpy()).all(axis=1).any() for frame in pixels)
            draws[noise_seed] = pixels.numpy().tobytes()
    assert len(draws) == len(set(draws.values())) == 8
    with pytest.raises(ValueError, match="9 frames .*cannot be shared evenly by 2 processes"):
        dvae.train(pools.__getitem__, NARROW, replace(recipe, batch=9))


def test_schedules():
    """A.2 of Ramesh et al.: all on cosines; the temperature takes 150,000 updates, the KL weight 5,000."""
    r = dvae.OPENAI
    assert dvae.schedule(r, 0) == pytest.approx((1e-4 / 50, 1, 0))
    assert dvae.schedule(r, 2500)[2] == pytest.approx(3.3) and dvae.schedule(r, 5000)[2] == pytest.approx(6.6)
    assert dvae.schedule(r, 75_000)[1] == pytest.approx((1 + 1 / 16) / 2)
    assert dvae.schedule(r, 150_000)[1] == pytest.approx(1 / 16) == pytest.approx(dvae.schedule(r, 10**6)[1])
    assert dvae.schedule(r, 600_000)[0] == pytest.approx((1e-4 + 1.25e-6) / 2)
    assert dvae.schedule(r, 1_200_000)[0] == pytest.approx(1.25e-6)
    temperature = lambda step: dvae.schedule(dvae.LAPTOP, step)[1]  # phase 2 begins at step 540, after 0.3 of 1,800
    assert temperature(540) == 1 > temperature(541) and temperature(1350) == pytest.approx(1 / 16)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 24 small pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, frame in enumerate(world_frames(96)[::4]):
        Image.fromarray(frame).save(folder / f"{i}.png")
    return folder


def command(pictures, out, *extra):
    return ["dvae.py", "--data", str(pictures), "--resolution", "16", "--steps", "60", "--batch", "4",
            "--save-every", "10", "--device", "cpu", *extra, "--out", str(out)]  # fmt: skip


@pytest.mark.parametrize("sign, phase, suffix", [
    (signal.SIGKILL, "warm start", ".training-warm-start"), (signal.SIGTERM, "tokenizer", ".training"),
])  # fmt: skip
def test_a_stopped_program_resumes(tmp_path, pictures, monkeypatch, capsys, sign, phase, suffix):
    """In either phase, at the step of the last save; when it is done, only the tokenizer and its picture are left."""
    out, state = tmp_path / "dvae.pt", tmp_path / f"dvae.pt{suffix}"
    process = subprocess.Popen(
        [sys.executable, *command(pictures, out)],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while process.poll() is None and not state.exists():
        time.sleep(0.002)
    process.send_signal(sign)
    output = process.communicate()[0]
    assert state.exists() and not out.exists(), output
    step = torch.load(state, weights_only=True)["step"]
    if sign == signal.SIGTERM:
        assert process.returncode == 130 and "Traceback" not in output
        assert f"stopped and saved at step {step};" in output

    def main(*extra):
        monkeypatch.setattr(sys, "argv", command(pictures, out, *extra))
        dvae.main()

    with pytest.raises(ValueError, match="its seed is 0, here it is 1; remove it to start over"):
        main("--seed", "1")
    capsys.readouterr()
    main()
    shown = capsys.readouterr()
    assert re.search(rf"{phase}: .*?(\d+)/", shown.err)[1] == str(step)  # where the progress bar begins
    assert "dB on held-out frames" in shown.out
    left = sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".tmp"))
    assert left == ["dvae.png", "dvae.pt"] and dvae.load(out).config == dvae.SMALL
    with pytest.raises(ValueError, match="exists already"):
        main()


TOGETHER = """
import os, socket, sys
import torch
import data, dvae

place_codes, train_codes = dvae.WarmStart.place_codes, dvae.train_codes

def place_and_tell(warm, *how):
    sys.stdout.write(f"weights autoencoder {warm.model.fingerprint()}\\n")  # in one piece
    sys.stdout.flush()
    place_codes(warm, *how)

def train_and_tell(*how, **more):
    model = train_codes(*how, **more)
    sys.stdout.write(f"weights {sys.argv[-1]} {model.fingerprint()}\\n")
    sys.stdout.flush()
    return model

def main():
    for recipe, name in ((dvae.LAPTOP, "laptop"), (dvae.OPENAI, "openai")):
        dvae.SIZES["small"] = dvae.Config(n_hid=8, blocks_per_group=1, n_init=16, vocab_size=64), recipe
        sys.argv[-1] = sys.argv[-1].replace("laptop", name)
        dvae.main()
        data.start_processes = lambda device: None  # they are

def process(rank, world_size, port):  # in surroundings as torchrun makes them
    surroundings = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in surroundings.items()}
    data.run(main)

dvae.WarmStart.place_codes, dvae.train_codes = place_and_tell, train_and_tell
torch.optim.AdamW([torch.zeros(1)])  # imports for a second, once and not in each process
with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]  # a free one
torch.multiprocessing.start_processes(process, (2, port), nprocs=2, start_method="fork")
"""


def test_two_processes_train_one_tokenizer(tmp_path, pictures):
    """Each draws frames of its own, and yet both have the same weights after each phase; one saves and reports."""
    (tmp_path / "together.py").write_text(TOGETHER)
    _, *arguments = command(pictures, tmp_path / "laptop.pt", "--steps", "12")
    done = run([str(tmp_path / "together.py"), *arguments])
    told = [tuple(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("weights")]
    assert len(told) == 6 and len(set(told)) == 3, done.stdout
    for path in (tmp_path / "laptop.pt", tmp_path / "openai.pt"):
        assert (str(path), dvae.load(path).fingerprint()) in told
    assert done.stdout.count("dB on held-out frames") == 2


def test_measure_by_hand():
    model = dvae.DVAE(TINY).eval()
    frames = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    codes = model.encode(frames)
    score = dvae.measure(model, frames)
    mse = ((model.decode(codes).numpy().astype(float) - frames) ** 2).mean(axis=(1, 2, 3))
    p = np.bincount(codes.flatten(), minlength=32) / codes.numel()
    p = p[p > 0]
    assert score["psnr"] == pytest.approx((10 * np.log10(255**2 / mse)).mean(), abs=1e-3)
    assert score["perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert score["codes_in_use"] == len(p) and score["entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
    assert score["entropy_given_patch"] == 0  # no two patches of noise are the same


def test_measure_what_depends_on_the_surroundings():
    """A tokenizer whose code is the colour of the patch, or that of the patch to its right, of black and white ones."""
    rng, colours = np.random.default_rng(0), np.array([0, 255], np.uint8)
    grid = rng.integers(2, size=(400, 4, 4))
    frames = np.kron(colours[grid], np.ones((8, 8), np.uint8))[..., None].repeat(3, axis=-1)

    class Fake(dvae.DVAE):
        shift = 0

        def encode(self, frames):
            return torch.as_tensor(frames[:, ::8, ::8, 0] > 0).long().roll(-self.shift, 2)

        def decode(self, codes):
            return torch.zeros(*(8 * n if i else n for i, n in enumerate(codes.shape)), 3, dtype=torch.uint8)

    model = Fake(TINY)
    score = dvae.measure(model, frames)
    assert score["entropy"] == pytest.approx(np.log(2), abs=1e-3)
    assert score["entropy_given_patch"] == pytest.approx(0, abs=1e-9) and score["same_elsewhere"] == 1
    model.shift = 1
    score = dvae.measure(model, frames)
    assert score["entropy_given_patch"] == pytest.approx(np.log(2), abs=1e-3)
    assert score["same_elsewhere"] == pytest.approx(0.5, abs=0.05)


def test_save_and_load(tmp_path):
    model = dvae.DVAE(TINY)
    dvae.save(model, tmp_path / "x" / "dvae.pt")
    loaded = dvae.load(tmp_path / "x" / "dvae.pt")
    assert loaded.config == TINY and loaded.fingerprint() == model.fingerprint() != dvae.DVAE(TINY).fingerprint()
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["dvae.pt"]  # no temporary file is left


class Bomb:
    """Unpickles by writing a file, as a malicious checkpoint would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_load_executes_nothing(tmp_path):
    torch.save({"dvae": Bomb(tmp_path / "proof"), "config": {}}, tmp_path / "bomb.pt")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "proof")))
    for name in ("bomb.pt", "bomb.pkl"):
        with pytest.raises(ValueError, match=f"{name} is not a tokenizer of dvae.py"):
            dvae.load(tmp_path / name)
    assert not (tmp_path / "proof").exists()
    with pytest.raises(FileNotFoundError):
        dvae.load(tmp_path / "missing.pt")


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="30x16 pixels: width and height must be multiples of 8"):
        dvae.DVAE(TINY).encode(np.zeros((1, 16, 30, 3), np.uint8))


def test_bfloat16_keeps_most_codes():
    torch.manual_seed(0)
    model = dvae.DVAE(TINY)
    fast = dvae.DVAE(TINY, torch.bfloat16)
    fast.load_state_dict(model.state_dict())
    frames = np.concatenate([data.world_clip(i, 2, 64).frames for i in range(10)])
    assert fast.encoder(fast.prepare(frames)).dtype == torch.float32
    assert (fast.encode(frames) == model.encode(frames)).float().mean() > 0.9
