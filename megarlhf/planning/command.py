"""`megarlhf plan --config run.yaml --nodes N --gpu GPU`: what a run needs and how long it takes, before it is queued; needs no GPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from megarlhf.config import ConfigError
from megarlhf.planning.hardware import GB, GPUS, RESERVED_BYTES, Cluster
from megarlhf.storage.files import system_error

if TYPE_CHECKING:
    from megarlhf.models.architecture import Architecture
    from megarlhf.planning.plan import Plan

MOST_TRIED = 3
"""Of what a search has found: dry runs until one fits."""
SUMMARY = "Plan a run: memory of every kind of rank in every phase, time, and whether it fits; exit status 1 where it does not."


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan as the command line says; returns the exit status: 0, 1 where the run does not fit, 2 for what the user can mend."""
    words = list(sys.argv[2:] if arguments is None else arguments)
    reshard = words[:1] == ["reshard"]
    parser = _reshard_parser() if reshard else _parser()
    options, rest = parser.parse_known_args(words[reshard:])
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}: keys are given without dashes, as key=value")
    try:
        if reshard:
            return _reshard(options)
        options.overrides += rest
        return _plan(options)
    except ConfigError as error:
        return _failed(str(error), 2)
    except OSError as error:
        return _failed(system_error(error), 1)
    except KeyboardInterrupt:
        return _failed("stopped by Ctrl-C", 130)


def _plan(options: argparse.Namespace) -> int:
    from megarlhf.planning.models import run_models
    from megarlhf.planning.plan import make_plan

    if options.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--png needs matplotlib: pip install megarlhf[plan]")
    cluster = cluster_of(options)
    given = dict(_assignment(word) for word in options.architecture)
    if options.search:
        return _search(options, given, cluster)
    return _said(make_plan(run_models(options.config, options.overrides, given, cluster.num_ranks), cluster), options)


def _said(plan: Plan, options: argparse.Namespace) -> int:
    """Print a plan, and write it where the options say; returns the exit status."""
    from megarlhf.planning.report import as_json, as_text

    print(as_text(plan), end="", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(plan), indent=1) + "\n", encoding="utf-8")
    if options.png is not None:
        from megarlhf.planning.picture import draw

        draw(plan, options.png)
    return 0 if plan.fits else 1


def _search(options: argparse.Namespace, given: dict[str, Architecture | dict], cluster: Cluster) -> int:
    from megarlhf.planning.cheap_model import CheapModel
    from megarlhf.planning.plan import make_plan
    from megarlhf.planning.search import as_text as as_ranking
    from megarlhf.planning.search import search

    model = CheapModel(options.config, options.overrides, given, cluster)
    found = search(model)
    print(as_ranking(found, cluster), flush=True)
    if not found.best:
        return 1
    for number, best in enumerate(found.best[:MOST_TRIED], start=1):
        plan = make_plan(model.models_of(best.choice), cluster)
        keys = shlex.join(best.choice.overrides(model.models))
        print(f"number {number} of them, dry-run, takes {plan.step_seconds:.1f} s: {keys}\n", flush=True)
        if plan.fits:
            break
        print(f"{plan.verdict[-1]}\n", flush=True)
    return _said(plan, options)


