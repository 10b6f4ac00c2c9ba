"""The two promises of mnist.py, and tests of each of its parts on small data made here.

The training needs the real MNIST: where it cannot be had the test fails if CI is set, and is skipped elsewhere.
"""

import contextlib
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
from torch.utils._python_dispatch import TorchDispatchMode

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
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):  # of GitHub Actions: shown on the page of the run
        with open(path, "a", encoding="utf-8") as summary:
            summary.write(f"{results['test_accuracy']:.2f} % after {results['seconds']:.0f} s of training\n")
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


def drawn(loader):
    """Return the labels of one pass over numbered() images, in order, having checked each with its image."""
    targets = []
    for index in loader:
        data, target = loader.batch(index)
        pixels = (data * mnist.STD + mnist.MEAN).mul(255).round().long()[:, 0, 14]
        assert torch.equal(200 * pixels[:, 14] + pixels[:, 15], target)
        targets.append(target)
    assert {len(target) for target in targets[:-1]} == {loader.batch_size}
    assert len(targets) == len(loader)
    return torch.cat(targets)


def test_loader_yields_every_test_image_in_order():
    images, labels = numbered(1000)
    assert torch.equal(drawn(mnist.Loader(images, labels, batch_size=64)), labels)


def test_the_first_epoch_shows_every_image_but_the_rest_once(monkeypatch):
    monkeypatch.setattr(mnist, "augment", lambda images: images)
    order = drawn(mnist.Loader(*numbered(1000), batch_size=64, train=True))
    assert len(order) == len(order.unique()) == 960
    assert not torch.equal(order, order.sort().values)


def test_later_epochs_draw_the_images_of_high_loss(monkeypatch):
    monkeypatch.setattr(mnist, "augment", lambda images: images)
    monkeypatch.setattr(mnist, "ROUNDS", 2)
    loader = mnist.Loader(*numbered(1000), batch_size=100, train=True)
    drawn(loader)
    loader.losses = torch.where(torch.arange(1000) < 250, 5.0, 0.0)
    orders = [drawn(loader), drawn(loader)]
    assert not torch.equal(*orders)
    for order in orders:
        for part in order.split(500):  # a round draws no image twice
            assert len(part.unique()) == 500
            assert (part < 250).sum() == 250
        first, second = (part[part >= 250].sort().values for part in order.split(500))
        assert not torch.equal(first, second)  # the others have the same small chance each


def test_a_later_round_draws_by_the_losses_of_the_one_before(monkeypatch):
    monkeypatch.setattr(mnist, "ROUNDS", 2)
    loader = mnist.Loader(*numbered(1000), batch_size=100, train=True)
    drawn_before = list(loader)
    assert len(drawn_before) == 10
    batches = iter(loader)
    first = torch.cat([next(batches) for _ in range(5)])
    loader.losses = torch.where(torch.isin(torch.arange(1000), first), 0.0, 5.0)
    assert not torch.isin(torch.cat(list(batches)), first).any()


def test_loader_normalises():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1).expand(2, 28, 28)
    data, _ = mnist.Loader(images, torch.zeros(2), batch_size=2).batch(torch.arange(2))
    assert data.shape == (2, 1, 28, 28)
    assert data.dtype == torch.float32
    assert torch.allclose(data[0], torch.tensor(-0.1307 / 0.3081))
    assert torch.allclose(data[1], torch.tensor((1 - 0.1307) / 0.3081))


@pytest.mark.parametrize("train", [True, False])
def test_loader_augments_for_training_alone(train):
    images, labels = digits(100)
    data, _ = mnist.Loader(images[:1].expand(100, 28, 28), labels, 100, train=train).batch(torch.arange(100))
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

DEVICES = sorted({"cpu", mnist.pick_device("auto").type})


@pytest.mark.parametrize("device", DEVICES)
def test_training_loss_falls_and_the_digits_are_learned(small_mnist, device):
    results = mnist.main(["--epochs", "5", "--batch-size", "20", "--data-dir", small_mnist, "--device", device])
    losses = [epoch["train_loss"] for epoch in results["history"]]
    assert losses[-1] < losses[0] / 1.5
    assert results["test_accuracy"] > 90


def test_training_reports_the_means_over_the_whole_epoch():
    loader = mnist.Loader(*digits(230), batch_size=10, train=True)
    totals, losses = torch.zeros(2), []

    def step(index):
        losses.append(len(losses) ** 2)
        totals.add_(torch.tensor([losses[-1], 7]))

    for epoch in (1, 2):
        losses.clear()
        loss, accuracy = mnist.train(step, loader, totals, epoch)
        assert len(losses) == 23
        assert loss == pytest.approx(sum(losses) / 23, rel=1e-5)
        assert accuracy == pytest.approx(70)


