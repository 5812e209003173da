"""paper/figure6_robots.py: the built-in task, simulators in processes, what a policy sees and learns, the program."""

import json
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import dvae
import probe
import toto
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "paper"))  # its scripts are no package
import figure6_robots as figure6


class Here:
    """Simulators in this process, one order at a time: what `figure6.Simulators` must be equal to."""

    def __init__(self, resolution):
        self.resolution, self.tasks, self.answers = resolution, {}, []

    def send(self, orders, renders=True):
        answers = {}
        for slot, order in orders.items():
            if isinstance(order, tuple):
                self.tasks[slot] = figure6.make_task(order[0], self.resolution)
                self.tasks[slot].reset(order[1])
            success = not isinstance(order, tuple) and self.tasks[slot].step(order)
            t = self.tasks[slot]
            frame = t.render() if renders else None
            answers[slot] = figure6.Seen(frame, t.state(), t.proprioception(), t.expert(), success)
        self.answers.append(answers)

    def receive(self, slots):
        answers = self.answers.pop(0)
        assert sorted(answers) == sorted(slots)
        return answers

    def close(self):
        pass


# The built-in task.
def play_through(task, seed, choose, n_steps=50):
    """-> (whether the aim is reached after each step, the task's frames)."""
    task.reset(seed)
    reached, frames = [], [task.render()]
    for _ in range(n_steps):
        reached.append(task.step(choose(task)))
        frames.append(task.render())
    return reached, frames


def test_the_expert_succeeds_and_stays():
    """20 of 20, within the horizon, for every aim; after 20 random steps too."""
    rng = np.random.default_rng(0)
    for aim in figure6.Carry.shapes:
        task = figure6.Carry(64, aim)
        for seed in range(20):
            reached, _ = play_through(task, seed, lambda task: task.expert())
            first = reached.index(True)
            assert first + figure6.HELD <= 25 and all(reached[first:])
            play_through(task, seed, lambda task: rng.uniform(-1, 1, 3), 20)
            last = [task.step(task.expert()) for _ in range(figure6.HORIZON["carry"])]
            assert all(last[-figure6.HELD :])


def test_carrying_is_what_counts():
    task = figure6.Carry(64)
    # Random moves hardly ever do it, and to put the wrong shape on the tray never counts.
    rng = np.random.default_rng(0)
    lucky = sum(any(play_through(task, seed, lambda task: rng.uniform(-1, 1, 3))[0]) for seed in range(40))
    assert lucky <= 4
    task.reset(3)
    tray = task.tray
    task.hand, task.held, task.is_closed = task.cells[1][0].copy(), 1, True
    for _ in range(8):
        down, across = np.sign(tray - task.hand)
        assert not task.step(np.array([across, down, 1]))
    assert (task.cells[1] == tray).all(axis=1).any() and task.cells[1].min() >= 0 and task.cells[1].max() <= 7
    # It is caught only in the moment of closing: a closed hand that comes along catches nothing.
    task.reset(3)
    task.hand, task.is_closed, before = task.cells[0][1].copy(), True, task.cells[0].copy()
    task.step(np.array([1, 0, 1]))
    assert task.held is None and (task.cells[0] == before).all()
    # Steps are whole cells, along each axis at most one, and nothing leaves the board.
    task.hand = np.array([7, 0])
    task.step(np.array([-0.9, 3.0, -1]))
    assert task.hand.tolist() == [7, 0]
    task.step(np.array([0.6, -0.15, -1]))
    assert task.hand.tolist() == [7, 1]
    # A hand beside a shape catches it, one that is two cells away does not.
    for seed in range(20):
        for gap in (1, 2):
            task.reset(seed)
            task.hand = task.cells[0][0] - (gap, 0)  # above its first row, and the two shapes are never that near
            if gap < abs(task.cells[1] - task.hand).max(axis=1).min():
                task.step(np.array([0, 0, 1]))
                assert task.held == (0 if gap == 1 else None)


