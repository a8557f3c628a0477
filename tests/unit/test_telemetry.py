"""Metrics, timers, sinks, progress, samples and tables."""

from __future__ import annotations

import io
import json
import math
import random
import sys
import time
import types

import numpy as np
import pytest
import torch

from megarlhf.telemetry.alerts import Alerts
from megarlhf.telemetry.metrics import Metrics
from megarlhf.telemetry.progress import Progress
from megarlhf.telemetry.samples import SampleLog
from megarlhf.telemetry.sinks import JsonlSink, check_sinks, make_sinks
from megarlhf.telemetry.tables import format_table
from megarlhf.telemetry.timers import Timers


def records(path):
    """The records of a JSON-lines file, read by a parser that knows no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# Metrics and timers


def test_means_are_sums_over_counts_however_the_observations_are_split():
    observations = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    metrics = Metrics()
    for part in observations.split([1, 9, 290, 700]):
        metrics.update({"kl": (part.sum(), torch.tensor(len(part)))}, prefix="policy/")
        metrics.add("reward", part.sum().item(), len(part))
    metrics.add("clip", torch.tensor(0.0), torch.tensor(0))
    metrics.add("empty", 0.0, 0)
    metrics.set("lr", 1e-5)
    metrics.set("lr", 2e-5)
    metrics.set("scale", torch.tensor(4.0))
    means = metrics.means()
    assert means == pytest.approx({"policy/kl": observations.mean().item(), "reward": observations.mean().item(), "lr": 2e-5, "scale": 4.0})
    assert all(type(value) is float for value in means.values())
    assert metrics.means() == means


def test_metrics_keep_what_they_were_given_and_add_up_in_float64():
    metrics, total = Metrics(), torch.tensor(1.0, requires_grad=True)
    metrics.add("x", total * 2**24, 1)
    with torch.no_grad():
        total.fill_(0.0)
    for _ in range(3):
        metrics.add("x", torch.tensor(1.0), 0)
    assert metrics.means() == {"x": 2**24 + 3}, "float32 cannot hold 2 ** 24 + 1"


def test_metrics_do_not_read_the_device_before_means(monkeypatch):
    def synced(*_):
        raise AssertionError("host read")

    metrics = Metrics()
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
            patch.setattr(torch.Tensor, name, synced)
        metrics.add("loss", torch.tensor(6.0), torch.tensor(4))
        metrics.add("loss", 2.0, torch.tensor(4))
        metrics.set("norm", torch.tensor(3.0))
    assert metrics.means() == {"loss": 1.0, "norm": 3.0}


def test_timers_accumulate_and_start_afresh():
    clock = iter([0, 1, 10, 12, 20, 25])
    calls = []
    timers = Timers(synchronize=lambda: calls.append(1))
    timers._now = lambda now=timers._now: (now(), next(clock))[1]
    for name in ("generate_seconds", "generate_seconds", "update_seconds"):
        with timers(name):
            pass
    assert timers.collect() == {"generate_seconds": 3, "update_seconds": 5}
    assert timers.collect() == {}
    assert len(calls) == 6, "the device must be waited for at both ends of each phase"


def test_timers_do_not_count_a_phase_that_fails():
    timers = Timers()
    with pytest.raises(KeyError), timers("x"):
        raise KeyError
    assert timers.collect() == {}


# Sinks and samples


def test_jsonl_lines_are_standard_json_and_flushed(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path, clock=lambda: 86400.5)
    sink.write("ppo", 1, {"reward": 0.5, "loss": math.nan, "kl": -math.inf})
    assert records(path) == [
        {
            "stage": "ppo", "step": 1, "time": "1970-01-02T00:00:00.500Z", "reward": 0.5,
            "loss": None, "kl": None, "nonfinite": {"loss": "nan", "kl": "-inf"},
        }  # fmt: skip
    ]
    sink.close()


def test_a_resumed_run_writes_what_an_uninterrupted_one_would(tmp_path):
    def write(sink, stage, steps):
        for step in steps:
            sink.write(stage, step, {"loss": 1 / step})

    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    sink = JsonlSink(whole, clock=lambda: 0.0)
    write(sink, "sft", range(1, 6))
    write(sink, "ppo", range(1, 6))

    sink = JsonlSink(resumed, clock=lambda: 0.0)
    write(sink, "sft", range(1, 6))
    write(sink, "ppo", range(1, 4))
    sink.close()
    with resumed.open("a") as file:
        file.write('{"stage": "ppo", "st')  # killed while writing
    sink = JsonlSink(resumed, clock=lambda: 0.0)
    sink.truncate_after("ppo", 2)
    sink.truncate_after("ppo", 2)
    write(sink, "ppo", range(3, 6))
    assert resumed.read_text() == whole.read_text()
    assert sorted(tmp_path.iterdir()) == [resumed, whole], "no temporary file may be left"


def test_truncation_refuses_a_file_it_cannot_read_and_leaves_it_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = '{"stage": "ppo", "step": 9}\nhello\n{"stage": "ppo", "step": 10}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*'hello"):
        JsonlSink(path).truncate_after("ppo", 1)
    assert path.read_text() == text


def test_samples_survive_any_text_and_truncate(tmp_path):
    path = tmp_path / "samples.jsonl"
    log = SampleLog(path)
    awkward = "line\nline\u2028 \u00e9 \ud800 \x00"
    log.write("ppo", 1, prompt=awkward, response="", score=math.inf)
    log.write("ppo", 2, prompt="p", response="r", kl=0.5)
    log.truncate_after("ppo", 1)
    log.write("ppo", 2, prompt="q", response="r")
    assert records(path) == [
        {"stage": "ppo", "step": 1, "prompt": awkward, "response": "", "score": None, "nonfinite": {"score": "inf"}},
        {"stage": "ppo", "step": 2, "prompt": "q", "response": "r"},
    ]


def test_make_sinks_names_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown sink 'tensorbord'; did you mean 'tensorboard'"):
        make_sinks(["jsonl", "tensorbord"], tmp_path)
    for kind, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=f"the sink '{kind}' needs {kind}, .*pip install {kind}"):
            make_sinks([kind], tmp_path)


def test_wandb_gets_one_run_per_folder_and_one_step_axis_per_stage(tmp_path, monkeypatch):
    calls = []
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)

    class Run:
        def define_metric(self, name, step_metric):
            calls.append(("define", name, step_metric))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    def init(**settings):
        calls.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=RuntimeError))
    for _ in range(2):
        (sink,) = make_sinks(["wandb"], tmp_path, project="p", name="n", wandb_mode="online", config={"ppo": {"clip": 0.2}})
        sink.write("sft", 7, {"loss": 0.5})
        sink.write("sft", 8, {"loss": 0.25})
        sink.close()
    first, second = calls[:5], calls[5:]
    assert first == second, "a resumed run must be the same run"
    kept = {"dir": str(tmp_path), "mode": "online", "id": first[0]["id"], "resume": "allow"}
    kept |= {"config": {"ppo": {"clip": 0.2}}, "allow_val_change": True}
    assert first[0] == {"project": "p", "name": "n", **kept}
    assert first[1:] == [
        ("define", "sft/*", "sft/step"),
        ("log", {"sft/step": 7, "sft/loss": 0.5}),
        ("log", {"sft/step": 8, "sft/loss": 0.25}),
        ("finish",),
    ]
    monkeypatch.setenv("WANDB_PROJECT", "of the team")
    monkeypatch.setenv("WANDB_NAME", "beta 0.05")
    make_sinks(["wandb"], tmp_path, project="p", name="n")
    assert (calls[-1]["project"], calls[-1]["name"]) == ("of the team", "beta 0.05")


def wandb_records(path):
    """The protocol buffers in a .wandb file: LevelDB's log format behind 7 bytes of its own (here none spans two blocks of 32 KiB)."""
    from wandb.proto import wandb_internal_pb2

    content, at = path.read_bytes(), 7
    while at + 7 <= len(content):
        length = int.from_bytes(content[at + 4 : at + 6], "little")
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content[at + 7 : at + 7 + length])
        yield record
        at += 7 + length


