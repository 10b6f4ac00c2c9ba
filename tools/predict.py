"""Read handwritten digits from pictures: photographs, scans and drawings.

Usage:
    python tools/predict.py digit.png photo.jpg  # a line for each: its number, and how probable each digit is
    python tools/predict.py --single *.heic      # one digit on each, even if it is in pieces
    python tools/predict.py --json *.png         # for programs: a line of JSON for each, with boxes and probabilities
    python tools/predict.py --show photo.jpg     # also write seen.png: each digit in a box, and what the network saw
    python tools/predict.py - < digit.png        # a picture from standard input
"""

import argparse
import glob
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of mnist.py, of reader/ and of tools/

import mnist
import reader
from reader import picture, sheet
from tools import weights

SHEET = Path("seen.png")  # what --show writes


def expand(pattern):
    """Return the names of the files that match `pattern`, which Windows' shells leave as it is; itself if none does."""
    return [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern)) or [pattern]


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="predict.py", description="Read handwritten digits from pictures.")
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PICTURE", help="an image: PNG, JPEG, HEIC, ...; - is standard input")
    add("--model", type=Path, metavar="PATH", help="weights (default: mnist.pt, else pretrained.pt)")
    add("--single", action="store_true", help="read each picture as one digit, even if it is in pieces")
    add("--json", action="store_true", help="print a line of JSON for each picture, with boxes and probabilities")
    add("--show", action="store_true", help=f"write {SHEET}: each digit in a box, and what the network saw")
    args = parser.parse_args(argv)
    args.pictures = [name for pattern in args.pictures for name in expand(pattern)]
    if args.pictures.count("-") > 1:
        parser.error("argument PICTURE: - is standard input, which can be read once")
    if args.show and os.path.realpath(SHEET) in map(os.path.realpath, args.pictures):
        parser.error(f"argument --show: it would overwrite the picture {SHEET}: rename that first")
    return args


def as_result(name, lines, sure, scale):
    """Return what --json prints of a picture's lines, whose boxes are to be enlarged by `scale`."""
    digits = [
        {
            "digit": digit.probabilities.argmax().item(),
            "probability": digit.probabilities.max().item(),
            "line": number,
            "box": [round(side * scale) for side in digit.box],
            "probabilities": digit.probabilities.tolist(),
        }
        for number, line in enumerate(lines)
        for digit in line
    ]
    number = " ".join("".join(str(digit.probabilities.argmax().item()) for digit in line) for line in lines)
    result = {"picture": name, "number": number, "digits": digits, "sure": sure}
    if len(digits) == 1:
        result |= {"digit": digits[0]["digit"], "probabilities": digits[0]["probabilities"]}
    return result


def as_text(result):
    """Return a result as a line for people."""
    probabilities = [f"{digit['probability']:.1%}" for digit in result["digits"]]
    line = f"{sheet.printable(result['picture'])}: {result['number']} ({', '.join(probabilities)})"
    if "digit" in result:
        second = sorted(range(10), key=result["probabilities"].__getitem__)[-2]
        line += f", else {second} ({result['probabilities'][second]:.1%})"
    return line if result["sure"] else f"{line}, not sure"


def main(argv):
    """Print a line for each picture that `argv` names; the exit status is 1 if any failed.

    Returns a dictionary for each: what --json prints.
    """
    args = parse_args(argv)
    if args.show:
        mnist.write(SHEET)  # raises OSError now if it could not be written later
    model, _ = weights.load(path := weights.find(args.model))
    print(f"Using the weights in {path}", file=sys.stderr)

    results, rows = [], []
    for name in args.pictures:
        try:
            image, scale = picture.load(name)
            lines, sure = reader.read(model, image, args.single)
        except mnist.UserError as error:
            print(f"predict.py: error: {sheet.printable(name)}: {error}", file=sys.stderr)
            continue
        result = as_result(name, lines, sure, scale)
        results.append(result)
        print(json.dumps(result) if args.json else as_text(result))
        if args.show and len(rows) < sheet.MOST:
            rows.append(sheet.to_row(image, lines, as_text(result)))
    if rows:
        sheet.write(rows, SHEET)
    if args.show and len(results) > len(rows):
        print(f"predict.py: warning: {SHEET} shows the first {len(rows)} pictures", file=sys.stderr)
    if len(results) < len(args.pictures):
        sys.exit(1)
    return results


if __name__ == "__main__":
    mnist.run(main)
