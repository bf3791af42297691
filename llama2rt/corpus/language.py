"""Which language a document is in, by its script and by the words that every text of it has.

Enough to keep pages of one language out of another's corpus; it says nothing of short texts, lists
and code ("und", as BCP 47 calls the undetermined), and does not tell apart what shares a script
without common words here. A model that names 200 languages (fastText's lid.176) is megabytes to
download; whoever has one runs it before this and names the language as the source.
"""

import re
from collections import Counter
from collections.abc import Sequence

UNDETERMINED = "und"
LEAST_SHARE = 0.08
"""of a document's words that must be common ones of the language; prose has 0.25 to 0.5"""
LEAST_WORDS = 5
"""common ones: less is chance"""

# The most frequent words of each that are none, or rare, in the others.
_COMMON = {
    "en": "the of and to is in that it was for with as his this be not are on you have at from by",
    "de": "der die und das ist nicht zu den mit von ein eine sich auf auch es dem wie für im",
    "fr": "le la les et des est pas une dans que pour qui au sur il vous du ne avec sont ce plus",
    "es": "el los las que y en una por con no para del es se como su más pero al está lo muy",
    "it": "il di che non per una del sono con si della è gli alla nel anche dei questo più lo ma",
    "pt": "o os que não uma para com do da em por mais como dos foi ao das se seu é também",
    "nl": "het een van en niet dat op te zijn met voor ook maar er aan bij naar wordt deze hij",
    "pl": "w nie na się że jest z do to jak ale po co tak za od przez czy był tylko są",
    "sv": "och att det som en är på inte av för med ett den till var han har om jag men",
}
# Scripts that stand for what is written in them.
_SCRIPTS = {
    "cyrillic": r"\u0400-\u04ff",
    "greek": r"\u0370-\u03ff",
    "arabic": r"\u0600-\u06ff",
    "hebrew": r"\u0590-\u05ff",
    "devanagari": r"\u0900-\u097f",
    "kana": r"\u3040-\u30ff",
    "hangul": r"\uac00-\ud7af",
    "han": r"\u3400-\u9fff",
}
LANGUAGES = (*_COMMON, *_SCRIPTS)
"""what a recipe may name: languages of the Latin script, and other scripts"""

_LANGUAGES_OF: dict[str, list[str]] = {}
for _language, _words in _COMMON.items():
    for _word in _words.split():
        _LANGUAGES_OF.setdefault(_word, []).append(_language)
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_OTHER = {name: re.compile(f"[{span}]") for name, span in _SCRIPTS.items()}
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_READ = 20_000
"""characters from the beginning that decide"""


def language(text: str, words: Sequence[str]) -> str:
    """One of `LANGUAGES`, or "und". `words`: of `text`, in lower case."""
    part = text[:_READ]
    if _NOT_ASCII.search(part):
        counts = {name: len(letters.findall(part)) for name, letters in _OTHER.items()}
        if counts["kana"]:  # Japanese has both
            counts["kana"] += counts["han"]
            counts["han"] = 0
        name = max(counts, key=counts.__getitem__)
        if counts[name] > len(_LATIN.findall(part)):
            return name
    read = words[: _READ // 5]
    found = Counter(name for word in read for name in _LANGUAGES_OF.get(word, ()))
    if not found:
        return UNDETERMINED
    [(name, count)] = found.most_common(1)
    return name if count >= max(LEAST_WORDS, LEAST_SHARE * len(read)) else UNDETERMINED