def test_wandb_itself_keeps_a_resumed_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in (("WANDB_ERROR_REPORTING", "false"), ("WANDB_SILENT", "true"), ("WANDB_CONSOLE", "off")):
        monkeypatch.setenv(name, value)
    for steps in (range(1, 3), range(3, 5)):
        (sink,) = make_sinks(["wandb"], tmp_path, name="a run")
        for step in steps:
            sink.write("sft", step, {"loss": 1 / step})
        sink.write("sft", steps[-1] + 1, {"loss": math.nan})
        sink.close()
        time.sleep(1.1)  # wandb names its folders by the second
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(files) == 2
    runs, logged = set(), []
    for file in files:
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                runs.add((record.run.run_id, record.run.project, record.run.display_name))
            elif record.WhichOneof("record_type") == "history":
                values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                logged.append((int(values["sft/step"]), values["sft/loss"]))
    assert runs == {((tmp_path / "wandb_id").read_text(), "megarlhf", "a run")}
    assert [step for step, _ in logged] == [1, 2, 3, 3, 4, 5]
    assert [float(loss) for _, loss in logged if loss != "NaN"] == [1 / step for step in (1, 2, 3, 4)]


def test_wandb_without_an_account_is_refused_in_words(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**settings):
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match="the sink 'wandb' cannot be opened: No API key configured .*offline needs no account"):
        make_sinks(["wandb"], tmp_path, wandb_mode="online")


def test_missing_packages_of_sinks_are_named_without_importing_anything(monkeypatch):
    assert check_sinks(["jsonl"]) == []
    for kind in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, kind, None)
        assert check_sinks(["jsonl", kind]) == [
            f"run.sinks: {kind} needs the package {kind}, which is not installed: pip install {kind}, or leave {kind} out"
        ]


