"""paper/table6_architectures.py: GPT-2 and Mamba against Hugging Face's, and Mamba against its recurrence."""

import json
import math
import os
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import dvae
import toto
import train
from conftest import PAIR, ROOT, run

sys.path.insert(0, str(ROOT / "paper"))  # its scripts are no package
import table6_architectures as table6

CONFIGS = {
    table6.GPT2: toto.Config(dim=64, n_heads=4, n_layers=3, hidden=256, vocab_size=70),
    table6.Mamba: toto.Config(dim=40, n_heads=1, n_layers=4, hidden=80, vocab_size=70),  # Δ's rank: 2.5, rounded up
}
both = pytest.mark.parametrize("build", CONFIGS)


def make(build, dtype=torch.float32):
    """A model whose weights are larger than at the start of training, so that errors show."""
    torch.manual_seed(0)
    model = build(CONFIGS[build], dtype)
    for name, p in model.named_parameters():
        if "A_log" in name or "dt_proj" in name:
            p.data += 0.1 * torch.randn(p.shape)
        elif p.dim() == 1:
            p.data += 0.3 * torch.randn(p.shape)
        else:
            p.data = torch.randn(p.shape) * (0.5 if p.dim() == 3 else 0.15)
    return model


def random_ids(*shape):
    return torch.randint(0, 70, shape, generator=torch.Generator().manual_seed(1))


def check_against(run, theirs, model, names, transposed, ids):
    """Give theirs the weights of our model, by `names` {ours: theirs}, and compare what it makes of ids, and gradients.

    All of both models' parameters are compared; those `transposed` are stored the other way round.
    """
    weights, of_theirs = dict(model.named_parameters()), dict(theirs.eval().named_parameters())
    assert set(names) == set(weights) and set(of_theirs) - set(names.values()) <= {"transformer.wpe.weight"}
    for our_name, their_name in names.items():
        ours = weights[our_name][:70] if our_name == "embedding.weight" else weights[our_name]  # without its padding
        with torch.no_grad():
            of_theirs[their_name].copy_(ours.t() if their_name.endswith(transposed) else ours)
    logits = run(ids).logits
    torch.testing.assert_close(model(ids), logits, atol=1e-5, rtol=1e-5)
    outer = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * outer).sum().backward()
    (model(ids) * outer).sum().backward()
    for our_name, their_name in names.items():
        ours, expected = weights[our_name].grad, of_theirs[their_name].grad
        ours = ours[:70] if our_name == "embedding.weight" else ours
        expected = expected.t() if their_name.endswith(transposed) else expected
        assert (ours - expected).norm() / expected.norm() < 1e-4, our_name


