"""The benchmarks: a few real processes, and what is made of made-up runs."""

import bz2
import functools
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import benchmarks
import mnist
from benchmarks import original, pictures, seeds, steps, tables
from reader import digit
from tools import report, weights

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats

ROOT = Path(mnist.__file__).parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Stand made-up runs in for trainings: of the accuracies in the list returned, by seed."""
    monkeypatch.chdir(tmp_path)
    accuracies = [99.5, 99.6, 99.4, 99.7]

    def train_once(seed, args):
        if accuracies[seed] is None:
            raise KeyboardInterrupt
        figures = ("loss", "calibration_error", "training_seconds", "process_seconds")
        made_up = {"seed": seed, "commit": args.commit, "accuracy": accuracies[seed]}
        return made_up | dict.fromkeys(figures, 10.0 * (seed + 1))

    monkeypatch.setattr(seeds, "train_once", train_once)
    monkeypatch.setattr(seeds, "train_baseline_once", lambda *_: {"accuracy": 98.0, "extrapolated_seconds": 600.0})
    return accuracies


def test_run_beside_the_original(tmp_path, capsys):
    mnist.load_mnist(mnist.DATA_DIR)
    out = tmp_path / "results.json"
    options = ["--seeds", "1", "--dry-run", "--device", "cpu", "--set", "TEST_BATCH_SIZE=7"]
    seeds.main([*options, "--baseline", "1", "--out", str(out)])
    results = json.loads(out.read_text())
    assert torch.__version__.startswith(results["settings"]["torch"])
    assert results["command"] == "python -m benchmarks.seeds " + " ".join([*options, "--baseline", "1"])
    (run,) = results["runs"]
    assert run["seed"] == 0
    assert 7 * run["accuracy"] / 100 == pytest.approx(round(7 * run["accuracy"] / 100))  # --set reaches the run
    assert run["loss"] > 0
    assert 0 < run["training_seconds"] < run["process_seconds"]
    baseline = run["baseline"]
    (epoch,) = baseline["epoch_seconds"]
    rest = baseline["process_seconds"] - epoch
    assert baseline["extrapolated_seconds"] == pytest.approx(rest + 20 * epoch)
    assert capsys.readouterr().err == ""


def test_original_has_a_relu_on_the_logits():
    assert (original.Net()(torch.randn(5, 1, 28, 28)) >= 0).all()


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each process that would train, or measure the calibration."""
    calls = []
    monkeypatch.setattr(seeds, "run_python", lambda arguments, threads: calls.append(arguments) or (1.0, "0.5"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: {"test_accuracy": 99.5, "test_loss": 0.1, "seconds": 1.0})
    return calls


def test_options_reach_the_run(calls):
    options = ["--epochs", "7", "--validate", "--precision", "bfloat16", "--device", "cpu"]
    seeds.main(["--seeds", "2", "--shard", "2/2", *options])
    training, calibration = calls
    args = mnist.parse_args([str(option) for option in training[1:]])
    assert (args.seed, args.epochs, args.validate, args.precision) == (1, 7, True, "bfloat16")
    assert calibration[1].endswith(", True))")


@pytest.mark.parametrize("change", ["MEAN=0.9", "Net=original.Net", "normalize=lambda images: images.unsqueeze(1)"])
def test_calibration_is_that_of_the_changed_program(change, calls):
    assert seeds.main(["--seeds", "1", "--set", change])["runs"][0]["calibration_error"] == 0.5
    training, calibration = (arguments[1] for arguments in calls)
    assert f"; mnist.{change.replace('=', ' = ', 1)}; mnist.run(mnist.main)" in training
    assert ("from benchmarks import original; " in training) == ("original." in change)
    assert f"; mnist.{change.replace('=', ' = ', 1)}; print(seeds.calibration_error(" in calibration


def test_calibration_error_is_of_the_images_tested(digits, folder, monkeypatch):
    (images, labels), (test_images, test_labels) = digits(500), digits(100)
    train_set, test_set = (images, labels), (test_images, (test_labels + 1) % 10)
    validation_set = (255 - images[400:], labels[400:])
    train_set[0][400:] = validation_set[0]
    monkeypatch.setattr(mnist, "VALIDATION_SIZE", 100)
    monkeypatch.setattr(mnist, "load_mnist", lambda _: (train_set, test_set))
    model, _ = weights.load("mnist.pt")
    errors = []
    for validate, (images, labels) in ((False, test_set), (True, validation_set)):
        errors.append(seeds.calibration_error("mnist.pt", "data", validate))
        probabilities = mnist.classify(model, images).softmax(dim=1)
        assert errors[-1] == pytest.approx(100 * report.reliability(probabilities, labels)[-1])
    assert errors[0] != errors[1]


def test_processor_is_named(monkeypatch):
    x86 = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n"
    monkeypatch.setattr(Path, "read_text", lambda _: x86)
    assert benchmarks.cpu_name() == "AMD EPYC (family 25, model 1)"
    monkeypatch.setattr(Path, "read_text", lambda _: "processor\t: 0\nCPU architecture: 8\n")
    monkeypatch.setattr("platform.processor", lambda: "aarch64")
    assert benchmarks.cpu_name() == "aarch64"


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("a warning\nmnist.py: error: no data\nno download\n", "mnist.py: error: no data\nno download"),
        ("a warning\n", "a warning"),
        ("", "no message"),
    ],
)
def test_failed_run_is_reported(printed, expected):
    code = f"import sys; print({printed!r}, end='', file=sys.stderr); sys.exit(3)"
    with pytest.raises(mnist.UserError, match=re.escape(f"exit status 3: {expected}")):
        seeds.run_python(["-c", code], 1)


