"""The commands for a CUDA machine, as far as they go without one."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_models, gpu_peer, gpu_report, gpu_session, gpu_work
from bench.shapes import ALI_CCP, SHAPES

ROOT = Path(__file__).parents[2]
PEER = "torch-rechub" if gpu_peer.is_here() else "peer"
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: 'fastmtl[gpu]'")
#: What takes a minute: once in CI is enough.
in_gpu_check = pytest.mark.skipif(not HAS_TRITON, reason="make gpu-check runs it")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def run(*command, **variables):
    paths = os.pathsep.join((str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **variables}
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, env=environment)


def report(folder):
    (data,) = folder.glob("*.json")
    (page,) = folder.glob("*.md")
    return json.loads(data.read_text()), page.read_text()


# ---------------------------------------------------------------------------------------------------- benchmarks


def test_the_benchmark_runs_on_the_cpu_and_writes_its_report(tmp_path):
    done = run("bench.gpu", "--dry-run", "--no-compile", "--cases", "9", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found, page = report(tmp_path)
    assert found["left_out"] == []
    assert {row["contender"] for row in found["steps"]} == {PEER, "eager", "triton", "cuda", "trainer"}
    modes = [case.mode for case in gpu.plan()[:9]]
    assert len(found["steps"]) == 4 * (modes.count("training") + modes.count("inference")) + modes.count("trainer")
    for row in found["steps"]:
        assert row["us"] > 0
        assert row["samples_per_second"] == pytest.approx(row["batch"] / row["us"] * 1e6)
        assert row["over_floor"] == pytest.approx(row["us"] / row["floor_us"])
    assert {row["mode"] for row in found["steps"]} == {"training", "inference"}
    assert any("backward" in row["call"] for row in found["calls"])
    for head in ("## Targets", "## Training steps", "## Calls of the lookup", "## Kernels", "Limits measured"):
        assert head in page
    last = done.stdout.splitlines()[-len(gpu_report.targets(found)) :]
    assert all(": wanted " in line for line in last), done.stdout[-3000:]


def test_the_benchmark_goes_on_behind_a_case_that_took_the_gpu_away(tmp_path):
    """The first process is told after its first case that the GPU is gone: another has the second case."""
    words = (
        "import sys\nfrom bench import gpu\n"
        "gpu.Bench.lost = lambda self: 'it is gone'\n"
        f"sys.argv[1:] = ['--dry-run', '--no-compile', '--cases', '2', '--folder', {str(tmp_path)!r}]\n"
        "gpu.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found, page = report(tmp_path)
    first, second = map(str, gpu.plan()[:2])
    assert found["begun"] == [first, second]
    assert found["left_out"] == [f"{first}: the process: it is gone"]
    assert [row["contender"] for row in found["steps"]] == ["trainer", "trainer"]
    assert "it is gone" in page
    # all that is left is nothing: the figures are those that were there
    (data,) = tmp_path.glob("*.json")
    options = ("--dry-run", "--no-compile", "--cases", "2", "--folder", str(tmp_path), "--behind", str(data))
    assert run("bench.gpu", *options).returncode == 0
    assert report(tmp_path)[0]["steps"] == found["steps"]


#: On the interpreter a row of a tiny table takes a tenth of a second to move: few tables are tiny there.
INTERPRETED = (
    "import interpreter\ninterpreter.quicken()\n"
    "from fastmtl.backends.triton import configs\nconfigs.EMBEDDING = configs.EmbeddingConfig(tiny_vocab=8)\n"
)


def only(chosen, tmp_path, *options, **variables):
    """A dry run of the plan's cases that ``chosen`` says, and its report."""
    words = (
        f"import sys\nfrom bench import gpu\n{INTERPRETED * bool(variables)}"
        f"cases = [case for case in gpu.plan() if {chosen}][:1]\n"
        "gpu.plan = lambda: cases\n"
        f"sys.argv[1:] = ['--dry-run', '--folder', {str(tmp_path)!r}, *{options!r}]\n"
        "sys.exit(gpu.main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests"), **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found, _ = report(tmp_path)
    assert found["left_out"] == []
    return found


@in_gpu_check
def test_compiled_contenders_take_part(tmp_path):
    found = only("case.compiled", tmp_path)
    compiled = [row for row in found["steps"] if row["contender"].endswith("compiled")]
    assert {(row["contender"], row["precision"]) for row in compiled} == {
        (f"{PEER} compiled", "ieee"), ("eager compiled", "ieee"),
    }  # fmt: skip


