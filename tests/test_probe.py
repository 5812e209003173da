"""probe.py: heads against torch's own modules, the table's numbers against a plain count, and what is never changed."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import dvae
import probe
import toto
from conftest import fake_tokens
from test_train import in_process, run_in_a_pair

D, H, C = 32, 4, 5


def attention_pool():
    torch.manual_seed(0)
    pool = probe.AttentionPool(D, H, C)
    torch.nn.init.normal_(pool.query)
    return pool


def test_plain_pool_matches_multihead_attention():
    """§3.5: the query cross-attends to all tokens. Same weights in torch.nn.MultiheadAttention, same vector."""
    pool = attention_pool().eval()  # its norm, untrained, is the identity
    reference = torch.nn.MultiheadAttention(D, H, bias=False, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat((torch.eye(D), pool.key.weight, pool.value.weight)))
        reference.out_proj.weight.copy_(torch.eye(D))
        x = torch.randn(3, 17, D)
        expected, _ = reference(pool.query.expand(3, 1, D), x, x)
        torch.testing.assert_close(pool.plain_pool(x), expected[:, 0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(pool(x), pool.classifier(expected[:, 0]), atol=1e-5, rtol=1e-4)


def test_plain_pool_matches_scaled_dot_product():
    """In training, with the batch norm written out."""
    pool, x = attention_pool(), 3 + 5 * torch.randn(4, 9, D)
    normal = (x - x.mean(dim=(0, 1))) / (x.var(dim=(0, 1), unbiased=False) + 1e-5).sqrt()
    split = lambda y: y.view(4, -1, H, D // H).transpose(1, 2)
    inputs = pool.query.expand(4, 1, D), pool.key(normal), pool.value(normal)
    expected = torch.nn.functional.scaled_dot_product_attention(*map(split, inputs))
    expected = expected.transpose(1, 2).reshape(4, D)
    torch.testing.assert_close(pool.plain_pool(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_training", [True, False])
def test_pool_is_the_plain_one_rearranged(is_training):
    """Without ever making K and V: values, gradients of the weights and of the tokens, and the norm's statistics."""
    results, x = [], 3 + 5 * torch.randn(4, 9, D, generator=torch.Generator().manual_seed(1))
    x *= torch.linspace(0.2, 3, D)  # of other scale in each dimension
    outer = torch.randn(4, D, generator=torch.Generator().manual_seed(2))
    for way in ("plain_pool", "pool"):
        pool, tokens = attention_pool(), x.clone().requires_grad_()
        pool.plain_pool(2 * x)  # the norm is no longer the identity
        pool.train(is_training)
        pooled = getattr(pool, way)(tokens)
        parameters = [pool.query, pool.key.weight, pool.value.weight, tokens]
        gradients = torch.autograd.grad(pooled, parameters, outer)
        results.append([pooled, *gradients, pool.norm.mean, pool.norm.var])
    assert results[0][0].norm() > 1
    for expected, got in zip(*results):
        assert (got - expected).norm() < 1e-4 * expected.norm()


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


@pytest.fixture(scope="session")
def folder(tmp_path_factory, untrained_tokenizer):
    """A model, its tokenizer, and a folder of images of two classes that differ in colour."""
    folder = tmp_path_factory.mktemp("probe")
    torch.manual_seed(0)
    dvae.save(untrained_tokenizer, folder / "dvae.pt")
    model = toto.Toto(toto.Config(dim=32, n_heads=2, n_layers=3, hidden=32, vocab_size=36))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() == 2 else None
    checkpoint = {"model": model.state_dict(), "config": vars(model.config), "step": 0}
    checkpoint |= {"tokenizer": untrained_tokenizer.fingerprint(), "resolution": 16, "stride": 4, "frames": 4}
    torch.save(checkpoint, folder / "toto.pt")
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("val", 20)):
        for name, level in (("blue", (40, 40, 200)), ("red", (200, 40, 40))):
            for i in range(n):
                path = folder / "images" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                data.Image.fromarray((level + rng.integers(-5, 5, (16, 16, 3))).astype(np.uint8)).save(path)
    return folder


