"""paper/table12_permanence.py: the stand-in's drawings and figures, CATER's layout, the metrics, and the program."""

import json
import math
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
import dvae
import probe
import toto
import train
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "paper"))  # its scripts are no package
import table12_permanence as table12


# The stand-in.
def test_cells():
    """CATER's formula, at the check values and at all borders."""
    assert table12.cell_of(0.5, -2.3) == 3 and table12.cell_of(-3, 2.99) == 30
    assert table12.cell_of(-3, -3) == 0 and table12.cell_of(2.99, 2.99) == 35
    assert table12.cell_of(-0.01, -0.01) == 14 and table12.cell_of(0, 0) == 21


def test_a_clip_is_its_index():
    one, two, other = (table12.cups_clip(index) for index in (7, 7, 8))
    assert np.array_equal(one.frames, two.frames) and not np.array_equal(one.frames, other.frames)
    assert one.frames.shape == (32, 48, 48, 3) and one.frames.dtype == np.uint8
    assert table12.cups_clip(7, resolution=64).frames.shape == (32, 64, 64, 3)
    # 16 frames are every second one of 32, the last among them; so are those of labelled()'s sequences.
    assert np.array_equal(table12.cups_clip(7, 16).frames, one.frames[1::2])


def test_the_label_is_where_the_snitch_ends():
    for index in range(50):
        clip = table12.cups_clip(index)
        x, y, height = clip.positions[-1, 0]
        assert clip.cell == 6 * math.floor(y + 3) + math.floor(x + 3) and height == 0
        assert 5 <= len(clip.kinds) <= 10 and clip.kinds.count(table12.SNITCH) == 1
        assert {table12.SMALL, table12.LARGE} <= set(clip.kinds)


def test_calibration():
    """The shares in 400 clips of another simulation of such rules, within three standard errors of theirs and ours."""
    rows, cells = [], []
    for index, item in enumerate(sum(table12.stand_in_shards(range(480), 48), [])):
        labels, _ = item.read()
        clip = table12.cups_clip(index, n_frames=1)  # its last moment alone
        assert item.name.endswith(f"{index:07d}") and clip.cell == labels["cell"]
        rows.append([clip.contained[0], labels["last of 32"] == clip.cell, labels["first"] == clip.cell])
        cells.append(clip.cell)
    contained, last, first = np.array(rows, dtype=bool).T
    of = {"contained": (contained, 0.34), "last seen": (last, 0.815), "first": (first, 0.075)}
    of |= {"last seen, contained": (last[contained], 0.456)}
    for name, (values, theirs) in of.items():
        n_theirs = 400 * (0.34 if "," in name else 1)
        error = math.sqrt(theirs * (1 - theirs) * (1 / len(values) + 1 / n_theirs))
        assert abs(values.mean() - theirs) < 3 * error, (name, values.mean())
    assert last[~contained].mean() > 0.95  # theirs: as good as all
    most = np.bincount(cells).max() / len(cells)
    assert abs(most - 0.045) < 3 * math.sqrt(0.045 * 0.955 * (1 / 400 + 1 / len(cells)))


def redraw(clip, f, left_out):
    """Frame f of a clip anew, from its positions alone and without some objects; containment is not known here."""
    image = Image.fromarray(data.world_ground(48).round().astype(np.uint8))
    order = sorted(range(len(clip.kinds)), key=lambda i: (round(clip.positions[f, i, 1], 6), clip.kinds[i] in (1, 2)))
    for i in order:
        if i not in left_out:
            table12.paint(ImageDraw.Draw(image), 48, clip.kinds[i], clip.positions[f, i])
    return np.asarray(image)


def gold(frame):
    return int((frame == (255, 220, 0)).all(axis=-1).sum())