def test_tensorboard_reads_a_resumed_stage_without_duplicates(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for truncate, steps in ((None, range(1, 6)), (2, range(3, 5))):
        (sink,) = make_sinks(["tensorboard"], tmp_path)
        if truncate is not None:
            sink.truncate_after("ppo", truncate)
        for step in steps:
            sink.write("ppo", step, {"loss": float(step)})
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "ppo")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 3), (4, 4)]


# Progress and tables


def test_progress_in_a_log_is_a_line_now_and_then():
    now = [0.0]
    stream = io.StringIO()
    with Progress("ppo", 100, initial=50, stream=stream, interval_seconds=30, clock=lambda: now[0]) as progress:
        for _ in range(50):
            now[0] += 20
            progress.update()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "ppo 51/100  0:00:20 passed, 0:16:20 left", "steps before the resume must not count towards the pace"
    assert len(lines) == 26, "at 20 s a step every second step is 30 s after the last line, and the final one always shows"
    assert lines[-1] == "ppo 100/100  0:16:40 passed, 0:00:00 left"


def test_progress_shows_metrics_and_is_silent_when_disabled():
    stream = io.StringIO()
    Progress("sft", 10, stream=stream).update({"loss": 1 / 3, "tokens": 12345.0})
    assert stream.getvalue().endswith("  loss 0.3333  tokens 1.234e+04\n")
    stream = io.StringIO()
    stream.isatty = lambda: True
    with Progress("sft", 10, stream=stream, enabled=False) as progress:
        progress.update({"loss": 1.0})
    assert stream.getvalue() == ""


def test_progress_on_a_terminal_is_a_bar():
    stream = io.StringIO()
    stream.isatty = lambda: True
    with Progress("sft", 10, initial=4, stream=stream) as progress:
        progress.update({"loss": 1 / 3}, steps=6)
    last = stream.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("sft: 100%") and "10/10" in last and "loss=0.3333" in last


def test_tables_align_numbers_right_and_text_left():
    text = format_table(["model", "win rate", "n"], [["policy", 0.5, 12], ["reference", None, 3]])
    assert text.splitlines() == [
        "model      win rate   n",
        "---------  --------  --",
        "policy          0.5  12",
        "reference         -   3",
    ]


# Alerts


def raised(values, *, name="model/loss", deviations=8.0, window=50, resumed_every=0):
    """The numbers of the values that raise an alert."""
    alerts, found = Alerts(deviations=deviations, window=window), []
    for number, value in enumerate(values):
        if resumed_every and number % resumed_every == 0:
            state = json.loads(json.dumps(alerts.state_dict()))
            alerts = Alerts(deviations=deviations, window=window)
            alerts.load_state_dict(state)
        metrics, lines = alerts.look({name: value, "valid/reward_mean": 1e9 * number, "time/step_seconds": math.inf})
        assert sum(metrics.values()) == len(lines)
        found += [number] if lines else []
    return found


def test_an_alert_is_what_the_rule_says_and_a_resume_changes_none():
    numbers = random.Random(0)
    values = [3 + numbers.gauss(0, 0.2) * (10 if numbers.random() < 0.1 else 1) for _ in range(300)]
    wanted = []
    for number in range(20, 300):
        before = np.array(values[number - 20 : number])
        deviation = max(1.4826 * np.median(abs(before - np.median(before))), 0.01 * abs(np.median(before)))
        wanted += [number] if values[number] - np.median(before) > 4 * deviation else []
    assert 5 < len(wanted) < 40
    for every in (0, 1, 7):
        assert raised(values, deviations=4.0, window=20, resumed_every=every) == wanted


def test_what_stands_out_and_what_does_not():
    noise = random.Random(1)
    normal = [math.exp(-n / 200) * 4 + 1 + noise.gauss(0, 0.05) for n in range(2000)]
    assert raised(normal) == [], "a loss that falls, with noise"
    assert raised([0.1 * n + noise.gauss(0, 0.05) for n in range(500)], name="rollout/kl") == [], "a KL that rises steadily"
    assert raised([*normal[:100], 3 * normal[99], *normal[100:200]]) == [100], "one spike, and none after it"
    doubling = [0.5 + noise.gauss(0, 0.1) for _ in range(60)] + [2.0**n for n in range(8)]
    assert raised(doubling, name="rollout/kl")[:3] == [61, 62, 63], "a KL that doubles"
    assert raised([2.0] * 60 + [2.1, 2.0, 2.2]) == [62], "without noise a twelfth is measured by 1 % of the median"
    assert raised([1.0, math.nan, math.inf, 1.0]) == [1, 2]
    assert raised([*normal[:100], 99.0], deviations=None) == [] == raised([*normal[:100], 99.0], name="valid/reward_mean")
