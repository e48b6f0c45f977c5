"""As a process: exit codes, what is imported, interruption, a reader that goes away."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fastmtl


def fastmtl_process(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "fastmtl", *map(str, words)], capture_output=True, text=True, **options
    )


def test_help_and_mistakes_do_not_wait_for_torch():
    code = (
        "import sys; from fastmtl.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert main(['trian']) == 2\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model.n_expert" in done.stdout


def test_version_and_a_mistake():
    done = fastmtl_process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fastmtl {fastmtl.__version__}\n", "")
    done = fastmtl_process("train", "censsus")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_an_interrupt_keeps_the_best_weights(tmp_path):
    words = ["train", "synthetic", "--rows", "20000", "--epochs", "1000", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmtl", *words, "--patience", "1000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("epoch 1:"):
            break
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=60)
    assert process.returncode == 130, "".join(said) + rest
    assert out == ""
    last = rest.splitlines()[-1]
    assert last.startswith("fastmtl: interrupted: ")
    assert "Traceback" not in rest
    assert str(tmp_path / "run" / "best") in last
    assert fastmtl.from_pretrained(tmp_path / "run" / "best").task_names == ["click", "purchase"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_no_success(run, raw_file):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastmtl", "predict", str(run), str(raw_file), "--out", "-", "--quiet"],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 1
    assert "No space left" in done.stderr
