"""Which descriptors there are. Each says all about itself in its own file, as a `Kind`.

A descriptor of one's own is a `Kind` too: `register` it, in a program or from another plugin, and
everything here takes it. docs/architecture.md says how to write one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

from ..errors import AMGError
from .base import Descriptor, DescriptorSpec

# Files of this folder, each with a KIND, in the order of every list to choose from: append.
MODULES = ("compact", "pixel", "sscd", "latent", "clip")
DEFAULT = MODULES[0]  # needs no weights of anybody's

Levels = tuple[tuple[float, float], ...]
Find = Callable[
    ["Kind"], Iterable[Path]
]  # a host's files that may be its weights, the likeliest first


@dataclass(frozen=True)
class Weights:
    """The file that a descriptor is made of, and where hosts look for it.

    what : after the descriptor's name, "sscd's …"; places : folders among a host's models, the likeliest
    first, each with a pattern (`fnmatch`) of file names without ending; optional : whether an index guards
    without the file that made it, too.
    """

    what: str = ""
    places: tuple[tuple[str, str], ...] = ()
    optional: bool = False

    def among(self, names: Callable[[str], Iterable[str]]) -> list[tuple[str, str]]:
        """Files that it may be, as (folder, name). names : folder -> what lies there."""
        return [
            (folder, name)
            for folder, pattern in self.places
            for name in sorted(names(folder))
            if fnmatchcase(PurePath(name).stem, pattern)
        ]


@dataclass(frozen=True)
class Kind:
    """A descriptor, as the rest of the program knows it before one is made.

    Attributes
    ----------
    name : str
        By which it is chosen: what stands before the first "_" of the id of its specs.
    description : str
        A sentence for artists, after "name: ": tooltips, the command line's help and the web UI.
    descriptor : type
        A `Descriptor`, with the class methods ``from_file(path or None, **options)``; options are
        `scales` and what else it takes; ``for_spec(spec, path or None)``, what comes nearest to the
        spec of an index; and, where it compares latents, `LatentDescriptor.encoded`.
    levels, usual : mappings of scale
        What pictures that are not in the index reach, see `limits.ROWS`; `usual` for those with rows in
        the background set.
    duplicates : float, optional
        Similarity above which two rows of an index are one picture, where that has been measured.
    guards : bool
        Whether it tells a copy from a picture of the same subject.
    options : mapping of str to str
        Options that the command line asks for besides, as text, each with a line of help.
    """

    name: str
    description: str
    descriptor: type[Any]
    levels: Mapping[int, Levels]
    usual: Mapping[int, float] = field(default_factory=dict)
    duplicates: float | None = None
    guards: bool = True
    weights: Weights = Weights()
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def space(self) -> str:
        """See `Descriptor`."""
        space: str = self.descriptor.space
        return space


@lru_cache(maxsize=1)
def _known() -> dict[str, Kind]:
    modules = [import_module(f".{name}", __package__) for name in MODULES]
    return {module.KIND.name: module.KIND for module in modules}


def register(kind: Kind) -> None:
    """Make a descriptor known by its name, last in every list that is made from now on.

    Raises
    ------
    ValueError
        One of that name is known, or an id cannot begin with the name.
    """
    if kind.name in _known() or "_" in kind.name:
        raise ValueError(f"{kind.name!r} is known already, or has a '_' in it")
    _known()[kind.name] = kind


def kinds() -> list[Kind]:
    """All of them, in the order of the lists to choose from."""
    return list(_known().values())


def guarding(latents: bool = False) -> list[Kind]:
    """Those that a guard can watch by; those of latents only where the host can encode, `latents`."""
    return [kind for kind in kinds() if kind.guards and (latents or kind.space == "picture")]


def described(offered: Iterable[Kind]) -> str:
    """ "compact: … pixel: …": what each of them is, for people who choose."""
    return " ".join(f"{kind.name}: {kind.description}" for kind in offered)


def named(name: str) -> Kind:
    """The descriptor of that name. AMGError where there is none."""
    if name not in _known():
        raise AMGError(f"Unknown descriptor {name!r}: choose one of {', '.join(_known())}.")
    return _known()[name]


def of(spec: DescriptorSpec) -> Kind:
    """The descriptor that made an index of that spec. AMGError where it is not known here."""
    if spec.kind not in _known():
        raise AMGError(
            f"The index was made with the descriptor {spec.id}, which this version does not know: "
            f"update the plugin, or build the index again with one of {', '.join(_known())}."
        )
    return _known()[spec.kind]


def create(name: str, weights: str | Path | None = None, **options: Any) -> Descriptor:
    """The descriptor of that name. Weights are loaded now, and not before.

    Parameters
    ----------
    name : of one of `kinds`
    weights : path, optional
        Its file, for those that need one.
    options
        `scales`, a subset of the descriptor's own, and what else its `from_file` takes.

    Raises
    ------
    AMGError
        For an unknown name or option value, or absent or unreadable weights; says what to do.
    """
    kind = named(name)
    with _refusing(kind):
        made: Descriptor = kind.descriptor.from_file(_path(weights), **options)
    return made


def for_spec(spec: DescriptorSpec, weights: str | Path | None = None) -> Descriptor:
    """The descriptor that made an index: of that very spec, with its input side and its scales.

    Raises
    ------
    AMGError
        The index was made by a descriptor that is not known here, or with other weights.
    """
    kind, path = of(spec), _path(weights)
    with _refusing(kind):
        made: Descriptor = kind.descriptor.for_spec(spec, path)
    if made.spec == spec:
        return made
    if replace(made.spec, weights_sha256=spec.weights_sha256) == spec:
        if path is not None and _file_sha256(path) == spec.weights_sha256:
            made.spec = spec  # an index of format 1 names the hash of the file
            return made
        raise AMGError(
            f"The index was made with other weights of {spec.id} than {weights}: give the file it was "
            f"made with (hash {spec.weights_sha256[:12]}…), or build the index again."
        )
    raise AMGError(
        f"The index was made with {spec.id}, {spec.preprocessing}, scales {list(spec.scales)}, and here "
        f"is {made.spec.id}, {made.spec.preprocessing}, scales {list(made.spec.scales)}: use the "
        f"version and the weights it was made with, or build the index again."
    )


def for_new(name: str, find: Find) -> Descriptor:
    """The descriptor of that name for a new index, with the likeliest of the files that a host finds."""
    return create(name, next(iter(find(named(name))), None))


def for_index(spec: DescriptorSpec, find: Find) -> Descriptor:
    """The descriptor that made an index, with the first file that is its weights. Raises as `for_spec`."""
    kind, first = of(spec), None
    for file in find(kind):
        try:
            return for_spec(spec, file)
        except AMGError as error:
            first = first or error
    if first is None or kind.weights.optional:
        return for_spec(spec)
    raise first


@contextmanager
def _refusing(kind: Kind) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise AMGError(f"The descriptor {kind.name} cannot be made: {error}.") from error


def _path(weights: str | Path | None) -> Path | None:
    return None if weights is None else Path(weights).expanduser()


def _file_sha256(path: Path) -> str:
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