def test_gpt2_equals_hugging_face():
    """All of it, gradients too; only the table of positions is ours, and it is checked by its formula below."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers to compare with its GPT-2")
    model, c = make(table6.GPT2), CONFIGS[table6.GPT2]
    how = {"n_positions": 50, "n_embd": c.dim, "n_layer": c.n_layers, "n_head": c.n_heads, "vocab_size": c.vocab_size}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**how))
    theirs.transformer.wpe.weight.data = table6.sine_cosine(50, c.dim)
    names = {"embedding.weight": "transformer.wte.weight"}
    parts = {"attention_norm": "ln_1", "mlp_norm": "ln_2", "qkv": "attn.c_attn", "attention_out": "attn.c_proj"}
    parts |= {"up": "mlp.c_fc", "mlp_out": "mlp.c_proj"}
    for kind in ("weight", "bias"):
        names[f"norm.{kind}"] = f"transformer.ln_f.{kind}"
        for i in range(c.n_layers):
            names |= {f"blocks.{i}.{a}.{kind}": f"transformer.h.{i}.{b}.{kind}" for a, b in parts.items()}
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # theirs are stored (in, out)
    embed = lambda ids: math.sqrt(c.dim) * theirs.transformer.wte(ids)
    check_against(lambda ids: theirs(inputs_embeds=embed(ids)), theirs, model, names, transposed, random_ids(2, 50))


def test_sine_cosine_positions():
    table = table6.sine_cosine(300, 64)
    for p, i in ((0, 0), (1, 0), (17, 5), (299, 31)):
        angle = p / 10_000 ** (2 * i / 64)
        assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=2e-5)
        assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=2e-5)
    model, ids = make(table6.GPT2), random_ids(1, 300)
    with torch.no_grad():
        torch.testing.assert_close(model.features(ids, [0])[0], 8 * model.embedding(ids) + table)  # 8 = √64


@pytest.mark.parametrize("n_tokens", [7, 75])  # less than a chunk, and no multiple of one
def test_mamba_equals_hugging_face(n_tokens):
    transformers = pytest.importorskip("transformers", reason="pip install transformers to compare with its Mamba")
    model, c = make(table6.Mamba), CONFIGS[table6.Mamba]
    how = {"hidden_size": c.dim, "num_hidden_layers": c.n_layers, "vocab_size": c.vocab_size, "use_mambapy": False}
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**how))
    names = {"embedding.weight": "backbone.embeddings.weight", "norm.weight": "backbone.norm_f.weight"}
    for name, _ in model.blocks[0].named_parameters():
        theirs_name = name if name == "norm.weight" else f"mixer.{name}"
        names |= {f"blocks.{i}.{name}": f"backbone.layers.{i}.{theirs_name}" for i in range(c.n_layers)}
    check_against(theirs, theirs, model, names, (), random_ids(2, n_tokens))


def recurrence(v, delta, A, B_t, C_t):
    """The scan's two equations, one step after another."""
    h, out = torch.zeros(len(v), *A.shape), []
    for t in range(v.shape[1]):
        h = torch.exp(delta[:, t, None] * A) * h + B_t[:, t, :, None] * v[:, t, None]
        out.append((C_t[:, t, :, None] * h).sum(dim=1))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("chunk", [1, 8, 32, 100])
@pytest.mark.parametrize("n_tokens", [1, 32, 75])
def test_scan_equals_its_recurrence(chunk, n_tokens, monkeypatch):
    """Values and gradients of all five inputs; the length of a chunk changes nothing."""
    monkeypatch.setattr(table6.SelectiveScan, "CHUNK", chunk)
    torch.manual_seed(0)
    v, delta, A = torch.randn(3, n_tokens, 24), torch.rand(3, n_tokens, 24), -torch.rand(16, 24)
    inputs = [x.requires_grad_() for x in (v, delta, A, *torch.randn(2, 3, n_tokens, 16))]
    expected, got = recurrence(*inputs), table6.SelectiveScan.apply(*inputs)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    outer = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(got, inputs, outer), torch.autograd.grad(expected, inputs, outer)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_scan_keeps_no_states():
    """What it keeps for the backward pass is its inputs and one state a chunk, not the N times larger states."""
    inputs = [x.requires_grad_() for x in torch.rand(2, 2, 320, 24)]
    inputs += [-torch.rand(16, 24).requires_grad_(), *torch.rand(2, 2, 320, 16)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), lambda x: x):
        table6.SelectiveScan.apply(*inputs)
    assert sum(kept) == sum(x.numel() for x in inputs) + 2 * 320 * 16 * 24 / 32


def test_mamba_starts_as_published():
    """Mamba's A, D, Δ, convolution and last matrix, as §3.6 of its paper and its code have them."""
    torch.manual_seed(0)
    block = table6.Mamba(toto.Config(dim=256, n_heads=1, n_layers=9, hidden=512, vocab_size=70)).blocks[4]
    assert torch.allclose(block.A_log.exp(), torch.arange(1.0, 17).expand(512, 16)) and (block.D == 1).all()
    delta = torch.nn.functional.softplus(block.dt_proj.bias)
    assert 0.00099 < delta.min() and delta.max() < 0.101 and delta.log().mean().item() == pytest.approx(-4.6, abs=0.2)
    widest = {"dt_proj": 16**-0.5, "out_proj": 512**-0.5 / 9**0.5, "in_proj": 256**-0.5, "conv1d": 4**-0.5}
    for name, bound in widest.items():
        assert getattr(block, name).weight.abs().max().item() == pytest.approx(bound, rel=0.02), name