def test_visibility():
    """The snitch is visible where taking it away changes the picture, and hidden by what stands or is put before it."""
    n_occluded, n_partly = 0, 0
    for index in range(60):
        clip = table12.cups_clip(index)
        for f in range(0, 32, 3):
            whole = gold(redraw(clip, f, range(1, len(clip.kinds))))  # the snitch alone
            # It fits into the picture, unless it is carried along the last row, a cell above which the picture ends.
            assert whole > 0 or clip.positions[f, 0, 1] == -2.5 and clip.positions[f, 0, 2] == 1
            assert gold(clip.frames[f]) <= whole
            assert clip.visible[f] == (gold(clip.frames[f]) > 0)
            if clip.contained[f]:
                assert not clip.visible[f]
                continue
            n_occluded += not clip.visible[f]
            n_partly += 0 < gold(clip.frames[f]) < whole
            # What lies behind it cannot hide it: only objects further in front, or cones at the same depth, matter.
            y = clip.positions[f, :, 1]
            behind = [i for i in range(1, len(y)) if y[i] < y[0] - 1e-6]
            if not clip.visible[f]:
                assert gold(redraw(clip, f, behind)) == 0
    assert n_occluded > 10 and n_partly > 5


def test_what_is_contained_goes_along():
    """A contained snitch is where its cone is, at every moment, and some of them move."""
    n_moved = 0
    for index in range(80):
        clip = table12.cups_clip(index)
        cones = [i for i, kind in enumerate(clip.kinds) if kind in (table12.SMALL, table12.LARGE)]
        covered = np.flatnonzero(clip.contained)
        assert not clip.visible[covered].any()
        for f in covered:
            gaps = abs(clip.positions[f, cones] - clip.positions[f, 0]).max(axis=1)
            assert gaps.min() < 1e-9, (index, f)
        for f in covered[:-1]:
            if f + 1 in covered:
                n_moved += not np.allclose(clip.positions[f, 0], clip.positions[f + 1, 0])
    assert n_moved > 20


def test_objects_go_from_cell_to_cell():
    """Finely sampled, nothing goes further than to a neighbour, and at most two objects, with their contents, move."""
    for index in range(20):
        clip = table12.cups_clip(index, n_frames=200)  # twenty frames a slot
        step = np.diff(clip.positions, axis=0)
        assert abs(step).max() <= 1
        for slot in range(10):
            moved = step[20 * slot : 20 * slot + 19]
            paths = {tuple(path.ravel()) for path in moved.transpose(1, 0, 2) if abs(path).max() > 0}
            assert len(paths) <= 2, (index, slot)


# What is measured.
class Val(SimpleNamespace):
    def __len__(self):
        return len(self.labels["cell"])


def test_scores_by_hand():
    """Four clips: right at once, fifth, not among five, right; two end visible and two hidden."""
    labels = {"cell": [0, 35, 14, 21], "visible": [True, True, False, False], "last of 16": [0, 35, 14, 3]}
    ranked = np.array([[0, 1, 2, 3, 4], [28, 1, 2, 3, 35], [35, 1, 2, 3, 4], [21, 5, 6, 7, 8]])
    val = Val(labels=labels)
    found = table12.scores(ranked, val)
    assert {name: row["n"] for name, row in found.items()} == {"all": 4, "visible": 2, "hidden": 2}
    values = {name: (row["top1"][0], row["top5"][0], row["manhattan"][0]) for name, row in found.items()}
    # 28 is one row above and one column left of 35; 35 is three rows below and three columns right of 14.
    assert values == {"all": (0.5, 0.75, 2.0), "visible": (0.5, 1.0, 1.0), "hidden": (0.5, 0.5, 3.0)}
    assert found["all"]["top1"][1:] == list(probe.wilson(0.5, 4))
    low = 2 - 1.96 * np.std([0, 2, 6, 0]) / 2
    assert found["all"]["manhattan"][1] == pytest.approx(low)
    # Of the hidden ones the last seen cell is right in the first, the model in the second: no gain on the whole.
    gain, low, high = table12.permanence(ranked, val, 16)
    assert gain == 0 and high == -low == pytest.approx(1.96 / math.sqrt(2))