def test_traceback_of_a_failed_run_is_whole():
    with pytest.raises(mnist.UserError, match=r"(?s)exit status 1: Traceback .*line 1, in <module>.*KeyError: 7$"):
        seeds.run_python(["-c", "import sys; print('a warning', file=sys.stderr); {}[7]"], 1)


def test_threads_are_divided_among_jobs(runs, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    settings = seeds.main(["--seeds", "4", "--jobs", "2"])["settings"]
    assert (settings["threads"], settings["side_by_side"]) == (2, 2)
    assert seeds.run_python(["-c", "import os; print(os.environ['OMP_NUM_THREADS'])"], 2)[1] == "2\n"


def test_statistics_of_the_runs(runs, capsys):
    summary = seeds.main(["--seeds", "4", "--epochs", "1", "--baseline", "2"])["summary"]
    assert summary["n"] == 4
    assert summary["accuracy_mean"] == pytest.approx(99.55)
    assert summary["accuracy_std"] == pytest.approx(0.1290994)
    assert summary["accuracy_min"] == 99.4
    assert summary["seeds_at_or_below_99.40"] == [2]
    assert summary["process_seconds"] == 25
    assert summary["times_faster"] == pytest.approx((600 / 20 + 600 / 30) / 2)
    assert summary["times_faster_range"] == [15, 60]
    out = capsys.readouterr().out
    assert "Test accuracy 99.550 % ± 0.129, min 99.40 %, n = 4; 1 at or below 99.40 %\n" in out
    assert "Loss 25.0000, calibration error 25.00 %\n" in out
    assert "20 epochs of the original on the CPU, from 2: 600 s, 25.0 times as long (15.0 to 60.0)\n" in out


def test_one_run_has_no_deviation(runs, capsys):
    assert seeds.main(["--seeds", "1"])["summary"]["accuracy_std"] is None
    assert "Test accuracy 99.500 %, min 99.50 %, n = 1" in capsys.readouterr().out


def test_result_says_where_it_is_from(runs):
    results = seeds.main(["--seeds", "1", "--out", "results.json"])
    assert results["command"] == "python -m benchmarks.seeds --seeds 1"
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (results["runs"][0]["commit"] or "").removesuffix("-dirty") == commit
    assert results["settings"]["cpu"]


def test_commit_tells_whether_the_tree_is_clean(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "ROOT", tmp_path)
    assert benchmarks.commit() is None
    git = functools.partial(subprocess.run, cwd=tmp_path, check=True)
    git(["git", "init", "--quiet"])
    (tmp_path / "mnist.py").write_text("1")
    git(["git", "add", "."])
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    git(["git", *identity, "commit", "--quiet", "--message", "one"])
    assert re.fullmatch("[0-9a-f]{40}", benchmarks.commit())
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new.json").write_text("{}")
    (tmp_path / "before.json").write_text("{}")
    assert re.fullmatch("[0-9a-f]{40}", benchmarks.commit())
    (tmp_path / "mnist.py").write_text("2")
    assert re.fullmatch("[0-9a-f]{40}-dirty", benchmarks.commit())


def test_interrupted_runs_are_continued(runs):
    runs[2] = None
    with pytest.raises(KeyboardInterrupt):
        seeds.main(["--seeds", "3", "--out", "results.json"])
    assert [run["seed"] for run in seeds.load_results(Path("results.json"))["runs"]] == [0, 1]
    runs[:] = [None, None, 99.8, 99.9]  # the first two are not run again
    results = seeds.main(["--seeds", "4", "--out", "results.json"])
    assert [run["accuracy"] for run in results["runs"]] == [99.5, 99.6, 99.8, 99.9]
    assert results == seeds.load_results(Path("results.json"))


def test_runs_beside_a_failed_one_are_kept(runs, monkeypatch):
    runs[0], both, train_once = None, threading.Barrier(2), seeds.train_once

    def train_side_by_side(seed, args):
        both.wait(timeout=60)
        return train_once(seed, args)

    monkeypatch.setattr(seeds, "train_once", train_side_by_side)
    with pytest.raises(KeyboardInterrupt):
        seeds.main(["--seeds", "2", "--jobs", "2", "--out", "results.json"])
    assert [run["seed"] for run in seeds.load_results(Path("results.json"))["runs"]] == [1]


def test_program_must_not_change_while_seeds_run(runs, monkeypatch):
    hashes, settings_of = iter("112"), seeds.settings_of
    monkeypatch.setattr(seeds, "settings_of", lambda args: settings_of(args) | {"mnist.py": next(hashes)})
    with pytest.raises(mnist.UserError, match="changed while the seeds ran"):
        seeds.main(["--seeds", "2", "--out", "results.json"])
    assert len(seeds.load_results(Path("results.json"))["runs"]) == 1


def test_other_settings_are_not_mixed(runs):
    seeds.main(["--seeds", "1", "--out", "results.json"])
    with pytest.raises(mnist.UserError, match=r"results.json holds runs with epochs = \d+, not 7: name another"):
        seeds.main(["--seeds", "2", "--epochs", "7", "--out", "results.json"])


def test_shards_divide_and_join(runs, capsys):
    runs[2] = 99.41
    for shard in ("1/3", "2/3", "3/3"):
        seeds.main(["--seeds", "4", "--shard", shard, "--out", f"shard{shard[0]}.json"])
    assert [run["seed"] for run in seeds.load_results(Path("shard1.json"))["runs"]] == [0, 3]
    shards = ["shard1.json", "shard2.json", "shard3.json"]
    results = seeds.main(["--seeds", "4", "--join", *shards, "--out", "all.json"])
    assert [run["seed"] for run in results["runs"]] == [0, 1, 2, 3]
    assert seeds.load_results(Path("all.json")) == results
    assert len(seeds.main(["--seeds", "4", "--out", "all.json"])["runs"]) == 4  # a joined file can be continued
    assert results["parts"][2] == "python -m benchmarks.seeds --seeds 4 --shard 3/3"
    assert "99.552 %" in capsys.readouterr().out


def test_partial_join_records_what_is_missing(runs):
    runs[2] = 99.5
    for shard in ("1/3", "3/3"):
        seeds.main(["--seeds", "4", "--shard", shard, "--out", f"shard{shard[0]}.json"])
    options = ["--seeds", "4", "--join", "shard1.json", "shard3.json"]
    with pytest.raises(mnist.UserError, match=r"hold seeds \[0, 2, 3\], not each of 0 to 3 once"):
        seeds.main(options)
    results = seeds.main([*options, "--partial", "--out", "all.json"])
    assert results["missing"] == [1]
    assert [run["seed"] for run in results["runs"]] == [0, 2, 3]
    continued = seeds.main(["--seeds", "4", "--out", "all.json"])
    assert [run["seed"] for run in continued["runs"]] == [0, 1, 2, 3]
    assert "missing" not in continued
    with pytest.raises(mnist.UserError, match="once"):
        seeds.main(["--seeds", "4", "--partial", "--join", "shard1.json", "shard1.json"])


def test_join_fails_on_a_low_or_missing_seed(runs):
    seeds.main(["--seeds", "4", "--out", "all.json"])
    with pytest.raises(mnist.UserError, match=r"1 of 4 seeds ended at or below 99.40 %: \[2\]"):
        seeds.main(["--seeds", "4", "--join", "all.json"])
    with pytest.raises(mnist.UserError, match="not each of 0 to 4 once"):
        seeds.main(["--seeds", "5", "--join", "all.json"])
    with pytest.raises(mnist.UserError, match="not each of 0 to 3 once"):
        seeds.main(["--seeds", "4", "--join", "all.json", "all.json"])


def test_join_takes_other_machines_only(runs):
    runs[2] = 99.5
    seeds.main(["--seeds", "2", "--shard", "1/2", "--out", "1.json"])
    seeds.main(["--seeds", "2", "--shard", "2/2", "--out", "2.json"])
    part = json.loads(Path("2.json").read_text())
    part["settings"] |= {"cpu": "another", "side_by_side": 16}
    Path("2.json").write_text(json.dumps(part))
    joined = seeds.main(["--seeds", "2", "--join", "1.json", "2.json"])
    assert " or another" in joined["settings"]["cpu"] or "another or " in joined["settings"]["cpu"]
    part["settings"]["torch"] = "1.0"
    Path("2.json").write_text(json.dumps(part))
    with pytest.raises(mnist.UserError, match="the files differ in torch"):
        seeds.main(["--seeds", "2", "--join", "1.json", "2.json"])


def test_comparison_in_pairs(runs, capsys):
    seeds.main(["--seeds", "4", "--validate", "--out", "before.json"])
    runs[:] = [99.6, 99.8, 99.5, 99.9]
    seeds.main(["--seeds", "4", "--validate", "--set", "ROUNDS=4", "--out", "after.json"])
    capsys.readouterr()
    seeds.main(["--compare", "before.json", "after.json"])
    before, after, change, difference, verdict = capsys.readouterr().out.splitlines()
    assert before == "before.json: 99.550 % ± 0.129, min 99.40 %, n = 4"
    assert after == "after.json: 99.700 % ± 0.183, min 99.50 %, n = 4"
    assert change == "They differ in changes: {}, {'ROUNDS': '4'}"
    # The changes are 0.1, 0.2, 0.1 and 0.2; 3.182 standard errors hold 95 % of Student's t with 3 degrees of freedom.
    assert "+0.150 ± 0.029 points" in difference
    assert "in pairs" in difference
    assert "+0.058 to +0.242" in difference
    assert verdict == "after.json is better."
    seeds.main(["--compare", "after.json", "before.json"])
    assert capsys.readouterr().out.endswith("before.json is worse.\n")
    seeds.main(["--compare", "after.json", "after.json"])
    assert capsys.readouterr().out.endswith("No difference.\n")


def test_rounding_is_no_difference(runs):
    runs[:3] = [99.4, 99.41, 99.47]
    seeds.main(["--seeds", "3", "--out", "before.json"])
    runs[:3] = [99.4, 99.43, 99.45]  # the same mean, but for 1e-14
    seeds.main(["--seeds", "3", "--out", "after.json"])
    result = seeds.compare(*map(seeds.load_results, map(Path, ("before.json", "after.json"))))
    assert result["difference"] == 0
    assert result["seeds"] is None


def test_comparison_of_other_seeds(runs, capsys):
    seeds.main(["--seeds", "4", "--out", "before.json"])
    seeds.main(["--seeds", "3", "--out", "after.json"])
    result = seeds.compare(*map(seeds.load_results, map(Path, ("before.json", "after.json"))))
    expected = stats.ttest_ind([99.5, 99.6, 99.4], [99.5, 99.6, 99.4, 99.7], equal_var=False)
    assert not result["paired"]
    assert result["difference"] == pytest.approx(-0.05)
    assert (result["low"], result["high"]) == pytest.approx(tuple(expected.confidence_interval()))
    # By the usual rule of thumb for a power of 80 %: 7.85 times the variances over the difference squared, and 2 more.
    assert result["seeds"] == pytest.approx(7.85 * (0.01667 + 0.01) / 0.05**2 + 2, abs=1)
    capsys.readouterr()
    seeds.main(["--compare", "before.json", "after.json"])
    assert f"would take {result['seeds']} seeds each" in capsys.readouterr().out


def test_what_cannot_be_compared(runs):
    seeds.main(["--seeds", "1", "--out", "one.json"])
    seeds.main(["--seeds", "2", "--out", "two.json"])
    seeds.main(["--seeds", "2", "--validate", "--out", "validation.json"])
    with pytest.raises(mnist.UserError, match="at least two runs"):
        seeds.main(["--compare", "one.json", "two.json"])
    with pytest.raises(mnist.UserError, match="one file holds validation accuracies"):
        seeds.main(["--compare", "two.json", "validation.json"])


def replaced(results, value, *keys):
    """Return a copy of nested dictionaries and lists with one value replaced, or left out if it is None."""
    copy = json.loads(json.dumps(results))
    *path, last = keys
    place = functools.reduce(lambda part, key: part[key], path, copy)
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(copy)


def test_broken_results_are_refused(runs):
    results = seeds.main(["--seeds", "2", "--baseline", "1", "--out", "results.json"])
    broken = ["", "{}", "[]", "7", '{"runs": []}', '{"settings": {}, "runs": [1]}', "[" * 100_000]
    for value in (None, math.nan, "text", [1], 10**400, True):
        figures = ("accuracy", "loss", "calibration_error", "process_seconds")
        broken += [replaced(results, value, "runs", 1, name) for name in figures]
        broken += [replaced(results, value, "runs", 0, "baseline", "extrapolated_seconds")]
        broken += [replaced(results, value, name) for name in ("runs", "settings")]
    broken += [replaced(results, None, "settings", name) for name in ("cpu", "changes", "validate", "threads")]
    broken += [replaced(results, seed, "runs", 1, "seed") for seed in (None, "1", 0)]  # the last is there twice
    broken += [replaced(results, [], "runs"), replaced(results, 7, "command")]
    for content in broken:
        Path("broken.json").write_text(content)
        with pytest.raises(mnist.UserError, match=r"broken\.json is damaged, or holds no results of benchmarks"):
            seeds.load_results(Path("broken.json"))
    for options in (["--out", "broken.json"], ["--compare", "broken.json", "results.json"], ["--join", "broken.json"]):
        with pytest.raises(mnist.UserError, match=r"broken\.json is damaged"):
            seeds.main(["--seeds", "1", *options])
    assert Path("broken.json").read_text() == content


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seeds", "0"),
        ("--shard", "0/8"),
        ("--shard", "9/8"),
        ("--shard", "3"),
        ("--shard", "6/8"),  # of five seeds
        ("--set", "NO_SUCH=1"),
        ("--set", "ROUNDS=1 2"),
        ("--set", "EPOCHS=20"),
        ("--set", "DATA_DIR=Path()"),
        ("--baseline", "-1"),
    ],
)
def test_bad_value_is_refused(option, value, assert_refused):
    assert_refused(seeds.main, option, value)


