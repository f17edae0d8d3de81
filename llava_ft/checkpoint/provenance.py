"""Which code a run was started from: the state of the git repository around the working directory."""

import logging
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

_SECONDS_FOR_GIT = 10.0


@dataclass(frozen=True)
class GitState:
    """A repository at one moment.

    Attributes:
        commit: Full hash of the commit that is checked out.
        is_modified: Whether tracked files differ from it.
        root: Top folder of the repository.
    """

    commit: str
    is_modified: bool
    root: Path

    def __str__(self) -> str:
        """The commit, marked if the files differ from it."""
        return self.commit + (" (modified)" if self.is_modified else "")


@cache
def git_state(directory: Path) -> GitState | None:
    """Read the state of the repository that a directory belongs to; asked once, so that a run reports one state.

    Args:
        directory: Usually the working directory of the user.

    Returns:
        The state, or None if there is no repository, no commit in it, or no usable git.
    """
    commit = _git(directory, "rev-parse", "HEAD")
    root = _git(directory, "rev-parse", "--show-toplevel")
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    if commit is None or root is None or changes is None:
        return None
    return GitState(commit, bool(changes), Path(root))


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=_SECONDS_FOR_GIT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.debug("git %s in %s: %s", " ".join(arguments), directory, error)
        return None
    return done.stdout.strip()
