"""launcher/: what each script would start, in every way of starting it, and what it refuses; all shell scripts under shellcheck."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from megarlhf.config import COMMANDS, load_stage_config
from megarlhf.config.loader import doubts
from megarlhf.models.architecture import make_architecture
from megarlhf.parallel.layout import ParallelLayout

ROOT = Path(__file__).parents[2]
STAGES = sorted((ROOT / "launcher").glob("*_*.sh"))
JOBS = sorted((ROOT / "launcher" / "slurm").glob("*.sbatch"))
SHELL = sorted(
    [path for folder in ("launcher", "examples", "tests", "tools") for end in ("*.sh", "*.sbatch") for path in (ROOT / folder).rglob(end)]
    + [ROOT / ".ci" / "run"]
)
NUM_NODES = {"ppo_1.3b": 1, "ppo_6b": 4, "ppo_175b": 16, "sft_1.3b": 1, "sft_6b": 1, "sft_175b": 8}
FOLDERS = {"1.3b": "1.3b_single_node", "6b": "6b", "175b": "175b"}
ODD_WORDS = ["run.dir=a b/$HOME", "data.train='x'\"y\"", "tokenizer.path=*.model", "run.sinks=[jsonl, wandb]", "--fresh"]
TORCHRUN = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "128", "MASTER_ADDR": "node0", "MASTER_PORT": "29501"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "128", "SLURM_STEP_NUM_NODES": "16"}
MET = {"MASTER_ADDR": "node0", "MASTER_PORT": "29501"}
NODE = {"NNODES": "16", "NODE_RANK": "3", "GPUS_PER_NODE": "8", **MET}
PLACES = re.compile(r"RANK|LOCAL_RANK|WORLD_SIZE|(SLURM|MASTER|NCCL|TORCH)_.*|NNODES|NODE_RANK|GPUS_PER_NODE|CONFIG|CUDA_.*|IMAGE|MOUNTS")


def run(script, *words, environment=None, path=None):
    """(exit status, stdout, stderr) of a script started elsewhere than in the project, with no variable but those given."""
    env = {name: value for name, value in os.environ.items() if not PLACES.fullmatch(name)}
    env |= {"PYTHON": sys.executable, "PLAN_FOR": "none", **(environment or {})}
    env["PATH"] = f"{path}:{env['PATH']}" if path else env["PATH"]
    done = subprocess.run(["bash", str(script), *words], capture_output=True, text=True, env=env, cwd=ROOT / "tests", timeout=60)
    return done.returncode, done.stdout, done.stderr


def command_of(stdout):
    """The words of the command, the last line of a dry run."""
    return shlex.split(stdout.splitlines()[-1])


def program_of(path):
    """What each rank runs: the script's stage with its configuration."""
    stage, size = path.stem.split("_")
    config = ROOT / "examples" / FOLDERS[size] / f"{stage}.yaml"
    assert config.is_file() and stage in COMMANDS
    return ["-m", "megarlhf", stage, "--config", str(config)]


