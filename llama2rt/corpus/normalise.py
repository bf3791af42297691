"""One spelling of a text: a Unicode normalisation form, one line end, no control characters."""

import re
import unicodedata

_LINE_ENDS = re.compile(r"\r\n?|[\x85\u2028\u2029]")
# Controls but tab and line feed; marks of byte order; surrogates, which no UTF-8 can hold.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")
_TRAILING = re.compile(r"(?<![ \t])[ \t]+$", re.MULTILINE)  # one try a run
_BLANK_LINES = re.compile(r"\n{3,}")


def normalise(text: str, form: str | None) -> str:
    """`text` in `form` ("NFC", "NFKC" or None), without control characters, blanks at the ends of
    lines, and more than one blank line at a time."""
    if form is not None and not unicodedata.is_normalized(form, text):  # type: ignore[arg-type]
        text = unicodedata.normalize(form, text)  # type: ignore[arg-type]
    text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))
    return _BLANK_LINES.sub("\n\n", _TRAILING.sub("", text)).strip("\n")
