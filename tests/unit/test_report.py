"""`megarlhf report`: run folders of every stage, whole and not, to a page; what it warns of; and hostile text in it."""

import html
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megarlhf.cli import main
from megarlhf.report.reading import Curve, labels, read_runs
from megarlhf.report.rules import RULES, warnings_of
from megarlhf.telemetry.samples import SampleLog
from megarlhf.telemetry.sinks import JsonlSink

pytest.importorskip("plotly")
from megarlhf.report import page as page_module  # noqa: E402
from megarlhf.report.figures import cost_figures, curve_figures, thinned  # noqa: E402

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & <!-- \u2028"
OF_STAGES = {
    "pretrain": ["model/loss", "time/step_seconds", "memory/peak_bytes", "valid/text_loss"],
    "sft": ["model/loss", "model/skipped_steps", "valid/loss", "time/step_seconds"],
    "reward": ["reward/loss", "reward/accuracy", "valid/ranking_loss"],
    "dpo": ["dpo/loss", "dpo/margin", "valid/dpo_loss"],
    "ppo": [
        "rollout/reward_mean", "rollout/kl", "rollout/kl_per_token", "rollout/response_len", "rollout/finished_fraction",
        "policy/clip_fraction", "time/generate_seconds", "time/update_seconds", "memory/generate_peak_bytes", "memory/update_peak_bytes",
    ],
}  # fmt: skip


def write_run(folder, stage, *, steps=5, config="", samples=(), checkpoints=(), value=lambda name, step: 0.5):
    """A run's folder through the recorders that runs use."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": "x", "stage": stage}))
    (folder / "config.yaml").write_text(f"stage: {stage}\nrun: {{dir: {folder}, seed: 1}}\n{config}")
    sink = JsonlSink(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        sink.write(stage, step, {name: float(value(name, step)) for name in OF_STAGES[stage]})
    sink.close()
    log = SampleLog(folder / "samples.jsonl")
    for step, sample in enumerate(samples, 1):
        log.write(stage, step, **sample)
    log.close()
    for step in checkpoints:
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    return folder


class Reader(HTMLParser):
    """The texts and attributes of a page as a browser takes them apart: scripts and their kinds, rows of tables."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.rows, self.tags, self.attributes = [], [], [], set()
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._in_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        if self.lasttag == "script":
            self.scripts[-1] += data
        elif self._in_cell:
            self.rows[-1][-1] += data


def page_of(*folders):
    return page_module.page(read_runs(folders), datetime(2026, 1, 2, tzinfo=UTC))


def data_of(text):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text)[1])


def figures_of(text):
    return {figure["title"]: figure for figure in data_of(text)["figures"]}


# What is in a page


def test_every_metric_of_every_stage_is_drawn_for_every_run_that_has_it(tmp_path):
    runs = {stage: write_run(tmp_path / stage, stage, value=lambda name, step: len(name) + step) for stage in OF_STAGES}
    runs["ppo2"] = write_run(tmp_path / "ppo2", "ppo", steps=3)
    text = page_of(*runs.values())
    figures = figures_of(text)
    for name in {name for names in OF_STAGES.values() for name in names}:
        expected = [run for run in runs if name in OF_STAGES[run.rstrip("2")]]
        assert figures[name]["group"] == name.split("/")[0]
        assert [trace["name"] for trace in figures[name]["data"]] == expected
        of_ppo2 = [trace for trace in figures[name]["data"] if trace["name"] == "ppo2"]
        assert all(trace["x"] == [1, 2, 3] and trace["y"] == [0.5] * 3 for trace in of_ppo2)
        first = figures[name]["data"][0]
        assert first["y"] == [len(name) + step for step in first["x"]]
    groups = re.findall(r'class="figures(?: single)?" data-group="(\w+)"', text)
    assert {figure["group"] for figure in figures.values()} == set(groups), "a figure has nowhere to stand"
    [rollout, _] = figures["Reward against KL"]["data"]
    assert rollout["x"] == [len("rollout/kl") + step for step in range(1, 6)]
    assert rollout["y"] == [len("rollout/reward_mean") + step for step in range(1, 6)]