@pytest.fixture
def setting(tmp_path, folder):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


def command(folder, *arguments):
    base = ["probe.py", "--checkpoint", folder / "toto.pt", "--out", folder / "out", "--device", "cpu"]
    return [str(part) for part in [*base, "--data", folder / "images", "--epochs", 25, "--lr", 0.01, *arguments]]


def run_probe(folder, *arguments):
    in_process(*command(folder, *arguments))
    return json.loads((folder / "out" / "probe.json").read_text())


def test_probing_an_image_folder(setting, capsys):
    before = (setting / "toto.pt").read_bytes()
    report = run_probe(setting, "--layer", "all")
    assert report["classes"] == {"class": ["blue", "red"]} and report["clips"] == [80, 40]
    top1 = {(row["pool"], row["layer"]): row["top1"] for row in report["accuracy"]}
    assert set(top1) == {(pool, l) for pool in ("attention", "average") for l in range(4)}
    assert top1["average", 2] > 0.9 and top1["attention", 2] > 0.9
    output = capsys.readouterr().out
    assert "chance 50.0%" in output and output.count("█") > 20
    assert (setting / "toto.pt").read_bytes() == before  # frozen


def trained_parts(folder):
    """{head or trunk: its state} of the last run."""
    state = torch.load(folder / "out" / "probe.pt", weights_only=True)
    assert set(state) == {"settings", "parts", "step"}
    state["parts"].pop("optimizer")
    return state["parts"]


def test_a_layer_probed_alone_gives_the_same(setting):
    pick = lambda report: [row["top1"] for row in report["accuracy"] if row["layer"] == 2]
    everything = pick(run_probe(setting, "--layer", "all", "--epochs", "2"))
    among_all = trained_parts(setting)
    alone = run_probe(setting, "--layer", "2", "--epochs", "2")
    assert everything == pick(alone) and len(alone["accuracy"]) == 2
    for name, state in trained_parts(setting).items():
        assert all(torch.equal(value, among_all[name][key]) for key, value in state.items())


def test_layer_decay_as_in_mae():
    """§4.2: MAE's own function gives these rates for 16 layers and 0.9."""
    model = toto.Toto(toto.Config(dim=8, n_heads=1, n_layers=16, hidden=8, vocab_size=8))
    scales = {p: scale for part, scale in probe.layer_scales(model) for p in part.parameters()}
    assert scales.keys() == set(model.parameters())
    for name, scale in (("embedding.weight", 0.16677), ("blocks.0.mlp.out.weight", 0.18530), ("norm.weight", 1)):
        assert scales[model.get_parameter(name)] == pytest.approx(scale, abs=1e-5)
    assert scales[model.blocks[15].attention.qkv.weight] == pytest.approx(0.9)


