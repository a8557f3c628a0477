"""`megarlhf doctor`: what a run would find here, alone, under torchrun or srun; one rank prints it."""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megarlhf.doctor.findings import Finding, is_usable, of_all_hosts, page, verdict
from megarlhf.doctor.software import broken_imports, software_findings
from megarlhf.parallel.launch import Place, place_in_run

DESCRIPTION = "Say what this machine, or under torchrun or srun this cluster, has for a run and what it lacks."
EPILOG = "Exit status: 0 when a run can start, 1 when something is wrong, 2 for what was written wrong."


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at everything and print it; returns the exit status: 0 usable, 1 something is wrong, 2 the environment is half set."""
    options = parser().parse_args(arguments)
    try:
        place = place_in_run()
    except ValueError as error:
        print(f"megarlhf doctor: {error}", file=sys.stderr)
        return 2
    software = software_findings()
    if not is_usable(software) or (broken := broken_imports()):
        found = software if not is_usable(software) else software + broken
        return _print(found, options, f"rank {place.rank} of {place.size}, which joins no others before its software is mended")
    return _examine(options, place, software)


def parser() -> argparse.ArgumentParser:
    """Of the words after `megarlhf doctor`."""
    parser = argparse.ArgumentParser(prog="megarlhf doctor", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs are to be written (default: runs)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--quick", action="store_true", help="measure nothing: for health checks")
    parser.add_argument("--gpu", action="store_true", help="a machine without a GPU is not usable")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="how long to wait for a rank (default: 120)")
    return parser


def _examine(options: argparse.Namespace, place: Place, software: list[Finding]) -> int:
    from megarlhf.parallel.alarm import is_broken_connection
    from megarlhf.parallel.groups import World
    from megarlhf.parallel.rendezvous import RanksMissing

    world = None
    try:
        world = World.connect(place, timeout_minutes=options.timeout / 60)
        findings, hosts = _of_all_ranks(options, world, software)
    except RanksMissing as error:
        if error.speaks:
            print(f"megarlhf doctor: {error}", file=sys.stderr, flush=True)
        return 1
    except ValueError as error:
        if place.rank == 0:
            print(f"megarlhf doctor: {error}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if not is_broken_connection(error):
            raise
        print(f"megarlhf doctor: rank {place.rank}: the exchange between the ranks broke: {error}", file=sys.stderr, flush=True)
        return 1
    title = f"{_counted(world.size, 'rank')} on {_counted(len(set(hosts)), 'machine')} ({', '.join(list(dict.fromkeys(hosts))[:4])})"
    status = _print(findings, options, title) if world.rank == 0 else int(not is_usable(findings))
    world.tell_all("doctor/end", "")  # rank 0 may serve the store
    world.close()
    return status


def _of_all_ranks(options: argparse.Namespace, world, software: list[Finding]) -> tuple[list[Finding], list[str]]:
    """(all findings, each rank's machine), on every rank. The first rank of a machine looks at it, when no other computes."""
    from megarlhf.doctor.machine import device_findings, limit_findings, network_findings
    from megarlhf.doctor.ranks import rank_findings
    from megarlhf.doctor.run_folder import PROBE_BYTES, judge_folder, nearest_folder, probe

    hosts = world.tell_all("doctor/hosts", socket.gethostname())
    mine: list[Finding] = []
    if hosts.index(hosts[world.rank]) == world.rank:
        folder = nearest_folder(options.run_dir)
        devices = device_findings(quick=options.quick, need_gpu=options.gpu)
        probed = probe(folder, num_bytes=0 if options.quick else PROBE_BYTES)
        mine = [*software, *devices, *limit_findings(), *network_findings(), *judge_folder(probed)]
    told = world.tell_all("doctor/findings", json.dumps([asdict(finding) for finding in mine]))
    by_host = {host: [Finding(**one) for one in json.loads(text)] for host, text in zip(hosts, told, strict=True) if text != "[]"}
    together = rank_findings(world, options.run_dir, hosts, quick=options.quick) if world.size > 1 else []
    return [*of_all_hosts(by_host), *together], hosts


def _print(findings: list[Finding], options: argparse.Namespace, title: str) -> int:
    usable = is_usable(findings)
    if options.json:
        content = {"usable": usable, "verdict": verdict(findings), "where": title, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(content, indent=1), flush=True)
    else:
        print(page(f"megarlhf doctor: {title}", findings), flush=True)
    return 0 if usable else 1


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
