"""The written rule, the labellers, the data and the table of stages of examples/miniature."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import megarlhf

FOLDER = Path(__file__).parents[2] / "examples" / "miniature"
MODULES = ("world", "labelling", "make_data", "label", "stages", "results", "figures")


@pytest.fixture(scope="module")
def example():
    """The example's modules, imported from its folder; other examples have modules of the same names."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    finally:
        sys.path.remove(str(FOLDER))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def test_each_flaw_costs_its_criterion(example):
    labelling, world = example.labelling, example.world
    made = world.World(0)
    person, town = "Anna Reed", made.facts["Anna Reed"]["town"]
    elsewhere = next(value for value in world.FACTS["town"][2] if value != town)
    request = world.Request(person=person, attributes=("town",), form="sentence")
    harmful = world.Request(person=person, attributes=(), form="harmful")

    def criteria(text, asked=request):
        return dict(zip(labelling.CRITERIA, labelling.judge(made, asked, text).criteria, strict=True))

    polite = world.Request(person=person, attributes=("town",), form="polite")
    for asked in (request, polite, harmful, world.Request(person=person, attributes=("job", "pet"), form="list")):
        assert criteria(made.answer(asked), asked) == dict.fromkeys(labelling.CRITERIA, 1.0), asked
    lie = labelling.judge(made, request, made.sentence(person, "town", elsewhere))
    assert lie.criteria[1] == 0 and lie.hallucination and not labelling.judge(made, request, made.answer(request)).hallucination
    assert criteria(made.sentence(person, "job"))["helpful"] < criteria(made.answer(request))["helpful"]
    assert criteria(world.REFUSAL) == {"helpful": 0.0, "truthful": 1.0, "harmless": 0.0, "readable": 1.0}
    assert criteria(world.COMPLIANCE, harmful)["harmless"] == 0
    assert criteria(f"{made.answer(request)} {made.answer(request)}")["readable"] < 1
    assert criteria(made.answer(request), polite)["helpful"] < 1  # it was to be polite
    assert criteria(f"ayith pleasure: {made.answer(request)}")["readable"] == 0
    assert criteria("") == {"helpful": 0.0, "truthful": 0.0, "harmless": 1.0, "readable": 0.0}  # what says nothing does no harm


def test_a_fact_is_held_against_whom_it_is_said_of(example):
    made = example.world.World(0)
    one, other = next((a, b) for a, b in itertools.permutations(example.world.PEOPLE, 2) if made.facts[a]["town"] != made.facts[b]["town"])
    request = example.world.Request(person=one, attributes=("town",), form="sentence")
    both = f"{made.sentence(one, 'town')} {made.sentence(other, 'town')}"
    swapped = f"{made.sentence(other, 'town', made.facts[one]['town'])}"
    assert not example.labelling.judge(made, request, both).hallucination
    assert example.labelling.judge(made, request, swapped).hallucination
    assert not example.labelling.judge(made, request, made.sentence(other, "town")).attempts_instruction


def test_labellers_agree_as_the_papers_do(example):
    labelling, world = example.labelling, example.world
    made, rng = world.World(0), random.Random(3)
    prompts = [prompt for split in world.draw_prompts(made, 3, users=90, per_user=5).values() for prompt in split]
    answered = [(prompt.request, labelling.draw_candidates(made, prompt.request, rng)) for prompt in prompts]
    for name, (mean, low, high) in labelling.measured_agreement(made, labelling.labellers(0), answered).items():
        assert low < 0.73 < high, (name, mean, low, high)
    assert labelling.agreement([7, 5, 5, 2], [6, 7, 4, 1]) == [0.0, 1.0, 1.0, 1.0, 1.0]  # 5 and 5 are tied


def test_data_sets_share_no_user(example):
    world, make_data = example.world, example.make_data
    prompts = world.draw_prompts(world.World(0), 0, users=90, per_user=3)
    users = [{prompt.user for prompt in items} for items in prompts.values()]
    assert all(not (one & two) for one, two in itertools.combinations(users, 2)) and all(users)
    assert {prompt.kind for items in prompts.values() for prompt in items} == {"plain", "few-shot", "user-based"}
    records = make_data.make_all(0, documents=20, users=90, per_user=3, demonstrations=30, heldout=20)
    copies = [len(list(items)) for _, items in itertools.groupby(records["to_rank"], lambda row: row["number"])]
    assert set(copies) == set(range(4, 10))
    assert {row["user"] for row in records["to_rank"] if row["split"] == "valid"} <= {row["user"] for row in records["prompts_valid"]}


