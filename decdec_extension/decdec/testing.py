"""What the tests of several rooms share: running a script as a user does, and reading its refusal."""

import subprocess
import sys
from pathlib import Path


def run_script(path: str | Path, *arguments: object, **options) -> subprocess.CompletedProcess:
    """Run a Python or shell script and capture what it prints."""
    command = [sys.executable] if str(path).endswith(".py") else ["bash"]
    return subprocess.run([*command, str(path), *map(str, arguments)], capture_output=True, text=True, **options)


def refused(result: subprocess.CompletedProcess) -> str:
    """The one line of an error; a stack trace or a zero exit fails the test."""
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]
