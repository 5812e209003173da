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

Writes to --out: figure6.json, figure6.png, figure6.gif, the videos that were played (play/), dvae.pt and toto.pt. Run
again, it resumes where it stopped; a round of episodes is saved wave by wave.

From top to bottom: the tasks, simulators in processes of their own, what a policy sees, the policy, episodes, DAgger
and behaviour cloning, pre-training, what is compared, the table and its pictures.
Shape letters: n steps of episodes, R pixels a side, P proprioception, S state, A actions, D width.
"""

import contextlib
import importlib.util
import io
import math
import multiprocessing
import os
import signal
import sys
import time
import warnings
from dataclasses import dataclass
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
    """The built-in task: a hand reaches for the right one of two shapes, closes on it, carries it to a tray.

    It is drawn on a board of 8 x 8 cells, as the clips of the built-in world are, so that a small tokenizer keeps it
    whole. An action is (across, down, close): a step goes to one of the nine nearest cells, and a hand that closes on
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
        self.colours, self.cells = np.array([data.COLOURS[0], data.COLOURS[rng.integers(1, 3)]]), []
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
        return np.ascontiguousarray(self.simulator.render()[::-1])  # this camera stands on its head


# Not in the paper: after so many steps an episode has failed. The slowest of 20 experts took 102, 68 and 25.
HORIZON = {"drawer-open-v3": 150, "pick-place-v3": 110, "carry": 50}
# Episodes in a round of DAgger, and trajectories for Table 11. After 20 the drawer is open for every eye (tried).
AMOUNTS = {"metaworld": (10, [5, 10, 40]), "carry": (40, [20, 80, 320])}
# What is played for pre-training: never the tasks themselves.
PLAYED = {
    "carry": [f"carry {name}" for name in data.SHAPES if name != "T"],
    "metaworld": [
        "push-v3", "reach-v3", "door-open-v3", "drawer-close-v3", "button-press-topdown-v3", "window-open-v3",
    ],
}  # fmt: skip


def make_task(name, resolution):
    return Carry(resolution, name[6:] or "T") if name.startswith("carry") else MetaWorld(resolution, name)


# Simulators in processes of their own: they step and draw while this process looks and decides.
def simulate(pipe, resolution):
    """What a process does: orders {slot: (task, seed) or an action} in, what is then seen of each slot out."""
    for number in (signal.SIGINT, signal.SIGTERM):  # these are for the first process, which ends the others
        signal.signal(number, signal.SIG_IGN)
    os.environ |= {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl"), "LP_NUM_THREADS": "1"}
    running = {}  # {slot: (name, task)}: a simulator is made once for many episodes
    try:
        while True:
            orders, renders = pipe.recv()
            answers = []
            for slot, order in orders.items():
                success = False
                if isinstance(order, tuple):
                    task, seed = order
                    if running.get(slot, (None,))[0] != task:
                        running[slot] = task, make_task(task, resolution)
                    running[slot][1].reset(seed)
                else:
                    success = running[slot][1].step(order)
                now = running[slot][1]
                frame = now.render() if renders else None
                answers.append((slot, Seen(frame, now.state(), now.proprioception(), now.expert(), success)))
            pipe.send(answers)
    except EOFError:
        pass
    except Exception as error:  # whatever a simulator raises; the first process says it in one line
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])


@dataclass
class Seen:
    """What is known of a simulator after a step."""

    frame: np.ndarray  # uint8 (R, R, 3), or None where nobody looks
    state: np.ndarray  # float32 (S,)
    body: np.ndarray  # float32 (P,)
    expert: np.ndarray  # float32 (A,), what the expert would do now
    success: bool


