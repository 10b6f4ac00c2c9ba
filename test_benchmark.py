"""Tests of benchmark.py: one of real processes, the others of what it makes of runs made up here."""

import json

import pytest
import torch

import benchmark
import mnist
from test_model import assert_refused


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Stand made-up runs in for trainings: of the accuracies in the list returned, by seed."""
    monkeypatch.chdir(tmp_path)
    accuracies = [99.5, 99.6, 99.4, 99.7]

    def train_once(seed, _args):
        if accuracies[seed] is None:
            raise KeyboardInterrupt
        figures = ("loop_seconds", "training_seconds", "process_seconds", "peak_memory_mb", "matmul_flops")
        return {"seed": seed, "accuracy": accuracies[seed], **dict.fromkeys(figures, 10.0 * (seed + 1))}

    def train_baseline_once(seed, _args):
        return {"seed": seed, "accuracy": 98.0, "extrapolated_seconds": 600.0}

    monkeypatch.setattr(benchmark, "train_once", train_once)
    monkeypatch.setattr(benchmark, "train_baseline_once", train_baseline_once)
    monkeypatch.setattr(benchmark, "run_process", lambda _: (1.0, 5.0))
    return accuracies


def test_two_real_runs_beside_the_original(tmp_path, capsys):
    mnist.load_mnist(mnist.default_data_dir())
    out = tmp_path / "results.json"
    benchmark.main(["--seeds", "2", "--dry-run", "--device", "cpu", "--baseline", "1", "--out", str(out)])
    results = json.loads(out.read_text())
    assert [run["seed"] for run in results["runs"]] == [0, 1]
    assert torch.__version__.startswith(results["settings"]["torch"])
    for run in results["runs"]:
        assert 0 <= run["accuracy"] <= 100
        assert 0 < run["loop_seconds"] < run["training_seconds"] < run["process_seconds"]
        assert run["matmul_flops"] > 1e9
        original = run["baseline"]
        (epoch,) = original["epoch_seconds"]
        rest = original["process_seconds"] - epoch
        assert original["extrapolated_seconds"] == pytest.approx(rest + 20 * epoch)
        if run["peak_memory_mb"] is not None:  # on Linux
            assert 100 < results["import_memory_mb"] < 5000
            assert 100 < run["peak_memory_mb"] < 5000
    assert capsys.readouterr().err == ""


def test_a_run_that_fails_is_told_of(tmp_path):
    with pytest.raises(mnist.UserError, match="exit status 3: the reason"):
        benchmark.run_process(["-c", "import sys; print('what\\nthe reason', file=sys.stderr); sys.exit(3)"])


def test_memory_is_that_of_the_process_and_not_of_its_parent():
    _, small = benchmark.run_process(["-c", "import time; time.sleep(0.5)"])
    _, large = benchmark.run_process(["-c", "import time; x = b'x' * 200_000_000; time.sleep(0.5)"])
    if small is None:
        pytest.skip("the memory is measured on Linux alone")
    assert small < 50
    assert 190 < large - small < 210


def test_the_arithmetic_is_three_times_that_of_the_layers():
    pixels = [784, 784, 196, 196, 196, 49, 25, 9, 9]
    shapes = [
        (1, 16, 9),
        (16, 32, 9),
        (32, 8, 1),
        (8, 16, 9),
        (16, 32, 9),
        (32, 8, 1),
        (8, 16, 9),
        (16, 32, 9),
        (32, 8, 1),
    ]
    multiplications = 720 + sum(n * i * o * k for n, (i, o, k) in zip(pixels, shapes, strict=True))
    assert benchmark.training_arithmetic() == 6 * multiplications


def test_the_statistics_are_those_of_the_runs(runs, capsys):
    summary = benchmark.main(["--seeds", "4", "--epochs", "1", "--baseline"])["summary"]
    assert summary["n"] == 4
    assert summary["accuracy_mean"] == pytest.approx(99.55)
    assert summary["accuracy_std"] == pytest.approx(0.1290994)
    assert summary["accuracy_min"] == 99.4
    assert summary["seeds_at_or_below_99.40"] == [2]
    assert summary["process_seconds"] == 25
    assert summary["times_faster"] == pytest.approx((600 / 20 + 600 / 30) / 2)
    arithmetic = 60_000 * benchmark.training_arithmetic()
    assert summary["share_of_matmul_speed"] == pytest.approx((arithmetic / 20**2 + arithmetic / 30**2) / 2)
    out = capsys.readouterr().out
    assert "| mnist.py | 4 | 99.550 % ± 0.129 | 99.40 % | 1 | 25.0 | 25.0 | 25 |" in out
    assert "20 MB above" in out
    assert "extrapolated" not in out


def test_one_run_has_no_standard_deviation(runs, capsys):
    assert benchmark.main(["--seeds", "1", "--baseline", "2"])["summary"]["accuracy_std"] is None
    out = capsys.readouterr().out
    assert "| 99.500 % |" in out
    assert "(extrapolated)" in out


def test_an_interrupted_benchmark_is_continued(runs):
    runs[2] = None
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(["--seeds", "4", "--out", "results.json"])
    assert [run["seed"] for run in benchmark.read(benchmark.Path("results.json"))["runs"]] == [0, 1]
    runs[:] = [None, None, 99.8, 99.9]  # the first two are not run again
    results = benchmark.main(["--seeds", "4", "--out", "results.json"])
    assert [run["accuracy"] for run in results["runs"]] == [99.5, 99.6, 99.8, 99.9]
    assert results == benchmark.read(benchmark.Path("results.json"))


def test_runs_of_other_settings_are_not_mixed(runs):
    benchmark.main(["--seeds", "1", "--out", "results.json"])
    with pytest.raises(mnist.UserError, match=r"results.json holds runs with epochs = \d+, not 7: name another"):
        benchmark.main(["--seeds", "2", "--epochs", "7", "--out", "results.json"])


def test_shards_divide_the_seeds_and_are_joined(runs, capsys):
    runs[2] = 99.41
    for shard in ("1/3", "2/3", "3/3"):
        benchmark.main(["--seeds", "4", "--shard", shard, "--out", f"shard{shard[0]}.json"])
    assert [run["seed"] for run in benchmark.read(benchmark.Path("shard1.json"))["runs"]] == [0, 3]
    shards = ["shard1.json", "shard2.json", "shard3.json"]
    results = benchmark.main(["--seeds", "4", "--join", *shards, "--out", "all.json"])
    assert [run["seed"] for run in results["runs"]] == [0, 1, 2, 3]
    assert benchmark.read(benchmark.Path("all.json")) == results
    assert results["parts"][2] == "python benchmark.py --seeds 4 --shard 3/3 --out shard3.json"
    assert "| mnist.py | 4 | 99.552 %" in capsys.readouterr().out


def test_joining_fails_where_a_seed_ended_too_low_or_is_missing(runs):
    benchmark.main(["--seeds", "4", "--out", "all.json"])
    with pytest.raises(mnist.UserError, match=r"1 of 4 seeds ended at or below 99.40 %: \[2\]"):
        benchmark.main(["--seeds", "4", "--join", "all.json"])
    with pytest.raises(mnist.UserError, match="not each of 0 to 4 once"):
        benchmark.main(["--seeds", "5", "--join", "all.json"])
    with pytest.raises(mnist.UserError, match="not each of 0 to 3 once"):
        benchmark.main(["--seeds", "4", "--join", "all.json", "all.json"])


def test_what_differs_in_more_than_the_machine_is_not_joined(runs):
    runs[2] = 99.5
    benchmark.main(["--seeds", "2", "--shard", "1/2", "--out", "1.json"])
    benchmark.main(["--seeds", "2", "--shard", "2/2", "--out", "2.json"])
    part = json.loads(benchmark.Path("2.json").read_text())
    part["settings"]["cpu"] = "another"
    benchmark.Path("2.json").write_text(json.dumps(part))
    joined = benchmark.main(["--seeds", "2", "--join", "1.json", "2.json"])
    assert " or another" in joined["settings"]["cpu"] or "another or " in joined["settings"]["cpu"]
    part["settings"]["torch"] = "1.0"
    benchmark.Path("2.json").write_text(json.dumps(part))
    with pytest.raises(mnist.UserError, match="the files differ in torch"):
        benchmark.main(["--seeds", "2", "--join", "1.json", "2.json"])


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"runs": []}', '{"settings": {}, "runs": [1]}'])
def test_a_file_that_is_no_result_is_refused(runs, content):
    path = benchmark.Path("results.json")
    path.write_text(content)
    with pytest.raises(mnist.UserError, match=r"results\.json is no result of"):
        benchmark.main(["--seeds", "1", "--out", "results.json"])
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seeds", "0"),
        ("--shard", "0/8"),
        ("--shard", "9/8"),
        ("--shard", "3"),
        ("--set", "NO_SUCH=1"),
        ("--set", "ROUNDS=1 2"),
        ("--baseline", "-1"),
        ("--out", "no/such/folder/results.json"),
    ],
)
def test_a_bad_value_is_refused_by_name(option, value, capsys):
    assert_refused(benchmark.main, option, value, capsys)


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--help"])
    assert stop.value.code == 0
    assert "--join" in capsys.readouterr().out


def test_set_changes_the_constant_for_the_runs():
    mnist.load_mnist(mnist.default_data_dir())
    run = benchmark.train_once(0, benchmark.parse_args(["--dry-run", "--set", "TEST_BATCH=1"]))
    assert run["accuracy"] in (0, 100)


def test_the_readme_says_what_the_results_hold():
    readme = (benchmark.FOLDER / "README.md").read_text(encoding="utf-8")
    paths = list((benchmark.FOLDER / "results").rglob("*.json"))
    assert paths
    for path in paths:
        summary = benchmark.summarize(benchmark.read(path))
        assert path.relative_to(benchmark.FOLDER).as_posix() in readme
        figures = f"{summary['n']} | {summary['accuracy_mean']:.3f} % ± {summary['accuracy_std']:.3f}"
        figures += f" | {summary['accuracy_min']:.2f} % |"
        if "times_faster" in summary:
            seconds, original = summary["process_seconds"], summary["baseline_seconds"]
            figures += f" {seconds:.0f} | {original:.0f} s | {summary['times_faster']:.1f} |"
        assert figures in readme, path.name