def test_there_is_a_script_for_every_stage_and_size():
    assert {path.stem for path in STAGES} == {f"{stage}_{size}" for stage in ("sft", "reward", "ppo") for size in FOLDERS}
    assert {path.stem for path in JOBS} == {"one_node", "many_nodes", "pyxis", "apptainer"}


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_each_script_shows_what_it_starts_on_a_node_in_a_rank_and_in_a_step(path):
    nodes = NUM_NODES.get(path.stem, 1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
    alone = ["8", "--standalone"]
    of_several = ["8", "--nnodes", str(nodes), "--node_rank", "0", "--master_addr", "FIRST_NODE", "--master_port", "29500"]
    status, shown, said = run(path, "--dry-run", *ODD_WORDS)
    assert status == 0 and command_of(shown) == [*torchrun, *(alone if nodes == 1 else of_several), *program_of(path), *ODD_WORDS]
    assert ("FIRST_NODE is assumed" in said) == (nodes > 1) and "GPUS_PER_NODE=8 is assumed" in said

    status, shown, said = run(path, *ODD_WORDS, "--dry-run", environment=NODE)
    assert (status, said) == (0, "")
    node3 = ["8", "--nnodes", "16", "--node_rank", "3", "--master_addr", "node0", "--master_port", "29501"]
    assert command_of(shown) == [*torchrun, *node3, *program_of(path), *ODD_WORDS]

    for way in (TORCHRUN, STEP | MET):
        status, shown, said = run(path, "--dry-run", *ODD_WORDS, environment=way)
        assert (status, said) == (0, "") and command_of(shown) == [sys.executable, *program_of(path), *ODD_WORDS]


@pytest.mark.parametrize("word", ODD_WORDS)
def test_what_is_shown_is_what_runs(word, tmp_path):
    """The printed lines, run by a shell, and the script itself give the program the same words and the same environment."""
    python = tmp_path / "python of mine"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nenv | grep -E "^(NCCL|CUDA|OMP|PYTHONPATH|TORCH|PYTORCH)" | sort\n')
    python.chmod(0o755)
    environment = NODE | {"PYTHON": str(python), "NCCL_DEBUG": "INFO $x", "PYTHONPATH": "/of/mine"}
    _, shown, _ = run(STAGES[0], "--dry-run", word, environment=environment)
    script = tmp_path / "shown.sh"
    script.write_text(shown)
    assert run(script) == run(STAGES[0], word, environment=environment)
    assert word in run(script)[1].splitlines() and "NCCL_DEBUG=INFO $x" in shown.replace("\\", "")


def test_a_dry_run_plans_for_the_nodes_that_it_knows(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 1\n')
    python.chmod(0o755)
    environment = NODE | {"PYTHON": str(python), "PLAN_FOR": "h200"}
    status, shown, said = run(ROOT / "launcher/ppo_175b.sh", "--dry-run", "--fresh", "run.seed=2", environment=environment)
    config = str(ROOT / "examples/175b/ppo.yaml")
    plan = ["--config", config, "--nodes", "16", "--gpus-per-node", "8", "--gpu", "h200", "run.seed=2"]
    assert status == 0 and said.splitlines() == ["-m", "megarlhf", "plan", *plan] and command_of(shown)[-2:] == ["--fresh", "run.seed=2"]
    step = STEP | MET | {"SLURM_PROCID": "0", "PYTHON": str(python), "PLAN_FOR": "h200"}
    said = run(ROOT / "launcher/ppo_175b.sh", "--dry-run", "run.seed=2", environment=step)[2]
    assert said.splitlines() == ["-m", "megarlhf", "plan", *plan]


def test_one_task_per_node_starts_torchrun_there():
    per_node = STEP | MET | {"SLURM_STEP_NUM_TASKS": "16", "SLURM_NODEID": "9", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    status, shown, said = run(ROOT / "launcher/ppo_175b.sh", "--dry-run", environment=per_node)
    assert (status, said) == (0, "")
    assert shlex.join(command_of(shown)[3:11]) == "--nproc_per_node 4 --nnodes 16 --node_rank 9 --master_addr node0"
    of_slurm = per_node | {"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "6"}
    assert command_of(run(ROOT / "launcher/ppo_175b.sh", "--dry-run", environment=of_slurm)[1])[3:5] == ["--nproc_per_node", "6"]
    status, shown, _ = run(ROOT / "launcher/ppo_175b.sh", "--dry-run", environment=per_node | {"GPUS_PER_NODE": "1"})
    assert status == 0 and command_of(shown)[1:4] == ["-m", "megarlhf", "ppo"], "with one GPU per node the task is the rank"


def test_own_config_and_settings_are_kept(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("stage: ppo\n")
    environment = {"CONFIG": str(config), "NNODES": "1", "GPUS_PER_NODE": "2", "NCCL_NVLS_ENABLE": "1"}
    status, shown, _ = run(ROOT / "launcher/ppo_6b.sh", "--dry-run", environment=environment)
    assert status == 0 and command_of(shown)[-2:] == ["--config", str(config)] and "--standalone" in shown
    assert "export NCCL_NVLS_ENABLE=1\n" in shown and "export NCCL_GRAPH_REGISTER=0\n" in shown and f"export PYTHONPATH={ROOT}" in shown


REFUSED = [
    ({}, "GPUS_PER_NODE is not set: no GPU was found here"),
    ({"GPUS_PER_NODE": "eight"}, "GPUS_PER_NODE is 'eight'; it must be a whole number"),
    ({"GPUS_PER_NODE": "8"}, "NODE_RANK is not set: the run has 16 nodes"),
    ({"GPUS_PER_NODE": "8", "NNODES": "2x", "NODE_RANK": "0"}, "NNODES is '2x'; it must be a whole number"),
    ({"GPUS_PER_NODE": "8", "NODE_RANK": "0"}, "MASTER_ADDR is not set: the run has 16 nodes"),
    (NODE | {"NODE_RANK": "16"}, "NODE_RANK is 16 and NNODES is 16: nodes count from 0"),
    (NODE | {"NODE_RANK": "-1"}, "NODE_RANK is '-1'; it must be a whole number"),
    (NODE | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'; it must be a whole number"),
    (NODE | {"MASTER_PORT": "99999"}, "MASTER_PORT is 99999; it must be from 1 to 65535"),
    (NODE | {"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE is 0; it must be from 1 to"),
    (NODE | {"NNODES": "0"}, "NNODES is 0; it must be from 1 to"),
    (NODE | {"PLAN_FOR": "b200"}, "PLAN_FOR is 'b200'; it must be a100-40gb, a100-80gb, h100-80gb, h200 or none"),
    (NODE | {"PYTHON": "false"}, "false has no torch: set PYTHON to the interpreter of megarlhf's environment"),
    ({"RANK": "3", "WORLD_SIZE": "16"}, "LOCAL_RANK is not set: torchrun sets it for each rank"),
    ({"LOCAL_RANK": "3"}, "RANK is not set: torchrun sets it for each rank"),
    (STEP, "MASTER_ADDR is not set: srun's tasks find one another there"),
    ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "16", "SLURM_PROCID": "0"}, "this is one process of job 7 with 16 nodes"),
    (NODE | {"CONFIG": "/nowhere.yaml"}, "there is no configuration /nowhere.yaml"),
    (NODE | {"PYTHON": "no-such-python"}, "there is no interpreter no-such-python: set PYTHON"),
]


@pytest.mark.parametrize(("environment", "sentence"), REFUSED)
def test_what_makes_no_sense_is_refused_in_words(environment, sentence):
    status, shown, said = run(ROOT / "launcher/ppo_175b.sh", environment=environment)
    assert (status, shown) == (2, "") and said.startswith(f"launcher/ppo_175b.sh: {sentence}") and len(said.splitlines()) == 1


def test_help_is_the_documentation():
    status, shown, _ = run(ROOT / "launcher/sft_6b.sh", "--help")
    assert status == 0
    for name in ("CONFIG", "PYTHON", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GPUS_PER_NODE", "PLAN_FOR"):
        assert re.search(rf"^  {name} ", shown, re.MULTILINE), name


def options_of(path):
    """The #SBATCH lines of a script, as a dict."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_each_job_has_ranks_as_tasks_is_warned_and_requeued(path):
    options = options_of(path)
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["signal"].startswith("USR1@") and options["requeue"] == "" and options["open-mode"] == "append"
    assert (options["nodes"] == "1") == (path.stem == "one_node")


STEPS = {
    "one_node": ["bash"],
    "many_nodes": ["bash"],
    "pyxis": [
        "--container-image=/of/mine", "--no-container-mount-home", f"--container-mounts={ROOT}:{ROOT},/data:/data",
        f"--container-workdir={ROOT}", "bash",
    ],
    "apptainer": ["apptainer", "exec", "--nv", "--no-home", "--bind", f"{ROOT}:{ROOT},/data:/data", "--pwd", str(ROOT), "/of/mine", "bash"],
}  # fmt: skip
CONTAINER = {"IMAGE": "/of/mine", "MOUNTS": "/data:/data", "MEGARLHF_HOME": str(ROOT)}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_each_job_shows_its_step_and_its_ranks(path):
    status, shown, said = run(path, "launcher/ppo_175b.sh", *ODD_WORDS, "--dry-run", environment=CONTAINER)
    assert (status, said) == (0, "")
    meeting, step, about, *_ = shown.splitlines()
    assert meeting == "export MASTER_ADDR=FIRST_NODE MASTER_PORT=20000"
    assert shlex.split(step)[:4] == ["srun", "--label", "--kill-on-bad-exit=0", "--wait=300"]
    assert shlex.split(step)[4:] == [*STEPS[path.stem], "launcher/ppo_175b.sh", *ODD_WORDS]
    assert about == f"# rank 0 of {int(options_of(path)['nodes']) * 8}:"
    assert command_of(shown) == [sys.executable, *program_of(ROOT / "launcher/ppo_175b.sh"), *ODD_WORDS]


FAKES = {
    "scontrol": """case "$1 $2" in
'show hostnames') printf 'gpu07\\ngpu08\\n' ;;
'--oneliner show') echo "NodeName=$4 Arch=x86_64 NodeAddr=10.0.0.7 Version=22" ;;
*) echo "scontrol $*" ;;
esac""",
    "srun": """echo "srun $MASTER_ADDR $MASTER_PORT" "$@"
if [ "$1" = --overlap ]; then exit "$FAKE_ANSWER"; else exit "$FAKE_STATUS"; fi""",
}


@pytest.fixture
def slurm(tmp_path):
    """A folder with programs in the place of Slurm's."""
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


ENDS = [(0, "lost"), (1, "there"), (1, "lost"), (2, "lost"), (75, "there"), (130, "there"), (137, "lost")]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
@pytest.mark.parametrize(("ended", "nodes"), ENDS)
def test_a_job_meets_at_its_first_node_and_goes_into_the_queue_again_after_75_or_the_loss_of_a_node(path, ended, nodes, slurm):
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NNODES": "2", "SLURM_NTASKS": "16"}
    environment = CONTAINER | job | {"FAKE_STATUS": str(ended), "FAKE_ANSWER": str(int(nodes == "lost"))}
    status, shown, said = run(path, "launcher/ppo_6b.sh", "a=b c", environment=environment, path=slurm)
    assert (status, said) == (ended, "")
    assert shown.splitlines()[0].startswith("srun 10.0.0.7 23456 --label") and shown.splitlines()[0].endswith("launcher/ppo_6b.sh a=b c")
    assert ("scontrol requeue 123456" in shown) == (ended == 75 or (nodes == "lost" and ended not in (0, 2)))
    assert ("a node of it does not answer" in shown) == (nodes == "lost" and ended not in (0, 2))


def test_a_batch_script_says_how_it_is_submitted():
    assert run(JOBS[0], environment=CONTAINER)[::2] == (2, f"usage: sbatch {JOBS[0]} launcher/STAGE_SIZE.sh [--dry-run] [key=value ...]\n")
    status, _, said = run(JOBS[0], "launcher/ppo_6b.sh", environment=CONTAINER)
    assert status == 2 and "submit it with sbatch" in said
    status, _, said = run(JOBS[0], "launcher/ppo_7b.sh", "--dry-run", environment=CONTAINER)
    assert status == 2 and f"there is no launcher launcher/ppo_7b.sh in {ROOT}" in said
    status, _, said = run(JOBS[0], "launcher/ppo_6b.sh", "--dry-run", environment={"MEGARLHF_HOME": str(ROOT / "tests")})
    assert status == 2 and f"{ROOT / 'tests'} is not megarlhf's folder: submit from there, or set MEGARLHF_HOME" in said
    status, _, said = run(ROOT / "launcher/slurm/pyxis.sbatch", "launcher/ppo_6b.sh", "--dry-run", environment={"MEGARLHF_HOME": str(ROOT)})
    assert status != 0 and "IMAGE" in said


@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(path):
    shellcheck = Path(sysconfig.get_path("scripts")) / "shellcheck"
    done = subprocess.run([shellcheck, "--external-sources", path], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


MAY_DIFFER = {"parallel", "recompute", "micro_batch_size", "max_batch_size"}


def without_layout(tree):
    """A configuration without what says where and in what portions it is computed."""
    return {name: without_layout(value) if isinstance(value, dict) else value for name, value in tree.items() if name not in MAY_DIFFER}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*_a100_40gb.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_configurations_for_40_gb_are_the_same_training(path):
    usual = path.with_name(path.name.replace("_a100_40gb", ""))
    assert without_layout(yaml.safe_load(path.read_text())) == without_layout(yaml.safe_load(usual.read_text()))


@pytest.mark.parametrize("name", ["reward.yaml", "reward_a100_40gb.yaml"])
def test_one_reward_model_serves_all_sizes(name):
    first, *others = [yaml.safe_load((ROOT / "examples" / folder / name).read_text()) for folder in FOLDERS.values()]
    assert others == [first, first]


SIZES = {"1.3b": "gpt3-1.3b", "6b": "gpt3-6.7b", "175b": "gpt3-175b"}
CONFIGURATIONS = sorted(path for folder in FOLDERS.values() for path in (ROOT / "examples" / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_layout_holds_its_model_on_the_nodes_that_the_file_names(path):
    head = path.read_text().split("\nstage:")[0].replace("\n# ", " ")
    num_nodes = re.search(r"on (one|\d+) nodes? of 8 GPUs", head).group(1)
    num_ranks = 8 * (1 if num_nodes == "one" else int(num_nodes))
    config = load_stage_config(path)
    models = [getattr(config, role, None) for role in ("model", "policy", "value", "reward", "reference")]
    layouts = [(model, model.parallel or config.parallel) for model in models if model is not None]
    if config.stage == "ppo":
        layouts.append((config.policy, config.generation.parallel or config.policy.parallel))
    for model, parallel in layouts:
        preset = model.architecture.preset if model.load is None else SIZES[model.load.split("/")[1]]
        sizes = make_architecture(preset, vocab_size=50257)
        layout = ParallelLayout.over(num_ranks, **dataclasses.asdict(parallel))
        names = ("num_layers", "num_heads", "num_kv_heads", "hidden_size", "ffn_size", "padded_vocab_size")
        assert layout.violations(**{name: getattr(sizes, name) for name in names}) == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples/llama3_8b").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_of_an_8b_hold_it_on_one_node_and_on_four(path):
    sizes = {"num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "hidden_size": 4096, "ffn_size": 14336, "padded_vocab_size": 128256}
    config = load_stage_config(path)
    models = [model for role in ("model", "policy", "value", "reward", "reference") if (model := getattr(config, role, None)) is not None]
    for parallel in [getattr(model, "parallel", None) or config.parallel for model in models]:
        for num_ranks in (8, 32):
            assert ParallelLayout.over(num_ranks, **dataclasses.asdict(parallel)).violations(**sizes) == []


MEANT = {"grpo.yaml": ["ppo.kl_coef 0 lets the policy move away"], "sft.yaml": ["model.architecture starts from random weights"]}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_example_is_asked_whether_it_is_meant(path):
    """But for examples/arithmetic, which begins with nothing and goes where its verifier leads."""
    found, meant = doubts(load_stage_config(path)), MEANT.get(path.name, []) if path.parent.name == "arithmetic" else []
    assert len(found) == len(meant) and all(map(str.startswith, found, meant)), found