def test_a_single_guess():
    """A floor has no top-5; a snitch that was never seen is guessed wrong and has no distance."""
    found = table12.scores(np.array([[5], [-1], [7]]), Val(labels={"cell": [5, 6, 7]}))
    assert list(found) == ["all"] and found["all"]["top1"][0] == pytest.approx(2 / 3)
    assert "top5" not in found["all"] and found["all"]["manhattan"] == [0, 0, 0]
    assert table12.permanence(np.zeros((1, 5)), Val(labels={"cell": [0]}), 16) is None


def test_floors():
    labels = {"cell": [1, 2, 2], "first": [1, 0, 2], "visible": [True, False, True]}
    labels |= {"last of 16": [1, 2, 0], "last of 32": [1, 1, 1]}
    sets = {"train": Val(labels={"cell": [2, 2, 9]}), "val": Val(labels=labels)}
    top1 = {n: {k: r["all"]["top1"][0] for k, r in table12.floors(sets, n).items()} for n in (16, 32)}
    third = pytest.approx(1 / 3)
    same = {"most frequent cell": 2 * third.expected, "first frame's cell": 2 * third.expected}
    assert top1[16] == pytest.approx(same | {"last visible cell": 2 / 3, "ceiling: the true state": 1})
    assert top1[32] == pytest.approx(same | {"last visible cell": 1 / 3, "ceiling: the true state": 1})


def test_the_verdict_follows_the_interval():
    words = [table12.verdict("16", 2 * [[gain, gain - 0.1, gain + 0.1]]) for gain in (0.2, 0.05, -0.2)]
    assert words[0].endswith(": permanence") and words[1].endswith(": cannot tell")
    assert "no permanence" in words[2]
    assert "cannot tell" in table12.verdict("16", [[0.2, 0.1, 0.3], [-0.1, -0.2, 0.0]])  # seeds differ more than clips
    assert "one seed" in table12.verdict("16", [[0.2, 0.1, 0.3]])


def test_several_runs_are_summed_up():
    """The interval over seeds is the wider one for "all", that over the clips for "hidden"; shares end at 0 and 1."""
    runs = [{"all": {"n": 4, "top1": [x, x - 0.1, x + 0.1], "manhattan": [2.0, -1.0, 3.0]}} for x in (0.5, 0.9)]
    for run in runs:
        run |= {"visible": {"n": 0}, "hidden": {"n": 4, "top1": [0.25, 0.05, 0.7]}}
    found = table12.summary(runs)
    assert found["all"]["top1"] == pytest.approx([0.7, 0, 1]) and list(found) == ["all", "hidden"]  # 0.7 +- 12.7 * 0.2
    assert found["hidden"]["top1"] == pytest.approx([0.25, 0.05, 0.7]) and found["all"]["manhattan"] == [2, 0, 3]
    others = [{"all": {"n": 4, "top1": [x, 0, 1]}} for x in (0.4, 0.6)]
    assert table12.lead(runs, others, "all") == pytest.approx((0.2, 0.2 - 12.706 * 0.1, 0.2 + 12.706 * 0.1), rel=1e-3)
    assert table12.lead(runs[:1], others[:1], "all") is None and table12.lead(runs, runs, "visible") is None


def test_rope_base():
    """§4.2's 50,000 at 32 frames; tiny, whose base is 20, gets the same factor."""
    assert table12.rope_base(toto.SIZES["tiny"], 16) == 20 and table12.rope_base(toto.SIZES["tiny"], 32) == 100
    assert table12.rope_base(toto.SIZES["large"], 16) == 10_000 and table12.rope_base(toto.SIZES["large"], 32) == 50_000


# CATER's layout.
@pytest.fixture(scope="module")
def cater(tmp_path_factory):
    """14 videos of 40 frames, whose brightness is the number of the frame, in CATER's folders."""
    folder = tmp_path_factory.mktemp("cater")
    (folder / "videos").mkdir()
    (folder / "lists/localize").mkdir(parents=True)
    for i in range(14):
        frames = np.stack([np.full((48, 64, 3), 6 * f, dtype=np.uint8) for f in range(40)])
        iio.imwrite(folder / f"videos/CATER_new_{i:06d}.avi", frames, fps=24, codec="libx264", quality=10)
    lines = [f"CATER_new_{i:06d}.avi {(5 * i) % 36}\n" for i in range(14)]
    (folder / "lists/localize/train.txt").write_text("".join(lines[:9]))
    (folder / "lists/localize/val.txt").write_text("".join(lines[9:]))
    return folder


