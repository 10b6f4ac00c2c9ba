"""Train an 18,242-parameter CNN on MNIST past 99.4 % test accuracy, on a CPU, in about two minutes.

Usage:
    python mnist.py                        # the default recipe; the weights go to mnist.pt
    python mnist.py --epochs 20 --seed 1
    python mnist.py --validate             # tune without the test set: train on 50,000, test on 10,000
    python mnist.py --dry-run              # a batch of everything, in seconds

The story goes from the top to main(). What stands below main() keeps the files and the process safe.
"""

import argparse
import ctypes
import errno
import functools
import gzip
import hashlib
import http.client
import io
import math
import os
import pickle
import signal
import sys
import time
import urllib.request
import zlib
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until run(): the imports take seconds, and Ctrl-C may come in them

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what MPS lacks runs on the CPU, and a warning says so

import torch
import torch.nn.functional as F
import torchsummary
from torch import nn
from tqdm import tqdm

# --- The recipe ----------------------------------------------------------------------------------------------------

# The section "How it trains" of README.md explains them.
EPOCHS = 4  # of as many images as there are. The first shows each once; later ones mostly those of high loss,
ROUNDS = 8  # drawn anew so many times an epoch, in proportion to the loss,
LEAST_WEIGHT = 1e-6  # or to this where the loss is smaller, so that no image is left without a chance
BATCH_SIZE = 64
TEST_BATCH = 250  # for testing alone; larger ones take more memory and are no faster
LR = 0.03  # the peak, reached after the warm-up
WARM_UP = 0.2  # of all steps
MOMENTUM = 0.9
LABEL_SMOOTHING = 0.1
ROTATION = 10  # degrees; this and the next three are limits, either way
SHIFT = 2  # pixels
SCALE = 0.1  # of the size
SHEAR = 0.1  # pixels sideways for each pixel down


# --- Model ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """The network: (B, 1, 28, 28) normalised images in, (B, 10) logits out (no softmax)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(32)
        self.pool1 = nn.MaxPool2d(2)
        self.squeeze1 = nn.Conv2d(32, 8, 1)
        self.dropout = nn.Dropout(0.1)
        self.conv3 = nn.Conv2d(8, 16, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(16)
        self.conv4 = nn.Conv2d(16, 32, 3, padding=1)
        self.bn4 = nn.BatchNorm2d(32)
        self.pool2 = nn.MaxPool2d(2)
        self.squeeze2 = nn.Conv2d(32, 8, 1)
        self.conv5 = nn.Conv2d(8, 16, 3)
        self.bn5 = nn.BatchNorm2d(16)
        self.conv6 = nn.Conv2d(16, 32, 3)
        self.bn6 = nn.BatchNorm2d(32)
        self.squeeze3 = nn.Conv2d(32, 8, 1)
        self.bn7 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 3 * 3, 10)

    def forward(self, x):
        # ReLU and max-pool commute; pooling first leaves ReLU a quarter of the pixels.
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.pool1(self.bn2(self.conv2(x))))
        x = self.dropout(self.squeeze1(x))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.pool2(self.bn4(self.conv4(x))))
        x = self.squeeze2(x)
        x = F.relu(self.bn5(self.conv5(x)))
        x = F.relu(self.bn6(self.conv6(x)))
        x = F.relu(self.bn7(self.squeeze3(x)))
        return self.fc(x.flatten(1))


# --- Data ----------------------------------------------------------------------------------------------------------

TRAIN_SIZE, HELD_OUT = 60_000, 10_000  # images; --validate holds the last 10,000 out
MEAN, STD = 0.1307, 0.3081  # of the training pixels, on a scale of 0 to 1


def default_data_dir():
    """Return the folder that $MNIST_DATA names, else data/ beside this file."""
    return Path(os.environ.get("MNIST_DATA") or Path(__file__).with_name("data"))


