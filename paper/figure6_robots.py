"""Figure 6, Table 11 and the fourth panel of Figure 8 (§4.6, §4.8): robots that act on frozen features.

    python paper/figure6_robots.py                      metaworld's drawer-open-v3, or without metaworld a small task
    python paper/figure6_robots.py --task pick-place-v3
    python paper/figure6_robots.py --task carry         that small task: a hand must carry the right shape to a tray
    python paper/figure6_robots.py --checkpoint FILE    with any trunk that train.py made

The paper's trunk has seen internet video; a laptop's has not. So tokenizer and trunk are first pre-trained here, by
train.py and with no labels or actions, on videos of *other* tasks that are played at random or by a script, and then
frozen. Tokens of a layer, average-pooled, then one linear layer: this is all that a policy sees of a frame (§4.6). It
is learned by DAgger from a scripted expert (Fig. 6) and by behaviour cloning (Table 11, in simulation, since a real
robot does not fit on a laptop). Beside it stand the same policy with an untrained trunk, with pixels, with no eye at
all (the floor) and with the true state of the simulator (the ceiling).

Not in the paper: its baseline, MVP's MAE, is not here; rounds of DAgger stand for its training steps, and a simulator
that pip installs for MVP's, which is no longer distributed.

Writes to --out/TASK: figure6.json, figure6.png and figure6.gif; to --out/metaworld or --out/carry the videos that were
played, dvae.pt and toto.pt. Run again, it resumes where it stopped: episodes run in waves, ten at once, and each wave
is saved.

From top to bottom: the tasks, simulators in processes of their own, what a policy sees, the policy, episodes, DAgger
and behaviour cloning, pre-training, what is compared, the table and its pictures.
Shape letters: n steps of episodes, R pixels a side, P proprioception, S state, A actions, D width.
"""

import contextlib
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # the six scripts lie in the folder above

import data
import dvae
import probe
import toto
import train

PAPER = {"MVP": 75, "Toto-base": 63}  # Table 11: success in 16 trials on a real robot, after 240 trajectories, in %
HELD = 10  # MVP: a success has to last for so many steps
N_TRIALS = 16  # of Table 11; the interval comes from --trials of them


# The tasks. Each has: reset(seed); step(action) -> whether the aim is reached now; expert(), the scripted action,
# float32 (A,); state() (S,); proprioception() (P,), what a robot knows without an eye; render() -> uint8 (R, R, 3). An
# episode is a function of the seed and the actions alone.
class Carry:
    """The built-in task: a hand reaches for the right one of two shapes (the red one), carries it to a tray.

    It is drawn on a board of 8 x 8 cells, a token each (the built-in world has 6 x 6); a small tokenizer keeps it.
    An action is (across, down, close): a step goes to one of the nine nearest cells, and a hand that closes on
    or right beside a shape holds it. The right one has the shape `aim`, and is red: by its shape alone no eye that
    pools finds it (tried: 0 to 30 % in any round, raw pixels 10 %).
    """

    side = 8
    shapes = {name: np.argwhere([[cell == "1" for cell in row] for row in rows]) for name, rows in data.SHAPES.items()}

    def __init__(self, resolution, aim="T"):
        self.resolution, self.aim = resolution, aim

    def reset(self, seed):
        rng = np.random.default_rng(seed)
        names = [self.aim, rng.choice([name for name in self.shapes if name != self.aim])]
        self.colours, self.cells = (data.COLOURS[0], data.COLOURS[rng.integers(1, 3)]), []  # the other is never red
        for name, left in zip(names, rng.permutation([0, 4])):  # each in a half of its own, below the tray's row
            spare = np.array([6, 4]) - self.shapes[name].max(axis=0)
            self.cells.append(self.shapes[name] + (2, left) + rng.integers(0, spare))  # (4, 2): rows and columns
        # No corner: a wall would keep the second row of a shape from it.
        self.tray, self.hand = np.array([0, rng.integers(1, 7)]), rng.integers((1, 0), 8)
        self.is_closed, self.held = False, None

    def step(self, action):
        # A fifth of the way already counts: a policy that is not sure moves, instead of resting for ever.
        moved = (self.hand + np.clip(np.rint(2.5 * action[1::-1]), -1, 1).astype(int)).clip(0, self.side - 1)
        if self.held is not None:
            cells = self.cells[self.held] + moved - self.hand  # the walls hold back what is carried
            self.cells[self.held] = cells - (cells.max(axis=0) - 7).clip(0) - cells.min(axis=0).clip(None, 0)
        closes, self.hand = bool(action[2] > 0), moved
        if closes and not self.is_closed:  # what is caught is what lies there in the moment in which it closes
            self.held = self.in_reach()
        self.is_closed, self.held = closes, self.held if closes else None
        return bool((self.cells[0] == self.tray).all(axis=1).any())

    def in_reach(self):
        """The number of the shape that a hand would catch now: the nearest, up to a neighbour's √2; or None."""
        nearest = [np.linalg.norm(cells - self.hand, axis=1).min() for cells in self.cells]
        return int(np.argmin(nearest)) if min(nearest) < 1.5 else None

    def expert(self):
        nearest = self.cells[0][abs(self.cells[0] - self.tray).max(axis=1).argmin()]
        # To the second cell of the shape, which is inside or at its bend; then with any cell to the tray.
        down, across = np.sign(self.tray - nearest if self.held == 0 else self.cells[0][1] - self.hand)
        closes = self.held == 0 or self.in_reach() == 0 and not self.is_closed
        return np.array([across, down, 1 if closes else -1], dtype=np.float32)

    def state(self):
        places = np.concatenate((self.cells[0][1], self.cells[1][1], self.tray)) / self.side
        return np.array([*self.proprioception(), *places, self.held == 0, self.held == 1], dtype=np.float32)

    def proprioception(self):
        return np.array([*self.hand / self.side, self.is_closed], dtype=np.float32)

    def render(self):
        scale, picture = self.resolution / self.side, data.world_ground(self.resolution).round().astype(np.uint8)
        edges = np.rint(scale * np.arange(self.side + 1)).astype(int)
        thick = max(round(scale / 4), 1)

        def paint(cell, colour, inset=0):
            (top, left), (bottom, right) = edges[cell] + inset, edges[cell + 1] - inset
            picture[top:bottom, left:right] = colour

        paint(self.tray, 255)
        for cells, colour in zip(self.cells, self.colours):
            for cell in cells:
                paint(cell, colour)
        under = picture[tuple(edges[self.hand] + thick)].copy()
        paint(self.hand, 0)
        if not self.is_closed:
            paint(self.hand, under, thick)  # an open hand is a ring
        return picture


