"""What a run goes on from, and what it may change when it does: each case with the sentence that its user reads."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest

from megarlhf.config import ConfigError
from megarlhf.parallel.groups import World
from megarlhf.runs.agreement import RunError, on_rank_0
from megarlhf.runs.interruption import Interrupted
from megarlhf.storage.checkpoints import read_saved
from tests.distributed.recipe import check_stages, curves, run_stage_of, write_lines


def started(yaml, *overrides, **how):
    """(what a start printed, what it was refused for or stopped by) and the stage."""
    problem, stage = None, None
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            stage = run_stage_of(yaml, overrides, **how)
        except (ConfigError, RunError) as error:
            problem = f"{type(error).__name__}: {error}"
    return printed.getvalue(), problem, stage


@pytest.fixture(scope="module")
def steps(recipe, ranks1, tmp_path_factory):
    """A folder with a pretraining run of four steps, saved at 2 and 4."""
    folder = tmp_path_factory.mktemp("steps")
    ranks1.run(check_stages, recipe, folder, ["base"], ["run.save_every=2", "run.keep_checkpoints=9"])
    return folder


def copied(steps, tmp_path):
    shutil.copytree(steps / "base", tmp_path / "base")
    return tmp_path / "base" / "checkpoints"


# Which folder is meant


def check_start(yaml, *overrides):
    return started(yaml, *overrides)[:2]


@pytest.mark.parametrize("other", ["step_4_good", "step_00000002.bak", "step_9", "step_00000008", "step_99999999x", ".step_00000009"])
def test_only_folders_of_the_runs_own_form_are_checkpoints(recipe, steps, ranks1, tmp_path, other):
    checkpoints = copied(steps, tmp_path)
    shutil.copytree(checkpoints / "step_00000002", checkpoints / other)
    (checkpoints / "notes").mkdir()
    (checkpoints / "notes" / "mine.txt").write_text("mine")
    (checkpoints / "latest").symlink_to("step_00000002")
    (checkpoints / "step_00000077").symlink_to("step_00000002")
    (checkpoints / "step_00000066").symlink_to("nowhere")
    (checkpoints / "step_00000055").write_text("a file")
    more = [f"run.dir={tmp_path / 'base'}", "steps=6", "run.save_every=1", "run.keep_checkpoints=1"]
    printed, refused = ranks1.run(check_start, recipe / "base.yaml", *more)[0]
    assert refused is None and "going on from" in printed and "step_00000004\n" in printed
    left = {path.name for path in checkpoints.iterdir()}
    assert left == {other, "notes", "latest", "step_00000077", "step_00000066", "step_00000055", "step_00000006"}
    assert (checkpoints / "notes" / "mine.txt").read_text() == "mine"
    if other == "step_00000008":
        assert "step_00000008 is left alone: it holds step 2" in printed


def test_a_checkpoint_of_another_run_is_neither_taken_nor_removed(recipe, steps, ranks1, tmp_path):
    checkpoints = copied(steps, tmp_path)
    ranks1.run(check_stages, recipe, tmp_path / "other", ["base"], ["steps=5"])
    shutil.copytree(tmp_path / "other" / "base" / "checkpoints" / "step_00000005", checkpoints / "step_00000005")
    more = [f"run.dir={tmp_path / 'base'}", "steps=6", "run.keep_checkpoints=1"]
    printed, refused = ranks1.run(check_start, recipe / "base.yaml", *more)[0]
    assert refused is None and "step_00000005 is left alone: another run wrote it" in printed and "step_00000004\n" in printed
    assert {path.name for path in checkpoints.iterdir()} == {"step_00000005", "step_00000006"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "best.json is damaged: it is not whole JSON"),
        ('{"step": 2', "best.json is damaged: it is not whole JSON"),
        ('{"checkpoint": "../../../elsewhere"}', "best.json is damaged: it must be"),
        ('{"step": "../../elsewhere"}', "best.json is damaged: it must be"),
        ('{"step": -1}', "best.json is damaged: it must be"),
        ('{"step": 3}', "best.json names step 3, but there is no checkpoint"),
        ("[]", "best.json is damaged: it holds list"),
    ],
)
def test_best_names_a_step_and_nothing_else(recipe, steps, ranks2, tmp_path, content, said):
    checkpoints = copied(steps, tmp_path)
    (checkpoints / "best.json").write_text(content)
    at = [f"run.dir={tmp_path / 'sft'}", f"model.load={tmp_path / 'base'}"]
    answers = ranks2.run(check_start, recipe / "sft.yaml", *at)
    assert all(refused is not None and said in refused for _, refused in answers)  # on every rank: nobody waits


BY_THE_MICROSECOND = (
    '{{ strftime_now("%f") }}{% for message in messages %}{{ message.content }}'
    '{% if message.role == "assistant" %}{{ eos_token }}{% endif %}{% endfor %}'
)


def test_a_template_that_writes_the_date_writes_that_of_the_runs_beginning(recipe, steps, ranks2, tmp_path):
    """Ranks read at different moments, and a resume on another day; a date of seconds would be another one each time."""
    tokenizer = shutil.copy(recipe / "tokenizer.model", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(BY_THE_MICROSECOND)
    turns = [[{"role": "user", "content": word}, {"role": "assistant", "content": "it is"}] for word in "abcdefghijkl"]
    write_lines(tmp_path / "chats.jsonl", [{"messages": messages} for messages in turns])
    files = [f"tokenizer.path={tokenizer}", f"data.train={tmp_path / 'chats.jsonl'}", f"model.load={steps / 'base'}"]
    files += [f"run.dir={tmp_path / 'sft'}", "data.valid=null", "data.pretraining=null", "pretraining_mix=0"]
    more = [*files, "limits.max_prompt_len=24", "limits.max_response_len=16", "run.save_every=1", "run.keep_checkpoints=9"]
    assert [refused for _, refused in ranks2.run(check_start, recipe / "sft.yaml", *more)] == [None, None]
    began = json.loads((tmp_path / "sft" / "run.json").read_text())
    shutil.rmtree(tmp_path / "sft" / "checkpoints" / "step_00000002")
    answers = ranks2.run(check_start, recipe / "sft.yaml", *more)
    assert [refused for _, refused in answers] == [None, None] and "going on from" in answers[0][0]
    assert json.loads((tmp_path / "sft" / "run.json").read_text()) == began
    for other, said in (("2024-07-26T00:00:00.000001", "data.train is not what the run"), ("yesterday", "run.json is damaged")):
        (tmp_path / "sft" / "run.json").write_text(json.dumps(began | {"began": other}))
        assert all(said in refused for _, refused in ranks2.run(check_start, recipe / "sft.yaml", *more))


def check_torn(yaml, file, content, *overrides):
    if World.connect().rank == 0:
        file.write_bytes(content)
    World.connect().barrier()
    return started(yaml, *overrides)[1]


@pytest.mark.parametrize("name", ["run.json", "checkpoints/step_00000004/state.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"", b"{", b"null\n", b"\xff\xfe\x00\n", b"[]\n"])
def test_a_torn_file_is_named_on_every_rank(recipe, steps, ranks2, tmp_path, name, content):
    copied(steps, tmp_path)
    file = tmp_path / "base" / name
    said = ranks2.run(check_torn, recipe / "base.yaml", file, content, f"run.dir={tmp_path / 'base'}", "steps=6")
    if name == "metrics.jsonl" and content in (b"", b"{"):  # no line, and a line without its end: those steps are logged again
        assert said == [None, None]
    else:
        assert said[0] == said[1] and said[0].startswith("ConfigError") and file.name in said[0]


def test_an_empty_configuration_beside_a_run_is_written_again(recipe, steps, ranks2, tmp_path):
    copied(steps, tmp_path)
    file = tmp_path / "base" / "config.yaml"
    assert ranks2.run(check_torn, recipe / "base.yaml", file, b"", f"run.dir={tmp_path / 'base'}", "steps=5") == [None, None]
    assert "steps: 5" in file.read_text()


def damage(path):
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])


@pytest.mark.parametrize("how", ["flipped", "missing part", "missing state"])
def test_a_damaged_checkpoint_is_refused_or_passed_over_but_never_in_silence(recipe, steps, ranks2, tmp_path, how):
    checkpoints = copied(steps, tmp_path)
    part, state = checkpoints / "step_00000004" / "part_00000.safetensors", checkpoints / "step_00000004" / "state.json"
    if how == "flipped":
        damage(part)
    else:
        (part if how == "missing part" else state).unlink()
    more = [f"run.dir={tmp_path / 'base'}", "steps=6"]
    (_, refused), (_, other) = ranks2.run(check_start, recipe / "base.yaml", *more)
    assert refused == other and "step_00000004" in refused and "run.resume: newest_good, to go on from the one before" in refused
    (printed, refused), _ = ranks2.run(check_start, recipe / "base.yaml", *more, "run.resume=newest_good")
    assert refused is None and "step_00000004" in printed and "left alone" in printed and "step_00000002\n" in printed
    assert [line["step"] for line in curves(tmp_path / "base")] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_source_is_found_before_anything_is_built(recipe, steps, ranks2, tmp_path):
    checkpoints = copied(steps, tmp_path)
    damage(checkpoints / "step_00000004" / "part_00000.safetensors")
    at = [f"run.dir={tmp_path / 'sft'}", f"model.load={tmp_path / 'base'}"]
    answers = ranks2.run(check_start, recipe / "sft.yaml", *at)
    assert all("part_00000.safetensors is damaged: its content is not what was written" in refused for _, refused in answers)
    assert not (tmp_path / "sft").exists()


# What may change

CHANGES = {
    "kl_coef": (["ppo.kl_coef=5.0", "ppo.adaptive_kl=null"], "changed since then: ppo.kl_coef 0.02 -> 5.0", {"rollout/kl_coef": 5.0}),
    "kl_coef that is adapted": (["ppo.kl_coef=5.0"], "ppo.kl_coef 0.02 -> 5.0: it has been adapted since", None),
    "a section from null": (
        ["value.parallel={tp: 1}"],
        'changed since then: value.parallel null -> {tp: 1, pp: 1, virtual_pp: 1, sequence_parallel: false}',
        {},
    ),
    "a section to null": (["ppo.adaptive_kl=null"], "changed since then: ppo.adaptive_kl {target: 0.1, horizon: 40} -> null", {}),
    "no text": (["ppo.ptx_coef=0"], "changed since then: ppo.ptx_coef 2.0 -> 0.0", {"ptx/loss": None}),
    "learning rate": (["value.adam.learning_rate=0.5"], "changed since then: value.adam.learning_rate 0.003 -> 0.5", {}),
    "sampling": (["generation.sampling.temperature=0.7"], "changed since then: generation.sampling.temperature 1.0 -> 0.7", {}),
    "seed": (["run.seed=2"], "run.seed is 2, but the run began with 1", None),
    "architecture": (["value.load=null", "value.architecture={preset: gpt3-125m}"], "value.architecture null -> ", None),
    "source": (["reference.load={folder}/runs/base"], "reference: load {folder}/runs/base is now", None),
    "source of what is trained": (["policy.load={folder}/runs/base"], "policy: load {folder}/runs/base is now", None),
    "the same source by another name": (["reference.load={folder}/runs/sft/checkpoints/step_00000004"], None, {}),
    "precision": (["policy.precision=bf16"], 'changed since then: policy.precision "fp32" -> "bf16"', {}),
}


def check_change(folder, run, overrides):
    printed, problem, _ = started(folder / "ppo.yaml", f"run.dir={run}", "ppo.iterations=3", *overrides)
    return printed, problem


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_applied_and_said_or_refused(recipe, ranks1, tmp_path, name):
    overrides, said, metrics = CHANGES[name]
    shutil.copytree(recipe / "runs" / "ppo", tmp_path / "ppo")
    overrides = [override.replace("{folder}", str(recipe)) for override in overrides]
    printed, refused = ranks1.run(check_change, recipe, tmp_path / "ppo", overrides)[0]
    said = said and said.replace("{folder}", str(recipe))
    if metrics is None:
        assert refused is not None and said in refused
        return
    assert refused is None and (said is None or said in printed)
    last = curves(tmp_path / "ppo")[-1]
    assert last["step"] == 3
    for metric, value in metrics.items():
        assert last.get(metric) == value


def check_text_comes_in(folder, run):
    """A plain PPO run that takes text in at its resume."""
    plain = [f"run.dir={run}", "ppo.ptx_coef=0", "data.pretraining=null"]
    started(folder / "ppo.yaml", *plain, "ppo.iterations=1")
    return started(folder / "ppo.yaml", f"run.dir={run}", "ppo.iterations=2", "ppo.ptx_coef=2.0")[:2]


def test_text_may_come_in_later(recipe, ranks1, tmp_path):
    printed, refused = ranks1.run(check_text_comes_in, recipe, tmp_path / "ppo")[0]
    assert refused is None and "changed since then: ppo.ptx_coef 0.0 -> 2.0" in printed
    assert "changed since then: data.pretraining null -> {prefix:" in printed or "data.pretraining null -> {valid_prefix" in printed
    assert "ptx/loss" in curves(tmp_path / "ppo")[-1]


@pytest.mark.parametrize(("override", "said"), [
    ("select_by=valid_loss", 'select_by is "valid_loss", but the run began with "last"'),
    ("batch_size=4", "batch_size is 4, but the run began with 6"),
])  # fmt: skip
def test_what_sft_keeps(recipe, ranks1, tmp_path, override, said):
    shutil.copytree(recipe / "runs" / "sft", tmp_path / "sft")
    more = [f"run.dir={tmp_path / 'sft'}", "epochs=2", "run.eval_every=1", override]
    assert said in ranks1.run(check_start, recipe / "sft.yaml", *more)[0][1]


def check_moving_source(folder, tmp):
    """A reward run that goes on while a PPO run that took it is interrupted."""
    reward, run = ["batch_size=6", f"run.dir={tmp / 'reward'}", "epochs=1", "run.keep_checkpoints=9"], f"run.dir={tmp / 'ppo'}"
    models = [f"reward.load={tmp / 'reward'}", f"value.load={tmp / 'reward'}"]
    started(folder / "reward.yaml", *reward)
    started(folder / "ppo.yaml", run, *models, "ppo.iterations=2")
    whole = curves(tmp / "ppo")
    shutil.rmtree(tmp / "ppo")
    started(folder / "ppo.yaml", run, *models, "ppo.iterations=2", "run.save_every=1", stop_before=1)
    started(folder / "reward.yaml", *reward[:-2], "epochs=2", "run.keep_checkpoints=9")
    assert len(list((tmp / "reward" / "checkpoints").iterdir())) == 2
    resumed = started(folder / "ppo.yaml", run, *models, "ppo.iterations=2")
    return whole, curves(tmp / "ppo"), resumed[1]


def test_a_resumed_run_uses_the_models_that_it_began_with(recipe, ranks1, tmp_path):
    whole, resumed, refused = ranks1.run(check_moving_source, recipe, tmp_path)[0]
    assert refused is None and resumed == whole


def check_mix_comes_in(folder, run):
    """SFT without text that takes text in at its resume, and lets it go again."""
    at = [f"run.dir={run}", "run.save_every=1"]
    started(folder / "sft.yaml", *at, "epochs=1", "pretraining_mix=0")
    return [started(folder / "sft.yaml", *at, "epochs=2")[0], started(folder / "sft.yaml", *at, "epochs=3", "pretraining_mix=0")[0]]


def test_a_mix_may_come_in_and_go(recipe, ranks1, tmp_path):
    came, went = ranks1.run(check_mix_comes_in, recipe, tmp_path / "sft")[0]
    assert "changed since then: pretraining_mix 0.0 -> 0.25" in came and "changed since then: pretraining_mix 0.25 -> 0.0" in went
    mixed = ["pretraining/loss_share" in line for line in curves(tmp_path / "sft")]
    third = len(mixed) // 3
    assert mixed == [False] * third + [True] * third + [False] * third


# Which model of a checkpoint


def check_roles(folder, tmp, cases):
    said = []
    for number, overrides in enumerate(cases):
        _, refused, stage = started(folder / "ppo.yaml", f"run.dir={tmp / str(number)}", *overrides, stop_before=0)
        said.append(refused or [note for note in stage.notes if note.startswith(("policy", "value"))])
    return said


def test_a_role_takes_its_own_model_or_asks(recipe, ranks1, tmp_path):
    ppo = recipe / "runs" / "ppo"
    cases = [
        [f"value.load={ppo}", f"policy.load={ppo}"],
        [f"reward.load={ppo}"],
        [f"reward.load={ppo}", "reward.load_model=value"],
        [f"value.load={recipe}/runs/sft"],
    ]
    own, asked, told, only = ranks1.run(check_roles, recipe, tmp_path, cases)[0]
    assert own[0].endswith("(policy, moving average)") and own[1].endswith("(value)")
    assert "reward: load_model must name one of policy, value" in asked and "none of them is named reward" in asked
    assert isinstance(told, list) and only[1].endswith("(model), with a new scalar head")


# Signals, clocks and locks


def check_signal(folder, tmp, number):
    """A signal in the second step, on one rank only; then the run goes on."""
    from megarlhf.trainers.pretrain import Pretraining

    step, at = Pretraining.step, [f"run.dir={tmp / 'base'}"]

    def signalled(self, index):
        if index == 1 and World.connect().rank == 1:
            os.kill(os.getpid(), number)
        return step(self, index)

    before = signal.getsignal(number)
    with mock.patch.object(Pretraining, "step", signalled), pytest.raises(Interrupted) as stopped:
        run_stage_of(folder / "base.yaml", at)
    assert signal.getsignal(number) is before
    names = sorted(path.name for path in (tmp / "base" / "checkpoints").iterdir())
    run_stage_of(folder / "base.yaml", at)
    return str(stopped.value), stopped.value.exit_status, names


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_saves_at_the_next_safe_point_and_the_run_goes_on(recipe, ranks2, tmp_path, name, status):
    answers = ranks2.run(check_signal, recipe, tmp_path, getattr(signal, name))
    assert answers == [(f"stopped by {name} after step 2 of 4; start it again to go on", status, ["step_00000002"])] * 2
    assert curves(tmp_path / "base") == curves(recipe / "runs" / "base")[:0] + curves(tmp_path / "base")
    assert [line["step"] for line in curves(tmp_path / "base")] == [1, 2, 3, 4]


def test_a_clock_saves_where_no_number_of_steps_does(recipe, ranks2, tmp_path):
    at = [f"run.dir={tmp_path / 'base'}", "run.keep_checkpoints=9"]
    ranks2.run(check_stages, recipe, tmp_path, ["base"], [*at, "run.save_minutes=0"])
    assert len(list((tmp_path / "base" / "checkpoints").iterdir())) == 4
    at = [f"run.dir={tmp_path / 'other'}", "run.save_minutes=null"]
    ranks2.run(check_stages, recipe, tmp_path, ["base"], at)
    assert len(list((tmp_path / "other" / "checkpoints").iterdir())) == 1


def check_clock(folder, tmp):
    """Rank 0's clock is two minutes on after the second step; the other's stands still."""
    from megarlhf.runs import loop
    from megarlhf.trainers.pretrain import Pretraining

    step, done, world = Pretraining.step, [], World.connect()

    def counted(self, index):
        done.append(index)
        return step(self, index)

    clock = mock.Mock(monotonic=lambda: time.monotonic() + (120 if len(done) == 2 and world.rank == 0 else 0))
    with mock.patch.object(Pretraining, "step", counted), mock.patch.object(loop, "time", clock):
        return started(folder / "base.yaml", f"run.dir={tmp / 'base'}", "run.stop_after_minutes=2")[1]


def test_a_run_whose_time_is_over_saves_stops_and_goes_on(recipe, ranks2, tmp_path):
    stopped = "Interrupted: stopped by run.stop_after_minutes 2 after step 2 of 4; start it again to go on"
    assert ranks2.run(check_clock, recipe, tmp_path) == [stopped] * 2
    assert [path.name for path in (tmp_path / "base" / "checkpoints").iterdir()] == ["step_00000002"]
    assert ranks2.run(check_clock, recipe, tmp_path) == [None] * 2, "it began anew, and its last two steps are within its time"
    ranks2.run(check_stages, recipe, tmp_path, ["base"], [f"run.dir={tmp_path / 'whole'}"])
    assert curves(tmp_path / "base") == curves(tmp_path / "whole")


def check_alerts(folder, tmp):
    """A loss that jumps in the last step, with a resume before it; what was said then, and each step's alerts."""
    from megarlhf.trainers.pretrain import Pretraining

    step, losses = Pretraining.step, (1.0, 1.1, 1.2, 9.0)
    at = [f"run.dir={tmp / 'base'}", "run.alert_window=3", "run.save_every=1"]
    with mock.patch.object(Pretraining, "step", lambda self, number: step(self, number) | {"model/loss": losses[number]}):
        assert started(folder / "base.yaml", *at, stop_before=3)[1] is None
        printed = started(folder / "base.yaml", *at)[0]
    return printed, [line["alert/loss"] for line in curves(tmp / "base")]


