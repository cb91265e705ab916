"""How a script ends when it cannot go on: one line for what a person can mend; bugs keep their traceback."""

import errno
import sys
from collections.abc import Callable
from typing import NoReturn

# What the machine refuses to do is not a bug of ours either: no permission, no space, no such name possible.
REFUSALS = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "ENAMETOOLONG", "ELOOP")
    if hasattr(errno, name)
}


class UserError(ValueError):
    """What is wrong and what to do about it, in one line."""


def exit_with(error: object) -> NoReturn:
    """Say in one line on stderr what is wrong and end the process with code 2."""
    print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
    sys.exit(2)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; a UserError or a refusal ends it with one line and code 2."""
    try:
        main()
    except UserError as error:
        exit_with(error)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        exit_with(f"{error.filename or 'writing'}: {error.strerror}")