def settings_of_the_optimizer(mup_width, finetune="joint"):
    """{name: (scale of the rate, weight decay)} for the parameters of two heads and of a trunk of width 16."""
    model = toto.Toto(toto.Config(16, 2, 3, 16, 36, mup_width=mup_width))
    heads = {("class", pool, 2): probe.POOLS[pool](16, 2, 3) for pool in ("average", "attention-mlp")}
    names = {p: name for name, p in model.named_parameters()}
    names |= {p: f"{pool} {name}" for (_, pool, _), head in heads.items() for name, p in head.named_parameters()}
    optimizer = probe.make_optimizer(heads, model, SimpleNamespace(finetune=finetune, lr=0.1))
    groups = optimizer.param_groups
    return {names[p]: (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_weight_decay_is_for_matrices():
    settings = settings_of_the_optimizer(0)
    decayed = {name for name, (_, decay) in settings.items() if decay == 0.05}
    assert all(settings[name][1] == 0 for name in settings.keys() - decayed)
    kept = {"norm.weight", "average classifier.bias", "attention-mlp classifier.bias", "attention-mlp query"}
    kept |= {f"attention-mlp mlp.{name}" for name in ("0.weight", "0.bias", "1.bias", "3.bias")}
    kept |= {f"blocks.{l}.{part}_norm.weight" for l in range(3) for part in ("attention", "mlp")}
    assert settings.keys() - decayed == kept and "embedding.weight" in decayed
    frozen = settings_of_the_optimizer(0, finetune=None)
    assert frozen.items() < settings.items() and not any(name.startswith("blocks") for name in frozen)


def test_mup_keeps_its_ratio_in_fine_tuning():
    """A.5: a quarter of the rate for the blocks' matrices at four times the base width, but no less decay in all."""
    plain, mup = settings_of_the_optimizer(0), settings_of_the_optimizer(4)
    for name, (scale, decay) in plain.items():
        ratio = 1 / 4 if name.startswith("blocks") and "norm" not in name else 1
        assert mup[name] == pytest.approx((scale * ratio, decay / ratio)), name


def gradients_of_the_trunk(mode, causal=True, head_loss=True, start=toto.VIDEO_START):
    torch.manual_seed(0)
    model = toto.Toto(toto.Config(dim=16, n_heads=2, n_layers=3, hidden=16, vocab_size=36))
    head = probe.AttentionPool(16, 2, 3)
    ids = torch.randint(4, 36, (5, 9), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = start
    features, loss = probe.fine_tuned_features(model, ids, {2}, mode, causal)
    logits = head(features[2])
    if head_loss:
        loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1]))
    loss.backward()
    assert not head_loss or head.key.weight.grad.abs().sum() > 0
    return {name: p.grad for name, p in model.named_parameters()}, model, ids


def test_stop_gradient_stops():
    """§4.2: beside the probes the trunk gets just the gradient of Eq. 2."""
    with_head, model, ids = gradients_of_the_trunk("joint")
    model.zero_grad()
    model(ids, torch.cat((ids[:, 1:], torch.full((5, 1), toto.END)), dim=1)).backward()
    assert all(torch.allclose(with_head[name], p.grad, atol=1e-7) for name, p in model.named_parameters())


def test_no_end_after_one_image():
    """§3.4: [2] ends a sequence, which in pre-training has sixteen images; it is no target after a single one."""
    gradients, model, ids = gradients_of_the_trunk("joint", start=toto.IMAGE_START)
    model.zero_grad()
    model(ids[:, :-1], ids[:, 1:]).backward()  # every code is predicted, and nothing after the last
    assert all(torch.allclose(gradients[name], p.grad, atol=1e-7) for name, p in model.named_parameters())


def test_full_fine_tuning_reaches_the_trunk_up_to_the_layer():
    causal, full = (gradients_of_the_trunk("full", causal)[0] for causal in (True, False))
    for gradients in (causal, full):
        assert gradients["embedding.weight"].abs().sum() > 0 and gradients["blocks.1.mlp.out.weight"].abs().sum() > 0
        assert gradients["blocks.2.mlp.out.weight"] is None  # layer 2 is the second block's output
    assert not torch.allclose(causal["embedding.weight"], full["embedding.weight"])


def test_both_losses_reach_the_trunk():
    """§4.4: without the stop-gradient the trunk gets the gradient of Eq. 2 plus that of the classes."""
    both, alone = gradients_of_the_trunk("both")[0], gradients_of_the_trunk("joint")[0]
    classes = gradients_of_the_trunk("full")[0]
    for name, gradient in both.items():
        expected = alone[name] + (0 if classes[name] is None else classes[name])
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(both["embedding.weight"], alone["embedding.weight"], atol=1e-4)


WAYS = [["--finetune", "joint"], ["--finetune", "full", "--attention", "full"], ["--finetune", "both"]]