def _reshard(options: argparse.Namespace) -> int:
    from megarlhf.planning.models import named_architecture
    from megarlhf.planning.reshard_command import as_text, parse_layout, traffic

    source = parse_layout(options.source)
    target = parse_layout(options.target, source.num_ranks)
    options.nodes = -(-max(source.ranks.stop, target.ranks.stop) // max(1, options.gpus_per_node))
    try:
        architecture = named_architecture(options.preset, vocab_size=options.vocab_size)
    except ValueError as error:
        raise ConfigError(f"--preset: {error}") from error
    cluster = cluster_of(options)
    moved = traffic(architecture, source, target, gpus_per_node=cluster.gpus_per_node)
    print(as_text(moved, cluster), end="", flush=True)
    return 0


def cluster_of(options: argparse.Namespace) -> Cluster:
    """The cluster that the options describe. ConfigError where a number makes no sense."""
    for name in ("nodes", "gpus_per_node", "inside_gbps", "between_gbps"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    gpu = GPUS[options.gpu]
    inside, between = ((gbps * GB / 8 if gbps else None) for gbps in (options.inside_gbps, options.between_gbps))
    return Cluster(
        gpu=gpu, nodes=options.nodes, gpus_per_node=options.gpus_per_node, inside=inside or gpu.inside, between=between or gpu.between,
        reserved_bytes=options.reserve_gb * GB,
    )


def _assignment(word: str) -> tuple[str, Architecture | dict]:
    """ "policy=gpt3-175b" or "policy={num_layers: 80, ...}" as (model, fields of an architecture); a path as (model, what is there)."""
    from megarlhf.models.architecture import PRESETS
    from megarlhf.planning.models import named_architecture

    role, equals, text = word.partition("=")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not role or not isinstance(value, str | dict):
        form = "MODEL=PRESET, such as policy=gpt3-175b, MODEL=PATH of a Hugging Face config.json, or MODEL={num_layers: ..., ...}"
        raise ConfigError(f"--architecture {word}: it is given as {form}")
    if isinstance(value, dict):
        return role, value
    if value in PRESETS:
        return role, {"preset": value}  # with the vocabulary of the run's tokenizer
    try:
        return role, named_architecture(value, vocab_size=0)
    except ValueError as error:
        raise ConfigError(f"--architecture {role}: {error}") from error


def _failed(problem: str, status: int) -> int:
    print(f"megarlhf plan: {problem}", file=sys.stderr, flush=True)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megarlhf plan", description=SUMMARY, allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the cluster (default: 1)")
    _add_hardware(parser)
    parser.add_argument(
        "--architecture", action="append", default=[], metavar="MODEL=WHAT",
        help="what a model is whose checkpoint is not here: a preset such as gpt3-13b, the path of a Hugging Face folder or config.json, "
        "or {num_layers: ..., hidden_size: ..., num_heads: ...}",
    )
    parser.add_argument("--search", action="store_true", help="look for the fastest layout that fits, and plan that")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--png", type=Path, help="draw memory and time into this file (needs matplotlib: pip install megarlhf[plan])")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="replaces a value of the file")
    return parser


def _reshard_parser() -> argparse.ArgumentParser:
    summary = "What moves when weights are published from one layout to another: bytes per rank, busiest link, memory, seconds."
    parser = argparse.ArgumentParser(prog="megarlhf plan reshard", description=summary, allow_abbrev=False)
    source = "the training layout, such as tp8pp8dp16, or tp8@8 from rank 8 on"
    target = "the generation layout, such as tp8pp1; without dp it is over all ranks of training"
    parser.add_argument("--from", dest="source", required=True, metavar="LAYOUT", help=source)
    parser.add_argument("--to", dest="target", required=True, metavar="LAYOUT", help=target)
    parser.add_argument("--preset", required=True, help="the model, such as gpt3-175b, or the path of a Hugging Face config.json")
    parser.add_argument("--vocab-size", type=int, default=50257, help="ids of a preset's vocabulary (default: GPT-2's %(default)d)")
    _add_hardware(parser)
    return parser


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of each (default: 8)")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100-80gb", help="kind of GPU (default: %(default)s)")
    parser.add_argument("--inside-gbps", type=float, help="gigabits per second of one GPU to others of its node (default: NVLink's)")
    parser.add_argument("--between-gbps", type=float, help="gigabits per second of one GPU to other nodes (default: InfiniBand's)")
    parser.add_argument("--reserve-gb", type=float, default=RESERVED_BYTES / GB, help="GB for CUDA and NCCL (default: %(default)g)")
