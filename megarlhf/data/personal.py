"""Personal data in a text, found by written rules (InstructGPT filters its training prompts for it; Ouyang et al. 2022, 3.2).

The paper does not say how. These rules know what has a form: they find no names and no street addresses, and numbers that have
the form by chance are found too. Each rule's docstring says what it takes for what.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator

Rule = Callable[[str], bool]
EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,63}\b")
PHONE_ABROAD = re.compile(r"(?<![\w+])\+[0-9][0-9 ().-]{6,20}[0-9](?!\w)")
PHONE_AMERICA = re.compile(r"(?<![\w.-])(?:1[-. ])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[-. ])[2-9][0-9]{2}[-. ][0-9]{4}(?![\w-])")
CARD = re.compile(r"(?<![\w.-])[2-6][0-9](?:[ -]?[0-9]){11,17}(?![\w-])")
IBAN = re.compile(r"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
SOCIAL_SECURITY = re.compile(r"(?<![\w-])(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![\w-])")
IP4 = re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w]|\.[0-9])")
IP6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")


def personal_data(text: str) -> Iterator[str]:
    """What kinds of personal data the rules find in a text, by name."""
    return (name for name, rule in RULES.items() if rule(text))


def has_email(text: str) -> bool:
    """name@host.domain, with at most 64 letters before the @."""
    return EMAIL.search(text) is not None


def has_phone_number(text: str) -> bool:
    """+ and 8 to 15 digits with spaces, dots, hyphens or brackets between; or ten digits as North America writes them."""
    abroad = (sum(letter.isdigit() for letter in found.group()) for found in PHONE_ABROAD.finditer(text))
    return any(8 <= digits <= 15 for digits in abroad) or PHONE_AMERICA.search(text) is not None


def has_card_number(text: str) -> bool:
    """13 to 19 digits, by themselves or with spaces or hyphens between, that begin as payment cards do and whose Luhn sum is right."""
    return any(luhn(re.sub("[ -]", "", found.group())) for found in CARD.finditer(text))


def has_iban(text: str) -> bool:
    """An international bank account number of 15 to 34 characters whose remainder by 97 is right (ISO 13616)."""
    for found in IBAN.finditer(text):
        groups = found.group().split(" ")  # the last of which may be other words in capitals
        candidates = ("".join(groups[:n]) for n in range(1, len(groups) + 1))
        if any(15 <= len(iban) <= 34 and remainder_97(iban) == 1 for iban in candidates):
            return True
    return False


def has_social_security_number(text: str) -> bool:
    """Three, two and four digits with hyphens between, but for numbers that the United States never gives."""
    return SOCIAL_SECURITY.search(text) is not None


def has_ip_address(text: str) -> bool:
    """An IPv4 or IPv6 address of the public internet; 127.0.0.1 and 192.168.0.1 name nobody."""
    return any(_is_public(found.group()) for pattern in (IP4, IP6) for found in pattern.finditer(text))


def luhn(digits: str) -> bool:
    """Whether the last digit checks the others (ISO 7812)."""
    doubled = (int(digit) * (1 + i % 2) for i, digit in enumerate(reversed(digits)))
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


def remainder_97(iban: str) -> int:
    """The remainder of an account number by 97: its first four characters at the end, letters as 10 to 35."""
    return int("".join(str(int(letter, 36)) for letter in iban[4:] + iban[:4])) % 97


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


RULES: dict[str, Rule] = {
    "e-mail address": has_email,
    "phone number": has_phone_number,
    "card number": has_card_number,
    "bank account number": has_iban,
    "social security number": has_social_security_number,
    "IP address": has_ip_address,
}
