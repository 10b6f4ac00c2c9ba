"""The two promises of mnist.py, and tests of each of its parts on small data made here.

The training needs the real MNIST: where it cannot be had the test fails if CI is set, and is skipped elsewhere.
"""

import gzip
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchsummary

import mnist

SUMMARY = """
    Conv2d-1       16 28 28     160
    BatchNorm2d-2  16 28 28      32
    Conv2d-3       32 28 28   4,640
    BatchNorm2d-4  32 28 28      64
    MaxPool2d-5    32 14 14       0
    Conv2d-6        8 14 14     264
    Dropout-7       8 14 14       0
    Conv2d-8       16 14 14   1,168
    BatchNorm2d-9  16 14 14      32
    Conv2d-10      32 14 14   4,640
    BatchNorm2d-11 32 14 14      64
    MaxPool2d-12   32 7 7         0
    Conv2d-13       8 7 7       264
    Conv2d-14      16 5 5     1,168
    BatchNorm2d-15 16 5 5        32
    Conv2d-16      32 3 3     4,640
    BatchNorm2d-17 32 3 3        64
    Conv2d-18       8 3 3       264
    BatchNorm2d-19  8 3 3        16
    Linear-20      10           730
"""


# --- The two promises ----------------------------------------------------------------------------------------------


def test_fewer_than_25_000_parameters():
    parameters = sum(parameter.numel() for parameter in mnist.Net().parameters())
    assert parameters < 25_000
    assert parameters == 18_242


def test_default_recipe_ends_above_99_4_percent_within_20_epochs(tmp_path):
    try:
        _, test_set = mnist.load_mnist(mnist.default_data_dir())
    except mnist.UserError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(str(error))
    results = mnist.main(["--save-model", str(tmp_path / "mnist.pt")])
    assert len(results["history"]) <= 20
    assert results["test_accuracy"] > 99.4
    assert results["test_accuracy"] == results["history"][-1]["test_accuracy"]

    # The saved weights are the ones that were scored.
    model, checkpoint = mnist.load(tmp_path / "mnist.pt")
    _, correct = mnist.test(model, mnist.Loader(*test_set, mnist.TEST_BATCH), torch.float32)
    assert correct / 100 == pytest.approx(results["test_accuracy"], abs=0.02)  # rounding, where trained in bfloat16
    assert checkpoint["history"] == results["history"]


# --- Small data ----------------------------------------------------------------------------------------------------

# The segments of a seven-segment display that each digit lights, as slices of rows and columns.
SEGMENTS = {
    "top": (slice(4, 7), slice(9, 19)),
    "upper left": (slice(4, 14), slice(9, 12)),
    "upper right": (slice(4, 14), slice(16, 19)),
    "middle": (slice(12, 15), slice(9, 19)),
    "lower left": (slice(14, 24), slice(9, 12)),
    "lower right": (slice(14, 24), slice(16, 19)),
    "bottom": (slice(21, 24), slice(9, 19)),
}
LIT = ("1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011")


def digits(n):
    """Return n images (n, 28, 28), uint8, of the digits 0 to 9 in turn, and their labels (n,)."""
    patterns = torch.zeros(10, 28, 28, dtype=torch.uint8)
    for pattern, lit in zip(patterns, LIT, strict=True):
        for (rows, columns), on in zip(SEGMENTS.values(), lit, strict=True):
            if on == "1":
                pattern[rows, columns] = 255
    labels = torch.arange(n) % 10
    return patterns[labels], labels


def write_idx(folder, name, array):
    """Write a uint8 tensor to folder/name.gz as an IDX file; return the MD5 of its content."""
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = header + array.numpy().tobytes()
    (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """Stand a data set of 500 training and 100 test images in for MNIST; return its --data-dir."""
    folder = tmp_path / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    files = {}
    for prefix, n in (("train", 500), ("t10k", 100)):
        images, labels = digits(n)
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels.byte())):
            files[name] = write_idx(folder, name, array)
    monkeypatch.setattr(mnist, "FILES", files)
    monkeypatch.setattr(mnist, "HELD_OUT", 100)
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "data")


# --- Model ---------------------------------------------------------------------------------------------------------


