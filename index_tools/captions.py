"""Compares the captions of duplicates, and changes captions for training.

By Somepalli et al., *Understanding and Mitigating Copying in Diffusion Models* (NeurIPS 2023), pictures
that occur several times with the same caption are copied most. Their remedies for training change the
captions: several captions for each picture (MC), sometimes random words instead (RC), random words
added (RT), words repeated (CWR), or numbers added (RNA). The figures in the docstrings are from the
paper. Where their released training code differs, that is said. Their noise on the encoded caption (GN)
is `amg_core.mitigation.embeddings.training_noise`.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amg_core.errors import AMGError
from amg_core.files import brief
from amg_core.optional import needed

from .terminal import check_new

if TYPE_CHECKING:
    import torch

WORD = re.compile(r"\w+(?:['’]\w+)*")
METHODS = ("mc", "rc", "rt", "cwr", "rna")
PROBABILITY = {"rc": 0.4, "rt": 0.1, "cwr": 0.4, "rna": 0.4}  # of each change; MC always changes
INSERTED = 2  # words that RT and CWR add, as in the released training code
NUMBERS, NUMBERS_TO = 4, 10**6  # numbers that RNA adds, and the largest, as in the paper
RANDOM_LENGTH = 4  # words of a random caption, as in the released training code
MANY = 200  # largest number of captions of a cluster that are compared in pairs

Encoder = Callable[[list[str]], np.ndarray]


# ------------------------------------------------------------------------------ how alike


def jaccard(a: str, b: str) -> float:
    """Unigram overlap |A ∩ B| / |A ∪ B| of the sets of lower-case words, in [0, 1]; 0 if both are empty."""
    return _overlap(_unigrams(a), _unigrams(b))


@dataclass(frozen=True)
class Likeness:
    """How alike the captions of one cluster are: medians over all pairs, as in §5.1 of the paper.

    A median says what is usual in the cluster: with 8 equal captions and 3 others it is 1, because most
    pairs are equal. Figures that were not measured are None.

    Attributes
    ----------
    with_caption : int
        Number of captions that are not empty.
    jaccard : float or None
        Unigram overlap.
    text : float or None
        Similarity of the text embeddings.
    product : float or None
        Median over the pairs of text × jaccard.
    words : str
        "identical", "alike" (median overlap of at least ½), "different" or "missing" (fewer than two
        captions).
    """

    with_caption: int
    jaccard: float | None
    text: float | None
    product: float | None
    words: str


def likeness(captions: Sequence[str], encode: Encoder | None = None) -> Likeness:
    """Compare the captions of one cluster. Empty ones are left out.

    If there are more than 200 captions, 200 evenly spaced ones are compared. `encode` maps n texts to
    rows of norm 1, (n, D). Without it, `text` and `product` are None.
    """
    there = [text for text in captions if text.strip()]
    count = len(there)
    if count < 2:
        return Likeness(count, None, None, None, "missing")
    if count > MANY:
        there = [there[i] for i in np.linspace(0, count - 1, MANY).round().astype(int)]
    first, second = np.triu_indices(len(there), 1)
    sets = [_unigrams(text) for text in there]
    overlap = np.array([_overlap(sets[i], sets[j]) for i, j in zip(first, second, strict=True)])
    text = product = None
    if encode is not None:
        rows = np.asarray(encode(there), np.float64)
        between = (rows[first] * rows[second]).sum(1)
        text, product = float(np.median(between)), float(np.median(between * overlap))
    middle = float(np.median(overlap))
    same = len({" ".join(t.lower().split()) for t in there}) == 1
    words = "identical" if same else "alike" if middle >= 0.5 else "different"
    return Likeness(count, middle, text, product, words)


def _unigrams(text: str) -> frozenset[str]:
    return frozenset(word.lower() for word in WORD.findall(text))


def _overlap(a: frozenset[str], b: frozenset[str]) -> float:
    union = len(a | b)
    return len(a & b) / union if union else 0.0


def whole(kind: Any, folder: Path) -> Any:
    """Load a `transformers` model of class `kind` from the safetensors in a local folder.

    ValueError if weights are missing. The library would initialise them at random without an error.
    """
    model, info = kind.from_pretrained(
        folder,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    unused = ("pooler", "position_ids")  # not used here, and often missing
    missing = [name for name in info["missing_keys"] if not any(part in name for part in unused)]
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, such as {sorted(missing)[0]}")
    return model


def text_encoder(folder: Path, device: torch.device | str = "cpu") -> Encoder:
    """A text encoder from a local folder in the layout of the `transformers` library.

    With CLIP the result is the projected text embedding. With any other model (sentence transformers) it
    is the mean of the last hidden states over the tokens. Only safetensors are read. No code from the
    folder is run, and nothing is downloaded.

    Raises
    ------
    AMGError
        `transformers` is missing, or the folder holds no such model.
    """
    import torch

    step = "pip install transformers, or omit the text encoder"
    parts = ("AutoConfig", "AutoModel", "AutoTokenizer", "CLIPTextModelWithProjection")
    transformers = needed("transformers", "Text similarity", step, parts)
    local = {"local_files_only": True, "trust_remote_code": False}
    if not folder.is_dir():
        raise AMGError(f"Text encoder {folder} is not a folder: give the folder of the model.")
    try:
        model_type = transformers.AutoConfig.from_pretrained(folder, **local).model_type
        kind = (
            transformers.CLIPTextModelWithProjection
            if model_type == "clip_text_model"
            else transformers.AutoModel
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        model = whole(kind, folder).to(device).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AMGError(
            f"Text encoder {folder} cannot be loaded ({reason}): give a folder with config.json, "
            f"tokenizer and model.safetensors."
        ) from error
    longest = min(int(tokenizer.model_max_length), 512)

    @torch.inference_mode()
    def encode(texts: list[str]) -> np.ndarray:
        rows = []
        for text in texts:  # one at a time, so that a row does not depend on the others
            tokens = tokenizer([text], truncation=True, max_length=longest, return_tensors="pt").to(
                device
            )
            if model_type == "clip":
                row = model.text_projection(model.text_model(**tokens).pooler_output)[0]
            elif model_type == "clip_text_model":
                row = model(**tokens).text_embeds[0]
            else:
                row = model(**tokens).last_hidden_state[0].mean(0)
            rows.append((row / row.norm().clamp_min(1e-12)).float().cpu().numpy())
        return np.stack(rows)

    return encode


# ------------------------------------------------------------------------- making them differ


def generator(sha256: str, seed: int = 0, draw: int = 0) -> np.random.Generator:
    """The random generator for one picture, which depends on its content and not on its place.

    `sha256` is the hex digest of the file, `seed` that of the run, and `draw` the number of the variant.
    """
    key = hashlib.sha256(f"{sha256}/{seed}/{draw}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))


def random_tokens(
    caption: str,
    rng: np.random.Generator,
    vocabulary: Sequence[str],
    probability: float = PROBABILITY["rt"],
    times: int = INSERTED,
) -> str:
    """RT: `times` times, with the given probability, replace a random word or add one.

    In the paper p = 0.1, and replacing and adding are equally likely. The released code only adds: with
    p = 0.1 it adds two words. Words are drawn from `vocabulary`.
    """
    words = caption.split()
    for _ in range(times):
        if rng.random() >= probability:
            continue
        word = _choice(rng, vocabulary)
        if words and rng.random() < 0.5:
            words[rng.integers(len(words))] = word
        else:
            words.insert(rng.integers(len(words) + 1), word)
    return " ".join(words)


def word_repetition(
    caption: str,
    rng: np.random.Generator,
    probability: float = PROBABILITY["cwr"],
    times: int = INSERTED,
) -> str:
    """CWR: `times` times, with the given probability (paper 0.4, released code 0.1), repeat one of
    the caption's words at a random place."""
    own = caption.split()
    words = list(own)
    for _ in range(times):
        if own and rng.random() < probability:
            words.insert(rng.integers(len(words) + 1), _choice(rng, own))
    return " ".join(words)