@needs_triton
@without_gpu
def test_the_kernels_of_a_step_are_taken_out_and_timed(tmp_path):
    """On the interpreter: triton's losses must agree with the peer's, or it is left out; every launch has a line."""
    for mode, tables in (("inference", ""), ("training", "exact by rows")):
        found = only(f"case.mode == {mode!r}", tmp_path / mode, "--no-compile", TRITON_INTERPRET="1")
        assert [row["tables"] for row in found["steps"] if row["contender"] == "triton"] == [tables]
    found = only("case.mode == 'kernels'", tmp_path / "kernels", TRITON_INTERPRET="1")
    assert "embedding_bag backward + Adam, triton" in {row["call"] for row in found["calls"]}
    kernels = [row["call"] for row in found["kernels"]]
    assert any("embedding_bag_fwd" in name for name in kernels)
    assert all(row["gbytes_per_second"] > 0 for row in found["kernels"])
    # forward and two products backward, but that no gradient of the labels' side is missing: three of each layer
    products = [row for row in found["kernels"] if row["call"].startswith("product")]
    assert len(products) == 3 * len(gpu_work.layers(gpu.tiny(ALI_CCP), "mmoe"))
    assert all(row["tflops"] > 0 for row in products)


def test_the_plan_has_every_shape_model_batch_precision_and_mode():
    cases = gpu.plan()
    keys = [case[:5] for case in cases if case.mode != "trainer"]
    assert set(keys) == {
        (mode, shape, model, batch, precision)
        for mode in ("training", "inference", "kernels")
        for shape in ("ali-ccp", "aliexpress")
        for model in ("mmoe", "ple")
        for batch in (4096, 65536)
        for precision in ("ieee", "tf32", "bf16")
    }
    assert len(set(cases)) == len(cases)
    # every target is measured by one of the first cases, with those that it is compared with
    for target in gpu_work.TARGETS:
        mode, model, batch, precision = target.key
        needed = [(mode, "ali-ccp", model, batch, precision)]
        if target.base is not None:
            needed.append((mode, "ali-ccp", model, batch, target.base[1]))
            assert not target.base[0].endswith("compiled") or any(c.compiled and c[:5] == needed[-1] for c in cases)
        assert all(key in [case[:5] for case in cases[:12]] for key in needed), target


def test_the_benchmark_names_what_the_time_did_not_allow():
    done = run("bench.gpu", "--dry-run", "--seconds", "-1", "--no-compile")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the time was up") == len(gpu.plan())