class MetaWorld:
    """A task of metaworld 3.1.1: a Sawyer arm in MuJoCo, its scripted expert, a camera that looks at the table."""

    def __init__(self, resolution, name):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        warnings.filterwarnings("ignore", module="metaworld")  # of its experts' actions, which are clipped below
        self.policy = ENV_POLICY_MAP[name]()
        how = {"camera_name": "corner2", "width": resolution, "height": resolution}
        self.simulator = s = ALL_V3_ENVIRONMENTS[name](render_mode="rgb_array", **how)
        # New places in every episode, from the seed; the goal is known to the expert and the true state.
        s._set_task_called, s._partially_observable, s._freeze_rand_vec, s.seeded_rand_vec = True, False, False, True
        s.__dict__.pop("sawyer_observation_space", None)  # bounds that were kept from before the goal was known
        # Not in the paper: the camera is moved to the table. No shadows and no smoothing, which take most of the time.
        camera = s.model.camera("corner2").id
        s.model.cam_pos[camera], s.model.cam_fovy[camera] = (0.75, 0.075, 0.7), 45
        s.model.vis.quality.shadowsize, s.model.vis.quality.offsamples = 0, 0

    def reset(self, seed):
        self.simulator.seed(seed)
        self.seen, _ = self.simulator.reset()

    def step(self, action):
        self.seen, _, _, _, info = self.simulator.step(np.clip(action, -1, 1))
        return bool(info["success"])

    def expert(self):
        return np.clip(self.policy.get_action(self.seen), -1, 1).astype(np.float32)

    def state(self):
        return self.seen.astype(np.float32)  # (39,): hand, fingers and things, now and a step before; the goal

    def proprioception(self):
        return self.seen[[0, 1, 2, 3, 18, 19, 20, 21]].astype(np.float32)  # the hand and its fingers, now and before

    def render(self):
        return np.ascontiguousarray(self.simulator.render()[::-1])  # this camera renders upside down


# Not in the paper: after so many steps an episode has failed. The slowest of 20 experts took 102, 68 and 25.
HORIZON = {"drawer-open-v3": 150, "pick-place-v3": 110, "carry": 50}
# Not in the paper: episodes in a round of DAgger, and trajectories for Table 11. After 20 the drawer was open in 90 to
# 100 % of episodes for the trained and an untrained trunk alike, so it has 10; even so pixels open it in every one.
AMOUNTS = {"metaworld": (10, [5, 10, 40]), "carry": (40, [20, 80, 320])}
# What is played for pre-training: never the tasks themselves.
PLAYED = {
    "carry": [f"carry {name}" for name in data.SHAPES if name != "T"],
    "metaworld": [
        "push-v3", "reach-v3", "door-open-v3", "drawer-close-v3", "button-press-topdown-v3", "window-open-v3",
    ],
}  # fmt: skip


def make_task(name, resolution):
    return Carry(resolution, name[6:] or "T") if name.split()[0] == "carry" else MetaWorld(resolution, name)


