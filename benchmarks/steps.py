"""Measure what each trick of mnist.py for speed is worth: training with it and without it, in turn.

Usage, in the folder of mnist.py, with nothing else running:
    python -m benchmarks.steps
    python -m benchmarks.steps --device cuda --pairs 20 --out steps.json
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

import mnist
from benchmarks import command_of, commit, machine, positive, seeds

import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torchvision import transforms

STEPS = 60  # in an epoch; of two epochs, the second is timed
TRICKS = {  # and what takes each of them away
    "bfloat16": "mnist.has_bfloat16 = lambda _: False",
    "channels_last": "torch.channels_last = torch.contiguous_format",
    "max-pooling before ReLU": "mnist.Net.forward = steps.pool_last",
    "freed memory kept": "mnist.keep_freed_memory = lambda: None",
    "whole batches augmented": "mnist.augment = steps.augment_one_by_one",
    "the step as a CUDA graph": "mnist.GraphedStep = lambda step, _: step",
}


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


def shorten(steps):
    """Have mnist.py train for so many steps an epoch, and test on one batch."""
    load = mnist.load_mnist

    def load_some(*args):
        train_set, test_set = load(*args)
        images = steps * mnist.BATCH_SIZE, mnist.TEST_BATCH_SIZE
        return [[part[:count] for part in parts] for parts, count in zip((train_set, test_set), images, strict=True)]

    mnist.load_mnist = load_some


def milliseconds(change, args):
    """Return the milliseconds of a training step, measured in a process of its own, after the `change` of mnist.py."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--epochs", "2", "--device", str(args.device), "--data-dir", str(args.data_dir)]
        options += ["--save-model", str(Path(folder, "mnist.pt"))]
        program = f"import mnist, torch; from benchmarks import steps; steps.shorten({STEPS})\n{change}\n"
        program += f"print(mnist.main({options})['history'][-1]['seconds'])"
        _, output = seeds.run_python(["-c", program], torch.get_num_threads())
    return 1000 * float(output.split()[-1]) / STEPS


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
    add("--pairs", type=positive, default=12, metavar="N", help="trainings with and without each trick (default: 12)")
    add("--device", type=mnist.pick_device, default="auto", help="as for mnist.py (default: auto)")
    add("--data-dir", type=Path, default=mnist.DATA_DIR, help="folder of the data")
    add("--out", type=Path, metavar="PATH", help="also write the figures here, as JSON")
    args = parser.parse_args(argv)
    if args.out:
        mnist.write(args.out)  # raises OSError now if the figures could not be written later
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
    for trick, change in TRICKS.items():
        if not uses.get(trick, True):
            continue
        results[trick] = pairs = [(milliseconds("", args), milliseconds(change, args)) for _ in range(args.pairs)]
        print(f"| {' | '.join(cells(trick, pairs))} |", flush=True)
        if args.out:
            mnist.write(args.out, (json.dumps({**origin, "tricks": results}, indent=1) + "\n").encode())
    return results


if __name__ == "__main__":
    mnist.run(main)
