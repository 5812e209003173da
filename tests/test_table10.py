"""paper/table10_tracking.py: J and F against published values and vos-benchmark, propagation against its definition."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import data
import dvae
import toto
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "paper"))  # its scripts are no package
import table10_tracking as table10
from table10_tracking import DINO, VIDEOWALK

protocols = pytest.mark.parametrize("protocol", [VIDEOWALK, DINO], ids=lambda p: p.name)


def rectangle(size, rows, columns):
    mask = np.zeros(size, dtype=bool)
    mask[rows, columns] = True
    return mask


# J and F
@pytest.mark.parametrize("size, ours, theirs, J, F_", [
    ((480, 854), (slice(100, 300), slice(200, 500)), (slice(108, 308), slice(208, 508)), 0.876877, 0.985),
    ((480, 854), (slice(100, 300), slice(200, 500)), (slice(109, 309), slice(209, 509)), 0.862804, 0.034),
    ((100, 100), (slice(30, 70), slice(30, 70)), (slice(30, 70), slice(32, 72)), 0.904762, 1.0),
    ((100, 100), (slice(30, 70), slice(30, 70)), (slice(30, 70), slice(33, 73)), 0.860465, 0.525),
])  # fmt: skip
def test_values_of_davis2017_evaluation(size, ours, theirs, J, F_):
    """By the challenge's own program; one pixel more or less of tolerance, or of shift, changes F by half."""
    ours, theirs = rectangle(size, *ours), rectangle(size, *theirs)
    assert table10.region_similarity(ours, theirs) == pytest.approx(J, abs=1e-6)
    assert table10.contour_accuracy(ours, theirs) == pytest.approx(F_, abs=5e-4)  # given to three digits
    assert table10.contour_accuracy(theirs, ours) == pytest.approx(F_, abs=5e-4)


def blobs(rng, shape, n_objects):
    """Random masks (frames, H, W) of some objects with holes and touching edges; some frames are empty."""
    noise = torch.from_numpy(rng.normal(size=(shape[0], n_objects + 1, 8, 8))).float()
    masks = F.interpolate(noise, shape[1:], mode="bilinear").argmax(dim=1).numpy().astype(np.uint8)
    masks[-2] = 0
    return masks


def test_vos_benchmark_agrees():
    reason = "pip install --no-deps vos-benchmark==0.1.0 opencv-python-headless scikit-image to compare with it"
    evaluator = pytest.importorskip("vos_benchmark.evaluator", reason=reason)
    rng = np.random.default_rng(0)
    for shape, n_objects in (((7, 90, 130), 3), ((6, 128, 120), 1)):
        truths, masks = blobs(rng, shape, n_objects), blobs(rng, shape, n_objects)
        masks[1], masks[2] = truths[1], 0
        void = rng.random(shape) < 0.02
        for t in range(shape[0]):
            void[t, t : t + 20, 10:40] = True
        unknown = np.where(void, table10.VOID, truths)
        theirs = evaluator.Evaluator()
        for truth, mask, v in zip(truths, masks, void):  # it knows no void: there, neither has an object
            theirs.feed_frame(np.where(v, 0, mask), np.where(v, 0, truth))
        J, F_ = theirs.conclude()
        for label in range(1, n_objects + 1):
            ours = np.mean([table10.j_and_f(m, u, label) for m, u in zip(masks, unknown)], axis=0)
            np.testing.assert_allclose(100 * ours, [J[label], F_[label]], atol=1e-6)
            assert (ours > 0.1).all() and (ours < 0.95).all()


def test_statistics_of_a_sequence():
    """By hand: of 9 frames the quarters begin at the frames 0, 2, 4 and 6, and each has the first one of the next."""
    values = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    found = table10.statistics(values)
    assert found["mean"] == pytest.approx(0.5) and found["recall"] == pytest.approx(4 / 9)
    assert found["decay"] == pytest.approx(0.8 - 0.2)