@pytest.mark.parametrize("arguments", WAYS)
def test_fine_tuning_an_image_folder(setting, capsys, arguments):
    one = ["--layer", "2", "--pool", "attention", "--epochs", "15", "--lr", "0.01"]
    report = run_probe(setting, *one, *arguments)
    assert report["accuracy"][0]["top1"] > 0.9
    before = torch.load(setting / "toto.pt", weights_only=True)["model"]
    after = trained_parts(setting)["trunk"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "blocks.0.mlp.out.weight" in changed
    assert ("blocks.2.mlp.out.weight" in changed) == ("full" not in arguments)  # beyond layer 2: Eq. 2 alone


def test_a_fine_tuned_trunk_is_a_checkpoint(setting, capsys):
    """toto.load, sample.py, train.py and probe.py read it, at the resolution and RoPE base that it was tuned with."""
    before, path = (setting / "toto.pt").read_bytes(), setting / "out" / "finetuned.pt"
    arguments = ["--layer", "2", "--pool", "attention", "--epochs", "1"]
    run_probe(setting, *arguments, "--finetune", "both", "--resolution", "32", "--rope-base", "50000")
    assert f"wrote {path}" in capsys.readouterr().out and (setting / "toto.pt").read_bytes() == before
    weights, trunk = toto.load(path).state_dict(), trained_parts(setting)["trunk"]
    assert all(torch.equal(weights[name], trunk[name]) for name in trunk)
    checkpoint = toto.load_checkpoint(path)
    assert checkpoint["resolution"] == 32 and checkpoint["config"].rope_base == 50_000
    assert checkpoint["plan"]["grid"] == [4, 4] and checkpoint["plan"]["frames"] == checkpoint["frames"] == 4
    read = ["--checkpoint", path, "--out", setting / "read"]
    in_process("sample.py", *read, "--frames", "2", "--prompt-frames", "1", "--samples", "1", "--device", "cpu")
    assert np.load(setting / "read" / "sample.npy").shape == (1, 2, 4, 4)
    in_process("train.py", "--export", setting / "read" / "hf", "--init-from", path)
    assert json.loads((setting / "read" / "hf" / "config.json").read_text())["rope_theta"] == 50_000
    in_process(*command(setting, *arguments, *read))
    assert "clips of 16 tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--finetune writes finetuned.pt to .*; give another --out"):
        run_probe(setting, *arguments, "--finetune", "full", "--checkpoint", path)


def test_two_processes_are_one(setting, monkeypatch):
    """The same steps on the same clips, under torchrun or not: the same weights and averages of AdamW.

    All in float32, so that nothing is hidden by bfloat16's rounding.
    """
    how = ["--epochs", 3, "--lr", "1e-3"]
    ways = {"frozen": ["--layer", "1,2"], "joint": ["--layer", "1,2", "--finetune", "joint"]}
    ways["full"] = ["--layer", 2, "--pool", "attention", "--finetune", "full"]  # its gradient goes through the norm
    at = lambda place, way: [*how, *ways[way], "--out", setting / place / way]
    run_in_a_pair(setting, *(command(setting, *at("pair", way)) for way in ways), dtype="float32")
    monkeypatch.setattr(data, "fast_dtype", lambda device: torch.float32)
    for way in ways:
        in_process(*command(setting, *at("one", way)))
        folders = [setting / place / way for place in ("pair", "one")]
        pair, one = (torch.load(folder / "probe.pt", weights_only=True)["parts"] for folder in folders)
        assert len(one) == {"frozen": 4, "joint": 5, "full": 2}[way] + 1  # heads, a trunk, the optimizer
        for parts in (pair, one):  # a gradient that is summed over processes changes nothing but these
            averages = parts.pop("optimizer")["state"]
            parts["averages"] = {i: average["exp_avg"] for i, average in averages.items()}
        for name in one:
            for key, value in one[name].items():
                assert (pair[name][key] - value).norm() <= 1e-4 * value.norm() + 1e-6, (way, name, key)
        rows = [json.loads((folder / "probe.json").read_text())["accuracy"] for folder in folders]
        for a, b in zip(*rows, strict=True):
            assert a["layer"] == b["layer"] and a["top1"] == pytest.approx(b["top1"], abs=0.051)