def test_an_alert_is_measured_by_what_was_before_a_resume(recipe, ranks1, tmp_path):
    printed, alerts = ranks1.run(check_alerts, recipe, tmp_path)[0]
    assert alerts == [0, 0, 0, 1]
    assert "step 4: alert: model/loss 9 is 53.3 deviations above 1.1, the median of the 3 before" in printed


SCRIPT = """
from megarlhf import cli
cli.main({arguments})
"""


def test_a_second_start_in_a_folder_is_refused_and_a_crash_leaves_no_lock(recipe, tmp_path):
    """Also: a script without a main guard trains and saves."""
    (tmp_path / "script.py").write_text(
        SCRIPT.format(arguments=["pretrain", "--config", str(recipe / "base.yaml"), f"run.dir={tmp_path / 'run'}", "steps=100000"])
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(tmp_path / "script.py")]
    first = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists() and first.poll() is None:
            time.sleep(0.05)
        second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert f"{tmp_path / 'run'} is in use by process {first.pid} on " in second.stderr and "Traceback" not in second.stderr
        first.send_signal(signal.SIGTERM)
        said = first.communicate(timeout=120)[1]
        assert "stopped by SIGTERM after step" in said
    finally:
        first.kill()
        first.wait()
    third = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    for line in third.stderr:
        if "going on from" in line:
            break
    third.kill()
    assert "going on from" in line and third.wait() == -signal.SIGKILL
    left = subprocess.run(["pgrep", "-f", str(tmp_path / "script.py")], capture_output=True, text=True)
    assert left.stdout == "", "processes that outlive the run"
    fourth = subprocess.run([*command[:1], "-c", "from megarlhf.runs.lock import FolderLock; import pathlib, sys; "
                             "FolderLock(pathlib.Path(sys.argv[1]))", str(tmp_path / "run")], env=env)  # fmt: skip
    assert fourth.returncode == 0


