import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the six scripts are modules of the folder above

import data
import dvae


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