def test_a_stopped_probe_resumes_exactly(setting, monkeypatch):
    arguments = ["--layer", "2", "--finetune", "joint", "--epochs", "4"]
    run_probe(setting, *arguments)
    undisturbed = trained_parts(setting)
    (setting / "out" / "probe.pt").unlink()
    answers = [False] * 5 + [True]  # in the sixth step
    with monkeypatch.context() as patch:
        patch.setattr(data, "is_stop_asked", lambda signals: answers.pop(0))
        with pytest.raises(KeyboardInterrupt):
            run_probe(setting, *arguments)
    assert torch.load(setting / "out" / "probe.pt", weights_only=True)["step"] == 6
    run_probe(setting, *arguments)
    for name, state in trained_parts(setting).items():
        assert all(torch.equal(value, undisturbed[name][key]) for key, value in state.items())


def test_views_of_videos(tmp_path, untrained_tokenizer):
    """§4.3: 3 windows at (length - frames) · i / 3, of each of 3 crops at the ends and the middle of the long side."""
    rng = np.random.default_rng(0)
    video = rng.integers(0, 255, (13, 16, 40, 3), dtype=np.uint8)
    items = [data.Item(f"a/{i}", lambda: ({"class": "a"}, iter(video))) for i in range(2)]
    data.tokenize([items], tmp_path / "t", untrained_tokenizer, 16, 1, data.THREE)
    found = probe.ProbeSet(data.Tokens(tmp_path / "t"), 4, n_views=3, n_crops=3)
    assert found.ids.shape == (2, 9, 1 + 4 * 4) and len(found.labels["class"]) == 2
    places = [(start, left) for left in (0, 12, 24) for start in (0, 3, 6)]
    views = [untrained_tokenizer.encode(video[start : start + 4, :, left : left + 16]) for start, left in places]
    assert torch.equal(found.ids[1, :, 1:].long(), torch.stack(views).flatten(1) + toto.FIRST_CODE)


@pytest.fixture
def token_folders(setting, untrained_tokenizer):
    """Videos of 7 frames as token folders, for a model of 4 frames: two random crops of those for training."""
    rng = np.random.default_rng(0)
    for split, n, crops in (("train", 12, 2), ("val", 4, 1)):
        videos = [(str(i % 2), rng.integers(0, 255, (7, 16, 40, 3), dtype=np.uint8)) for i in range(n)]
        read = [lambda label=label, video=video: ({"class": label}, iter(video)) for label, video in videos]
        items = [data.Item(f"{i}.mp4", one) for i, one in enumerate(read)]
        data.tokenize([items], setting / "tokens" / split, untrained_tokenizer, 16, 4, crops)
    return setting / "tokens"


def test_epochs_see_random_crops_and_windows(token_folders):
    """§3.4: "a random crop of R x R x T". Any of the crops and any window, decided by the seed and the epoch alone."""
    tokens = data.Tokens(token_folders / "train")
    split = probe.ProbeSet(tokens, 4, n_crops=2)
    rows, seen = torch.tensor([7, 0, 3]), set()
    for epoch in range(100):
        crops, starts = split.draw(torch.Generator().manual_seed(epoch))
        again = split.draw(torch.Generator().manual_seed(epoch))
        assert torch.equal(crops, again[0]) and torch.equal(starts, again[1]) and len(crops) == len(starts) == 12
        codes = split.drawn(rows, crops, starts)[:, 1:].view(3, 4, 2, 2) - toto.FIRST_CODE
        for i, row in enumerate(rows.tolist()):
            crop, start = crops[row].item(), starts[row].item()
            assert np.array_equal(codes[i], tokens.codes(2 * row + crop)[start : start + 4])
            seen.add((row, crop, start))
    assert seen == {(row, crop, start) for row in (0, 3, 7) for crop in range(2) for start in range(4)}
    as_long = probe.ProbeSet(tokens, 7, n_crops=2)  # just one window: what is drawn is in memory already
    crops, starts = as_long.draw(torch.Generator().manual_seed(0))
    assert not as_long.is_longer and not starts.any()
    assert torch.equal(as_long.drawn(rows, crops, starts), as_long.ids.flatten(0, 1)[2 * rows + crops[rows]])


