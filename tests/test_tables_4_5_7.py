"""paper/table4_resolution.py and paper/tables_5_7.py: compute, rates, intervals, protocols, and both programs."""

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
import probe
import toto
import train
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "paper"))  # its scripts are no package
import table4_resolution as table4
import tables_5_7 as tables


@pytest.fixture(scope="module")
def media(tmp_path_factory, untrained_tokenizer):
    """40 images to pre-train on, a task of two classes, a tokenizer, and a model that train.py could have made."""
    folder = tmp_path_factory.mktemp("media")
    dvae.save(untrained_tokenizer, folder / "dvae.pt")
    for i in range(40):
        for name in (f"images/{i}", f"task/train/{'ab'[i % 2]}/{i}", f"task/val/{'ab'[i % 2]}/{i + 40}"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.world_clip(i, 1, 32).frames[0] // (1 + i % 2)).save(folder / f"{name}.png")
    torch.manual_seed(3)
    model = toto.Toto(replace(toto.SIZES["tiny"], vocab_size=toto.FIRST_CODE + 32))
    tokenizer = untrained_tokenizer.fingerprint()
    checkpoint = {"step": 5, "tokenizer": tokenizer, "stride": 4, "frames": 2, "optimizer": {}}
    dvae.save_trained(model, untrained_tokenizer, checkpoint, 32, folder / "toto.pt")
    return folder


def call(monkeypatch, program, words):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words), "--device", "cpu"])
    program.main()


def stop_at(monkeypatch, module, name, calls):
    """Ctrl-C at these calls of a function, each once -> the list of calls so far."""
    made, original = [], getattr(module, name)

    def and_stop(*inputs, **how):
        made.append(1)
        if len(made) in calls:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*inputs, **how)

    monkeypatch.setattr(module, name, and_stop)
    return made


# Table 4
def of_table4(media, out, *extra):
    words = ["--data", media / "images", "--probe", media / "task", "--tokenizer", media / "dvae.pt", "--out", out]
    return [*words, "--resolution", 16, "--batch-tokens", 64, "--steps", 4, "--seeds", 2, *extra]


def test_compute():
    """FLOPs by hand, for `large` and the paper's contexts, and the ratios of the paper's own column."""
    args = SimpleNamespace(steps=10, frames=16)
    with torch.device("meta"):
        model = toto.Toto(toto.SIZES["large"])
    assert 16 * 16**2 == table4.images_in_a_sequence(args, True) * 32**2 == 4096
    # Per block: q, k, v and the output, 4 D²; gate, up and down, 3 D · 4 D; two norms of D. One norm and the embedding.
    D, L, T = 1024, 16, 4096
    n = L * (4 * D * D + 3 * D * 4 * D + 2 * D) + D + 8196 * D
    step = 2**20 * 3 * 2 * (n + L * 2 * D * T)  # forward, and twice as much backward, of 2 FLOPs for each multiply-add
    for row in table4.ROWS:
        found = table4.flops(row, model, 256, T, args)
        assert found["flops"] == pytest.approx((row.low + row.high) * 10 * step, rel=1e-9)
        assert found["macs"] == pytest.approx(found["flops"] / 6)
        if row.compute:
            assert row.low + row.high == pytest.approx(row.compute / 1.42e17, rel=2e-3)
    # The unit of that column, as the comment has it: a forward pass over ImageNet-1k.
    assert (n + L * 2 * D * T) * 256 * 1_281_167 == pytest.approx(1.42e17, rel=0.06)
    for args.steps in (10, 7, 1):  # at equal compute, also where a half of the steps is no whole number
        total = {row.name: sum(table4.steps_of(row, args)) for row in table4.ROWS}
        assert all(total[first] == total[second] for _, first, second in table4.CLAIMS[3:])


