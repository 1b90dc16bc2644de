"""One spelling for the many ways of writing the same mathematics: text in, text out, nothing evaluated."""

from __future__ import annotations

import re
import unicodedata


class Unreadable(ValueError):
    """The text is no mathematics that we can read; the message says why."""


_UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∞": r"\infty ",
    "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "±": r"\pm ", "∓": r"\mp ", "≈": r"\approx ",
    "°": r"^\circ ",
    "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "⟨": "(", "⟩": ")", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
    "⌈": r"\lceil ", "⌉": r"\rceil ", "⁰": "^{0}", "¹": "^{1}", "²": "^{2}", "³": "^{3}", "⁴": "^{4}",
    "⁵": "^{5}",
    "⁶": "^{6}", "⁷": "^{7}", "⁸": "^{8}", "⁹": "^{9}", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ",
    "δ": r"\delta ", "λ": r"\lambda ", "μ": r"\mu ", "ω": r"\omega ", "φ": r"\phi ", "σ": r"\sigma ",
    "√": r"\sqrt ",
    "’": "'", "\u00a0": " ",
}  # fmt: skip
_UNICODE_TABLE = str.maketrans(_UNICODE)

_ARGUMENT = r"(?:\\[A-Za-z]+|[A-Za-z0-9])"
_TOKEN = re.compile(_ARGUMENT)

# Order matters: each line may rely on those above it.
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (
            r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|bigg|Bigg)(?![A-Za-z])\s*\.?(?=[\s()\[\]{}|\\<>/]|$)",
            "",
        ),
        (r"\\(?:left|right)(?![A-Za-z])", ""),
        (r"\\(?:displaystyle|limits|nolimits|textstyle)(?![A-Za-z])", ""),
        (r"\\phantom\s*(?:\{[^{}]*\}|.)", ""),
        (r"(?<=\d),\\!(?=\d{3})", ""),
        (r"\\!|\{\\!\}", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\{,\}", ","),
        (r"\\\$", r"\\dollar "),
        (r"(?<!\\)\\[()\[\]]", " "),
        (r"\\%", "%"),
        (
            r"\\(?:textbf|textit|textrm|textnormal|textsf|mbox|hbox|mathrm|mathbf|mathit|operatorname|rm|bf|text)\s*\{\s*",
            r"\\text{",
        ),
        # Subscripts that are words or commands become plain letters: \lambda_{\text{red}}, M_{\odot},
        # m_{\max}.
        (r"_\s*\{\s*\\text\{\s*([A-Za-z0-9]+)\s*\}\s*\}", r"_{\1}"),
        (r"_\s*\{\s*\\([A-Za-z]+)\s*\}", r"_{\1}"),
        (r"\\hbar(?![A-Za-z])", "h_{bar}"),
        (r"\\text\{\s*([A-Za-z])\s*\}(?=\s*[_^(])", r"\1"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\(?:leqslant|le)(?![A-Za-z])|<=", r"\\leq "),
        (r"\\(?:geqslant|ge)(?![A-Za-z])|>=", r"\\geq "),
        (r"\\ne(?![A-Za-z])|!=", r"\\neq "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
        (r"\^\s*\{\s*\\circ\s*\}|\\degree(?![A-Za-z])|\^\s*\\circ(?![A-Za-z])", r"\\text{degrees}"),
        (r"\\text\{\s*,?\s*(?:and|or)\s*,?\s*\}|(?<![A-Za-z\\{])(?:and|or)(?![A-Za-z}])", " , "),
        (r",\s*,", ","),
        # ASCII spellings: sqrt(2), pi/2, 2*x, x**2, sin(x), infinity.
        (r"(?<![A-Za-z])(?:np|math)\.(?=[a-z])", ""),
        (r"\*\*", "^"),
        (r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (
            r"(?<![\\A-Za-z])(pi|theta|sin|cos|tan|sec|csc|cot|log|ln|arcsin|arccos|arctan)(?![A-Za-z])",
            r"\\\1 ",
        ),
        (r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
        (r"\*", r" \\cdot "),
        (r"\s+", " "),
    )
)


def check_characters(text: str) -> None:
    """Raises Unreadable on control characters and on digits that are not ASCII (`int` would accept those)."""
    for char in text:
        category = unicodedata.category(char)
        if category in ("Cc", "Cf", "Cs", "Co", "Cn") and char not in "\n\r\t":
            raise Unreadable(f"it holds the control character U+{ord(char):04X}")
        if category == "Nd" and not char.isascii():
            raise Unreadable(f"it holds the digit U+{ord(char):04X}, which is not ASCII")


def normalize(text: str) -> str:
    """The answer in one spelling of LaTeX, without `$`, spacing commands, `\\left`/`\\right` or closing
    punctuation.

    Raises Unreadable on forbidden characters and on brackets that do not match.
    """
    check_characters(text)
    text = text.translate(_UNICODE_TABLE)
    if text.replace("\\$", "").count("$") % 2 and text.lstrip("-( ").startswith("$"):
        text = text.replace("$", "\\$", 1)  # One dollar sign before an amount is money, not a math delimiter.
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _brace_arguments(text.replace("$", "")).strip()
    text = re.sub(r"^(?:=|\\approx)\s*", "", text)
    while text and text[-1] in ".,;:":
        text = text[:-1].rstrip()
    _check_brackets(text)
    return text


def _brace_arguments(text: str) -> str:
    """`\\frac12`, `\\frac\\pi 2` and `\\sqrt3` with the braces that TeX implies."""

    def wrap(match: re.Match[str]) -> str:
        command, arguments = match[1], match[2]
        return command + "".join(f"{{{part}}}" for part in _TOKEN.findall(arguments))

    text = re.sub(rf"(\\frac)\s*({_ARGUMENT})(?=\s*\{{)", wrap, text)
    text = re.sub(rf"(\\frac\s*\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})\s*({_ARGUMENT})", wrap, text)
    text = re.sub(rf"(\\frac)\s*({_ARGUMENT}\s*{_ARGUMENT})", wrap, text)
    return re.sub(rf"(\\sqrt(?:\[[^\[\]]*\])?)\s*({_ARGUMENT})", wrap, text)


def squash(text: str) -> str:
    """`text` without the white space that means nothing: it is kept only between two letters or digits."""
    return re.sub(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])", "", text.strip())


def split_top(text: str, separator: str) -> list[str]:
    """`text` cut at the regular expression `separator` wherever it stands outside all brackets; parts
    stripped.
    """
    pattern = re.compile(separator)
    parts, depth, start, index = [], 0, 0, 0
    while index < len(text):
        match = pattern.match(text, index) if depth == 0 else None
        if match and match.end() > index:
            parts.append(text[start:index].strip())
            start = index = match.end()
            continue
        if text[index] in "([{":
            depth += 1
        elif text[index] in ")]}":
            depth -= 1
        index += 1
    parts.append(text[start:].strip())
    return parts


def closes_at_end(text: str) -> bool:
    """Whether the bracket that `text` starts with is closed by its last character."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return index == len(text) - 1
    return False


def _check_brackets(text: str) -> None:
    stack: list[str] = []
    for char in text:
        if char in "([{":
            stack.append(char)
            if len(stack) > 60:
                raise Unreadable("its brackets are nested more than 60 deep")
        # "(" may close with "]" and "[" with ")": half-open intervals.
        elif char in ")]}" and (not stack or (stack.pop() == "{") != (char == "}")):
            raise Unreadable("its brackets do not match")
    if stack:
        raise Unreadable("its brackets do not match")