@both
def test_causality(build):
    """Changing one token changes nothing before it, and something at and after it."""
    model, ids = make(build), random_ids(1, 50)
    changed = ids.clone()
    changed[0, 35] = (changed[0, 35] + 1) % 70
    with torch.no_grad():
        difference = (model(ids) - model(changed)).abs().amax(dim=-1)[0]
    assert difference[:35].max() == 0 and difference[35:].min() > 0


def test_only_attention_can_see_what_follows():
    """A.2's full attention: GPT-2's features change with it, and Mamba says that it has none."""
    model, ids = make(table6.GPT2), random_ids(1, 20)
    assert not torch.allclose(model.features(ids, [3], causal=False)[3], model.features(ids, [3])[3], atol=0.1)
    with pytest.raises(ValueError, match="one direction only"):
        make(table6.Mamba).features(ids, [1], causal=False)


@both
def test_bfloat16_is_close_to_float32(build):
    model, fast, ids = make(build), make(build, torch.bfloat16), random_ids(2, 300)
    assert {p.dtype for p in fast.parameters()} == {torch.float32}
    with torch.no_grad():
        a, b = model(ids), fast(ids)
        assert {x.dtype for x in fast.residual_stream(ids)} == {torch.bfloat16}
    assert b.dtype == torch.float32 and (a - b).norm() / a.norm() < 0.05


@both
def test_features_and_loss(build):
    """What Toto does with its residual stream holds for every architecture, from ids and from embeddings."""
    model, ids = make(build), random_ids(2, 41)
    L = model.config.n_layers
    with torch.no_grad():
        features = model.features(ids, [0, 1, L])
        torch.testing.assert_close(model.logits(features[L]), model(ids))
        torch.testing.assert_close(model.features(model.embedding(ids), [L])[L], features[L])
        expected = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@both
def test_optimizer_decays_matrices_only(build):
    """Every parameter is in one group; vectors, and what Mamba's code exempts, A_log and D, do not decay."""
    model = make(build)
    groups = train.make_optimizer(model, 1e-3).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay)
    for name, p in model.named_parameters():
        exempt = name.endswith((".bias", "A_log", ".D")) or "norm" in name
        assert decay.pop(id(p)) == (0 if exempt else 0.1), name
    assert not decay


@both
@pytest.mark.parametrize("size, vocab_size", [("tiny", 516), ("tiny", 8196), ("base", 8196), ("large", 8196)])
def test_equal_size(build, size, vocab_size):
    llama = replace(toto.SIZES[size], vocab_size=vocab_size)
    config = table6.of_equal_size(build, llama)
    with torch.device("meta"):
        assert build(config).count_parameters() == pytest.approx(toto.Toto(llama).count_parameters(), rel=0.05)
    assert config.n_layers == llama.n_layers * (2 if build is table6.Mamba else 1)


@pytest.mark.skipif(sys.platform != "linux", reason="memory on a CPU is read from /proc")
def test_benchmark(capsys):
    """It measures both, each in a process of its own, and the table has a line for each."""
    config = toto.Config(dim=32, n_heads=2, n_layers=1, hidden=64, vocab_size=70)
    rows = table6.benchmark(config, torch.device("cpu"), lengths=(1024,))
    assert [(row["model"], row["tokens"]) for row in rows] == [("Toto", 1024), ("Mamba", 1024)]
    assert all(row["seconds"] > 0 and 2**20 < row["bytes"] < 2**30 for row in rows)
    table6.print_benchmark(rows)
    assert len(capsys.readouterr().out.splitlines()) == 3


