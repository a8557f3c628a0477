"""What the doctor says: findings, and how those of many machines become one page."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OK, NOTE, DOUBT, WRONG = "ok", "note", "doubt", "wrong"
SECTIONS = ("software", "devices", "limits", "network", "run folder", "ranks")
WIDTH = 110


@dataclass(frozen=True)
class Finding:
    """One sentence about one thing."""

    section: str
    level: str
    """OK, NOTE (worth knowing), DOUBT (works, and hardly as meant), WRONG (a run would fail)."""
    text: str
    way_out: str = ""
    """What to do about it; every doubt and every wrong has one."""


def of_all_hosts(found: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """The findings of all hosts, equal ones once; one that not all share names its hosts."""
    hosts_of: dict[Finding, list[str]] = {}
    for host, findings in found.items():
        for finding in findings:
            hosts_of.setdefault(finding, []).append(host)
    merged = []
    for finding, hosts in hosts_of.items():
        more = f" and {len(hosts) - 4} more" if len(hosts) > 4 else ""
        where = "" if len(set(hosts)) == len(found) else f"{', '.join(hosts[:4])}{more}: "
        merged.append(Finding(finding.section, finding.level, where + finding.text, finding.way_out))
    return merged


def page(title: str, findings: Sequence[Finding]) -> str:
    """All findings under their headings, and the sum of it in the last line."""
    lines = [title]
    for section in SECTIONS:
        inside = [finding for finding in findings if finding.section == section]
        lines += ["", section] if inside else []
        for finding in inside:
            lines += textwrap.wrap(finding.text, WIDTH, initial_indent=f"  {finding.level:<6}", subsequent_indent=" " * 8)
            if finding.way_out:
                lines += textwrap.wrap(f"-> {finding.way_out}", WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 11)
    return "\n".join([*lines, "", verdict(findings)])


def verdict(findings: Sequence[Finding]) -> str:
    """Whether a run can start here, and how much there is to mend."""
    wrong, doubted = (sum(finding.level == level for finding in findings) for level in (WRONG, DOUBT))
    doubts = f"; {_counted(doubted, 'thing')} in doubt" if doubted else ""
    return f"not usable: {_counted(wrong, 'thing')} wrong{doubts}" if wrong else f"usable{doubts}"


def is_usable(findings: Sequence[Finding]) -> bool:
    """Whether nothing is wrong."""
    return not any(finding.level == WRONG for finding in findings)


def _counted(number: int, noun: str) -> str:
    return f"1 {noun} is" if number == 1 else f"{number} {noun}s are"
