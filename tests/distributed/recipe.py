"""A whole recipe in miniature: data made of Python's own documentation, and the configuration of each stage."""

import contextlib
import json
from pathlib import Path
from pydoc_data.topics import topics
from unittest import mock

import yaml

from megarlhf.config import load_stage_config
from megarlhf.data.tokenizer_training import train_sentencepiece
from megarlhf.data.tokenizers import load_tokenizer
from megarlhf.parallel.groups import World
from megarlhf.preparation.corpora import write_corpus

STAGES = ("base", "sft", "reward", "ppo", "grpo", "dpo")
SIZES = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "max_seq_len": 40, "init_std": 0.1}
SMALL = {**SIZES, "num_layers": 2, "hidden_size": 16}
ADAM = {"learning_rate": 3e-3, "eps": 1e-5}
LIMITS = {"max_prompt_len": 16, "max_response_len": 20}


def make_recipe(folder: Path) -> Path:
    """Write the data and a YAML file for each stage; the stages' runs go to folder/runs."""
    make_data(folder)
    for name, config in configurations(folder).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


REWARD_FUNCTIONS = '''
"""Rewards of one's own, and what users get wrong in them."""


def count_e(prompts, responses, records):
    """How often a response says "e"."""
    return [response.count("e") for response in responses]


def length(prompts, responses, records):
    """How long a prompt and its response are, and whether the record says so."""
    return [len(p) + len(r) / 10 + record.get("bonus", 0) for p, r, record in zip(prompts, responses, records, strict=True)]


def short(prompts, responses, records):
    return [1.0]


def nothing(prompts, responses, records):
    return None


def not_a_number(prompts, responses, records):
    return [float("nan")] * len(prompts)


def text(prompts, responses, records):
    return ["good"] * len(prompts)


def fails(prompts, responses, records):
    return [record["bonus"] for record in records]  # which prompts_valid.jsonl does not have
'''