def random_numbers(
    caption: str,
    rng: np.random.Generator,
    probability: float = PROBABILITY["rna"],
    times: int = NUMBERS,
) -> str:
    """RNA: `times` times, with the given probability, put a number from 0 to 10⁶ at a random place.

    A number changes the meaning less than a random word. The paper gives these values for prompts, and
    its released training code has no RNA.
    """
    words = caption.split()
    for _ in range(times):
        if rng.random() < probability:
            words.insert(rng.integers(len(words) + 1), str(rng.integers(NUMBERS_TO + 1)))
    return " ".join(words)


def random_caption(
    caption: str,
    rng: np.random.Generator,
    vocabulary: Sequence[str],
    probability: float = PROBABILITY["rc"],
    length: int = RANDOM_LENGTH,
) -> str:
    """RC: with the given probability (0.4 as for CWR, released code 0.1) return `length` random words."""
    if rng.random() >= probability:
        return caption
    return " ".join(_choice(rng, vocabulary) for _ in range(length))


def multiple_captions(caption: str, rng: np.random.Generator, others: Sequence[str]) -> str:
    """MC: one of all captions of the picture, all equally likely.

    The paper uses 20 captions for each picture from a captioner (BLIP). Here no captions are made:
    `others` are those of the picture's duplicates, or the user's. Without any, the result is `caption`.
    """
    known = list(dict.fromkeys(text for text in (caption, *others) if text.strip()))
    return _choice(rng, known) if known else caption


