"""What a signal does to a process, and the command that continues it."""

import os
import shlex
import signal
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from utils.interruption import resume_command

PATIENT = """
import os, signal, sys
from utils.interruption import interruption

interruption.catch()
first, *others = sys.argv[1:]
with interruption.deferred():
    os.kill(os.getpid(), getattr(signal, first))
    print("still here", flush=True)
    for name in others:
        os.kill(os.getpid(), getattr(signal, name))
    print("until the end", flush=True)
print("not reached")
"""


def run_code(code, *words, **environment):
    """(exit code, standard output, standard error) of a few lines of Python."""
    command = [sys.executable, "-c", code, *words]
    environment = os.environ | environment
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize("second", [(), ("SIGTERM",), ("SIGXCPU", "SIGXCPU"), ("SIGHUP",)])
def test_deferred_signal_waits(second):
    """An echo of the first is not a second one, and neither are the warnings of schedulers."""
    output, error = "still here\nuntil the end\n", "interrupted by SIGTERM: nothing was changed\n"
    assert run_code(PATIENT, "SIGTERM", *second) == (143, output, error)


def test_second_signal_ends_a_process_at_once():
    assert run_code(PATIENT, "SIGTERM", "SIGINT") == (130, "still here\n", "")


def test_request_after_a_warning_is_the_first_one():
    """Of two signals at once, the system may deliver the second one first."""
    output, error = "still here\nuntil the end\n", "interrupted by SIGINT: nothing was changed\n"
    assert run_code(PATIENT, "SIGUSR1", "SIGINT") == (130, output, error)
    assert run_code(PATIENT, "SIGUSR1", "SIGINT", "SIGTERM") == (143, "still here\n", "")


def test_signal_that_torchrun_relays_is_no_second_one():
    code, output, _ = run_code(PATIENT, "SIGTERM", "SIGINT", TORCHELASTIC_RUN_ID="none")
    assert (code, output) == (143, "still here\nuntil the end\n")


CAUGHT = """
import os, signal, sys
from utils.interruption import interruption

# Whatever started the tests, such as nohup, may ignore it.
signal.signal(getattr(signal, sys.argv[1]), signal.SIG_IGN if "ignored" in sys.argv else signal.SIG_DFL)
interruption.catch()
os.kill(os.getpid(), getattr(signal, sys.argv[1]))
print("not interrupted")
"""


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_warnings_of_schedulers_end_a_process_in_order_unless_ignored(name):
    error = f"interrupted by {name}: nothing was changed\n"
    assert run_code(CAUGHT, name) == (128 + getattr(signal, name), "", error)
    assert run_code(CAUGHT, name, "ignored") == (0, "not interrupted\n", "")


ENDING = """
import atexit, os, signal
from utils.errors import exit_with
from utils.interruption import interruption
from utils.setup import run_script

interruption.catch()
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
run_script({})
"""


@pytest.mark.parametrize(("main", "expected"), [("lambda: None", (0, "")), ("lambda: exit_with(1)", (2, "error: 1\n"))])
def test_signal_while_a_process_ends_changes_nothing(main, expected):
    code, _, error = run_code(ENDING.format(main))
    assert (code, error) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--reset", "--lr", "0.1"], ["--lr", "0.1", "--resume"]),
        (["--resume", "a b.pt", "--lr", "0.1"], ["--lr", "0.1", "--resume"]),
        (["--resume=a.pt", "--pretrain"], ["--pretrain", "--resume"]),
        (["--pretrain", "--resume"], ["--pretrain", "--resume"]),
        (["--resume", "--job_dir", "it's"], ["--job_dir", "it's", "--resume"]),
    ],
)
def test_command_to_resume(monkeypatch, flags, expected):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "main.py", *flags])
    assert shlex.split(resume_command()) == [sys.executable, "-u", "main.py", *expected]
