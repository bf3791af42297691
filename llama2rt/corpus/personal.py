"""Personal data in text: e-mail addresses, phone numbers, IP addresses and card numbers, found by
their form and by what their form must satisfy, and replaced by their kind.

A form that ordinary numbers share counts only where a check does not leave it to chance: a card
number has an issuer's beginning and Luhn's checksum, an address is one that the internet routes, a
phone number has its country's code, or an area and an exchange of the North American plan and
nothing beside it that says what else it is. Names, places and national numbers are not found.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable

KINDS = ("EMAIL", "CARD_NUMBER", "IP_ADDRESS", "PHONE_NUMBER")
"""in the order in which they are looked for; a text's `<EMAIL>` stands for one"""

# RFC 5321's local part without quotes; a domain with a dot and a top level of letters.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9+-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_%+-])?"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}"
    r"(?![A-Za-z0-9@])(?!\.[A-Za-z])"
)
# 13 to 19 digits at once, or in groups with one kind of blank or hyphen between them.
_CARD = re.compile(
    r"(?<![\w.$+-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ -])\d{6}\2\d{4,5})"
    r"(?![\w-]|\.\d)",
    re.ASCII,
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]|\.\d)")
# E.164: + and a country's code, at most 15 digits, in groups.
_INTERNATIONAL = re.compile(
    r"(?<![\w)\].+*/-])\+[1-9]\d{0,2}(?:[ .-]?\(\d{1,4}\))?(?:[ .-]\d)?(?:[ .-]?\d{2,5}){2,5}"
    r"(?![\w]|\.\d)",
    re.ASCII,
)
# Three, three and four digits, with one kind of mark between them, or with a blank and a hyphen.
_AMERICAN = re.compile(
    r"(?<![\w.+$)-])(?:1[ .-])?"
    r"(?:\(\d{3}\) ?\d{3}[.-]|\d{3}(?:([ .-])\d{3}\1| \d{3}-))\d{4}(?![\w-]|\.\d)",
    re.ASCII,
)
# An area and an exchange begin with 2 to 9 and are no service code (N11). Of the areas N9X, 37X and
# 96X are kept back, and those with two equal digits at their end are services, none of them from 2
# to 4 (NANPA's rules for codes).
_PLAN = re.compile(r"(?![2-4](\d)\1|37|96)[2-9](?!11)[0-8]\d(?!\d11)[2-9]\d{6}", re.ASCII)
_DIGITS = re.compile(r"\D")
_ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}$"  # Visa
    r"|(?:5[1-5]\d{2}|222[1-9]|22[3-9]\d|2[3-6]\d{2}|27[01]\d|2720)\d{12}$"  # Mastercard
    r"|3[47]\d{13}$"  # American Express
    r"|(?:6011|64[4-9]\d|65\d{2})\d{12}$"  # Discover
    r"|3(?:0[0-5]|[68]\d)\d{11}$"  # Diners Club
    r"|35(?:2[89]|[3-8]\d)\d{12}$"  # JCB
)
# What announces numbers of another kind that have the form of an address.
_VERSION = re.compile(
    r"(?:\b(?:versions?|release|section|chapter|theorem|lemma|build|v|ver\.?)|\u00a7)"
    r"[ \t]*[:=]?[ \t]*$",
    re.I,
)
_IDENTIFIER = re.compile(
    r"\b(?:is[bs]n(?:-1[03])?|doi|sku|upc|(?:part|model|serial|item|order|invoice|case|ticket|"
    r"catalog(?:ue)?|account|tracking|patent|document)\s*(?:no\.?|numbers?|id|#))"
    r"[ \t]*[:=]?[ \t]*$",
    re.I,
)
# Between numbers: `key=` says whose number it is, and an asterisk or a row of = may be Markdown's.
_OPERATOR_BEFORE = re.compile(r"\d[ \t]*[=*\xd7\xf7][ \t]*$")
_OPERATOR_BEHIND = re.compile(r"[ \t]*(?:=(?!=)|[*\xd7\xf7](?=[ \t]*\d))")
_THOUSANDS_BEFORE, _DECIMALS_BEHIND = re.compile(r"\d,$"), re.compile(r",\d")
# Three groups with blanks between them are a row of numbers where nothing says that they are not.
_CALL = re.compile(
    r"(?<![a-z])(?:tel|telephone|phone|call|fax|mobile|cell|text)(?![a-z])\W*(?:\w+\W+)?$", re.I
)