def test_costs_are_summed_by_phase_and_peaks_are_not(tmp_path):
    run = write_run(tmp_path / "a", "ppo", steps=4, value=lambda name, step: 2**30 * step if "memory" in name else step)
    figures = figures_of(page_of(run))
    bars = {title: {bar["name"]: bar["x"] for bar in figures[title]["data"]} for title in figures if "by phase" in title}
    assert bars["Time by phase"] == {"generate": [10], "update": [10]}
    assert bars["Time of a step by phase"] == {"generate": [2.5], "update": [2.5]}
    assert bars["Memory by phase"] == {"generate": [4], "update": [4]}
    assert [figures[title]["layout"]["barmode"] for title in bars] == ["stack", "stack", "group"]


def test_differences_of_configurations_are_those_between_runs_of_one_stage(tmp_path):
    first = write_run(tmp_path / "a", "ppo", config="ppo: {kl_coef: 0.02, clip: 0.2, adaptive_kl: null}\n")
    second = write_run(tmp_path / "b", "ppo", config="ppo: {kl_coef: 0.1, clip: 0.2, adaptive_kl: {target: 6.0}}\n")
    other = write_run(tmp_path / "c", "sft", config="epochs: 3\n")
    rows = {row["key"]: (row["values"], row["differs"]) for row in page_module.configuration(read_runs([first, second, other]))}
    assert rows["ppo.kl_coef"] == (["0.02", "0.1", None], True)
    assert rows["ppo.clip"] == (["0.2", "0.2", None], False)
    assert rows["ppo.adaptive_kl.target"] == ([None, "6.0", None], True)
    assert rows["epochs"] == ([None, None, "3"], False)
    assert not rows["run.dir"][1], "every run has a folder of its own"
    assert ["ppo.kl_coef", "0.02", "0.1", "-"] in Reader(page_of(first, second, other)).rows


def test_samples_stand_by_prompt_those_of_most_runs_first(tmp_path):
    alone = {"prompt": "Why?\n", "response": "Because.", "reward": 1.5, "finished": True}
    shared = {"prompt": "Who?\n", "response": " Me.", "reward": float("nan")}
    runs = [write_run(tmp_path / "a", "ppo", samples=[alone, shared]), write_run(tmp_path / "b", "ppo", samples=[shared])]
    assert page_module.samples(read_runs(runs)) == [
        {"prompt": "Who?", "answers": [[0, 2, None, None, None, "Me."], [1, 1, None, None, None, "Me."]]},
        {"prompt": "Why?", "answers": [[0, 1, 1.5, None, True, "Because."]]},
    ]


def test_many_samples_are_spread_over_the_run_and_long_ones_cut(tmp_path):
    count = 3 * page_module.MOST_SAMPLES
    many = [{"prompt": f"{at}", "response": "x" * (page_module.MOST_CHARACTERS + 7)} for at in range(count)]
    kept = page_module.samples(read_runs([write_run(tmp_path / "a", "ppo", samples=many)]))
    assert len(kept) == page_module.MOST_SAMPLES and kept[0]["prompt"] == str(count - 1) and int(kept[-1]["prompt"]) < 3
    assert kept[0]["answers"][0][-1].endswith("x ... (7 more characters)")


def test_an_evaluation_gives_results_a_point_of_the_frontier_and_samples(tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "run.json").write_text('{"id": "x", "stage": "evaluate"}')
    (folder / "evaluation.json").write_text('{"valid/kl": 2.5, "valid/reward_mean": 0.25, "tasks/sst": 0.75, "tasks/broken": NaN}')
    (folder / "responses.jsonl").write_text('{"prompt": "a", "response": "b", "reward": 1.0, "kl": NaN}\n')
    text = page_of(folder)
    [point] = figures_of(text)["Reward against KL"]["data"]
    assert (point["x"], point["y"]) == ([2.5], [0.25])
    assert ["tasks/sst", "0.75"] in Reader(text).rows
    assert data_of(text)["samples"] == [{"prompt": "a", "answers": [[0, None, 1.0, None, None, "b"]]}]
    [run] = read_runs([folder])
    assert sorted(lack.split()[0] for lack in run.lacks) == ["config.yaml", "environment.json"]


def test_what_a_run_was_started_on_is_compared(tmp_path):
    from megarlhf.runs.environment import ENVIRONMENT_FILE, environment

    runs = [write_run(tmp_path / name, "sft") for name in ("a", "b", "c")]
    for run, ranks in zip(runs[:2], (1, 4), strict=True):
        found = environment(SimpleNamespace(device=torch.device("cpu"), size=ranks))
        (run / ENVIRONMENT_FILE).write_text(json.dumps(found))
    rows = {row["key"]: (row["values"], row["differs"]) for row in page_module.environment_rows(read_runs(runs))}
    assert rows["ranks"] == (["1", "4", None], True)
    assert rows["torch"] == ([importlib.metadata.version("torch")] * 2 + [None], False)