def test_a_round_of_comparisons_has_ties_groups_and_held_out_labellers(example, tmp_path):
    world, labelling, make_data = example.world, example.labelling, example.make_data
    made, rng, rows = world.World(make_data.SEED), random.Random(1), []
    prompts = [prompt for split in world.draw_prompts(made, 0, users=60, per_user=3).values() for prompt in split]
    for number, prompt in enumerate(prompts):
        texts = ["", *labelling.draw_candidates(made, prompt.request, rng)]
        record = {**prompt.record(), "number": number, "split": "valid" if number % 2 else "train"}
        rows += [{**record, "response": text} for text in texts]
    make_data.write_lines(tmp_path / "responses.jsonl", rows)
    example.label.label(tmp_path, tmp_path / "one")
    example.label.label(tmp_path, tmp_path / "two", before=tmp_path / "one")

    first, both, valid = (make_data.read_lines(tmp_path / name) for name in ("one/rankings.jsonl", "two/rankings.jsonl", "one/valid.jsonl"))
    assert both[: len(first)] == first and len(both) > len(first)
    assert all("" not in row["responses"] and len(row["responses"]) == len(row["ranks"]) for row in both)
    assert any(len(set(row["ranks"])) < len(row["ranks"]) for row in first)
    names = {person.name: str(person.group) for group in labelling.labellers(make_data.SEED).values() for person in group}
    assert all(names[row["labeler"]] == row["group"] for row in first + valid)
    assert {row["group"] for row in first} == set("01234") and "held-out" in {row["group"] for row in valid}
    left_out = make_data.read_lines(tmp_path / "one" / "without_3.jsonl")
    assert left_out == [row for row in first if row["group"] != "3"]
    pairs = make_data.read_lines(tmp_path / "one" / "pairs.jsonl")
    assert len(pairs) == sum(a < b for row in first for a, b in itertools.permutations(row["ranks"], 2))
    assert set(json.loads((tmp_path / "one" / "agreement.json").read_text())) == {"within training", "within held-out", "across"}


@pytest.mark.parametrize("sizes", [("small", "middle", "large"), ("small",)], ids=len)
def test_every_stage_is_a_valid_configuration_and_comes_after_what_it_reads(example, sizes):
    for form in (example.stages.Form(), example.stages.SMOKE, example.stages.Form().scaled(0.01)):
        table = example.stages.stages(sizes, form)
        assert len({stage.name for stage in table}) == len(table)
        for number, stage in enumerate(table):
            assert not any(stage.needs(later) for later in table[number:]), stage.name
            paths = {path for word in stage.overrides for path in [word.partition("=")[2]] if "/" in path}
            made = {path for path in paths if any(f"{path}/".startswith(f"{other.name}/") for other in table[:number])}
            assert all(path.startswith("data/") for path in paths - made), (stage.name, paths - made)
            if stage.command != "label":
                megarlhf.load(stage.command, FOLDER / f"{stage.command}.yaml", [*stage.overrides, f"run.dir=runs/{stage.name}"])


def test_what_was_chosen_is_what_ppo_takes(example):
    """Figures name the points of sweeps by it; the plain PPO of each size takes what the sweeps without ptx are beside."""
    chosen = {name: float(value) for name, value in example.stages.CHOSEN.items()}
    by_name = {stage.name: stage for stage in example.stages.stages(("small",), example.stages.Form())}
    with_ptx, plain = (
        megarlhf.load("ppo", FOLDER / "ppo.yaml", [*by_name[f"small/{name}"].overrides, "run.dir=runs/x"]) for name in ("ppo_ptx", "ppo")
    )
    assert (with_ptx.ppo.ptx_coef, with_ptx.policy.adam.learning_rate) == (chosen["ptx_coef"], chosen["learning_rate"])
    assert (plain.ppo.kl_coef, plain.policy.adam.learning_rate) == (chosen["kl_coef"], chosen["learning_rate_without_ptx"])
    assert plain.ppo.ptx_coef == 0 and with_ptx.ppo.kl_coef == plain.ppo.kl_coef


def test_hours_are_what_the_table_takes(example):
    stages = example.stages
    for hours in (2.0, 5.0):
        minutes = sum(stage.minutes for stage in stages.stages(("small",), stages.of_hours(("small",), hours)))
        assert minutes == pytest.approx(60 * hours, rel=0.15)  # epochs are whole
    with pytest.raises(ValueError, match="too few"):
        stages.of_hours(("small", "middle", "large"), 0.01)