def test_a_part_of_the_plan_is_compiled_without_figures():
    done = run("bench.gpu", "--dry-run", "--no-compile", "--cases", "4", "--warm", "2/4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""


def test_a_report_names_no_folder_of_the_machine():
    bench = gpu.Bench(torch.device("cpu"), True, False, {})
    bench._leave_out(gpu.plan()[0], f"RuntimeError: Failed to import {ROOT}/build/gpu/inductor/some.py")
    assert bench.left_out == [f"{gpu.plan()[0]}: RuntimeError: Failed to import ./build/gpu/inductor/some.py"]


def test_a_contender_that_computes_something_else_is_left_out(monkeypatch):
    bench = gpu.Bench(torch.device("cpu"), True, False, dict.fromkeys(("copy", "ieee", "tf32", "bf16"), 1e9))
    step = gpu_models.Runner.step

    def wrong(self, batch):
        return step(self, batch) * (1.01 if self.backend else 1.0)

    monkeypatch.setattr(gpu_models.Runner, "step", wrong)
    bench.run(gpu.Case("training", "ali-ccp", "mmoe", 4096, "ieee"))
    if PEER == "torch-rechub":
        assert [row["contender"] for row in bench.found["steps"]] == [PEER]
        assert len(bench.left_out) == 3
        assert all("its losses are 1.0e-02 away" in why for why in bench.left_out)


def test_targets_are_met_or_missed_by_their_figures():
    row = {"shape": "ali-ccp", "mode": "training", "model": "mmoe", "batch": 65536, "tables": ""}
    steps = [
        row | {"precision": "bf16", "contender": "triton", "samples_per_second": 36e6},
        row | {"precision": "bf16", "contender": "eager", "samples_per_second": 90e6},
        row | {"precision": "ieee", "contender": "torch-rechub", "samples_per_second": 2e6},
        row | {"precision": "ieee", "contender": "torch-rechub compiled", "samples_per_second": 6e6},
    ]
    calls = [{"shape": "ali-ccp", "call": "embedding_bag backward + Adam, cuda", "of_limit": 0.71}]
    lines = gpu_report.targets({"peer": "torch-rechub 0.9.0", "steps": steps, "calls": calls})
    assert [line.rpartition(": ")[2] for line in lines] == [
        "met", "MISSED", "met", "NOT MEASURED", "NOT MEASURED", "NOT MEASURED", "met",
    ]  # fmt: skip
    assert "measured 18" in lines[1]


# ------------------------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize("model", ["mmoe", "ple"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_layers_are_the_models(name, model):
    """Their products are all but the towers' last ones, their columns those that are normalised."""
    shape = SHAPES[name]
    found = gpu_work.layers(shape, model)
    heads = 2 * len(shape.task_names) * shape.tower_dims[-1]
    assert sum(layer.flops for layer in found) + heads == shape.flops(model)
    made = gpu_models.make_model(gpu.tiny(shape), model)
    normalised = sum(value.numel() for key, value in made.state_dict().items() if key.endswith("running_mean"))
    assert sum(layer.columns for layer in gpu_work.layers(gpu.tiny(shape), model)) == normalised


def test_a_launchs_bytes_by_hand():
    table, out = torch.zeros(100, 4), torch.zeros(7, 3, dtype=torch.float64)
    arguments = {"P_ptr": table, "Again_ptr": table, "Out_ptr": out, "n": 5}
    assert gpu_work.launch_bytes(arguments, 100, 10) == 2 * 0.1 * 1600 + 168


def test_a_steps_floor_by_hand():
    shape, reached = gpu.tiny(ALI_CCP), {"copy": 1e9, "bf16": 1e12}
    columns = 2 * 8 + 2 * 2 + 2 * 4 + 2 * 4
    moved = 5 * 16 * columns * 2 + 16 * (4 * (8 + 16) + 12)
    optimizer = 4 * (6 * 4 * (9 + sum(shape.vocabs) / 32) + 7 * round(shape.flops() / 2))
    floor = gpu_work.step_floor(shape, "mmoe", 16, "bf16", 9, reached)
    assert floor == pytest.approx(3 * 16 * shape.flops() / 1e12 + (moved + optimizer) / 1e9)


# ------------------------------------------------------------------------------------------------------- the peers


@pytest.mark.parametrize("kind", ["mmoe", "ple"])
def test_the_peer_has_the_models_parameters(kind):
    """As many as fastmtl's, layer by layer: the same structure in other words."""
    shape = gpu.tiny(ALI_CCP)
    peer = sum(p.numel() for p in gpu_peer.Peer(shape, kind).parameters())
    mine = gpu_models.make_model(shape, kind)
    assert peer == sum(p.numel() for p in mine.parameters())
    batch = gpu_models.make_batches(shape, 16, 1, torch.device("cpu"))[0]
    assert gpu_peer.Peer(shape, kind)(batch.columns).shape == batch.labels.shape


def test_a_wheel_at_hand_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_peer, "WHEELS", tmp_path)
    monkeypatch.delenv("FASTMTL_PEER_WHEEL", raising=False)
    assert gpu_peer.unpacked() is None
    with zipfile.ZipFile(tmp_path / "torch_rechub-0.9.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch_rechub/__init__.py", "VERSION = 'in a wheel'\n")
    folder = gpu_peer.unpacked()
    done = subprocess.run(
        [sys.executable, "-c", "import torch_rechub; print(torch_rechub.VERSION)"],
        env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "in a wheel\n", done.stderr


# ------------------------------------------------------------------------------------------------------ the session


@without_gpu
@pytest.mark.parametrize("command", [("bench.gpu",), ("bench.gpu_session",), ("reliability.soak", "--device", "cuda")])
def test_without_a_gpu_the_commands_say_so(command):
    done = run(*command)
    assert done.returncode == 2
    assert "no GPU" in done.stderr


def test_the_session_stays_below_nine_minutes():
    done = run("bench.gpu_session", "--list")
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^ *\d+ s  ([^:]+):", done.stdout, re.MULTILINE)
    assert names[:7] == ["install", *(f"reliability row {row}" for row in (1, 2, 4, 9, 10, 11))]
    assert sum(name.startswith("tests ") for name in names) == gpu_session.SHARDS
    assert gpu_session.install("90").limit + gpu_session.BENCH < gpu_session.BUDGET < 540


def test_the_session_runs_every_folder_of_tests():
    """But those that it leaves out by name, with the reason beside them."""
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    chosen = {folder.split("/")[0] for folder in gpu_session.FOLDERS if "/" not in folder}
    assert chosen | set(gpu_session.ELSEWHERE) == folders
    assert "gpu/kernels" in gpu_session.FOLDERS


@in_gpu_check
def test_the_parts_of_the_suite_start_and_are_the_whole():
    """Each shard's own command, told to collect; tests/project/test_dealing.py sees that the parts are the whole."""
    shards = [part for part in gpu_session.checks() if part.name.startswith("tests ")]
    counts = []
    for part in (shards[0], shards[-1]):
        done = run(*part.command[2:], "--collect-only", **dict(part.variables[2:]))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        counts.append(re.search(r"^(\d+)/(\d+) tests collected", done.stdout, re.MULTILINE).groups())
    assert counts[0][1] == counts[1][1]
    share = int(counts[0][1]) / len(shards)
    assert all(0.85 * share < int(count) < 1.15 * share for count, _ in counts)


def test_a_part_that_takes_too_long_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "LOGS", tmp_path)
    monkeypatch.setattr(gpu_session, "ROOT", tmp_path)
    sleeper = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    ended, seconds = gpu_session.run(gpu_session.Part("sleep", sleeper, 8), dict(os.environ), 60)
    assert ended == "STOPPED after 8 s, log sleep.log"
    assert seconds < 30
    assert (tmp_path / "sleep.log").read_text() == "begun\n"
    bad = gpu_session.Part("bad", [sys.executable, "-c", "raise SystemExit(3)"], 30)
    assert gpu_session.run(bad, dict(os.environ), 60)[0].startswith("FAILED (3)")
    assert gpu_session.run(bad, dict(os.environ), 2)[0] == "NOT RUN: the time was up"