def test_frames_are_spread_over_the_video():
    assert table12.spread(range(300), 32)[:3] == [8, 17, 27] and table12.spread(range(300), 32)[-1] == 299
    for n in (1, 20, 32, 299, 300, 301):
        of_32 = table12.spread(range(n), 32)
        assert len(of_32) == 32 and of_32[-1] == n - 1 and of_32 == sorted(of_32)
        assert of_32[1::2] == table12.spread(range(n), 16)


def test_cater_is_read(cater):
    """Names, cells, and frames squashed from 4:3, the last one of the video at the end."""
    (items,) = table12.cater_shards(cater, "train", 32)
    assert [item.name for item in items][-1] == "CATER_new_000008.avi" and len(items) == 9
    labels, frames = items[8].read()
    frames = np.stack(list(frames))
    assert labels == {"cell": 4} and frames.shape == (32, 32, 32, 3)
    expected = [6 * f for f in table12.spread(range(40), 32)]
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), expected, atol=3)
    assert len(table12.cater_shards(cater, "val", 32)[0]) == 5


def test_squashing_keeps_the_sides(tmp_path):
    """A crop to the middle would cut the coloured bars at the left and right away."""
    frame = np.zeros((48, 64, 3), dtype=np.uint8)
    frame[:, :6], frame[:, -6:] = (250, 0, 0), (0, 0, 250)
    iio.imwrite(tmp_path / "a.avi", np.stack([frame] * 4), fps=24, codec="libx264", quality=10)
    read = next(table12.read_squashed(tmp_path / "a.avi", 32)).astype(int)
    assert read[16, 0, 0] > 150 and read[16, 31, 2] > 150 and read[16, 16].max() < 40


@pytest.mark.parametrize(
    "split, text, message",
    [
        ("train", "CATER_new_000001.avi\n", "train.txt, line 1: 'CATER_new_000001.avi' is not a video's name and a"),
        ("val", "CATER_new_000001.avi 3\nCATER_new_000002.avi x\n", "val.txt, line 2: 'CATER_new_000002.avi x'"),
        ("train", "CATER_new_000001.avi 35\nCATER_new_000002.avi 36\n", "line 2: cell 36 is not one of 0 to 35"),
        ("train", "CATER_new_000001.avi -1\n", "line 1: cell -1 is not one of 0 to 35"),
        ("train", "CATER_new_000001.avi 0\nCATER_new_000099.avi 3\n", "line 2: .*CATER_new_000099.avi does not exist"),
        ("val", "", "names 0 videos; two are needed"),
        ("val", None, "val.txt: no such file; --data needs CATER's videos"),
    ],
)
def test_bad_lists(cater, tmp_path, split, text, message):
    shutil.copytree(cater / "lists", tmp_path / "lists")
    (tmp_path / "videos").symlink_to(cater / "videos")
    path = tmp_path / f"lists/localize/{split}.txt"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=message):
        table12.cater_shards(tmp_path, split, 32)


# The program.
@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, untrained_tokenizer):
    path = tmp_path_factory.mktemp("tokenizer") / "dvae.pt"
    dvae.save(untrained_tokenizer, path)
    return path


def command(tokenizer, out, *extra):
    words = ["--tokenizer", tokenizer, "--out", out, "--resolution", 16, "--batch-tokens", 128, "--steps", 3]
    words += ["--epochs", 1, "--probe-epochs", 1, "--batch", 4, "--device", "cpu", *extra]
    return ["paper/table12_permanence.py", *map(str, words)]


