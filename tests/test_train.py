"""train.py as users run it: whole runs, stopped, killed, resumed and shared; and its parts against sums by hand."""

import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import dvae
import toto
import train
from conftest import ENVIRONMENT, PAIR, ROOT, fake_tokens, run

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def tokens(tmp_path_factory, untrained_tokenizer):
    """A token folder of small world clips, its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("data")
    dvae.save(untrained_tokenizer, folder / "dvae.pt")
    data.tokenize(data.world_shards(range(60), 32, n_frames=4), folder / "tokens", untrained_tokenizer, 32, 4)
    return folder


def command(tokens, out, *extra):
    return [
        "train.py", "--data", str(tokens / "tokens"), "--tokenizer", str(tokens / "dvae.pt"), "--out", str(out),
        "--frames", "4", "--batch-tokens", "256", "--warmup", "2", "--save-every", "4", "--device", "cpu", *extra,
    ]  # fmt: skip


def losses(out, key="loss"):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))  # every step once and in order
    return [line[key] for line in steps]


def assert_same_checkpoint(a, b):
    a, b = (torch.load(out / "toto.pt", weights_only=True) for out in (a, b))
    assert a["step"] == b["step"] and a["model"].keys() == a["optimizer"].keys()
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(a["optimizer"][name][key], b["optimizer"][name][key]), (name, key)


def in_process(script, *arguments):
    """Run a program's main here, with its arguments: that saves the seconds in which a process of its own starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        __import__(script.removesuffix(".py")).main()


SEVERAL = """
import itertools
import json
import os
import signal
import sys

import torch

import data
import train

def main():
    _, commands, dtype, kill_before = sys.argv
    if dtype:
        data.fast_dtype = lambda device: getattr(torch, dtype)
    steps, take_step = itertools.count(), train.take_step

    def take_step_or_die(*inputs):
        if str(next(steps)) == kill_before and data.rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(*inputs)

    train.take_step = take_step_or_die
    for script, *arguments in json.loads(commands):
        sys.argv = [script, *arguments]
        __import__(script.removesuffix(".py")).main()
        data.wait_for_all()
        data.start_processes = lambda device: None  # they are
        print("done with", *sys.argv, flush=True)

data.run(main)
"""


def run_in_a_pair(folder, *commands, dtype="", kill_before="", launcher=PAIR):
    """Run programs one after another in the same two processes of torchrun, which take seconds to start.

    The first process is killed before training step kill_before of them all, if it comes so far.
    """
    (folder / "several.py").write_text(SEVERAL)
    commands = json.dumps([list(map(str, command)) for command in commands])
    return run([str(folder / "several.py"), commands, dtype, str(kill_before)], launcher).stdout