def check_exchange():
    world = World.connect()

    def fail(error):
        raise error

    said = [on_rank_0(world, lambda: world.rank)]
    errors = (ValueError("wrong"), OSError(28, "No space left on device", "file"), KeyError("bug"), AssertionError("bug"), MemoryError())
    for error in errors:
        try:
            on_rank_0(world, fail, error)
        except Exception as raised:
            said.append(f"{type(raised).__name__}: {raised}")
    return said


def test_whatever_fails_on_rank_0_fails_on_every_rank(ranks2):
    first, second = ranks2.run(check_exchange)
    assert first[:3] == second[:3] == [0, "ConfigError: wrong", "RunError: file: No space left on device"]
    assert first[3:] == ["KeyError: 'bug'", "AssertionError: bug", "MemoryError: "]
    assert second[3:] == ["RunError: rank 0: KeyError('bug')", "RunError: rank 0: AssertionError('bug')", "RunError: rank 0: MemoryError()"]


# Divergence

DIVERGES = {
    "fp32": ["model.adam.learning_rate=1e30", "steps=20"],
    "few steps": ["model.adam.learning_rate=1e30", "steps=3"],
    "bf16": ["model.adam.learning_rate=1e30", "model.precision=bf16", "steps=20"],
    "fp16": ["model.adam.learning_rate=1e4", "model.precision=fp16", "steps=200"],
    "no clipping": ["model.adam={learning_rate: 1e20, clip_grad: null, eps: 1e-5}", "steps=20"],
}


