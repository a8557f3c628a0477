"""How a command that is no run ends: what is wrong in one sentence on stderr, and the exit status that all commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable

from megarlhf.storage.files import system_error

USER_WROTE_WRONG, WENT_WRONG, INTERRUPTED = 2, 1, 130


def ended(program: str, work: Callable[[], None], *, after_ctrl_c: str) -> int:
    """Do `work`; returns the exit status: 0, 2 for its ValueError, 1 for an OSError such as a full disk, 130 after Ctrl-C.

    Args: after_ctrl_c: what is then left of it. Any other error is a fault of the program and is raised.
    """
    try:
        work()
        return 0
    except ValueError as error:
        problem, status = str(error), USER_WROTE_WRONG
    except OSError as error:
        problem, status = system_error(error), WENT_WRONG
    except KeyboardInterrupt:
        problem, status = f"stopped by Ctrl-C; {after_ctrl_c}", INTERRUPTED
    print(f"{program}: {problem}", file=sys.stderr, flush=True)
    return status