def test_table4(media, tmp_path, monkeypatch, capsys):
    """All rows: as many steps as they say, at their resolutions; stopped twice and resumed, the same numbers."""
    pytest.importorskip("matplotlib", reason="draws by matplotlib: pip install -r paper/requirements.txt")
    shapes, take_step = [], train.take_step

    def record(trained, optimizer, batch, *rest):
        shapes.append((tuple(batch.shape), trained.config.rope_base))
        return take_step(trained, optimizer, batch, *rest)

    monkeypatch.setattr(train, "take_step", record)
    call(monkeypatch, table4, of_table4(media, tmp_path / "whole"))
    # 8 images of 2 x 2 tokens or 2 of 4 x 4, after a start and before an end: two sequences a step of 64 tokens.
    assert {shape for shape, _ in shapes} == {(2, 34)}
    assert len(shapes) == 2 * 4 * (1 + 4 + 1.5 - 1 + 1.5 - 1 + 1.5 + 1.5)  # the fine-tuned ones share their first part
    assert [base for _, base in shapes].count(100) == 2 * 2  # 5 · 20, in one row alone
    report = json.loads((tmp_path / "whole/table4.json").read_text())
    printed = capsys.readouterr().out
    of = {row["name"]: row for row in report["rows"]}
    for name, row in of.items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{name}  ")]
        assert probe.show_seeds([100 * top1[2] for top1 in row["top1"]]) in line
        assert probe.show_seeds(row["loss"], 3) in line and f"{row['flops'] / 1e15:.3g}" in line
    assert of["dVAE/32"]["flops"] == 4 * of["dVAE/16"]["flops"]
    values = [100 * (a[2] - b[2]) for a, b in zip(of["dVAE/32"]["top1"], of["dVAE/16"]["top1"])]
    assert f"drop: {probe.show_seeds(values)} points" in printed
    assert (tmp_path / "whole/table4.png").stat().st_size > 10_000
    # low-0.pt has the first row's weights: its loss is that of the JSON.
    model, tokens = toto.load(tmp_path / "whole/low-0.pt"), next((tmp_path / "whole/tokens").glob("images-*"))
    resolutions = {json.loads((f / "meta.json").read_text())["resolution"]: f for f in tokens.parent.glob("images-*")}
    held_out = {"images": data.Source(data.Tokens(resolutions[16]), 8, held_out=True)}
    loss = train.evaluate(model, held_out, 4, torch.device("cpu"))["images"]["loss"]
    assert loss == pytest.approx(of["dVAE/16"]["loss"][0], rel=0.02)  # bfloat16 there, where the processor has it

    monkeypatch.setattr(train, "take_step", take_step)
    made = stop_at(monkeypatch, train, "take_step", (3, 23))  # within a run of the first row, and a fine-tuning
    one_seed = of_table4(media, tmp_path / "stopped", "--seeds", 1)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            call(monkeypatch, table4, one_seed)
    call(monkeypatch, table4, one_seed)
    assert len(made) == len(shapes) / 2
    for row in json.loads((tmp_path / "stopped/table4.json").read_text())["rows"]:
        assert all(row[key] == of[row["name"]][key][:1] for key in ("loss", "top1", "untrained"))


def test_table4_needs_a_task(media, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="draws by matplotlib: pip install -r paper/requirements.txt")
    with pytest.raises(ValueError, match="--data needs --probe"):
        call(monkeypatch, table4, ["--data", media / "images", "--out", tmp_path])
    with pytest.raises(ValueError, match="low-0.pt: is missing; remove .*runs too"):  # and not a traceback
        args = SimpleNamespace(out=tmp_path, frames=8, steps=4, size="tiny", data="", probe="", resolution=16)
        args.batch_tokens, args.lr = 64, 0.003
        sets = {True: {"pretrain": SimpleNamespace(meta={"vocab_size": 32, "tokenizer": "x"})}}
        table4.run(table4.ROWS[2], 0, sets, None, args, None)


# Tables 5 to 16
def of_tables(media, out, *extra):
    return ["--checkpoint", media / "toto.pt", "--data", media / "task", "--out", out, "--epochs", 1, "--lr", 0.002,
            "--batch", 8, "--seeds", 1, *extra]  # fmt: skip


def test_the_papers_rows():
    """Toto's own, as printed."""
    assert (tables.PAPER["5"]["average, large"], tables.PAPER["5"]["attention, large"]) == (53.2, 61.1)
    for table, rows in {"7": (64.7, 71.1, 75.3), "8": (59.3, 65.3, 74.4), "16": (61.2, 65.8, 74.8)}.items():
        assert tuple(tables.PAPER[table][size] for size in ("base", "large", "1b")) == rows
    assert {table for p in tables.PROTOCOLS.values() for table in p.tables} == set(tables.PAPER) == set(tables.TITLES)


