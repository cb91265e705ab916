"""What several test files need."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(script, *flags, cwd=ROOT, **environment):
    """Run a script of the project in a process of its own, as a user would; one thread, to the bit reproducible."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def succeed(script, *flags, **options):
    """`run`, asserting success. Returns standard output."""
    result = run(script, *flags, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fail(script, *flags, **options):
    """`run`, asserting that it ends as a person's mistake should: code 2 and one line, which is returned."""
    result = run(script, *flags, **options)
    assert result.returncode == 2, f"exit code {result.returncode}: {result.stderr}"
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]