# Propagation
@protocols
@pytest.mark.parametrize("h, w, tile", [(9, 13, 8), (30, 21, 8), (17, 26, 5), (2, 3, 8)])
def test_tiles_equal_the_definition(protocol, h, w, tile):
    torch.manual_seed(h)
    n = 1 + min(protocol.n_last, 4)
    keys, query = (F.normalize(torch.randn(*shape, 5), dim=-1) for shape in ((n, h, w), (h, w)))
    labels = torch.rand(n, h, w, 3)
    expected = table10.propagate_plainly(query, keys, labels, protocol)
    torch.testing.assert_close(table10.propagate(query, keys, labels, protocol, tile), expected, atol=1e-6, rtol=0)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.n = max([self.n, *(x.untyped_storage().nbytes() // 4 for x in [made] if isinstance(x, torch.Tensor))])
        return made


def test_no_matrix_of_all_similarities():
    keys, labels = torch.rand(5, 40, 40, 2), torch.rand(5, 40, 40, 2)
    of_both = []
    for form in (table10.propagate, table10.propagate_plainly):
        with Largest() as largest:
            form(keys[-1], keys, labels, VIDEOWALK)
        of_both.append(largest.n)
    assert of_both[1] >= 40**4 * 5 and of_both[0] < of_both[1] / 20


@protocols
def test_ties_do_not_depend_on_the_order_of_places(protocol):
    """Few distinct features, as of plain colours: turned by 180 degrees, a frame gets the same labels, turned."""
    torch.manual_seed(0)
    keys, query = (F.one_hot(torch.randint(3, shape), 3).float() for shape in ((4, 20, 24), (20, 24)))
    labels = torch.rand(4, 20, 24, 2)
    soft = table10.propagate(query, keys, labels, protocol)
    turned = table10.propagate(query.flip(0, 1), keys.flip(1, 2), labels.flip(1, 2), protocol)
    torch.testing.assert_close(turned.flip(0, 1), soft, atol=1e-6, rtol=0)


def test_weights_by_hand():
    """The best two of four: 0.9, and one of two that are as good as each other, which share it."""
    similar, protocol = torch.tensor([[0.5, 0.9, 0.2, 0.5]]), replace(VIDEOWALK, top_k=2, temperature=0.2)
    e = np.exp([0.5 / 0.2, 0.9 / 0.2])
    expected = torch.tensor([[e[0] / 2, e[1], 0, e[0] / 2]]) / e.sum()
    torch.testing.assert_close(table10.weigh(similar, protocol), expected.float())


def test_constants_of_both_programs():
    constants = lambda p: (p.n_last, p.top_k, p.temperature, p.reach, p.sees_all_of_first, p.is_padded, p.is_stretched)
    assert constants(VIDEOWALK) == (20, 10, 0.05, 11, True, True, False)  # its radius is 12, exclusive
    assert constants(DINO) == (7, 5, 0.1, 12, False, False, True)
    assert (VIDEOWALK.std[0], DINO.std[0]) == (0.229, 0.228)
    sizes = {(480, 854): (480, 832), (480, 910): (480, 896), (1080, 1920): (480, 832), (854, 480): (832, 480),
             (500, 500): (480, 448)}  # fmt: skip
    for (H, W), size in sizes.items():
        assert table10.short_side_480(np.zeros((H, W, 3))) == size


def test_dino_takes_the_smallest_value_off_each_map():
    """Ground 0.7 to 0.9, object 0.1 to 0.3: stretched from 0 to 1 each, the object has the half where it is greater."""
    share = torch.linspace(0.1, 0.3, 8).repeat(2, 1)
    drawn = table10.draw_labels(torch.stack((1 - share, share), dim=-1), (2, 8), (2, 8), DINO)
    assert (drawn == np.repeat([0, 1], 4)).all()


def test_neighbourhoods():
    """videowalk: nearer than 12 in a straight line; DINO: at most 12 rows and columns away."""
    dy, dx = torch.meshgrid(torch.arange(-20, 21), torch.arange(-20, 21), indexing="ij")
    near = VIDEOWALK.is_near(dy, dx)
    assert (near == (dy.float().hypot(dx.float()) < 12)).all() and near[20, 20 + 11] and not near[20, 20 + 12]
    assert (DINO.is_near(dy, dx) == (torch.maximum(dy.abs(), dx.abs()) <= 12)).all()


@pytest.mark.parametrize("protocol, is_seen", [(VIDEOWALK, True), (DINO, False)])
def test_the_first_frame_from_afar(protocol, is_seen):
    """videowalk compares with all of the first frame, DINO with what is near."""
    features = torch.zeros(1, 40, 2)
    features[..., 0], features[0, 0] = 1, torch.tensor([0.0, 1.0])
    labels = F.one_hot((features[..., 1] > 0).long()).float()
    track = table10.Track(features, labels, replace(protocol, top_k=1))
    assert bool(track.follow(features.flip(1))[0, -1, 1] > 0.5) == is_seen


@protocols
def test_the_context_is_the_first_frame_and_the_last_ones(protocol):
    """Frame t is unlike all but frame `like`: its label comes from there if that is in the context."""
    n, D = protocol.n_last + 5, protocol.n_last + 5
    for t, like in ((n - 1, n - 1 - protocol.n_last), (n - 1, n - 2 - protocol.n_last), (n - 1, 0), (3, 2)):
        track = table10.Track(torch.eye(D)[0].expand(2, 2, D), torch.zeros(2, 2, n), replace(protocol, top_k=1))
        track.labels[..., 0] = 1
        for i in range(1, t):
            track.follow(torch.eye(D)[i].expand(2, 2, D))
            track.labels[1 + (i - 1) % protocol.n_last] = F.one_hot(torch.tensor(i), n).float()  # in place of its own
        soft = track.follow(torch.eye(D)[like].expand(2, 2, D))
        in_context = like == 0 or like >= t - protocol.n_last
        assert bool(soft[0, 0, like] > 0.99) == in_context, (t, like)


def test_padding_with_the_first_frame():
    """Of all context equally good, the second frame is 1 of 21 of videowalk's, and 1 of 2 of DINO's."""
    features, labels = torch.ones(1, 1, 1), torch.tensor([[[0.0, 1.0]]])
    for protocol, expected in ((VIDEOWALK, 20 / 21), (DINO, 1 / 2)):
        track = table10.Track(features, labels, replace(protocol, top_k=100))
        track.follow(features)
        track.labels[1] = torch.tensor([1.0, 0.0])  # had the second frame another label
        assert track.follow(features)[0, 0, 1].item() == pytest.approx(expected)


def test_masks_to_the_grid_and_up_again():
    mask = np.zeros((32, 48), dtype=np.uint8)
    mask[8:24, 16:32], mask[0, 0] = 2, table10.VOID
    labels = table10.place_labels(mask, (4, 6), mode="area")
    assert labels.shape == (4, 6, 3) and labels[1:3, 2:4, 2].eq(1).all() and labels[..., 2].sum() == 4
    assert labels[0, 0].tolist() == [1, 0, 0]
    for protocol in (VIDEOWALK, DINO):
        drawn = table10.draw_labels(labels, (32, 48), (32, 48), protocol)
        assert table10.j_and_f(drawn, mask, 2)[0] > 0.85 and set(np.unique(drawn)) == {0, 2}
    faint = 0.3 * labels
    faint[..., 0] = 1 - faint[..., 2]  # DINO stretches each label's map to 0 … 1
    assert table10.draw_labels(faint, (32, 48), (32, 48), DINO).any()
    assert not table10.draw_labels(faint, (32, 48), (32, 48), VIDEOWALK).any()


def reference(frames, mask, side, protocol, size):
    """The masks of all frames but the first, step by step as the two programs go about it, with whole matrices.

    Written from their text: `videowalk` keeps a list of indices into a sequence that begins with 20 copies of frame 0,
    `dino` a queue. Features are raw patches.
    """
    (H, W), is_dino = size, protocol == "dino"
    h, w = H // side, W // side
    std = [0.228 if is_dino else 0.229, 0.224, 0.225]
    features = []
    for frame in frames:
        x = torch.from_numpy(frame / 255).movedim(-1, 0)[None]
        x = F.interpolate(x, size, mode="bilinear")[0].movedim(0, -1).numpy() - [0.485, 0.456, 0.406]
        x = (x / std).reshape(h, side, w, side, 3).transpose(0, 2, 1, 3, 4).reshape(h * w, -1)
        features.append(x / np.linalg.norm(x, axis=1, keepdims=True))
    y, x = (i.ravel() for i in np.indices((h, w)))
    dy, dx = abs(y[:, None] - y), abs(x[:, None] - x)
    near = (dy <= 12) & (dx <= 12) if is_dino else np.sqrt(dy**2 + dx**2) < 12
    one_hot = [Image.fromarray((mask == label).astype(np.float32)) for label in range(mask.max() + 1)]
    how = Image.Resampling.NEAREST if is_dino else Image.Resampling.BILINEAR
    soft = [np.stack([np.asarray(o.resize((w, h), how)).ravel() for o in one_hot])]  # (O, h·w) of each frame
    made, n_last, top_k, temperature = [], *((7, 5, 0.1) if is_dino else (20, 10, 0.05))
    for t in range(1, len(frames)):
        context = [0] + [i for i in range(t - n_last, t) if i > 0 or not is_dino]
        context = [max(i, 0) for i in context]
        similar = np.stack([features[t] @ features[i].T for i in context], axis=1)  # (h·w, C, h·w)
        similar[:, 0 if is_dino else 1 :] -= 1e10 * ~near[:, None]
        similar = similar.reshape(h * w, -1)
        best = np.argsort(-similar, axis=1)[:, :top_k]
        weights = np.exp(np.take_along_axis(similar, best, 1) / temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        soft.append((np.concatenate([soft[i] for i in context], axis=1)[:, best] * weights).sum(axis=-1))
        maps = torch.from_numpy(soft[-1].reshape(1, -1, h, w))
        up = lambda maps, size: F.interpolate(maps, size, mode="bilinear", align_corners=False)[0].numpy()
        if is_dino:
            maps = up(maps, size)
            for m in maps:
                if m.max() > 0:
                    m -= m.min()
                    m /= m.max()
            maps = Image.fromarray(maps.argmax(axis=0).astype(np.uint8))
            made.append(np.asarray(maps.resize(mask.shape[::-1], Image.Resampling.NEAREST)))
        else:
            made.append(up(maps, mask.shape).argmax(axis=0))
    return made


def moving_squares(n_frames, size=(100, 150), n_objects=2):
    """Noisy squares on noise: frames (H, W, 3) and masks."""
    rng = np.random.default_rng(3)
    ground, frames, masks = rng.integers(60, 130, size=(*size, 3)), [], []
    looks = rng.integers(60, 220, size=(n_objects, 1, 1, 3)) + rng.integers(40, size=(n_objects, 30, 30, 3))
    for t in range(n_frames):
        frame, mask = ground + rng.integers(40, size=(*size, 3)), np.zeros(size, dtype=np.uint8)
        for i, look in enumerate(looks):
            y, x = 10 + t + 25 * i, 15 + (2 - 4 * i) * t + 90 * i
            frame[y : y + 30, x : x + 30], mask[y : y + 30, x : x + 30] = look, i + 1
        frames.append(frame.clip(0, 255).astype(np.uint8))
        masks.append(mask)
    return frames, masks


@protocols
def test_raw_patches_equal_both_programs(protocol):
    frames, masks = moving_squares(24 if protocol is VIDEOWALK else 10)
    see = lambda frame: {"x": table10.patch_features(table10.stretch(frame, (96, 144)), 8, protocol)}
    view = table10.View("8", lambda frame: (96, 144), 8, see)
    ours = [made["x"] for made in table10.follow(frames, masks[0], view, protocol)]
    theirs = reference(frames, masks[0], 8, protocol.name, (96, 144))
    assert np.mean(np.stack(ours) == np.stack(theirs)) > 0.9999  # where two labels are as good, rounding decides
    J = np.mean([table10.j_and_f(m, truth, 1)[0] for m, truth in zip(ours, masks[1:])])
    assert 0.3 < J < 0.97  # it is neither lost nor trivial


# Folders, and the program
@pytest.fixture
def davis(tmp_path):
    """Three sequences as DAVIS-2017 has them, one with two objects, two with values 0 and 255; val.txt names two."""
    root = tmp_path / "davis"
    for name, n_objects in (("one", 1), ("two", 2), ("train", 1)):
        frames, masks = moving_squares(5, n_objects=n_objects)
        for part in ("JPEGImages", "Annotations"):
            (root / part / "480p" / name).mkdir(parents=True)
        for t, (frame, mask) in enumerate(zip(frames, masks)):
            Image.fromarray(frame).save(root / "JPEGImages" / "480p" / name / f"{t:05d}.jpg", quality=95)
            image = Image.fromarray(mask if n_objects > 1 else mask * 255)
            if n_objects > 1:
                image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])  # the file has indices, the colours are for the eye
            image.save(root / "Annotations" / "480p" / name / f"{t:05d}.png")
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("one\ntwo\n")
    return root


def test_davis_is_read_as_it_was_written(davis):
    one, two = table10.davis_sequences(davis)
    assert (one.name, two.name, two.n_frames) == ("one", "two", 5)
    for sequence, n_objects in ((one, 1), (two, 2)):
        frames, masks = sequence.read()
        expected = moving_squares(5, n_objects=n_objects)
        assert all((mask == truth).all() for mask, truth in zip(masks, expected[1]))
        assert all(np.abs(f - e.astype(int)).mean() < 30 for f, e in zip(frames, expected[0]))
    (single,) = table10.davis_sequences(davis / "JPEGImages" / "480p" / "train")  # not in val.txt
    assert single.name == "train" and set(np.unique(single.read()[1])) == {0, 1}


def spoil(davis, how):
    folder = davis / "Annotations" / "480p" / "two"
    if how == "size":
        Image.open(folder / "00002.png").resize((30, 20)).save(folder / "00002.png")
    elif how == "first":
        (folder / "00000.png").unlink()
    elif how == "empty":
        Image.fromarray(np.zeros((100, 150), dtype=np.uint8)).save(folder / "00000.png")
    elif how == "colours":
        Image.open(folder / "00003.png").convert("RGB").save(folder / "00003.png")
    elif how == "damaged":
        (davis / "JPEGImages" / "480p" / "two" / "00001.jpg").write_bytes(b"no image")
    elif how == "name":
        (davis / "ImageSets" / "2017" / "val.txt").write_text("one\nthree\n")
    elif how == "frames":
        Image.new("RGB", (90, 60)).save(davis / "JPEGImages" / "480p" / "two" / "00003.jpg")
    elif how == "deep":
        Image.fromarray(np.full((100, 150), 257, dtype=np.uint16)).save(folder / "00001.png")
    elif how == "none":
        (davis / "ImageSets" / "2017" / "val.txt").write_text("\n")
    elif how == "short":
        for t in (2, 3, 4):
            (davis / "JPEGImages" / "480p" / "two" / f"0000{t}.jpg").unlink()


@pytest.mark.parametrize("how, words", [
    ("size", "two/00002.png: is of 30x20 pixels, its frame of 150x100"),
    ("first", "two/00000.png: no such file; tracking starts with a mask"),
    ("empty", "two/00000.png: marks no object"),
    ("colours", "two/00003.png: is of 150x100x3 pixels"),
    ("damaged", "two/00001.jpg"),
    ("name", "480p/three: no folder of frames"),
    ("short", "480p/two: has 2 frames"),
    ("frames", "two/00003.jpg: is of 90x60x3 pixels, the first frame of 150x100x3"),
    ("deep", "two/00001.png: has the number 257"),
    ("none", "val.txt: names no sequence"),
])  # fmt: skip
def test_bad_sequences_are_named(davis, how, words):
    spoil(davis, how)
    with pytest.raises(ValueError) as error:
        for sequence in table10.davis_sequences(davis):
            sequence.read()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_bad_sequences_end_in_one_line(davis, tmp_path):
    spoil(davis, "size")
    arguments = ["paper/table10_tracking.py", "--data", davis, "--patches", "32", "--out", tmp_path / "out"]
    error = run(arguments, status=2).stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert error.startswith("error: ") and "two/00002.png: is of 30x20 pixels" in error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, untrained_tokenizer):
    """A model with random weights, and its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("model")
    config = toto.Config(dim=16, n_heads=2, n_layers=2, hidden=32, vocab_size=toto.FIRST_CODE + 32)
    torch.manual_seed(7)
    model, tokenizer = toto.Toto(config), untrained_tokenizer.fingerprint()
    kept = {"model": model.state_dict(), "optimizer": {}, "step": 1, "config": vars(config), "plan": {}}
    torch.save(kept | {"tokenizer": tokenizer, "resolution": 32, "stride": 4, "frames": 4}, folder / "toto.pt")
    dvae.save(untrained_tokenizer, folder / "dvae.pt")
    return folder / "toto.pt"


def test_features_are_those_of_the_frame_alone(checkpoint, untrained_tokenizer):
    """H_l at the position of a place's own code, [3] before it: by hand, layer by layer."""
    model = toto.load(checkpoint)
    frame = data.world_clip(0, 1, 32).frames[0]
    found = table10.layer_features(model, untrained_tokenizer, frame, [0, 2], torch.device("cpu"))
    codes = untrained_tokenizer.encode(frame[None])[0]
    x = model.embedding(torch.cat((torch.tensor([3]), codes.flatten() + 4)))[None]
    torch.testing.assert_close(found[0], x[0, 1:].view(4, 4, -1))
    torch.testing.assert_close(found[0][1, 2], model.embedding.weight[4 + codes[1, 2]])
    rope = toto.rope_table(torch.arange(17), 8, model.config.rope_base)
    for block in model.blocks:
        x = block(x, rope)
    torch.testing.assert_close(found[2], x[0, 1:].view(4, 4, -1))


def rows_peak(report, view):
    return max(row["J&F"][0] for row in report["rows"] if row["view"] == view and row["name"] == "Toto")


def follow_by_hand(davis, checkpoint, layer, side):
    """J of a layer of the trained model over the three objects of both sequences, without views and tables."""
    device = torch.device("cpu")
    model, tokenizer, _ = dvae.load_trained(checkpoint, None, device)
    J = []
    for sequence in table10.davis_sequences(davis):
        frames, masks = sequence.read()
        seen = [Image.fromarray(frame).resize((side, side), Image.Resampling.BILINEAR) for frame in frames]
        seen = [table10.layer_features(model, tokenizer, np.array(x), [layer], device)[layer] for x in seen]
        first = table10.place_labels(masks[0], seen[0].shape[:2], mode="bilinear", antialias=True)
        track = table10.Track(seen[0], first, VIDEOWALK)
        drawn = [table10.draw_labels(track.follow(x), (100, 150), (side, side), VIDEOWALK) for x in seen[1:]]
        pairs = list(zip(drawn, masks[1:]))[:-1]
        for label in range(1, masks[0].max() + 1):
            J.append(np.mean([table10.region_similarity(m == label, truth == label) for m, truth in pairs]))
    return np.mean(J)


def test_results_are_of_their_settings(davis, checkpoint, tmp_path):
    """In the same --out: another protocol, other RoPE, other masks and a side given twice."""
    arguments = ["paper/table10_tracking.py", "--data", davis / "JPEGImages" / "480p" / "two", "--checkpoint",
                 checkpoint, "--resolution", "64", "64", "--layer", "2", "--out", tmp_path]  # fmt: skip
    def rows(*more):
        run([*arguments, *more])
        report = json.loads((tmp_path / "table10.json").read_text())
        return {row["name"]: row for row in report["rows"]}

    first, dino, rope = rows(), rows("--protocol", "dino"), rows("--rope-base", "2")
    assert first["Toto"]["J"][1] is None  # one sequence has no interval, even where its side is given twice
    assert first[table10.PATCHES]["J"] != dino[table10.PATCHES]["J"]
    assert first["Toto"]["J"] != rope["Toto"]["J"] and first[table10.PATCHES] == rope[table10.PATCHES]
    path = davis / "Annotations" / "480p" / "two" / "00002.png"
    Image.fromarray(np.roll(np.asarray(Image.open(path)), 9, axis=1)).save(path)
    assert rows()[table10.COPY]["J"] != first[table10.COPY]["J"]


def test_a_first_mask_alone_gives_a_picture(davis, checkpoint, tmp_path):
    for t in range(1, 5):
        (davis / "Annotations" / "480p" / "train" / f"0000{t}.png").unlink()
    shown = run(["paper/table10_tracking.py", "--data", davis / "JPEGImages" / "480p" / "train", "--checkpoint",
                 checkpoint, "--resolution", "32", "--out", tmp_path]).stdout  # fmt: skip
    assert "table10.json" not in shown and (tmp_path / "table10.png").exists() and "table10.gif" in shown


def test_benchmark_of_both_forms(capsys):
    table10.benchmark(4, torch.device("cpu"), side=12)
    assert capsys.readouterr().out.count(" s a frame") == 2


def test_tracking_from_end_to_end(davis, checkpoint, tmp_path):
    """All rows of the table; a second call changes nothing, and does not track again what is kept."""
    arguments = ["paper/table10_tracking.py", "--data", davis, "--checkpoint", checkpoint, "--resolution", "64", "128"]
    arguments += ["--out", tmp_path / "out"]
    shown = run(arguments).stdout
    report = json.loads((tmp_path / "out" / "table10.json").read_text())
    rows = {(row["view"], row["name"], row["layer"]): row for row in report["rows"]}
    assert len(rows) == 2 * (3 + 2 * 3) and report["sequences"] == ["one", "two"]
    _, masks = moving_squares(5, n_objects=2)
    of_two = [np.mean([table10.j_and_f(masks[0], truth, o) for truth in masks[1:-1]], axis=0) for o in (1, 2)]
    _, masks = moving_squares(5, n_objects=1)
    of_one = np.mean([table10.j_and_f(masks[0], truth, 1) for truth in masks[1:-1]], axis=0)
    copied = 100 * np.mean([of_one, *of_two], axis=0)  # over objects, not over sequences
    for view in ("64", "128"):
        row = rows[view, table10.COPY, None]
        np.testing.assert_allclose([row["J"][0], row["F"][0], row["J&F"][0]], [*copied, copied.mean()])
        assert row["J"][0] < rows[view, table10.CEILING, None]["J"][0] <= 100
    gain = rows_peak(report, "128") - rows_peak(report, "64")
    assert f"Toto, peak: J&F at 128 less that at 64 pixels: {gain:.1f} (" in shown and "paper: Toto-large" in shown
    ours = follow_by_hand(davis, checkpoint, 1, 64)
    assert rows["64", "Toto", 1]["J"][0] == pytest.approx(100 * ours)
    assert rows["64", "untrained", 1]["J"][0] != pytest.approx(100 * ours)
    less = rows_peak(report, "64") - rows["64", table10.PATCHES, None]["J&F"][0]
    (line,) = [line for line in shown.splitlines() if line.startswith("64: peak, Toto")]
    assert f" {less:.1f} (" in line and line.rstrip().endswith(")")
    assert all((tmp_path / "out" / f"table10.{kind}").stat().st_size > 2000 for kind in ("png", "gif"))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}
    assert len(kept) == 4
    next(iter(kept)).unlink()  # as if it had been stopped before that one
    assert run(arguments).stdout == shown
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}
    assert set(after) == set(kept) and sum(after[path] != kept[path] for path in kept) == 1