def test_rates_are_picked_without_the_test_clips():
    """A planted case: each head is best at its own rate on the held-out fifth, and the clips given are of training."""
    names = [f"{i}" for i in range(100)]
    split = SimpleNamespace(
        names=names, spare=np.zeros(100, int), ids=torch.arange(100)[:, None, None], labels={"t": torch.arange(100)},
        tokens=SimpleNamespace(length=np.ones(100, int), start=np.arange(100), shard=np.zeros(100, int)),
    )  # fmt: skip
    seen = []

    def learn_at(rate, sets):
        seen.append([part.names for part in sets])
        for part in sets:  # all that belongs to a clip goes with it
            numbers = [int(name) for name in part.names]
            assert numbers == part.ids[:, 0, 0].tolist() == part.labels["t"].tolist() == part.tokens.start.tolist()
        return {"a": {"top1": rate}, "b": {"top1": -rate}}

    assert tables.pick_rates([0.1, 0.2, 0.3], split, learn_at) == {"a": 0.3, "b": 0.1}
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]
    learned, held_out = seen[0]
    assert sorted(learned + held_out) == sorted(names) and not set(learned) & set(held_out)
    assert 10 <= len(held_out) <= 30


def test_intervals():
    """Of paired clips: the mean of the differences, and 1.96 of its standard errors by the counts (McNemar)."""
    of = lambda right: [{"right": right, "top1": right.count("1") / len(right)}]
    first, second = of("1" * 60 + "0" * 40), of("1" * 40 + "0" * 30 + "1" * 10 + "0" * 20)
    value, low, high = tables.difference(first, second)
    b, c, n = 20, 10, 100  # the first alone is right, the second alone
    half = 1.96 * 100 * math.sqrt((b + c) / n - ((b - c) / n) ** 2) / math.sqrt(n)
    assert (value, high - value, value - low) == pytest.approx((10, half, half))
    assert tables.difference(first, first) == pytest.approx((0, 0, 0))
    assert tables.figure(first) == pytest.approx([100 * x for x in (0.6, *probe.wilson(0.6, 100))])
    # Of several seeds Student's interval, unless that over the clips is wider, since seeds that agree share the clips.
    apart = [of("1" * n + "0" * (100 - n))[0] for n in (30, 60, 90)]
    assert tables.figure(apart) == (pytest.approx(60), 0, 100)  # 60 - 74 to 60 + 74, cut
    assert tables.figure(3 * first) == pytest.approx(tables.figure(first))
    assert tables.difference(3 * first, 3 * second) == pytest.approx((10, 10 - half, 10 + half))
    assert tables.difference(apart, 3 * first) == pytest.approx((0, -4.303 * 30 / 3**0.5, 4.303 * 30 / 3**0.5))


def test_tables(media, tmp_path, monkeypatch, capsys):
    """Images from files: what is printed is in the JSON; a stop changes nothing; each row is what probe.py gives."""
    pytest.importorskip("matplotlib", reason="draws by matplotlib: pip install -r paper/requirements.txt")
    call(monkeypatch, tables, of_tables(media, tmp_path / "whole"))
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "whole/tables_5_7.json").read_text())
    assert printed.count("--data has no such media") == 2  # Tables 8 and 16 are of videos
    assert not list((tmp_path / "whole/runs").glob("*.pt"))
    for row in report["rows"]:
        if row["layer"] == row["n_layers"] // 2 or "joint" not in row["protocol"]:
            assert tables.show(row["top1"]) in printed and tables.show(row["floor"]) in printed
        assert row["top1"][0] == pytest.approx(100 * row["trained"][0]["right"].count("1") / 40)
    for claim in report["claims"]:
        assert f"{claim['claim']}: {tables.show(claim['points'])} points: {claim['verdict']}" in printed
    assert [claim["claim"].split(",")[0] for claim in report["claims"]] == [
        "Table 5: attention less average", "A.2: full less causal attention"
    ]  # fmt: skip
    assert (tmp_path / "whole/tables_5_7.png").stat().st_size > 10_000

    # probe.py's own accuracies, by its own command.
    rows = {(row["protocol"], row["pool"], row["layer"]): row["trained"][0] for row in report["rows"]}
    frozen = rows["images, frozen", "attention", 2]
    commands = {
        ("images, frozen", "attention", 2): ["--layer", "mid", "--pool", "attention", "--lr", frozen["lr"]],
        ("images, joint", "attention", 3): ["--layer", "3", "--pool", "attention", "--finetune", "joint",
                                            "--resolution", 64, "--rope-base", 100],
        ("images, full attention", "attention", 4): ["--layer", "4", "--pool", "attention", "--finetune", "full",
                                                     "--attention", "full"],
        ("images, causal attention", "attention", 4): ["--layer", "4", "--pool", "attention", "--finetune", "full"],
    }  # fmt: skip
    same = ["--checkpoint", media / "toto.pt", "--data", media / "task", "--epochs", 1, "--batch", 8]
    for i, (key, words) in enumerate(commands.items()):
        out = tmp_path / f"probe{i}"
        words = [*same, "--out", out, *words] + ([] if "--lr" in words else ["--lr", 0.002])
        call(monkeypatch, probe, words)
        (theirs,) = json.loads((out / "probe.json").read_text())["accuracy"]
        assert theirs["top1"] == pytest.approx(rows[key]["top1"], abs=1e-9), key

    made = stop_at(monkeypatch, probe, "make_optimizer", ())
    call(monkeypatch, tables, of_tables(media, tmp_path / "whole"))
    assert not made  # all is kept
    steps = stop_at(monkeypatch, torch.nn.functional, "cross_entropy", (7, 70))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            call(monkeypatch, tables, of_tables(media, tmp_path / "stopped"))
    call(monkeypatch, tables, of_tables(media, tmp_path / "stopped"))
    assert steps and json.loads((tmp_path / "stopped/tables_5_7.json").read_text()) == report


