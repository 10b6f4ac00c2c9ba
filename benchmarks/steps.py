"""Measure what each trick of mnist.py for speed is worth: two processes, with it and without it, train in turn.

Usage, in the folder of mnist.py, with nothing else running:
    python -m benchmarks.steps
    python -m benchmarks.steps --device cuda --pairs 1000 --out steps.json
"""

import argparse
import io
import json
import math
import multiprocessing
import statistics
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import mnist
from benchmarks import command_of, commit, machine, positive

import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torchvision import transforms

WARM_UP = 60  # pairs of steps before the first that counts
PAUSE = 0.05  # seconds before each step: after one, OpenMP's threads spin for a while and slow the other process


def pool_last(self, x):
    """Do what mnist.Net.forward() does, with each ReLU before its max-pooling."""
    x = F.relu(self.bn1(self.conv1(x)))
    x = self.pool1(F.relu(self.bn2(self.conv2(x))))
    x = self.dropout(self.squeeze1(x))
    x = F.relu(self.bn3(self.conv3(x)))
    x = self.pool2(F.relu(self.bn4(self.conv4(x))))
    x = self.squeeze2(x)
    x = F.relu(self.bn5(self.conv5(x)))
    x = F.relu(self.bn6(self.conv6(x)))
    x = F.relu(self.bn7(self.squeeze3(x)))
    return self.fc(x.flatten(1))


def augment_one_by_one(images):
    """Rotate, shift, scale and shear images (B, 28, 28) one after another, as a DataLoader commonly does."""
    shift, scale = mnist.SHIFT / 28, (1 - mnist.SCALE, 1 + mnist.SCALE)
    move = transforms.RandomAffine(mnist.ROTATION, (shift, shift), scale, shear=6)  # degrees: mnist.SHEAR's
    moved = [transforms.functional.pil_to_tensor(move(Image.fromarray(image))) for image in images.cpu().numpy()]
    return torch.cat(moved).to(images.device, torch.float32)


TRICKS = {  # and what stands in for each of them
    "bfloat16": (mnist, "has_bfloat16", lambda _: False),
    "channels_last": (torch, "channels_last", torch.contiguous_format),
    "max-pooling before ReLU": (mnist.Net, "forward", pool_last),
    "freed memory kept": (mnist, "keep_freed_memory", lambda: None),
    "whole batches augmented": (mnist, "augment", augment_one_by_one),
    "the step as a CUDA graph": (mnist, "GraphedStep", lambda step, _: step),
}


def train(without, options, turns):
    """Run mnist.py, `without` one of the TRICKS unless that is None, until the connection `turns` is closed.

    For each message it takes a step, and answers with the step's milliseconds.
    """
    sample, hidden = mnist.train_batches, io.StringIO()

    def sample_in_turn(*args):
        for index in sample(*args):
            turns.recv()
            start = time.perf_counter()
            yield index
            turns.send(1000 * (time.perf_counter() - start))

    mnist.train_batches = sample_in_turn
    if without:
        setattr(*TRICKS[without])
    with suppress(EOFError, ConnectionError, KeyboardInterrupt), redirect_stdout(hidden), redirect_stderr(hidden):
        mnist.main(options)


def time_pairs(trick, options, count):
    """Return the milliseconds of `count` pairs of training steps, each with a trick and without it (N, 2).

    Raises UserError if one of the two processes ends.
    """
    context, turns = multiprocessing.get_context("spawn"), []  # forked, they could not use CUDA
    for without in (None, trick):
        ours, theirs = context.Pipe()
        context.Process(target=train, args=(without, options, theirs)).start()
        theirs.close()
        turns.append(ours)

    def step(turn):
        time.sleep(PAUSE)
        turn.send(None)
        return round(turn.recv(), 3)

    try:
        return [[step(turn) for turn in turns] for _ in range(WARM_UP + count)][WARM_UP:]
    except (EOFError, ConnectionError):
        raise mnist.UserError("a training process has ended: see its error above") from None
    finally:
        for turn in turns:
            turn.close()


RUN = mnist.EPOCHS * (mnist.TRAIN_SIZE // mnist.BATCH_SIZE)  # steps
HEAD = ("trick", "step with it", "step without it", "ratio (95 % interval)", f"saved in {RUN:,} steps")


def cells(trick, pairs):
    """Return a row of the table, under HEAD, of the milliseconds of a step with and without a trick (N, 2).

    The times and the ratio are medians, the interval is the sign test's; of fewer than six pairs there is none.
    """
    with_it, without = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = [slow / fast for fast, slow in pairs]
    low, high = stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)
    interval = "" if math.isnan(low) else f" ({low:.2f} to {high:.2f})"
    ratio, saved = f"{statistics.median(ratios):.2f}{interval}", RUN / 1000 * (without - with_it)
    return trick, f"{with_it:.1f} ms", f"{without:.1f} ms", ratio, f"{saved:.0f} s"


def main(argv=()):
    """Print a table. Returns, by the name of each trick, the milliseconds of a step with it and without it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps", description="Measure what each trick for speed is worth."
    )
    add = parser.add_argument
    add("--pairs", type=positive, default=200, metavar="N", help="steps with and without each trick (default: 200)")
    add("--device", type=mnist.pick_device, default="auto", help="as for mnist.py (default: auto)")
    add("--data-dir", type=Path, default=mnist.DATA_DIR, help="folder of the data")
    add("--out", type=Path, metavar="PATH", help="also write the figures here, as JSON")
    args = parser.parse_args(argv)
    if args.out:
        mnist.write(args.out)  # raises OSError now if the figures could not be written later
    mnist.load_mnist(args.data_dir)  # raises UserError here rather than in both processes
    options = ["--epochs", str(10**6), "--device", str(args.device), "--data-dir", str(args.data_dir)]
    precision = "bfloat16" if mnist.has_bfloat16(args.device) else "float32"
    uses = {
        "bfloat16": precision == "bfloat16",
        "channels_last": args.device.type != "mps",
        "whole batches augmented": args.device.type != "cuda",  # a graph cannot hold what the CPU does
        "freed memory kept": args.device.type == "cpu" and sys.platform == "linux",
        "the step as a CUDA graph": args.device.type == "cuda",
    }
    origin = {"command": command_of("steps", argv), "commit": commit(), **machine(args.device)}
    origin |= {"device": str(args.device), "precision": precision, "threads": torch.get_num_threads()}
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}")
    results = {}
    for trick in TRICKS:
        if not uses.get(trick, True):
            continue
        results[trick] = pairs = time_pairs(trick, options, args.pairs)
        print(f"| {' | '.join(cells(trick, pairs))} |", flush=True)
        if args.out:
            mnist.write(args.out, (json.dumps({**origin, "tricks": results}) + "\n").encode())
    return results


if __name__ == "__main__":
    mnist.run(main)