def test_an_epoch_sees_one_crop_of_each_clip(setting, monkeypatch):
    """Features that are kept, of all crops, are those that the heads get: one crop of every clip an epoch."""
    arguments, places = ["--layer", "2", "--crops", "3", "--epochs", "9", "--batch", "40"], []
    get = probe.Features.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(probe.Features, "__getitem__", lambda self, rows: places.append(rows) or get(self, rows))
        run_probe(setting, *arguments)
    kept, epochs = trained_parts(setting), torch.cat(places[:18]).view(9, 80)
    assert all(torch.equal((epoch // 3).sort().values, torch.arange(80)) for epoch in epochs)
    assert all(200 < (epochs % 3 == crop).sum() < 280 for crop in range(3))  # of 720
    (setting / "out" / "probe.pt").unlink()
    monkeypatch.setattr(probe, "KEEP_BYTES", 0)
    run_probe(setting, *arguments)
    for name, state in trained_parts(setting).items():
        assert all(torch.equal(value, kept[name][key]) for key, value in state.items())


@pytest.mark.parametrize("how", [[], ["--finetune", "joint"]])
def test_probing_token_folders_resumes_exactly(token_folders, monkeypatch, how):
    """With other crops and windows in every epoch."""
    setting, seen = token_folders.parent, []
    arguments = ["--data", token_folders, "--crops", "2", "--layer", "2", "--epochs", "4", "--batch", "4", *how]
    stream = toto.Toto.residual_stream
    with monkeypatch.context() as patch:
        patch.setattr(toto.Toto, "residual_stream", lambda self, ids, *how: seen.append(ids) or stream(self, ids, *how))
        assert run_probe(setting, *arguments)["clips"] == [12, 4]
    # Of 4 epochs of 12 clips, and 4 for validation; two crops without windows would be 24 and 4.
    assert len({tuple(ids.tolist()) for batch in seen for ids in batch}) > 32
    undisturbed = trained_parts(setting)
    (setting / "out" / "probe.pt").unlink()
    answers = [False] * 4 + [True]  # in the second epoch
    with monkeypatch.context() as patch:
        patch.setattr(data, "is_stop_asked", lambda signals: answers.pop(0))
        with pytest.raises(KeyboardInterrupt):
            run_probe(setting, *arguments)
    run_probe(setting, *arguments)
    for name, state in trained_parts(setting).items():
        assert all(torch.equal(value, undisturbed[name][key]) for key, value in state.items())


def test_token_folders_that_do_not_fit(token_folders):
    setting, base = token_folders.parent, ["--data", token_folders, "--crops", "2"]
    with pytest.raises(ValueError, match="train: its crops is 2, here it is 1; a token folder keeps"):
        run_probe(setting, *base, "--crops", "1")
    with pytest.raises(ValueError, match="train: its resolution is 16, here it is 32"):
        run_probe(setting, *base, "--resolution", "32")
    meta = token_folders / "val" / "meta.json"
    good = json.loads(meta.read_text())
    for what, other, words in (
        ("stride", 3, "was stored at stride 3, which cannot give stride 4"),
        ("tokenizer", "another", "its tokenizer is another, here it is"),
    ):
        data.write_json(good | {what: other}, meta)
        with pytest.raises(ValueError, match=f"val: {words}"):
            run_probe(setting, *base)


def test_windows_of_a_folder_that_stores_every_frame(tmp_path):
    """§3.4: at stride 4 a window of 3 frames takes every 4th stored one, from any phase."""
    tokens = fake_tokens(tmp_path / "t", [20, 9], stride=1)
    tokens.labels = {"class": ["a", "b"]}
    split = probe.ProbeSet(tokens, 3, step=tokens.step(4))
    first = lambda ids: (ids[:, 1:].reshape(len(ids), 3, -1)[..., 0] - toto.FIRST_CODE).tolist()
    assert first(split.ids[:, 0]) == [[5, 9, 13], [100, 104, 108]] and split.spare.tolist() == [11, 0]
    crops, starts = split.draw(torch.Generator().manual_seed(0))
    assert first(split.drawn(torch.tensor([0]), crops, starts)) == [[starts[0] + k for k in (0, 4, 8)]]
    assert len({split.draw(torch.Generator().manual_seed(s))[1][0].item() % 4 for s in range(20)}) == 4


def test_probabilities_of_views_are_averaged():
    """Two views lean to class 0, the third is sure of class 1: their logits would give 1."""

    class split:
        ids, labels = torch.zeros(3, 3, 5), {"class": torch.tensor([0, 0, 1])}
        __len__ = lambda self: 3

    class args:
        batch = 6

    p = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.001, 0.999]]).log()
    features = {0: p.repeat(3, 1)[:, None]}
    by_rows = type("", (), {"__getitem__": lambda self, rows: {0: features[0][rows]}})()
    head = torch.nn.Flatten()
    result = probe.evaluate({("class", "x", 0): head}, by_rows, split(), args, torch.device("cpu"))["class", "x", 0]
    assert result["classes"].tolist() == [0, 0, 0] and result["top1"] == pytest.approx(2 / 3)


