"""Training: the step, the optimizer, testing, and that the same seed gives bitwise identical weights."""

import contextlib
from types import SimpleNamespace

import mnist
from tools import weights

import pytest
import torch
import torch.nn.functional as F

DEVICES = sorted({"cpu", mnist.pick_device("auto").type})

# --- fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "tests"), [(20, 10), (mnist.JUNK, 10), (0, 10), (19, 0)])
def test_sets_that_cannot_be_trained_or_tested_on_are_refused(batch_size, tests, digits):
    with pytest.raises(ValueError, match=f"batch_size {batch_size} is not from 9 to 19, or the test set is empty"):
        mnist.fit(mnist.Net(), digits(19), digits(tests), epochs=1, batch_size=batch_size, lr=0.01)


@pytest.mark.parametrize("device", DEVICES)
def test_digits_are_learned(small_mnist, device):
    results = mnist.main(["--epochs", "8", "--batch-size", "40", "--data-dir", small_mnist, "--device", device])
    losses = [epoch["train_loss"] for epoch in results["history"]]
    assert losses[-1] < losses[0] / 1.5
    assert results["test_accuracy"] > 90


def test_bfloat16_trains_and_float32_tests(small_mnist, monkeypatch):
    types, forward = [], mnist.Net.forward

    def recorded(model, x):
        logits = forward(model, x)
        types.append((model.training, logits.dtype))
        return logits

    monkeypatch.setattr(mnist.Net, "forward", recorded)
    results = mnist.main(["--dry-run", "--precision", "bfloat16", "--data-dir", small_mnist])
    assert types == [(True, torch.bfloat16), (False, torch.float32)]
    assert results["settings"]["precision"] == "bfloat16"


@pytest.fixture
def repeatable_model(monkeypatch):
    """A network without dropout, and training on the images as they are, so that a test can repeat a step."""
    monkeypatch.setattr(mnist, "augment", lambda images: images)
    torch.manual_seed(0)
    model = mnist.Net()
    model.dropout.p = 0
    return model


def test_step_records_its_losses(repeatable_model, digits, monkeypatch):
    images, labels = digits(39)
    index, recorded, grads, junk, step = torch.arange(5, 25), [], [], images[:1].mT, mnist.Muon.step
    monkeypatch.setattr(mnist, "make_junk", lambda *_: junk)

    def record(optimizer, lr):
        grads.append(repeatable_model.fc.weight.grad.clone())
        step(optimizer, lr)

    monkeypatch.setattr(mnist.Muon, "step", record)

    def train_batches(losses, batches, size):
        assert (batches, size) == (1, 20)
        recorded.append(losses)
        yield index

    monkeypatch.setattr(mnist, "train_batches", train_batches)
    before = {name: tensor.clone() for name, tensor in repeatable_model.state_dict().items()}
    (epoch,) = mnist.fit(repeatable_model, (images, labels), digits(10), epochs=1, batch_size=28, lr=0.01)
    assert all(
        (before[name] != tensor).any() for name, tensor in repeatable_model.named_parameters() if tensor.ndim > 1
    )

    repeatable_model.load_state_dict(before)
    output = repeatable_model.train()(mnist.normalize(torch.cat([images[index], junk.expand(8, -1, -1)])))
    (losses,) = recorded
    assert torch.allclose(losses[index], F.cross_entropy(output[:20], labels[index], reduction="none"))
    assert losses[:5].isinf().all()  # not seen yet
    assert losses[25:].isinf().all()
    assert epoch["train_loss"] == pytest.approx(losses[index].mean().item(), rel=1e-5)  # of the digits alone
    loss = 20 / 28 * F.cross_entropy(output[:20], labels[index])
    loss -= 8 / 28 * output[20:].log_softmax(dim=1).mean()  # junk is to be each digit with the same probability
    repeatable_model.zero_grad()
    loss.backward()
    assert torch.allclose(grads[0], repeatable_model.fc.weight.grad, rtol=1e-3, atol=1e-6)
    correct = (output[:20].argmax(dim=1) == labels[index]).sum().item()
    assert epoch["train_accuracy"] == pytest.approx(100 * correct / 20)


def test_history_holds_means_of_epochs(repeatable_model, digits, monkeypatch):
    monkeypatch.setattr(mnist, "JUNK", 0)
    images, labels = digits(230)
    indices, batches = [], mnist.train_batches

    def train_batches(*args):
        indices.append(list(batches(*args)))
        return indices[-1]

    monkeypatch.setattr(mnist, "train_batches", train_batches)
    history = mnist.fit(repeatable_model, (images, labels), digits(30), epochs=2, batch_size=10, lr=1e-30)
    repeatable_model.train()
    for epoch, order in zip(history, indices, strict=True):
        assert [len(index) for index in order] == [10] * 23
        outputs = [(repeatable_model(mnist.normalize(images[index])), labels[index]) for index in order]
        losses = [F.cross_entropy(*pair).item() for pair in outputs]
        correct = sum((output.argmax(dim=1) == target).sum().item() for output, target in outputs)
        assert epoch["train_loss"] == pytest.approx(sum(losses) / 23, rel=1e-4)
        assert epoch["train_accuracy"] == pytest.approx(100 * correct / 230)