# Runs that are going on, and folders that lack something


def test_a_run_that_is_going_on(tmp_path):
    folder = write_run(tmp_path / "a", "ppo", config="ppo: {iterations: 9}\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "ppo", "step": 6, "rollout/k')
    [run] = read_runs([folder])
    assert (run.last_step, run.total_steps, run.checkpoints) == (5, 9, ())
    assert "metrics.jsonl: the last line was not whole when this was read, and is left out" in run.lacks
    assert "checkpoints/ has no checkpoint: nothing was saved yet" in run.lacks
    assert any("5 of 9" in row for row in Reader(page_of(folder)).rows)


def test_a_run_before_its_first_step_has_a_page_too(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "run.json").write_text('{"id": "x", "stage": "ppo"}')
    text = page_of(folder)
    assert "No run has logged a step yet" in text
    for lacking in ("config.yaml", "metrics.jsonl", "samples.jsonl", "environment.json"):
        assert f"{lacking} is not there" in text
    assert figures_of(text) == {}


def test_lines_that_are_damaged_are_counted_and_left_out(tmp_path):
    folder = write_run(tmp_path / "a", "sft", checkpoints=[5])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:2], "}{", "7", *lines[2:]]) + "\n")
    [run] = read_runs([folder])
    assert run.curves["model/loss"].steps == (1, 2, 3, 4, 5) and run.checkpoints == (5,)
    assert "metrics.jsonl: 2 of 7 lines are no JSON objects and left out, the first is 3" in run.lacks


def test_numbers_that_are_not_finite_are_gaps(tmp_path):
    folder = write_run(tmp_path / "a", "sft", value=lambda name, step: math.nan if (name, step) == ("model/loss", 3) else 0)
    [run] = read_runs([folder])
    assert run.curves["model/loss"].values == (0, 0, None, 0, 0)
    assert [(warned.rule, warned.text) for warned in warnings_of(run)] == [
        ("not finite", "model/loss was not finite in 1 of 5 steps, first in step 3")
    ]
    assert figures_of(page_of(folder))["model/loss"]["data"][0]["y"] == [0, 0, None, 0, 0]


def test_long_curves_keep_their_peaks_their_ends_and_their_gaps():
    values = [math.sin(step / 50) for step in range(100_000)]
    values[31_337], values[77_777], values[50_505] = 9.0, -9.0, None
    steps, kept = thinned(Curve(tuple(range(100_000)), tuple(values)), most=1000)
    assert len(steps) <= 1000 and steps == sorted(set(steps))
    assert {31_337, 77_777, 50_505} <= set(steps)
    assert all(values[step] == value for step, value in zip(steps, kept, strict=True))
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) <= 400
    assert thinned(Curve((1, 2), (0.5, None)), most=2) == ([1, 2], [0.5, None])


def test_labels_are_paths_from_the_folder_of_all():
    assert labels([Path("/r/q/sft")]) == ["sft"]
    assert labels([Path("/r/q/sft"), Path("/r/q/evaluation/sft"), Path("/r/q/ppo")]) == ["sft", "evaluation/sft", "ppo"]


# Warnings


def judged(**curves):
    """The names of the rules that find something in curves with a value for each step from 1; __ stands for the slash."""
    found = {name.replace("__", "/"): Curve(tuple(range(1, len(values) + 1)), tuple(values)) for name, values in curves.items()}
    return {rule.name: list(rule.judge(found)) for rule in RULES if list(rule.judge(found))}