def replace(text: str) -> tuple[str, Counter[str], list[str]]:
    """(`text` with each item as its kind in angle brackets, how many of each kind, the items)."""
    counts: Counter[str] = Counter()
    items: list[str] = []

    def by(kind: str, check: Callable[[re.Match[str]], bool]) -> Callable[[re.Match[str]], str]:
        def replacement(match: re.Match[str]) -> str:
            if not check(match):
                return match[0]
            counts[kind] += 1
            items.append(match[0])
            return f"<{kind}>"

        return replacement

    # What a form needs is looked for first: most texts have none of it.
    if "@" in text:
        text = _EMAIL.sub(by("EMAIL", _is_address), text)
    if any(map(str.isdigit, text)):
        text = _CARD.sub(by("CARD_NUMBER", _is_card), text)
        text = _IPV4.sub(by("IP_ADDRESS", _is_public), text)
        text = _INTERNATIONAL.sub(by("PHONE_NUMBER", _is_international), text)
        text = _AMERICAN.sub(by("PHONE_NUMBER", _is_american), text)
    if "::" in text or text.count(":") > 6:
        text = _IPV6.sub(by("IP_ADDRESS", _is_public), text)
    return text, counts, items


def luhn(digits: str) -> bool:
    """Whether the last digit is the checksum of those before it (ISO/IEC 7812-1, annex B)."""
    doubled = [int(d) * 2 for d in digits[-2::-2]]
    return (sum(d - 9 * (d > 9) for d in doubled) + sum(map(int, digits[::-2]))) % 10 == 0


def _is_card(match: re.Match[str]) -> bool:
    digits = _DIGITS.sub("", match[0])
    return _ISSUERS.match(digits) is not None and len(set(digits)) > 1 and luhn(digits)


def _is_public(match: re.Match[str]) -> bool:
    if _VERSION.search(match.string[max(0, match.start() - 12) : match.start()]):
        return False
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:  # a number above 255, or with a leading zero
        return False
    # Of IPv6 what is assigned (RFC 4291: 2000::/3); `a::b` in a program is an address too.
    return address.is_global and (address.version == 4 or int(address) >> 125 == 1)


def _is_address(match: re.Match[str]) -> bool:
    """`lodash@4.17.21.tgz` is a package; `someone@163.com` is an address."""
    labels = match[0].rpartition("@")[2].split(".")[:-1]
    return len(labels) == 1 or not all(label.isdigit() for label in labels)


def _is_international(match: re.Match[str]) -> bool:
    digits = _DIGITS.sub("", match[0])
    if digits[0] == "1":
        return _PLAN.fullmatch(digits, 1) is not None
    return 8 <= len(digits) <= 15


def _is_american(match: re.Match[str]) -> bool:
    if not _PLAN.fullmatch(_DIGITS.sub("", match[0])[-10:]):
        return False
    text, end = match.string, match.end()
    before = text[max(0, match.start() - 30) : match.start()]
    if _IDENTIFIER.search(before):
        return False
    # Groups with hyphens are a number of their own in a row with commas, and no version.
    if not any(mark in match[0] for mark in "(-"):
        if _THOUSANDS_BEFORE.search(before) or _DECIMALS_BEHIND.match(text, end):
            return False
        if _VERSION.search(before):
            return False
    if _CALL.search(before):
        return True
    if _OPERATOR_BEFORE.search(before) or _OPERATOR_BEHIND.match(text, end):
        return False
    return any(mark in match[0] for mark in "(.-")
