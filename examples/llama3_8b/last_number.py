"""A verifier for questions whose answer is a number, such as GSM8K's: the last number of a response against the record's "answer"."""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def is_right(prompts, responses, records):
    """1.0 where the last number in a response is the number in its record's "answer", else 0.0."""
    wanted = (value_of(record["answer"]) for record in records)
    return [float(found[-1:] == [number]) for found, number in zip(map(numbers_in, responses), wanted, strict=True)]


def numbers_in(text):
    """The numbers that a text names, in order."""
    return [value_of(match) for match in NUMBER.findall(text)]


def value_of(text):
    """The number that is written, with or without commas between thousands."""
    return float(str(text).replace(",", ""))
