"""Full disks, disks that cannot be written, folders of other people: what is said, and what is left.

    python -m benchmarks.disk          as root, on Linux: it mounts small disks in memory

Every command that changes an index (build, build again, add, mute, unmute, remove, merge, merge over an
index) is run as a person runs it, `python -m index_tools …`, in a process of its own:

full       on a disk of 3 MiB with so many KiB left, from none to plenty
read-only  on that disk, mounted to be read only
not mine   by a user who may read the index and its folder, and not write them
not shown  by a user who may not even look into the folder

Where it is refused, the message has to be one line that names the folder and what to do (and, on a full
disk, the folder that holds the space of an unfinished build); the index has to be the old one to the last
byte; and once there is space, or the right, the same command has to succeed and make what it makes
undisturbed. Reading an index that cannot be written
has to work. Prints a table, and whatever broke that;
ends with 1 where something did.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from amg_core.index import own
from index_tools.cli import main as command
from tests.index.helpers import fill
from tests.index.killing import child, end, make_small_shards, whole

LEFT = (0, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # KiB
DISK = "3m"
NOBODY = 65534
STEPS = ("free space", "choose a folder you may write to", "you may read")
WHERE = {"full": "the disk is full; free space"}


class Scene:
    """Pictures and indexes beside the disk, and the commands that are tried on an index of it."""

    def __init__(self, work: Path, disk: Path) -> None:
        self.disk, self.index, self.work = disk, disk / "index", work
        few, many = fill(work / "few", 24), fill(work / "many", 24, first=12)
        self.old, self.other = work / "old", work / "other"
        self.commands = {
            "build": ["build", few, self.index],
            "build again": ["build", many, self.index],
            "add": ["add", many, self.index],
            "mute": ["mute", self.index, "p001.png"],
            "unmute": ["mute", self.index, "p002.png", "--undo"],
            "remove": ["remove", self.index, "p003.png"],
            "merge": ["merge", self.old, self.other, self.index],
            "merge over": ["merge", self.old, self.other, self.index, "--replace"],
        }
        for pictures, index in ((few, self.old), (many, self.other)):
            self.must(["build", pictures, index])
        self.must(["mute", self.old, "p002.png"])
        self.undisturbed = {}
        for verb in self.commands:
            self.begin(verb)
            self.must(self.commands[verb])
            self.undisturbed[verb] = whole(self.index)
        self.must(["info", self.index])

    def begin(self, verb: str) -> None:
        """The index as it is before a command; none where the command makes it."""
        for path in self.disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if verb not in ("build", "merge"):
            shutil.copytree(self.old, self.index)

    def run(self, arguments: list, uid: int = 0) -> tuple[int, str]:
        """Exit code of a command, and what it told on stderr."""
        output = self.work / "told.txt"

        def act() -> None:
            with output.open("w") as file:
                os.dup2(file.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                if uid:
                    os.setgroups([])
                    os.setgid(uid)
                    os.setuid(uid)
                code = command([*map(str, arguments), *pixel(arguments)])
                sys.stderr.flush()
                os._exit(code)

        return end(child(act)), output.read_text().strip()

    def must(self, arguments: list) -> None:
        """In this process, which then has imported what the other user may not be able to read."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = command([*map(str, arguments), *pixel(arguments)])
        assert code == 0, said.getvalue()


def pixel(arguments: list) -> list[str]:
    """`compact` would take longer, and writes no other files."""
    return ["--descriptor", "pixel"] if arguments[0] == "build" else []


def wrong(code: int, output: str, folder: Path, kind: str) -> str:
    """What is not as it has to be in a refusal; "" if nothing."""
    lines = [line for line in output.splitlines() if "error" in line or "Traceback" in line]
    if code != 1 or len(lines) != 1 or not lines[0].startswith("error: "):
        return f"ended with {code}: {output[-600:]}"
    if "unexpected" in lines[0] or not any(step in output for step in STEPS):
        return f"no next step: {lines[0]}"
    if str(folder) not in lines[0] or WHERE.get(kind, "") not in lines[0]:
        return f"does not name what is wrong: {lines[0]}"
    return ""


@contextlib.contextmanager
def mounted(disk: Path) -> Iterator[None]:
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", disk], check=True)


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