def test_summary_is_the_published_table(capsys):
    torchsummary.summary(mnist.Net(), (1, 28, 28), device="cpu")
    lines = capsys.readouterr().out.splitlines()
    rows = [line.replace("[-1,", "").replace("]", "").replace(", ", " ").split() for line in lines[3:23]]
    assert rows == [line.split() for line in SUMMARY.strip().splitlines()]
    assert "Total params: 18,242" in lines


def test_forward_gives_ten_logits_an_image():
    logits = mnist.Net()(torch.randn(5, 1, 28, 28))
    assert logits.shape == (5, 10)
    assert (logits < 0).any()  # no ReLU on the logits,
    assert not torch.allclose(logits.exp().sum(dim=1), torch.ones(5))  # and no softmax


def test_every_parameter_receives_a_gradient():
    model = mnist.Net()
    F.cross_entropy(model(torch.randn(20, 1, 28, 28)), torch.arange(20) % 10).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # BatchNorm takes away whatever these biases add.
        if not (name.endswith("bias") and name.startswith(("conv", "squeeze2", "squeeze3"))):
            assert parameter.grad.abs().max() > 1e-6, name


# --- Data ----------------------------------------------------------------------------------------------------------


def test_load_mnist_returns_the_files_as_tensors(small_mnist):
    for (images, labels), n in zip(mnist.load_mnist(small_mnist), (500, 100), strict=True):
        expected_images, expected_labels = digits(n)
        assert images.dtype == torch.uint8
        assert torch.equal(images, expected_images)
        assert labels.dtype == torch.int64
        assert torch.equal(labels, expected_labels)


def numbered(n):
    """Return n distinct images whose pixel values spell their label: label = 200 * pixel 0 + pixel 1."""
    labels = torch.arange(n)
    images = torch.zeros(n, 28, 28, dtype=torch.uint8)
    images[:, 14, 14], images[:, 14, 15] = labels // 200, labels % 200
    return images, labels


@pytest.mark.parametrize("train", [True, False])
def test_loader_yields_every_image_once_with_its_label(train, monkeypatch):
    monkeypatch.setattr(mnist, "augment", lambda images: images)
    images, labels = numbered(1000)
    loader = mnist.Loader(images, labels, batch_size=64, train=train)
    assert len(loader) == 16
    batches = list(loader)
    assert [len(target) for _, target in batches] == [64] * 15 + [40]

    data = torch.cat([data for data, _ in batches])
    target = torch.cat([target for _, target in batches])
    pixels = (data * mnist.STD + mnist.MEAN).mul(255).round().long()[:, 0, 14]
    assert torch.equal(200 * pixels[:, 14] + pixels[:, 15], target)
    assert torch.equal(target.sort().values, labels)
    assert torch.equal(target, labels) != train  # shuffled for training, in order for testing


def test_epochs_after_the_first_draw_the_images_of_high_loss(monkeypatch):
    monkeypatch.setattr(mnist, "FRACTION", 0.3)
    monkeypatch.setattr(mnist, "augment", lambda images: images)
    images, labels = numbered(1000)
    loader = mnist.Loader(images, labels, batch_size=100, train=True)
    for _, target in loader:
        loader.record(torch.where(target < 250, 5.0, 0.0))
    orders = []
    for _ in range(2):
        assert len(loader) == 3
        batches = []
        for data, target in loader:
            batches.append(target)
            loader.record(torch.where(target < 250, 5.0, 0.0))
            pixels = (data * mnist.STD + mnist.MEAN).mul(255).round().long()[:, 0, 14]
            assert torch.equal(200 * pixels[:, 14] + pixels[:, 15], target)
        assert [len(batch) for batch in batches] == [100] * 3
        orders.append(torch.cat(batches))
        assert len(orders[-1].unique()) == 300
        assert (orders[-1] < 250).sum() == 250
    assert not torch.equal(*orders)
    assert loader.steps(3) == 10 + 3 + 3


def test_loader_normalises():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1).expand(2, 28, 28)
    ((data, _),) = mnist.Loader(images, torch.zeros(2), batch_size=2)
    assert data.shape == (2, 1, 28, 28)
    assert data.dtype == torch.float32
    assert torch.allclose(data[0], torch.tensor(-0.1307 / 0.3081))
    assert torch.allclose(data[1], torch.tensor((1 - 0.1307) / 0.3081))


