"""Writes a picture as PNG, JPEG or WebP with the host's metadata and the IPTC source type.

ComfyUI keeps a workflow as the texts of a PNG, and as EXIF entries "key:json" in other formats: the prompt
in Model, and all others from Make downwards. Its page reads both.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

from .credentials import MIMES, SOURCE_TYPE

if TYPE_CHECKING:
    from PIL import Image

KINDS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}  # choice -> Pillow's name
ENDINGS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
PROMPT = "prompt"
MAKE, MODEL = 0x010F, 0x0110  # EXIF tags
EXIF_LIMIT = 65_000  # bytes; a JPEG holds 65,533 in its EXIF
XMP_LIMIT = 65_000
assert set(KINDS.values()) == set(MIMES)


class TooLong(ValueError):
    """The metadata does not fit into the format."""


def xmp(source_type: str = SOURCE_TYPE) -> bytes:
    """An XMP packet with IPTC's digital source type (IPTC Photo Metadata 2022.1, Iptc4xmpExt)."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        f" Iptc4xmpExt:DigitalSourceType={quoteattr(source_type)}/>"
        '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def encode(picture: Image.Image, kind: str, texts: Mapping[str, str], quality: int = 95) -> bytes:
    """A picture file with metadata.

    Parameters
    ----------
    picture : RGB or RGBA
        A JPEG has no transparency: it is composited on white.
    kind : str
        One of KINDS' values.
    texts : mapping
        Entries of the metadata, as JSON texts.
    quality : int
        1 to 100, for JPEG and WebP. WebP at 100 is lossless.

    Raises
    ------
    TooLong
        The entries do not fit into a JPEG or WebP.
    """
    out, more = BytesIO(), dict[str, Any]()
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for key, value in texts.items():
            info.add_text(key, value)
        info.add_itxt("XML:com.adobe.xmp", xmp().decode())
        more = {"pnginfo": info, "compress_level": 4}
    else:
        more = {"exif": _exif(texts), "quality": quality}
        if kind == "WEBP":
            more |= {"xmp": xmp(), "lossless": quality >= 100}
        else:
            more |= {"subsampling": 0}
            picture = _opaque(picture)
    picture.save(out, kind, **more)
    return with_xmp(out.getvalue(), xmp()) if kind == "JPEG" else out.getvalue()


def _exif(texts: Mapping[str, str]) -> bytes:
    from PIL import Image, TiffTags

    exif = Image.Exif()
    # Some of these tags hold numbers.
    free = (t for t in range(MAKE, 0, -1) if TiffTags.lookup(t).type in (None, TiffTags.ASCII))
    for key, value in texts.items():
        exif[MODEL if key == PROMPT else next(free)] = f"{key}:{value}"
    data = exif.tobytes()
    if len(data) > EXIF_LIMIT:
        raise TooLong(f"{len(data)} bytes of metadata; this format holds {EXIF_LIMIT}")
    return data


def _opaque(picture: Image.Image) -> Image.Image:
    from PIL import Image

    if picture.mode != "RGBA":
        return picture.convert("RGB")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture.getchannel("A"))
    return white


def with_xmp(jpeg: bytes, packet: bytes) -> bytes:
    """A JPEG with an XMP packet after its first markers (XMP specification, part 3, 1.1.3)."""
    content = b"http://ns.adobe.com/xap/1.0/\0" + packet
    at = 2  # after SOI
    while jpeg[at] == 0xFF and jpeg[at + 1] in (0xE0, 0xE1):  # JFIF, EXIF
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    segment = b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content
    return jpeg[:at] + segment + jpeg[at:]
