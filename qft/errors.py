"""What went wrong, where, how to mend it, and the exit code it means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `what` in a sentence, `where` (file:line or recipe key), `hint` says how to mend it."""

    what: str
    where: str = ""
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        mend = f"\n  {self.hint}" if self.hint else ""
        return f"{place}{self.what}{mend}"


class QftError(Exception):
    """Base of all errors a user may see. Never raised itself: use InputError (exit 2) or StageError (exit 1)."""

    exit_code = 1

    def __init__(self, what: str | Sequence[Problem], *, where: str = "", hint: str = "") -> None:
        self.problems = (Problem(what, where, hint),) if isinstance(what, str) else tuple(what)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class InputError(QftError):
    """The user's input cannot be used: a recipe, a file, an argument."""

    exit_code = 2


class StageError(QftError):
    """The input was fine, but a stage could not finish or its result is beyond the limits asked for."""

    exit_code = 1


class Interrupted(QftError):
    """The user stopped the run (Ctrl-C or SIGTERM); the message says how to go on."""

    exit_code = 130
