"""What the terminal gets to see, and that nothing depends on it."""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from utils.errors import log, log_to, text_stream


@pytest.fixture
def pipe():
    """Two files: the reading end and the writing end."""
    reader, writer = (os.fdopen(end, mode, 0) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    with reader, writer:
        yield reader, writer


def test_what_the_encoding_lacks_is_escaped_and_the_log_file_has_it_all(tmp_path, monkeypatch, pipe):
    monkeypatch.setattr(sys, "stdout", text_stream(pipe[1].fileno(), "ascii"))
    log_to(tmp_path / "log")
    log.info("魚 \udcff")
    log_to(None)
    log.info("after")
    assert pipe[0].read(100) == b"\\u9b5a \\udcff\nafter\n"
    assert (tmp_path / "log").read_text(encoding="utf-8").endswith(" 魚 \\udcff\n")


def test_nothing_fails_when_nobody_reads(tmp_path, monkeypatch, pipe):
    pipe[0].close()
    monkeypatch.setattr(sys, "stdout", text_stream(pipe[1].fileno(), "utf-8"))
    log_to(tmp_path / "log")
    for _ in range(2):
        log.info("line")
    print("x" * 100_000, flush=True)
    log_to(None)
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def guarded(code, redirection="", **environment):
    """Standard output, standard error and exit code of a process that speaks through guarded streams."""
    command = [sys.executable, "-c", f"from utils import errors; errors.guard(); {code}"]
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command]
    result = subprocess.run(shell, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    return result.stdout, result.stderr, result.returncode


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_a_standard_output_that_takes_nothing_is_no_error(redirection):
    if redirection == ">/dev/full" and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    assert guarded("print('result'); errors.exit_with('wrong')", redirection) == ("", "error: wrong\n", 2)


def test_a_closed_standard_error_keeps_the_exit_code():
    assert guarded("errors.exit_with('wrong')", "2>&-") == ("", "", 2)


def test_of_the_processes_of_torchrun_the_first_has_a_standard_output():
    code = "print('result'); errors.exit_with('wrong')"
    assert guarded(code, RANK="0", WORLD_SIZE="2") == ("result\n", "error: wrong\n", 2)
    assert guarded(code, RANK="1") == guarded(code) == ("result\n", "error: wrong\n", 2)  # nobody else started it
    assert guarded(code, RANK="1", WORLD_SIZE="2") == ("", "error (process 1): wrong\n", 2)