def test_bad_value_of_others_is_refused(assert_refused, monkeypatch):
    monkeypatch.setattr(mnist, "write", None)
    assert_refused(original.main, "--seed", str(2**64))
    assert_refused(tables.main, "--out", "README.md")


@pytest.mark.parametrize("benchmark", [seeds, pictures, original, steps])
def test_missing_folder_is_found_before_any_work(benchmark, monkeypatch):
    monkeypatch.setattr(mnist, "load_mnist", None)
    monkeypatch.setattr(seeds, "train_pair", None)
    monkeypatch.setattr(weights, "load", None)
    monkeypatch.setattr(steps, "time_pairs", None)
    with pytest.raises(FileNotFoundError, match=r"no.folder.results\.json"):
        benchmark.main(["--out", str(Path("no/folder/results.json"))])


@pytest.mark.parametrize(("main", "option"), [(seeds.main, "--join"), (pictures.main, "--images")])
def test_help(main, option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert option in capsys.readouterr().out


def test_contributing_shows_a_real_comparison(folder, capsys):
    for source, copy in (("as-is", "before"), ("uniform", "after")):
        benchmark = seeds.load_results(RESULTS / "ablation" / f"{source}.json")
        benchmark["runs"] = [run for run in benchmark["runs"] if run["seed"] < 8]
        seeds.save_results(benchmark, Path(f"{copy}.json"))
    seeds.main(["--compare", "before.json", "after.json"])
    shown = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(f"   {line}\n" in shown for line in capsys.readouterr().out.splitlines())


def test_readmes_hold_the_tables():
    for path in tables.READMES:
        text = path.read_text(encoding="utf-8")
        spoiled = re.sub(r"(<!-- \w+ -->\n\|)", r"\1 spoiled", text)
        assert text == tables.filled(text) == tables.filled(spoiled), path
    made = re.findall(r"<!-- (\w+) -->\n\|", "".join(path.read_text(encoding="utf-8") for path in tables.READMES))
    assert sorted(made) == ["ablation", "accuracy", "pictures", "seconds", "times", "tricks", "worth"]


def test_every_result_is_linked():
    readme = RESULTS.with_name("README.md").read_text(encoding="utf-8")
    for path in RESULTS.rglob("*.json"):
        assert f"]({path.relative_to(RESULTS.parent).as_posix()})" in readme


def test_script_claims_the_results():
    summary = tables.load("default.json")[1]
    mean, std, lowest = (summary[f"accuracy_{name}"] for name in ("mean", "std", "min"))
    claim = f"{summary['n']} seeds it ended at {mean:.2f} % on average, {lowest:.2f} % at least (std {std:.3f};"
    assert claim in mnist.__doc__
    assert not summary["seeds_at_or_below_99.40"]


def test_histogram_shows_every_seed():
    ax = tables.draw_histogram().axes[0]
    accuracies = [run["accuracy"] for run in tables.load("default.json")[0]["runs"]]
    bars = {round(bar.get_x() + bar.get_width() / 2, 2): bar.get_height() for bar in ax.patches}
    assert bars == {accuracy: accuracies.count(accuracy) for accuracy in set(accuracies)}


# --- Time of a step ------------------------------------------------------------------------------------------------


def test_steps_are_timed_in_pairs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "WARM_UP", 1)
    monkeypatch.setattr(steps, "TRICKS", {"channels_last": None})  # the processes import TRICKS anew
    results = steps.main(["--pairs", "2", "--device", "cpu", "--out", str(tmp_path / "steps.json")])
    saved = json.loads((tmp_path / "steps.json").read_text())
    assert saved["tricks"] == results
    assert saved["command"] == "python -m benchmarks.steps --pairs 2 --device cpu"
    (pairs,) = results.values()
    assert [len(pair) for pair in pairs] == [2, 2]
    assert all(milliseconds > 0 for pair in pairs for milliseconds in pair)
    assert capsys.readouterr().out.splitlines()[-1].startswith("| channels_last | ")