def make_data(folder: Path) -> None:
    """Write a tokenizer, two corpora, and demonstrations, prompts and rankings, each for training and for validation."""
    texts = [topics[name] for name in sorted(topics)]
    train_sentencepiece([text[:2000] for text in texts], folder / "tokenizer", vocab_size=400)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    for name, part in (("corpus", texts[:8]), ("heldout", texts[-2:])):
        ids = [tokenizer.encode(text[:3000]) for text in part]
        write_corpus(folder / name, ids, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    words = sorted({word for text in texts[:4] for word in text.split() if word.isalpha() and word.islower() and 3 < len(word) < 8})[:60]
    asked = [{"prompt": f"{word}?\n", "response": f"It is a {word}."} for word in words]
    write_lines(folder / "demonstrations.jsonl", asked[:24])
    write_lines(folder / "demonstrations_valid.jsonl", asked[24:32])
    write_lines(folder / "prompts.jsonl", [{"prompt": record["prompt"], "bonus": i} for i, record in enumerate(asked[32:52])])
    (folder / "my_rewards.py").write_text(REWARD_FUNCTIONS)
    write_lines(folder / "prompts_valid.jsonl", [{"prompt": record["prompt"]} for record in asked[52:58]])
    ranked = []
    for number, word in enumerate(words[:20]):
        responses = [f"{word} is {thing}." for thing in ("a name", "it", word, "not so", "a word")][: 2 + number % 4]
        ranked.append({"prompt": f"{word}?\n", "responses": responses, "ranks": [1 + i // (1 + number % 2) for i in range(len(responses))]})
    ranked.append({"prompt": "tied?\n", "responses": ["one", "two"], "ranks": [1, 1]})
    ranked.append({"prompt": "pair?\n", "chosen": "yes, it is", "rejected": "no"})
    write_lines(folder / "rankings.jsonl", ranked)
    write_lines(folder / "rankings_valid.jsonl", ranked[14:])


def configurations(folder: Path) -> dict[str, dict]:
    """Name -> the YAML tree of a run in folder/runs/name."""
    corpus = {"prefix": f"{folder}/corpus", "valid_prefix": f"{folder}/heldout", "seq_len": 32, "valid_rows": 6}
    trained = {"adam": ADAM, "micro_batch_size": 3}
    base, reward = {"load": f"{folder}/runs/base"}, {"load": f"{folder}/runs/reward", "micro_batch_size": 5}
    data = {"train": f"{folder}/demonstrations.jsonl", "valid": f"{folder}/demonstrations_valid.jsonl", "pretraining": corpus}
    sampling = {"max_new_tokens": 12}
    prompts = {"prompts": f"{folder}/prompts.jsonl", "prompts_valid": f"{folder}/prompts_valid.jsonl", "pretraining": corpus}
    stages = {
        "base": {"stage": "pretrain", "model": {**trained, "architecture": SIZES}, "data": corpus, "steps": 4, "batch_size": 6},
        "sft": {
            "stage": "sft", "model": {**trained, **base}, "data": data, "limits": LIMITS, "sampling": sampling,
            "epochs": 1, "batch_size": 6, "dropout": 0.0, "pretraining_mix": 0.25,
        },
        "reward": {
            "stage": "reward", "model": {**trained, "architecture": SMALL}, "limits": LIMITS, "batch_size": 6,
            "data": {"train": f"{folder}/rankings.jsonl", "valid": f"{folder}/rankings_valid.jsonl", "demonstrations": data["valid"]},
        },
        "ppo": {
            "stage": "ppo", "policy": {**trained, "load": f"{folder}/runs/sft"}, "value": {**trained, **reward}, "reward": reward,
            "reference": {"load": f"{folder}/runs/sft"}, "data": prompts, "limits": {"max_prompt_len": 16},
            "ppo": {
                "iterations": 2, "batch_size": 8, "minibatch_size": 4, "ptx_ratio": 1, "ptx_coef": 2.0, "warmup_iterations": 3,
                "ema_decay": 0.9, "unfinished_penalty": -1.0, "adaptive_kl": {"target": 0.1, "horizon": 40},
            },
            "generation": {"sampling": sampling},
        },
        "dpo": {
            "stage": "dpo", "model": {**trained, "load": f"{folder}/runs/sft"},
            "reference": {"load": f"{folder}/runs/sft", "micro_batch_size": 3},
            "data": {"train": f"{folder}/rankings.jsonl", "valid": f"{folder}/rankings_valid.jsonl", "pretraining": corpus},
            "limits": LIMITS, "batch_size": 6, "dpo": {"ptx_coef": 0.5},
        },
        "generate": {
            "stage": "generate", "model": {"load": f"{folder}/runs/ppo"}, "prompts": prompts["prompts"],
            "limits": {"max_prompt_len": 16}, "sampling": sampling,
        },
        "evaluate": {
            "stage": "evaluate", "model": {"load": f"{folder}/runs/ppo"}, "reward": reward, "reference": {"load": f"{folder}/runs/sft"},
            "prompts": prompts["prompts_valid"], "demonstrations": data["valid"], "limits": LIMITS, "sampling": sampling,
            "text": {key: value for key, value in corpus.items() if key != "prefix"},
        },
    }
    without_values = {
        "advantages": "grpo", "samples_per_prompt": 4, "clip_high": 0.3, "kl_in": "loss", "kl_estimator": "k3", "normalization": "sequence",
    }  # fmt: skip
    functions = [{"function": f"{folder}/my_rewards.py:count_e", "weight": 0.5}, {"function": f"{folder}/my_rewards.py:length"}]
    stages["grpo"] = {
        **stages["ppo"], "value": None, "ppo": {**stages["ppo"]["ppo"], **without_values},
        "reward": {**reward, "functions": functions, "normalize": True},
    }  # fmt: skip
    shared = {"tokenizer": {"path": f"{folder}/tokenizer.model"}}
    return {name: {**shared, "run": {"dir": f"{folder}/runs/{name}"}, **stage} for name, stage in stages.items()}


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def check_stages(folder: Path, runs: Path, names: list[str], overrides: list[str]) -> None:
    """Run stages one after another in this world, into runs/name, with the recipe's own runs as what they start from."""
    for name in names:
        where = [] if any(override.startswith("run.dir=") for override in overrides) else [f"run.dir={runs / name}"]
        run_stage_of(folder / f"{name}.yaml", [*where, *overrides])


class Interrupted(Exception):
    """A run was stopped from outside."""


def run_stage_of(path: Path, overrides=(), *, stop_before: int | None = None, fresh: bool = False):
    """Run a YAML file's stage in this world as the command does; returns the finished stage, None for those without steps.

    With `stop_before`, the run dies before that step (from 0), with what it has logged and saved by then.
    """
    from megarlhf.api.stages import run_in
    from megarlhf.runs import loop
    from megarlhf.trainers import dpo, ppo, pretrain, reward_model, sft

    stages = []

    def watched(stage, run):
        stages.append(stage)
        step = stage.step

        def step_or_stop(number):
            if number == stop_before:
                run.saving.finish()
                raise Interrupted
            return step(number)

        stage.step = step_or_stop
        return loop.run_stage(stage, run)

    config = load_stage_config(path, overrides)
    with contextlib.ExitStack() as stack:
        for module in (dpo, ppo, pretrain, reward_model, sft):
            stack.enter_context(mock.patch.object(module, "run_stage", watched))
        stack.enter_context(contextlib.suppress(Interrupted))
        run_in(World.connect(), config, fresh=fresh)
    return stages[0] if stages else None


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curves(run: Path) -> list[dict]:
    """The metrics of every step of a run, without those of its costs, which another layout changes, and without the hour."""
    costs = ("time", "throughput/", "memory/")
    return [{name: value for name, value in line.items() if not name.startswith(costs)} for line in lines_of(run / "metrics.jsonl")]
