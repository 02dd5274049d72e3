"""Python in a process of its own, with the package that is being tested."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fused_lstm


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python *arguments` with these environment variables set, and captures what it says.

    In the folder that holds the package under test, which Python looks into first: the source tree,
    where tests are started, has a package of the same name that may not be built.
    """
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(fused_lstm.__file__).parent.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