def test_16_frames_are_those_of_32(tokenizer, tmp_path):
    """labelled() keeps the start token and every second frame, the last among them, and all 36 classes."""
    model = dvae.load(tokenizer)
    tokens = data.tokenize_cached("cups", table12.stand_in_shards(range(5), 16), tmp_path, model, 16, 1)
    long, short = (table12.labelled(tokens, n) for n in (32, 16))
    assert long.ids.shape == (5, 1, 1 + 32 * 4) and short.ids.shape == (5, 1, 1 + 16 * 4)
    assert (short.ids[:, 0, 0] == toto.VIDEO_START).all() and not short.is_longer
    assert torch.equal(short.ids[:, 0, 1:].view(5, 16, 4), long.ids[:, 0, 1:].view(5, 32, 4)[:, 1::2])
    assert short.classes == {"cell": list(range(36))} and short.labels["cell"].tolist() == tokens.labels["cell"]


def test_ranks_are_of_the_last_layer(tokenizer):
    """Against the head on the features, clip by clip."""
    torch.manual_seed(0)
    model = toto.Toto(toto.Config(dim=32, n_heads=2, n_layers=2, hidden=64, vocab_size=36)).eval()
    head = probe.AttentionPool(32, 2, 36).eval()
    ids = torch.randint(4, 36, (7, 1, 20))
    split = type("Split", (), {"inputs": lambda self, rows: ids.flatten(0, 1)[rows], "__len__": lambda self: 7})()
    ranked = table12.rank_cells(model, head, split, SimpleNamespace(batch=3), torch.device("cpu"))
    for clip in range(7):
        with torch.no_grad():
            logits = head(model.features(ids[clip], [2])[2][:, 1:])[0]
        assert ranked[clip].tolist() == logits.argsort(descending=True)[:5].tolist()


def test_the_head_reads_the_last_frame_in_order():
    """By hand: a linear map of the last 4 of 12 tokens, normalised; what comes before does not matter, order does."""
    config = toto.Config(dim=8, n_heads=2, n_layers=1, hidden=16)
    torch.manual_seed(0)
    head, x = table12.LastFrameHead(config, 4).eval(), torch.randn(3, 12, 8)
    head.norm.mean.copy_(torch.randn(8))
    head.norm.var.fill_(4.0)
    normed = (x[:, 8:] - head.norm.mean) / math.sqrt(4.0 + 1e-5)
    by_hand = [clip.flatten() @ head.classifier.weight.T + head.classifier.bias for clip in normed]
    torch.testing.assert_close(head(x), torch.stack(by_hand))
    assert torch.equal(head(x), head(torch.cat((torch.randn(3, 8, 8), x[:, 8:]), dim=1)))
    assert not torch.allclose(head(x), head(torch.cat((x[:, :8], x[:, 8:].flip(1)), dim=1)))