#: Tests that are lost with their process, fail, take the (made-up) GPU away, or pass; each says that it ran.
LOSING = """
import os, pytest, torch
import devices

devices.DEVICE = torch.device("cuda")
GONE = []

def synchronize():
    if GONE:
        raise RuntimeError("CUDA error: an illegal memory access\\nmore of it")

torch.cuda.synchronize = synchronize

@pytest.mark.parametrize("what", ["pass", "fail 0", "die", "fail 1", "pass again", "lose", "fail 2", "end"])
def test_it(what):
    with open(os.environ["RAN"], "a") as file:
        file.write(what + ";")
    if what == "die":
        os.abort()
    if what == "lose":
        GONE.append(1)
    assert "fail" not in what, f"{len(what)} is too many"
"""


def test_the_session_runs_what_was_chosen_and_tells_it_at_the_end(tmp_path, monkeypatch, capsys):
    python = [sys.executable, "-c"]
    alone = gpu_session.Part("big", [*python, "print('row 11 ok')"], 30, alone=True)
    failing = gpu_session.Part("small", [*python, "print('row  4 FAILED no'); raise SystemExit(1)"], 30)
    chosen = []
    monkeypatch.setattr(gpu_session, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_session, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(gpu_session, "checks", lambda groups: chosen.append(groups) or [alone, failing])
    monkeypatch.setattr(gpu_session, "built", lambda: ["_native", "_cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    packed = tmp_path / "logs.tar.gz"
    words = ["x", "--only", "reliability", "tests", "--seconds", "90", "--logs", str(packed)]
    monkeypatch.setattr(sys, "argv", words)
    assert gpu_session.main() == 1
    assert chosen == [["reliability", "tests"]]
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in told] == [
        "small: FAILED (1)", "big: passed", "1 x no: row  4", "small: FAILED (1)", "big: passed", told[-1],
    ]  # fmt: skip
    with tarfile.open(packed) as archive:
        assert archive.getnames() == ["big.log", "small.log"]


def test_a_lost_process_does_not_take_the_tests_behind_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "LOGS", tmp_path)
    monkeypatch.setattr(gpu_session, "ROOT", tmp_path)
    (tmp_path / "test_losing.py").write_text(LOSING)
    begun = tmp_path / "begun"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "--begun", str(begun), "test_losing.py"]
    part = gpu_session.Part("losing", command, 60, (("PYTHONPATH", str(ROOT / "tests")),), begun)
    environment = {**os.environ, "RAN": str(tmp_path / "ran"), "COLUMNS": "400", "PYTHONPATH": str(ROOT)}
    ended, _ = gpu_session.run(part, environment, 60)
    assert (tmp_path / "ran").read_text() == "pass;fail 0;die;fail 1;pass again;lose;fail 2;end;", "\n".join(
        part.lines()
    )
    assert ended.startswith("FAILED (-6, 2, 1), log losing.log")
    assert gpu_session.failures([part]) == [
        f"3 x AssertionError: 6 is too many: {', '.join(f'test_losing.py::test_it[fail {i}]' for i in range(3))}",
        "1 x CUDA error: an illegal memory access: test_losing.py::test_it[lose]",
    ]


