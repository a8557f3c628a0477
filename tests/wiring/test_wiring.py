"""Every key of every command, changed in a tiny run, changes what its documentation says, and nothing else.

The cases are in `cases` and `sections`, what is seen of a run in `observation`, keys without a case and why in `keys`.
"""

import fnmatch
import gzip
import json
import re
import shutil
from unittest import mock

import pytest
import yaml

from megarlhf import cli
from megarlhf.parallel.groups import World
from megarlhf.runs.checkpoints import own_checkpoints
from megarlhf.trainers.ppo import ProximalPolicyOptimization
from megarlhf.trainers.sft import SupervisedFineTuning
from tests.distributed.recipe import run_stage_of
from tests.wiring import observation
from tests.wiring.case import faults
from tests.wiring.cases import CASES
from tests.wiring.keys import WITHOUT_CASE, keys, reason
from tests.wiring.layouts import layout_keys, layout_runs
from tests.wiring.recipe import RUNS, configurations, make_wiring_data

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher around the test."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """The data, a configuration for each command, and the runs that cases start from."""
    folder = tmp_path_factory.mktemp("wiring")
    make_wiring_data(folder)
    for command, tree in configurations(folder).items():
        (folder / f"{command}.yaml").write_text(yaml.safe_dump(tree))
    for name, (command, overrides) in RUNS.items():
        assert cli.main([command, "--config", f"{folder}/{command}.yaml", f"run.dir={folder}/runs/{name}", *overrides]) == 0
    return folder


@pytest.fixture(scope="session")
def observed(recipe, tmp_path_factory):
    """What is seen of a command with overrides (texts, the later ones before the earlier ones); each base is run once."""
    known = {}

    def observed(command, *overrides, prepare="", anew=False):
        words = overriding(*overrides, recipe=recipe)
        name = (command, *words, prepare)
        if anew or name not in known:
            run = tmp_path_factory.mktemp("case") / "run"
            start = [command, "--config", f"{recipe}/{command}.yaml", f"run.dir={run}"]
            if prepare:
                PREPARED[prepare]([*start, *overriding(overrides[0], recipe=recipe)], run)
            seen = observation.observe([*start, *words], run, {run: "{run}", recipe: "{recipe}"})
            shutil.rmtree(run.parent)
            if anew:
                return seen
            known[name] = seen
        return known[name]

    return observed


def overriding(*texts, recipe):
    """Overrides as words; of a key that is given twice the last counts."""
    words = {}
    for word in (word for text in texts for word in re.split(r" (?=[\w.]+=)", text) if word):
        key = word.split("=", 1)[0]
        words.pop(key, None)
        words[key] = word.replace("{recipe}", str(recipe))
    return list(words.values())


def end_with_damage(words, run):
    """A run that is done, its newest checkpoint damaged."""
    assert cli.main(words) == 0
    part = next(own_checkpoints(run / "checkpoints", run=None)[0][0].path.glob("*.safetensors"))
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 0x40]))


def end_with_fewer_prompts(words, run):
    """A run that is done, of fewer iterations and with the recipe's own prompts."""
    assert cli.main([word for word in words if not word.startswith(("ppo.iterations=", "data.prompts="))]) == 0


PREPARED = {"a damaged newest": end_with_damage, "fewer prompts": end_with_fewer_prompts}
"""What is done with a run's folder before it is observed, with the base's command line."""


def checked(observed, command, case, *, anew=False):
    """The faults of a case."""
    before = observed(command, case.base, prepare=case.prepare, anew=anew)
    return faults(case, before, observed(command, case.base, case.change, prepare=case.prepare, anew=True))


ALL = [pytest.param(command, case, id=ascii(f"{command} {case.change}")[1:90]) for command, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("command", "case"), ALL)
def test_a_key_changes_what_it_says_and_nothing_else(observed, command, case):
    found = checked(observed, command, case)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("command", CASES)