@pytest.fixture(scope="session")
def undisturbed(tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    (out / "printed.txt").write_text(run(command(tokens, out, "--steps", "12")).stdout)
    return out


# At the default rate differences in rounding grow fast.
SLOW = ["--lr", "3e-4", "--steps", "9", "--save-every", "3", "--keep", "2"]


@pytest.fixture(scope="session")
def slow(tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("slow")
    in_process(*command(tokens, out, *SLOW))
    return out


def test_a_run_learns_and_writes_its_files(undisturbed):
    values = losses(undisturbed)
    assert len(values) == 12 and values[-1] < values[0]
    written = {"toto.pt", "best.pt", "dvae.pt", "log.jsonl", "samples.gif", "printed.txt"}
    assert {p.name for p in undisturbed.iterdir()} == written
    last = json.loads((undisturbed / "log.jsonl").read_text().splitlines()[-1])["validation"]
    (result,) = last.values()
    assert set(result) >= {"loss", "unigram_entropy", "accuracy", "repeat_accuracy"}
    assert len(result["loss_by_frame"]) == 4


def test_a_run_says_how_fast_it_was(undisturbed):
    """The last lines against the log's, which has the time of each step."""
    speeds, shares = losses(undisturbed, "tokens_per_second"), losses(undisturbed, "mfu")
    found = re.search(
        r"^median of 12 steps: ([\d,]+) tokens/s, MFU ([\d.]+)% of ([\d.]+) TFLOP/s; "
        r"peak memory ([\d.]+) GiB$",
        (undisturbed / "printed.txt").read_text(), flags=re.MULTILINE,
    )  # fmt: skip
    speed, share, peak, memory = (float(text.replace(",", "")) for text in found.groups())
    assert speed == pytest.approx(1 / np.median(1 / np.array(speeds)), abs=1)
    assert share / 100 == pytest.approx(1 / np.median(1 / np.array(shares)), abs=1e-3)
    model = toto.load(undisturbed / "toto.pt")
    flops = 6 * model.count_parameters() + 12 * 4 * 128 * 64  # 4 layers, 128 wide, 64 tokens
    assert share / 100 * peak * 1e12 == pytest.approx(speed * flops, rel=0.05 / share + 0.01 / peak + 0.001)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert 16 * model.count_parameters() / 2**30 < memory <= children / 2**30 + 0.005


@pytest.fixture(scope="session")
def starter():
    """Where processes of their own come from: forks of one that has loaded torch, which start in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train", "pytest", "torch._dynamo"])  # what such a process would import
        multiprocessing.forkserver.ensure_running()
    return context


def program(arguments, output, pause):
    """What such a process does: what `python train.py ...` would, pausing before each step, and prints into a file."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv, take_step = arguments, train.take_step
    train.take_step = lambda *inputs: (time.sleep(pause), take_step(*inputs))[1]
    data.run(train.main)


def start_and_wait(starter, arguments, out, n_lines, pause=0.0):
    """Start a run and come back when its log has so many lines, or when it is over -> (process, file of its output)."""
    output = out.parent / f"{out.name}.txt"
    process = starter.Process(target=program, args=(arguments, output, pause))
    process.start()
    while process.is_alive() and log_lines(out) < n_lines:
        time.sleep(0.002)
    return process, output


def log_lines(out):
    return (out / "log.jsonl").read_text().count("\n") if (out / "log.jsonl").exists() else 0


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_stop_and_resume_exactly(starter, tokens, undisturbed, tmp_path, sign):
    """Asked to stop in the middle, it saves, and the same command ends with the undisturbed run's bits."""
    out, arguments = tmp_path / "out", command(tokens, tmp_path / "out", "--steps", "12")
    process, output = start_and_wait(starter, arguments, out, 7, pause=0.02)
    os.kill(process.pid, sign)
    process.join()
    stopped_at = torch.load(out / "toto.pt", weights_only=True)["step"]
    assert 4 < stopped_at < 12, "the run was not stopped in its middle"
    printed = output.read_text()
    assert process.exitcode == 130 and "Traceback" not in printed
    assert f"stopped and saved at step {stopped_at}; the same command resumes there" in printed
    in_process(*arguments)
    assert losses(out) == losses(undisturbed)
    assert_same_checkpoint(out, undisturbed)


def test_killed_again_and_again(starter, tokens, tmp_path):
    """kill -9 at moments all over a run, in loading, stepping, saving or evaluating: no bit and no line is lost."""
    how = ["--steps", "12", "--save-every", "1", "--keep", "3"]
    whole, out = tmp_path / "undisturbed", tmp_path / "killed"
    in_process(*command(tokens, whole, *how))
    rng, kills = np.random.default_rng(0), 0
    while kills < 5:
        # The run trims its log first, so that this is some steps away.
        process, _ = start_and_wait(starter, command(tokens, out, *how), out, log_lines(out) + 2 + rng.integers(3))
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 3, "the run was over before it could be killed"
    in_process(*command(tokens, out, *how))
    assert losses(out) == losses(whole)
    validations = [
        [line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "validation" in line]
        for folder in (out, whole)
    ]
    assert validations[0] == validations[1] and len(validations[0]) == 12
    assert_same_checkpoint(out, whole)
    steps = [torch.load(folder / "best.pt", weights_only=True)["step"] for folder in (out, whole)]
    assert steps[0] == steps[1] and len(list(out.glob("toto-*.pt"))) == 3


def test_sharded_replicated_and_single_runs_are_one_run(tokens, slow, tmp_path, capsys):
    """Two processes, sharded (FSDP2), then two replicas (DDP), then one: each resumes from the file of the one before.

    The losses are those of one process all the way, up to bfloat16's rounding, which happens at other places. The
    replicas and the last one also split their sequences into micro-batches.
    """
    shards, replicas, last = (tmp_path / name for name in ("shards", "replicas", "last"))
    replicas.mkdir()
    for name, file in (("toto.pt", "toto-3.pt"), ("log.jsonl", "log.jsonl")):  # not there yet
        (replicas / name).symlink_to(shards / file)
    micro = "--micro-batch", "1"
    printed = run_in_a_pair(
        tmp_path,
        command(tokens, shards, *SLOW, "--keep", "9", "--shard", "--recompute"),
        command(tokens, replicas, *SLOW, *micro),
    )
    assert "resuming at step 3" in printed
    last.mkdir()
    shutil.copy(replicas / "toto-6.pt", last / "toto.pt")
    shutil.copy(replicas / "log.jsonl", last)
    in_process(*command(tokens, last, *SLOW, *micro))
    assert "resuming at step 6" in capsys.readouterr().out
    for out in (shards, replicas, last):
        assert losses(out) == pytest.approx(losses(slow), rel=3e-3)
        # A gradient that is summed, not averaged, over processes or micro-batches would be twice as long.
        assert losses(out, "grad_norm") == pytest.approx(losses(slow, "grad_norm"), rel=0.03)
    averages = [torch.load(out / "toto.pt", weights_only=True)["optimizer"] for out in (slow, last)]
    for name, expected in averages[0].items():
        assert averages[1][name]["step"] == expected["step"] == 9
        error = (averages[1][name]["exp_avg"] - expected["exp_avg"]).norm()
        assert error < 0.05 * expected["exp_avg"].norm(), name
    assert {p.name for p in slow.glob("*.pt")} == {"toto.pt", "toto-6.pt", "toto-9.pt", "best.pt", "dvae.pt"}
    assert (slow / "toto-9.pt").read_bytes() == (slow / "toto.pt").read_bytes()


def test_torchrun_starts_lost_processes_again(tokens, tmp_path):
    """One of two is killed before the fourth step: both start again at the last save, and end with the same bits."""
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    commands = [command(tokens, out, "--steps", "6", "--save-every", "2") for out in (whole, lost)]
    # Started again, they have nothing left to do for the first one.
    printed = run_in_a_pair(tmp_path, *commands, kill_before=6 + 3, launcher=(*PAIR, "--max-restarts=1"))
    assert re.findall(r"resuming at step (\d)", printed) == ["6", "2"]
    assert losses(lost) == losses(whole)
    assert_same_checkpoint(lost, whole)


def one_of_a_pair(rank, port, limit_s, wait_s):
    """A process of torchrun's, which waits for another that is slow, and then, for an exchange, for one that is lost.

    Its limits are made seconds.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    data.timedelta = lambda minutes=0, **long: timedelta(seconds=minutes * limit_s / 20, **long)
    time.sleep(0.5 * rank)  # by then the first one has seen what lies in the store
    data.start_processes(CPU)
    time.sleep(wait_s * rank)
    data.wait_for_all()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)  # it neither answers nor ends
    with pytest.raises(RuntimeError, match="Timed out"):
        torch.distributed.all_reduce(torch.ones(1))


def test_a_lost_process_does_not_hang_the_others(starter):
    """Minutes for a step, a day for media; and those who start afresh do not look for those who are gone."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's
    for limit_s, wait_s in ((2, 0), (3, 4)):
        pair = [starter.Process(target=one_of_a_pair, args=(rank, store.port, limit_s, wait_s)) for rank in (0, 1)]
        for process in pair:
            process.start()
        pair[0].join(timeout=20)
        for process in pair:
            process.kill()
        assert pair[0].exitcode == 0


def test_from_media_to_samples(tmp_path, monkeypatch, capsys):
    """A folder of videos and images, one of them broken: everything by one command, then the other programs."""
    for i in range(4):
        (tmp_path / "media").mkdir(exist_ok=True)
        data.iio.imwrite(tmp_path / f"media/{i}.mp4", data.world_clip(i, 9, 48).frames, plugin="FFMPEG", fps=8)
        data.Image.fromarray(data.world_clip(i, 1, 48).frames[0]).save(tmp_path / f"media/{i}.png")
    (tmp_path / "media/broken.mp4").write_bytes((tmp_path / "media/0.mp4").read_bytes()[:200])
    monkeypatch.setattr(dvae, "LAPTOP", replace(dvae.LAPTOP, steps=12))
    small = ["--resolution", 32, "--frames", 4, "--stride", 2, "--batch-tokens", 128, "--warmup", 1, "--device", "cpu"]
    arguments = ["train.py", "--data", tmp_path / "media", "--out", tmp_path / "out", "--steps", 3, *small]
    in_process(*arguments)
    printed = capsys.readouterr()
    assert "training one on the same data" in printed.out
    assert "skipped 1 file(s) that cannot be read: broken.mp4" in printed.err
    written = {"dvae.pt", "dvae.png", "toto.pt", "best.pt", "log.jsonl", "samples.gif", "tokens"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == written
    tokens = data.Tokens(next((tmp_path / "out/tokens").iterdir()))
    assert sorted(tokens.length.tolist()) == [1, 1, 1, 1, 5, 5, 5, 5]
    # Once more: nothing is left to do, and it says so. With other settings it does not resume.
    in_process(*arguments)
    assert "has 3 steps already" in capsys.readouterr().out
    for change, what in (
        (["--seed", 1], "seed is 0, here it is 1"),
        (["--batch-tokens", 256], "sequences in a step is 2"),
    ):
        with pytest.raises(ValueError, match=what):
            in_process(*arguments, *change)
    # The token folder can be made, and the tokenizer looked at, by the other two programs.
    made, tokenizer = tmp_path / "made", tmp_path / "out/dvae.pt"
    how = ["--tokenizer", tokenizer, "--resolution", 32, "--stride", 2]
    in_process("data.py", tmp_path / "media", "--out", made, *how)
    assert np.array_equal(data.Tokens(made).codes(5), tokens.codes(5))
    in_process("dvae.py", "--reconstruct", tmp_path / "media/1.mp4", "--out", tokenizer, "--resolution", 32)
    assert data.Image.open(tmp_path / "out/1-reconstructed.png").size == (3 * (128 + 4), 2 * (128 + 18))


def test_a_folder_of_all_frames_trains_at_the_stride_asked_for(tmp_path, untrained_tokenizer, monkeypatch):
    """§3.4's 4 where nothing is asked. What the checkpoint names is that, which a resumed run must keep."""
    dvae.save(untrained_tokenizer, tmp_path / "dvae.pt")
    data.tokenize(data.world_shards(range(20), 32, n_frames=16), tmp_path / "tokens", untrained_tokenizer, 32, 1)
    folder, seen = data.Tokens(tmp_path / "tokens"), []
    windows = {stride: {folder.codes(clip, first, 4, stride).tobytes(): first % stride
                        for clip in range(20) for first in range(16 - 3 * stride)} for stride in (2, 4)}  # fmt: skip
    take_step = train.take_step
    monkeypatch.setattr(train, "take_step", lambda *inputs: (seen.append(inputs[2]), take_step(*inputs))[1])
    for stride, extra in ((4, []), (2, ["--stride", "2"])):
        out, how = tmp_path / str(stride), ["--steps", "2", "--batch-tokens", "1024"]
        in_process(*command(tmp_path, out, *how, *extra))
        codes = torch.cat(seen)[:, 1:-1].numpy().astype(np.uint16) - toto.FIRST_CODE
        phases = {windows[stride][sequence.tobytes()] for sequence in codes}
        assert phases == set(range(stride)) and toto.load_checkpoint(out / "toto.pt")["stride"] == stride
        seen.clear()
    with pytest.raises(ValueError, match="its stride is 2, here it is 4; give another --out"):
        in_process(*command(tmp_path, out, *how))
    validations = []  # as it was trained, where nothing else is asked for
    for extra in ([], ["--stride", "2"], ["--stride", "4"]):
        in_process(*command(tmp_path, out, "--evaluate", *extra))
        validations.append((out / "validation.json").read_text())
    assert validations[0] == validations[1] != validations[2]


def test_a_diverged_run_stops_before_it_saves(tokens, tmp_path, monkeypatch):
    """It names the sources of all sequences of the step, whatever micro-batch they were in."""
    with pytest.raises(ValueError, match=r"step 2: .* its gradient nan, .*; nothing of it was saved"):
        in_process(*command(tokens, tmp_path / "out", "--steps", "12", "--lr", "1e30"))
    for name in ("a", "b", "c"):
        (tmp_path / name).symlink_to(tokens / "tokens")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "take_step", lambda *inputs: torch.tensor([math.nan, 1.0]))
    # Of four sequences c, at a hundredth, has none yet.
    mixed = ["--data", "a", "b=3", "c=0.04", "--steps", "12", "--micro-batch", "1"]
    with pytest.raises(ValueError, match=r"step 1: the loss is nan, its gradient 1, on sequences of a, b; nothing of"):
        in_process(*command(tokens, tmp_path / "out", *mixed))
    assert not (tmp_path / "out" / "toto.pt").exists()


def test_a_full_disk_loses_nothing(tokens, undisturbed, tmp_path, monkeypatch, capsys):
    """Files may not grow past 5 MB, less than a checkpoint: one line, and the last checkpoint stays as it was."""
    shutil.copytree(undisturbed, tmp_path / "out")
    before = (tmp_path / "out" / "toto.pt").read_bytes()
    monkeypatch.setattr(sys, "argv", command(tokens, tmp_path / "out", "--steps", "16"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 10**6, hard))
    try:
        with pytest.raises(SystemExit) as stop:
            data.run(train.main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert re.fullmatch(r"error: .*/out/(toto|best)\.pt: file too large", error.strip().splitlines()[-1])
    assert (tmp_path / "out" / "toto.pt").read_bytes() == before
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_trim_log(tmp_path):
    """What came after step 4 goes, and that step's validation, which is made again; so does a line that was cut off."""
    log = tmp_path / "log.jsonl"
    assert train.trim_log(log, 0) == math.inf and log.read_text() == ""
    lines = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 2, "validation": {}, "validation_loss": 3.0}]
    lines += [{"step": 3, "loss": 3.5}, {"step": 3, "validation": {}, "validation_loss": 3.25}]
    lines += [{"step": 4, "loss": 2.0}, {"step": 4, "validation": {}, "validation_loss": 1.0}, {"step": 5, "loss": 1.0}]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    assert train.trim_log(log, 4) == 3.0
    assert [json.loads(line) for line in log.read_text().splitlines()] == lines[:6]


def test_best_checkpoint(tokens, tmp_path):
    """best.pt is the save of the lowest validation loss, also over a stop: here a wild rate spoils the later ones."""
    for steps, lr in (("8", "3e-3"), ("12", "1")):
        in_process(*command(tokens, tmp_path, "--steps", steps, "--save-every", "2", "--lr", lr))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    validation = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    best = min(validation, key=validation.get)
    assert set(validation) == {2, 4, 6, 8, 10, 12} and best <= 8
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == best


def bytes_kept(model, B, T):
    """How much the forward pass keeps for the backward pass: all storages that autograd saves, each counted once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # holds on to it, so that no address comes twice
        return tensor

    ids = torch.randint(4, model.config.vocab_size, (B, T + 1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids[:, :-1], ids[:, 1:])
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("config", [
    toto.Config(dim=256, n_heads=4, n_layers=4, hidden=768), toto.Config(dim=128, n_heads=4, n_layers=8, hidden=512),
])  # fmt: skip
def test_memory_needed_against_what_autograd_keeps(config):
    """The activations of 4 x 256 tokens: what 8 x 256 keep more than 4 x 256, since weights are kept only once.

    What is planned is kept, and up to 1.6 times as much: the norms on a CPU also keep float32 copies.
    """
    model, planned, kept = toto.Toto(config, torch.bfloat16), {}, {}
    for model.recompute in (False, True):
        plan = lambda B: train.memory_needed(model, B * 256, recompute=model.recompute)["activations, about"]
        planned[model.recompute] = plan(8) - plan(4)
        kept[model.recompute] = bytes_kept(model, 8, 256) - bytes_kept(model, 4, 256)
    # With recompute the backward pass runs one block again, which then keeps what it would have kept.
    kept[True] += kept[False] / config.n_layers
    for recompute in (False, True):
        assert planned[recompute] < kept[recompute] < 1.6 * planned[recompute]


def test_memory_needed_by_hand():
    """4 bytes a weight for it, for its gradient and for each of two moments, shared by all; 2 for a copy of it."""
    model = toto.Toto(toto.Config(dim=64, n_heads=2, n_layers=3, hidden=96))
    n = 8320 * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64
    assert list(train.memory_needed(model, 0).values()) == [4 * n, 4 * n, 8 * n, 2 * n]
    assert list(train.memory_needed(model, 0, n_shards=4).values()) == [n, n, 2 * n, 0]
    assert list(train.memory_needed(model, 0, recompute=True).values()) == [4 * n, 4 * n, 8 * n, 0]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks(tokens, slow, tmp_path):
    """The same losses, over saves and validations."""
    in_process(*command(tokens, tmp_path, *SLOW, "--compile"))
    assert losses(tmp_path) == pytest.approx(losses(slow), rel=3e-3)


def test_samples_are_of_one_kind(tmp_path, untrained_tokenizer, monkeypatch):
    """Where one video is held out beside many images, only it is continued, after the start token of videos."""
    tokens, seen = fake_tokens(tmp_path / "t", [9, *[1] * 40], grid=(2, 2)), []
    monkeypatch.setattr(data, "is_held_out", lambda names, share: np.full(len(names), True))
    monkeypatch.setattr(tokens, "codes", lambda *args: np.zeros((args[2] if len(args) > 2 else 1, 2, 2), np.uint16))
    generate = toto.Toto.generate
    monkeypatch.setattr(toto.Toto, "generate", lambda *a, **how: seen.append(a[1]) or generate(*a, **how))
    model = toto.Toto(toto.Config(dim=32, n_heads=2, n_layers=1, hidden=32, vocab_size=36))
    args = SimpleNamespace(frames=4, seed=0, out=tmp_path)
    train.write_samples(model, untrained_tokenizer, {"t": data.Source(tokens, 4, held_out=True)}, args)
    assert {len(ids) for ids in seen} == {1} and all(ids[0, 0] == toto.VIDEO_START for ids in seen)
    assert len(data.iio.imread(tmp_path / "samples.gif")) == 9


def test_dry_run(tmp_path, capsys):
    """1b on 64 GPUs, against sums by hand; nothing is written."""
    arguments = ["train.py", "--size", "1b", "--dry-run", "64", "--micro-batch", "4", "--out", tmp_path / "out"]
    in_process(*arguments)
    output = capsys.readouterr().out
    flops = (6 * 1147.24e6 + 12 * 22 * 2048 * 4096) * 953_674 * 2**20
    assert "1,147.24 M parameters" in output and "953,674 steps of 256 sequences of 16 x 256 tokens" in output
    assert "1e+12 tokens" in output and f"{flops:.3g} FLOPs" in output
    assert "in each of 64 processes, 4 sequences a step in micro-batches of 4" in output
    assert f"at 50% of 64 x 989 TFLOP/s (H200): {flops / (0.5 * 64 * 989e12) / 86400:.2f} days" in output
    whole = float(re.search(r"AdamW's moments, float32 +(\S+) GiB", output)[1])
    assert whole == pytest.approx(8 * 1147.5e6 / 2**30, abs=0.02)
    in_process(*arguments, "--shard")
    shard = float(re.search(r"AdamW's moments, float32 +(\S+) GiB", capsys.readouterr().out)[1])
    assert shard == pytest.approx(whole / 64, abs=0.01) and not (tmp_path / "out").exists()


def test_readme_fine_tunes_as_table_4(capsys):
    """§4.1: one epoch of ImageNet's 1.28 million images at 32 x 32 tokens, at less than the rate of pre-training."""
    (line,) = re.findall(r"^python (train\.py --init-from .*)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert "--rope-base 50000" in line and float(re.search(r"--lr (\S+)", line)[1]) < train.PAPER["lr"]
    in_process(*line.split(), "--dry-run", "1")
    assert "1,251 steps of 256 sequences of 4 x 1024 tokens: 1.31e+09 tokens" in capsys.readouterr().out
    steps = int(re.search(r"--steps (\d+)", line)[1])
    assert steps * train.PAPER["batch_tokens"] == pytest.approx(1_281_167 * 32 * 32, rel=1e-3)


def width_slopes(mup_width, lr, seed, batch, is_random):
    """d log(how much five AdamW steps change what attention and what MLP write) / d log(width), from 64 to 256."""
    widths, changes = (64, 128, 256), []
    for dim in widths:
        torch.manual_seed(seed)
        ids = torch.randint(0, 28, (batch, 65))  # sequences of noise, or that count up from their first code
        ids = 4 + (ids if is_random else ids[:, :1] + torch.arange(65)) % 28
        model = toto.Toto(toto.Config(dim, 4, 2, 4 * dim, 32, mup_width=mup_width))
        optimizer = train.make_optimizer(model, lr)
        written = []  # (attention, MLP, attention, MLP) of a pass, each (B, T, D)
        for block in model.blocks:
            for part in (block.attention, block.mlp):
                part.register_forward_hook(lambda part, inputs, output: written.append(output.detach()))
        for _ in range(5):
            train.take_step(model, optimizer, ids, batch, CPU)
        with torch.no_grad():
            model(ids[:, :-1])
        moved = torch.stack(written[-4:]) - torch.stack(written[:4])
        changes.append(moved.square().mean(dim=(1, 2, 3)).sqrt().view(2, 2).mean(dim=0).log().tolist())
    return np.polyfit(np.log(widths), np.array(changes), 1)[0]


@pytest.mark.parametrize("mup_width", [0, 32, 64, 128])
def test_mup_coordinates(mup_width):
    """A.5: under µP training changes what a layer writes as much at every width; without, more in wider ones.

    In the limit of large widths the slope is 0. Here slopes lie within ±0.25 in all 144 settings with rate · base width
    <= 1/4, and in 41 of the 96 above that; without µP all 80 exceed 0.6. FULL_SIZE=1 python -m pytest -s
    tests/test_train.py -k coordinates runs them all: three base widths, five rates, four seeds, two batches, two kinds
    of data. The bound was chosen after the sweep. Else a few of these are run.
    """
    low, high = (-0.25, 0.25) if mup_width else (0.5, math.inf)
    rates, settings = [0.25 / (mup_width or 64)], [(0, 4, False), (1, 4, True)]
    if "FULL_SIZE" in os.environ:
        rates, settings = 2.0 ** np.arange(-10, -5), list(itertools.product(range(4), (4, 8), (False, True)))
    for rate in rates:
        slopes = np.array([width_slopes(mup_width, rate, *setting) for setting in settings])
        passed = ((low < slopes) & (slopes < high)).all(axis=1)
        words = f"base width {mup_width}, rate {rate:g}: slopes from {slopes.min():.2f} to {slopes.max():.2f}"
        print(f"{words}, {passed.sum()} of {len(passed)} settings pass")
        assert passed.all() or mup_width * rate > 0.25


def test_mup_from_the_command_line(tokens, tmp_path):
    """The checkpoint remembers it; a run that resumes without it is refused, in one line that says so."""
    in_process(*command(tokens, tmp_path, "--mup", "64", "--steps", "1"))
    assert toto.load(tmp_path / "toto.pt").config.mup_width == 64
    with pytest.raises(ValueError, match="its mup_width is 64, here it is 0; give another --out"):
        in_process(*command(tokens, tmp_path, "--steps", "2"))


def test_mup_changes_nothing_at_its_base_width():
    ids = torch.randint(4, 36, (2, 20))
    results = []
    for mup_width in (0, 32):
        torch.manual_seed(0)
        model = toto.Toto(toto.Config(32, 2, 2, 64, 36, mup_width=mup_width))
        results.append((model(ids), [group["lr"] for group in train.make_optimizer(model, 0.1).param_groups]))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


@pytest.mark.parametrize("dim", [32, 64, 256])
def test_mup_leaves_the_decay_as_it_is(dim):
    """Where no gradient moves them, all matrices shrink by 1 - rate · 0.1 in a step, at any width."""
    model = toto.Toto(toto.Config(dim, 2, 1, 2 * dim, 36, mup_width=32))
    optimizer = train.make_optimizer(model, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (0.95 if p.dim() == 2 else 1), msg=name)


@pytest.mark.parametrize("dim", [16, 32, 64, 128])
def test_mup_against_microsofts(dim):
    """Microsoft's mup on the same weights: rate and decay of every one, initial weights, and the tied output layer."""
    mup = pytest.importorskip("mup", reason="pip install --no-deps mup==1.0.0 to compare with Microsoft's own µP")
    # It tells width from other sizes by comparing two models; a head is a part of the width, their number is not.
    build = lambda dim: toto.Toto(toto.Config(dim, 2, 2, 4 * dim, 36, mup_width=32))
    model = mup.set_base_shapes(build(dim), build(32), delta=build(64))
    groups = train.make_optimizer(model, 0.1).param_groups
    # Which weights decay at all is LLaMA's choice; µP says how much.
    of = lambda n_dims: [p for p in model.parameters() if p.dim() == n_dims]
    decays = [{"params": of(2), "weight_decay": 0.1}, {"params": of(1), "weight_decay": 0.0}]
    theirs = mup.MuAdamW(decays, lr=0.1).param_groups
    names = {p: name for name, p in model.named_parameters()}
    settings = lambda groups: {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    expected, found = settings(theirs), settings(groups)
    assert expected.keys() == found.keys() == set(names.values())
    for name in expected:
        assert found[name] == pytest.approx(expected[name]), name

    torch.manual_seed(0)
    model.init_weights()
    ours = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            mup.init.normal_(p, std=0.01 if name.endswith("out.weight") else 0.02)  # √(2L) = 2
        torch.testing.assert_close(p, ours[name], msg=name)
    # MuSharedReadout is their output layer for tied embeddings.
    x, readout = torch.randn(3, dim), mup.MuSharedReadout(model.embedding.weight, bias=False)
    torch.testing.assert_close(model.logits(x), readout(model.norm(x))[:, :36])
    # For attention they have no layer, but ask for 1/d in place of 1/√d, with a factor that makes both the same at the
    # base width, whose heads have d = 16 here.
    q, k, v = torch.randn(3, 1, 2, 5, dim // 2)
    attended = (q @ k.mT * math.sqrt(16) / (dim // 2)).softmax(dim=-1) @ v
    torch.testing.assert_close(toto.attend(q, k, v, False, model.config.mup_ratio), attended)


def test_fit_resumes_exactly(tmp_path, monkeypatch):
    """The bare loop of paper/'s scripts: stopped by a signal after 3 steps of 6, it ends with the same bits."""
    args = SimpleNamespace(lr=1e-2, warmup=1, steps=6, micro_batch=2, recompute=False, compile=False, shard=False)
    args.save_every = 4
    batches = torch.randint(4, 40, (6, 4, 9), generator=torch.Generator().manual_seed(0))

    def weights(path, stop_at=None):
        torch.manual_seed(0)
        model = toto.Toto(toto.Config(dim=32, n_heads=4, n_layers=2, hidden=48, vocab_size=40))

        def read_batch(step):
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            return batches[step]

        train.fit(model, read_batch, args, torch.device("cpu"), path, {"steps": 6}, "small")
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = weights(tmp_path / "a.pt")
    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "b.pt", stop_at=2)
    assert torch.load(tmp_path / "b.pt", weights_only=True)["step"] == 3
    assert torch.equal(weights(tmp_path / "b.pt"), whole)
    monkeypatch.setattr(train, "take_step", lambda *inputs: torch.tensor([float("nan"), 1.0]))
    with pytest.raises(FloatingPointError, match="small, step 1: the loss is nan"):
        weights(tmp_path / "c.pt")


def test_schedule():
    """§3.2: warm-up to the peak, then a cosine, here down to a tenth."""

    class args:
        lr, warmup, steps = 3e-4, 2000, 10_000

    assert train.learning_rate(0, args) == pytest.approx(3e-4 / 2000)
    assert train.learning_rate(1999, args) == pytest.approx(3e-4) == train.learning_rate(2000, args)
    assert train.learning_rate(6000, args) == pytest.approx(3e-4 * 0.55)
    assert train.learning_rate(10_000, args) == pytest.approx(3e-5)


def test_optimizer_follows_the_paper():
    model = toto.Toto(toto.SIZES["tiny"])
    groups = train.make_optimizer(model, 3e-4).param_groups
    assert all(g["betas"] == (0.9, 0.95) and g["lr"] == 3e-4 for g in groups)
    assert {(g["weight_decay"], p.dim()) for g in groups for p in g["params"]} == {(0.1, 2), (0.0, 1)}
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in model.parameters())


def test_paper_settings():
    assert train.PAPER | {"save_every": 0} == {
        "resolution": 128, "frames": 16, "batch_tokens": 1_048_576, "steps": 953_674, "lr": 3e-4, "warmup": 2000,
        "save_every": 0,
    }  # fmt: skip
    # §3.3: 1 trillion tokens.
    assert train.PAPER["steps"] * train.PAPER["batch_tokens"] == pytest.approx(1e12, rel=1e-5)


def test_evaluate_by_hand(tokens):
    """Loss by frame, accuracies and entropy against a plain count over all held-out sequences."""
    folder = data.Tokens(tokens / "tokens")
    source = data.Source(folder, 4, True, 0.2)
    torch.manual_seed(0)
    model = toto.Toto(toto.Config(dim=32, n_heads=2, n_layers=1, hidden=32, vocab_size=36))
    torch.nn.init.normal_(model.embedding.weight)
    result = train.evaluate(model, {"x": source}, 3, CPU, by_position=True)["x"]
    nll, end, right, same, codes = [], [], [], [], []
    for k in range(len(source)):
        ids, n_real = source.sequence(k, source.images)
        assert n_real == 4
        p = model(torch.as_tensor(ids[None, :-1])).softmax(-1)[0].detach().numpy()
        nll.append([-np.log(p[i, ids[i + 1]]) for i in range(64)])
        end.append(-np.log(p[64, toto.END]))
        right.append([p[i].argmax() == ids[i + 1] for i in range(16, 64)])
        same.append([ids[i + 1] == ids[i + 1 - 16] for i in range(16, 64)])
        codes.extend(ids[1:-1])
    share = np.bincount(codes) / len(codes)
    share = share[share > 0]
    # Eq. 2 as training has it, over codes and the end token; all else is of the codes.
    assert result["loss"] == pytest.approx((64 * np.mean(nll) + np.mean(end)) / 65, rel=1e-4)
    ids = torch.as_tensor(np.stack([source.sequence(k, source.images)[0] for k in range(len(source))]))
    assert result["loss"] == pytest.approx(model(ids[:, :-1], ids[:, 1:]).item(), rel=1e-4)
    by_frame = np.array(nll).reshape(-1, 4, 16).mean(axis=(0, 2))
    assert result["loss_by_frame"] == pytest.approx(by_frame.tolist(), rel=1e-3)
    assert result["loss_by_token"] == pytest.approx(np.mean(nll, axis=0).tolist(), rel=1e-4)
    assert result["accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
    assert result["repeat_accuracy"] == pytest.approx(np.mean(same), abs=1e-6)
    assert result["unigram_entropy"] == pytest.approx(-(share * np.log(share)).sum(), rel=1e-4)


def test_what_only_fills_up_is_not_scored(tmp_path, monkeypatch, capsys):
    """Of a short video the repeats of its last frame, of few images their second turn, and no [2] after those."""
    monkeypatch.setattr(data, "is_held_out", lambda names, share: np.ones(len(names), dtype=bool))
    logits = torch.randn(8196, 8196, generator=torch.Generator().manual_seed(0))
    model = lambda ids: logits[ids]
    nll = lambda ids: torch.nn.functional.cross_entropy(logits[ids[:-1]], ids[1:], reduction="none").tolist()
    sequence = lambda start, *codes: torch.tensor([start, *(4 + code for code in codes for _ in range(6))])
    end = torch.tensor([toto.END])
    # Frame f of clip c is six times the code 100 c + f.
    cases = {
        "mixed": ([9, 2, 1], [torch.cat((sequence(1, 0, 1, 2, 3), end)), torch.cat((sequence(1, 4, 5, 6, 7), end)),
                              sequence(1, 100, 101), sequence(3, 200)]),
        "short": ([2, 3], [sequence(1, 0, 1), sequence(1, 100, 101, 102)]),
        "images": ([1, 1], [sequence(3, 0, 100)]), "image": ([1], [sequence(3, 0)]),
    }  # fmt: skip
    for name, (lengths, real) in cases.items():
        source = data.Source(fake_tokens(tmp_path / name, lengths), 4, held_out=True)
        assert len(source) == len(real)
        results = train.evaluate(model, {"x": source}, 3, CPU, by_position=True)
        result, losses = results["x"], [nll(ids) for ids in real]
        assert result["loss"] == pytest.approx(np.mean(sum(losses, [])), rel=1e-4)
        n_frames = max(len(ids) // 6 for ids in real)
        for f, loss in enumerate(result["loss_by_frame"]):
            of_frame = [x[6 * f : 6 * f + 6] for x in losses if len(x) >= 6 * f + 6]
            assert loss == pytest.approx(np.mean(of_frame), rel=1e-3)
        assert len(result["loss_by_token"]) == 6 * n_frames
        codes = torch.cat([ids[ids > 3] for ids in real]).tolist()
        assert result["unigram_entropy"] == pytest.approx(np.log(len(codes) / 6), rel=1e-4)  # each code six times
        assert result["repeat_accuracy"] == (None if name == "image" else 0)  # no frame is as the one before
        train.print_results(results)
    assert "nan" not in capsys.readouterr().out


def test_evaluate_a_checkpoint(tokens, undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed, tmp_path / "out")
    before = (tmp_path / "out" / "log.jsonl").read_bytes()
    in_process(*command(tokens, tmp_path / "out", "--evaluate"))
    (result,) = json.loads((tmp_path / "out" / "validation.json").read_text()).values()
    output = capsys.readouterr().out
    assert len(result["loss_by_token"]) == 64 and f": {result['loss']:.3f} nats per token" in output
    assert "  by frame " + " ".join(f"{loss:.3f}" for loss in result["loss_by_frame"]) in output
    assert (tmp_path / "out" / "log.jsonl").read_bytes() == before
    # Without --data, and at its stride and resolution: those of its training.
    (tmp_path / "out" / "validation.json").unlink()
    in_process("train.py", "--evaluate", "--out", tmp_path / "out", "--frames", "4", "--device", "cpu")
    assert json.loads((tmp_path / "out" / "validation.json").read_text()) == {str(tokens / "tokens"): result}
    assert f"evaluating on its training data, {tokens / 'tokens'}\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no such checkpoint to evaluate"):
        in_process(*command(tokens, tmp_path / "none", "--evaluate"))


def test_export(undisturbed, tmp_path, capsys):
    """The checkpoint as a folder that transformers reads, with the same logits."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers to compare with its Llama")
    in_process("train.py", "--export", tmp_path / "hf", "--out", undisturbed)
    assert f"wrote {tmp_path / 'hf'}" in capsys.readouterr().out
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    model = toto.load(undisturbed / "toto.pt")
    assert isinstance(llama, transformers.LlamaForCausalLM)
    ids = torch.randint(0, model.config.vocab_size, (2, 65))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), llama(ids).logits, atol=1e-4, rtol=1e-4)


def test_start_from_other_weights(tokens, undisturbed, tmp_path):
    """Table 4: a run that starts from a checkpoint begins where that one ended, with another RoPE base if asked."""
    start = ["--init-from", str(undisturbed / "toto.pt"), "--lr", "1e-9"]
    in_process(*command(tokens, tmp_path / "on", *start, "--steps", "1"))
    assert losses(tmp_path / "on")[0] < losses(undisturbed)[0] - 0.3
    in_process(*command(tokens, tmp_path / "base", *start, "--rope-base", "50000", "--steps", "1"))
    assert toto.load(tmp_path / "base" / "toto.pt").config.rope_base == 50_000
    assert losses(tmp_path / "base") != losses(tmp_path / "on")
    with pytest.raises(ValueError, match="its dim is 128, here it is 256"):
        in_process(*command(tokens, tmp_path / "other", *start, "--size", "a1"))


def test_specs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a=b").mkdir()
    assert train.parse_spec("a/b") == ["a/b", 1.0] and train.parse_spec("a/b=0.6") == ["a/b", 0.6]
    assert train.parse_spec("a=b") == ["a=b", 1.0] and train.parse_spec("a=b=2") == ["a=b", 2.0]
    assert train.parse_spec("world") == ["world", 1.0] and train.parse_spec("world=0.5") == ["world", 0.5]
    for spec in ("a=0", "a=-1", "a=inf", "a=nan"):
        with pytest.raises(ValueError, match="a weight must lie between"):
            train.parse_spec(spec)
    with pytest.raises(ValueError, match="'much' is not a number"):
        train.parse_spec("a=much")
    for spec in ("c", "c=0.5", "=0.5"):
        with pytest.raises(ValueError, match="no such file or folder"):
            train.parse_spec(spec)


def test_a_refused_run_leaves_its_folder_as_it_was(tokens, undisturbed, tmp_path, untrained_tokenizer):
    """Other tokens and another tokenizer with the same --out: nothing that the trained model needs is overwritten."""
    shutil.copytree(undisturbed, tmp_path / "out")
    torch.manual_seed(1)
    other = dvae.DVAE(untrained_tokenizer.config)
    dvae.save(other, tmp_path / "other" / "dvae.pt")
    data.tokenize(data.world_shards(range(60), 32, n_frames=4), tmp_path / "other" / "tokens", other, 32, 4)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    both = ["--data", str(tokens / "tokens"), str(tmp_path / "other" / "tokens")]
    with pytest.raises(ValueError, match="its tokenizer is .*/tokens is of another kind"):
        in_process(*command(tokens, tmp_path / "out", *both))
    with pytest.raises(ValueError, match="its tokenizer is .*; give another --out"):
        in_process(*command(tmp_path / "other", tmp_path / "out"))
    (tmp_path / "out" / "toto.pt").rename(tmp_path / "toto.pt")
    with pytest.raises(ValueError, match="is another tokenizer than --tokenizer"):
        in_process(*command(tmp_path / "other", tmp_path / "out", "--steps", "1"))
    (tmp_path / "toto.pt").rename(tmp_path / "out" / "toto.pt")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


TRAINED = "--checkpoint {done}/toto.pt --tokenizer {tokens}/dvae.pt"
BAD_INPUT = {
    "train.py --size huge": "argument --size: invalid choice: 'huge' (choose from ",
    "train.py --data {tmp}/missing": "{tmp}/missing: no such file or folder",
    "train.py --data {tmp}/empty": "{tmp}/empty: no images or videos here",
    "train.py --data {tokens}/tokens --tokenizer {tmp}/other.pt": "was made by another tokenizer",
    "train.py --tokenizer {tmp}/noise.pt": "{tmp}/noise.pt is not a tokenizer of dvae.py",
    "train.py --tokenizer {tmp}/none.pt": "{tmp}/none.pt: no such file",
    "train.py --device abacus": "--device abacus: Expected one of",
    "train.py --device meta": "--device meta: choose cpu, cuda or mps",
    "train.py --device cuda": "--device cuda: this machine, or this build of PyTorch, has none",
    "train.py --lr -1": "argument --lr: must be above 0",
    "train.py --data {tokens}/tokens --resolution 64": "its resolution is 32, here it is 64; a token folder",
    "train.py --out {tmp}/noise.pt": "argument --out: {tmp}/noise.pt is a file",
    "train.py --data {tokens}/tokens --stride 2": "{tokens}/tokens: was stored at stride 4, which cannot give stride 2",
    "train.py --shard": "--shard splits a model over processes; start several with torchrun",
    "train.py --seed -1": "argument --seed: must be at least 0",
    "train.py --rope-base -5": "argument --rope-base: must be above 0",
    "train.py --size base --dry-run 3": "3 processes cannot share the 256 sequences of a step evenly",
    "train.py --resolution 60": "argument --resolution: must be a multiple of 8",
    "train.py --frames 1": "argument --frames: must be at least 2",
    "train.py --steps 0": "argument --steps: must be at least 1",
    "train.py --steps many": "argument --steps: invalid int value: 'many'",
    "train.py --export {tmp}/hf": "{tmp}/out/toto.pt: no such file",
    "train.py --export {tmp}/hf --out {tmp}/noise": "{tmp}/noise/toto.pt is not a checkpoint written by train.py",
    "train.py --evaluate": "{tmp}/out/toto.pt: no such checkpoint to evaluate",
    "data.py {tmp}/empty --out {tmp}/t --tokenizer {tokens}/dvae.pt": "{tmp}/empty: no images or videos here",
    "data.py {tmp} --out {tmp}/t --tokenizer {tokens}/dvae.pt": "none of the media files could be read",
    "data.py {tmp} --out {tokens} --tokenizer {tokens}/dvae.pt": "which is none of a token folder's files",
    "data.py {tmp} --out {tmp}/t --tokenizer {tmp}/none.pt": "{tmp}/none.pt: no such file",
    "probe.py --checkpoint {tmp}/none.pt": "{tmp}/none.pt: no such file; train.py makes one",
    "probe.py --data {tmp}/none " + TRAINED: "{tmp}/none/train: no such folder; --data needs train/<class>/*",
    "sample.py --checkpoint {done}/toto.pt --tokenizer {tmp}/none.pt": "give the model's tokenizer with --tokenizer",
    "sample.py --frames 4 " + TRAINED: "--frames 4: the prompt gives 4; ask for more",
    "sample.py --imagine --prompt {tmp}/noise.mp4": "--imagine gives nothing: leave out --prompt",
    "probe.py --checkpoint {tmp}/noise.pt --tokenizer {tokens}/dvae.pt": "{tmp}/noise.pt is not a checkpoint",
    "probe.py --checkpoint {done}/toto.pt --tokenizer {tmp}/other.pt": "{tmp}/other.pt is not the tokenizer of {done}",
    "probe.py --layer 99 " + TRAINED: "--layer 99: this model has layers 0 (the embedding) to 4",
    "probe.py --layer x " + TRAINED: "--layer x: give mid, all, a number",
    "probe.py --data {tmp}/empty " + TRAINED: "{tmp}/empty/train: no such folder",
    "probe.py --attention full": "--attention full needs --finetune full",
    "probe.py --views 10x2": "argument --views: give clips x crops, with 1 or 3 crops",
    "probe.py --views 10x3": "--views, --crops: a clip of the built-in world is one view",
    "probe.py --crops 2": "--views, --crops: a clip of the built-in world is one view",
    "probe.py --finetune full " + TRAINED: "--finetune full: the trunk learns for one head",
    "probe.py --finetune both " + TRAINED: "--finetune both: the trunk learns for one head",
    "probe.py --baselines --finetune joint": "--baselines are frozen",
    "sample.py --prompt {tmp}/none.mp4 " + TRAINED: "{tmp}/none.mp4: no such file",
    "sample.py --prompt {tmp}/noise.mp4 " + TRAINED: "{tmp}/noise.mp4: cannot be read as an image or a video",
    "sample.py --prompt {tmp}/empty " + TRAINED: "{tmp}/empty: no images or videos here",
    "sample.py --score 2 --imagine": "--score: what is imagined has no truth",
    "sample.py --temperature nan": "argument --temperature: must be finite",
    "sample.py --temperature -1": "argument --temperature: must be at least 0",
    "sample.py --top-k -1": "argument --top-k: must be at least 0",
    "dvae.py --reconstruct {tmp}/none.png --out {tokens}/dvae.pt": "{tmp}/none.png: no such file",
    "sample.py --top-p 0": "argument --top-p: must be above 0",
    "sample.py --top-p 1.1": "--top-p: a probability, at most 1",
    "sample.py --prompt-frames 20": "--prompt-frames must be less than --frames",
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_clear_line(command, untrained_tokenizer, tokens, undisturbed, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "noise.mp4").write_bytes(b"noise")
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "toto.pt").write_bytes(b"noise")
    dvae.save(dvae.DVAE(untrained_tokenizer.config), tmp_path / "other.pt")
    fill = lambda text: text.format(tmp=tmp_path, tokens=tokens, done=undisturbed)
    script, *arguments = fill(command).split()
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        data.run(__import__(script.removesuffix(".py")).main)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "error: " in error and fill(BAD_INPUT[command]) in error
    assert not (tmp_path / "out").exists()