def test_failures_are_told_by_what_they_say_and_not_at_length(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "LOGS", tmp_path)
    part = gpu_session.Part("one", [], 1)
    words = ["".join(chr(97 + (i * k) % 26) for k in range(1, 30)) for i in range(26)]
    lines = [f"FAILED tests/{word}/test_{word}.py::test_it[{i}] - {word * 20} {i}" for word in words for i in range(9)]
    part.log.write_text("\n".join([*lines, "row  4 FAILED hashes differ", "left out: a: b: c", "x FAILED y"]))
    told = gpu_session.failures([part])
    assert sum(map(len, told)) < gpu_session.TOLD + 600
    assert told[0].startswith(f"9 x {words[0]}")
    assert re.fullmatch(r"and \d+ other kinds of failures, see the logs", told[-1])
    part.log.write_text("row  4 FAILED hashes differ\nleft out: kernels: ali: no\nleft out: a: b: the time was up\n")
    assert gpu_session.failures([part]) == ["1 x hashes differ: row  4", "1 x no: kernels: ali"]


def test_logs_and_reports_come_in_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(gpu_session, "ROOT", tmp_path)
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (tmp_path / "logs" / "triton").mkdir(parents=True)
    for path in (results / "old.md", results / "new.json", tmp_path / "logs" / "a.log"):
        path.write_text(path.name)
    os.utime(results / "old.md", (1, 1))
    gpu_session.pack(tmp_path / "out" / "logs.tar.gz", 100)
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as archive:
        assert archive.getnames() == ["a.log", "new.json"]


@without_gpu
def test_the_sanitizers_command_is_whole(tmp_path, monkeypatch):
    """A stand-in for compute-sanitizer gets what the real one would: the planted write, and the tests by name."""
    sys.path.insert(0, str(ROOT / "tests"))
    from reliability import sanitize_gpu

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitize_gpu, "TOOLKIT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="not on the PATH"):
        sanitize_gpu.soak(1, 1)
    stand_in = tmp_path / "compute-sanitizer"
    stand_in.write_text(
        f"#!{sys.executable}\nimport sys\nwords = ' '.join(sys.argv)\n"
        "if 'planted' in words:\n    print('Invalid __global__ write'); sys.exit(9)\n"
        "print('3 passed')\n"
        "print('ERROR SUMMARY: 0 errors' if 'memcheck' in words else 'RACECHECK SUMMARY: 0 hazards')\n"
    )
    stand_in.chmod(0o755)
    assert sanitize_gpu.soak(1, 1) == "memcheck: 3 tests, nothing found; racecheck: 3 tests, nothing found"
    stand_in.write_text(f"#!{sys.executable}\nprint('3 passed'); print('ERROR SUMMARY: 0 errors')\n")
    with pytest.raises(AssertionError, match="a planted write was missed"):
        sanitize_gpu.soak(1, 1)


@needs_triton
@without_gpu
def test_rows_of_reliability_run_on_triton(seed):
    """On the interpreter, a few cases: random configurations, several backwards, bad ids, a training."""
    words = (
        f"{INTERPRETED}from reliability import against_float64 as a, bad_ids, gradients, repeatability as r\n"
        f"[a.KINDS[kind][0]({seed}, 'triton') for kind in ('lookups', 'layers')]\n"
        f"gradients.check_several_backwards({seed}, 'triton')\n"
        f"a.check_chain({seed}, 'triton')\n"
        f"[bad_ids.check('triton', oov, {seed}) for oov in bad_ids.CHOICES]\n"
        f"assert len(r.weights_hash('MMOE', 'Adam', 'fp32', 1, 'triton', {seed}, 60)) == 64; print('all done')\n"
    )
    paths = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "FASTMTL_TEST_DEVICE": "cpu"}
    done = subprocess.run([sys.executable, "-c", words], env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("all done\n"), done.stderr[-3000:]


@without_gpu
@in_gpu_check
def test_models_trainers_and_tests_move_what_they_must():
    """On a device that is made up: a tensor left on the CPU is an error there, as on a GPU."""
    options = ("-q", "-p", "no:cacheprovider", "--color=no", "-W", "ignore")
    chosen = "(hand and 0.16 or esmm or padding or one_row or uwl or bad_ids_or or mixed_widths) and not compile"
    done = run("pytest", *options, "tests/behaviour", "tests/ops", "-k", chosen, FASTMTL_TEST_DEVICE="elsewhere")
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(passed[1]) > 40