def _choice(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def vocabulary(captions: Iterable[str]) -> list[str]:
    """The sorted, distinct, lower-case words of all captions, from which RC and RT draw.

    The authors draw from CLIP's whole vocabulary, of which most entries are fragments of words. The words
    of the captions have the right language and subject.
    """
    return sorted({word.lower() for text in captions for word in WORD.findall(text)})


# -------------------------------------------------------------------------------- exporting


@dataclass(frozen=True)
class Captioned:
    """A picture to write a caption for. `others` are its further captions."""

    source: str
    caption: str
    sha256: str
    others: tuple[str, ...] = ()


def diversify(
    pictures: Sequence[Captioned],
    method: str,
    *,
    words: Sequence[str],
    variants: int = 1,
    seed: int = 0,
    probability: float | None = None,
) -> list[tuple[str, list[str]]]:
    """Change the captions by one of METHODS. Yields (source, `variants` captions) for each picture.

    Each variant is drawn independently, as each epoch in the paper. With one variant and p = 0.1 most
    captions stay the same. The result depends only on the picture's content, its captions, the words
    and the seed.

    Raises
    ------
    AMGError
        Random words are needed and there are none.
    """
    if method not in METHODS:
        raise AMGError(f"Unknown method {method!r}: choose one of {', '.join(METHODS)}.")
    if method in ("rc", "rt") and not words:
        raise AMGError("No words to draw from: the pictures have no captions; give --words FILE.")
    chance = PROBABILITY.get(method, 1.0) if probability is None else probability
    made = []
    for picture in pictures:
        texts = []
        for draw in range(variants):
            rng = generator(picture.sha256, seed, draw)
            if method == "mc":
                text = multiple_captions(picture.caption, rng, picture.others)
            elif method == "rc":
                text = random_caption(picture.caption, rng, words, chance)
            elif method == "rt":
                text = random_tokens(picture.caption, rng, words, chance)
            elif method == "rna":
                text = random_numbers(picture.caption, rng, chance)
            else:
                text = word_repetition(picture.caption, rng, chance)
            texts.append(" ".join(text.split()))
        made.append((picture.source, texts))
    return made


def export(folder: Path, made: Sequence[tuple[str, list[str]]], form: str = "jsonl") -> list[Path]:
    """Write captions into a new folder.

    With `form` "jsonl" it writes metadata.jsonl with file_name and text, and texts for several variants.
    With "txt" it writes one file for each picture, at the picture's path, with one variant a line.

    Raises
    ------
    AMGError
        The folder is not empty, two pictures would have the same file, or nothing can be written.
    """
    names: dict[str, tuple[str, list[str]]] = {}
    for source, texts in made:
        name = inside(source)
        name = posixpath.splitext(name)[0] + ".txt" if form == "txt" else name
        if name in names:
            raise AMGError(
                f"{names[name][0]} and {source} would share the captions of {name}: "
                + ("write jsonl instead." if form == "txt" else "do one index at a time.")
            )
        names[name] = (source, texts)
    new_folder(folder)
    try:
        if form == "txt":
            for name, (_, texts) in names.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("\n".join(texts) + "\n", encoding="utf-8")
            return [folder / name for name in names]
        path = folder / "metadata.jsonl"
        with open(path, "x", encoding="utf-8") as file:
            for name, (_, texts) in names.items():
                entry: dict[str, str | list[str]] = {"file_name": name, "text": texts[0]}
                if len(texts) > 1:
                    entry["texts"] = texts
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        return [path]
    except OSError as error:
        raise AMGError(f"Cannot write captions to {folder} ({error}): choose another.") from error


def new_folder(folder: Path) -> None:
    """Make `folder`. It may exist if it is empty. AMGError otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_new(folder)
    except OSError as error:
        raise AMGError(f"Cannot make the folder {folder} ({error}): choose another.") from error


def inside(source: str) -> str:
    """A source as a relative path that cannot leave the folder."""
    parts = [part for part in source.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return "/".join(part.replace(":", "_") for part in parts) or "picture"


def extra_captions(path: Path) -> dict[str, list[str]]:
    """Read a JSONL file of further captions with {"file_name": …, "text": … or "texts": […]} in each line.

    Captions of lines with the same name are collected. AMGError names a line that cannot be used.
    """
    found: dict[str, list[str]] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AMGError(f"Cannot read {path} ({error}): give a JSONL file in UTF-8.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name = entry["file_name"]
            texts = entry["texts"] if "texts" in entry else [entry["text"]]
            usable = isinstance(name, str) and isinstance(texts, list)
            if not usable or not all(isinstance(text, str) for text in texts):
                raise TypeError("file_name and text must be text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise AMGError(
                f"{path}, line {number} has no file_name and text ({brief(error)}): correct that line."
            ) from None
        found.setdefault(name, []).extend(text.strip() for text in texts if text.strip())
    return found
