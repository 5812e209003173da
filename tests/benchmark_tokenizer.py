"""How fast media become tokens, beside OpenAI's own encoder and beside decoding alone. Not a test: run it by hand.

    python tests/benchmark_tokenizer.py MEDIA [--resolution 128]     needs pip install --no-deps DALL-E attrs requests

At the published size, with random weights (the time does not depend on them) that both encoders share.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import dvae


def frames_per_second(function, frames, batch=8, seconds=10):
    """Best of several batches within the time: the machine may be busy with other things."""
    best, started, i = 0, time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        chunk = frames[(i * batch) % (len(frames) - batch) :][:batch]
        before = time.perf_counter()
        function(chunk)
        best, i = max(best, batch / (time.perf_counter() - before)), i + 1
    return best


def main():
    import dall_e

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("media")
    parser.add_argument("--resolution", type=dvae.frame_side, default=128)
    args = parser.parse_args()
    device = data.pick_device()
    shards = data.media_shards(args.media, args.resolution, stride=4)
    items = [item for shard in shards for item in shard]

    started, n_frames, frames = time.perf_counter(), 0, []
    for _, entries in data.read_ahead(items):
        for _, frame in entries:
            n_frames += 1
            if len(frames) < 64:
                frames.append(data.crop(frame, args.resolution))
    reading = n_frames / (time.perf_counter() - started)
    frames = np.stack(frames)
    print(f"decoding, resizing and cropping alone: {reading:,.0f} frames/s of {n_frames:,}")

    torch.manual_seed(0)
    with torch.no_grad():
        theirs = dall_e.encoder.Encoder().to(device)
        pixels = lambda chunk: torch.as_tensor(chunk, device=device).permute(0, 3, 1, 2).float() / 255
        package = frames_per_second(lambda x: theirs(dall_e.map_pixels(pixels(x))).argmax(dim=1).cpu(), frames)
        print(f"DALL-E package, float32: {package:.2f} frames/s")
        for dtype in dict.fromkeys((torch.float32, data.fast_dtype(device))):
            ours = dvae.DVAE(dvae.Config(), dtype).to(device).eval()
            ours.encoder.load_state_dict(theirs.state_dict())
            ours = ours.to(memory_format=torch.channels_last)
            codes = theirs(dall_e.map_pixels(pixels(frames[:8]))).argmax(dim=1).cpu()
            same = (ours.encode(frames[:8]).cpu() == codes).float()
            speed = frames_per_second(lambda x: ours.encode(x).cpu(), frames)
            print(f"dvae.py, {str(dtype)[6:]}: {speed:.2f} frames/s, {speed / package:.2f} of the package's")
            print(f"  codes equal to the package's: {same.mean():.1%}")

    small = dvae.DVAE(dvae.SMALL, data.fast_dtype(device)).to(device).eval()
    alone = frames_per_second(lambda x: small.encode(x).cpu(), np.tile(frames, (4, 1, 1, 1)), batch=64)
    started = time.perf_counter()
    codes = [data.encode_shard(shard, small, args.resolution, 1, data.tqdm(disable=True))[0] for shard in shards]
    together = sum(map(len, codes)) / (time.perf_counter() - started)
    print(f"small tokenizer: {alone:,.0f} frames/s alone, {together:,.0f} with decoding")


if __name__ == "__main__":
    main()
