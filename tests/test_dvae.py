"""dvae.py against OpenAI's DALL-E package, its published sizes, and what its functions promise."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import dvae
from conftest import ENVIRONMENT, PAIR, ROOT, run

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
    monkeypatch.setattr(sys, "argv", ["dvae.py", "--convert", str(tmp_path), "--out", str(tmp_path / "copy.pt")])
    dvae.main()
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


def test_folding_the_bottleneck_changes_nothing():
    """The warm-started dVAE and the plain one it becomes give the same codes and, from hard codes, the same pixels."""
    torch.manual_seed(0)
    warm = dvae.Relaxed(dvae.DVAE(TINY), width=16)
    frames = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        z = warm.latents(frames)
        warm.start_codes(z.permute(0, 2, 3, 1).flatten(0, 2), torch.Generator().manual_seed(0))
        codes = warm.to_logits(z).argmax(dim=1)
        expected = dvae.to_pixels(warm.model.decoder(warm.expand(warm.codebook[codes].permute(0, 3, 1, 2))))
        # The logits are the scaled distances to the codebook: the nearest entry wins.
        nearest = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), warm.codebook).argmin(dim=1)
    warm.fold()
    plain = warm.model
    assert torch.equal(codes.flatten(), nearest)
    assert (plain.encode(frames) == codes).float().mean() > 0.99  # rounding may move a near tie
    got = plain.decode(codes).permute(0, 3, 1, 2) / 255
    assert (got - expected.clamp(0, 1)).abs().max() < 1.1 / 255


@pytest.mark.parametrize("change", [{}, {"straight_through": True}])
def test_training_learns_and_uses_its_codes(change):
    """On the world at 32 pixels a short training must beat the best constant picture by far and use many codes."""
    frames = np.concatenate([data.world_clip(i, 4, 32).frames for i in range(100)])
    model = dvae.train(lambda i: frames, NARROW, replace(dvae.LAPTOP, steps=300), **change)
    score = dvae.measure(model, frames[:64])
    mean = frames.mean(axis=(0, 1, 2))
    constant = 20 * np.log10(255) - 10 * np.log10(((frames - mean) ** 2).mean())
    assert score["psnr"] > constant + 2
    assert score["codes_in_use"] >= 24 and score["perplexity"] > 4


def test_openai_recipe():
    """The numbers of Ramesh et al., appendix A.2, and what each part does to a short training."""
    r = dvae.OPENAI
    assert (r.steps, r.batch, r.lr, r.lr_end) == (1_200_000, 512, 1e-4, 1.25e-6)
    assert (r.betas, r.kl, r.ema) == ((0.9, 0.999), 6.6, 0.999)
    assert r.laplace and not r.warm_start
    frames = np.concatenate([data.world_clip(i, 4, 16).frames for i in range(50)])
    run = lambda recipe: dvae.train(lambda i: frames, NARROW, recipe)
    short = replace(dvae.LAPTOP, steps=300, laplace=True, ema=0.9)
    after, last = (dvae.measure(run(recipe), frames)["psnr"] for recipe in (short, replace(short, ema=0)))
    # A mean that never moves from the first weights shows that it is the mean that is kept.
    before = dvae.measure(run(replace(short, ema=1 - 1e-9)), frames)["psnr"]
    assert after > before + 2 and abs(after - last) < 2 and after != last
    short = replace(r, steps=60, batch=8, lr=3e-3)
    prepared = dvae.DVAE(NARROW).prepare(frames)
    kl = lambda weight: dvae.kl_to_uniform(run(replace(short, kl=weight, ema=0)).encoder(prepared))
    assert kl(100) < kl(0) / 2


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


def test_straight_through_decodes_hard_codes():
    """The output is that of one code at each place, at any temperature; gradients still reach the encoder."""
    torch.manual_seed(0)
    relaxed = dvae.Relaxed(dvae.DVAE(TINY))
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    draw = lambda: torch.Generator().manual_seed(1)
    output, logits = relaxed(frames, 1.0, straight_through=True, generator=draw())
    gumbel = -torch.empty_like(logits).exponential_(generator=draw()).log()
    codes = (logits + gumbel).argmax(dim=1)
    torch.testing.assert_close(output, relaxed.model.decoder(relaxed.model.decoder.embed(codes)))
    output.sum().backward()
    assert relaxed.model.encoder.blocks.input.w.grad.abs().sum() > 0


@pytest.mark.parametrize("recipe", [dvae.LAPTOP, replace(dvae.OPENAI, ema=0.5)])
def test_training_resumes_exactly(tmp_path, monkeypatch, recipe):
    """Stopped in every phase and at a change of the pool, by an error after a save, it ends with the same weights."""
    monkeypatch.setattr(dvae, "POOL", 8)  # a pool for 8 steps
    recipe = replace(recipe, steps=20, batch=4)
    pools = [np.concatenate([data.world_clip(8 * i + k, 1, 16).frames for k in range(8)]) for i in range(3)]
    train = lambda path, **how: dvae.train(pools.__getitem__, NARROW, recipe, path=path, plan={"a": 1}, **how)
    whole = train(tmp_path / "whole", save_every=1000).fingerprint()
    saves = []

    def stop(model):
        saves.append(model.fingerprint())
        raise RuntimeError("stopped")

    for _ in range(20):
        try:
            model = train(tmp_path / "stopped", save_every=3, show=stop)
            break
        except RuntimeError as error:
            assert str(error) == "stopped"
    assert model.fingerprint() == whole and len(set(saves)) == len(saves) >= 4
    with pytest.raises(ValueError, match="its a is 1, here it is 2; remove it to start over"):
        dvae.train(pools.__getitem__, NARROW, recipe, path=tmp_path / "stopped", plan={"a": 2})
    with pytest.raises(ValueError, match="its gradient is|the loss is nan"):
        dvae.train(lambda i: pools[0], NARROW, replace(recipe, lr=1e30, steps=60), path=tmp_path / "nan", save_every=7)
    if (tmp_path / "nan").exists():  # what was saved before is good
        kept = torch.load(tmp_path / "nan", weights_only=True)["relaxed"]
        assert all(tensor.isfinite().all() for tensor in kept.values())


def test_schedules():
    """A.2 of Ramesh et al.: all on cosines; the temperature takes 150,000 updates, the KL weight 5,000."""
    r = dvae.OPENAI
    assert dvae.schedule(r, 0) == pytest.approx((1e-4 / 50, 1, 0))
    assert dvae.schedule(r, 2500)[2] == pytest.approx(3.3) and dvae.schedule(r, 5000)[2] == pytest.approx(6.6)
    assert dvae.schedule(r, 75_000)[1] == pytest.approx((1 + 1 / 16) / 2)
    assert dvae.schedule(r, 150_000)[1] == pytest.approx(1 / 16) == pytest.approx(dvae.schedule(r, 10**6)[1])
    assert dvae.schedule(r, 600_000)[0] == pytest.approx((1e-4 + 1.25e-6) / 2)
    assert dvae.schedule(r, 1_200_000)[0] == pytest.approx(1.25e-6)
    assert dvae.schedule(dvae.LAPTOP, 539)[1] is None and dvae.schedule(dvae.LAPTOP, 540)[1] == 1


def tokenizer_command(out, *extra):
    return ["dvae.py", "--resolution", "16", "--steps", "60", "--save-every", "10", "--device", "cpu",
            "--out", str(out), *extra]  # fmt: skip


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_program_goes_on(tmp_path, sign):
    out, state = tmp_path / "dvae.pt", tmp_path / "dvae.pt.training"
    process = subprocess.Popen(
        [sys.executable, *tokenizer_command(out, "--straight-through")],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while process.poll() is None and not state.exists():
        time.sleep(0.005)
    process.send_signal(sign)
    output = process.communicate()[0]
    assert state.exists() and not out.exists(), output
    if sign == signal.SIGTERM:
        assert process.returncode == 130 and "stopped and saved at step" in output and "Traceback" not in output
    refused = run(tokenizer_command(out, "--straight-through", "--seed", "1"), status=2)
    assert "its seed is 0, here it is 1; remove it to start over" in refused.stderr
    run(tokenizer_command(out, "--straight-through"))
    left = sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".tmp"))
    assert left == ["dvae.png", "dvae.pt"] and dvae.load(out).config == dvae.SMALL
    for again in ([], ["--convert", "."]):
        assert "exists already" in run(tokenizer_command(out, *again), status=2).stderr


TRAIN_TOGETHER = """
import numpy as np, torch, data, dvae
from dataclasses import replace
rank, world_size = dvae.start_processes(torch.device("cpu"))
frames = np.concatenate([data.world_clip(100 * rank + k, 1, 16).frames for k in range(20)])
recipe = replace(dvae.LAPTOP, steps=20, batch=4)
model = dvae.train(lambda i: frames, dvae.SMALL, recipe, rank=rank, world_size=world_size)
print("weights", model.fingerprint())
"""


def test_two_processes_train_one_tokenizer(tmp_path):
    """Each draws from frames of its own, and both end with the same weights, which are not those of one alone."""
    (tmp_path / "together.py").write_text(TRAIN_TOGETHER)
    command = [str(tmp_path / "together.py")]
    both = [line for line in run(command, PAIR).stdout.splitlines() if line.startswith("weights")]
    (alone,) = [line for line in run(command).stdout.splitlines() if line.startswith("weights")]
    assert len(both) == 2 and both[0] == both[1] != alone


def test_the_program_under_torchrun(tmp_path):
    done = run(tokenizer_command(tmp_path / "dvae.pt", "--batch", "4", "--recipe", "openai"), PAIR)
    assert "dB on held-out frames" in done.stdout and dvae.load(tmp_path / "dvae.pt").config == dvae.SMALL


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
    assert score["codes_in_use"] == len(p)


def test_save_and_load(tmp_path):
    model = dvae.DVAE(TINY)
    dvae.save(model, tmp_path / "x" / "dvae.pt")
    loaded = dvae.load(tmp_path / "x" / "dvae.pt")
    assert loaded.config == TINY and loaded.fingerprint() == model.fingerprint() != dvae.DVAE(TINY).fingerprint()
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["dvae.pt"]  # no temporary file is left


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        with dvae.atomic_open(path) as file:
            file.write(b"half of the new")
            raise RuntimeError
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


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
