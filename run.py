#!/usr/bin/env python3
"""The two commands of the README, on nothing but Python 3.10 or newer.

    python3 run.py demo     make a private environment, then draw plain and guarded pictures
    python3 run.py test     make a private environment, then lint, check types and run the tests

The environment is `.venv` in this folder; nothing outside this folder is changed. Further arguments go
to the demo or to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
NEEDS = {
    "demo": ["torch==2.13.0", "numpy", "pillow", "safetensors"],
    "test": [
        *("torch==2.13.0", "numpy", "pillow", "safetensors"),
        *("pytest", "pytest-xdist", "ruff", "mypy", "vulture"),
        *("hypothesis", "faiss-cpu", "pyarrow", "scipy", "jinja2", "tqdm", "shtab"),
        *("comfyui-frontend-package==1.58.1", "aiohttp", "websocket-client"),  # tests/web
        # tests/diffusers, which are skipped on an older Python
        *(f"{name}; python_version >= '3.11'" for name in ("diffusers==0.42.1", "transformers")),
    ],
}
WORKERS = ("-n", "2", "--dist", "loadfile")  # what is given after them prevails: -n 0
# Before the tests.
CHECKS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["vulture"])


def environment(task: str) -> Path:
    """The interpreter of `.venv`, made and filled where it is not yet."""
    folder = ROOT / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"Making an environment in {folder} …", flush=True)
        try:
            venv.create(folder, with_pip=True, clear=True)
        except subprocess.CalledProcessError:
            sys.exit(
                "This Python cannot make environments. On Debian and Ubuntu: apt install python3-venv"
            )
    stamp = folder / f"{task}.installed"
    wanted = "\n".join(NEEDS[task])
    if not stamp.is_file() or stamp.read_text() != wanted:
        print("Installing", ", ".join(NEEDS[task]), "…", flush=True)
        quiet = ["--quiet", "--disable-pip-version-check"]
        subprocess.run([python, "-m", "pip", "install", *quiet, *NEEDS[task]], check=True)
        stamp.write_text(wanted)
    return python


def main() -> int:
    if sys.version_info < (3, 10):
        print("Python 3.10 or newer is needed; this is", sys.version.split()[0])
        return 2
    if len(sys.argv) < 2 or sys.argv[1] not in NEEDS:
        print(__doc__)
        return 2
    task, rest = sys.argv[1], sys.argv[2:]
    python = environment(task)
    if task == "demo":
        return subprocess.run([python, "-m", "amg_demo", *rest], cwd=ROOT).returncode
    for step in CHECKS:
        if code := subprocess.run([python, "-m", *step], cwd=ROOT).returncode:
            return code
    return subprocess.run([python, "-m", "pytest", *WORKERS, *rest], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