# The program.
@pytest.fixture(scope="module")
def media(tmp_path_factory, untrained_tokenizer):
    """40 images to pre-train on, a task of two classes, and a tokenizer."""
    folder = tmp_path_factory.mktemp("media")
    dvae.save(untrained_tokenizer, folder / "dvae.pt")
    for i in range(40):
        for name in (f"images/{i}", f"task/train/{'ab'[i % 2]}/{i}", f"task/val/{'ab'[i % 2]}/{i + 40}"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.world_clip(i, 1, 32).frames[0] // (1 + i % 2)).save(folder / f"{name}.png")
    return folder


def command(media, out, *extra):
    words = ["--data", media / "images", "--probe", media / "task", "--tokenizer", media / "dvae.pt", "--out", out]
    words += ["--resolution", 32, "--batch-tokens", 512, "--steps", 3, "--seeds", 1, "--device", "cpu", *extra]
    return ["paper/table6_architectures.py", *map(str, words)]


def test_from_images_to_the_table(media, tmp_path, monkeypatch, capsys):
    """The whole comparison, stopped in the middle and resumed, and in two processes: the same losses."""
    pytest.importorskip("matplotlib", reason="draws by matplotlib: pip install -r paper/requirements.txt")
    steps, take_step = [], train.take_step

    def take_step_and_stop_once(*inputs):
        steps.append(1)
        if len(steps) == 8:  # the second of a run's three
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(*inputs)

    monkeypatch.setattr(train, "take_step", take_step_and_stop_once)
    monkeypatch.setattr(sys, "argv", command(media, tmp_path / "one"))
    with pytest.raises(KeyboardInterrupt):
        table6.main()
    table6.main()
    assert len(steps) == 3 * 3 * 3  # of three architectures at three rates
    table6.main()
    assert len(steps) == 27  # all is kept
    assert "GPT-2" in capsys.readouterr().out and (tmp_path / "one/table6.png").stat().st_size > 10_000
    assert not list((tmp_path / "one/runs").glob("*.pt"))

    run(command(media, tmp_path / "two"), PAIR)
    one, two = (json.loads((tmp_path / name / "table6.json").read_text())["rows"] for name in ("one", "two"))
    assert [row["name"] for row in one] == ["GPT-2", "Mamba", "LLaMA"]
    for a, b in zip(one, two):
        assert np.shape(a["top1"]) == np.shape(a["untrained"]) == (1, 9 if a["name"] == "Mamba" else 5)
        assert a["parameters"] == b["parameters"] and len(a["losses"]) == 3
        np.testing.assert_allclose(list(a["losses"].values()), list(b["losses"].values()), rtol=0.01)
        np.testing.assert_allclose(a["untrained"], b["untrained"], atol=0.06)  # one image of 40 is 0.025


def test_the_rate_with_the_least_loss_is_taken(monkeypatch):
    """And its first seed is not run again: the row's figures are those of the runs at that rate."""
    losses, calls = {0.1: 3.0, 0.3: 1.0, 0.9: 2.0}, []

    def fake(name, lr, seed, sets, args, device):
        calls.append((name, round(lr, 9), seed))
        return {"parameters": 1, "loss": losses[round(lr, 9)] + seed, "top1": [seed], "untrained": [0]}

    monkeypatch.setattr(table6, "run", fake)
    rows = table6.compare(None, SimpleNamespace(lr=0.3, seed=0, seeds=3), None)
    assert [row["lr"] for row in rows] == 3 * [0.3] and rows[0]["loss"] == [1.0, 2.0, 3.0]
    assert [call for call in calls if call[0] == "Mamba"] == [
        ("Mamba", 0.1, 0), ("Mamba", 0.3, 0), ("Mamba", 0.9, 0), ("Mamba", 0.3, 1), ("Mamba", 0.3, 2)
    ]  # fmt: skip


def test_a_task_is_needed(media, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="draws by matplotlib: pip install -r paper/requirements.txt")
    monkeypatch.setattr(sys, "argv", ["table6_architectures.py", "--data", str(media), "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="--data needs --probe"):
        table6.main()
