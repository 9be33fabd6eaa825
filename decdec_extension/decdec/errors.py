"""Errors that a user can mend, and how every script ends on one."""

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: one line that names the argument, what was expected and what came."""


def check_device(device) -> None:
    """Refuse what is no device (a string or a torch.device), or a GPU that torch does not see."""
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UserError(f"device: expected cpu, cuda or cuda:NUMBER, got '{device}'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: torch sees {torch.cuda.device_count()} GPUs, got '{device}'; use cpu")


def run(main: Callable[[], None]) -> None:
    """Run a script's ``main``; a user's mistake, a full disk or GPU, or Ctrl-C ends in one line on stderr and a non-zero
    exit."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EACCES, errno.EROFS, errno.EISDIR, errno.ENOTDIR):
            sys.exit(f"error: {error.filename or 'output'}: {error.strerror}")
        raise
    except RuntimeError as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            sys.exit(f"error: GPU memory: {'. '.join(str(error).split('. ')[:2])}")
        raise
