"""The time of a whole token, asked of a runtime in its own process: ``end-to-end/time_plans.py`` or one like it."""

import contextlib
import json
import shlex
import subprocess
import tempfile
from pathlib import Path

from decdec import plan
from decdec.errors import UserError
from decdec.plan import Plan


class TokenTimer:
    """Runs ``command``, which answers each line of JSON on its stdin by one on its stdout. To be used in a ``with``."""

    def __init__(self, command: str):
        self.command = command

    def __enter__(self) -> "TokenTimer":
        self._folder = tempfile.TemporaryDirectory()
        try:
            self._process = subprocess.Popen(shlex.split(self.command), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                             text=True)
        except (OSError, ValueError) as error:
            self._folder.cleanup()
            raise UserError(f"timer: {self.command!r} cannot be run: {error}") from None
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(BrokenPipeError):  # it ended before us
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def base_ms(self) -> float:
        """Milliseconds of a token without compensation."""
        return self._ask({}, "base_ms")["base_ms"]

    def slowdown_percent(self, candidate: Plan) -> float:
        """How much longer a token takes as ``candidate`` says for its first target."""
        path = Path(self._folder.name) / plan.PLAN
        plan.save_plan(path, candidate)
        answer = self._ask({"plan": str(path), "target": candidate.at().target_percent}, "base_ms", "ms")
        return 100 * (answer["ms"] / answer["base_ms"] - 1)

    def _ask(self, question: dict, *times: str) -> dict[str, float]:
        """The answer, which must hold these ``times``, in milliseconds."""
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
            if all(answer[name] > 0 for name in times):
                return answer
        except (OSError, json.JSONDecodeError, KeyError, TypeError):
            pass
        raise UserError(f"timer: {self.command!r} ended, or answered with something else than a line of JSON with "
                        f"{' and '.join(times)}")
