"""How scripts end when the machine refuses."""

import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch

from tests.helpers import ROOT, open_files_used_up
from utils.cost import check_fits
from utils.setup import run_script

HUGE = 2**50


@pytest.mark.parametrize("allocate", [torch.empty, np.empty, bytearray], ids=["torch", "numpy", "python"])
def test_lack_of_memory_names_the_flags_to_lower(capsys, allocate):
    with pytest.raises(SystemExit) as exit_:
        run_script(lambda: allocate(HUGE))
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: lower --train_batch_size, --eval_batch_size, --num_students")


def test_what_cuda_says_is_known(capsys):
    def step():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1 GiB")

    with pytest.raises(SystemExit):
        run_script(step)
    assert len(capsys.readouterr().err.splitlines()) == 1


def last_words(capsys, main):
    """The one line that a script whose main fails ends with."""
    with pytest.raises(SystemExit) as exit_:
        run_script(main)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_lack_of_shared_memory_names_the_flags_of_docker(capsys):
    def read():
        raise RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to allocate shared memory(shm) "
            "for file </torch_1_2_0>: No space left on device (28)"
        )

    assert "--shm-size" in last_words(capsys, read)


def test_lack_of_a_temporary_folder_is_not_blamed_on_the_network(capsys, monkeypatch, tmp_path):
    class Writing(torch.nn.Module):
        def forward(self, x):
            return tempfile.mkdtemp()

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [tmp_path / "missing"])
    assert "set TMPDIR" in last_words(capsys, lambda: check_fits(Writing(), "network", (3, 8, 8), 10))


def test_too_many_open_files_are_named(capsys, tmp_path):
    with open_files_used_up():
        line = last_words(capsys, (tmp_path / "file").touch)
    assert "Too many open files" in line


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="must match"):
        run_script(lambda: torch.zeros(2) + torch.zeros(3))


@pytest.mark.slow
def test_a_run_that_does_not_fit_the_memory_ends_in_one_line(tmp_path):
    """A limit half a gigabyte above what the imports took stands in for a small machine."""
    code = """
import resource, sys
import main
from utils import options, setup
args = options.parse("main", sys.argv[1:])
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**29
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
setup.run_script(lambda: main.main(args))
"""
    flags = ("--dataset", "digits", "--train_batch_size", 1437, "--num_epochs", 1, "--compile", "off")
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, flags), "--job_dir", tmp_path / "job"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "error: out of memory" in result.stderr
    assert len(result.stderr.splitlines()) == 1


STEP = """
import utils
import torch
from torch import nn

network = nn.Conv2d(3, 16, 3).to(memory_format=torch.channels_last)
network(torch.randn(32, 3, 8, 8).to(memory_format=torch.channels_last)).sum().backward()
print(torch.get_num_threads())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "threads"), [("DYNAMIC", "true", 2), ("MAX_ACTIVE_LEVELS", "0", 2), ("THREAD_LIMIT", "1", 1)]
)
def test_settings_of_openmp_do_not_make_training_wait_forever(name, value, threads):
    result = subprocess.run(
        [sys.executable, "-c", STEP],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "2", f"OMP_{name}": value},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout == f"{threads}\n"


def test_an_older_python_is_refused_in_one_line():
    code = "import sys; sys.version_info = (3, 9, 18); import utils"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: Python 3.10 or newer is needed")
