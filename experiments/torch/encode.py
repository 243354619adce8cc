"""The codec's choice and error feedback in PyTorch, as fast as its operations go: parameters per second.

    encode.py THREADS FOLDER

FOLDER holds `error`, `start` and `end`: little-endian f32, whole chunks of 4,096 values. The bits are not written: PyTorch
has nothing for that, so what is timed here is less than what ours does.
"""
import json
import statistics
import sys
import time
from pathlib import Path

import numpy
import torch

CHUNK, KEPT, DECAY, REPEATS = 4096, 64, 0.95, 5


def encode(error, start, end):
    """Indices and signs of the largest values of every chunk, and each chunk's magnitude; `error` moves on."""
    error.mul_(DECAY).add_(start).sub_(end)
    _, indices = torch.topk(error.abs(), KEPT, dim=1, sorted=False)
    indices = indices.sort(dim=1).values
    values = error.gather(1, indices)
    magnitudes = values.abs().mean(dim=1, keepdim=True)
    signs = values.sign()
    error.scatter_add_(1, indices, -signs * magnitudes)
    return indices, signs, magnitudes


def main():
    threads, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(threads)
    states = [torch.from_numpy(numpy.fromfile(folder / name, dtype="<f4")).view(-1, CHUNK)
              for name in ("error", "start", "end")]
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        encode(*states)
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"parameters_per_second": states[0].numel() / statistics.median(seconds[1:])}))


main()