@pytest.mark.parametrize("name", DIVERGES)
def test_a_diverged_run_stops_and_saves_nothing_of_it(recipe, ranks2, tmp_path, name):
    at = [f"run.dir={tmp_path / 'base'}", "schedule.shape=constant", "run.save_every=1", "run.max_skipped_steps=3", *DIVERGES[name]]
    answers = ranks2.run(check_start, recipe / "base.yaml", *at)
    assert answers[0][1] == answers[1][1] and answers[0][1].startswith("RunError: step ")
    assert "it has diverged" in answers[0][1] or "are not finite; they are not saved" in answers[0][1]
    assert "done:" not in answers[0][0]


def check_best(folder, tmp):
    """SFT whose evaluations are not finite from the second on."""
    from megarlhf.trainers import sft

    losses = iter([1.0, float("nan"), float("-inf"), 2.0])
    with mock.patch.object(sft, "language_model_loss_on", lambda *args: next(losses)):
        return started(folder / "sft.yaml", f"run.dir={tmp / 'sft'}", "select_by=valid_loss", "run.eval_every=1")[1]


def test_a_number_that_is_not_finite_is_never_the_best(recipe, ranks1, tmp_path):
    assert ranks1.run(check_best, recipe, tmp_path)[0] is None
    assert json.loads((tmp_path / "sft" / "checkpoints" / "best.json").read_text()) == {"step": 1}


