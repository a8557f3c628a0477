"""The Dockerfile, which is not built here: under hadolint, with every path and pin that it names looked up."""

import fnmatch
import json
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from megarlhf.doctor.command import parser as doctor_parser

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
TEXT = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
"""With one line for each instruction."""
CONSTRAINTS = ROOT / "launcher" / "docker-constraints.txt"
OF_THE_IMAGE = {"torch", "numpy", "transformer-engine", "apex"}
"""What NGC's image brings, built for its own torch."""


def instructions(name):
    """The words of every such instruction."""
    return [line.split()[1:] for line in TEXT.splitlines() if line.startswith(f"{name} ")]


def pins(path):
    """Name -> version of a constraints file."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def requirements(extras):
    """Names of what setup.py asks for, with some extras."""
    text = re.sub(r"#.*", "", (ROOT / "setup.py").read_text())
    lists = [re.search(r"install_requires=\[(.*?)\]", text, re.DOTALL).group(1)]
    lists += [re.search(rf'"{extra}": \[(.*?)\]', text).group(1) for extra in extras]
    return {re.match(r"[\w-]+", name).group(0) for part in lists for name in re.findall(r'"(.+?)"', part)}


def test_hadolint_finds_nothing():
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def copied():
    """The project's paths that are copied into the image."""
    return [path for words in instructions("COPY") if not words[0].startswith("--from") for path in words[:-1]]


@pytest.mark.parametrize("path", copied())
def test_what_is_copied_is_there_and_not_ignored(path):
    assert (ROOT / path).exists()
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert path.split("/")[0] in allowed


def test_nothing_else_reaches_the_build():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == {path.split("/")[0] for path in copied()}
    rules = [line for line in lines if line and line[0] not in "!#"]
    assert rules[0] == "*" and fnmatch.fnmatch("megarlhf/__pycache__", rules[1])


def test_the_base_is_one_dated_image():
    froms = instructions("FROM")
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", froms[0][0])
    stages = [words[2] for words in froms]
    assert [words[0] for words in froms[1:]] == ["base"] * (len(froms) - 1) and len(set(stages)) == len(stages) > 2
    assert {words[0].removeprefix("--from=") for words in instructions("COPY") if words[0].startswith("--from")} < set(stages)


def test_everything_that_is_installed_is_pinned_and_nothing_that_the_image_brings():
    pinned = pins(CONSTRAINTS)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]*", name) and re.fullmatch(r"\d+(\.\d+)+", pin) for name, pin in pinned.items())
    extras = re.search(r'"/build\[(.+?)\]"', TEXT).group(1).split(",")
    assert requirements(extras) - OF_THE_IMAGE == set(pinned) and not OF_THE_IMAGE & set(pinned)


def test_pins_are_the_tested_versions():
    tested = pins(ROOT / "tests" / "constraints-py312.txt")
    assert {name: version for name, version in pins(CONSTRAINTS).items() if name in tested}.items() <= tested.items()
    assert set(pins(CONSTRAINTS)) - set(tested) == {"nvidia-dali-cuda130"}


def test_the_user_is_not_root_and_health_is_looked_at():
    assert instructions("USER")[-1] == ["1000:1000"]
    assert len(instructions("HEALTHCHECK")) == 1
    program, tool, *words = json.loads(re.search(r"HEALTHCHECK .*?CMD (\[.+?\])", TEXT, re.DOTALL).group(1))
    assert (program, tool) == ("megarlhf", "doctor")
    options = doctor_parser().parse_args(words)
    assert options.quick and options.gpu


def test_apex_of_pypi_is_never_asked_for():
    """PyPI's `apex` is another program, which megatron-core would take for NVIDIA's."""
    named = [*CONSTRAINTS.read_text().splitlines(), *re.findall(r'"(.+?)"', re.sub(r"#.*", "", (ROOT / "setup.py").read_text()))]
    assert not [name for name in named if re.match(r"(nvidia-)?(apex|transformer-engine)\b", name)]