def load_mnist(data_dir, device="cpu"):
    """Load the 60,000 training and 10,000 test images, downloading what is missing.

    Returns ((images, labels), (images, labels)) on `device`:
    uint8 images (N, 28, 28) from 0 (background) to 255 (ink), and int64 labels (N,).
    """
    folder = Path(data_dir, "MNIST", "raw")  # torchvision's layout
    tensors = []
    for name in FILES:
        content = read_file(folder, name) or download(folder, name)
        header, shape = (16, (-1, 28, 28)) if "images" in name else (8, (-1,))
        tensors.append(torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).view(shape).to(device))
    train_images, train_labels, test_images, test_labels = tensors
    return (train_images, train_labels.long()), (test_images, test_labels.long())


def augment(images):
    """Rotate, shift, scale and shear each image of a (B, 1, 28, 28) batch by random amounts of its own."""
    angle, shift_x, shift_y, scale_x, scale_y, shear = torch.rand(6, len(images), device=images.device) * 2 - 1
    cos, sin = torch.cos(angle * math.radians(ROTATION)), torch.sin(angle * math.radians(ROTATION))
    scale_x, scale_y, shear = 1 + SCALE * scale_x, 1 + SCALE * scale_y, SHEAR * shear
    pixel = 2 / images.shape[-1]  # affine_grid measures an image from -1 to 1
    theta = torch.stack(
        [
            torch.stack([cos * scale_x, cos * shear - sin * scale_y, SHIFT * pixel * shift_x], dim=1),
            torch.stack([sin * scale_x, sin * shear + cos * scale_y, SHIFT * pixel * shift_y], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class Loader:
    """Batches of images (N, 28, 28) and labels (N,) that are on the training device already.

    Iterating yields the indices (B,) of each batch, `batch(index)` the batch itself.
    For testing every image comes once, in order. For training (train=True) they are augmented and in random order,
    and what does not fill a last batch is left out: every image once in the first epoch; in each later one as many
    draws, in ROUNDS rounds, in proportion to the `losses` (N,) that the caller keeps up to date, much as in selective
    backpropagation (Jiang et al., arXiv:1910.00762).
    """

    def __init__(self, images, labels, batch_size, train=False):
        self.images, self.labels = images, labels
        self.batch_size, self.train = batch_size, train
        self.losses = torch.ones(len(images), device=images.device)
        self.epoch = 0

    def __len__(self):
        count = len(self.images) / self.batch_size
        return math.floor(count) if self.train else math.ceil(count)

    def __iter__(self):
        self.epoch += 1
        count, device = len(self) * self.batch_size, self.images.device
        if not self.train:
            yield from torch.arange(len(self.images), device=device).split(self.batch_size)
        elif self.epoch == 1:
            yield from torch.randperm(len(self.images), device=device)[:count].split(self.batch_size)
        else:
            for part in torch.arange(len(self)).chunk(ROUNDS):
                weights = self.losses.nan_to_num(0, 0).clamp_min(LEAST_WEIGHT)  # train() reports losses not finite
                yield from torch.multinomial(weights, len(part) * self.batch_size).split(self.batch_size)

    def batch(self, index):
        """Return (data, target) of an index (B,): normalised float32 (B, 1, 28, 28) and int64 (B,)."""
        data = self.images[index].unsqueeze(1).float() / 255
        if self.train:
            data = augment(data)
        return (data - MEAN) / STD, self.labels[index]


# --- Train and test ------------------------------------------------------------------------------------------------


def orthogonalize(matrices):
    """Return for each matrix (M, N) of a list about the nearest whose singular values are all 1.

    Five Newton-Schulz steps on all at once: padding them to one size by zeros, which remain zeros, takes less time than
    launching so many small products one by one.
    """
    rows, columns = (max(sizes) for sizes in zip(*(matrix.shape for matrix in matrices), strict=True))
    batch = [F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - len(matrix))) for matrix in matrices]
    batch = torch.stack(batch)
    batch = batch / (batch.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = batch @ batch.mT
        square = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        batch = torch.baddbmm(batch, square, batch, beta=3.4445)
    return [result[: len(matrix), : matrix.shape[1]] for result, matrix in zip(batch, matrices, strict=True)]


class Muon:
    """Nesterov momentum, with the updates of the convolutions orthogonalized: Muon, by K. Jordan et al.,
    https://kellerjordan.github.io/posts/muon/.

    The rate climbs to `lr` and falls to zero again over `steps` steps. It is computed on the model's device, so that a
    CUDA graph can hold it. Not torch.optim's Muon: that takes matrices alone, and importing torch.optim takes 2 s.
    """

    def __init__(self, model, lr, steps):
        self.parameters, self.lr, self.steps = list(model.parameters()), lr, steps
        self.momenta = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.step_number = torch.zeros((), device=self.parameters[0].device)

    @torch.no_grad()
    def step(self):
        self.step_number += 1
        progress = self.step_number / (self.steps + 1)
        rate = self.lr * torch.minimum(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))
        updates = []
        for parameter, momentum in zip(self.parameters, self.momenta, strict=True):
            momentum.mul_(MOMENTUM).add_(parameter.grad)
            updates.append(parameter.grad.add(momentum, alpha=MOMENTUM))
        orthogonal = iter(orthogonalize([update.flatten(1) for update in updates if update.ndim == 4]))
        for parameter, update in zip(self.parameters, updates, strict=True):
            if parameter.ndim == 4:
                update = next(orthogonal).view_as(parameter)
            parameter.sub_(rate * update)


def train_step(model, loader, optimizer, precision, totals, index):
    """Train on the batch at `index` (B,); add its mean loss and its number of correct answers to `totals` (2,)."""
    data, target = loader.batch(index)
    with torch.autocast(data.device.type, precision, enabled=precision != torch.float32):
        output = model(data)
    output = output.float()
    loss = F.cross_entropy(output, target, label_smoothing=LABEL_SMOOTHING)
    model.zero_grad()
    loss.backward()
    optimizer.step()
    output = output.detach()
    loader.losses[index] = F.cross_entropy(output, target, reduction="none")
    totals += torch.stack([loss.detach(), (output.argmax(dim=1) == target).sum()])


def train(step, loader, totals, epoch):
    """Train for one epoch by calling `step(index)`; return the mean loss and the accuracy in % as they went by."""
    totals.zero_()
    fed = time.monotonic()
    with tqdm(loader, desc=f"Epoch {epoch}", disable=None) as bar:
        for number, index in enumerate(bar, start=1):
            step(index)
            # Reading the totals makes a GPU wait for the host: not at every step, but a few times a second.
            if number == len(loader) or time.monotonic() - fed > 0.2:
                fed = time.monotonic()
                loss, accuracy = (totals / number).tolist()
                accuracy *= 100 / loader.batch_size
                if not math.isfinite(loss):
                    raise UserError(
                        f"the loss is {loss} at epoch {epoch}, step {number}: "
                        "lower --lr, raise --batch-size or try --precision float32"
                    )
                bar.set_postfix_str(f"loss={loss:.4f}, acc={accuracy:.2f}%", refresh=False)
    return loss, accuracy


@torch.no_grad()
def recompute_batch_norm(model, loader, precision):
    """Replace the running statistics of BatchNorm by the mean of those of the loader's batches, as Wu and Johnson do,
    arXiv:2105.07576.

    What training gathers is of augmented and mostly hard images, and of weights that have changed since.
    """
    model.eval()  # for no dropout
    layers = [module.train() for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for number, (data, _) in enumerate(map(loader.batch, loader), start=1):
        for layer in layers:
            layer.momentum = 1 / number  # makes the running mean the plain one
        with torch.autocast(data.device.type, precision, enabled=precision != torch.float32):
            model(data)


@torch.inference_mode()
def test(model, loader, precision):
    """Return the mean cross-entropy loss and the number of images classified correctly."""
    model.eval()
    loss_sum = correct = torch.zeros((), device=loader.images.device)
    for data, target in map(loader.batch, loader):
        with torch.autocast(data.device.type, precision, enabled=precision != torch.float32):
            output = model(data)
        loss_sum = loss_sum + F.cross_entropy(output.float(), target, reduction="sum")
        correct = correct + (output.argmax(dim=1) == target).sum()
    return loss_sum.item() / len(loader.images), int(correct)


def fit(model, train_loader, test_loader, epochs, lr, precision, name="Test"):
    """Train `model` in place by the recipe, testing and printing after every epoch.

    Returns the history: a dictionary an epoch, of mean losses, accuracies in % and seconds of training.
    """
    device = train_loader.images.device
    optimizer = Muon(model, lr, epochs * len(train_loader))
    clean_loader = Loader(train_loader.images[::10], train_loader.labels[::10], TEST_BATCH)  # more is no better
    totals = torch.zeros(2, device=device)
    step = functools.partial(train_step, model, train_loader, optimizer, precision, totals)
    if device.type == "cuda":
        step = GraphedStep(step)
    history = []
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        model.train()
        train_loss, train_accuracy = train(step, train_loader, totals, epoch)
        seconds = time.perf_counter() - start
        recompute_batch_norm(model, clean_loader, precision)
        test_loss, correct = test(model, test_loader, precision)
        images = len(test_loader.images)
        test_accuracy = 100 * correct / images
        print(f"{name} set: Average loss: {test_loss:.4f}, Accuracy: {correct}/{images} ({test_accuracy:.2f}%)")
        print(f"Epoch {epoch}: Train Accuracy: {train_accuracy:.2f}%, {name} Accuracy: {test_accuracy:.2f}%")
        history.append({"epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy})
        history[-1] |= {"test_loss": test_loss, "test_accuracy": test_accuracy, "seconds": seconds}
    return history


# --- Command line --------------------------------------------------------------------------------------------------


def parse_args(argv):
    count = number(int, 1, math.inf, "a whole number above 0")
    rate = number(float, sys.float_info.min, math.inf, "a finite number above 0")
    seed = number(int, 0, 2**63, "a whole number from 0 to 2**63 - 1")

    parser = argparse.ArgumentParser(prog="mnist.py", description="Train an 18,242-parameter CNN on MNIST.")
    add = parser.add_argument
    add("--epochs", type=count, default=EPOCHS, help="of 60,000 images each (default: %(default)s)")
    add("--batch-size", type=count, default=BATCH_SIZE, help="images in a step (default: %(default)s)")
    add("--lr", type=rate, default=LR, help="peak learning rate (default: %(default)s)")
    add("--seed", type=seed, default=0, help="fixes everything random (default: %(default)s)")
    add("--device", type=pick_device, default="auto", metavar="{auto,cpu,cuda,mps}", help="default: %(default)s")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 where native")
    add("--data-dir", type=Path, default=default_data_dir(), help="folder of MNIST/raw (default: $MNIST_DATA or data/)")
    add("--save-model", type=Path, metavar="PATH", help="weights file (default: mnist.pt; none in a dry run)")
    add("--validate", action="store_true", help="train on the first 50,000 training images, test on the other 10,000")
    add("--dry-run", action="store_true", help="train and test on a single batch")
    add("--summary", action="store_true", help="print the layers of the network and exit")
    args = parser.parse_args(argv)
    images = TRAIN_SIZE - HELD_OUT * args.validate
    if args.batch_size > images:
        parser.error(f"argument --batch-size: {args.batch_size} is more than the {images} training images")
    if args.precision == "auto":
        args.precision = "bfloat16" if has_bfloat16(args.device) else "float32"
    elif args.precision == "bfloat16" and not has_bfloat16(args.device):
        print(f"mnist.py: warning: {args.device} has no native bfloat16, emulating it is slow", file=sys.stderr)
    if args.save_model is None and not (args.dry_run or args.summary):
        args.save_model = Path("mnist.pt")
    if args.save_model:
        # Training takes minutes, so whether its result can be saved is found out before, not after.
        try:
            save({"state_dict": Net().state_dict()}, args.save_model, rehearsal=True)
        except OSError as error:
            parser.error(f"argument --save-model: cannot write {args.save_model}: {error.strerror}")
    return args


def main(argv=None):
    """Train as the command line `argv` says (sys.argv[1:] if None), print the progress and save the weights.

    Returns what is saved, less the weights: "parameters", "test_accuracy" (in %, after the last epoch),
    "seconds" (of training and testing), "history" (see fit()) and "settings"; None after --summary.
    """
    args = parse_args(argv)
    keep_freed_memory()
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(args.seed)
    model = Net()
    if args.summary:
        torchsummary.summary(model, (1, 28, 28), device="cpu")
        return None
    model.to(args.device, memory_format=torch.channels_last)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"Total Parameters: {parameters}")

    train_set, test_set = load_mnist(args.data_dir, args.device)
    name = "Validation" if args.validate else "Test"
    if args.validate:
        train_set, test_set = [part[:-HELD_OUT] for part in train_set], [part[-HELD_OUT:] for part in train_set]
    if args.dry_run:
        args.epochs = 1
        train_set, test_set = [part[: args.batch_size] for part in train_set], [part[:TEST_BATCH] for part in test_set]
    train_loader = Loader(*train_set, args.batch_size, train=True)
    test_loader = Loader(*test_set, TEST_BATCH)

    threads = torch.get_num_threads()
    how = f"{threads} threads, {args.precision}" if args.device.type == "cpu" else args.precision
    print(
        f"Training on {args.device} ({how}): {args.epochs} epochs, "
        f"{args.epochs * len(train_loader)} batches of {args.batch_size}"
    )
    start = time.perf_counter()
    history = fit(model, train_loader, test_loader, args.epochs, args.lr, getattr(torch, args.precision), name)
    seconds = time.perf_counter() - start
    accuracy = history[-1]["test_accuracy"]
    print(
        f"Final {name.lower()} accuracy {accuracy:.2f}% with {parameters:,} parameters "
        f"after {args.epochs} epochs in {seconds:.0f} s"
    )

    chosen = ("epochs", "batch_size", "lr", "seed", "precision", "validate", "dry_run")
    settings = {option: getattr(args, option) for option in chosen}
    settings |= {"device": str(args.device), "threads": threads, "torch": str(torch.__version__)}
    results = {"parameters": parameters, "test_accuracy": accuracy, "seconds": seconds}
    results |= {"history": history, "settings": settings}
    if args.save_model:
        try:
            save({"state_dict": model.state_dict(), **results}, args.save_model)
        except OSError as error:
            raise UserError(f"cannot save the weights to {args.save_model}: {error.strerror}") from error
        print(f"Saved the weights to {args.save_model}")
    return results


# --- Files: what is read is checked, what is written is whole ---------------------------------------------------------


TIMEOUT = 30  # seconds that a mirror may be silent

# MD5 of each file's unpacked content.
FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def is_intact(name, content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest() == FILES[name]


def read_file(folder, name):
    """Return the unpacked bytes of one of the FILES from `folder`, or None if no intact copy is there."""
    for path, open_file in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        try:
            with open_file(path, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            continue
        except (OSError, EOFError, zlib.error):
            content = b""
        if is_intact(name, content):
            return content
        print(f"{path} is damaged or unreadable: looking for another copy", file=sys.stderr)
    return None


def download(folder, name):
    """Return the unpacked bytes of one of the FILES from the first mirror that has it; keep the archive in `folder`.

    Raises UserError if no mirror has it, or `folder` cannot be written to.
    """
    # Importing torchvision takes longer than reading MNIST, and only a download needs it.
    from torchvision.datasets import MNIST

    errors = []
    for mirror in MNIST.mirrors:
        url = f"{mirror}{name}.gz"
        print(f"Downloading {url}")
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                archive = response.read()
            if not is_intact(name, content := gzip.decompress(archive)):
                raise ValueError("other content than MNIST's")
            folder.mkdir(parents=True, exist_ok=True)
            write(archive, folder / f"{name}.gz")
            return content
        except (OSError, http.client.HTTPException, EOFError, zlib.error, ValueError) as error:
            errors.append(f"{url}: {error}")
    raise UserError(
        f"no intact {name}.gz in {folder}, nor from a mirror ({'; '.join(errors)}): put "
        f"{', '.join(f'{name}.gz' for name in FILES)} there, or name another folder by --data-dir or MNIST_DATA"
    )


def write(content, path, rehearsal=False):
    """Write bytes so that, whatever happens, `path` holds the whole old file or the whole new one.

    A rehearsal does all of it but leaves `path` alone. Raises OSError where the file cannot be written.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():  # a folder; or /dev/null, which must not be replaced by a file
        raise FileExistsError(errno.EEXIST, "it is there, and not a file")
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if not rehearsal:
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save(checkpoint, path, rehearsal=False):
    """Save `checkpoint` by write(), of which a rehearsal does all but to change `path`. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write(buffer.getbuffer(), path, rehearsal)


def load(path):
    """Return (model, checkpoint) of a file that main() saved: a Net in evaluation mode, and all the file holds.

    Raises UserError where the file cannot be read, or is not a checkpoint of this network.
    """
    model = Net()
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["state_dict"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged, or not a checkpoint of this network: train one by mnist.py") from error
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise UserError(f"{path} holds weights that are not finite numbers: train it anew by mnist.py")
    return model.eval(), checkpoint


# --- The process: its errors, its options and its memory --------------------------------------------------------------


class UserError(Exception):
    """Something that the user can put right: the message names it and the way out."""


def run(main):
    """Run a script's main(). What a user can cause ends it by one line on stderr, not by a traceback.

    The exit status is 1 after a UserError, 130 after Ctrl-C, 143 after SIGTERM, and 141 where the reader of the
    output has gone (`python mnist.py | head -1`).
    """
    script = Path(sys.argv[0]).name

    def stop(number, _frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    sys.stdout.reconfigure(line_buffering=True)  # so that a log grows with the training
    try:
        main()
    except UserError as error:
        sys.exit(f"{script}: error: {error}")
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0]
        print(f"{script}: stopped by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(128 + number)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(141)


def number(kind, low, high, wish):
    """Return an argparse type: an int or float (`kind`) for which low <= value < high."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wish}")
        return value

    return parse


def pick_device(name):
    """Return the torch.device that --device names; auto prefers CUDA, then MPS, then the CPU.

    A GPU may be there and yet refuse all work, as MPS does in many virtual machines: auto says so and passes it over.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name not in ("auto", *available):
        raise argparse.ArgumentTypeError(f"{name!r} is none of auto, cpu, cuda and mps")
    if not available.get(name, True):
        raise argparse.ArgumentTypeError(f"{name!r} is not available here: use cpu, or auto")
    for kind in filter(available.get, available) if name == "auto" else [name]:
        try:
            torch.zeros(1, device=kind)
            return torch.device(kind)
        except RuntimeError as error:
            problem = f"{kind!r} does not work here ({str(error).splitlines()[0]})"
        if name == "auto":
            print(f"warning: {problem}: it is not used", file=sys.stderr)
    raise argparse.ArgumentTypeError(f"{problem}: use cpu, or auto")


def has_bfloat16(device):
    """Whether `device` computes in bfloat16 itself; where it is emulated it is slower than float32."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class GraphedStep:
    """A training step `step(index)` on a GPU, with its hundreds of kernels launched at once, as a CUDA graph.

    The first three calls run it as it is, which the libraries beneath need before a capture; the fourth captures it.
    """

    def __init__(self, step):
        self.step, self.calls, self.graph = step, 0, torch.cuda.CUDAGraph()

    def __call__(self, index):
        self.calls += 1
        if self.calls <= 3:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.step(index)
            torch.cuda.current_stream().wait_stream(stream)
            return
        if self.calls == 4:
            self.index = index.clone()
            with torch.cuda.graph(self.graph):
                self.step(self.index)
        self.index.copy_(index)
        self.graph.replay()


def keep_freed_memory():
    """Have the C library keep the memory that a step frees for the next step.

    By default glibc returns every large block to the system; having the pages cleared and mapped anew took a third
    of each step (59 ms against 39 at batch 64 on two cores of an AMD EPYC). Without glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


if __name__ == "__main__":
    run(main)