def count_steps(without, _, turns):
    """Stand in for steps.train(): steps of 1, 2, 3 ... ms, and of half a millisecond more without the trick."""
    with suppress(EOFError):
        for count in itertools.count(1):
            turns.recv()
            turns.send(count + 0.5 * (without == "a trick"))


def test_a_pair_is_with_and_without(monkeypatch):
    monkeypatch.setattr(steps, "WARM_UP", 1)
    monkeypatch.setattr(steps, "train", count_steps)
    assert steps.time_pairs("a trick", [], 2) == [[2, 2.5], [3, 3.5]]


def test_process_that_ends_is_reported(capfd):
    with pytest.raises(mnist.UserError, match="has ended"):
        steps.time_pairs("no such trick", ["--device", "cpu"], 1)
    assert "KeyError: 'no such trick'" in capfd.readouterr().err


def end_in_a_step(without, _, turns):
    turns.recv()


def test_process_that_ends_in_a_step_is_reported(monkeypatch):
    monkeypatch.setattr(steps, "train", end_in_a_step)
    with pytest.raises(mnist.UserError, match="has ended"):
        steps.time_pairs("a trick", [], 1)


@pytest.mark.parametrize(
    ("without", "end"), [(None, EOFError), ("a trick", BrokenPipeError), ("a trick", KeyboardInterrupt)]
)
def test_a_step_is_taken_in_its_turn(without, end, small_mnist, monkeypatch, capfd):
    events, augment = [], mnist.augment

    def receive():
        events.append("turn")
        if events.count("turn") > 2:
            raise end

    monkeypatch.setattr(mnist, "train_batches", mnist.train_batches)  # train() changes both
    monkeypatch.setattr(mnist, "augment", lambda images: events.append("with it") or augment(images))
    monkeypatch.setitem(
        steps.TRICKS, "a trick", (mnist, "augment", lambda images: events.append("without it") or augment(images))
    )
    turns = SimpleNamespace(recv=receive, send=events.append)
    steps.train(without, ["--device", "cpu", "--data-dir", small_mnist], turns)
    _, step, first, _, _, second, _ = events
    assert events == ["turn", step, first, "turn", step, second, "turn"]
    assert step == ("without it" if without else "with it")
    assert 0 < first != second > 0
    assert capfd.readouterr() == ("", "")


