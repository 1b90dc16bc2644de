"""Do training and evaluation problems overlap?"""

from __future__ import annotations


def fingerprint(text: str) -> str:
    """Letters and digits only, in lower case: the same for two ways to set one problem in LaTeX."""
    return "".join(character for character in text.casefold() if character.isalnum()) or text
