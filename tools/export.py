"""Export the trained network: as a page to draw digits on, or to ONNX, for other programs.

Usage:
    python tools/export.py --out draw.html   # open it with a double click: it is one file and works offline
    python tools/export.py --out mnist.onnx  # uint8 images (N, 28, 28) in, probabilities (N, 10) out
"""

import argparse
import base64
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of mnist.py and of tools/

import mnist
from reader.digit import NO_DIGIT
from tools import weights

import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

TEMPLATE = Path(__file__).with_name("draw.html")
PLACE = '<script id="exported" type="application/json">null</script>'  # where the data go in the template
MISTAKES = 6  # misread test digits shown on the page


def fold(model):
    """Return {name: convolution} of a Net, each BatchNorm folded into the one before it, the linear layer made one."""
    layers = {}
    for name, layer in model.named_children():
        if isinstance(layer, nn.Conv2d):
            layers[name] = layer
        elif isinstance(layer, nn.BatchNorm2d):
            last = next(reversed(layers))
            layers[last] = fuse_conv_bn_eval(layers[last], layer)
        elif isinstance(layer, nn.Linear):
            layers[name] = nn.Conv2d(8, 10, 3)
            layers[name].weight.data = layer.weight.data.view(10, 8, 3, 3)
            layers[name].bias.data = layer.bias.data
    return layers


def to_page(model, images, labels):
    """Return the page, in HTML, with the network in it and some of the test images (N, 28, 28) and labels (N,)."""

    def encode(tensor):
        return base64.b64encode(tensor.detach().numpy().tobytes()).decode()

    probabilities, answers = mnist.classify(model, images).softmax(dim=1).max(dim=1)
    wrong = (answers != labels).nonzero().flatten()
    chosen = [(labels == digit).nonzero()[0].item() for digit in range(10)]
    chosen += wrong[probabilities[wrong].argsort(descending=True)][:MISTAKES].tolist()
    exported = {
        "layers": {
            name: {
                "shape": layer.weight.shape,
                "padding": layer.padding[0],
                "weight": encode(layer.weight),
                "bias": encode(layer.bias),
            }
            for name, layer in fold(model).items()
        },
        "mean": mnist.MEAN,
        "std": mnist.STD,
        "noDigit": NO_DIGIT,
        "accuracy": f"{100 * (1 - len(wrong) / len(labels)):.2f}",
        "digits": [
            {"label": labels[i].item(), "answer": answers[i].item(), "pixels": encode(images[i])} for i in chosen
        ],
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace(PLACE, PLACE.replace("null", json.dumps(exported))).encode()


def to_onnx(model, images, labels):
    """Return the network in ONNX: uint8 images (N, 28, 28) in, probabilities (N, 10) out.

    Its metadata state the accuracy on the test images (N, 28, 28) and labels (N,). The graph is built operator by
    operator because the older exporter of torch.onnx is deprecated, and the newer one fails in PyTorch 2.6 and writes
    lines of the source, with their path, into the file.
    """
    nodes, constants, layers = [], [], fold(model)

    def add(operator, *inputs, **attributes):
        nodes.append(helper.make_node(operator, inputs, [f"{operator}{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def constant(name, tensor):
        constants.append(numpy_helper.from_array(tensor.detach().numpy(), name))
        return name

    def conv(name, x):
        layer = layers[name]
        weight, bias = constant(f"{name}.weight", layer.weight), constant(f"{name}.bias", layer.bias)
        return add("Conv", x, weight, bias, kernel_shape=layer.kernel_size, pads=4 * layer.padding[:1])

    def relu(x):
        return add("Relu", x)

    def pool(x):
        return add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])

    x = add("Cast", "images", to=onnx.TensorProto.FLOAT)
    x = add("Unsqueeze", x, constant("channel", torch.tensor([1])))
    x = add("Div", x, constant("white", torch.tensor(255.0)))
    x = add("Sub", x, constant("mean", torch.tensor(mnist.MEAN)))
    x = add("Div", x, constant("std", torch.tensor(mnist.STD)))
    x = relu(conv("conv1", x))
    x = relu(pool(conv("conv2", x)))
    x = conv("squeeze1", x)
    x = relu(conv("conv3", x))
    x = relu(pool(conv("conv4", x)))
    x = conv("squeeze2", x)
    x = relu(conv("conv5", x))
    x = relu(conv("conv6", x))
    x = relu(conv("squeeze3", x))
    x = add("Flatten", conv("fc", x))
    nodes.append(helper.make_node("Softmax", [x], ["probabilities"]))

    inputs = [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["N", 28, 28])]
    outputs = [helper.make_tensor_value_info("probabilities", onnx.TensorProto.FLOAT, ["N", 10])]
    graph = helper.make_graph(nodes, "mnist", inputs, outputs, constants)
    exported = helper.make_model(
        graph,
        ir_version=8,  # this and opset 17 are read by all of ONNX Runtime since 1.12
        opset_imports=[helper.make_opsetid("", 17)],
        producer_name="mnist.py",
        doc_string="Reads handwritten digits: white on black, in a box of 20 x 20, centred by mass in 28 x 28",
    )
    _, correct = mnist.test(model, images, labels)
    metadata = {
        "accuracy": f"{100 * correct / len(labels):.2f} % of MNIST's 10,000 test digits",
        "licence": "MIT; trained on MNIST, by Y. LeCun, C. Cortes and C. J. C. Burges, CC BY-SA 3.0",
    }
    helper.set_model_props(exported, metadata)
    return exported.SerializeToString()


FORMATS = {".html": to_page, ".onnx": to_onnx}


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="export.py", description="Export the trained network as a page or to ONNX.")
    add = parser.add_argument
    add("--out", type=Path, default="draw.html", metavar="PATH", help=".html or .onnx (default: %(default)s)")
    add("--model", type=Path, metavar="PATH", help="weights (default: mnist.pt, else pretrained.pt)")
    add("--data-dir", type=Path, default=mnist.DATA_DIR, help="folder of the data, as for mnist.py")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in FORMATS:
        parser.error(f"argument --out: {args.out} does not end in {' or '.join(FORMATS)}")
    return args


def main(argv=()):
    """Write the file that `argv` asks for; return its path."""
    args = parse_args(argv)
    mnist.write(args.out)  # raises OSError now if it could not be written later
    model, _ = weights.load(path := weights.find(args.model))
    print(f"Using the weights in {path}")
    content = FORMATS[args.out.suffix.lower()](model, *mnist.load_mnist(args.data_dir)[1])
    mnist.write(args.out, content)
    print(f"Wrote {args.out} ({len(content) / 1000:.0f} kB)")
    return args.out


if __name__ == "__main__":
    mnist.run(main)