class Simulators:
    """As many processes as there are cores, each with its share of the slots."""

    def __init__(self, resolution):
        self.workers = []
        context, n = multiprocessing.get_context("spawn"), len(os.sched_getaffinity(0))
        for _ in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=simulate, args=(theirs, resolution), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def send(self, orders, renders=True):
        """Orders {slot: …} to the processes; the answers to them are fetched by `receive`, in the same order."""
        for i, (process, pipe) in enumerate(self.workers):
            mine = {slot: order for slot, order in orders.items() if slot // 2 % len(self.workers) == i}
            if mine:
                with self.one_line(process):
                    pipe.send((mine, renders))

    def receive(self, slots):
        """{slot: Seen} of the oldest orders that were sent to these slots."""
        found = {}
        for i, (process, pipe) in enumerate(self.workers):
            if any(slot // 2 % len(self.workers) == i for slot in slots):
                with self.one_line(process):
                    answers = pipe.recv()
                if isinstance(answers, str):
                    raise ValueError(self.explain(answers))
                found |= dict(answers)
        return found

    @contextlib.contextmanager
    def one_line(self, process):
        try:
            yield
        except (EOFError, OSError):
            process.join(timeout=5)
            raise ValueError(self.explain(f"its process ended with status {process.exitcode}")) from None

    def explain(self, what):
        advice = "what was gathered is kept: run it again"
        if "egl" in what.lower() or "gl" in what.split(":")[0].lower():
            advice = "for drawing without a screen: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri"
        return f"the simulator failed ({what}); {advice}"

    def close(self):
        for process, pipe in self.workers:
            pipe.close()
            process.join(timeout=10)
            process.kill()


# What a policy sees. Each eye turns frames uint8 (n, R, R, 3) and states (n, S) into vectors float32 (n, d).
class TrunkEye:
    """§4.6: "only take tokens at an intermediate layer, apply average pooling": the mean of H_l over a frame's tokens.

    Not in the paper: a frame counts as the first of a video, which is what a trunk for robots has seen most of.
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
    """The pixels themselves, averaged down to 16 x 16."""

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

    Not in the paper: both inputs are normalised by the mean and the spread of what is learned from.
    """

    def __init__(self, x, body, n_actions):
        super().__init__()
        for name, values in (("x", x), ("body", body)):
            self.register_buffer(f"{name}_mean", values.mean(dim=0))
            self.register_buffer(f"{name}_std", values.std(dim=0) + 1e-4)
        self.eye, self.body = nn.Linear(x.shape[1], 128), nn.Linear(body.shape[1], 128)
        widths = 256, 256, 128, 64
        hidden = [part for pair in zip(widths, widths[1:]) for part in (nn.Linear(*pair), nn.SELU())]
        self.mlp = nn.Sequential(*hidden, nn.Linear(64, n_actions))

    def forward(self, x, body):
        x, body = (x - self.x_mean) / self.x_std, (body - self.body_mean) / self.body_std
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
    Their slots are in two halves: while the processes step and draw one, this one looks at the other and acts. An
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


def gather(simulators, name, n_waves, path, settings, one_wave):
    """Run waves of episodes, one_wave(wave, the episodes so far), and keep them in `path`; resumes there."""
    experience = Experience()
    file = data.state_file(path, {"experience": experience}, settings)
    for wave, bar in data.resumable_steps(name, n_waves, **file, save_every=1):
        started = time.perf_counter()
        new = one_wave(wave, experience.episodes)
        experience.episodes += new
        n_frames = sum(len(episode["x"]) for episode in new)
        share = np.mean([episode["success"] for episode in new])
        speed = n_frames / (time.perf_counter() - started)
        bar.set_postfix_str(f"success {share:.0%}, {speed:.0f} steps/s", refresh=False)
    return experience.episodes


def starts(task, what, seed, wave, size):
    """The (task, seed) of each episode of a wave; no two purposes, seeds or waves share one."""
    number = lambda i: int(np.random.SeedSequence([PURPOSES.index(what), seed, wave, i]).generate_state(1)[0])
    return [(task, number(i)) for i in range(size)]


PURPOSES = ["play", "expert", "dagger", "cloning", "film"]


# DAgger and behaviour cloning.
def horizon_of(task):
    return HORIZON.get(task, 150)


def expert_episodes(simulators, args):
    """The expert's own episodes, with their frames as "x", which all eyes share: round 0 of DAgger, and Table 11's."""
    n, wave_size = max([args.episodes * args.seeds, *args.trajectories]), args.wave
    see, act = lambda frames, states: torch.as_tensor(frames), lambda x, body, expert, slots: expert

    def one_wave(wave, _):
        which = starts(args.task, "expert", args.seed, wave, wave_size)
        return run_episodes(simulators, which, horizon_of(args.task), see, True, act)

    settings = settings_of(args) | {"episodes": n}
    return gather(simulators, "expert", math.ceil(n / wave_size), args.folder / "expert.pt", settings, one_wave)


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


def dagger(simulators, name, eye, seed, expert, args):
    """Fig. 6: DAgger (Ross et al., 2011) -> success of all episodes, [[bool] for each round].

    In round 0 the expert acts; then the policy that was learned from all rounds before acts, and the expert says what
    it would have done (β = 1, then 0). The success of a round is thus that of a policy in episodes it has never seen.
    """
    first = look(expert[seed * args.episodes :][: args.episodes], eye)
    waves, policy = args.episodes // args.wave, None

    def one_wave(wave, sofar):
        nonlocal policy
        if wave % waves == 0 or policy is None:
            policy = fit_policy(first + sofar[: wave // waves * args.episodes], args.policy_steps, seed)
        which = starts(args.task, "dagger", args.seed + seed, wave, args.wave)
        return try_policy(simulators, policy, which, eye, args.task)

    def work():
        path = args.folder / f"dagger-{file_name(name)}-{seed}.pt"
        episodes = gather(simulators, f"{name}, seed {seed}", args.rounds * waves, path, settings, one_wave)
        success = [bool(episode["success"]) for episode in episodes]
        return [success[i : i + args.episodes] for i in range(0, len(success), args.episodes)]

    settings = settings_of(args) | {"eye": name, "run": seed, "rounds": args.rounds}
    return data.once(args.folder / f"dagger-{file_name(name)}-{seed}.json", settings, work)


def clone(simulators, name, eye, n, expert, args):
    """Table 11: behaviour cloning from the expert's first n episodes -> success of --trials episodes, [bool]."""
    policy = None

    def one_wave(wave, _):
        nonlocal policy
        policy = policy or fit_policy(look(expert[:n], eye), args.policy_steps, args.seed)
        which = starts(args.task, "cloning", args.seed, wave, args.wave)
        return try_policy(simulators, policy, which, eye, args.task)

    def work():
        path, n_waves = args.folder / f"cloning-{file_name(name)}-{n}.pt", math.ceil(args.trials / args.wave)
        episodes = gather(simulators, f"{name}, {n} trajectories", n_waves, path, settings, one_wave)
        path.unlink()
        return [bool(episode["success"]) for episode in episodes[: args.trials]]

    settings = settings_of(args) | {"eye": name, "trajectories": n, "trials": args.trials}
    return data.once(args.folder / f"cloning-{file_name(name)}-{n}.json", settings, work)


def file_name(name):
    return name.replace(" ", "-").replace(",", "")


def settings_of(args):
    """What a finished run depends on beside its own."""
    keys = "task", "resolution", "trunk", "tokenizer", "episodes", "wave", "policy_steps", "seed"
    return {key: getattr(args, key) for key in keys}


# Pre-training.
def play(simulators, tasks, args, folder):
    """Videos of other tasks: every second episode is a script's with noise, the others are moves at random.

    Without any loss of pixels (FFV1), so that a policy's frames look as these do. Those that are there are kept.
    """
    horizon, see = 60 if has_metaworld(args.task) else 40, lambda frames, states: torch.as_tensor(frames)
    for task_number, task in enumerate(tasks):
        n_clips, size = -(-args.play // len(tasks)), args.wave
        for wave in tqdm(range(-(-n_clips // size)), desc=f"playing {task}", unit="wave", dynamic_ncols=True):
            path = lambda i: folder / f"{task.replace(' ', '-')}-{wave * size + i:04d}.mkv"
            if path(size - 1).exists():
                continue
            rng, moves = np.random.default_rng([args.seed, task_number, wave]), {}

            def act(x, body, expert, slots):
                actions = []
                for slot, wanted in zip(slots, expert):
                    noise = rng.normal(size=wanted.shape)
                    moves[slot] = 0.9 * moves.get(slot, 0) + 0.4 * noise  # moves that go on for some steps
                    actions.append(moves[slot] if slot // 2 % 2 else wanted + 0.5 * moves[slot])
                return np.clip(actions, -1, 1)

            which = starts(task, "play", args.seed, task_number * 10_000 + wave, size)
            for i, episode in enumerate(run_episodes(simulators, which, horizon, see, True, act, stops=False)):
                with data.atomic_open(path(i)) as file:
                    how = {"codec": "ffv1", "pixelformat": "bgr0", "macro_block_size": 1, "fps": 20}
                    iio.imwrite(file, episode["x"].numpy(), extension=".mkv", **how)


def pre_train(simulators, args, folder, device):
    """§3.1, §3.2: tokenizer and trunk on what was played, by train.py -> the checkpoint's path."""
    path, steps = folder / "toto.pt", args.steps
    if not path.exists() or toto.load_checkpoint(path)["step"] < steps:
        play(simulators, PLAYED["metaworld" if has_metaworld(args.task) else "carry"], args, folder / "play")
        words = f"--data {folder / 'play'} --out {folder} --size {args.size} --resolution {args.resolution}".split()
        words += f"--stride 2 --steps {steps} --frames 8 --seed {args.seed} --device {device.type}".split()
        words += ["--tokenizer", str(args.tokenizer_path)] if args.tokenizer_path else []
        train.train(train.parse_arguments(words), device)
    return path


def has_metaworld(task):
    return not task.startswith("carry")


# What is compared.
def make_eyes(args, device):
    """{name: eye} of the curves, and {layer: eye} of the trunk. An untrained trunk has the same tokenizer."""
    model, tokenizer, _ = dvae.load_trained(args.checkpoint, args.tokenizer_path, device)
    torch.manual_seed(args.seed)
    untrained = toto.Toto(model.config, model.compute_dtype).to(device).eval().requires_grad_(False)
    (layer,) = probe.parse_layers(args.layer, model.config.n_layers)
    trunk = lambda model, l: TrunkEye(model, tokenizer, l, device)
    eyes = {"Toto": trunk(model, layer), "untrained": trunk(untrained, layer), "raw pixels": PixelEye()}
    eyes |= {"proprioception alone": NoEye(), "true state": StateEye()}
    return eyes, {l: trunk(model, l) for l in range(model.config.n_layers + 1)}, layer


def measure_speed(simulators, eye, args, n_steps=30):
    """Frames per second of a wave of random moves -> {"simulator and drawing", "with tokenizer, trunk and policy"}."""
    rng, found, policy = np.random.default_rng(0), {}, None
    nothing = lambda frames, states: torch.zeros(len(states), 1)
    which = starts(args.task, "film", args.seed, 1, args.wave)
    for name, see in (("", nothing), ("simulator and drawing alone", nothing), ("with the trunk and a policy", eye)):
        def act(x, body, expert, slots):
            nonlocal policy
            policy = Policy(x, body, expert.shape[1]).requires_grad_(False) if see is eye and policy is None else policy
            return policy(x, body).nan_to_num().numpy() if policy else rng.uniform(-1, 1, expert.shape)

        started = time.perf_counter()  # the first turn only makes the simulators
        episodes = run_episodes(simulators, which, n_steps, see, True, act, stops=False)
        found[name] = sum(len(episode["x"]) for episode in episodes) / (time.perf_counter() - started)
    return dict(list(found.items())[1:])


def film(simulators, eyes, expert, args):
    """Table 11's policies from the most trajectories, and the expert, in the same four episodes: rows for a GIF."""
    which, keep = starts(args.task, "film", args.seed, 0, 4), {}
    frames = {}
    for name in ("expert", "Toto", "untrained", "raw pixels"):
        seen = []
        if name != "expert":
            policy = fit_policy(look(expert[: max(args.trajectories)], eyes[name]), args.policy_steps, args.seed)

        def see(frames, states):
            seen.append(frames)
            return torch.as_tensor(frames)

        def act(x, body, expert, slots):
            return expert if name == "expert" else policy(eyes[name](x.numpy(), None), body).numpy()

        episodes = run_episodes(simulators, which, horizon_of(args.task), see, True, act)
        frames[name] = [(episode["x"].numpy(), episode["success"]) for episode in episodes]
    length = max(len(film) for films in frames.values() for film, _ in films)
    still = lambda film: film[np.minimum(np.arange(0, length, 3), len(film) - 1)]  # a film that is over stays
    label = lambda name, success: f"{name}{' +' if success else ' -'}"
    return [[(label(name, films[i][1]), still(films[i][0])) for name, films in frames.items()] for i in range(4)]


def study(simulators, args, family, device):
    """All that is measured -> (the report, rows for the GIF)."""
    args.checkpoint = args.checkpoint or pre_train(simulators, args, family, device)
    torch.set_num_threads(1)  # the simulators need the other cores
    eyes, layers, layer = make_eyes(args, device)
    given = toto.load_checkpoint(args.checkpoint)
    args.trunk, args.tokenizer = f"{args.checkpoint}, step {given['step']}, layer {layer}", given["tokenizer"]
    expert = expert_episodes(simulators, args)
    n_right, n = sum(episode["success"] for episode in expert), len(expert)
    print(f"{args.task}: the expert succeeds in {n_right} of {n} episodes")
    report = {"paper": PAPER, "task": args.task, "expert": [n_right, n], "trunk": args.trunk}
    report["speed"] = measure_speed(simulators, eyes["Toto"], args)
    report["dagger"] = {
        name: [dagger(simulators, name, eye, seed, expert, args) for seed in range(args.seeds)]
        for name, eye in eyes.items()
    }
    cloning = lambda name, eye, n: clone(simulators, name, eye, n, expert, args)
    report["cloning"] = {name: {n: cloning(name, eye, n) for n in args.trajectories} for name, eye in eyes.items()}
    fewest = min(args.trajectories)  # where there is most room for a difference
    report["layers"] = {
        l: report["cloning"]["Toto"][fewest] if l == layer else cloning(f"layer {l}", eye, fewest)
        for l, eye in layers.items()
    }
    return report, film(simulators, eyes, expert, args)


# The table and its pictures.
def curve(runs):
    """Success of each round over the seeds -> [(mean, low, high)] in per cent."""
    shares = 100 * np.array([[np.mean(round_) for round_ in run] for run in runs])  # (seeds, rounds)
    return [probe.over_seeds(shares[:, i]) for i in range(shares.shape[1])]


def mean_success(runs):
    """The area under each seed's curve: mean success over all rounds, in per cent (seeds,)."""
    return [100 * float(np.mean(run)) for run in runs]


def trials(success):
    """"16 of the first 16 trials; share of all (its 95 % interval)" of Table 11."""
    low, high = probe.wilson(np.mean(success), len(success))
    first = f"{np.sum(success[:N_TRIALS]):>3} of {min(N_TRIALS, len(success))}"
    return f"{first} {np.mean(success):>6.0%} ({low:.0%} to {high:.0%})"


def verdict(report, other):
    """Does Toto learn faster than another eye? In words that follow the paired interval and nothing else."""
    toto_, others = (mean_success(report["dagger"][name]) for name in ("Toto", other))
    difference = probe.over_seeds([a - b for a, b in zip(toto_, others)])
    words = "cannot tell"
    if len(toto_) > 1:
        words = "faster" if difference[1] > 0 else "slower" if difference[2] < 0 else words
    shown = probe.show_seeds([a - b for a, b in zip(toto_, others)])
    return f"Toto less {other}, mean success over all rounds: {shown} points: {words}"


def print_table(report, args):
    line = "{:<24}".format
    of = f"{args.seeds} seeds of {args.episodes} episodes"
    print(f"\nFigure 6, {args.task}: success in %, mean and 95 % interval, {of}")
    print(line("round") + "".join(f"{i:<18}" for i in range(1, args.rounds + 1)))
    for name, runs in report["dagger"].items():
        shown = [f"{mean:.0f} ({max(low, 0):.0f} to {min(high, 100):.0f})" for mean, low, high in curve(runs)]
        print(line(name) + "".join(f"{text:<18}" for text in shown))
    print("\n".join(verdict(report, other) for other in ("untrained", "raw pixels")))
    print(f"\nTable 11, behaviour cloning: {N_TRIALS} trials as in the paper, and {args.trials} for the interval")
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
    for i, (name, runs) in enumerate(report["dagger"].items()):
        mean, low, high = np.array(curve(runs)).T.clip(0, 100)
        rounds = np.arange(1, len(mean) + 1)
        left.plot(rounds, mean, color=f"C{i}", marker="o", label=name)
        left.fill_between(rounds, low, high, color=f"C{i}", alpha=0.15)
        n = list(report["cloning"][name])
        shares = [np.mean(success) for success in report["cloning"][name].values()]
        bounds = np.array([probe.wilson(share, args.trials) for share in shares])
        positions = np.arange(len(n)) + 0.06 * (i - 2)
        middle.errorbar(positions, 100 * np.array(shares), np.abs(100 * (bounds.T - shares)), color=f"C{i}", marker="o")
        middle.set_xticks(np.arange(len(n)), n)
    layers = [np.mean(success) for success in report["layers"].values()]
    bounds = np.array([probe.wilson(share, args.trials) for share in layers])
    errors = np.abs(100 * (bounds.T - layers))
    right.errorbar([int(l) for l in report["layers"]], 100 * np.array(layers), errors, color="C0", marker="o")
    right.set_xticks([int(l) for l in report["layers"]])
    left.set(title=f"Figure 6: DAgger, {args.task}", xlabel="round", ylabel="success, %")
    left.legend(frameon=False, fontsize="small")
    middle.set(title="Table 11: behaviour cloning", xlabel="trajectories of the expert")
    right.set(title="Figure 8: Toto by layer", xlabel="layer")
    for axes in (left, middle, right):
        axes.set_ylim(-3, 103)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


# The program.
def parse_arguments():
    parser = data.make_parser("Figure 6, Table 11: policies on frozen features. Run again, it resumes.")
    add, count = parser.add_argument, data.number(int, at_least=1)
    has = importlib.util.find_spec("metaworld") is not None
    add("--task", default="drawer-open-v3" if has else "carry", help="carry, or a task of metaworld")
    add("--checkpoint", type=Path, help="a model of train.py (default: one is pre-trained on other tasks)")
    add("--tokenizer", type=Path, dest="tokenizer_path", help="its tokenizer (default: dvae.pt beside it)")
    add("--layer", default="mid", help="whose tokens a policy gets: mid (L // 2) or a number")
    add("--size", default="tiny", choices=toto.SIZES, help="of the model to pre-train; §4.6 has base")
    add("--resolution", type=dvae.frame_side, help="side of the frames (default: of --checkpoint, or 64)")
    add("--play", type=count, default=240, help="videos of other tasks to pre-train on")
    add("--steps", type=count, default=3000, help="of pre-training")
    add("--rounds", type=count, default=5, help="of DAgger, after the expert's own")
    add("--episodes", type=count, help="in a round (default: 10, or 40 for carry)")
    add("--wave", type=count, default=10, help="episodes at once; those of a round are a multiple of it")
    words = "of the expert to clone in Table 11 (default: 5 10 40, or 20 80 320 for carry)"
    add("--trajectories", nargs="+", type=count, help=words)
    add("--trials", type=count, default=100, help="episodes of a cloned policy")
    add("--policy-steps", type=count, default=3000, help="of each policy's training")
    add("--seeds", type=count, default=3, help="runs of DAgger, from --seed on")
    add("--out", default="out/figure6", type=data.output_folder, help="folder for results, models, videos and runs")
    args = parser.parse_args()
    amounts = AMOUNTS["metaworld" if has_metaworld(args.task) else "carry"]
    args.episodes, args.trajectories = args.episodes or amounts[0], args.trajectories or amounts[1]
    if args.episodes % args.wave:
        raise ValueError(f"--episodes {args.episodes}: must be a multiple of --wave {args.wave}")
    if has_metaworld(args.task):
        if not has:
            raise ValueError("metaworld is missing; pip install -r paper/requirements-robots.txt, or --task carry")
        from metaworld.policies import ENV_POLICY_MAP

        if args.task not in ENV_POLICY_MAP:
            raise ValueError(f"--task {args.task}: no task of metaworld; for example drawer-open-v3, pick-place-v3")
        if args.task in PLAYED["metaworld"]:
            raise ValueError(f"--task {args.task}: is played for pre-training; give another")
    elif not has:
        print("metaworld is missing (pip install -r paper/requirements-robots.txt): the small built-in task runs")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("torchrun: one process is enough; it starts a simulator on every core")
    return args


def main():
    args, plt = parse_arguments(), data.pyplot()
    device = data.pick_device(args.device)
    family = args.out / ("metaworld" if has_metaworld(args.task) else "carry")
    args.folder = args.out / args.task
    given = toto.load_checkpoint(args.checkpoint) if args.checkpoint else {}
    args.resolution = args.resolution or given.get("resolution") or 64
    with contextlib.closing(Simulators(args.resolution)) as simulators:
        report, rows = study(simulators, args, family, device)
    data.write_json(report, args.folder / "figure6.json")
    print_table(report, args)
    draw(plt, report, args.folder / "figure6.png", args)
    data.write_gif(args.folder / "figure6.gif", rows, n_prompt=0)
    print(f"wrote figure6.json, figure6.png and figure6.gif to {args.folder}")


if __name__ == "__main__":
    data.run(main)
