"""The two promises of mnist.py, and its network. The tests of everything else are in tests/."""

import os

import mnist

import pytest
import torch
import torch.nn.functional as F
import torchsummary

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


def test_fewer_than_25_000_parameters():
    parameters = sum(parameter.numel() for parameter in mnist.Net().parameters())
    assert parameters < 25_000
    assert parameters == 18_242


def test_above_99_4_percent_within_20_epochs(tmp_path):
    path = tmp_path / "mnist.pt"
    results = mnist.main(["--save-model", str(path)])
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):  # GitHub Actions shows it on the page of the run
        with open(summary, "a", encoding="utf-8") as file:
            file.write(f"{results['test_accuracy']:.2f} % after {results['seconds']:.0f} s of training\n")
    assert len(results["history"]) <= 20
    assert results["test_accuracy"] > 99.4

    # The saved weights are the ones that were tested.
    device = results["settings"]["device"]
    model, checkpoint = mnist.Net(), torch.load(path, weights_only=True)
    model.load_state_dict(checkpoint["state_dict"], assign=True)  # in the memory format they were tested in
    loss, correct = mnist.test(model.to(device), *mnist.load_mnist(mnist.DATA_DIR, device)[1])
    assert correct / 100 == results["test_accuracy"] == checkpoint["test_accuracy"]
    assert loss == pytest.approx(results["test_loss"], rel=1e-3)


def test_summary_is_the_published_table(capsys):
    torchsummary.summary(mnist.Net(), (1, 28, 28), device="cpu")
    lines = capsys.readouterr().out.splitlines()
    rows = [line.replace("[-1,", "").replace("]", "").replace(", ", " ").split() for line in lines[3:23]]
    assert rows == [line.split() for line in SUMMARY.strip().splitlines()]
    assert "Total params: 18,242" in lines


def test_ten_logits_an_image():
    torch.manual_seed(0)
    logits = mnist.Net()(torch.randn(5, 1, 28, 28))
    assert logits.shape == (5, 10)
    assert (logits < 0).any()  # no ReLU on the logits,
    assert not torch.allclose(logits.exp().sum(dim=1), torch.ones(5))  # and no softmax


def test_a_tenth_is_dropped():
    model, dropped = mnist.Net().train(), []
    model.dropout.register_forward_hook(lambda layer, inputs, output: dropped.append((output == 0).float().mean()))
    model(torch.randn(50, 1, 28, 28))
    assert dropped[0] == pytest.approx(0.1, abs=0.01)


def test_every_parameter_gets_a_gradient():
    model = mnist.Net()
    F.cross_entropy(model(torch.randn(20, 1, 28, 28)), torch.arange(20) % 10).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # BatchNorm takes away whatever these biases add.
        if not (name.endswith("bias") and name.startswith(("conv", "squeeze2", "squeeze3"))):
            assert parameter.grad.abs().max() > 1e-6, name