@pytest.mark.parametrize(
    ("rule", "metric", "well", "ill", "said"),
    [
        ("skipped steps", "policy__skipped_steps", [0.0] * 99 + [1.0], [0.0] * 97 + [1.0] * 3, "3 % of the optimizer steps were skipped"),
        ("unfinished responses", "rollout__finished_fraction", [0.1] * 18 + [0.9] * 2, [1.0] * 18 + [0.8] * 2, "20 % of the newest"),
        ("unfinished responses", "valid__finished_fraction", [0.95], [0.5], "50 % of the newest"),
        ("clip fraction", "policy__clip_fraction", [0.9] * 9 + [0.25], [0.1] * 9 + [0.26], "policy/clip_fraction is 0.26 of late"),
        ("clip fraction", "value__clip_fraction", [0.2], [0.5], "value/clip_fraction is 0.5 of late"),
        ("KL blow-up", "rollout__kl_per_token", [2.0] * 9 + [1.0], [0.1] * 9 + [1.5], "is 1.5 nats of late"),
        ("KL leaps", "rollout__kl", [2.0] * 10 + [6.0, 12.0], [1.0] * 9 + [2.0, 6.5], "leapt to 6.5 nats in step 11; the most in the 10"),
        ("KL leaps", "rollout__kl", [0.1] * 10 + [4.9], [-0.1] * 10 + [5.1], "leapt to 5.1"),
        ("alerts", "alert__kl", [0.0, 0.0], [0.0, 1.0, 2.0], "alert/kl was raised in 2 of 3 steps, first in step 2"),
        ("generator differs", "rollout__generator_logprob_gap", [0.9, 1.0], [0.1, 1.5, 0.1], "reached 1.5 nats in step 2"),
        ("critic", "value__explained_variance", [-1.0] * 9 + [0.0], [0.5] * 9 + [-0.25], "is -0.25 of late"),
        ("tied groups", "rollout__tied_groups", [0.5], [0.75], "in 75 % of the newest groups"),
        ("validation rises", "valid__loss", [3.0, 2.0, 2.1], [3.0, 2.0, 2.2], "valid/loss is 2.2 at the end, and was 2 at step 2"),
        ("gradient spike", "model__grad_norm", [50.0] + [1.0] * 18 + [10.0], [1.0] * 19 + [11.0], "reached 11 in step 20; its median is 1"),
        ("not finite", "model__loss", [1.0, 2.0], [1.0, None], "model/loss was not finite in 1 of 2 steps, first in step 2"),
    ],
)  # fmt: skip
def test_rules_warn_beyond_their_threshold_and_not_at_it(rule, metric, well, ill, said):
    assert judged(**{metric: well}) == {}
    found = judged(**{metric: ill})
    assert list(found) == [rule] and len(found[rule]) == 1 and said in found[rule][0]


def test_every_rule_and_its_threshold_stand_on_the_page(tmp_path):
    folder = write_run(tmp_path / "a", "ppo", value=lambda name, step: 0.5)
    reader = Reader(page_of(folder))
    assert not [rule for rule in RULES if [rule.name, rule.threshold, rule.way_out] not in reader.rows]
    assert {warned.rule for warned in warnings_of(read_runs([folder])[0])} == {"unfinished responses", "clip fraction"}


# Hostile text


def hostile_run(tmp_path):
    sample = {"prompt": HOSTILE, "response": HOSTILE, "reward": 1.0}
    folder = write_run(tmp_path / "<b onclick=x>", "ppo", samples=[sample], config=f"note: {json.dumps(HOSTILE)}\n")
    (folder / "environment.json").write_text(json.dumps({"host": HOSTILE}))
    return folder


def test_what_a_model_says_stays_text(tmp_path):
    plain = Reader(page_of(write_run(tmp_path / "plain", "ppo", samples=[{"prompt": "a", "response": "b"}])))
    text = page_of(hostile_run(tmp_path))
    hostile = Reader(text)
    assert hostile.scripts[1:] == plain.scripts[1:], "the page's own scripts, and no other"
    assert (set(hostile.tags), hostile.attributes) == (set(plain.tags), plain.attributes)
    assert not {"onerror", "onclick", "img", "b onclick"} & (hostile.attributes | set(hostile.tags))
    assert data_of(text)["samples"][0]["answers"][0][-1] == HOSTILE.strip()


# The command


def test_the_command_writes_where_it_is_told(tmp_path, capsys):
    folder = write_run(tmp_path / "a", "sft")
    assert main(["report", str(folder)]) == 0
    page = folder / "report.html"
    assert capsys.readouterr().out.startswith(f"{page}: 1 run, ") and page.stat().st_size < 6e6
    assert main(["report", str(folder), str(folder), "--to", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'both.html'}: 1 run, "), "the same folder twice is one run"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "there is no folder"),
        (["."], "is no run's folder: it has neither run.json, config.yaml nor metrics.jsonl; below it are"),
        (["a", "--to", "none/report.html"], "--to: there is no folder none"),
        (["a", "--to", "a"], "--to: a is a folder"),
    ],
)
def test_mistakes_are_refused(tmp_path, monkeypatch, capsys, words, said):
    write_run(tmp_path / "a", "sft")
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    assert said in capsys.readouterr().err