def test_several_checkpoints(media, tmp_path, monkeypatch, capsys):
    """A row for each; the larger less the smaller, clip by clip."""
    pytest.importorskip("matplotlib", reason="draws by matplotlib: pip install -r paper/requirements.txt")
    checkpoint = toto.load_checkpoint(media / "toto.pt")
    config = replace(checkpoint["config"], n_layers=2)
    small = toto.Toto(config)
    (tmp_path / "small").mkdir()
    dvae.save_trained(small, dvae.load(media / "dvae.pt"), checkpoint, 32, tmp_path / "small/toto.pt")
    words = of_tables(media, tmp_path / "out", "--tables", "14")
    words[2:2] = [tmp_path / "small/toto.pt"]
    call(monkeypatch, tables, words)
    report = json.loads((tmp_path / "out/tables_5_7.json").read_text())
    rows = [row for row in report["rows"] if row["pool"] == "average"]
    assert [row["layer"] for row in rows] == [2, 1] and rows[0]["parameters"] > rows[1]["parameters"]
    (claim,) = [claim for claim in report["claims"] if "average" in claim["claim"]]
    assert claim["points"][0] == pytest.approx(rows[0]["top1"][0] - rows[1]["top1"][0])
    assert "larger is better" in capsys.readouterr().out


def test_the_world(media, tmp_path, monkeypatch):
    """Without --data: the world's images and clips, a few of each; Table 16's head is learned beside Table 8's."""
    pytest.importorskip("matplotlib", reason="draws by matplotlib: pip install -r paper/requirements.txt")
    monkeypatch.setattr(probe, "IMAGE_INDICES", {"train": range(60), "val": range(100, 140)})
    monkeypatch.setattr(probe, "WORLD_TRAIN", range(60))
    monkeypatch.setattr(probe, "WORLD_VAL", range(100, 140))
    words = ["--checkpoint", media / "toto.pt", "--out", tmp_path, "--epochs", 1, "--seeds", 2]
    call(monkeypatch, tables, [*words, "--tables", "8", "16", "14"])
    rows = json.loads((tmp_path / "tables_5_7.json").read_text())["rows"]
    found = {(row["protocol"], row["task"], row["pool"], row["layer"]) for row in rows}
    heads = [(task, pool) for task in ("shape", "motion") for pool in ("attention", "attention-mlp")]
    joint = {("videos, joint", *head, l) for head in heads for l in range(5)}
    assert found == joint | {("images, frozen", "shape", p, 2) for p in ("average", "attention")}
    assert {len(row["trained"]) for row in rows} == {2}


def test_bad_input(media, tmp_path, monkeypatch):
    """Each with a word on what to do; at the command line one of them is one line."""
    pytest.importorskip("matplotlib", reason="draws by matplotlib: pip install -r paper/requirements.txt")
    model = ("--checkpoint", media / "toto.pt", "--out", tmp_path / "out")
    for words, expected in {
        ("--checkpoint", tmp_path / "no.pt"): "no.pt: no such file; train.py makes one",
        (*model, "--data", tmp_path): "no such folder; --data needs train/<class>/*",
        (*model, "--data", media / "task", "--tables", "16"): "no table of 16",
    }.items():
        with pytest.raises(ValueError, match=expected):
            call(monkeypatch, tables, words)
    error = run(["paper/tables_5_7.py", "--views", "10x3"], status=2).stderr
    assert error == "error: --views: a clip of the built-in world is one view; give --data\n"