def test_a_step_records_the_loss_of_its_images_and_the_totals(monkeypatch):
    monkeypatch.setattr(mnist, "augment", lambda images: images)
    loader = mnist.Loader(*digits(100), batch_size=20, train=True)
    model, totals, index = mnist.Net(), torch.zeros(2), torch.arange(50, 70)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    mnist.train_step(model, loader, mnist.Muon(model, 0.01, 10), torch.float32, totals, index)
    assert all((before[name] != tensor).any() for name, tensor in model.named_parameters() if tensor.ndim > 1)

    model.load_state_dict(before)
    torch.manual_seed(0)  # for the same dropout
    data, target = loader.batch(index)
    output = model(data)
    losses = F.cross_entropy(output, target, reduction="none")
    assert torch.allclose(loader.losses[index], losses)
    assert (loader.losses[:50] == 1).all()
    assert (loader.losses[70:] == 1).all()
    smooth = F.cross_entropy(output, target, label_smoothing=mnist.LABEL_SMOOTHING)
    assert torch.allclose(totals, torch.stack([smooth, (output.argmax(dim=1) == target).sum()]))


def test_a_step_never_waits_for_the_device():
    """What a CUDA graph can capture reads no value back from the device, nor has shapes that depend on values."""

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.overloadpacket._qualified_op_name not in (
                "aten::_local_scalar_dense",
                "aten::nonzero",
                "aten::masked_select",
                "aten::_unique2",
            )
            return function(*args, **kwargs or {})

    loader = mnist.Loader(*digits(100), batch_size=20, train=True)
    model, totals = mnist.Net(), torch.zeros(2)
    optimizer = mnist.Muon(model, 0.01, 10)
    with NoReading():
        mnist.train_step(model, loader, optimizer, torch.float32, totals, torch.arange(20))
    with pytest.raises(AssertionError), NoReading():
        totals.sum().item()


def test_a_graphed_step_trains_on_every_batch_once_and_in_order(monkeypatch):
    """With a stand-in for CUDA, in which capturing takes the step down and replaying it does the step."""
    done, recorded = [], []

    @contextlib.contextmanager
    def graph(_):
        recorded.append(len(done))
        yield
        recorded.append(done.pop())  # nothing is run while a graph is captured

    class CUDAGraph:
        def replay(self):
            done.append(recorded[1].clone())

    def step(index):
        done.append(index if len(recorded) == 1 else index.clone())

    class Stream:
        def wait_stream(self, _):
            pass

    for name, stand_in in (("graph", graph), ("CUDAGraph", CUDAGraph), ("Stream", Stream)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    batches = torch.arange(60).split(6)
    graphed = mnist.GraphedStep(step)
    for index in batches:
        graphed(index)
    assert len(recorded) == 2
    assert torch.equal(torch.stack(done), torch.stack(batches))
    assert torch.equal(torch.cat(batches), torch.arange(60))  # not written over


# --- The optimizer -------------------------------------------------------------------------------------------------


def test_orthogonalize_makes_all_singular_values_about_1():
    torch.manual_seed(0)
    shapes = [(32, 144), (32, 8), (16, 16)]
    matrices = [torch.randn(shape) @ torch.diag(torch.logspace(0, -1, shape[1])) for shape in shapes]
    results = mnist.orthogonalize(matrices)
    for matrix, result in zip(matrices, results, strict=True):
        assert result.shape == matrix.shape
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.3
        assert values.max() < 1.3
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        nearest = left @ right
        assert (result * nearest).sum() > 0.9 * result.norm() * nearest.norm()
        (scaled,) = mnist.orthogonalize([1000 * matrix])
        assert torch.allclose(scaled, result, atol=1e-3)


def test_the_learning_rate_climbs_and_falls_to_zero(monkeypatch):
    """Seen in the steps of a bias with a constant gradient and no momentum."""
    monkeypatch.setattr(mnist, "MOMENTUM", 0)
    layer = torch.nn.Conv2d(1, 1, 1)
    optimizer = mnist.Muon(layer, lr=0.1, steps=9)
    before, rates = layer.bias.item(), []
    for _ in range(9):
        layer.weight.grad, layer.bias.grad = torch.zeros(1, 1, 1, 1), torch.ones(1)
        optimizer.step()
        rates.append(before - layer.bias.item())
        before = layer.bias.item()
    climb = mnist.WARM_UP * 10
    expected = [0.1 * min(n / climb, (10 - n) / (10 - climb)) for n in range(1, 10)]
    assert rates == pytest.approx(expected, abs=1e-5)


def test_momentum_is_nesterovs_as_in_torch(monkeypatch):
    monkeypatch.setattr(mnist, "orthogonalize", lambda matrices: matrices)
    torch.manual_seed(0)
    mine, theirs = torch.nn.Conv2d(3, 2, 1), torch.nn.Conv2d(3, 2, 1)
    theirs.load_state_dict(mine.state_dict())
    optimizer = mnist.Muon(mine, lr=0.1, steps=5)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=mnist.MOMENTUM, nesterov=True)
    climb = mnist.WARM_UP * 6
    for n in range(1, 6):
        for layer in (mine, theirs):
            layer.zero_grad()
            layer(torch.ones(4, 3, 2, 2) * n).square().sum().backward()
        reference.param_groups[0]["lr"] = 0.1 * min(n / climb, (6 - n) / (6 - climb))
        optimizer.step()
        reference.step()
    assert torch.allclose(mine.weight, theirs.weight, rtol=1e-4)