def test_row_of_a_trick():
    pairs = [(50.0, 60.0), (40.0, 60.0), (50.0, 50.0)]
    assert steps.cells("a trick", pairs) == ("a trick", "50.0 ms", "60.0 ms", "1.20", "14 s")
    _, _, _, ratio, _ = steps.cells("a trick", [(10.0, without) for without in (1.0, *range(11, 21), 99.0)])
    assert ratio == "1.55 (1.20 to 1.90)"  # of twelve, the third and the tenth


def test_every_trick_is_taken_away(monkeypatch):
    monkeypatch.setattr(mnist, "has_bfloat16", lambda _: True)
    assert mnist.parse_args(["--device", "cpu"]).precision == "bfloat16"
    for place, name, stand_in in steps.TRICKS.values():
        before = getattr(place, name)
        monkeypatch.setattr(place, name, stand_in)
        assert getattr(place, name) is not before
    assert mnist.parse_args(["--device", "cpu"]).precision == "float32"


def test_tricks_that_are_not_used_are_not_timed(monkeypatch):
    monkeypatch.setattr(steps, "time_pairs", lambda *_: [(1.0, 1.0)])
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(mnist, "has_bfloat16", lambda _: True)
    assert set(steps.main(["--device", "cpu"])) == {*steps.TRICKS} - {"the step as a CUDA graph"}
    monkeypatch.setattr(mnist, "has_bfloat16", lambda _: False)
    monkeypatch.setattr(sys, "platform", "darwin")
    left = {"channels_last", "max-pooling before ReLU", "whole batches augmented"}
    assert set(steps.main(["--device", "cpu"])) == left
    monkeypatch.setattr(mnist, "pick_device", torch.device)
    assert set(steps.main(["--device", "mps"])) == left - {"channels_last"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    graph = {"channels_last", "max-pooling before ReLU", "the step as a CUDA graph"}
    assert set(steps.main(["--device", "cuda"])) == graph


def test_pooling_last_gives_the_same(digits):
    model = mnist.Net().eval()
    images = mnist.normalize(digits(20)[0])
    assert torch.equal(steps.pool_last(model, images), model(images))


def test_images_are_augmented_one_by_one(digits):
    images, _ = digits(20)
    torch.manual_seed(0)
    augmented = steps.augment_one_by_one(images)
    assert augmented.dtype == torch.float32
    assert augmented.shape == images.shape
    assert torch.allclose(augmented.sum((1, 2)), images.float().sum((1, 2)), rtol=0.4)
    assert (images != augmented).any((1, 2)).all()


# --- Pictures ------------------------------------------------------------------------------------------------------


def test_every_kind_of_picture_is_measured(small_mnist, folder, monkeypatch, capsys):
    monkeypatch.setattr(mnist, "DATA_DIR", small_mnist)
    results = pictures.main(["--images", "2", "--out", "results.json"])
    saved = json.loads(Path("results.json").read_text())
    assert saved["kinds"] == results
    assert saved["command"] == "python -m benchmarks.pictures --images 2"
    assert [kind for kind in results if kind in pictures.KINDS] == list(pictures.KINDS)
    assert [kind for kind in results if kind in pictures.SCENES] == list(pictures.SCENES)
    assert capsys.readouterr().out.count("| 2 |") == len(results)


def test_more_pictures_than_test_digits(small_mnist, monkeypatch):
    monkeypatch.setattr(mnist, "DATA_DIR", small_mnist)
    monkeypatch.setattr(pictures, "KINDS", {})
    counts = {kind: len(labels) for kind, _, labels in pictures.made_up(101)}
    assert {counts[kind] for kind in pictures.SCENES} == {101}


def test_ten_lines_keep_a_thin_stroke():
    picture = Image.new("L", (200, 200), 235)
    picture.paste(20, (100, 10, 102, 190))
    form = pictures.by_hand(picture)
    assert form.shape == (28, 28)
    assert (form > 127).sum(axis=0).tolist() == [0] * 14 + [20] + [0] * 13


@pytest.fixture
def own_pictures(tmp_path):
    """A folder with two pictures of a 7, and one that cannot be read."""
    own = tmp_path / "own pictures"
    own.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(ROOT / "assets" / "seven.png", own / name)
    (own / "c.png").write_bytes(b"damaged")
    return own


def test_own_pictures_with_a_table(own_pictures, folder, capsys):
    (own_pictures / "labels.tsv").write_text("label\tpicture\tkind\n7\ta.png\tone\n1\tb.png\tone\n47\tc.png\t\n")
    results = pictures.main([str(own_pictures), "--model", str(weights.PRETRAINED)])
    assert list(results) == ["one", "all", "total"]
    assert results["one"] == results["one"] | {"right": 50, "not sure": 0, "wrong, but sure": 50}
    assert results["total"]["not sure"] == pytest.approx(100 / 3)
    assert results["all"] == {"n": 1, "right": 0, "not sure": 100, "wrong, but sure": 0, "ten lines": None}
    assert results["one"]["ten lines"] is not None
    assert results["total"]["ten lines"] is None
    assert "2 of 2 mistakes are shown in mistakes.png" in capsys.readouterr().out
    with Image.open("mistakes.png") as sheet:
        assert sheet.height > 2 * 224


def test_first_mistakes_are_shown(own_pictures, folder, monkeypatch, capsys):
    (own_pictures / "labels.tsv").write_text("picture\tlabel\na.png\t1\nb.png\t1\n")
    monkeypatch.setattr(pictures, "MOST", 1)
    pictures.main([str(own_pictures), "--model", str(weights.PRETRAINED)])
    assert "1 of 2 mistakes are shown in mistakes.png" in capsys.readouterr().out
    with Image.open("mistakes.png") as sheet:
        assert sheet.height < 2 * 224


def test_own_pictures_without_a_digit(own_pictures, folder, monkeypatch):
    (own_pictures / "labels.tsv").write_text("picture\tlabel\na.png\t\nb.png\t\nc.png\t\n")
    results = pictures.main([str(own_pictures), "--model", str(weights.PRETRAINED)])
    assert results["all"]["wrong, but sure"] == pytest.approx(200 / 3)  # c.png cannot be read: no answer
    assert results["all"]["right"] == pytest.approx(100 / 3)
    assert results["all"]["ten lines"] is None
    monkeypatch.setattr(digit, "NO_DIGIT", 99)
    results = pictures.main([str(own_pictures), "--model", str(weights.PRETRAINED)])
    assert results["all"] == {"n": 3, "right": 100, "not sure": 100, "wrong, but sure": 0, "ten lines": None}


def test_own_pictures_with_a_folder_for_each_digit(own_pictures, folder):
    for label, name in (("7", "a.png"), ("1", "b.png")):
        (own_pictures / label).mkdir()
        (own_pictures / label / ".DS_Store").write_bytes(b"of a Mac")
        (own_pictures / name).rename(own_pictures / label / name)
    results = pictures.main([str(own_pictures), "--model", str(weights.PRETRAINED)])
    assert results["all"] == results["all"] | {"n": 2, "right": 50}


@pytest.mark.parametrize("table", [None, "", "picture\tlabel\n", "a.png\t7\n", "picture\tlabel\na.png\n"])
def test_folder_without_labels_is_named(table, own_pictures, folder):
    if table is not None:
        (own_pictures / "labels.tsv").write_text(table)
    with pytest.raises(mnist.UserError, match="own pictures"):
        pictures.main([str(own_pictures)])


@pytest.fixture
def usps(folder, monkeypatch):
    """A data folder with two sevens as USPS stores its test digits, of which one is labelled as a 1."""
    seven = ImageOps.invert(Image.open(ROOT / "assets" / "seven.png").convert("L")).resize((16, 16))
    values = " ".join(f"{i}:{value / 127.5 - 1:.4f}" for i, value in enumerate(np.asarray(seven).ravel(), 1))
    Path("usps.t.bz2").write_bytes(bz2.compress(f"8 {values}\n2 {values}\n".encode()))  # labels begin at 1
    monkeypatch.setattr(mnist, "DATA_DIR", Path())


def test_other_data_set(usps, capsys):
    results = pictures.main(["--dataset", "USPS", "--model", str(weights.PRETRAINED)])
    assert results["USPS"] == results["USPS"] | {"right": 50, "wrong, but sure": 50}
    assert "1 of 1 mistakes are shown in mistakes.png" in capsys.readouterr().out


def test_emnist_is_turned(folder, monkeypatch):
    """EMNIST's test digits as MNIST stores its own, but with rows for columns."""
    images, labels = (part[:5] for part in mnist.load_mnist(mnist.DATA_DIR)[1])
    raw = Path("EMNIST", "raw")
    raw.mkdir(parents=True)
    header = b"".join(size.to_bytes(4, "big") for size in (0x803, 5, 28, 28))
    turned = np.ascontiguousarray(images.numpy().transpose(0, 2, 1))
    (raw / "emnist-digits-test-images-idx3-ubyte").write_bytes(header + turned.tobytes())
    header = b"".join(size.to_bytes(4, "big") for size in (0x801, 5))
    (raw / "emnist-digits-test-labels-idx1-ubyte").write_bytes(header + labels.byte().numpy().tobytes())
    monkeypatch.setattr(mnist, "DATA_DIR", Path())
    results = pictures.main(["--dataset", "EMNIST", "--model", str(weights.PRETRAINED)])
    assert results["EMNIST"]["right"] == 100


def test_data_set_that_cannot_be_downloaded(folder, monkeypatch):
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr("urllib.request._opener", None)  # the one that urllib keeps may know other proxies
    monkeypatch.setattr(mnist, "DATA_DIR", Path("absent"))
    with pytest.raises(mnist.UserError, match="USPS is not in absent and cannot be downloaded"):
        pictures.main(["--dataset", "USPS", "--model", str(weights.PRETRAINED)])


def test_missing_weights_of_pictures_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        pictures.main(["--model", "absent.pt"])


@pytest.mark.parametrize(("option", "value"), [("--images", "0"), ("--dataset", "KMNIST")])
def test_bad_value_of_pictures_is_refused(option, value, assert_refused):
    assert_refused(pictures.main, option, value)