def test_from_clips_to_the_table(tokenizer, tmp_path, monkeypatch, capsys):
    """All of it, and stopped in the middle of pre-training and of a fine-tuning: the same figures."""
    pytest.importorskip("matplotlib", reason="draws by matplotlib: pip install -r paper/requirements.txt")
    out = run(command(tokenizer, tmp_path / "one", "--clips", 20, "--seeds", 2)).stdout
    assert "62.8 " in out and "last visible cell" in out and "frames, hidden endings, pre-trained" in out
    assert "pre-training helps, pre-trained less from scratch: " in out

    stops, take_step, features = [], train.take_step, probe.fine_tuned_features

    def stop_once(function, at):
        calls = []

        def called(*inputs):
            calls.append(1)
            if len(calls) == at:
                stops.append(1)
                os.kill(os.getpid(), signal.SIGINT)
            return function(*inputs)

        return called

    monkeypatch.setattr(train, "take_step", stop_once(take_step, 2))
    monkeypatch.setattr(probe, "fine_tuned_features", stop_once(features, 5))  # of three a run, in the second run
    monkeypatch.setattr(sys, "argv", command(tokenizer, tmp_path / "two", "--clips", 20, "--seeds", 2))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            table12.main()
    table12.main()
    assert len(stops) == 2 and not list((tmp_path / "two/runs").glob("*.pt"))
    one, two = (json.loads((tmp_path / name / "table12.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert one["clips"] == [14, 6] and [row["layer"] for row in one["layers"]["permanence"]] == [0, 1, 2, 3, 4]
    assert list(one["rows"]["32"]) == [
        "pre-trained", "from scratch", "most frequent cell", "first frame's cell", "last visible cell",
        "ceiling: the true state",
    ]  # fmt: skip
    assert one["rows"]["32"]["ceiling: the true state"][0]["all"]["top1"][0] == 1
    for name in ("table12.png", "table12.gif"):
        assert (tmp_path / "two" / name).stat().st_size > 5_000
    # The trunk of 32 frames is a checkpoint with its own base.
    checkpoint = dvae.load_trained(tmp_path / "two/finetuned-32-0.pt", None, torch.device("cpu"))[2]
    assert checkpoint["config"].rope_base == 100 and checkpoint["frames"] == 32
    # Each seed has a trunk of its own.
    weight = lambda name: toto.load_checkpoint(tmp_path / "two" / name)["model"]["blocks.0.mlp.out.weight"]
    away = [(weight("finetuned-16-1.pt") - weight(f"toto-{seed}.pt")).norm() for seed in (0, 1)]
    assert 0 < away[1] < away[0] / 2 and len(one["pre-training"]) == 2
    of_both = [run["all"]["top1"][0] for run in one["rows"]["16"]["pre-trained"]]
    assert one["over runs"]["16"]["pre-trained"]["all"]["top1"][0] == pytest.approx(sum(of_both) / 2)
    mean = sum(gain for gain, _, _ in one["permanence"]["16"]) / 2
    assert one["less last visible cell"]["16"][0] == pytest.approx(mean)


def test_cater_with_a_checkpoint(cater, tokenizer, tmp_path, monkeypatch, capsys):
    """A video that cannot be decoded is skipped and named; only "all" is known; a wrong list ends in one line."""
    pytest.importorskip("matplotlib", reason="draws by matplotlib: pip install -r paper/requirements.txt")
    model = toto.Toto(toto.Config(dim=32, n_heads=2, n_layers=1, hidden=64, vocab_size=36))
    checkpoint = {"step": 1, "tokenizer": dvae.load(tokenizer).fingerprint(), "stride": 4, "frames": 16}
    args = SimpleNamespace(resolution=16)
    dvae.save_trained(model, dvae.load(tokenizer), checkpoint, args.resolution, tmp_path / "model/toto.pt")
    shutil.copytree(cater, tmp_path / "cater")
    (tmp_path / "cater/videos/CATER_new_000003.avi").write_bytes(b"no video")
    words = ["--data", tmp_path / "cater", "--checkpoint", tmp_path / "model/toto.pt", "--out", tmp_path / "out"]
    words = ["paper/table12_permanence.py", *map(str, words), "--epochs", "1", "--batch", "4", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    table12.main()
    assert "skipped 1 file(s) that cannot be read: CATER_new_000003.avi" in capsys.readouterr().err
    report = json.loads((tmp_path / "out/table12.json").read_text())
    assert report["clips"] == [8, 5] and report["endings"] == {"all": 5} and report["permanence"]["16"] == []
    assert list(report["rows"]["16"]) == ["pre-trained", "from scratch", "most frequent cell"]
    # A model of another width in the same --out: not even the runs from scratch are taken for its own.
    wider = toto.Toto(toto.Config(dim=48, n_heads=2, n_layers=1, hidden=64, vocab_size=36))
    dvae.save_trained(wider, dvae.load(tokenizer), checkpoint, args.resolution, tmp_path / "wider/toto.pt")
    monkeypatch.setattr(sys, "argv", [word.replace("model/toto.pt", "wider/toto.pt") for word in words])
    with pytest.raises(ValueError, match="from-scratch-32-0.json: its config is .*remove it, or give another --out"):
        table12.main()
    (tmp_path / "cater/lists/localize/val.txt").write_text("CATER_new_000001.avi 36\n")
    failed = run(words, status=2)
    assert failed.stderr.splitlines()[-1].startswith("error: ") and "line 1: cell 36" in failed.stderr