# Simulators in processes of their own: they step and draw while this process looks and decides.
def simulate(pipe, resolution):
    """What a process does: orders {slot: (task, seed) or an action} in, what is then seen of each slot out."""
    for number in (signal.SIGINT, signal.SIGTERM):  # these are for the first process, which ends the others
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        os.environ |= {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl"), "LP_NUM_THREADS": "1"}
    running = {}  # {slot: (name, task)}: a simulator is made once for many episodes
    with contextlib.suppress(EOFError, OSError):  # the first process has ended
        while True:
            orders, renders = pipe.recv()
            try:
                answers = [(slot, obey(running, slot, order, resolution, renders)) for slot, order in orders.items()]
            except Exception as error:  # whatever a simulator raises; the first process says it in one line
                answers = f"{type(error).__name__}: {error}".splitlines()[0]
            pipe.send(answers)


def obey(running, slot, order, resolution, renders):
    """Start an episode in a slot, or take a step in it -> Seen."""
    if isinstance(order, tuple):
        name, seed = order
        if running.get(slot, (None,))[0] != name:
            running[slot] = name, make_task(name, resolution)
        running[slot][1].reset(seed)
    success = not isinstance(order, tuple) and running[slot][1].step(order)
    task = running[slot][1]
    frame = task.render() if renders else None
    return Seen(frame, task.state(), task.proprioception(), task.expert(), success)


@dataclass
class Seen:
    """What is known of a simulator after a step."""

    frame: np.ndarray  # uint8 (R, R, 3), or None where nobody looks
    state: np.ndarray  # float32 (S,)
    body: np.ndarray  # float32 (P,)
    expert: np.ndarray  # float32 (A,), what the expert would do now
    success: bool


class Simulators:
    """Up to n processes, as many as there are cores, each with its share of the slots."""

    def __init__(self, resolution, n=5):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        context, self.workers = multiprocessing.get_context("spawn"), []
        ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # they inherit it: Ctrl-C is for this process
        for _ in range(min(n, cores)):
            ours, theirs = context.Pipe()
            process = context.Process(target=simulate, args=(theirs, resolution), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))
        signal.signal(signal.SIGINT, ignored)

    def worker_of(self, slot):
        """Even and odd slots, the halves of a wave, are dealt out in turn; what is over goes to different ones."""
        return (slot // 2 + slot % 2) % len(self.workers)

    def send(self, orders, renders=True):
        """Orders {slot: …} to the processes; the answers to them are fetched by `receive`, in the same order."""
        for i, (_, pipe) in enumerate(self.workers):
            mine = {slot: order for slot, order in orders.items() if self.worker_of(slot) == i}
            with contextlib.suppress(OSError):  # one that has ended: `receive` says so
                if mine:
                    pipe.send((mine, renders))

    def receive(self, slots):
        """{slot: Seen} of the oldest orders that were sent to these slots. A simulator that failed is a ValueError."""
        found = {}
        for i, (process, pipe) in enumerate(self.workers):
            if any(self.worker_of(slot) == i for slot in slots):
                try:
                    answers = pipe.recv()
                except (EOFError, OSError):
                    process.join(timeout=5)
                    words = f"the simulator's process ended with status {process.exitcode}"
                    raise ValueError(f"{words}; what was gathered is kept: run it again") from None
                if isinstance(answers, str):
                    advice = "; to draw without a screen: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri"
                    raise ValueError(f"the simulator failed ({answers}){advice if 'gl' in answers.lower() else ''}")
                found |= dict(answers)
        return found

    def close(self):
        for process, pipe in self.workers:
            pipe.close()
            process.join(timeout=10)
            process.kill()


# What a policy sees. Each eye turns frames uint8 (n, R, R, 3) and states (n, S) into vectors float32 (n, d).
class TrunkEye:
    """§4.6: "only take tokens at an intermediate layer, apply average pooling": the mean of H_l over a frame's tokens.

    Not in the paper: the start token is a video's, which every Toto has seen.
    """

    renders = True

    def __init__(self, model, tokenizer, layer, device):
        self.model, self.tokenizer, self.layer, self.device = model, tokenizer, layer, device

    @torch.no_grad()
    def __call__(self, frames, states):
        codes = self.tokenizer.encode(frames).flatten(1)  # (n, T)
        start = codes.new_full((len(codes), 1), toto.VIDEO_START)
        ids = torch.cat((start, codes + toto.FIRST_CODE), dim=1)
        return self.model.features(ids, [self.layer])[self.layer][:, 1:].float().mean(dim=1).cpu()  # (n, D)


class PixelEye:
    """Not in the paper: the pixels themselves, averaged down to 16 x 16."""

    renders = True

    def __call__(self, frames, states):
        x = torch.as_tensor(frames).permute(0, 3, 1, 2).float() / 255
        return F.adaptive_avg_pool2d(x, 16).flatten(1)  # (n, 768)


class StateEye:
    """The true state of the simulator: what a policy of this kind can reach at all."""

    renders = False

    def __call__(self, frames, states):
        return torch.as_tensor(states)


class NoEye:
    """Nothing: what proprioception alone can reach."""

    renders = False

    def __call__(self, frames, states):
        return torch.zeros(len(states), 1)


# The policy.
class Policy(nn.Module):
    """MVP's head (Xiao et al., 2022): the frozen features and the proprioception each through one linear layer to 128,
    then an MLP of 256, 128 and 64 with SELU, then the action.

    Not in the paper: both inputs are normalised by the mean and the spread of what is learned from, and cut at ±5:
    what never varied there may vary later.
    """

    def __init__(self, x, body, n_actions):
        super().__init__()
        for name, values in (("x", x), ("body", body)):
            self.register_buffer(f"{name}_mean", values.mean(dim=0))
            std = values.std(dim=0)
            self.register_buffer(f"{name}_std", std.clamp(min=1e-3 * std.max() + 1e-12))
        self.eye, self.body = nn.Linear(x.shape[1], 128), nn.Linear(body.shape[1], 128)
        widths = 256, 256, 128, 64
        hidden = [part for pair in zip(widths, widths[1:]) for part in (nn.Linear(*pair), nn.SELU())]
        self.mlp = nn.Sequential(*hidden, nn.Linear(64, n_actions))

    def forward(self, x, body):
        x = ((x - self.x_mean) / self.x_std).clamp(-5, 5)
        body = ((body - self.body_mean) / self.body_std).clamp(-5, 5)
        return self.mlp(torch.cat((self.eye(x), self.body(body)), dim=1))  # (n, A)


def fit_policy(episodes, steps, seed):
    """Behaviour cloning as in MVP: squared error to the expert's action, AdamW at 1e-3, decay .01, batches of 128.

    Not in the paper: a number of steps, of which a tenth is warm-up, then a cosine to zero, instead of 400 epochs.
    """
    x, body, expert = (torch.cat([episode[key] for episode in episodes]) for key in ("x", "body", "expert"))
    torch.manual_seed(seed)
    policy = Policy(x, body, expert.shape[1])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(x), (128,), generator=generator)
        done = (step - steps / 10) / (0.9 * steps)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min((step + 1) / (steps / 10), (1 + math.cos(math.pi * max(done, 0))) / 2)
        F.mse_loss(policy(x[rows], body[rows]), expert[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy.requires_grad_(False).eval()


# Episodes.
def run_episodes(simulators, starts, horizon, see, renders, act, stops=True):
    """Run episodes at once, one for each (task, seed) of `starts` -> [{"x", "state", "body", "expert", "success"}].

    x is what `see` makes of frames and states, expert what the expert would have done, both by step; act gives actions.
    Their slots are in two halves: while the processes step and draw one, this one looks at the other and acts. (On two
    cores, which have no time to spare, that gains nothing: 82 to 131 frames/s of the drawer, 101 to 137 without.) An
    episode ends with success after HELD successful steps in a row, or fails at the horizon.
    """
    episodes = [{"x": [], "state": [], "body": [], "expert": [], "success": False} for _ in starts]
    halves, in_a_row = [list(range(i, len(starts), 2)) for i in (0, 1)], [0] * len(starts)
    for half in halves:
        simulators.send({slot: starts[slot] for slot in half}, renders)
    while any(halves):
        for i, half in enumerate(halves):
            if not half:
                continue
            seen, running = simulators.receive(half), []
            for slot in half:
                in_a_row[slot] = in_a_row[slot] + 1 if seen[slot].success else 0
                episodes[slot]["success"] |= in_a_row[slot] == HELD
                if len(episodes[slot]["x"]) < horizon and not (stops and episodes[slot]["success"]):
                    running.append(slot)
            halves[i] = running
            if running:
                now = [seen[slot] for slot in running]
                states, body, expert = (np.stack([getattr(s, k) for s in now]) for k in ("state", "body", "expert"))
                x = see(np.stack([s.frame for s in now]) if renders else None, states)
                actions = act(x, torch.as_tensor(body), expert, running)
                simulators.send({slot: np.asarray(action) for slot, action in zip(running, actions)}, renders)
                for slot, *parts in zip(running, x, states, body, expert):
                    for key, value in zip(("x", "state", "body", "expert"), parts):
                        episodes[slot][key].append(torch.as_tensor(value))
    for episode in episodes:
        episode |= {key: torch.stack(episode[key]) for key in ("x", "state", "body", "expert")}
    return episodes


class Experience:
    """Episodes, in the order in which they were run, as a part of a state file (data.state_file)."""

    def __init__(self):
        self.episodes = []

    def state_dict(self):
        return {"episodes": self.episodes}

    def load_state_dict(self, state):
        self.episodes = state["episodes"]


def gather(name, n_waves, path, settings, one_wave, save_every=1):
    """Run waves of episodes, one_wave(wave, the episodes so far), and keep them in `path`; resumes there."""
    experience = Experience()
    file = data.state_file(path, {"experience": experience}, settings)
    for wave, bar in data.resumable_steps(name, n_waves, **file, save_every=save_every):
        started = time.perf_counter()
        new = one_wave(wave, experience.episodes)
        experience.episodes += new
        n_frames = sum(len(episode["x"]) for episode in new)
        share = np.mean([episode["success"] for episode in new])
        speed = n_frames / (time.perf_counter() - started)
        bar.set_postfix_str(f"success {share:.0%}, {speed:.0f} steps/s", refresh=False)
    return experience.episodes


PURPOSES = ["play", "expert", "dagger", "cloning", "film"]


def starts(task, what, seed, wave, size):
    """The (task, seed) of each episode of a wave; purposes, seeds and waves have episodes of their own."""
    number = lambda i: int(np.random.SeedSequence([PURPOSES.index(what), seed, wave, i]).generate_state(1)[0])
    return [(task, number(i)) for i in range(size)]


# DAgger and behaviour cloning.
def horizon_of(task):
    return HORIZON.get(task, 150)


def keep_frames(frames, states):
    return torch.as_tensor(frames)


def expert_episodes(simulators, args):
    """The expert's own episodes, with their frames as "x", which all eyes share: round 0 of DAgger, and Table 11's."""
    n_waves = math.ceil(max([args.episodes * args.seeds, *args.trajectories]) / args.wave)
    act = lambda x, body, expert, slots: expert

    def one_wave(wave, _):
        which = starts(args.task, "expert", args.seed, wave, args.wave)
        return run_episodes(simulators, which, horizon_of(args.task), keep_frames, True, act)

    return gather("expert", n_waves, args.folder / "expert.pt", settings_of(args), one_wave, save_every=None)


def look(episodes, eye, batch=64):
    """The same episodes as an eye sees their frames."""
    seen = []
    for episode in episodes:
        parts = zip(episode["x"].split(batch), episode["state"].split(batch))
        seen.append(episode | {"x": torch.cat([eye(frames.numpy(), states.numpy()) for frames, states in parts])})
    return seen


def try_policy(simulators, policy, which, eye, task):
    """Episodes in which a policy acts."""
    act = lambda x, body, expert, slots: policy(x, body).numpy()
    return run_episodes(simulators, which, horizon_of(task), eye, eye.renders, act)


def successes(name, n, path, settings, one_wave, args):
    """The success of n episodes, [bool], which are run once for all; with another n a stopped run is resumed."""

    def work():
        episodes = gather(name, math.ceil(n / args.wave), path.with_suffix(".pt"), settings, one_wave)
        return [bool(episode["success"]) for episode in episodes[:n]]

    result = data.once(path, settings | {"n": n}, work)
    path.with_suffix(".pt").unlink(missing_ok=True)
    return result


def dagger(simulators, name, eye, run, expert_of, args):
    """Fig. 6: DAgger (Ross et al., 2011) -> success of all episodes, [[bool] for each round].

    In round 0 the expert acts; then the policy that was learned from all rounds before acts, and the expert says what
    it would have done (not in the paper: β = 1, then 0). The success of a round is thus that of a policy in episodes
    it has never seen. Each run has expert's episodes of its own.
    """
    waves, policy, seed = args.episodes // args.wave, None, args.seed + run

    def one_wave(wave, before):
        nonlocal policy
        if wave % waves == 0 or policy is None:
            first = expert_of(eye)[run * args.episodes :][: args.episodes]
            policy = fit_policy(first + before[: wave // waves * args.episodes], args.policy_steps, seed)
        return try_policy(simulators, policy, starts(args.task, "dagger", seed, wave, args.wave), eye, args.task)

    path, n = args.folder / f"dagger-{name.replace(' ', '-')}-{run}.json", args.rounds * args.episodes
    settings = settings_of(args, eye) | {"run": run, "episodes": args.episodes, "policy_steps": args.policy_steps}
    success = successes(f"{name}, run {run}", n, path, settings, one_wave, args)
    return [success[i : i + args.episodes] for i in range(0, n, args.episodes)]


def clone(simulators, name, eye, n, expert_of, args):
    """Table 11: behaviour cloning from the expert's first n episodes -> success of --trials episodes, [bool]."""
    policy = None

    def one_wave(wave, _):
        nonlocal policy
        policy = policy or fit_policy(expert_of(eye)[:n], args.policy_steps, args.seed)
        return try_policy(simulators, policy, starts(args.task, "cloning", args.seed, wave, args.wave), eye, args.task)

    path = args.folder / f"cloning-{name.replace(' ', '-')}-{n}.json"
    settings = settings_of(args, eye) | {"trajectories": n, "policy_steps": args.policy_steps}
    return successes(f"{name}, {n} trajectories", args.trials, path, settings, one_wave, args)


def settings_of(args, eye=None):
    """What a finished run depends on beside its own: the simulator, and the trunk where an eye has one."""
    settings = {key: getattr(args, key) for key in ("task", "resolution", "wave", "seed")}
    if not isinstance(eye, TrunkEye):
        return settings
    trunk = data.checksum(*(p.cpu() for p in eye.model.state_dict().values()))
    return settings | {"trunk": trunk, "tokenizer": eye.tokenizer.fingerprint(), "layer": eye.layer}


# Pre-training.
def play(simulators, tasks, args, folder):
    """Videos of other tasks: in turn two episodes are a script's with noise, and two are moves at random.

    Without any loss of pixels (FFV1), so that a policy's frames look as these do. Those that are there are kept. Not in
    the paper: all of this.
    """
    horizon = 60 if family(args.task) == "metaworld" else 40
    for task_number, task in enumerate(tasks):
        n_clips, size = -(-args.play // len(tasks)), args.wave
        for wave in tqdm(range(-(-n_clips // size)), desc=f"playing {task}", unit="wave", dynamic_ncols=True):
            path = lambda i: folder / f"{task.replace(' ', '-')}-{wave * size + i:04d}.mkv"
            if path(size - 1).exists():
                continue
            rng, moves = np.random.default_rng([args.seed, task_number, wave]), {}

            def act(x, body, expert, slots):
                actions = []
                for slot, wanted in zip(slots, expert):  # moves at random go on for some steps
                    moves[slot] = 0.9 * moves.get(slot, 0) + 0.4 * rng.normal(size=wanted.shape)
                    actions.append(moves[slot] if slot // 2 % 2 else wanted + 0.5 * moves[slot])
                return np.clip(actions, -1, 1)

            which = starts(task, "play", args.seed, task_number * 10_000 + wave, size)
            for i, episode in enumerate(run_episodes(simulators, which, horizon, keep_frames, True, act, stops=False)):
                with data.atomic_open(path(i)) as file:
                    how = {"codec": "ffv1", "pixelformat": "bgr0", "macro_block_size": 1, "fps": 20}
                    iio.imwrite(file, episode["x"].numpy(), extension=".mkv", **how)


def pre_train(simulators, args, folder, device):
    """§3.1, §3.2: tokenizer and trunk on what was played, by train.py -> the checkpoint's path."""
    path, keys = folder / "toto.pt", ("play", "steps", "resolution", "wave", "seed", "tokenizer")
    settings, file = {key: str(getattr(args, key)) for key in keys}, folder / "pre-training.json"
    if file.exists():
        data.check_same(file, json.loads(file.read_text()), settings, "give another --out")
    data.write_json(settings, file)
    if not path.exists() or toto.load_checkpoint(path)["step"] < args.steps:
        play(simulators, PLAYED[family(args.task)], args, folder / "play")
        how = {"data": folder / "play", "out": folder, "resolution": args.resolution, "stride": 2, "frames": 8}
        how |= {"steps": args.steps, "seed": args.seed, "device": device.type}
        how |= {"tokenizer": args.tokenizer} if args.tokenizer else {}
        words = [word for name, value in how.items() for word in (f"--{name}", str(value))]
        train.train(train.parse_arguments([*words, "--no-compile"]), device)
    return path


def family(task):
    return "carry" if task == "carry" else "metaworld"


# What is compared.
def make_eyes(args, device):
    """({name: eye of a run}, {layer: eye of the trunk}, the layer). An untrained trunk has the same tokenizer.

    Every run has an untrained trunk of its own; there is one that is trained.
    """
    model, tokenizer, _ = dvae.load_trained(args.checkpoint, args.tokenizer, device)
    untrained = []
    for run in range(args.seeds):
        torch.manual_seed(args.seed + run)
        untrained.append(toto.Toto(model.config, model.compute_dtype).to(device).eval().requires_grad_(False))
    (layer,) = probe.parse_layers(args.layer, model.config.n_layers)
    layers = {l: TrunkEye(model, tokenizer, l, device) for l in range(model.config.n_layers + 1)}
    of_untrained = [TrunkEye(trunk, tokenizer, layer, device) for trunk in untrained]
    pixels, none, state = PixelEye(), NoEye(), StateEye()
    eyes = {"Toto": lambda run: layers[layer], "untrained": lambda run: of_untrained[run]}
    eyes |= {"raw pixels": lambda run: pixels, "proprioception alone": lambda run: none}
    return eyes | {"true state": lambda run: state}, layers, layer


def measure_speed(simulators, eye, args, n_steps=30):
    """Frames per second of a wave of moves at random: of the simulator and drawing alone, and with all that looks."""
    rng, seconds, which = np.random.default_rng(0), {}, starts(args.task, "film", args.seed, 1, args.wave)
    policy = Policy(torch.randn(9, eye.model.config.dim), torch.randn(9, 1), 4).requires_grad_(False)
    nothing = lambda frames, states: torch.zeros(len(states), 1)

    def act(x, body, expert, slots):
        if x.shape[1] > 1:
            policy(x, body[:, :1])
        return rng.uniform(-1, 1, expert.shape)

    run_episodes(simulators, which, 1, nothing, True, act)  # the first time makes the simulators
    for name, see in (("simulator and drawing alone", nothing), ("with the trunk and a policy", eye)):
        started = time.perf_counter()
        run_episodes(simulators, which, n_steps, see, True, act, stops=False)
        seconds[name] = time.perf_counter() - started
    return {name: n_steps * args.wave / duration for name, duration in seconds.items()}


def film(simulators, eyes, expert_of, args):
    """Table 11's policies from the most trajectories, and the expert, in the same four episodes: rows for a GIF."""
    which, films = starts(args.task, "film", args.seed, 0, 4), {}
    for name in ("expert", "Toto", "untrained", "raw pixels"):
        if name == "expert":
            act = lambda x, body, expert, slots: expert
        else:
            eye = eyes[name](0)
            policy = fit_policy(expert_of(eye)[: max(args.trajectories)], args.policy_steps, args.seed)
            act = lambda x, body, expert, slots: policy(eye(x.numpy(), None), body).numpy()
        films[name] = run_episodes(simulators, which, horizon_of(args.task), keep_frames, True, act)
    length = max(len(episode["x"]) for episodes in films.values() for episode in episodes)
    still = lambda x: x.numpy()[np.minimum(np.arange(0, length, 3), len(x) - 1)]  # a film that is over stays
    label = lambda name, episode: f"{name}, {'did it' if episode['success'] else 'failed'}"
    return [[(label(name, e[i]), still(e[i]["x"])) for name, e in films.items()] for i in range(len(which))]


def study(simulators, args, folder, device):
    """All that is measured -> (the report, rows for the GIF)."""
    args.checkpoint = args.checkpoint or pre_train(simulators, args, folder, device)
    n_processes = math.ceil(torch.get_num_threads() / 1.5)  # the simulators of each need cores too
    torch.set_num_threads(1)
    eyes, layers, layer = make_eyes(args, device)
    expert = expert_episodes(simulators, args)
    expert_of = lru_cache(maxsize=None)(lambda eye: look(expert, eye))
    n_successes, n = sum(episode["success"] for episode in expert), len(expert)
    print(f"{args.task}: the expert succeeds in {n_successes} of {n} episodes")
    report = {"task": args.task, "expert": [n_successes, n], "layer": layer, "paper": PAPER}
    run = lambda name, i: partial(dagger, simulators, name, eyes[name](i), i, expert_of, args)
    cloning = lambda name, eye, n: partial(clone, simulators, name, eye, n, expert_of, args)
    fewest = min(args.trajectories)  # where there is most room for a difference
    jobs = {(name, f"run {i}"): run(name, i) for name in eyes for i in range(args.seeds)}
    jobs |= {(name, n): cloning(name, eye(0), n) for name, eye in eyes.items() for n in args.trajectories}
    jobs |= {("layer", l): cloning(f"layer {l}", eye, fewest) for l, eye in layers.items() if l != layer}
    done = data.share_jobs(args.folder, jobs, device, n_processes)
    report["speed"] = measure_speed(simulators, layers[layer], args)
    report["dagger"] = {name: [done[name, f"run {i}"] for i in range(args.seeds)] for name in eyes}
    report["cloning"] = {name: {n: done[name, n] for n in args.trajectories} for name in eyes}
    report["layers"] = {l: done.get(("layer", l), report["cloning"]["Toto"][fewest]) for l in layers}
    return report, film(simulators, eyes, expert_of, args)


# The table and its pictures.
def curve(runs):
    """Success by round and run, in per cent: (rounds, runs)."""
    return 100 * np.mean(runs, axis=2).T


def mean_success(runs):
    """The area under each seed's curve: mean success over all rounds, in per cent (seeds,)."""
    return [100 * float(np.mean(run)) for run in runs]


def trials(success):
    """"16 of the first 16 trials; share of all (its 95 % interval)" of Table 11."""
    low, high = probe.wilson(np.mean(success), len(success))
    first = f"{np.sum(success[:N_TRIALS]):>3} of {min(N_TRIALS, len(success))}"
    return f"{first} {np.mean(success):>6.0%} ({low:.0%} to {high:.0%})"


def verdict(report, other):
    """Does Toto learn faster than another eye? In words that follow the interval over runs and nothing else."""
    toto_, others = (mean_success(report["dagger"][name]) for name in ("Toto", other))
    gains = [a - b for a, b in zip(toto_, others)]
    _, low, high = probe.over_seeds(gains)  # infinite for a single run
    words = "faster" if low > 0 else "slower" if high < 0 else "cannot tell"
    return f"Toto less {other}, mean success over all rounds: {probe.show_seeds(gains)} points: {words}"


def print_table(report, args):
    line = "{:<24}".format
    of = f"{args.seeds} seeds of {args.episodes} episodes"
    print(f"\nFigure 6, {args.task}: success in %, mean and 95 % interval, {of}")
    print("the paper: faster than MAE on all four tasks, Franka's and Kuka's pick and cabinet")
    print(line("round") + "".join(f"{i:<18}" for i in range(1, args.rounds + 1)))
    for name, runs in report["dagger"].items():
        shown = [probe.show_seeds(of_round, digits=0) for of_round in curve(runs)]
        print(line(name) + "".join(f"{text:<18}" for text in shown))
    print("\n".join(verdict(report, other) for other in ("untrained", "raw pixels")))
    of = f"{N_TRIALS} trials as in the paper, and {args.trials} for the interval, which is of this one policy"
    print(f"\nTable 11, behaviour cloning: {of}")
    for name, share in PAPER.items():
        print(line(f"{name} (real robot)") + f"240 trajectories: {share} % of {N_TRIALS}")
    for name, of_n in report["cloning"].items():
        print(line(name) + "".join(f"{n:>4}: {trials(success):<28}" for n, success in of_n.items()))
    print(f"\nFigure 8, {min(args.trajectories)} trajectories, by layer")
    for l, success in report["layers"].items():
        print(line(f"layer {l}") + trials(success))
    print("\nframes a second: " + ", ".join(f"{name} {speed:.0f}" for name, speed in report["speed"].items()))


def draw(plt, report, path, args):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2))

    def plot_trials(axes, x, successes, colour, shift=0.0):  # shares of trials with Wilson's intervals
        shares = np.array([np.mean(success) for success in successes])
        bounds = np.array([probe.wilson(share, len(success)) for share, success in zip(shares, successes)]).T
        axes.errorbar(np.arange(len(x)) + shift, 100 * shares, 100 * abs(bounds - shares), color=colour, marker="o")
        axes.set_xticks(range(len(x)), x)

    for i, (name, runs) in enumerate(report["dagger"].items()):
        rounds, of_rounds = range(1, args.rounds + 1), [probe.over_seeds(of_round) for of_round in curve(runs)]
        mean, low, high = np.clip(np.array(of_rounds).T, 0, 100)
        left.plot(rounds, mean, color=f"C{i}", marker="o", label=name)
        if len(runs) > 1:
            left.fill_between(rounds, low, high, color=f"C{i}", alpha=0.12)
        of_n = report["cloning"][name]
        plot_trials(middle, list(of_n), of_n.values(), f"C{i}", 0.06 * (i - 2))
    plot_trials(right, list(report["layers"]), report["layers"].values(), "C0")
    left.set(title=f"Figure 6: DAgger, {args.task}", xlabel="round", ylabel="success, %", xticks=rounds)
    left.legend(frameon=False, fontsize="small")
    middle.set(title="Table 11: behaviour cloning", xlabel="trajectories of the expert")
    right.set(title=f"Figure 8: {min(args.trajectories)} trajectories", xlabel="layer of Toto")
    for axes in (left, middle, right):
        axes.set_ylim(-3, 103)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


# The program.
def parse_arguments():
    parser = data.make_parser(__doc__)
    add, count = parser.add_argument, data.number(int, at_least=1)
    is_there = importlib.util.find_spec("metaworld") is not None
    add("--task", help="carry, or a task of metaworld (default: drawer-open-v3, or without metaworld carry)")
    add("--checkpoint", type=Path, help="a model of train.py (default: one is pre-trained on other tasks)")
    add("--tokenizer", type=Path, help="its tokenizer (default: dvae.pt beside it)")
    add("--layer", default="mid", help="whose tokens a policy gets: mid (L // 2) or a number")
    side = data.number(int, at_least=24, multiple_of=8)
    add("--resolution", type=side, help="side of the frames in pixels (default: of --checkpoint, or 64)")
    add("--play", type=count, default=240, help="videos of other tasks to pre-train on")
    add("--steps", type=count, default=3000, help="of pre-training")
    add("--rounds", type=count, default=5, help="of DAgger, after the expert's own")
    add("--episodes", type=count, help="in a round (default: 10, or 40 for carry)")
    add("--wave", type=count, default=10, help="episodes at once; those of a round are a multiple of it")
    words = "of the expert to clone in Table 11 (default: 5 10 40, or 20 80 320 for carry)"
    add("--trajectories", nargs="+", type=count, help=words)
    add("--trials", type=count, default=100, help="episodes of a cloned policy")
    add("--policy-steps", type=count, default=2000, help="of each policy's training")
    add("--seeds", type=count, default=3, help="runs of DAgger")
    add("--out", default="out/figure6", type=data.output_folder, help="folder for results, models, videos and runs")
    args = parser.parse_args()
    if args.task is None:
        args.task = "drawer-open-v3" if is_there else "carry"
        if not is_there:
            print("metaworld is missing (pip install -r paper/requirements-robots.txt): the small built-in task runs")
    amounts = AMOUNTS[family(args.task)]
    args.episodes, args.trajectories = args.episodes or amounts[0], args.trajectories or amounts[1]
    if args.episodes % args.wave:
        raise ValueError(f"--episodes {args.episodes}: must be a multiple of --wave {args.wave}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("torchrun: is not needed; on a CPU the program starts processes of its own")
    if family(args.task) == "metaworld":
        check_metaworld(args, is_there)
    checkpoint = toto.load_checkpoint(args.checkpoint) if args.checkpoint else {"config": toto.SIZES["tiny"]}
    args.resolution = args.resolution or checkpoint.get("resolution", 64)
    if len(probe.parse_layers(args.layer, checkpoint["config"].n_layers)) > 1:
        raise ValueError(f"--layer {args.layer}: give one; all are tried in Fig. 8's panel")
    return args


def check_metaworld(args, is_there):
    if not is_there:
        words = "pip install -r paper/requirements-robots.txt, or --task carry"
        raise ValueError(f"--task {args.task}: metaworld is missing; {words}")
    from metaworld.policies import ENV_POLICY_MAP

    if args.task not in ENV_POLICY_MAP:
        raise ValueError(f"--task {args.task}: no task of metaworld; for example drawer-open-v3, pick-place-v3")
    if args.task in PLAYED["metaworld"] and not args.checkpoint:
        raise ValueError(f"--task {args.task}: is played for pre-training; give another")


def main():
    args, plt = parse_arguments(), data.pyplot()
    device = data.pick_device(args.device)
    args.folder = args.out / args.task
    folder = args.out / family(args.task)
    with contextlib.closing(Simulators(args.resolution, math.ceil(args.wave / 2))) as simulators:
        report, rows = study(simulators, args, folder, device)
    data.write_json(report, args.folder / "figure6.json")
    print_table(report, args)
    draw(plt, report, args.folder / "figure6.png", args)
    data.write_gif(args.folder / "figure6.gif", rows, n_prompt=0)
    print(f"wrote figure6.json, figure6.png and figure6.gif to {args.folder}")


if __name__ == "__main__":
    data.run(main)
