"""Units written after an answer: split off, and brought to one name."""

from __future__ import annotations

import re

_NAMES = {
    "degree": "degree degrees deg",
    "dollar": "dollar dollars usd",
    "cent": "cent cents",
    "euro": "euro euros",
    "pound": "pound pounds lb lbs",
    "ounce": "ounce ounces oz",
    "gram": "gram grams gm",
    "kilogram": "kilogram kilograms kg",
    "milligram": "mg milligram milligrams",
    "meter": "meter meters metre metres",
    "centimeter": "centimeter centimeters centimetre centimetres cm",
    "millimeter": "millimeter millimeters millimetre millimetres mm",
    "kilometer": "kilometer kilometers kilometre kilometres km",
    "inch": "inch inches",
    "foot": "foot feet ft",
    "yard": "yard yards yd",
    "mile": "mile miles mi",
    "second": "second seconds sec secs",
    "minute": "minute minutes min mins",
    "hour": "hour hours hr hrs",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years yr yrs",
    "mph": "mph",
    "liter": "liter liters litre litres",
    "milliliter": "ml milliliter milliliters",
    "gallon": "gallon gallons",
    "acre": "acre acres",
    "am": "am",
    "pm": "pm",
}
# One letter alone is a unit only inside \text{}: a bare "5 m" may be a product.
_SHORT = {
    "m": "meter",
    "s": "second",
    "g": "gram",
    "h": "hour",
    "l": "liter",
    "j": "joule",
    "n": "newton",
    "k": "kelvin",
}
_CANONICAL = {word: name for name, words in _NAMES.items() for word in words.split()}
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
_GENERIC = {"", "unit", "units"}

_TEXT_TAIL = re.compile(
    r"(?P<head>.*?[^\s/])\s*(?P<tail>\\text\{[^{}]*\}(?:\s*(?:\\text\{[^{}]*\}|/|\\cdot|\^\s*\{?\s*-?\d\s*\}?))*)$",
    re.S,
)
_WORD_TAIL = re.compile(
    r"(?P<head>.*[\d})!])\s*(?P<tail>(?:(?:square|cubic|sq\.?|cu\.?)\s+)?[A-Za-z.]{2,14}"
    r"(?:\s*\^\s*\{?[23]\}?|\s*(?:/|per)\s*[A-Za-z]+)?)$",
    re.S,
)


def split_unit(text: str) -> tuple[str, str | None]:
    """The answer without its unit, and the unit's one name (None if there is none or it is just "units").

    Any `\\text{...}` after an answer is its unit ("7\\text{ ways}"); bare words are one only if they are in
    the table.
    """
    if text.startswith("\\dollar "):
        return text[len("\\dollar ") :].strip(), "dollar"
    match = re.fullmatch(r"-\s*\\dollar (.*)", text, re.S)
    if match:
        return "-" + match[1].strip(), "dollar"
    match = _TEXT_TAIL.fullmatch(text)
    # Words before the \text{} mean that all of it is a phrase.
    if match and not re.search(r"\\text\{", match["head"]):
        return match["head"], _name(match["tail"])
    match = _WORD_TAIL.fullmatch(text)
    if match:
        words = re.findall(r"[A-Za-z]+", match["tail"])
        if all(
            word.lower() in _CANONICAL or word.lower() in _POWERS or word in ("per", "units")
            for word in words
        ):
            return match["head"], _name(match["tail"])
    return text, None


def _name(tail: str) -> str | None:
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", tail).replace("\\cdot", " ").lower()
    plain = (
        re.sub(r"[{}\s]+", " ", plain.replace(".", ""))
        .replace(" ^ ", "^")
        .replace(" ^", "^")
        .replace("per", "/")
    )
    power, names = "", []
    for word in re.findall(r"[a-z]+|\^-?\d|/|[^\sa-z/^]+", plain):
        if word in _POWERS:
            power = _POWERS[word]
        elif word.startswith("^") or word == "/":
            names.append(word)
        else:
            names.append(_CANONICAL.get(word) or _SHORT.get(word) or word)
            if power:
                names.append(power)
                power = ""
    name = "".join(names)
    return None if name in _GENERIC or name in ("units^2", "unit^2", "units^3", "unit^3") else name
