"""`megarlhf doctor`: situations that are broken, and what it says of them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from megarlhf.cli import main
from megarlhf.doctor import command, software
from megarlhf.doctor.findings import DOUBT, NOTE, OK, WRONG, Finding, is_usable, of_all_hosts, page, verdict
from megarlhf.doctor.machine import GIB, judge_limits, judge_network, judge_speeds
from megarlhf.doctor.ranks import judge_clocks, messages_finding
from megarlhf.doctor.run_folder import MIB, Probed, judge_folder, judge_sharing, nearest_folder, probe, wait_for

WANTED = (SpecifierSet(">=3.11"), {"torch": SpecifierSet(">=2.6"), "megatron-core": SpecifierSet("<0.20,>=0.16.1")})
FOUND = {"torch": "2.13.0+cpu", "megatron-core": "0.16.1"}
TESTED = {"torch": "2.13.0", "megatron-core": "0.16.1"}


def levels(findings):
    return [finding.level for finding in findings]


def test_versions_as_tested():
    [finding] = software.version_findings("3.11.7", FOUND, WANTED, TESTED)
    assert finding.level == OK and "torch 2.13.0+cpu" in finding.text and "the tested versions" in finding.text


def test_versions_that_are_supported_and_not_tested_are_named():
    findings = software.version_findings("3.11.7", {**FOUND, "torch": "2.7.1"}, WANTED, TESTED)
    assert levels(findings) == [OK, NOTE] and "torch 2.7.1 (tested: 2.13.0)" in findings[1].text


@pytest.mark.parametrize(
    ("python", "found", "text", "way_out"),
    [
        ("3.10.2", FOUND, "Python is 3.10.2, and >=3.11 is needed", "environment"),
        ("3.11.7", {**FOUND, "torch": "2.5.1"}, "torch is 2.5.1, and >=2.6 is needed", 'pip install "torch>=2.6"'),
        ("3.11.7", {**FOUND, "megatron-core": "0.20.0"}, "megatron-core is 0.20.0, and <0.20,>=0.16.1 is needed", "pip install"),
        ("3.11.7", {"torch": "2.13.0"}, "megatron-core is not installed", "pip install"),
    ],
)
def test_versions_out_of_range_are_wrong(python, found, text, way_out):
    _, finding = software.version_findings(python, found, WANTED, TESTED)
    assert finding.level == WRONG and finding.text == text and way_out in finding.way_out


def test_the_ranges_are_those_of_setup(monkeypatch):
    """Installed or not: one place says them."""
    python, ranges = software.requirements()

    def missing(name):
        raise software.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(software.importlib.metadata, "distribution", missing)
    assert software.requirements() == (python, ranges) and {"torch", "megatron-core", "numpy"} <= set(ranges)
    assert software.tested_versions("3.11.7")["megatron-core"] == "0.16.1" and software.tested_versions("3.9.0") == {}


def test_apex_of_pypi_is_recognised(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    [finding] = [finding for finding in software.optional_findings() if finding.level == WRONG]
    assert "PyPI's program of that name" in finding.text and finding.way_out == "pip uninstall apex"


def test_limits():
    assert levels(judge_limits(GIB, 65536, -1, cuda=True)) == [OK, OK]
    shared, files, locked = judge_limits(64 * MIB, 1024, 64 * 1024, cuda=True)
    assert (shared.level, files.level, locked.level) == (WRONG, DOUBT, DOUBT)
    assert "--ipc=host" in shared.way_out and "1024" in files.text and "64 KiB" in locked.text
    assert levels(judge_limits(None, 1024, 0, cuda=False)) == [DOUBT, DOUBT], "gloo needs no shared memory"


def test_network():
    def judge(env, cuda=False, ranks_here=1):
        return judge_network(env, ["lo", "eth0"], ranks_here=ranks_here, cuda=cuda)[1:]

    assert not judge({"NCCL_SOCKET_IFNAME": "eth", "GLOO_SOCKET_IFNAME": "eth0"})
    assert not judge({"NCCL_SOCKET_IFNAME": "^docker"})
    [wrong] = judge({"GLOO_SOCKET_IFNAME": "eth"})
    assert wrong.level == WRONG and wrong.text == "GLOO_SOCKET_IFNAME is eth, and this machine has lo, eth0"
    slow = judge({"NCCL_IB_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}, cuda=True)
    assert levels(slow) == [DOUBT] and "machines exchange over TCP" in slow[0].text
    graphs = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert "NCCL_GRAPH_REGISTER is not 0" in judge(graphs, cuda=True)[0].text and not judge(graphs)
    assert not judge(graphs | {"NCCL_GRAPH_REGISTER": "0"}, cuda=True)
    assert "OMP_NUM_THREADS" in judge({}, ranks_here=2)[0].text and not judge({"OMP_NUM_THREADS": "1"}, ranks_here=2)


def test_slow_bf16_is_said():
    assert levels(judge_speeds(1e11, 1e9)) == [OK, NOTE] and levels(judge_speeds(6e13, 8e14)) == [OK]
    assert "fp32 60.0 TFLOP/s, bf16 800.0 TFLOP/s" in judge_speeds(6e13, 8e14)[0].text


def test_a_folder_is_probed_and_nothing_stays(tmp_path):
    probed = probe(nearest_folder(tmp_path / "not" / "there"), num_bytes=2 * MIB)
    assert probed.folder == str(tmp_path) and probed.writes > 0 and probed.reads > 0 and not probed.problem
    assert not list(tmp_path.iterdir())


def test_folders_that_are_full_slow_or_not_to_be_written():
    full = probe(Path("/proc/self"), num_bytes=MIB)
    [wrong] = judge_folder(full)
    assert wrong.level == WRONG and "it cannot be written: /proc/self" in wrong.text
    assert levels(judge_folder(Probed("/x", 100 * GIB, 1e9, 1e9))) == [OK, OK]
    assert levels(judge_folder(Probed("/x", GIB, 1e6, 1e9))) == [DOUBT, DOUBT]
    assert levels(judge_folder(Probed("/x", 100 * GIB))) == [OK], "nothing was measured"


def test_a_folder_that_is_not_shared(tmp_path):
    (tmp_path / "seen").touch()
    assert wait_for(tmp_path / "seen", seconds=0) and not wait_for(tmp_path / "unseen", seconds=0.01)
    wrong = judge_sharing("/scratch", [True, True, False], ["a", "a", "b"])
    assert wrong.level == WRONG and "/scratch is not shared: rank 2 on b did not see what rank 0 on a wrote" in wrong.text


def test_clocks():
    assert judge_clocks([0.0, 0.02], ["a", "b"]).level == OK
    skewed = judge_clocks([0.0, 0.1, -7.25], ["a", "a", "b"])
    assert skewed.level == DOUBT and skewed.text == "the clock of b (rank 2) is 7.2 s behind that of a (rank 0)"


def test_bus_bandwidth():
    assert "1 MiB in 1 ms (1.6 GB/s)" in messages_finding({2**20: 1e-3}, 4).text, "2 * 3 / 4 of the bytes"


def test_the_page_names_hosts_only_where_they_differ():
    same, own = Finding("software", OK, "the same"), Finding("limits", WRONG, "a limit", "raise it")
    merged = of_all_hosts({"a": [same], "b": [same, own]})
    assert [finding.text for finding in merged] == ["the same", "b: a limit"] and not is_usable(merged)
    text = page("title", merged)
    assert text.splitlines()[-1] == "not usable: 1 thing is wrong" and "        -> raise it" in text
    assert verdict([same]) == "usable" and verdict([Finding("limits", DOUBT, "x", "y")]) == "usable; 1 thing is in doubt"


def test_alone_as_json(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_SIZE", "LOCAL_"))}
    words = [sys.executable, "-m", "megarlhf", "doctor", "--quick", "--json", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=120)
    said = json.loads(done.stdout)
    assert done.returncode == 0 and said["usable"] and {finding["level"] for finding in said["findings"]} <= {OK, NOTE, DOUBT}
    assert not list(tmp_path.iterdir())


def test_broken_software_is_said_before_anything_is_imported(monkeypatch, capsys):
    monkeypatch.setattr(command, "software_findings", lambda: [Finding("software", WRONG, "torch is 2.5.1", "pip install")])
    monkeypatch.setattr(command, "broken_imports", lambda: pytest.fail("nothing is imported"))
    assert main(["doctor"]) == 1
    assert "not usable: 1 thing is wrong" in capsys.readouterr().out


def test_waiting_takes_no_longer_than_it_may(tmp_path):
    start = time.monotonic()
    assert not wait_for(tmp_path / "never", seconds=0.3) and time.monotonic() - start < 5
