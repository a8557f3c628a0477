"""Versions against those that setup.py asks for and that the tests ran with, and the libraries that may be there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megarlhf.doctor.findings import NOTE, OK, WRONG, Finding

ROOT = Path(__file__).parents[2]
"""Of a checkout; an installed package has nothing there."""
OPTIONAL = {
    "transformer-engine": ("transformer_engine", "with it the optimizer takes its fused Adam"),
    "apex": ("apex", "with it the optimizer takes its fused Adam where Transformer Engine is missing"),
    "nvidia-dali-cuda130": ("nvidia.dali", "for data.loader: dali"),
    "wandb": ("wandb", "for run.sinks: [wandb]"),
    "tensorboard": ("tensorboard", "for run.sinks: [tensorboard]"),
    "sentencepiece": ("sentencepiece", "for tokenizers in .model files"),
    "pyarrow": ("pyarrow", "for data in .parquet files"),
}
"""Distribution -> (what is imported, what it is used for)."""


def requirements() -> tuple[SpecifierSet, dict[str, SpecifierSet]]:
    """(Python, distribution -> versions) that setup.py asks for: from the installed package, or from the checkout's setup.py."""
    try:
        found = importlib.metadata.distribution("megarlhf")
        python, needed = found.metadata["Requires-Python"], [line for line in found.requires or [] if "extra ==" not in line]
    except importlib.metadata.PackageNotFoundError:
        text = re.sub(r"#.*", "", (ROOT / "setup.py").read_text(encoding="utf-8"))
        python = re.search(r'python_requires="(.+?)"', text)[1]
        needed = re.findall(r'"(.+?)"', re.search(r"install_requires=\[(.*?)\]", text, re.DOTALL)[1])
    parsed = [Requirement(line) for line in needed]
    return SpecifierSet(python), {requirement.name: requirement.specifier for requirement in parsed}


def tested_versions(python: str) -> dict[str, str]:
    """Distribution -> the version that the tests ran with on this Python; empty where the checkout's files are not there."""
    major, minor = python.split(".")[:2]
    file = ROOT / "tests" / f"constraints-py{major}{minor}.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def installed(names: list[str]) -> dict[str, str]:
    """Distribution -> version, of those that are there."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def version_findings(
    python: str, found: Mapping[str, str], wanted: tuple[SpecifierSet, Mapping[str, SpecifierSet]], tested: Mapping[str, str]
) -> list[Finding]:
    """What is missing, out of range or untested among the versions."""
    findings = []
    python_range, ranges = wanted
    if python not in python_range:
        findings.append(Finding("software", WRONG, f"Python is {python}, and {python_range} is needed", "make an environment with it"))
    for name, accepted in ranges.items():
        way_out = f'pip install "{name}{accepted}"'
        if name not in found:
            findings.append(Finding("software", WRONG, f"{name} is not installed", way_out))
        elif not accepted.contains(found[name], prereleases=True):
            findings.append(Finding("software", WRONG, f"{name} is {found[name]}, and {accepted} is needed", way_out))
    shown = ", ".join([f"Python {python}", *(f"{name} {found[name]}" for name in ("torch", "megatron-core") if name in found)])
    if findings:
        return [Finding("software", NOTE, shown), *findings]
    if not tested:
        return [Finding("software", OK, f"{shown}: within what setup.py asks for")]
    pairs = [(name, found[name].split("+")[0], tested[name]) for name in ranges if name in tested]
    if differing := [f"{name} {version} (tested: {last})" for name, version, last in pairs if version != last]:
        return [Finding("software", OK, f"{shown}: supported"), Finding("software", NOTE, f"other than tested: {', '.join(differing)}")]
    return [Finding("software", OK, f"{shown}, and what they stand on: the tested versions")]


def optional_findings() -> list[Finding]:
    """Which of the libraries that only some runs need are there, and what for."""
    findings = []
    for name, (module, purpose) in OPTIONAL.items():
        if not _is_there(module):
            findings.append(Finding("software", NOTE, f"{name} is not installed, nor required: {purpose}"))
        elif name == "apex" and not _is_there("apex.multi_tensor_apply"):
            text = "apex is PyPI's program of that name, not NVIDIA's: megatron-core takes it for the latter and fails"
            findings.append(Finding("software", WRONG, text, "pip uninstall apex"))
        else:
            version = installed([name]).get(name, "")
            findings.append(Finding("software", OK, f"{name} {version}".rstrip() + f": {purpose}"))
    return findings


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def software_findings() -> list[Finding]:
    """All of it, of this process's environment."""
    wanted, python = requirements(), platform.python_version()
    findings = version_findings(python, installed(list(wanted[1])), wanted, tested_versions(python))
    return findings + optional_findings()


def broken_imports() -> list[Finding]:
    """What of torch and megatron-core is installed and cannot be imported."""
    findings = []
    for module in ("torch", "megatron.core"):
        try:
            importlib.import_module(module)
        except (ImportError, OSError, AttributeError) as error:
            way_out = "reinstall it with what it was built for; under NGC's images keep theirs"
            findings.append(Finding("software", WRONG, f"{module} cannot be imported: {error}", way_out))
            break
    return findings
