"""The keys of every command, and those that no case changes, each with its reason."""

import functools
from dataclasses import is_dataclass
from fnmatch import fnmatchcase

from megarlhf.config import COMMANDS
from megarlhf.config.documentation import keys_of
from megarlhf.config.fields import without_none, without_rules

WITHOUT_CASE = {
    # "command key" with "*" -> why no case changes it
    "* run.dir": "each case's run has a folder of its own, and all that is observed is read there",
    "* *blend[[]].prefix": "the list is set as a whole, by a case of blend: an override names no item of it",
    "* *blend[[]].weight": "as above",
    "sft reward.architecture.*": "a model that is never trained has no architecture of its own: the whole section is refused, by a case",
    "ppo reward.architecture.*": "as above",
    "ppo reference.architecture.*": "as above",
    "dpo reference.architecture.*": "as above",
    "ppo reward.functions*.*": "a list is given as a whole: the cases of reward.functions change its parts",
    "ppo generation.verify_weights": "the one rank of a case generates in place; test_trainers counts the comparisons on several",
    "generate model.architecture.*": "as above",
    "evaluate *.architecture.*": "as above",
    "sft reward.load_average": "no stage writes a scalar-headed model with a moving average",
    "ppo reward.load_average": "as above",
    "evaluate reward.load_average": "as above",
}


@functools.cache
def keys(command):
    """The keys of a command that hold a value, and the sections that may be null."""
    found = []
    for key, annotation, _, _ in keys_of(COMMANDS[command]):
        inner, optional = without_none(annotation)
        if optional or not is_dataclass(without_rules(inner)[0]):
            found.append(key)
    return found


def reason(command, key):
    """Why no case changes a key; None where one must."""
    return next((why for pattern, why in WITHOUT_CASE.items() if fnmatchcase(f"{command} {key}", pattern)), None)
