"""How a script ends when it cannot go on: one line for what a person can mend; bugs keep their traceback."""

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from utils.interruption import interruption
from utils.terminal import guard

# What the machine refuses to do is not a bug of ours either: no permission, no space, no such name possible.
REFUSALS = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "ENAMETOOLONG", "ELOOP", "EMFILE", "ENFILE")
    if hasattr(errno, name)
}


# What PyTorch says, in a RuntimeError, on each kind of device; NumPy and Python raise a MemoryError.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "bad_alloc")


LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL communicator was aborted")


class UserError(ValueError):
    """What is wrong and what to do about it, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of an error of somebody else's code; its kind if it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def exit_with(error: object) -> NoReturn:
    """Say in one line on stderr what is wrong and end the process with code 2."""
    rank = os.environ.get("RANK") or "0"  # of a process that torchrun started
    start = "error:" if rank == "0" else f"error (process {rank}):"
    print(start, " ".join(str(error).split()), file=sys.stderr, flush=True)
    sys.exit(2)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; a UserError, a refusal or a lack of memory ends it with one line and code 2."""
    guard()
    try:
        main()
    except UserError as error:
        exit_with(error)
    except OSError as error:
        if "temporary directory" in str(error):  # tempfile's, an ENOENT
            exit_with("no folder for temporary files can be written: set TMPDIR to one that can")
        if error.errno not in REFUSALS:
            raise
        exit_with(f"{error.filename or 'writing'}: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if "Too many open files" in str(error):
            exit_with("too many open files: raise the limit (ulimit -n), or try fewer --workers")
        if "shared memory" in str(error):  # PyTorch's, whose worker processes put images there
            exit_with(
                "shared memory (/dev/shm) is full: try fewer --workers or smaller batches, or start the container with "
                "more, by --shm-size or --ipc=host"
            )
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            exit_with(
                "out of memory: lower --train_batch_size, --eval_batch_size, --num_students, --image_size or "
                "--workers, or take a smaller network"
            )
        if any(words in str(error) for words in LOST_PROCESS):
            exit_with("another process of this run has died: its own message says why; continue with --resume")
        if str(error).startswith("DataLoader worker"):  # torch notices it wherever the script then is
            exit_with(f"a process that reads images died, perhaps for want of memory: try fewer --workers ({error})")
        raise
    finally:
        interruption.ignore_first()
