"""probe.py: heads against torch's own modules, the table's numbers against a plain count, and what is never changed."""

import json
import sys

import numpy as np
import pytest
import torch

import data
import dvae
import probe
import toto

D, H, C = 32, 4, 5


def test_attention_pool_matches_multihead_attention():
    """§3.5: the query cross-attends to all tokens. Same weights in torch.nn.MultiheadAttention, same vector."""
    torch.manual_seed(0)
    pool = probe.AttentionPool(D, H, C).eval()
    torch.nn.init.normal_(pool.query)
    reference = torch.nn.MultiheadAttention(D, H, bias=False, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat((torch.eye(D), pool.key.weight, pool.value.weight)))
        reference.out_proj.weight.copy_(torch.eye(D))
        x = torch.randn(3, 17, D)
        expected, _ = reference(pool.query.expand(3, 1, D), x, x)
        torch.testing.assert_close(
            pool.pool(x), expected[:, 0], atol=1e-5, rtol=1e-4
        )  # an untrained norm is the identity
        torch.testing.assert_close(pool(x), pool.classifier(expected[:, 0]), atol=1e-5, rtol=1e-4)


def test_attention_pool_matches_scaled_dot_product():
    """The shortcut that never makes K and V, against making them; gradients too, with the batch norm at work."""
    torch.manual_seed(0)
    pool = probe.AttentionPool(D, H, C)
    torch.nn.init.normal_(pool.query)
    x = 3 + 5 * torch.randn(4, 9, D)
    normal = (x - x.mean(dim=(0, 1))) / (x.var(dim=(0, 1), unbiased=False) + 1e-5).sqrt()
    split = lambda y: y.view(4, -1, H, D // H).transpose(1, 2)
    q = pool.query.expand(4, 1, D)
    expected = torch.nn.functional.scaled_dot_product_attention(
        split(q), split(pool.key(normal)), split(pool.value(normal))
    )
    expected = expected.transpose(1, 2).reshape(4, D)
    got = pool.pool(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    parameters = [pool.query, pool.key.weight, pool.value.weight]
    outer = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, parameters, outer), torch.autograd.grad(expected, parameters, outer)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_average_pool_is_a_linear_probe():
    pool = probe.AveragePool(D, H, C)
    x = torch.randn(6, 9, D)
    mean = x.mean(dim=1)
    normal = (mean - mean.mean(dim=0)) / (mean.var(dim=0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(pool(x), normal @ pool.classifier.weight.T + pool.classifier.bias)


@pytest.mark.parametrize(
    "name, count", [("average", 0), ("attention", 2 * D * D + D), ("attention-mlp", 10 * D * D + 8 * D)]
)
def test_parameter_counts_of_the_heads(name, count):
    """§3.5: W_k, W_v and q; A.7: an MLP of width 4 D with its biases, and a layer norm, more."""
    assert sum(p.numel() for p in probe.POOLS[name](D, H, C).parameters()) == count + D * C + C


def test_layers():
    assert probe.parse_layers("mid", 12) == [6] and probe.parse_layers("all", 3) == [0, 1, 2, 3]
    assert probe.parse_layers("5,1,mid", 12) == [1, 5, 6]
    for text in ("13", "-1", "one", "1,,2"):
        with pytest.raises(ValueError, match="--layer"):
            probe.parse_layers(text, 12)


@pytest.fixture
def setting(tmp_path, untrained_tokenizer):
    """A model, its tokenizer, and a folder of images of two classes that differ in colour."""
    torch.manual_seed(0)
    dvae.save(untrained_tokenizer, tmp_path / "dvae.pt")
    model = toto.Toto(toto.Config(dim=32, n_heads=2, n_layers=3, hidden=32, vocab_size=36))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() == 2 else None
    checkpoint = {
        "model": model.state_dict(),
        "config": vars(model.config),
        "step": 0,
        "tokenizer": untrained_tokenizer.fingerprint(),
    }
    torch.save(checkpoint | {"resolution": 16, "stride": 4, "frames": 4}, tmp_path / "toto.pt")
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("val", 20)):
        for name, level in (("blue", (40, 40, 200)), ("red", (200, 40, 40))):
            for i in range(n):
                path = tmp_path / "images" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                data.Image.fromarray((level + rng.integers(-5, 5, (16, 16, 3))).astype(np.uint8)).save(path)
    return tmp_path


def run_probe(monkeypatch, folder, *arguments):
    base = ["probe.py", "--checkpoint", str(folder / "toto.pt"), "--out", str(folder / "out"), "--device", "cpu"]
    monkeypatch.setattr(
        sys, "argv", [*base, "--data", str(folder / "images"), "--epochs", "25", "--lr", "0.01", *arguments]
    )
    probe.main()
    return json.loads((folder / "out" / "probe.json").read_text())


def test_probing_an_image_folder(setting, monkeypatch, capsys):
    before = (setting / "toto.pt").read_bytes()
    report = run_probe(monkeypatch, setting, "--layer", "all")
    assert report["classes"] == {"class": ["blue", "red"]} and report["clips"] == [80, 40]
    top1 = {(row["pool"], row["layer"]): row["top1"] for row in report["accuracy"]}
    assert set(top1) == {(pool, l) for pool in ("attention", "average") for l in range(4)}
    assert top1["average", 2] > 0.9 and top1["attention", 2] > 0.9
    output = capsys.readouterr().out
    assert "chance 50.0%" in output and output.count("█") > 20
    assert (setting / "toto.pt").read_bytes() == before  # frozen


def test_a_layer_probed_alone_gives_the_same(setting, monkeypatch):
    pick = lambda report: [row["top1"] for row in report["accuracy"] if row["layer"] == 2]
    everything = run_probe(monkeypatch, setting, "--layer", "all", "--epochs", "2")
    alone = run_probe(monkeypatch, setting, "--layer", "2", "--epochs", "2")
    assert pick(everything) == pick(alone) and len(alone["accuracy"]) == 2


def test_features_computed_anew_are_the_kept_ones(setting, monkeypatch):
    kept = run_probe(monkeypatch, setting, "--layer", "2", "--epochs", "2")["accuracy"]
    monkeypatch.setattr(probe, "KEEP_BYTES", 0)
    assert run_probe(monkeypatch, setting, "--layer", "2", "--epochs", "2")["accuracy"] == kept


def test_wrong_folders(setting, monkeypatch):
    extra = setting / "images" / "val" / "grey"
    extra.mkdir()
    data.Image.new("RGB", (16, 16)).save(extra / "x.png")
    with pytest.raises(ValueError, match="has a class that train has not: grey"):
        run_probe(monkeypatch, setting)
    data.Image.new("RGB", (16, 16)).save(setting / "images" / "train" / "loose.png")
    with pytest.raises(ValueError, match="files must lie in one sub-folder per class"):
        run_probe(monkeypatch, setting)
