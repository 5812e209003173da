"""paper/table3_tokenizers.py: its VQGAN against taming-transformers' architecture, its files, and its training."""

import collections
import os
import pickle
import re
import runpy
import subprocess
import sys
import types
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import dvae
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "paper"))
import table3_tokenizers as table3

# Of three levels, with attention on the second and the third. GroupNorm has taming's 32 groups.
TINY = table3.Config(ch=32, ch_mult=(1, 2, 3), blocks=1, attention=(1, 2), z_channels=8, embed_dim=6, vocab_size=40)
NARROW = table3.Config(ch=8, ch_mult=(1, 2), blocks=1, attention=(1,), z_channels=8, embed_dim=4, vocab_size=16)
NARROW = replace(NARROW, groups=2)


def published_shapes(config):
    """{name: shape} of the weights of taming's model, from what its code builds, one name after the other."""
    shapes, ch, mult = {}, config.ch, config.ch_mult

    def conv(name, n_in, n_out, kernel):
        shapes.update({f"{name}.weight": (n_out, n_in, kernel, kernel), f"{name}.bias": (n_out,)})

    def norm(name, n):
        shapes.update({f"{name}.weight": (n,), f"{name}.bias": (n,)})

    def block(name, n_in, n_out):
        norm(f"{name}.norm1", n_in), conv(f"{name}.conv1", n_in, n_out, 3)
        norm(f"{name}.norm2", n_out), conv(f"{name}.conv2", n_out, n_out, 3)
        if n_in != n_out:
            conv(f"{name}.nin_shortcut", n_in, n_out, 1)

    def attention(name, n):
        norm(f"{name}.norm", n)
        for layer in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{layer}", n, n, 1)

    def middle(name, n):
        block(f"{name}.block_1", n, n), attention(f"{name}.attn_1", n), block(f"{name}.block_2", n, n)

    conv("encoder.conv_in", 3, ch, 3)
    n = ch
    for i in range(len(mult)):
        for j in range(config.blocks):
            block(f"encoder.down.{i}.block.{j}", n, ch * mult[i])
            n = ch * mult[i]
            if i in config.attention:
                attention(f"encoder.down.{i}.attn.{j}", n)
        if i != len(mult) - 1:
            conv(f"encoder.down.{i}.downsample.conv", n, n, 3)
    middle("encoder.mid", n), norm("encoder.norm_out", n), conv("encoder.conv_out", n, config.z_channels, 3)
    conv("decoder.conv_in", config.z_channels, n, 3), middle("decoder.mid", n)
    for i in reversed(range(len(mult))):
        for j in range(config.blocks + 1):
            block(f"decoder.up.{i}.block.{j}", n, ch * mult[i])
            n = ch * mult[i]
            if i in config.attention:
                attention(f"decoder.up.{i}.attn.{j}", n)
        if i != 0:
            conv(f"decoder.up.{i}.upsample.conv", n, n, 3)
    norm("decoder.norm_out", n), conv("decoder.conv_out", n, 3, 3)
    conv("quant_conv", config.z_channels, config.embed_dim, 1)
    conv("post_quant_conv", config.embed_dim, config.z_channels, 1)
    shapes["quantize.embedding.weight"] = (config.vocab_size, config.embed_dim)
    return shapes


def random_weights(config, seed=0):
    """Weights with which all codes are in use and pixels are mostly within their range."""
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in published_shapes(config).items():
        fan_in = int(np.prod(shape[1:]))
        weights[name] = torch.randn(shape, generator=rng) * (0.1 if len(shape) == 1 else fan_in**-0.5)
        if "norm" in name and name.endswith("weight"):
            weights[name] += 1
    weights["quantize.embedding.weight"] *= config.embed_dim**0.5
    weights["decoder.conv_out.weight"] *= 0.3
    return weights