def test_the_update_of_a_convolution_is_orthogonal():
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(8, 16, 3)
    before = convolution.weight.detach().clone()
    convolution(torch.randn(2, 8, 5, 5)).square().sum().backward()
    mnist.Muon(convolution, lr=0.1, steps=9).step()
    rate = 0.1 * 0.1 / mnist.WARM_UP
    values = torch.linalg.svdvals((convolution.weight.detach() - before).flatten(1) / rate)
    assert values.min() > 0.3
    assert values.max() < 1.3


# --- Testing -------------------------------------------------------------------------------------------------------


def test_testing_neither_augments_nor_changes_the_model():
    torch.manual_seed(0)
    model, loader = mnist.Net(), mnist.Loader(*digits(100), batch_size=30)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    assert mnist.test(model, loader, torch.float32) == mnist.test(model, loader, torch.float32)
    assert all(torch.equal(*pair) for pair in zip(before, model.state_dict().values(), strict=True))


def test_batch_norm_is_recomputed_as_the_plain_mean_of_the_batches():
    torch.manual_seed(0)
    model, loader = mnist.Net(), mnist.Loader(*digits(100), batch_size=25)
    model(10 * torch.randn(8, 1, 28, 28))  # statistics that have nothing to do with the loader's images
    weights = [parameter.clone() for parameter in model.parameters()]
    mnist.recompute_batch_norm(model, loader, torch.float32)
    batches = [model.conv1(loader.batch(index)[0]).detach() for index in loader]
    assert torch.allclose(model.bn1.running_mean, torch.cat(batches).mean(dim=(0, 2, 3)), atol=1e-5)
    variances = torch.stack([batch.var(dim=(0, 2, 3)) for batch in batches])
    assert torch.allclose(model.bn1.running_var, variances.mean(dim=0), rtol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True))

    # Neither dropout nor what was there before has a part in it.
    before = [buffer.clone() for name, buffer in model.named_buffers() if "running" in name]
    model.train()
    mnist.recompute_batch_norm(model, loader, torch.float32)
    after = [buffer for name, buffer in model.named_buffers() if "running" in name]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_the_trained_model_has_recomputed_batch_norm():
    torch.manual_seed(0)
    images, labels = digits(400)
    model, loader = mnist.Net(), mnist.Loader(images, labels, 20, train=True)
    mnist.fit(model, loader, mnist.Loader(images, labels, 100), epochs=2, lr=0.01, precision=torch.float32)
    before = model.bn7.running_var.clone()
    mnist.recompute_batch_norm(model, mnist.Loader(images[::10], labels[::10], 250), torch.float32)
    assert torch.equal(before, model.bn7.running_var)


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


def assert_refused(main, option, value, capsys):
    """Assert that a script's main() ends by status 2 and a last line that names the option and its value."""
    with pytest.raises(SystemExit) as stop:
        main([option, value])
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert option in message
    assert value in message


def test_output_is_the_documented_log(small_mnist, capsys):
    mnist.main(
        ["--epochs", "1", "--batch-size", "100", "--data-dir", small_mnist, "--device", "cpu", "--precision", "float32"]
    )
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "Total Parameters: 18242"
    assert lines[1].startswith("Training on cpu (")
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
    assert_refused(mnist.main, option, value, capsys)


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
