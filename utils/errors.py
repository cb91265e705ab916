"""The one exception for mistakes a person can mend; anything else is a bug and keeps its traceback."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """What is wrong and what to do about it, in one line."""


def exit_with(error: object) -> None:
    """Say in one line on stderr what is wrong and end the process with code 2."""
    print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
    sys.exit(2)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; a UserError ends it with one line and code 2, Ctrl-C with code 130."""
    try:
        main()
    except UserError as error:
        exit_with(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