def check_best_again(folder, tmp, losses, *overrides):
    """What an SFT of four steps says whose evaluations give these losses."""
    from megarlhf.trainers import sft

    given = iter(losses)
    how = ["select_by=valid_loss", "run.eval_every=1", "run.save_every=1", "run.keep_checkpoints=9", *overrides]
    with mock.patch.object(sft, "language_model_loss_on", lambda *args: next(given)):
        return started(folder / "sft.yaml", f"run.dir={tmp / 'sft'}", *how)[:2]


def test_steps_that_come_again_take_their_best_checkpoint_with_them(recipe, ranks1, tmp_path):
    """Step 3 was the best and is gone; as it comes again it is worse than step 2 was, which the run had forgotten."""
    checkpoints = tmp_path / "sft" / "checkpoints"
    assert ranks1.run(check_best_again, recipe, tmp_path, [3.0, 2.0, 1.0, 5.0])[0][1] is None
    assert json.loads((checkpoints / "best.json").read_text()) == {"step": 3}
    state = read_saved(checkpoints / "step_00000002").state
    assert (state["best_step"], state["total_steps"]) == (2, 4)
    for step in (3, 4):
        shutil.rmtree(checkpoints / f"step_0000000{step}")
    said, problem = ranks1.run(check_best_again, recipe, tmp_path, [2.5, 4.0])[0]
    assert problem is None and "the best checkpoint was step 3, which comes again: it is step 2, as it was then" in said
    assert (checkpoints / "step_00000003").is_dir() and json.loads((checkpoints / "best.json").read_text()) == {"step": 2}


def check_other_data(folder, tmp):
    """The same number of records with other content, and a tokenizer of the same size."""
    lines = (folder / "demonstrations.jsonl").read_text().splitlines()
    write_lines(tmp / "other.jsonl", [json.loads(line.replace("It is", "That is")) for line in lines])
    cases = (["data.train=" + str(tmp / "other.jsonl")], ["data.train=" + str(folder / "demonstrations.jsonl")])
    return [started(folder / "sft.yaml", f"run.dir={tmp / 'sft'}", "epochs=2", *case)[1] for case in cases]


def test_other_data_of_the_same_size_is_refused_at_a_resume(recipe, ranks1, tmp_path):
    shutil.copytree(recipe / "runs" / "sft", tmp_path / "sft")
    refused, accepted = ranks1.run(check_other_data, recipe, tmp_path)[0]
    assert accepted is None and "data.train" in refused and "is not what the run in" in refused