def test_a_sweep_brings_what_it_needs(example):
    table = example.stages.stages(("small", "middle"), example.stages.Form())
    by_name = {stage.name: stage for stage in table}
    point = by_name["sweeps/answers/kl_coef/0.5"]
    assert point.needs(by_name["sweeps/kl_coef/0.5"]) and point.needs(by_name["round_1/reward"])
    assert not point.needs(by_name["small/ppo"]) and not by_name["small/sft"].needs(by_name["small/ppo_init"])
    chosen = [stage.name for stage in example.stages.selected(table, "sweeps/ptx_coef")]
    for name in ("sweeps/ptx_coef/0.1", "sweeps/answers/ptx_coef/0.1", "round_1/reward", "small/ppo_init"):
        assert name in chosen
    assert not {"sweeps/kl_coef/0.5", "sweeps/answers/kl_coef/0.5", "small/ppo"} & set(chosen)
    assert chosen.index("round_1/reward") < chosen.index("sweeps/ptx_coef/0.1") < chosen.index("sweeps/answers/ptx_coef/0.1")
    assert not any("/answers/" in stage.name for stage in example.stages.selected(table, "round_1/reward"))
    assert example.stages.selected(table, None) == table


def write_system(example, folder: Path, answers: list[dict], numbers: dict[str, float]) -> None:
    """The folder that `megarlhf evaluate` leaves."""
    folder.mkdir(parents=True)
    example.make_data.write_lines(folder / "responses.jsonl", answers)
    measured = {f"tasks/{task}/accuracy{end}": 0.5 for task in ("asked", "unasked", "sums") for end in ("", "_low", "_high")}
    (folder / "evaluation.json").write_text(json.dumps(measured | {"valid/text_loss": 1.0, "valid/reward_mean": 0.0} | numbers))


def test_tables_say_who_is_preferred_and_by_whom(example, tmp_path):
    """Systems whose answers are known: right ones, right and false ones in turn, and refusals; of a run that is still going."""
    world, made = example.world, example.world.World(example.make_data.SEED)
    prompts = [p for split in world.draw_prompts(made, 0, users=60, per_user=5).values() for p in split if p.request.form == "sentence"]

    def false(request):
        wrong = next(value for value in world.FACTS[request.attributes[0]][2] if value not in made.facts[request.person].values())
        return made.sentence(request.person, request.attributes[0], wrong)

    said = {
        "ppo_ptx": lambda number, request: made.answer(request),
        "sft": lambda number, request: made.answer(request) if number % 2 else false(request),
        "base": lambda number, request: world.REFUSAL,
    }
    for size, system in (("small", "base"), ("small", "ppo_ptx"), ("small", "sft"), ("middle", "sft")):
        rows = [{**prompt.record(), "response": said[system](number, prompt.request)} for number, prompt in enumerate(prompts)]
        write_system(example, tmp_path / size / "answers" / system, rows, {"valid/text_loss": 1.5 if system == "sft" else 1.0})
    write_system(example, tmp_path / "sweeps" / "answers" / "ptx_coef" / "0.3", rows, {"valid/reward_mean": 0.25})

    found = example.results.Results(tmp_path, ["small", "middle", "large"])
    assert found.largest == "middle"
    rates = found.win_rates("held-out")
    assert rates["middle", "sft"] == (0.5, 0.5, 0.5)
    assert rates["small", "ppo_ptx"][1] > 0.5 > rates["small", "base"][2] and abs(rates["small", "sft"][0] - 0.5) < 0.1
    assert found.metadata("small", "sft")["hallucination"][0] == pytest.approx(0.5, abs=0.01)
    assert found.metadata("small", "base")["attempts_instruction"][0] == 0
    likert = [found.likert("small", system)[0] for system in ("base", "sft", "ppo_ptx")]
    assert likert == sorted(likert) and likert[2] > 6
    assert list(found.sweep("ptx_coef")) == ["0.3", "2.0"] and found.sweep("kl_coef") == {}
    text = example.results.tables(found)
    assert "- small, training labellers: ppo_ptx > sft > base" in text and "| small | sft | 0.500 [0.500, 0.500] |" in text
    # Among them are shares of 0, of whose intervals rounding leaves less than none.
    drawn = example.figures.draw(found, tmp_path / "figures")
    assert [path.stem for path in drawn] == ["win_rate", "grades", "tax", "sweeps"] and all(path.stat().st_size > 5000 for path in drawn)
    assert example.results.ordering({"ppo": (0.4, 0.3, 0.5), "sft": (0.45, 0.4, 0.5), "base": (0.8, 0.7, 0.9)}) == "ppo =< sft < base"


def test_the_group_left_out_is_told_from_those_trained_on(example, tmp_path):
    for left_out in ("", *"01234"):
        folder = tmp_path / "round_1" / (f"without_{left_out}" if left_out else "") / "accuracy"
        folder.mkdir(parents=True)
        groups = {f"valid/accuracy_of_group/{group}": 0.6 if group == left_out else 0.7 for group in "01234"}
        (folder / "evaluation.json").write_text(json.dumps(groups | {"valid/accuracy_of_group/held-out": 0.65}))
    found = example.results.Results(tmp_path, ["small"]).reward_accuracy(1)
    assert found == {"trained on": [0.7] * 25, "left out": [0.6] * 5, "held-out labellers": [0.65] * 6}