@pytest.mark.parametrize("train", [True, False])
def test_loader_augments_for_training_alone(train):
    images, labels = digits(100)
    ((data, _),) = mnist.Loader(images[:1].expand(100, 28, 28), labels, batch_size=100, train=train)
    same = (data == data[0]).all(dim=(1, 2, 3))
    assert same.sum() == (1 if train else 100)


def test_augmentation_moves_every_image_by_amounts_of_its_own():
    images, labels = digits(2000)
    images = images.unsqueeze(1).float() / 255
    torch.manual_seed(0)
    augmented = mnist.augment(images)
    assert augmented.shape == images.shape
    assert augmented.min() >= 0
    assert augmented.max() <= 1
    changed = (augmented - images).abs().amax(dim=(1, 2, 3)) > 0.1
    assert changed.float().mean() > 0.99
    assert not torch.allclose(augmented[0], augmented[10])  # the same digit, moved otherwise

    # The mean of a digit's augmented images still looks like that digit more than like any other.
    means = torch.stack([augmented[labels == digit].mean(dim=0).flatten() for digit in range(10)])
    similarity = F.normalize(means) @ F.normalize(images[:10].flatten(1)).T
    assert torch.equal(similarity.argmax(dim=1), torch.arange(10))


def test_augmentation_keeps_within_its_limits(monkeypatch):
    """A dot 10 pixels from the centre goes as far as rotation, shift, scale and shear can take it, and no farther."""
    images = torch.zeros(5000, 1, 29, 29)
    images[:, :, 14, 24] = 1
    rows, columns = torch.meshgrid(torch.arange(29.0), torch.arange(29.0), indexing="ij")

    def moved(**limits):
        for name in ("ROTATION", "SHIFT", "SCALE", "SHEAR"):
            monkeypatch.setattr(mnist, name, limits.get(name, 0))
        weight = mnist.augment(images)
        weight = weight / weight.sum(dim=(1, 2, 3), keepdim=True)
        return (weight * rows).sum(dim=(1, 2, 3)) - 14, (weight * columns).sum(dim=(1, 2, 3)) - 24

    down, right = moved()
    assert down.abs().max() < 1e-3
    assert right.abs().max() < 1e-3
    down, _ = moved(ROTATION=10)
    assert down.abs().max() == pytest.approx(1.74, abs=0.2)  # 10 sin 10°
    for shifted in moved(SHIFT=2):
        assert shifted.abs().max() == pytest.approx(2, abs=0.1)
    down, right = moved(SCALE=0.1)
    assert down.abs().max() < 1e-3
    assert right.abs().max() == pytest.approx(1.1, abs=0.2)  # 10 / (1 - 0.1) - 10


# --- Train and test ------------------------------------------------------------------------------------------------


def test_training_loss_falls_and_the_digits_are_learned(small_mnist):
    results = mnist.main(["--epochs", "5", "--batch-size", "20", "--data-dir", small_mnist])
    losses = [epoch["train_loss"] for epoch in results["history"]]
    assert losses[-1] < losses[0] / 1.5
    assert results["test_accuracy"] > 90


def test_training_reports_the_mean_over_the_whole_epoch(monkeypatch):
    """With 23 batches an epoch: the sums are read every 20 steps, and the last 3 must not be missed."""
    recorded = []
    loader = mnist.Loader(*digits(230), batch_size=10, train=True)
    monkeypatch.setattr(loader, "record", lambda losses: recorded.append(losses.mean().item()))
    monkeypatch.setattr(mnist, "LABEL_SMOOTHING", 0)
    model = mnist.Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1)
    mean_loss, _ = mnist.train(model, loader, optimizer, scheduler, 1, torch.float32)
    assert len(recorded) == 23
    assert mean_loss == pytest.approx(sum(recorded) / 23, rel=1e-5)


def test_testing_neither_augments_nor_changes_the_model():
    torch.manual_seed(0)
    model, loader = mnist.Net(), mnist.Loader(*digits(100), batch_size=30)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    assert mnist.test(model, loader, torch.float32) == mnist.test(model, loader, torch.float32)
    assert all(torch.equal(*pair) for pair in zip(before, model.state_dict().values(), strict=True))