def test_every_key_has_a_case_or_a_reason(command):
    cases = {case.key for case in CASES[command]} | layout_keys(command)
    known = set(keys(command))
    without = {key for key in known if reason(command, key) is not None}
    assert cases <= known, "cases of keys that there are not"
    assert sorted(known - cases - without) == [], "neither a case nor a reason"
    assert sorted(cases & without) == [], "a reason that is no longer needed"


def test_every_reason_is_needed():
    named = [f"{command} {key}" for command in CASES for key in keys(command)]
    assert [pattern for pattern in WITHOUT_CASE if not fnmatch.filter(named, pattern)] == []


@pytest.mark.parametrize("command", CASES)
def test_a_run_without_changes_is_the_same_twice(observed, command):
    assert observed(command)["exit"] == 0
    assert observation.differing(observed(command), observed(command, anew=True)) == set()


def test_a_profile_is_a_trace_with_the_names_of_the_phases(recipe, tmp_path):
    assert cli.main(["ppo", "--config", f"{recipe}/ppo.yaml", f"run.dir={tmp_path / 'run'}", "run.profile_step=1"]) == 0
    (path,) = (tmp_path / "run" / "profiles").iterdir()
    assert path.name == "step_00000001_rank_00000.json.gz"
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    spans = {event["name"]: event for event in events if event.get("ph") == "X"}
    phases = ["reshard", "generate", "score", "update"]
    assert {*phases, "forward and backward", "optimizer step", "aten::addmm"} <= spans.keys()
    starts = [spans[phase]["ts"] for phase in phases]
    assert starts == sorted(starts) and all(spans[phase]["dur"] > 0 for phase in phases)


# Layouts


def check_layouts(folder, runs, command, overrides):
    """Build every run's models, and no more; returns role -> layout for each."""
    found = []
    for number, words in enumerate(overrides):
        seen = {}
        with observation.watched(seen):
            stage = run_stage_of(folder / f"{command}.yaml", [f"run.dir={runs / str(number)}", *words], stop_before=0)
        layouts = {name.split("/")[1]: value for name, value in seen.items() if name.startswith("engine/") and name.endswith("/layout")}
        if command == "ppo":
            layouts["generation"] = str(stage.generator.generator.groups.layout)
        found.append(layouts)
    World.connect().barrier()
    return found


@pytest.mark.parametrize("command", CASES)
def test_every_model_is_laid_out_as_its_own_keys_say(recipe, ranks2, tmp_path, command):
    runs = list(layout_runs(command))
    words = [overriding(" ".join(overrides), recipe=recipe) for overrides, _ in runs]
    for found in ranks2.run(check_layouts, recipe, tmp_path, command, words):
        assert found == [expected for _, expected in runs]


# That these tests see what they are for


def case_of(command, change):
    return next(case for case in CASES[command] if case.change == change)


def test_a_value_model_with_the_policys_rate_is_seen(observed):
    def wrong(stage, number, peak):
        return right(stage, number, stage.config.policy.adam.learning_rate)

    right = ProximalPolicyOptimization.learning_rate
    with mock.patch.object(ProximalPolicyOptimization, "learning_rate", wrong):
        assert "steps/value/rate does not change" in checked(observed, "ppo", case_of("ppo", "value.adam.learning_rate=0.01"), anew=True)


def test_a_demonstration_less_where_text_is_mixed_in_is_seen(observed):
    def wrong(stage):
        size = stage.config.batch_size - bool(stage.config.pretraining_mix)
        with mock.patch.object(stage.order, "take_batch", lambda _: take(size)):
            take = type(stage.order).take_batch.__get__(stage.order)
            return right(stage)

    right = SupervisedFineTuning.next_terms
    with mock.patch.object(SupervisedFineTuning, "next_terms", wrong):
        case = case_of("sft", "pretraining_mix=0.5")
        found = faults(case, observed("sft"), observed("sft", case.change, anew=True))
    assert any(line.startswith("steps/model/model/rows is") for line in found)