def test_baselines(setting, untrained_tokenizer, capsys):
    report = run_probe(setting, "--layer", "2", "--baselines", "--crops", "2")
    assert report["clips"] == [80, 40]
    models = [row["model"] for row in report["accuracy"]]
    path = setting / "toto.pt"
    assert models == 2 * [str(path)] + 2 * [f"{path}, untrained"] + [f"{path}, raw pixels"]
    assert report["accuracy"][-1]["top1"] > 0.9  # red and blue are easy to tell
    output = capsys.readouterr().out
    assert f"{path}, untrained, frozen, 1 view(s)" in output and f"{path}, raw pixels, frozen" in output
    assert sorted(path.name for path in (setting / "out").glob("*.pt")) == ["probe-2.pt", "probe-3.pt", "probe.pt"]
    with pytest.raises(ValueError, match="--views are for videos; here are images"):
        run_probe(setting, "--views", "1x3")
    for split in ("train", "val"):  # token folders have no pixels
        shards = data.media_shards(setting / "images" / split, 16, 4)
        data.tokenize(shards, setting / "tokens" / split, untrained_tokenizer, 16, 4)
    report = run_probe(setting, "--baselines", "--epochs", "1", "--data", setting / "tokens")
    assert list(report["runs"]) == [str(path), f"{path}, untrained"]


def test_new_weights_and_new_labels_are_probed_anew(setting):
    """probe.pt is for the very same model and clips, whatever their files are called."""
    arguments = ["--layer", "2", "--epochs", "2"]
    first = run_probe(setting, *arguments)["runs"]
    heads = trained_parts(setting)
    checkpoint = torch.load(setting / "toto.pt", weights_only=True)
    checkpoint["model"]["blocks.0.mlp.out.weight"] *= 2
    torch.save(checkpoint, setting / "toto.pt")
    assert run_probe(setting, *arguments)["runs"] == first
    for name, state in trained_parts(setting).items():
        assert not torch.equal(state["norm.mean"], heads[name]["norm.mean"])


