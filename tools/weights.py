"""Find and load the weights that mnist.py saved."""

import io
import re
import textwrap
from pathlib import Path

import mnist

import torch

PRETRAINED = Path(__file__).with_name("pretrained.pt")  # what the default run gave with seed 0


def find(path=None):
    """Return `path` if it is given, else mnist.pt in the current folder if there is one, else pretrained.pt."""
    own = Path("mnist.pt")
    return path or (own if own.exists() else PRETRAINED)


def load(path):
    """Return (model, checkpoint) of a file that mnist.py saved: a Net in evaluation mode, and everything in the file.

    A bare state dict is read too, and so are names with the prefixes of DataParallel and torch.compile.
    Raises OSError if the file cannot be read, and UserError if it does not hold the weights of this network.
    """
    model, content = mnist.Net(), io.BytesIO(Path(path).read_bytes())
    try:
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
        if "state_dict" not in checkpoint:
            checkpoint = {"state_dict": checkpoint}
        weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): w for name, w in checkpoint["state_dict"].items()}
    except Exception as error:  # of nearly any kind, if something else wrote the file
        raise mnist.UserError(f"{path} is damaged, or holds no weights: train some with mnist.py") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error).partition(":")[2], 200, placeholder=" ...")
        raise mnist.UserError(f"{path} does not fit this network: {reason}") from error
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise mnist.UserError(f"{path} holds weights that are not finite numbers: train it again with mnist.py")
    return model.eval(), checkpoint
