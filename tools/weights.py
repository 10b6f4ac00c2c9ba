"""Find and load the weights that mnist.py saved."""

import io
import re
import textwrap
import warnings
import zipfile
from pathlib import Path

import mnist

import torch

PRETRAINED = Path(__file__).with_name("pretrained.pt")  # what the default run gave with seed 0
MAX_BYTES = 2**24  # of a file of weights, packed or not: those of this network take 91 kB


def find(path=None):
    """Return `path` if it is given, else mnist.pt in the current folder if there is one, else pretrained.pt."""
    own = Path("mnist.pt")
    return path or (own if own.exists() else PRETRAINED)


def load(path):
    """Return (model, checkpoint) of a file that mnist.py saved: a Net in evaluation mode, and everything in the file.

    A bare state dict is read too, and so are names with the prefixes of DataParallel and torch.compile.
    Raises OSError if the file cannot be read, and UserError if it does not hold the weights of this network.
    """
    own = (model := mnist.Net()).state_dict()
    with Path(path).open("rb") as file:
        content = io.BytesIO(file.read(MAX_BYTES))  # of /dev/zero, not all
    try:
        archive = zipfile.ZipFile(content)
        if sum(member.file_size for member in archive.infolist()) > MAX_BYTES or archive.testzip():
            raise ValueError("it is too large, or a checksum is wrong, which PyTorch does not look at")
        content.seek(0)
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(content, map_location="cpu", weights_only=True)
        if "state_dict" not in checkpoint:
            checkpoint = {"state_dict": checkpoint}
        weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): w for name, w in checkpoint["state_dict"].items()}
        is_cast = any(w.is_floating_point() != own[k].is_floating_point() for k, w in weights.items() if k in own)
        if is_cast or len(weights) < len(checkpoint["state_dict"]):
            raise ValueError("some weights are whole or complex numbers, or there twice, with a prefix and without")
    except Exception as error:  # of nearly any kind, if something else wrote the file
        raise mnist.UserError(f"{path} is damaged, or holds no weights: train some with mnist.py") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error).partition(":")[2], 200, placeholder=" ...")
        raise mnist.UserError(f"{path} does not fit this network: {reason}") from error
    stroke = 255 * torch.eye(28, dtype=torch.uint8).unsqueeze(0)
    results = [*own.values(), mnist.classify(model, stroke)]
    if not all(tensor.isfinite().all() for tensor in results):
        raise mnist.UserError(f"{path} holds weights that are not finite numbers: train it again with mnist.py")
    return model.eval(), checkpoint