def fill_up(disk: Path, left: int) -> Path:
    """A file that leaves `left` KiB of the disk."""
    state = os.statvfs(disk)
    filler = disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(max(0, state.f_bavail * state.f_frsize - left * 1024)))
    return filler


def full(scene: Scene, verb: str, left: int) -> tuple[str, str]:
    """("refused" or "done", what is wrong or "")."""
    scene.begin(verb)
    old = whole(scene.index)
    filler = fill_up(scene.disk, left)
    code, output = scene.run(scene.commands[verb])
    if code == 0:
        return "done", "" if whole(scene.index) == scene.undisturbed[verb] else "another index"
    bad = wrong(code, output, scene.index, "full")
    build = scene.index / ".build"
    if not bad and own.size(build) and str(build) not in output:
        bad = f"holds {own.size(build)} bytes in {build} and does not say so: {output}"
    if not bad and whole(scene.index) != old:
        bad = "not the old index"
    filler.unlink()
    return "refused", bad or again(scene, verb)


def again(scene: Scene, verb: str) -> str:
    """The same command once there is room, or the right."""
    code, output = scene.run(scene.commands[verb])
    if code:
        return f"again: {output}"
    return "" if whole(scene.index) == scene.undisturbed[verb] else "again: another index"


def read_only(scene: Scene, verb: str) -> tuple[str, str]:
    scene.begin(verb)
    old = whole(scene.index)
    remount(scene.disk, "ro")
    try:
        return _refused(scene, verb, old, 0, "read-only")
    finally:
        remount(scene.disk, "rw")


def not_mine(scene: Scene, verb: str) -> tuple[str, str]:
    scene.begin(verb)
    return _refused(scene, verb, whole(scene.index), NOBODY, "not mine")


def not_shown(scene: Scene, verb: str) -> tuple[str, str]:
    scene.begin(verb)
    old = whole(scene.index)
    scene.disk.chmod(0o700)
    try:
        return _refused(scene, verb, old, NOBODY, "not shown")
    finally:
        scene.disk.chmod(0o755)


def _refused(scene: Scene, verb: str, old: dict | None, uid: int, kind: str) -> tuple[str, str]:
    code, output = scene.run(scene.commands[verb], uid)
    bad = wrong(code, output, scene.index, kind)
    if not bad and old is not None:
        looked, said = scene.run(["info", scene.index], uid)
        if kind == "not shown":
            bad = wrong(looked, said, scene.index, kind)
        elif looked:
            bad = f"cannot be read: {said}"
    if kind == "read-only":
        remount(scene.disk, "rw")
    if not bad and whole(scene.index) != old:
        bad = "not the old index"
    return ("refused" if code else "done"), bad or again(scene, verb)


KINDS: dict[str, Callable[[Scene, str], tuple[str, str]]] = {
    "read-only": read_only, "not mine": not_mine, "not shown": not_shown,
}  # fmt: skip


def main() -> int:
    if sys.platform != "linux" or os.geteuid() != 0:
        sys.exit("It mounts disks and becomes another user: run it as root, on Linux.")
    torch.set_num_threads(1)  # it forks
    make_small_shards()
    tried = broken = 0
    with tempfile.TemporaryDirectory() as folder:
        work, disk = Path(folder), Path(folder) / "disk"
        work.chmod(0o755)
        with mounted(disk):
            disk.chmod(0o755)
            scene = Scene(work, disk)
            print(f"{'':14}full: refused, done" + "".join(f"{kind:>12}" for kind in KINDS))
            for verb in scene.commands:
                rows = [full(scene, verb, left) for left in LEFT]
                others = [check(scene, verb) for check in KINDS.values()]
                names = [*(f"{left} KiB left" for left in LEFT), *KINDS]
                words = [word for word, _ in rows]
                print(
                    f"{verb:14}{words.count('refused'):13}{words.count('done'):6}"
                    + "".join(f"{word:>12}" for word, _ in others),
                    flush=True,
                )
                for name, (_, bad) in zip(names, [*rows, *others], strict=True):
                    tried += 1
                    broken += bool(bad)
                    if bad:
                        print(f"    {name}: {bad}", flush=True)
    print(f"{tried} tried, {broken} not as it has to be")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
