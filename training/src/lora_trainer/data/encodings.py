"""Guess the encoding of text that is not UTF-8, for the command that converts it.

The guess depends on the letters that the bytes would stand for: right for running text, None if no
encoding gives plausible text. Nothing is converted here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

SAMPLE_BYTES = 1 << 20
_HIGH_RUNS = re.compile(rb"[\x80-\xff]+")
_MARKS = "\u2018\u2019\u201a\u201c\u201d\u201e\u2013\u2014\u2026\u2022\xab\xbb\xa0"
_WESTERN = set("àáâäåæçèéêëìíîïñòóôöøùúûüßœãõÀÄÅÆÇÈÉÊËÎÏÑÓÔÖØÙÚÛÜŒÕ€£§©®°¿¡·" + _MARKS)
_CENTRAL = set("ąćęłńóśźżĄĆĘŁŃÓŚŹŻáčďéěíňřšťúůýžÁČĎÉĚÍŇŘŠŤÚŮÝŽőűŐŰöüäÖÜÄßăâîşţÎŞŢ" + _MARKS)
_KANA = re.compile(r"[\u3041-\u309f\u30a1-\u30ff]")
_HAN = re.compile(r"[\u4e00-\u9fff\u3000-\u303f\uff00-\uff60]")
_HANGUL = re.compile(r"[\uac00-\ud7a3]")
_CYRILLIC = re.compile(r"[\u0400-\u045f]")

DESCRIPTIONS = {
    "CP1252": "Windows, Western European",
    "CP1250": "Windows, Central European",
    "MACINTOSH": "Mac, Western European",
    "CP1251": "Windows, Cyrillic",
    "KOI8-R": "Unix, Cyrillic",
    "CP932": "Shift JIS, Japanese",
    "EUC-JP": "Unix, Japanese",
    "GB18030": "Chinese, simplified",
    "CP949": "Korean",
    "BIG5": "Chinese, traditional",
}
"""Encodings by their iconv names."""


def holds_utf8(sample: bytes) -> bool:
    """Return whether any line contains a non-ASCII character in valid UTF-8."""
    return any(not line.isascii() and _decoded(line, "utf-8") for line in sample.splitlines())


def guess_encoding(sample: bytes) -> str | None:
    """Return the iconv name of the most likely encoding of a sample, or None."""
    runs = _HIGH_RUNS.findall(sample)
    if not runs:
        return None
    # Accented letters occur among plain ones; letters of other scripts occur in groups.
    is_western = sum(map(len, runs)) < 1.8 * len(runs)
    candidates = _WESTERN_CANDIDATES if is_western else _OTHER_CANDIDATES
    return next((name for name, codec, fits in candidates if _fits(sample, codec, fits)), None)


def _fits(sample: bytes, codec: str, fits: Callable[[str], bool]) -> bool:
    text = _decoded(sample, codec)
    beyond = "".join(character for character in text if not character.isascii())
    return bool(beyond) and fits(beyond)


def _decoded(sample: bytes, codec: str) -> str:
    """Return the decoded text, "" if invalid; the sample may end within a character."""
    for cut in range(4):
        try:
            return sample[: len(sample) - cut].decode(codec)
        except UnicodeDecodeError as error:
            if error.start < len(sample) - 4:
                return ""
    return ""


def _of_set(letters: set[str], fraction: float) -> Callable[[str], bool]:
    return lambda text: sum(c in letters for c in text) >= fraction * len(text)


def _of(pattern: re.Pattern[str], fraction: float) -> Callable[[str], bool]:
    return lambda text: len(pattern.findall(text)) >= fraction * len(text)


def _cyrillic(text: str) -> bool:
    """Choose among the Cyrillic encodings: most letters of running text are lowercase."""
    letters = [c for c in text if _CYRILLIC.match(c)]
    small = sum(unicodedata.category(c) == "Ll" for c in letters)
    return len(letters) >= 0.8 * len(text) and small >= 0.5 * len(letters)


def _japanese(text: str) -> bool:
    kana, han = len(_KANA.findall(text)), len(_HAN.findall(text))
    return kana >= 0.2 * len(text) and kana + han >= 0.8 * len(text)


_WESTERN_CANDIDATES: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("CP932", "cp932", _japanese),
    ("CP1252", "cp1252", _of_set(_WESTERN, 0.9)),
    ("CP1250", "cp1250", _of_set(_CENTRAL, 0.9)),
    ("MACINTOSH", "mac_roman", _of_set(_WESTERN, 0.9)),
)
_OTHER_CANDIDATES: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("CP932", "cp932", _japanese),
    ("EUC-JP", "euc_jp", _japanese),
    ("CP1251", "cp1251", _cyrillic),
    ("KOI8-R", "koi8_r", _cyrillic),
    ("CP949", "cp949", _of(_HANGUL, 0.9)),
    # The 6,763 characters of GB2312: GB18030 decodes almost any bytes to characters.
    ("GB18030", "gb2312", _of(_HAN, 0.8)),
    ("BIG5", "big5", _of(_HAN, 0.8)),
    ("CP1252", "cp1252", _of_set(_WESTERN, 0.97)),
)
