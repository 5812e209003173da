import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the six scripts are modules of the folder above

import data
import dvae


# One thread, here and in the programs that tests start: models are tiny, and with more threads than free cores a step
# takes a hundred times as long, since threads then mostly wait for one another.
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores what tests send
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
PAIR = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")


def run(arguments, launcher=(sys.executable,), status=0):
    """Run a program as a user does, in a process of its own."""
    # One that hangs fails.
    how = {"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*launcher, *arguments], **how)
    assert done.returncode == status, done.stderr[-2000:]
    return done


def fake_tokens(folder, lengths, grid=(2, 3), names=None, stride=4):
    """A token folder whose frame f of clip c is full of the code 100 c + f."""
    folder.mkdir()
    meta = {"shards": 1, "grid": list(grid), "tokenizer": "x", "vocab_size": 8192, "source": str(folder)}
    (folder / "meta.json").write_text(json.dumps(meta | {"stride": stride}))
    codes = [np.full(grid, 100 * c + f, np.uint16) for c, n in enumerate(lengths) for f in range(n)]
    np.save(folder / "00000.npy", np.stack(codes))
    names = names or [f"clip{c}" for c in range(len(lengths))]
    (folder / "00000.json").write_text(json.dumps({"names": names, "lengths": list(lengths), "labels": {}}))
    return data.Tokens(folder)


@pytest.fixture(scope="session")
def untrained_tokenizer():
    """A small tokenizer with random weights, 32 codes, of which it uses many: each logit is 0 on average."""
    torch.manual_seed(0)
    model = dvae.DVAE(dvae.Config(n_hid=8, blocks_per_group=1, n_init=4, vocab_size=32, residual_gain=1.0)).eval()
    frames = np.concatenate([data.world_clip(i, 1, 32).frames for i in range(50)])
    with torch.no_grad():
        logits = model.encoder(model.prepare(frames))
        model.encoder.blocks.output.conv.b -= logits.mean(dim=(0, 2, 3))
    assert len(model.encode(frames).unique()) > 16
    return model
