"""What a JPEG says of itself before its pixels: a walk over its markers, without a decoder."""

from typing import NamedTuple

_SOS, _APP1, _APP2, _APP14 = 0xDA, 0xE1, 0xE2, 0xEE
# All but Huffman tables, a reserved marker, arithmetic conditioning.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SIGNATURE = b"\xff\xd8\xff"


class Header(NamedTuple):
    """The markers of a JPEG up to its first scan."""

    sof: int
    """How it is coded: 0 baseline, 1 extended, 2 progressive, all with Huffman codes; others are rare."""
    width: int
    """Pixels, as stored."""
    height: int
    """Pixels, as stored."""
    bits: int
    """Bits a sample."""
    components: bytes
    """The ids of the components, one byte each."""
    adobe: int | None
    """The Adobe marker's colour transform: 0 none (RGB or CMYK), 1 YCbCr, 2 YCCK; None without the marker."""
    exif: bytes
    """The Exif block, from its byte order mark on; empty without one."""
    icc: bytes
    """The colour profile; empty without one, or where parts of it are missing."""
    several: bool
    """Whether more pictures follow this one (MPO)."""
    scan: int
    """Offset of the first scan's marker, bytes."""

    @property
    def ycbcr(self) -> bool:
        """Whether every decoder takes it for YCbCr."""
        return len(self.components) == 3 and self.adobe in (None, 1) and self.components != b"RGB"


def header(data: bytes) -> Header | None:
    """The header of a JPEG; None if this is none, or one that is damaged before its first scan.

    Markers and their order: ITU-T T.81, annex B.
    """
    if not data.startswith(SIGNATURE):
        return None
    frame, exif, adobe, several = b"", b"", None, False
    icc: list[bytes] = []
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a marker may be preceded by any number of these
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if end < at + 4 or end > len(data):
            return None
        if marker == _SOS:
            return _header(frame, adobe, exif, icc, several, at)
        if marker in _FRAMES:
            frame = bytes((marker & 0x0F,)) + data[at + 4 : end]
        elif marker == _APP1 and data.startswith(b"Exif\0\0", at + 4):
            exif += data[at + 10 : end]
        elif marker == _APP2 and data.startswith(b"ICC_PROFILE\0", at + 4):
            icc.append(data[at + 16 : end])
        elif marker == _APP2 and data.startswith(b"MPF\0", at + 4):
            several = True
        elif marker == _APP14 and data.startswith(b"Adobe", at + 4) and end - at >= 16:
            adobe = data[at + 15]
        at = end
    return None


def _header(
    frame: bytes, adobe: int | None, exif: bytes, icc: list[bytes], several: bool, scan: int
) -> Header | None:
    """`frame`: the coding, then the SOF segment; `icc`: parts, each number, count, piece of the profile."""
    height, width = int.from_bytes(frame[2:4]), int.from_bytes(frame[4:6])
    if len(frame) < 7 or len(frame) != 7 + 3 * frame[6] or not width or not height:
        return None
    icc.sort(key=lambda part: part[:1])
    whole = [part[:2] for part in icc] == [bytes((i, len(icc))) for i in range(1, len(icc) + 1)]
    profile = b"".join(part[2:] for part in icc) if whole else b""
    return Header(frame[0], width, height, frame[1], frame[7::3], adobe, exif, profile, several, scan)
