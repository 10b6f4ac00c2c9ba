"""Train the same network with the recipe it was published with, on the CPU, to compare mnist.py with.

Adam with a fixed learning rate, batches of 128, a ReLU on the logits, and images rotated and shifted one by one, here
as PIL images: https://github.com/cr21/mnist-less-than-25k. There it ended at 99.45 % after 20 epochs.

Usage, in the folder of mnist.py:
    python -m benchmarks.original                # 20 epochs
    python -m benchmarks.original --epochs 1 --seed 1 --out history.json
"""

import argparse
import json
import time
from pathlib import Path

import mnist
from benchmarks import positive

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

EPOCHS = 20
BATCH_SIZE = 128
LR = 1e-3


class Net(mnist.Net):
    """The network as it was published: a ReLU follows the logits, too."""

    def forward(self, x):
        return super().forward(x).relu()


class Images(torch.utils.data.Dataset):
    """MNIST as PIL images, each made a tensor by `transform` when it is asked for."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images.numpy(), labels.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def main(argv=()):
    """Train as the options `argv` say; return the history: each epoch's accuracy in % and its seconds."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.original", description="Train with the original recipe."
    )
    add = parser.add_argument
    add("--epochs", type=positive, default=EPOCHS, help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--data-dir", type=Path, default=mnist.DATA_DIR, help="folder of the data")
    add("--dry-run", action="store_true", help="train and test on a single batch")
    add("--out", type=Path, metavar="PATH", help="also write the history here, as JSON")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**63:
        parser.error(f"argument --seed: {args.seed} is not from 0 to {2**63 - 1}")
    if args.out:
        mnist.write(args.out)  # raises OSError now if it could not be written later

    torch.manual_seed(args.seed)
    to_tensor = [transforms.ToTensor(), transforms.Normalize((mnist.MEAN,), (mnist.STD,))]
    moves = [transforms.RandomRotation(10), transforms.RandomAffine(0, translate=(0.1, 0.1))]
    size = BATCH_SIZE if args.dry_run else mnist.TRAIN_SIZE
    train_set, test_set = ([part[:size] for part in parts] for parts in mnist.load_mnist(args.data_dir))
    train_set = Images(*train_set, transforms.Compose(moves + to_tensor))
    test_set = Images(*test_set, transforms.Compose(to_tensor))
    train_loader = torch.utils.data.DataLoader(train_set, BATCH_SIZE, shuffle=True)
    test_loader = torch.utils.data.DataLoader(test_set, BATCH_SIZE)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    history = []
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        model.train()
        for data, target in train_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(data), target).backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            correct = sum((model(data).argmax(dim=1) == target).sum().item() for data, target in test_loader)
        history.append({"accuracy": 100 * correct / len(test_set), "seconds": time.perf_counter() - start})
        print(f"Epoch {epoch}: Test Accuracy: {history[-1]['accuracy']:.2f}%, {history[-1]['seconds']:.1f} s")
    if args.out:
        mnist.write(args.out, json.dumps(history).encode())
    return history


if __name__ == "__main__":
    mnist.run(main)