def test_training_augments_its_images(digits, monkeypatch):
    normalized, normalize = [], mnist.normalize
    monkeypatch.setattr(mnist, "augment", lambda images: images.float() + 1)
    monkeypatch.setattr(mnist, "normalize", lambda images: normalized.append(images) or normalize(images))
    mnist.fit(mnist.Net(), digits(60), digits(10), epochs=1, batch_size=20, lr=0.01)
    *training, testing = normalized
    assert [(len(images), images.min()) for images in training] == [(20, 1)] * 3
    assert testing.min() == 0


def test_junk_of_each_batch_is_drawn_anew(digits, monkeypatch):
    batches = []
    monkeypatch.setattr(
        mnist, "make_junk", lambda *_: torch.arange(100, dtype=torch.uint8).view(100, 1, 1).expand(-1, 28, 28)
    )
    monkeypatch.setattr(mnist, "augment", lambda images: batches.append(images) or images)
    mnist.fit(mnist.Net(), digits(60), digits(10), epochs=1, batch_size=20, lr=0.01)
    drawn = torch.stack([images[12:, 0, 0] for images in batches])
    assert drawn.shape == (3, 8)
    assert len(drawn.unique()) > 12


def in_order(losses, batches, digits):
    return torch.arange(batches * digits).split(digits)  # on the CPU


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA knows")


@needs_cuda
@pytest.mark.parametrize("train_batches", [mnist.train_batches, in_order])
def test_a_graph_trains_as_the_plain_loop_does(digits, monkeypatch, train_batches):
    monkeypatch.setattr(mnist, "train_batches", train_batches)
    torch.backends.cudnn.deterministic = True
    train_set, test_set = ([part.cuda() for part in digits(count)] for count in (50 * 128, 10))
    replays, states = [], []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    for wrap in (mnist.GraphedStep, lambda step, _: step):
        monkeypatch.setattr(mnist, "GraphedStep", wrap)
        torch.manual_seed(0)
        model = mnist.Net().to("cuda", memory_format=torch.channels_last)
        mnist.fit(model, train_set, test_set, epochs=1, batch_size=128, lr=0.01, precision=torch.bfloat16)
        states.append(model.state_dict())
    assert len(replays) == 47  # of 50 steps
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@needs_cuda
def test_weights_of_a_gpu_load_without_one(small_mnist, tmp_path):
    path = tmp_path / "mnist.pt"
    mnist.main(["--device", "cuda", "--dry-run", "--save-model", str(path), "--data-dir", small_mnist])
    assert {tensor.device.type for tensor in torch.load(path, weights_only=True)["state_dict"].values()} == {"cpu"}


def test_a_graph_is_captured_once_and_replayed_with_new_inputs(monkeypatch):
    taken, captures = [], []

    def step(x):
        if len(captures) != 1:  # not while it is captured
            taken.append(x.item())
        return [2 * x]

    class Graph:
        def replay(self):
            graphed.outputs[0].copy_(step(*graphed.inputs)[0])

    @contextlib.contextmanager
    def capture(graph, stream):
        captures.append("begun")
        yield
        captures.append("ended")

    simulated = {"Stream": lambda device: SimpleNamespace(device=device), "CUDAGraph": Graph, "graph": capture}
    simulated |= {"stream": contextlib.nullcontext, "synchronize": lambda device: None}
    for name, value in simulated.items():
        monkeypatch.setattr(torch.cuda, name, value)
    graphed, inputs = mnist.GraphedStep(step, torch.device("cpu")), torch.arange(7).split(1)
    assert [graphed(x)[0].item() for x in inputs] == [0, 2, 4, 6, 8, 10, 12]
    assert taken == torch.cat(inputs).tolist() == [*range(7)]
    assert captures == ["begun", "ended"]


def test_infinite_loss_stops_the_run(small_mnist, tmp_path):
    (tmp_path / "mnist.pt").write_bytes(b"an earlier run")
    with pytest.raises(mnist.UserError, match=r"the loss is (nan|inf) at epoch 1, step \d+: try a lower --lr"):
        mnist.main(["--lr", "1e30", "--batch-size", "20", "--data-dir", small_mnist])
    assert (tmp_path / "mnist.pt").read_bytes() == b"an earlier run"


# --- The optimizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(32, 144), (32, 8), (16, 16)])
def test_orthogonalize_singular_values(rows, columns):
    torch.manual_seed(0)
    matrices = torch.randn(3, rows, columns) @ torch.diag(torch.logspace(0, -1, columns))
    results = mnist.orthogonalize(matrices)
    assert torch.allclose(mnist.orthogonalize(1000 * matrices), results, atol=1e-3)
    for matrix, result in zip(matrices, results, strict=True):
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.3
        assert values.max() < 1.3
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        nearest = left @ right
        assert (result * nearest).sum() > 0.9 * result.norm() * nearest.norm()


