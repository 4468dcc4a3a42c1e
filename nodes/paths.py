"""The places of indexes and descriptor weights in the host's model folders."""

from __future__ import annotations

import logging
import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import folder_paths

from ..amg_core.descriptors.registry import Kind
from ..amg_core.errors import AMGError
from ..amg_core.files import named_folder

INDEXES, WEIGHTS = "amg_indexes", "amg"
WEIGHT_EXTENSIONS = {".pt", ".pth", ".safetensors"}
NO_INDEX = "(no index yet: use Build Memorization Index)"  # the page knows how it begins
MANIFEST = "manifest.json"
OF_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|[^/]*\\")  # C:\pictures, \\server\share, cats\dogs
CALIBRATIONS = "prompt_probe"  # in models/amg
CREDENTIALS = "credentials"  # the same: the artist's certificate
DEMO_LORAS = Path(__file__).parents[1] / "amg_demo" / "lora"  # one file: amg-demo-lora.safetensors
log = logging.getLogger(__name__)


def register() -> None:
    """Register models/amg_indexes and models/amg, in addition to those of extra_model_paths.yaml.

    The demo's LoRA is added to the list of LoRAs, so that the template amg_lora works at once.
    """
    for name, extensions in ((INDEXES, {".json"}), (WEIGHTS, WEIGHT_EXTENSIONS)):
        folder = os.path.join(folder_paths.models_dir, name)
        folder_paths.add_model_folder_path(name, folder)
        folders, known = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (folders, set(known) | extensions)
        with suppress(OSError):  # a read-only models folder: another one may be configured
            os.makedirs(folder, exist_ok=True)
    # Last, so that other nodes do not save LoRAs there.
    folder_paths.add_model_folder_path("loras", str(DEMO_LORAS))


def index_folder() -> Path:
    """The folder for new indexes, the first configured one."""
    return Path(folder_paths.get_folder_paths(INDEXES)[0])


def index_names() -> list[str]:
    """The sorted names of all indexes, or one sentence if there are none.

    A name with < is left out and logged, because the host's menus show their options as HTML.
    """
    names = set()
    for folder in folder_paths.get_folder_paths(INDEXES):
        try:
            entries = list(os.scandir(folder))
        except OSError:
            continue
        names |= {e.name for e in entries if os.path.isfile(os.path.join(e.path, MANIFEST))}
    for name in [name for name in names if "<" in name]:
        log.warning("AMG: the index folder %r is not listed: rename it, without < and >.", name)
        names.remove(name)
    return sorted((n for n in names if not n.startswith(".")), key=str.lower) or [NO_INDEX]


def find_index(name: str) -> Path:
    """The folder of index `name`. If it is missing, AMGError names the folder and the next step."""
    folders = folder_paths.get_folder_paths(INDEXES)
    for folder in folders:
        path = Path(folder) / name
        if name == Path(name).name and os.path.isfile(path / MANIFEST):
            return path
    what = "There is no index yet" if name == NO_INDEX else f"There is no index named {name!r}"
    raise AMGError(
        f"{what} in {' or '.join(folders)}. Run a Build Memorization Index node on a folder of "
        "pictures, or copy an index folder there. Then press R to refresh the list."
    )


def new_index(name: str) -> Path:
    """The folder for a new index `name`. AMGError if it is no plain name."""
    return named_folder(index_folder(), name)


def index_to_add_to(name: str) -> Path | None:
    """The folder of index `name`, or None if there is none yet. AMGError for an invalid name."""
    new_index(name)
    for folder in folder_paths.get_folder_paths(INDEXES):
        path = Path(folder) / name.strip()
        if os.path.isfile(path / MANIFEST):
            return path
    return None


def picture_folder(folder: str) -> Path:
    """The path of a folder, picture, archive or list. A relative one is in ComfyUI's input folder.

    Errors are those of `folder_below`.
    """
    what = "the pictures to stay away from (or a picture, a .zip, a .tar, a list)"
    return folder_below(folder, folder_paths.get_input_directory(), what)


def folder_below(folder: str, parent: str, what: str) -> Path:
    """The path that a widget gives. A relative one is in `parent`. `what` says what should be there.

    It may be a file:// address, as file managers copy it. AMGError if `folder` is empty, or a path of
    Windows where ComfyUI runs elsewhere.
    """
    folder = _plain(folder.strip().strip("\"'"))
    if not folder:
        raise AMGError(
            f"folder: it is empty. Give the folder of {what}, as an absolute path or relative to {parent}."
        )
    path = Path(folder).expanduser()
    if not path.is_absolute():
        path = Path(parent) / path
    if os.sep == "/" and OF_WINDOWS.match(folder) and not path.exists():
        raise AMGError(
            f"folder: {folder} is a path of Windows, and ComfyUI runs on {platform.system()} here. "
            "Give the path as this computer names it, with / between folders: for example "
            "/home/me/pictures, or in WSL /mnt/c/Users/me/pictures."
        )
    return path


def _plain(folder: str) -> str:
    """A file:// address as a path. Anything else as it is."""
    if not folder.lower().startswith("file://"):
        return folder
    host, path = urlsplit(folder)[1:3]
    away = f"//{host}" if host not in ("", "localhost") else ""  # a share of another computer
    return away + url2pathname(path)


def weights(kind: Kind) -> list[Path]:
    """Files that may be the weights of such a descriptor, most likely first."""
    found = kind.weights.among(folder_paths.get_filename_list)
    return [Path(folder_paths.get_full_path_or_raise(place, name)) for place, name in found]


def calibration_file(key: str) -> Path:
    """The file of the Prompt Probe's calibration for the model `key`, which may not exist yet."""
    folders = folder_paths.get_folder_paths(WEIGHTS)
    places = [Path(folder) / CALIBRATIONS / f"{key}.json" for folder in folders]
    return next((place for place in places if os.path.isfile(place)), places[0])


def credentials_folder() -> Path:
    """The folder of the artist's certificate, which may not exist yet."""
    folders = [Path(folder) / CREDENTIALS for folder in folder_paths.get_folder_paths(WEIGHTS)]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def calibrations() -> list[str]:
    """Name and time of every calibration, to detect changes."""
    found = []
    for folder in folder_paths.get_folder_paths(WEIGHTS):
        files = Path(folder, CALIBRATIONS).glob("*.json")
        found += [f"{file.name}:{file.stat().st_mtime_ns}" for file in files]
    return sorted(found)