def test_a_frame_shows_the_state():
    """Colours counted in the picture: four cells of each shape, one of the tray, and where all of them are."""
    task = figure6.Carry(64)
    for seed in range(20):
        task.reset(seed)
        task.hand = np.array([1, 0])  # over nothing
        frame, again = task.render(), task.render()
        assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8 and np.array_equal(frame, again)
        for cells, colour in zip(task.cells, task.colours):
            rows, columns = np.nonzero((frame == colour).all(axis=2))
            assert {(r // 8, c // 8) for r, c in zip(rows, columns)} == set(map(tuple, cells)) and len(rows) == 256
        rows, columns = np.nonzero((frame == 255).all(axis=2))
        assert len(rows) == 64 and (rows[0] // 8, columns[0] // 8) == tuple(task.tray)
        assert (frame == 0).all(axis=2).sum() == 64 - 16  # a ring two pixels thick
        state, body = task.state(), task.proprioception()
        assert np.allclose(state[:3], body) and np.allclose(8 * state[3:5], task.cells[0][1])
        shapes = {name: {tuple(cell) for cell in cells} for name, cells in task.shapes.items()}
        names = [[name for name in shapes if shapes[name] == {tuple(c) for c in cells - cells.min(axis=0)}]
                 for cells in task.cells]
        assert names[0] == ["T"] and names[1] in (["I"], ["L"], ["S"])
        assert task.colours[0] == data.COLOURS[0] != task.colours[1]
    one, two = figure6.Carry(64), figure6.Carry(64)
    (reached, frames), (reached2, frames2) = (play_through(t, 5, lambda t: t.expert()) for t in (one, two))
    assert reached == reached2 and np.array_equal(frames, frames2)


# Episodes.
def constant(value):
    return lambda x, body, expert, slots: np.full_like(expert, value)


def test_episodes_end_by_success_or_at_the_horizon():
    starts = figure6.starts("carry", "expert", 0, 0, 5)
    assert len({seed for _, seed in starts}) == 5 and starts != figure6.starts("carry", "dagger", 0, 0, 5)
    see = lambda frames, states: torch.as_tensor(frames)
    act = lambda x, body, expert, slots: expert
    episodes = figure6.run_episodes(Here(64), starts, 50, see, True, act)
    for (_, seed), episode in zip(starts, episodes):
        task = figure6.Carry(64)
        reached, frames = play_through(task, seed, lambda task: task.expert())
        n = reached.index(True) + figure6.HELD
        assert episode["success"] and len(episode["x"]) == n
        assert np.array_equal(episode["x"], frames[:n])  # in order, of this very episode
    failed = figure6.run_episodes(Here(64), starts, 9, figure6.StateEye(), False, constant(0.0))
    assert [len(episode["x"]) for episode in failed] == [9] * 5 and not any(e["success"] for e in failed)
    assert torch.equal(failed[0]["x"], failed[0]["state"])


def test_nine_successes_in_a_row_are_none(monkeypatch):
    starts, counts = figure6.starts("carry", "expert", 0, 0, 3), {}

    def step(self, action):
        counts[self] = counts.get(self, 0) + 1
        return counts[self] % 10 > 0

    monkeypatch.setattr(figure6.Carry, "step", step)
    episodes = figure6.run_episodes(Here(64), starts, 40, figure6.StateEye(), False, constant(0.0))
    assert not any(episode["success"] for episode in episodes)


def test_processes_change_nothing():
    """Simulators in processes give what a single one gives here; one that dies or raises ends in one line."""
    starts = figure6.starts("carry", "expert", 1, 0, 6)
    see = lambda frames, states: torch.as_tensor(frames)
    act = lambda x, body, expert, slots: 0.8 * expert
    here = figure6.run_episodes(Here(64), starts, 50, see, True, act)
    there = figure6.Simulators(64)
    try:
        for one, two in zip(here, figure6.run_episodes(there, starts, 50, see, True, act)):
            assert all(torch.equal(one[key], two[key]) for key in ("x", "state", "body", "expert"))
            assert one["success"] == two["success"]
        # One that raises says why, whatever else is under way.
        there.send({0: ("carry", 0)})
        there.send({0: ("carry no-shape", 0)})
        there.receive([0])
        there.send({0: np.zeros(3)})
        with pytest.raises(ValueError, match="the simulator failed .KeyError: 'no-shape'."):
            there.receive([0])
    finally:
        there.close()
    crashing = figure6.Simulators(64)
    try:
        os.kill(crashing.workers[0][0].pid, signal.SIGKILL)
        with pytest.raises(ValueError, match="process ended with status -9; what was gathered is kept"):
            figure6.run_episodes(crashing, starts, 50, see, True, act)
    finally:
        crashing.close()


# What a policy sees.
def test_a_trunk_s_eye_is_the_mean_of_its_tokens(untrained_tokenizer):
    torch.manual_seed(0)
    config = replace(toto.SIZES["tiny"], vocab_size=toto.FIRST_CODE + 32)
    model = toto.Toto(config).eval()
    frames = np.stack([data.world_clip(i, 1, 32).frames[0] for i in range(3)])
    seen = {}
    hook = model.blocks[1].register_forward_hook(lambda block, inputs, output: seen.update(h=output))
    real, given = model.features, {}
    model.features = lambda ids, layers: given.update(ids=ids) or real(ids, layers)
    x = figure6.TrunkEye(model, untrained_tokenizer, 2, torch.device("cpu"))(frames, None)
    hook.remove()
    assert seen["h"].shape == (3, 1 + 16, 128)
    assert torch.allclose(x, seen["h"][:, 1:].mean(dim=1), atol=1e-6)
    codes = torch.stack([untrained_tokenizer.encode(f[None]).flatten() for f in frames])  # §3.4's ids, of a video
    assert torch.equal(given["ids"], torch.cat((torch.ones(3, 1, dtype=torch.long), codes + 4), dim=1))


def test_the_other_eyes():
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    states = np.random.default_rng(0).normal(size=(2, 7)).astype(np.float32)
    x = figure6.PixelEye()(frames, states).reshape(2, 3, 16, 16)
    assert torch.allclose(x[1, 2, 3, 5], torch.tensor(frames[1, 12:16, 20:24, 2].mean() / 255).float(), atol=1e-6)
    assert torch.equal(figure6.StateEye()(None, states), torch.tensor(states))
    assert not figure6.NoEye()(None, states).any() and len(figure6.NoEye()(None, states)) == 2


# The policy.
def test_the_policy_is_mvp_s():
    policy = figure6.Policy(torch.randn(900, 768), torch.randn(900, 8), 4)
    shapes = [tuple(p.shape) for p in policy.parameters() if p.dim() == 2]
    assert shapes == [(128, 768), (128, 8), (256, 256), (128, 256), (64, 128), (4, 64)]
    assert [type(part).__name__ for part in policy.mlp] == ["Linear", "SELU"] * 3 + ["Linear"]
    # By hand, from its weights.
    x, body = torch.randn(2, 768), torch.randn(2, 8)
    h = torch.cat([(x - policy.x_mean) / policy.x_std @ policy.eye.weight.T + policy.eye.bias,
                   (body - policy.body_mean) / policy.body_std @ policy.body.weight.T + policy.body.bias], dim=1)
    for layer in policy.mlp:
        is_linear = isinstance(layer, torch.nn.Linear)
        h = h @ layer.weight.T + layer.bias if is_linear else 1.0507009873554805 * torch.where(
            h > 0, h, 1.6732632423543772 * (h.exp() - 1))
    assert torch.allclose(policy(x, body), h, atol=1e-5)


def episodes_of(n, generator):
    x, body = torch.randn(n, 6, generator=generator), torch.randn(n, 2, generator=generator)
    expert = torch.stack((x[:, 0] * body[:, 0], x[:, 3].sign()), dim=1)
    return [{"x": x[i : i + 50], "body": body[i : i + 50], "expert": expert[i : i + 50]} for i in range(0, n, 50)]


def test_fitting():
    """It learns what a linear policy cannot, from the seed alone, and its inputs' scale does not matter."""
    generator = torch.Generator().manual_seed(0)
    episodes, (unseen,) = episodes_of(2000, generator), episodes_of(50, generator)
    policy, again = (figure6.fit_policy(episodes, 400, seed=3) for _ in range(2))
    error = lambda policy, episode: (policy(episode["x"], episode["body"]) - episode["expert"]).pow(2).mean().item()
    assert error(policy, unseen) < 0.35 * unseen["expert"].var().item()
    assert torch.equal(policy(unseen["x"], unseen["body"]), again(unseen["x"], unseen["body"]))
    for scale in (1000, 1e-3):
        scaled = [episode | {"x": scale * episode["x"] + 5} for episode in episodes]
        assert error(figure6.fit_policy(scaled, 400, seed=3), unseen | {"x": scale * unseen["x"] + 5}) < 0.5
    # What never varied in the lessons, and does later, does not run away with the action.
    still = [e | {"x": torch.cat((e["x"], torch.full_like(e["x"], 7.0)), dim=1)} for e in episodes]
    policy = figure6.fit_policy(still, 100, seed=3)
    assert policy(torch.full((1, 12), 100.0), torch.zeros(1, 2)).abs().max() < 20


# DAgger.
def settings(tmp_path, **changes):
    args = dict(task="carry", resolution=64, episodes=4, wave=2, rounds=2, seeds=1, seed=0, policy_steps=150)
    args |= dict(trajectories=[4], trials=4, folder=Path(tmp_path))
    return SimpleNamespace(**args | changes)


def interrupt(monkeypatch, *stops):
    """Ctrl-C at these calls of run_episodes -> the list of calls."""
    calls, real = [], figure6.run_episodes

    def interrupted(*how, **more):
        calls.append(None)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return real(*how, **more)

    monkeypatch.setattr(figure6, "run_episodes", interrupted)
    return calls


def test_dagger_labels_and_resumes(tmp_path, monkeypatch):
    """The expert labels what the policy does; a run that is stopped twice ends as one that is not."""
    args = settings(tmp_path / "one", seeds=2)
    expert, eye = figure6.expert_episodes(Here(64), args), figure6.StateEye()
    assert len(expert) == 8 and all(episode["success"] for episode in expert)
    expert_of, lessons, real_fit = lambda eye: figure6.look(expert, eye), [], figure6.fit_policy
    monkeypatch.setattr(figure6, "fit_policy", lambda *how: lessons.append(how) or real_fit(*how))
    whole = figure6.dagger(Here(64), "true state", eye, 1, expert_of, args)
    assert np.shape(whole) == (2, 4)
    # Run 1 has the second four of the expert's episodes; round 2 is learned from round 1 as well.
    (first, _, seed), (second, *_) = lessons
    assert seed == 1 and [len(some) for some in (first, second)] == [4, 8]
    assert all(torch.equal(a["state"], b["state"]) for a, b in zip(first, expert[4:], strict=True))
    # Round 1's actions are those of the policy of round 0: they, not the expert's, led from state to state.
    policy, task = real_fit(first, args.policy_steps, 1), figure6.Carry(64)
    task.reset(figure6.starts("carry", "dagger", 1, 0, 2)[1][1])
    for state, body, label in zip(*(second[5][key] for key in ("state", "body", "expert"))):
        assert np.allclose(task.state(), state, atol=1e-6) and np.allclose(task.expert(), label)
        with torch.no_grad():
            task.step(policy(state[None], body[None])[0].numpy())

    args, calls = settings(tmp_path / "two", seeds=2), interrupt(monkeypatch, 2, 5)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            figure6.dagger(Here(64), "true state", eye, 1, expert_of, args)
    assert figure6.dagger(Here(64), "true state", eye, 1, expert_of, args) == whole and len(calls) == 4 + 2
    assert not list(args.folder.glob("*.pt"))  # only the result is kept
    for one, two in zip(second, lessons[-1][0], strict=True):
        assert all(torch.equal(one[key], two[key]) for key in ("x", "state", "expert"))


def test_cloning_learns_from_the_first_trajectories_and_resumes(tmp_path, monkeypatch):
    args = settings(tmp_path, trajectories=[2, 4], trials=5)
    expert, eye = figure6.expert_episodes(Here(64), args), figure6.StateEye()
    expert_of, lessons, real_fit = lambda eye: figure6.look(expert, eye), [], figure6.fit_policy
    monkeypatch.setattr(figure6, "fit_policy", lambda *how: lessons.append(how[0]) or real_fit(*how))
    whole = figure6.clone(Here(64), "true state", eye, 2, expert_of, args)
    assert len(whole) == 5 and [len(lesson) for lesson in lessons] == [2]
    assert torch.equal(lessons[0][1]["x"], expert[1]["state"])
    args, calls = settings(tmp_path / "two", trajectories=[2, 4], trials=5), interrupt(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        figure6.clone(Here(64), "true state", eye, 2, expert_of, args)
    assert figure6.clone(Here(64), "true state", eye, 2, expert_of, args) == whole and len(calls) == 4


def test_episodes_are_no_one_s_twice():
    """Seeds of episodes differ between purposes, seeds and waves: what is tried was never learned from."""
    all_ = [start for what in figure6.PURPOSES for seed in range(3) for wave in range(20)
            for start in figure6.starts("carry", what, seed, wave, 10)]
    assert len(set(all_)) == len(all_) == 3000


def test_dagger_on_the_true_state_learns(tmp_path):
    """Otherwise the learner, not the features, would be measured; and who sees nothing learns nothing."""
    args = settings(tmp_path, episodes=20, wave=10, rounds=3, policy_steps=1200)
    expert = figure6.expert_episodes(Here(64), args)
    expert_of = lambda eye: figure6.look(expert, eye)
    state = figure6.dagger(Here(64), "true state", figure6.StateEye(), 0, expert_of, args)
    args.rounds, args.policy_steps = 1, 600
    nothing = figure6.dagger(Here(64), "nothing", figure6.NoEye(), 0, expert_of, args)
    assert np.mean(state[-1]) >= 0.9 and np.mean(nothing[-1]) <= 0.3


def test_verdict():
    runs = lambda *shares: [[[True] * k + [False] * (10 - k)] for k in shares]
    report = {"dagger": {"Toto": runs(5, 6, 5), "untrained": runs(1, 2, 1), "raw pixels": runs(9, 2, 6)}}
    assert figure6.verdict(report, "untrained").endswith("40.0 (40.0 to 40.0) points: faster")
    assert figure6.verdict(report, "raw pixels").endswith("cannot tell")
    assert figure6.verdict({"dagger": {"Toto": runs(1, 2), "x": runs(8, 9)}}, "x").endswith("points: slower")
    assert figure6.verdict({"dagger": {"Toto": runs(1), "x": runs(8)}}, "x").endswith("-70.0 points: cannot tell")
    assert figure6.curve(report["dagger"]["Toto"]).tolist() == [[50, 60, 50]]
    assert figure6.mean_success(report["dagger"]["Toto"]) == [50, 60, 50]
    assert figure6.trials([True] * 12 + [False] * 4 + [False] * 84) == " 12 of 16    12% (7% to 20%)"


# Pre-training's videos, metaworld, and the program.
def test_play_is_kept_whole(tmp_path):
    """Videos hold the very pixels of the simulator; those that are there are not drawn again."""
    args = SimpleNamespace(task="carry", play=12, wave=4, seed=0)
    figure6.play(Here(64), figure6.PLAYED["carry"], args, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 12 and not any("T" in path.name for path in files)
    assert {path.name.split("-")[1] for path in files} == {"I", "L", "S"}
    frames = np.stack(list(data.read_frames(files[0], 64, 1)))
    task = figure6.Carry(64, "I")
    task.reset(figure6.starts("carry I", "play", 0, 0, 4)[0][1])
    assert len(frames) == 40 and np.array_equal(frames[0], task.render())
    assert set(figure6.HORIZON) & set(sum(figure6.PLAYED.values(), [])) == set()  # other tasks alone
    # Scripts, even with noise, carry the shape away; moves at random seldom do.
    red = [[(frame == data.COLOURS[0]).all(axis=2).nonzero()[0].mean() for frame in data.read_frames(f, 64, 39)]
           for f in files]
    moved = [abs(last - first) > 4 for first, last in red]
    assert sum(moved[i] for i in range(12) if i % 4 < 2) >= 4 >= 2 >= sum(moved[i] for i in range(12) if i % 4 >= 2)
    before = [path.stat().st_mtime_ns for path in files]
    figure6.play(Here(64), figure6.PLAYED["carry"], args, tmp_path)
    assert before == [path.stat().st_mtime_ns for path in files]


@pytest.mark.parametrize("name", ["drawer-open-v3", "pick-place-v3"])
def test_metaworld_s_experts(name):
    """20 of 20 within the horizon, and an episode is a function of its seed."""
    pytest.importorskip("metaworld", reason="is the simulator: pip install -r paper/requirements-robots.txt")
    task, ends = figure6.make_task(name, 64), []
    for seed in range(20):
        task.reset(seed)
        first, in_a_row = task.state(), 0
        for n in range(figure6.HORIZON[name]):
            in_a_row = in_a_row + 1 if task.step(task.expert()) else 0
            if in_a_row == figure6.HELD:
                break
        ends.append(in_a_row == figure6.HELD)
        assert len(task.state()) == 39 and task.state()[-3:].any()  # the goal is among it
    assert all(ends)
    task.reset(19)
    assert np.array_equal(task.state(), first)


@pytest.fixture
def trunk(tmp_path, untrained_tokenizer):
    """A checkpoint with random weights, and its tokenizer beside it."""
    torch.manual_seed(0)
    model = toto.Toto(replace(toto.SIZES["tiny"], vocab_size=toto.FIRST_CODE + 32))
    args = SimpleNamespace(resolution=64)
    checkpoint = {"step": 7, "tokenizer": untrained_tokenizer.fingerprint(), "stride": 2, "frames": 8}
    dvae.save_trained(model, untrained_tokenizer, checkpoint, args.resolution, tmp_path / "trunk/toto.pt")
    return tmp_path / "trunk/toto.pt"


FEW = "--task carry --episodes 2 --wave 2 --rounds 1 --trajectories 2 3 --trials 2 --policy-steps 20 --seeds 2".split()


def test_the_program(trunk, tmp_path, monkeypatch, capsys):
    """A run, a second one that finds everything there, and others that ask for something else."""
    pytest.importorskip("matplotlib", reason="draws by matplotlib: pip install -r paper/requirements.txt")
    monkeypatch.setattr(figure6, "Simulators", lambda resolution, n: Here(resolution))  # those of processes: above
    monkeypatch.setitem(figure6.HORIZON, "carry", 26)  # as long as an expert needs
    monkeypatch.setattr(figure6, "measure_speed", partial(figure6.measure_speed, n_steps=3))
    words = [*FEW, "--checkpoint", str(trunk), "--out", str(tmp_path / "out")]
    start = lambda *more: (monkeypatch.setattr(sys, "argv", ["figure6_robots.py", *words, *more]), figure6.main())
    start()
    folder, printed = tmp_path / "out/carry", capsys.readouterr().out
    report = json.loads((folder / "figure6.json").read_text())
    eyes = ["Toto", "untrained", "raw pixels", "proprioception alone", "true state"]
    assert list(report["dagger"]) == eyes == list(report["cloning"]) and list(report["layers"]) == list("01234")
    assert np.shape(report["dagger"]["Toto"]) == (2, 1, 2) and np.shape(report["cloning"]["Toto"]["3"]) == (2,)
    assert report["expert"] == [4, 4] and report["layer"] == 2
    assert report["layers"]["2"] == report["cloning"]["Toto"]["2"]
    assert "Toto-base (real robot)  240 trajectories: 63 %" in printed and "frames a second" in printed
    assert (folder / "figure6.png").stat().st_size > 5_000 and (folder / "figure6.gif").stat().st_size > 5_000
    first = {path: path.stat().st_mtime_ns for path in folder.glob("*-*.json")}
    start()
    assert first == {path: path.stat().st_mtime_ns for path in folder.glob("*-*.json")} and len(first) == 10 + 10 + 4
    refused = (["--policy-steps", "30"], "is 20, here it is 30"), (["--layer", "1"], "layer is 2, here it is 1")
    for more, message in refused:
        with pytest.raises(ValueError, match=message):
            start(*more)


def test_pre_training_is_asked_for_once(tmp_path, trunk, monkeypatch):
    """What is finished is taken; what was begun otherwise, or with other videos, is refused."""
    args = SimpleNamespace(task="carry", play=12, steps=7, resolution=64, wave=4, seed=0, tokenizer=None)
    asked = []
    monkeypatch.setattr(figure6.train, "train", lambda args, device: asked.append(args))
    monkeypatch.setattr(figure6, "play", lambda *how: asked.append("play"))
    figure6.pre_train(None, args, tmp_path / "my folder", torch.device("cpu"))
    assert asked[0] == "play" and asked[1].data == [str(tmp_path / "my folder/play")] and asked[1].steps == 7
    assert (asked[1].out, asked[1].resolution, asked[1].stride) == (tmp_path / "my folder", 64, 2)
    trunk.rename(tmp_path / "my folder/toto.pt")  # which has 7 steps
    figure6.pre_train(None, args, tmp_path / "my folder", torch.device("cpu"))
    assert len(asked) == 2
    for change in ({"steps": 5}, {"play": 16}, {"resolution": 32}, {"seed": 1}):
        with pytest.raises(ValueError, match="pre-training.json: its"):
            figure6.pre_train(None, SimpleNamespace(**vars(args) | change), tmp_path / "my folder", None)


def test_mistakes_end_in_one_line(monkeypatch):
    for words, message in (
        (["--episodes", "15"], "must be a multiple of --wave"),
        (["--layer", "0,2"], "--layer 0,2: give one"),
        (["--layer", "9"], "this model has layers 0 .the embedding. to 4"),
        (["--task", "carry-L"], "carry-L: "),
    ):
        monkeypatch.setattr(sys, "argv", ["figure6_robots.py", "--task", "carry", *words])
        with pytest.raises(ValueError, match=message):
            figure6.parse_arguments()
    failed = run(["paper/figure6_robots.py", "--task", "carry", "--checkpoint", "nothing.pt"], status=2)
    assert failed.stderr.splitlines()[-1] == "error: nothing.pt: no such file or directory"