def test_learning_rate_climbs_and_falls(digits, monkeypatch):
    rates, step = [], mnist.Muon.step
    monkeypatch.setattr(mnist.Muon, "step", lambda optimizer, lr: rates.append(lr) or step(optimizer, lr))
    mnist.fit(mnist.Net(), digits(60), digits(10), epochs=3, batch_size=20, lr=0.1)
    climb = mnist.WARM_UP_SHARE * 10
    expected = [0.1 * min(n / climb, (10 - n) / (10 - climb)) for n in range(1, 10)]
    assert rates == pytest.approx(expected)


def test_momentum_is_that_of_torch(monkeypatch):
    monkeypatch.setattr(mnist, "orthogonalize", lambda matrices: matrices)
    monkeypatch.setattr(mnist, "WEIGHT_DECAY", 0)
    torch.manual_seed(0)
    mine, theirs = (torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.Conv2d(2, 4, 2)) for _ in range(2))
    theirs.load_state_dict(mine.state_dict())
    optimizer = mnist.Muon(mine)
    reference = torch.optim.SGD(theirs.parameters(), momentum=mnist.MOMENTUM, nesterov=True)
    for lr in (0.02, 0.1, 0.05, 0.01):
        for model in (mine, theirs):
            model.zero_grad()
            model(torch.ones(4, 3, 2, 2) * lr).square().sum().backward()
        reference.param_groups[0]["lr"] = lr
        optimizer.step(lr)
        reference.step()
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_weights_decay_and_biases_do_not():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(3, 2)
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    mnist.Muon(model).step(torch.tensor(0.1))
    for parameter, old in zip(model.parameters(), before, strict=True):
        kept = 1 - 0.1 * mnist.WEIGHT_DECAY if parameter.ndim > 1 else 1
        assert torch.allclose(parameter, kept * old, rtol=1e-6)


def test_linear_layer_follows_its_gradient(monkeypatch):
    monkeypatch.setattr(mnist, "WEIGHT_DECAY", 0)
    layer = torch.nn.Linear(8, 3)
    before = layer.weight.detach().clone()
    layer(torch.randn(9, 8)).square().sum().backward()
    mnist.Muon(layer).step(0.1)
    assert torch.allclose(before - layer.weight, 0.1 * (1 + mnist.MOMENTUM) * layer.weight.grad, atol=1e-5)


def test_filters_move_orthogonally():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Conv2d(8, 8, 3) for _ in range(2)]).to(memory_format=torch.channels_last)
    before = [layer.weight.detach().clone() for layer in model]
    model(torch.randn(9, 8, 5, 5)).square().sum().backward()
    grads = [layer.weight.grad.flatten(1) for layer in model]
    mnist.Muon(model).step(0.1)
    for layer, old, grad in zip(model, before, grads, strict=True):
        change = (old - layer.weight.detach()).flatten(1) / 0.1
        values = torch.linalg.svdvals(change)
        assert values.min() > 0.3
        assert values.max() < 1.3
        left, _, right = torch.linalg.svd(grad, full_matrices=False)
        assert (change * (left @ right)).sum() > 0.9 * change.norm() * (left @ right).norm()


# --- Testing -------------------------------------------------------------------------------------------------------


def test_classify_gives_logits_in_order(digits, monkeypatch):
    monkeypatch.setattr(mnist, "TEST_BATCH_SIZE", 30)
    torch.manual_seed(0)
    model, images = mnist.Net(), digits(100)[0][torch.randperm(100)]
    logits = mnist.classify(model.train(), images)
    assert not model.training  # so without dropout
    assert torch.allclose(logits, model(mnist.normalize(images)), atol=1e-5)


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


# --- Reproducibility -----------------------------------------------------------------------------------------------


def test_same_seed_gives_identical_weights(small_mnist, tmp_path):
    paths = [tmp_path / name for name in ("first.pt", "second.pt", "other.pt")]
    for path, seed in zip(paths, ("7", "7", "8"), strict=True):
        mnist.main(["--epochs", "2", "--seed", seed, "--data-dir", small_mnist, "--save-model", str(path)])
    first, second, other = (weights.load(path)[0].state_dict() for path in paths)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_processes_give_identical_weights(start, tmp_path):
    runs = {"first": "2", "second": "2", "third": "1"}
    processes = [
        start("--epochs", "2", "--save-model", f"{run}.pt", env={"OMP_NUM_THREADS": threads})
        for run, threads in runs.items()
    ]
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == 0, err
    losses = [weights.load(tmp_path / f"{run}.pt")[1]["history"][-1]["train_loss"] for run in runs]
    first, second = (weights.load(tmp_path / f"{run}.pt")[0].state_dict() for run in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses[0] == losses[1]
    assert losses[2] == pytest.approx(losses[0], abs=0.1)  # another thread count: the same but for rounding