class Peer:
    """taming's VQGAN once more, as functions of a dictionary of weights, with every formula written out."""

    def __init__(self, weights, config):
        self.weights, self.config = weights, config

    def conv(self, name, x, stride=1, padding=1):
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], stride, padding)

    def norm(self, name, x):
        groups = x.unflatten(1, (32, -1))
        mean, var = groups.mean(dim=(2, 3, 4), keepdim=True), groups.var(dim=(2, 3, 4), keepdim=True, unbiased=False)
        x = ((groups - mean) / (var + 1e-6).sqrt()).flatten(1, 2)
        return x * self.weights[f"{name}.weight"][:, None, None] + self.weights[f"{name}.bias"][:, None, None]

    def swish(self, x):
        return x * torch.sigmoid(x)

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", self.swish(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", self.swish(self.norm(f"{name}.norm2", h)))
        if x.shape != h.shape:
            x = self.conv(f"{name}.nin_shortcut", x, padding=0)
        return x + h

    def attention(self, name, x):
        y = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{layer}", y, padding=0).flatten(2) for layer in "qkv")  # (N, C, h w)
        weights = torch.softmax(torch.einsum("nci,ncj->nij", q, k) / x.shape[1] ** 0.5, dim=2)
        y = torch.einsum("nij,ncj->nci", weights, v).reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", y, padding=0)

    def level(self, name, x, i, n_blocks):
        for j in range(n_blocks):
            x = self.block(f"{name}.{i}.block.{j}", x)
            x = self.attention(f"{name}.{i}.attn.{j}", x) if i in self.config.attention else x
        return x

    def middle(self, name, x):
        return self.block(f"{name}.block_2", self.attention(f"{name}.attn_1", self.block(f"{name}.block_1", x)))

    def encode(self, frames):
        x, n = self.conv("encoder.conv_in", frames.permute(0, 3, 1, 2) / 255 * 2 - 1), len(self.config.ch_mult)
        for i in range(n):
            x = self.level("encoder.down", x, i, self.config.blocks)
            if i < n - 1:
                x = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        x = self.swish(self.norm("encoder.norm_out", self.middle("encoder.mid", x)))
        z = self.conv("quant_conv", self.conv("encoder.conv_out", x), padding=0)
        distances = (z[:, None] - self.weights["quantize.embedding.weight"][..., None, None]).pow(2).sum(dim=2)
        return distances.argmin(dim=1)

    def decode(self, codes):
        e = self.weights["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)
        x = self.middle("decoder.mid", self.conv("decoder.conv_in", self.conv("post_quant_conv", e, padding=0)))
        for i in reversed(range(len(self.config.ch_mult))):
            x = self.level("decoder.up", x, i, self.config.blocks + 1)
            if i > 0:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(f"decoder.up.{i}.upsample.conv", x)
        x = self.conv("decoder.conv_out", self.swish(self.norm("decoder.norm_out", x)))
        return 255 * (x.clamp(-1, 1) + 1).permute(0, 2, 3, 1) / 2


def write_lightning(path, weights, monkeypatch, **how):
    """A checkpoint as PyTorch Lightning writes it, with objects of classes that are gone when it is read."""
    names = ("callbacks.model_checkpoint.ModelCheckpoint", "utilities.parsing.AttributeDict", "Oracle")
    made = {}
    with monkeypatch.context() as context:
        for name, bases in zip(names, ((), (dict,), ())):
            module, name = f"pytorch_lightning.{name}".rsplit(".", 1)
            made[name] = type(name, bases, {"__module__": module})
            for i in range(module.count(".") + 1):
                parent = ".".join(module.split(".")[: i + 1])
                context.setitem(sys.modules, parent, sys.modules.get(parent) or types.ModuleType(parent))
            setattr(sys.modules[module], name, made[name])
        thing = made["Oracle"]()
        thing.state = {"a": [1, 2]}
        counts = collections.defaultdict(list, {"a": [np.float64(0.5), np.arange(3)]})
        losses = {"loss.discriminator.main.0.weight": torch.zeros(2), "loss.perceptual_loss.lin0.model.1.weight": 1}
        best = {"best_model_score": torch.tensor(0.5), "best_model_path": "last.ckpt", "score": np.float32(1)}
        checkpoint = {
            "epoch": 3, "global_step": 1000, "pytorch-lightning_version": "1.0.8", "lr_schedulers": [],
            "callbacks": {made["ModelCheckpoint"]: best, "other": thing},
            "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.zeros(3)}}}],
            "state_dict": collections.OrderedDict(weights | losses),
            "hyper_parameters": made["AttributeDict"](lr=4.5e-6, counts=counts),
        }  # fmt: skip
        torch.save(checkpoint, path, **how)


def random_frames(n=3, height=16, width=24):
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("is_zip", [True, False])
def test_published_checkpoints_are_read(tmp_path, monkeypatch, is_zip):
    """All of the config comes from names and shapes, codes and pixels are those of the peer, and no class is needed."""
    weights, frames = random_weights(TINY), random_frames()
    write_lightning(tmp_path / "last.ckpt", weights, monkeypatch, _use_new_zipfile_serialization=is_zip)
    assert "pytorch_lightning" not in sys.modules
    model, peer = table3.load_vqgan(tmp_path / "last.ckpt"), Peer(weights, TINY)
    assert model.config == TINY and model.pixels_per_code == 4
    table3.save(model, tmp_path / "copy.pt")
    for model in (model, table3.load_vqgan(tmp_path / "copy.pt")):
        codes = model.encode(frames)
        assert codes.shape == (3, 4, 6) and torch.equal(codes, peer.encode(frames)) and len(codes.unique()) > 8
        pixels = peer.decode(codes)
        assert (model.decode(codes) - pixels).abs().max() <= 0.51
        assert ((0 < pixels) & (pixels < 255)).float().mean() > 0.8


@pytest.mark.parametrize("vocab_size", [1024, 16384])
def test_published_sizes_and_names(vocab_size):
    """taming's f = 16 model: 29.3 million parameters in the encoder and 42.4 in the decoder, with its names."""
    config = table3.Config(vocab_size=vocab_size)
    with torch.device("meta"):
        model = table3.VQGAN(config)
    weights = model.state_dict()
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == published_shapes(config)
    assert sum(p.numel() for p in model.encoder.parameters()) == 29_298_176
    assert sum(p.numel() for p in model.decoder.parameters()) == 42_449_795
    assert weights["decoder.up.4.block.2.conv1.weight"].shape == (512, 512, 3, 3) and model.pixels_per_code == 16
    assert weights["encoder.down.4.attn.1.q.weight"].shape == (512, 512, 1, 1)
    assert weights["quantize.embedding.weight"].shape == (vocab_size, 256)
    assert table3.read_config(weights, 32) == config


def test_matches_the_taming_package():
    """The same weights give the same output as the original encoder and decoder."""
    words = "pip install --no-deps taming-transformers-rom1504==0.0.6 to compare with it"
    theirs = pytest.importorskip("taming.modules.diffusionmodules.model", reason=words)
    how = {"ch": 32, "out_ch": 3, "ch_mult": (1, 2, 3), "num_res_blocks": 1, "attn_resolutions": [8, 4],
           "in_channels": 3, "resolution": 16, "z_channels": 8, "double_z": False}  # fmt: skip
    weights, frames, model = random_weights(TINY), random_frames(3, 16, 16), table3.VQGAN(TINY)
    encoder, decoder = theirs.Encoder(**how), theirs.Decoder(**how)
    for part, module in (("encoder.", encoder), ("decoder.", decoder)):
        names = [name for name in weights if name.startswith(part)]
        module.load_state_dict({name.removeprefix(part): weights[name] for name in names})
    model.load_state_dict(weights)
    z = torch.randn(3, 8, 4, 4)
    with torch.no_grad():
        x = frames.permute(0, 3, 1, 2) / 127.5 - 1
        torch.testing.assert_close(model.encoder(x), encoder(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.decoder(z), decoder(z), atol=1e-4, rtol=1e-4)


class Bomb:
    """Unpickles by calling a function, and then by setting the state of what it returned."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments, {"state": 1}


def bombs(proof):
    """Ways to leave a file behind, and some to reach what could."""
    path, words = str(proof), f"open({str(proof)!r}, 'w')"
    yield from (Bomb(open, path, "w"), Bomb(os.system, f"touch {path}"), Bomb(subprocess.getoutput, f"touch {path}"))
    yield from (Bomb(eval, words), Bomb(exec, words), Bomb(torch.save, 1, path), Bomb(np.save, path, np.zeros(1)))
    yield from (Bomb(Path.touch, proof), Bomb(runpy.run_path, path), Bomb(torch.load, path), Bomb(torch.hub.load, path))
    # The first is a function that weights_only itself allows, and which calls what it is given.
    yield Bomb(torch._tensor._rebuild_from_type_v2, open, torch.Tensor, (path, "w"), None)
    yield [Bomb(map, open, [path]), collections.defaultdict(list, {1: Bomb(open, path, "w")})]


def assert_refused(path):
    words = rf"^{re.escape(str(path))} is not a VQGAN checkpoint of taming-transformers[^\n]*$"
    with pytest.raises(ValueError, match=words):
        table3.load_vqgan(path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_checkpoints_execute_nothing(tmp_path, is_zip):
    """Whatever a file calls in place of its weights, among them or beside them, is not called."""
    proof, path, weights = tmp_path / "proof", tmp_path / "last.ckpt", random_weights(NARROW)
    allowed = set(torch.serialization.get_safe_globals())
    how = {"_use_new_zipfile_serialization": is_zip}
    n_read = 0
    for bomb in bombs(proof):
        for content in (bomb, {"state_dict": bomb}, {"state_dict": weights | {"quant_conv.bias": bomb}, "groups": 2}):
            torch.save(content, path, **how)
            assert_refused(path)
        torch.save({"state_dict": weights, "groups": 2, "callbacks": bomb}, path, **how)
        try:  # the weights are all there: read or refused, but never called
            n_read += table3.load_vqgan(path).config == NARROW
        except ValueError as error:
            assert str(error).startswith(f"{path} is not a VQGAN")
        assert not proof.exists(), bomb
    assert n_read > 5 and set(torch.serialization.get_safe_globals()) == allowed  # no name stays allowed
    for protocol in range(5):
        path.write_bytes(pickle.dumps({"state_dict": Bomb(open, str(proof), "w")}, protocol))
        assert_refused(path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Bomb(open, str(proof), "w")))
    assert proof.exists()  # which shows that bombs work where they are read as pickles are by default


def test_other_files_are_refused(tmp_path):
    """In one line: a VQGAN with Gumbel noise, one with other layers, one with a weight too few, and what is no file."""
    path, weights = tmp_path / "model.ckpt", random_weights(NARROW)
    embedding = weights["quantize.embedding.weight"]
    rest = {name: weight for name, weight in weights.items() if not name.startswith("quantize")}
    gumbel = rest | {"quantize.embed.weight": embedding, "quantize.proj.weight": torch.zeros(16, 8, 1, 1)}
    double = {name: weight.repeat_interleave(1 + ("conv_out" in name), 0) for name, weight in weights.items()}
    more = weights | {"decoder.up.0.attn.0.q.weight": torch.zeros(8, 8, 1, 1)}
    for content in (gumbel, double, rest, more, {}):
        torch.save({"state_dict": content, "groups": 2}, path)
        assert_refused(path)
    torch.save(weights, path)
    assert_refused(path)
    path.write_bytes(b"")
    assert_refused(path)
    path.write_bytes(b"PK no archive")
    assert_refused(path)
    with pytest.raises(FileNotFoundError):
        table3.load_vqgan(tmp_path / "missing.ckpt")


def narrow_model(config=NARROW, dtype=torch.float32):
    model = table3.VQGAN(config, dtype).eval()
    model.load_state_dict(random_weights(config))
    return model


def test_codes_are_the_nearest_entries():
    model, rng = narrow_model(), np.random.default_rng(0)
    E, z = model.quantize.embedding.weight.detach().numpy(), rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    codes = model.nearest(torch.from_numpy(z)).numpy()
    for place in np.ndindex(2, 3, 5):
        assert codes[place] == np.argmin([np.linalg.norm(z[place] - e) for e in E])
    assert torch.equal(model.nearest(model.quantize.embedding.weight), torch.arange(16))


def test_gradients_pass_straight_through():
    """What reaches the encoder is the decoder's gradient at the embedded codes, and the codebook sees its own loss."""
    model, frames = narrow_model(), random_frames(2)
    target = torch.rand(2, 3, 16, 24)
    output, z, e = model(frames)
    ((output - target).abs().mean() + table3.codebook_loss(z, e)).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    E, codes = model.quantize.embedding.weight.detach(), model.encode(frames)
    torch.testing.assert_close(e, E[codes])
    at_codes = E[codes].requires_grad_()
    plain = model.to_pixels(at_codes)
    torch.testing.assert_close(output, plain)
    (plain - target).abs().mean().backward()
    z = model.latents(frames)
    difference, n = (z - E[codes]).detach(), z.numel()
    z.backward(at_codes.grad + 0.25 * 2 * difference / n)
    codebook = torch.zeros_like(E).index_add_(0, codes.flatten(), -2 * difference.flatten(0, 2) / n)
    model.quantize.embedding.weight.grad = codebook
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-6, rtol=1e-3, msg=name)
    assert got["encoder.conv_in.weight"].abs().sum() > 0 and codebook.abs().sum() > 0


def test_without_codes_it_is_an_autoencoder():
    model, frames = narrow_model(), random_frames(2)
    output, z, e = model(frames, has_codes=False)
    assert e is z and table3.codebook_loss(z, e) == 0
    torch.testing.assert_close(output, model.to_pixels(model.latents(frames)))


def test_interface_of_a_tokenizer(tmp_path):
    """What data.tokenize and dvae.measure ask of one: shapes, types, a fingerprint; odd sizes are refused."""
    model = narrow_model()
    for frames in (random_frames(2), random_frames(2).numpy()):
        codes = model.encode(frames)
        assert codes.shape == (2, 8, 12) and codes.dtype == torch.int64 and 0 <= codes.min() <= codes.max() < 16
    pixels = model.decode(codes)
    assert pixels.shape == (2, 16, 24, 3) and pixels.dtype == torch.uint8
    with pytest.raises(ValueError, match="^frames of 30x25 pixels: width and height must be multiples of 2$"):
        model.encode(np.zeros((1, 25, 30, 3), np.uint8))
    assert table3.VQGAN(table3.SMALL).pixels_per_code == 16
    table3.save(model, tmp_path / "x" / "vqgan.pt")
    loaded = table3.load_vqgan(tmp_path / "x" / "vqgan.pt")
    assert loaded.config == NARROW and loaded.fingerprint() == model.fingerprint()
    assert model.fingerprint() != table3.VQGAN(NARROW).fingerprint()
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["vqgan.pt"]
    score = dvae.measure(model, frames)
    assert score["codes_in_use"] == len(codes.unique()) and 0 < score["psnr"] < 20
    data.tokenize(data.world_shards(range(3), 16, 2), tmp_path / "tokens", model, 16, stride=1)
    tokens = data.Tokens(tmp_path / "tokens")
    codes = model.encode(data.world_clip(0, 2, 16).frames)
    assert np.array_equal(tokens.codes(0), codes) and codes.shape == (2, 8, 8)


def test_bfloat16_keeps_most_codes():
    frames = random_frames(8)
    same = narrow_model().encode(frames) == narrow_model(dtype=torch.bfloat16).encode(frames)
    assert same.float().mean() > 0.9
    assert narrow_model(dtype=torch.bfloat16).latents(frames).dtype == torch.float32


def world_frames(n, side=16, first=0):
    return np.concatenate([data.world_clip(first + i, 1, side).frames for i in range(n)])


SHORT = replace(table3.RECIPE, steps=20, batch=4)


def test_training_learns_and_uses_its_codes():
    """A short training on the world, with 2x2 pixels a cell, beats the best constant picture and uses its codes."""
    frames = world_frames(200, 12)
    model = table3.train_vqgan(lambda i: frames, NARROW, replace(SHORT, steps=80, lr=5e-3), seed=1)
    score, mean = dvae.measure(model, frames[:64]), frames.mean(axis=(0, 1, 2))
    constant = 20 * np.log10(255) - 10 * np.log10(((frames - mean) ** 2).mean())
    assert score["psnr"] > constant + 1.5 and score["codes_in_use"] >= 8


def test_the_codebook_begins_among_latents():
    """Until it is placed it stays as it was; then its entries lie closer to latents than random ones."""
    frames = world_frames(100)
    model = narrow_model()
    before = model.quantize.embedding.weight.clone()
    table3.place_codes(model, frames, 0)
    z = model.latents(frames).flatten(0, 2)
    distance = lambda E: torch.cdist(z, E).amin(dim=1).mean()
    assert distance(model.quantize.embedding.weight) < distance(before) / 2
    again = narrow_model()
    table3.place_codes(again, frames, 0)
    assert torch.equal(again.quantize.embedding.weight, model.quantize.embedding.weight)


def test_training_resumes_exactly(tmp_path, monkeypatch):
    """Stopped by an error after every save, before, at and after the step that places the codes: the same weights."""
    monkeypatch.setattr(dvae, "POOL", 8)  # a pool for 8 steps
    pools = [world_frames(8, first=8 * i) for i in range(3)]
    read_pool = lambda i: pools[i % 3]
    train = lambda path, a=1, **how: table3.train_vqgan(read_pool, NARROW, SHORT, path=path, settings={"a": a}, **how)
    whole = train(tmp_path / "whole", save_every=1000).fingerprint()
    saves, atomic_open = [], data.atomic_open

    @contextmanager
    def write_and_stop(path):
        with atomic_open(path) as file:
            yield file
        saves.append(torch.load(path, weights_only=True)["step"])
        raise RuntimeError("stopped")

    monkeypatch.setattr(data, "atomic_open", write_and_stop)
    expected = [3, 6, 9, 12, 15, 18, 20]  # the codebook is placed at step 6
    for _ in expected:
        with pytest.raises(RuntimeError, match="stopped"):
            train(tmp_path / "x", save_every=3)
    assert train(tmp_path / "x", save_every=3).fingerprint() == whole and saves == expected
    with pytest.raises(ValueError, match="x: its a is 1, here it is 2; remove it to start over"):
        train(tmp_path / "x", a=2)
    with pytest.raises(ValueError, match="step 2: the loss is .*, its gradient"):
        table3.train_vqgan(read_pool, NARROW, replace(SHORT, lr=1e30))


TOGETHER = """
import os, socket, sys
sys.path.insert(0, "paper")
import numpy as np
import torch
import data
import table3_tokenizers as table3
from test_vqgan import NARROW, SHORT, replace, world_frames

def main():
    data.start_processes(torch.device("cpu"))
    frames = world_frames(50, first=100 * data.rank())  # of its own
    model = table3.train_vqgan(lambda i: frames, NARROW, replace(SHORT, steps=8))
    used = len(model.encode(frames).unique())
    sys.stdout.write(f"weights {model.fingerprint()} {used}\\n")  # in one piece
    sys.stdout.flush()

def process(rank, world_size, port):  # in surroundings as torchrun makes them
    surroundings = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in surroundings.items()}
    data.run(main)

torch.optim.AdamW([torch.zeros(1)])  # imports for a second, once and not in each process
with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]  # a free one
torch.multiprocessing.start_processes(process, (2, port), nprocs=2, start_method="fork")
"""


def test_two_processes_train_one_tokenizer(tmp_path, monkeypatch):
    """Each draws frames of its own, and yet both end with the same weights, the codebook's too."""
    (tmp_path / "together.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n{TOGETHER}")
    told = [line.split() for line in run([str(tmp_path / "together.py")]).stdout.splitlines() if "weights" in line]
    assert len(told) == 2 and told[0][1] == told[1][1] and all(int(used) > 2 for _, _, used in told)
    monkeypatch.setattr(data, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="5 frames .*cannot be shared evenly by 2 processes"):
        table3.train_vqgan(lambda i: None, NARROW, replace(SHORT, batch=5))
