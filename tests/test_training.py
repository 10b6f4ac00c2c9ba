"""Training: the step, the optimizer, testing, and that the same seed gives the same bits."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mnist

DEVICES = sorted({"cpu", mnist.pick_device("auto").type})

# --- fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_digits_are_learned(small_mnist, device):
    results = mnist.main(["--epochs", "5", "--batch-size", "20", "--data-dir", small_mnist, "--device", device])
    losses = [epoch["train_loss"] for epoch in results["history"]]
    assert losses[-1] < losses[0] / 1.5
    assert results["test_accuracy"] > 90


def test_bfloat16_trains(small_mnist, monkeypatch):
    precisions, fit = [], mnist.fit
    monkeypatch.setattr(mnist, "fit", lambda model, *args: precisions.append(model.precision) or fit(model, *args))
    results = mnist.main(["--dry-run", "--precision", "bfloat16", "--data-dir", small_mnist])
    assert precisions == [torch.bfloat16]
    assert results["settings"]["precision"] == "bfloat16"


@pytest.fixture
def repeatable_model(monkeypatch):
    """A network without dropout, and training without augmentation, so that a test can repeat a step."""
    monkeypatch.setattr(mnist, "augment", lambda images, strength: images)
    torch.manual_seed(0)
    model = mnist.Net()
    model.dropout.p = 0
    return model


def test_step_records_its_losses(repeatable_model, digits, monkeypatch):
    images, labels = digits(39)
    index, recorded = torch.arange(5, 25), []

    def train_batches(losses, batch_size, epoch):
        recorded.append(losses)
        yield index

    monkeypatch.setattr(mnist, "train_batches", train_batches)
    before = {name: tensor.clone() for name, tensor in repeatable_model.state_dict().items()}
    (epoch,) = mnist.fit(repeatable_model, (images, labels), digits(10), epochs=1, batch_size=20, lr=0.01)
    assert all(
        (before[name] != tensor).any() for name, tensor in repeatable_model.named_parameters() if tensor.ndim > 1
    )

    repeatable_model.load_state_dict(before)
    output = repeatable_model.train()(mnist.normalise(images[index]))
    (losses,) = recorded
    assert torch.allclose(losses[index], F.cross_entropy(output, labels[index], reduction="none"))
    assert (losses[:5] == 1).all()
    assert (losses[25:] == 1).all()
    loss = F.cross_entropy(output, labels[index], label_smoothing=mnist.LABEL_SMOOTHING)
    assert epoch["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    correct = (output.argmax(dim=1) == labels[index]).sum().item()
    assert epoch["train_accuracy"] == pytest.approx(100 * correct / 20)


def test_history_holds_means_of_epochs(repeatable_model, digits, monkeypatch):
    images, labels = digits(230)
    indices, batches = [], mnist.train_batches

    def train_batches(*args):
        indices.append(list(batches(*args)))
        return indices[-1]

    monkeypatch.setattr(mnist, "train_batches", train_batches)
    history = mnist.fit(repeatable_model, (images, labels), digits(10), epochs=2, batch_size=10, lr=1e-30)
    repeatable_model.train()
    for epoch, order in zip(history, indices, strict=True):
        assert len(order) == 23
        outputs = [(repeatable_model(mnist.normalise(images[index])), labels[index]) for index in order]
        losses = [F.cross_entropy(*pair, label_smoothing=mnist.LABEL_SMOOTHING).item() for pair in outputs]
        correct = sum((output.argmax(dim=1) == target).sum().item() for output, target in outputs)
        assert epoch["train_loss"] == pytest.approx(sum(losses) / 23, rel=1e-4)
        assert epoch["train_accuracy"] == pytest.approx(100 * correct / 230)


def test_training_augments_its_images(digits, monkeypatch):
    normalised, normalise = [], mnist.normalise
    monkeypatch.setattr(mnist, "augment", lambda images, strength: images.float() + 1)
    monkeypatch.setattr(mnist, "normalise", lambda images: normalised.append(images) or normalise(images))
    mnist.fit(mnist.Net(), digits(60), digits(10), epochs=1, batch_size=20, lr=0.01)
    *training, testing = normalised
    assert [(len(images), images.min()) for images in training] == [(20, 1)] * 3
    assert testing.min() == 0


def test_last_steps_are_calm(digits, monkeypatch):
    strengths = []
    monkeypatch.setattr(mnist, "augment", lambda images, strength: strengths.append(float(strength)) or images)
    mnist.fit(mnist.Net(), digits(60), digits(10), epochs=2, batch_size=12, lr=0.01)
    assert strengths == [1] * 6 + [0.5] * 4


def test_infinite_loss_stops_the_run(small_mnist, tmp_path):
    (tmp_path / "mnist.pt").write_bytes(b"an earlier run")
    with pytest.raises(mnist.UserError, match=r"the loss is (nan|inf) at epoch 1, step \d+: lower --lr"):
        mnist.main(["--lr", "1e30", "--batch-size", "5", "--data-dir", small_mnist])
    assert (tmp_path / "mnist.pt").read_bytes() == b"an earlier run"


# --- On a GPU ------------------------------------------------------------------------------------------------------


def test_step_stays_on_its_device(digits, monkeypatch):
    """What a CUDA graph can capture: on the meta device, where nothing has a value, the whole step runs and stays."""

    class MetaOnly(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            devices = {
                leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)
            }
            assert devices <= {"meta"}, f"{function} on {devices}"
            return result

    def train_batches(losses, batch_size, _):
        with MetaOnly():  # until fit() asks for the next batch
            yield torch.empty(batch_size, dtype=torch.int64, device="meta")
            raise EOFError

    monkeypatch.setattr(mnist, "train_batches", train_batches)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # does not know the meta device
    monkeypatch.setattr(mnist.time, "perf_counter", lambda: 0)  # so that fit() does not read the totals
    train_set = [tensor.to("meta") for tensor in digits(60)]
    with pytest.raises(EOFError):
        mnist.fit(mnist.Net().to("meta"), train_set, digits(10), epochs=1, batch_size=20, lr=0.01)
    with pytest.raises(AssertionError, match="on"), MetaOnly():
        torch.ones(2)


def test_graph_replays_each_batch_once(monkeypatch):
    """With a stand-in for CUDA, in which a capture records the step and a replay repeats it."""
    done, recorded = [], []

    @contextlib.contextmanager
    def graph(_, stream):
        assert stream is graphed.stream
        recorded.append(len(done))
        yield
        recorded.append(done.pop())  # nothing runs while a graph is captured

    class CUDAGraph:
        def replay(self):
            done.append(recorded[1].clone())

    def step(index):
        done.append(index if len(recorded) == 1 else index.clone())

    class Stream:
        created = 0

        def __init__(self):
            Stream.created += 1

        def wait_stream(self, _):
            pass

    for name, stand_in in (("graph", graph), ("CUDAGraph", CUDAGraph), ("Stream", Stream)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    current = Stream()
    batches = torch.arange(60).split(6)
    graphed = mnist.GraphedStep(step)
    for index in batches:
        graphed(index)
    assert Stream.created == 2  # and not one more for each call
    assert len(recorded) == 2
    assert torch.equal(torch.stack(done), torch.stack(batches))
    assert torch.equal(torch.cat(batches), torch.arange(60))  # not written over


# --- The optimizer -------------------------------------------------------------------------------------------------


def test_orthogonalize_singular_values():
    torch.manual_seed(0)
    matrices = torch.zeros(3, 32, 144)
    shapes = [(32, 144), (32, 8), (16, 16)]
    for matrix, (rows, columns) in zip(matrices, shapes, strict=True):
        matrix[:rows, :columns] = torch.randn(rows, columns) @ torch.diag(torch.logspace(0, -1, columns))
    results = mnist.orthogonalize(matrices)
    assert torch.allclose(mnist.orthogonalize(1000 * matrices), results, atol=1e-3)
    for matrix, result, (rows, columns) in zip(matrices, results, shapes, strict=True):
        assert (result[rows:] == 0).all()
        assert (result[:, columns:] == 0).all()
        matrix, result = matrix[:rows, :columns], result[:rows, :columns]
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.3
        assert values.max() < 1.3
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        nearest = left @ right
        assert (result * nearest).sum() > 0.9 * result.norm() * nearest.norm()


def test_learning_rate_climbs_and_falls(monkeypatch):
    """Seen in the steps of a bias with a constant gradient and no momentum."""
    monkeypatch.setattr(mnist, "MOMENTUM", 0)
    layer = torch.nn.Conv2d(1, 1, 1)
    optimizer = mnist.Muon(layer, lr=0.1, steps=9)
    before, rates = layer.bias.item(), []
    for _ in range(9):
        layer.bias.grad.fill_(1)
        optimizer.step()
        rates.append(before - layer.bias.item())
        before = layer.bias.item()
    climb = mnist.WARM_UP * 10
    expected = [0.1 * min(n / climb, (10 - n) / (10 - climb)) for n in range(1, 10)]
    assert rates == pytest.approx(expected, abs=1e-5)


def test_momentum_is_that_of_torch(monkeypatch):
    monkeypatch.setattr(mnist, "orthogonalize", lambda matrices: matrices)
    torch.manual_seed(0)
    mine, theirs = (torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.Conv2d(2, 4, 2)) for _ in range(2))
    theirs.load_state_dict(mine.state_dict())
    optimizer = mnist.Muon(mine, lr=0.1, steps=5)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=mnist.MOMENTUM, nesterov=True)
    climb = mnist.WARM_UP * 6
    for n in range(1, 6):
        optimizer.zero_grad()
        reference.zero_grad()
        for model in (mine, theirs):
            model(torch.ones(4, 3, 2, 2) * n / 5).square().sum().backward()
        reference.param_groups[0]["lr"] = 0.1 * min(n / climb, (6 - n) / (6 - climb))
        optimizer.step()
        reference.step()
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_filters_move_orthogonally():
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    before = convolution.weight.detach().clone()
    optimizer = mnist.Muon(convolution, lr=0.1, steps=9)
    convolution(torch.randn(2, 8, 5, 5)).square().sum().backward()
    optimizer.step()
    rate = 0.1 * 0.1 / mnist.WARM_UP
    values = torch.linalg.svdvals((convolution.weight.detach() - before).flatten(1) / rate)
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_parameters_are_views_of_one_buffer():
    model = mnist.Net().to(memory_format=torch.channels_last)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = mnist.Muon(model, lr=0.1, steps=9)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.stride() == before[name].stride()  # in another layout a step takes half as long again
        assert parameter.untyped_storage().data_ptr() == optimizer.values.untyped_storage().data_ptr()
    model(torch.randn(8, 1, 28, 28)).sum().backward()
    grads = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert grads.norm() == pytest.approx(optimizer.grads.norm().item())
    optimizer.zero_grad()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


# --- Testing -------------------------------------------------------------------------------------------------------


def test_classify_gives_logits_in_order(digits, monkeypatch):
    monkeypatch.setattr(mnist, "TEST_BATCH_SIZE", 30)
    torch.manual_seed(0)
    model, images = mnist.Net(), digits(100)[0][torch.randperm(100)]
    logits = mnist.classify(model.train(), images)
    assert not model.training  # so without dropout
    assert torch.allclose(logits, model(mnist.normalise(images)), atol=1e-5)


def test_test_gives_loss_and_correct(digits, monkeypatch):
    images, labels = digits(100)
    logits = 5 * F.one_hot((labels + (torch.arange(100) < 7)) % 10, 10).float()
    monkeypatch.setattr(mnist, "classify", lambda model, images: logits)
    loss, correct = mnist.test(None, images, labels)
    assert correct == 93
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item())


def test_testing_changes_nothing(digits):
    model = mnist.Net()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    assert mnist.test(model, *digits(100)) == mnist.test(model, *digits(100))
    assert all(torch.equal(*pair) for pair in zip(before, model.state_dict().values(), strict=True))


def test_calibration_finds_the_scale(repeatable_model):
    images = torch.randint(256, (3000, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        repeatable_model.fc.weight.mul_(20)
    before = mnist.classify(repeatable_model, images)
    labels = torch.multinomial((2 * before).softmax(dim=1), 1).squeeze(1)
    scale = mnist.calibrate(repeatable_model, images, labels)
    assert scale == pytest.approx(2, abs=0.3)
    assert torch.allclose(mnist.classify(repeatable_model, images), scale * before, rtol=1e-3, atol=1e-3)


# --- Reproducibility -----------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_bits(small_mnist, tmp_path):
    paths = [tmp_path / name for name in ("first.pt", "second.pt", "other.pt")]
    for path, seed in zip(paths, ("7", "7", "8"), strict=True):
        mnist.main(["--epochs", "2", "--seed", seed, "--data-dir", small_mnist, "--save-model", str(path)])
    first, second, other = (mnist.load(path)[0].state_dict() for path in paths)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_processes_repeat_the_bits(start, tmp_path):
    runs = {"first": "2", "second": "2", "third": "1"}
    processes = [
        start("--epochs", "2", "--save-model", f"{run}.pt", env={"OMP_NUM_THREADS": threads})
        for run, threads in runs.items()
    ]
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == 0, err
    losses = [mnist.load(tmp_path / f"{run}.pt")[1]["history"][-1]["train_loss"] for run in runs]
    first, second = (mnist.load(tmp_path / f"{run}.pt")[0].state_dict() for run in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses[0] == losses[1]
    assert losses[2] == pytest.approx(losses[0], abs=0.1)  # another thread count: the same but for rounding