def test_the_world_is_tracked(checkpoint, tmp_path):
    """Floors and ceiling stand in order; one colour makes raw patches worse, which is what the stand-in is for."""
    run(["paper/table10_tracking.py", "--checkpoint", checkpoint, "--clips", "2", "--resolution", "128", "--layer", "1",
         "--out", tmp_path])  # fmt: skip
    rows = {row["name"]: row["J&F"][0] for row in json.loads((tmp_path / "table10.json").read_text())["rows"]}
    assert rows[table10.COPY] < 40 < rows[table10.COLOURED] < rows[table10.CEILING]
    assert rows[table10.PATCHES] < rows[table10.COLOURED] - 15


def test_intervals_are_of_sequences():
    """Ten sequences of one object each: as wide as of the mean of ten numbers; a constant difference has no width."""
    values = np.random.default_rng(1).random(10)
    rows = [[{"J": {"mean": v}, "F": {"mean": v / 2}}] for v in values]
    mean, low, high = table10.over_objects(rows)[1]
    assert mean == pytest.approx(100 * values.mean())
    assert (high - low) / 2 == pytest.approx(196 * values.std() / np.sqrt(10), rel=0.1)
    more = [[{"J": {"mean": v + 0.1}, "F": {"mean": v / 2 + 0.1}}] for v in values]
    np.testing.assert_allclose(table10.over_objects(more, rows), 10)