def test_it_needs_no_torch_and_says_where_plotly_comes_from(tmp_path):
    folder = write_run(tmp_path / "a", "sft")
    program = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1].split(','))); from megarlhf.cli import main; "
    program += "sys.exit(main(sys.argv[2:]))"

    def without(packages):
        words = [sys.executable, "-c", program, packages, "report", str(folder)]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)

    done = without("torch,megatron")
    assert done.returncode == 0, done.stderr
    refused = without("plotly")
    assert refused.returncode == 2 and "pip install megarlhf[report]" in refused.stderr, refused.stderr


# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHECKS = """
<script>
addEventListener("load", () => setTimeout(() => {
  const set = (id, value, event) => { const at = document.getElementById(id); at.value = value; at.dispatchEvent(new Event(event)); };
  const plots = [...document.querySelectorAll(".plot")];
  const curves = () => plots.map((plot) => (plot.data || []).length);
  const said = { titles: plots.map((plot) => plot._fullLayout && plot._fullLayout.title.text), before: curves() };
  said.samples = document.querySelectorAll(".sample").length;
  set("search", "nobody says this", "input");
  said.found = document.querySelectorAll(".sample").length;
  set("search", "", "input");
  set("smoothing", "0.9", "input");
  document.getElementById("theme").click();
  said.theme = document.documentElement.dataset.theme;
  setTimeout(() => {
    said.smoothed = curves();
    const loss = plots.find((plot) => plot._fullLayout.title.text === "policy/clip_fraction");
    said.values = [...loss.data[1].y];
    said.cameras = document.querySelectorAll('[data-title="Download plot as a PNG"]').length;
    Plotly.toImage(loss, { format: "png" }).then((image) => {
      said.png = image.slice(0, 22);
      said.title = document.title;
      document.body.append(Object.assign(document.createElement("pre"), { id: "said", textContent: JSON.stringify(said) }));
    });
  }, 3000);
}, 3000));
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_in_a_browser_everything_is_drawn_and_nothing_is_complained_of(tmp_path):
    """JavaScript in headless Chromium, without a network. The checks' own script is let in by its hash, as the page's are."""
    hostile = hostile_run(tmp_path)
    other = write_run(tmp_path / "other", "ppo", steps=8, value=lambda name, step: step)
    text = page_of(hostile, other)
    script = re.search(r"<script>(.*)</script>", CHECKS, re.DOTALL)[1]
    checked = text.replace("script-src ", f"script-src {page_module._hash(script)} ", 1).replace("</body>", f"{CHECKS}</body>")
    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(checked, encoding="utf-8")
    options = ["--headless", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1300,9000", "--virtual-time-budget=60000", "--dump-dom"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")
    done = subprocess.run(
        [BROWSER, *options, f"--screenshot={picture}", file.as_uri()], capture_output=True, text=True, timeout=180, encoding="utf-8"
    )
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints, "\n".join(complaints)
    said = json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', done.stdout)[1]))
    assert sorted(said["titles"]) == sorted(figures_of(text)), "each figure is drawn"
    assert said["cameras"] == len(said["titles"]), "each figure can be saved"
    assert said["png"] == "data:image/png;base64,"
    assert (said["samples"], said["found"], said["theme"]) == (1, 0, "dark")
    assert "taken" not in said["title"], "a response was run"
    at = said["titles"].index("policy/clip_fraction")
    assert (said["before"][at], said["smoothed"][at]) == (2, 4), "the unsmoothed curves stay, faint"
    assert said["values"] == pytest.approx([0.5] * 5), "the average of a constant is the constant from its first point"
    assert picture.stat().st_size > 50_000


def test_waits_within_phases_are_counted_once(tmp_path):
    """A run with offload logs what its copies made the phases wait; stacked beside them it would be in their sum twice."""
    folder = write_run(tmp_path / "a", "ppo", steps=2, value=lambda name, step: 10.0)
    lines = [json.loads(line) | {"time/offload_seconds": 4.0} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = read_runs([folder])
    in_all = next(drawn.as_json() for drawn in cost_figures(runs) if drawn.title == "Time by phase")
    assert sum(sum(bars["x"]) for bars in in_all["data"]) == 2 * (10 + 10)
    assert page_module.summary(runs)["rows"][0][4] == "0:00:40"
    assert "time/offload_seconds" in [drawn.title for drawn in curve_figures(runs)]