def test_interval_over_seeds():
    """Against a table of Student's t: the mean of 1, 2 and 3 (s = 1) lies within 4.303 / √3 of 2."""
    assert probe.over_seeds([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert probe.over_seeds([1.0, 3.0]) == pytest.approx((2, 2 - 12.706, 2 + 12.706), abs=1e-3)
    assert probe.over_seeds([5.0]) == (5, -float("inf"), float("inf"))
    assert probe.show_seeds([1.0, 2.0, 3.0], 2) == "2.00 (-0.48 to 4.48)"
    assert probe.show_seeds([90.0, 100.0]) == "95.0 (31.5 to 100.0)" and probe.show_seeds([5.0]) == "5.0"


def test_mean_features_are_those_of_every_layer():
    """The mean over an image's tokens, without the start."""
    model = toto.Toto(toto.Config(dim=D, n_heads=H, n_layers=2, hidden=48, vocab_size=70)).eval()
    ids = torch.randint(4, 70, (200, 1 + 10), dtype=torch.int16)
    split = SimpleNamespace(inputs=lambda rows: ids[rows])
    rows = torch.arange(1, 200, 2)
    means = probe.mean_features(model, split, rows, torch.device("cpu"))
    assert means.shape == (3, 100, D)
    for l, x in model.features(ids.long(), [0, 1, 2]).items():
        torch.testing.assert_close(means[l], x[rows, 1:].mean(dim=1))


def test_linear_probe_is_at_its_optimum():
    """Against Newton's method in float64 on the same convex loss: the same classes for all but a few borderline cases.

    One direction has a thousandth of the others' scale and alone tells the classes, along another that is nearly it.
    """
    generator = torch.Generator().manual_seed(0)
    y, y_val = torch.randint(3, (2, 400), generator=generator)
    noise = lambda y: torch.randn(len(y), 4, generator=generator)
    draw = lambda y: torch.cat((noise(y), 1e-3 * (y[:, None] + 0.4 * noise(y)[:, :1])), dim=1)
    x, x_val = draw(y), draw(y_val)
    x[:, 0] += 900 * x[:, 4]  # ill-conditioned
    x_val[:, 0] += 900 * x_val[:, 4]

    mean, scale = x.mean(dim=0).double(), x.std(dim=0).double()
    a, b = (x - mean) / scale, (x_val - mean) / scale
    one = lambda x: torch.cat((x, torch.ones(len(x), 1)), dim=1)
    loss = lambda w: (
        torch.nn.functional.cross_entropy(one(a) @ w.view(6, 3), y) + 1e-5 * w.view(6, 3)[:5].pow(2).sum()
    )
    w = torch.zeros(18, dtype=torch.float64)
    for _ in range(30):
        gradient, hessian = torch.func.grad(loss)(w), torch.func.hessian(loss)(w)
        w -= torch.linalg.solve(hessian + 1e-9 * torch.eye(18), gradient)
    expected = ((one(b) @ w.view(6, 3)).argmax(dim=1) == y_val).double().mean().item()
    assert expected > 0.7
    assert probe.linear_probe(x, y, x_val, y_val, 3).float().mean().item() == pytest.approx(expected, abs=0.006)


def test_wilson_interval():
    """Against values of Wilson's formula in Brown, Cai and DasGupta (2001): 5 of 10, and none of 10."""
    assert probe.wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert probe.wilson(0.0, 10) == pytest.approx((0, 0.2775), abs=1e-4)


def test_features_computed_anew_are_the_kept_ones(setting, monkeypatch):
    kept = run_probe(setting, "--layer", "2", "--epochs", "2")["accuracy"]
    (setting / "out" / "probe.pt").unlink()  # or it would find all steps done
    monkeypatch.setattr(probe, "KEEP_BYTES", 0)
    assert run_probe(setting, "--layer", "2", "--epochs", "2")["accuracy"] == kept


def test_wrong_folders(setting):
    extra = setting / "images" / "val" / "grey"
    extra.mkdir()
    data.Image.new("RGB", (16, 16)).save(extra / "x.png")
    with pytest.raises(ValueError, match="has a class that train has not: grey"):
        run_probe(setting)
    (setting / "images" / "train" / "grey").mkdir()
    data.Image.new("RGB", (16, 16)).save(setting / "images" / "train" / "grey" / "x.png")
    (extra / "x.png").unlink()
    with pytest.raises(ValueError, match="val: has a class missing: grey"):
        run_probe(setting)
    shutil.rmtree(setting / "out", ignore_errors=True)
    (setting / "images" / "val").rename(setting / "images" / "later")
    (setting / "images" / "val").mkdir()
    with pytest.raises(ValueError, match="val: no images or videos here"):
        run_probe(setting)
    assert not (setting / "out" / "tokens").exists()  # nothing was tokenized before that was seen
    (setting / "images" / "val").rmdir()
    (setting / "images" / "later").rename(setting / "images" / "val")
    data.Image.new("RGB", (16, 16)).save(setting / "images" / "train" / "loose.png")
    with pytest.raises(ValueError, match="files must lie in one sub-folder per class"):
        run_probe(setting)


def test_verdicts_follow_the_interval():
    assert [probe.verdict(*x) for x in ((1, 2), (-2, -1), (-1, 1), (-math.inf, math.inf))] == [
        "holds", "does not hold", "cannot tell", "cannot tell",
    ]  # fmt: skip
