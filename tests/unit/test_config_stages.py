"""The configuration of every command: the paper's numbers by default, and the rules between its keys."""

import pytest
import yaml

from megarlhf.config import COMMANDS, ConfigError, dump_yaml, load_stage_config

TRAINED = {"architecture": {"preset": "gpt3-1.3b"}, "adam": {"learning_rate": 1e-5}}
FROZEN = {"load": "runs/model"}
TEXT = {"prefix": "data/text"}
MINIMAL = {
    "pretrain": {"model": TRAINED, "data": TEXT, "steps": 10},
    "sft": {"model": TRAINED, "data": {"train": "d.jsonl"}},
    "reward": {"model": TRAINED, "data": {"train": "r.jsonl"}},
    "ppo": {
        "policy": TRAINED,
        "value": TRAINED,
        "reward": FROZEN,
        "reference": FROZEN,
        "data": {"prompts": "p.jsonl", "pretraining": TEXT},
    },
    "dpo": {"model": TRAINED, "reference": FROZEN, "data": {"train": "r.jsonl"}},
    "generate": {"model": FROZEN, "prompts": "p.jsonl"},
    "evaluate": {"model": FROZEN, "prompts": "p.jsonl"},
}


def load(tmp_path, stage, *overrides):
    """The minimal configuration of a stage, with overrides."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"stage": stage, "run": {"dir": "runs/x"}, "tokenizer": {"path": "t.model"}, **MINIMAL[stage]}))
    return load_stage_config(path, overrides, command=stage)


@pytest.mark.parametrize("stage", COMMANDS)
def test_minimal_files_load_and_read_back(tmp_path, stage):
    config = load(tmp_path, stage)
    assert type(config) is COMMANDS[stage]
    (tmp_path / "dumped.yaml").write_text(dump_yaml(config))
    assert load_stage_config(tmp_path / "dumped.yaml") == config


def test_defaults_are_the_papers(tmp_path):
    """Ouyang et al. 2022, Appendix C."""
    sft, reward, ppo = (load(tmp_path, stage) for stage in ("sft", "reward", "ppo"))
    assert (sft.epochs, sft.dropout, sft.batch_size, sft.schedule.shape, sft.schedule.final_fraction, sft.schedule.warmup_steps) == (
        16, 0.2, 32, "cosine", 0.1, 0,
    )
    assert (reward.epochs, reward.batch_size, reward.schedule.shape, reward.schedule.final_fraction) == (1, 64, "cosine", 0.1)
    s = ppo.ppo
    assert s.iterations * s.batch_size == 256_000 and s.batch_size / s.minibatch_size == 8 and s.epochs == 1
    assert (s.kl_coef, s.clip, s.ptx_coef, s.ptx_ratio, s.warmup_iterations, s.gamma, s.ema_decay) == (0.02, 0.2, 27.8, 8, 10, 1.0, 0.992)
    assert s.adaptive_kl is None and s.unfinished_penalty is None
    assert (ppo.policy.adam.beta1, ppo.policy.adam.beta2) == (0.9, 0.95)
    assert (ppo.limits.max_prompt_len, ppo.generation.sampling.max_new_tokens, ppo.generation.sampling.temperature) == (1024, 1024, 1.0)
    assert ppo.generation.parallel is None and ppo.policy.parallel is None and ppo.policy.load_average


RULES = [
    ("ppo", ["data.pretraining=null"], "ppo.ptx_coef 27.8 needs data.pretraining (or set ppo.ptx_coef to 0 for plain PPO)"),
    ("ppo", ["ppo.minibatch_size=100"], "ppo.batch_size 512 must be divisible by minibatch_size 100; rest 12"),
    ("ppo", ["generation.sampling.temperature=0"], "generation.sampling.temperature 0 explores nothing"),
    ("ppo", ["ppo.gae_lambda=1.5"], "ppo.gae_lambda must be in [0, 1], got 1.5"),
    ("ppo", ["ppo.kl_coef=-0.1"], "ppo.kl_coef must be at least 0, got -0.1"),
    ("ppo", ["ppo.adaptive_kl.target=0"], "ppo.adaptive_kl.target must be above 0, got 0"),
    ("ppo", ["ppo.adaptive_kl.horizon=0"], "ppo.adaptive_kl.horizon must be at least 1, got 0"),
    ("ppo", ["generation.sampling.top_p=0"], "generation.sampling.top_p must be in (0, 1], got 0"),
    ("ppo", ["value.load=runs/reward"], "or architecture (fresh weights) must be given, and not both; both are"),
    ("ppo", ["reward.load=null"], "neither is"),
    ("ppo", ["policy.adam.beta2=1"], "policy.adam.beta2 must be in [0, 1), got 1"),
    ("ppo", ["policy.parallel.sequence_parallel=true"], "policy.parallel.sequence_parallel needs tp > 1"),
    ("ppo", ["parallel.virtual_pp=2"], "parallel.virtual_pp 2 needs pp > 1"),
    ("ppo", ["run.seed=-1"], "run.seed must be at least 0, got -1"),
    ("sft", ["pretraining_mix=0.1"], "pretraining_mix 0.1 needs data.pretraining"),
    ("sft", ["pretraining_mix=1", "data.pretraining.prefix=text"], "pretraining_mix must be in [0, 1), got 1"),
    ("sft", ["dropout=1"], "dropout must be in [0, 1), got 1"),
    ("sft", ["select_by=valid_loss", "run.eval_every=5"], "select_by valid_loss needs data.valid"),
    ("sft", ["select_by=valid_loss", "data.valid=v.jsonl"], "select_by valid_loss needs run.eval_every"),
    ("sft", ["select_by=reward", "data.valid=v", "run.eval_every=5"], "select_by reward needs reward, the model that judges"),
    ("sft", ["reward.load=runs/reward"], "reward judges only with select_by: reward, and select_by is last"),
    ("sft", ["limits.max_response_len=1"], "limits.max_response_len must be at least 2, got 1"),
    ("reward", ["batch_size=0"], "batch_size must be at least 1, got 0"),
    ("pretrain", ["data.seq_len=1"], "data.seq_len must be at least 2, got 1"),
    ("pretrain", ["run.keep_checkpoints=0"], "run.keep_checkpoints must be at least 1, got 0"),
    ("evaluate", ["prompts=null"], "prompts, demonstrations, rankings, tasks, win_rate.against, win_rate.labels or text must be"),
    ("evaluate", ["prompts=null", "rankings=r", "reference.load=x"], "reference judges responses: it needs prompts"),
    ("evaluate", ["prompts=null", "demonstrations=d", "reward.load=x"], "reward judges responses or rankings: it needs prompts, "),
]


@pytest.mark.parametrize(("stage", "overrides", "expected"), RULES, ids=[expected[:40] for *_, expected in RULES])
def test_each_rule_says_what_it_wants(tmp_path, stage, overrides, expected):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, stage, *overrides)
    assert len(str(error.value).splitlines()) == 1
    assert expected in str(error.value)


def test_all_violations_are_said_at_once(tmp_path):
    wrong = ["data.pretraining=null", "ppo.epochs=0", "policy.adam.clip_grad=-1", "parallel.tp=0", "policy.adam.lr=1", "ppo.ptx_koef=1"]
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "ppo", *wrong)
    said = str(error.value)
    for text in ("policy.adam.lr: unknown key", "did you mean ppo.ptx_coef?", "clip_grad must be above 0", "tp must be", "epochs"):
        assert text in said


def test_a_file_is_for_one_command(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("stage: sft\n")
    with pytest.raises(ConfigError, match="stage is sft; run it with `megarlhf sft`, not `megarlhf ppo`"):
        load_stage_config(path, command="ppo")
    for text in ("stage: rlhf\n", "seed: 1\n", "stage: [sft]\n", ""):
        path.write_text(text)
        with pytest.raises(ConfigError, match="run.yaml: stage must be one of pretrain, sft, reward, ppo, dpo, generate, evaluate, got"):
            load_stage_config(path)
    for text in ("stage: [\n", "stage: sft\n\tx: 1\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"run.yaml, line \d, column \d: broken YAML: "):
            load_stage_config(path)
    with pytest.raises(ConfigError, match="nowhere.yaml: there is no such file: give --config the run's YAML file; .* has run.yaml"):
        load_stage_config(tmp_path / "nowhere.yaml")
