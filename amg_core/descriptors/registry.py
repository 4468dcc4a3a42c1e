"""The list of descriptors. Each is described in its own file, by a `Kind`.

A program or another plugin can `register` the `Kind` of its own descriptor. docs/architecture.md says how
to write one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

from ..errors import AMGError
from ..messages import Message
from .base import Descriptor, DescriptorSpec

# Files of this folder, each with a KIND. All lists of descriptors have this order, so append.
MODULES = ("compact", "pixel", "sscd", "latent", "clip")
DEFAULT = MODULES[0]  # needs no download

Levels = tuple[tuple[float, float], ...]
Find = Callable[
    ["Kind"], Iterable[Path]
]  # a host's files that may be the weights, most likely first


@dataclass(frozen=True)
class Weights:
    """The weights file of a descriptor, and where hosts look for it.

    Attributes
    ----------
    what : str
        What the file is called in texts, after the descriptor's name: "sscd's …".
    places : tuple of pairs of str
        Folders among a host's models, most likely first, each with a pattern (`fnmatch`) of file names
        without their ending.
    optional : bool
        Whether an index can guard without the file that made it.
    """

    what: str = ""
    places: tuple[tuple[str, str], ...] = ()
    optional: bool = False

    def among(self, names: Callable[[str], Iterable[str]]) -> list[tuple[str, str]]:
        """Files that may be the weights, as (folder, name). `names` lists the files of a folder."""
        return [
            (folder, name)
            for folder, pattern in self.places
            for name in sorted(names(folder))
            if fnmatchcase(PurePath(name).stem, pattern)
        ]


@dataclass(frozen=True)
class Kind:
    """What the program needs to know about a descriptor before it is made.

    Attributes
    ----------
    name : str
        The name by which users choose it: the part before the first "_" of the id of its specs.
    description : str
        A sentence for artists, shown after "name: " in tooltips, the command line's help and the web UI.
    descriptor : type
        A `Descriptor` with two class methods. ``from_file(path or None, **options)`` takes `scales` and
        the descriptor's own options. ``for_spec(spec, path or None)`` makes the one that is closest to
        the spec of an index. If it compares latents, it has `LatentDescriptor.encoded` too.
    levels, usual : mappings of scale
        Similarities that pictures which are not in the index reach, see `limits.ROWS`. `usual` is for
        descriptors with rows in the background set.
    duplicates : float, optional
        Similarity above which two rows of an index are one picture, if that has been measured.
    misses : Message, optional
        A sentence for artists on the copies that it overlooks. Its figures are in docs/descriptors.md.
    candidates : float, optional
        Similarity above which two rows may be one picture, if a second measure decides.
    guards : bool
        Whether it tells a copy from another picture of the same subject.
    options : mapping of str to str
        Further options of the command line, as text, each with a line of help.
    """

    name: str
    description: str
    descriptor: type[Any]
    levels: Mapping[int, Levels]
    usual: Mapping[int, float] = field(default_factory=dict)
    duplicates: float | None = None
    misses: Message | None = None
    candidates: float | None = None
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
    """Add a descriptor at the end of every list that is made from now on.

    Raises
    ------
    ValueError
        There is already one of that name, or the name contains "_".
    """
    if kind.name in _known() or "_" in kind.name:
        raise ValueError(
            f"there is already a descriptor {kind.name!r}, or the name has a '_' in it"
        )
    _known()[kind.name] = kind


def kinds() -> list[Kind]:
    """All descriptors, in the order in which lists show them."""
    return list(_known().values())


def guarding(latents: bool = False) -> list[Kind]:
    """Descriptors that can guard. `latents` says whether the host can encode, which some of them need."""
    return [kind for kind in kinds() if kind.guards and (latents or kind.space == "picture")]


def described(offered: Iterable[Kind]) -> str:
    """The names and descriptions in one text, "compact: … pixel: …"."""
    return " ".join(f"{kind.name}: {kind.description}" for kind in offered)


def named(name: str) -> Kind:
    """The `Kind` of that name. AMGError if there is none."""
    if name not in _known():
        raise AMGError(f"Unknown descriptor {name!r}: choose one of {', '.join(_known())}.")
    return _known()[name]


def of(spec: DescriptorSpec) -> Kind:
    """The `Kind` of the descriptor that made an index of that spec. AMGError if it is not registered."""
    if spec.kind not in _known():
        raise AMGError(
            f"The index was made with the descriptor {spec.id}, which this version does not have: "
            f"update the plugin, or build the index again with one of {', '.join(_known())}."
        )
    return _known()[spec.kind]


def create(name: str, weights: str | Path | None = None, **options: Any) -> Descriptor:
    """Make the descriptor of that name, and load its weights.

    Parameters
    ----------
    name : str
        The name of one of `kinds`.
    weights : path, optional
        Its weights file, if it needs one.
    options
        `scales`, a subset of the descriptor's own, and other options of its `from_file`.

    Raises
    ------
    AMGError
        The name or an option is not valid, or the weights are missing or unreadable. The message says
        what to do.
    """
    kind = named(name)
    with _refusing(kind):
        made: Descriptor = kind.descriptor.from_file(_path(weights), **options)
    return made


def for_spec(spec: DescriptorSpec, weights: str | Path | None = None) -> Descriptor:
    """Make the descriptor that made an index, with exactly its spec, input side and scales.

    Raises
    ------
    AMGError
        The descriptor is not registered, or the index was made with other weights.
    """
    kind = of(spec)
    with _refusing(kind):
        made: Descriptor = kind.descriptor.for_spec(spec, _path(weights))
    if made.spec == spec:
        return made
    if replace(made.spec, weights_sha256=spec.weights_sha256) == spec:
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
    """The descriptor of that name for a new index, with the most likely file that the host finds."""
    return create(name, next(iter(find(named(name))), None))


def for_index(spec: DescriptorSpec, find: Find) -> Descriptor:
    """The descriptor that made an index, with the first matching file. Raises as `for_spec` does."""
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