def test_same_seed_gives_the_same_bits(small_mnist, tmp_path):
    paths = [tmp_path / name for name in ("first.pt", "second.pt", "other.pt")]
    for path, seed in zip(paths, ("7", "7", "8"), strict=True):
        mnist.main(["--epochs", "2", "--seed", seed, "--data-dir", small_mnist, "--save-model", str(path)])
    first, second, other = (mnist.load(path)[0].state_dict() for path in paths)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_validation_holds_the_last_training_images_out(small_mnist, monkeypatch, capsys):
    loaders = []
    monkeypatch.setattr(mnist, "fit", lambda model, *args: loaders.extend(args[:2]) or [{"test_accuracy": 0.0}])
    mnist.main(["--validate", "--data-dir", small_mnist])
    assert [len(loader.images) for loader in loaders] == [400, 100]
    assert "validation accuracy" in capsys.readouterr().out


def test_bfloat16_trains(small_mnist):
    results = mnist.main(["--dry-run", "--precision", "bfloat16", "--data-dir", small_mnist])
    assert results["settings"]["precision"] == "bfloat16"


# --- Save and load -------------------------------------------------------------------------------------------------


def test_main_returns_and_saves_the_results(small_mnist):
    results = mnist.main(["--epochs", "2", "--seed", "3", "--data-dir", small_mnist])
    checkpoint = torch.load("mnist.pt", weights_only=True)  # mnist.pt is the default
    mnist.Net().load_state_dict(checkpoint.pop("state_dict"))
    assert checkpoint == results
    assert results["parameters"] == 18_242
    assert [epoch["epoch"] for epoch in results["history"]] == [1, 2]
    assert results["settings"]["seed"] == 3


def test_dry_run_saves_only_where_it_is_told_to(small_mnist):
    mnist.main(["--dry-run", "--data-dir", small_mnist])
    assert not Path("mnist.pt").exists()
    mnist.main(["--dry-run", "--data-dir", small_mnist, "--save-model", "dry.pt"])
    model, checkpoint = mnist.load("dry.pt")
    assert not model.training
    assert checkpoint["settings"]["dry_run"]


# --- Command line --------------------------------------------------------------------------------------------------


def test_output_is_the_documented_log(small_mnist, capsys):
    mnist.main(["--epochs", "1", "--batch-size", "100", "--data-dir", small_mnist, "--precision", "float32"])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "Total Parameters: 18242"
    assert lines[1].endswith("float32): 1 epochs, 5 batches of 100")
    assert lines[2].startswith("Test set: Average loss: ")
    assert lines[3].startswith("Epoch 1: Train Accuracy: ")
    assert lines[4].startswith("Final test accuracy ")
    assert lines[5] == "Saved the weights to mnist.pt"
    assert err == ""  # no fragments of a progress bar where there is no terminal


def test_summary_prints_the_table_and_trains_nothing(capsys):
    assert mnist.main(["--summary"]) is None
    assert "Linear-20" in capsys.readouterr().out


def test_data_dir_defaults_to_mnist_data_then_to_the_folder_beside_the_script(monkeypatch):
    monkeypatch.delenv("MNIST_DATA", raising=False)
    assert mnist.parse_args(["--dry-run"]).data_dir == Path(mnist.__file__).parent / "data"
    monkeypatch.setenv("MNIST_DATA", "elsewhere")
    assert mnist.parse_args(["--dry-run"]).data_dir == Path("elsewhere")
    assert mnist.parse_args(["--dry-run", "--data-dir", "here"]).data_dir == Path("here")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", "0"),
        ("--epochs", "2.5"),
        ("--batch-size", "-64"),
        ("--batch-size", "60001"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--seed", "-1"),
        ("--seed", str(2**63)),
        ("--device", "tpu"),
        ("--precision", "float8"),
        ("--save-model", "no/such/folder/mnist.pt"),
    ],
)
def test_a_bad_value_is_refused_by_name(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        mnist.main([option, value])
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert option in message
    assert value in message


def test_the_refusal_says_what_is_wanted(capsys):
    with pytest.raises(SystemExit):
        mnist.main(["--epochs", "two"])
    assert "argument --epochs: 'two' is not a whole number above 0" in capsys.readouterr().err


def test_the_script_runs_as_a_process():
    script = Path(mnist.__file__)
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    for option in ("--epochs", "--batch-size", "--lr", "--seed", "--device", "--data-dir", "--save-model", "--dry-run"):
        assert option in done.stdout
    assert done.stderr == ""
