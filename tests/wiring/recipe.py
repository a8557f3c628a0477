"""The smallest recipe in which every key has something to act on: each training stage is one optimizer step."""

from megarlhf.data.tokenizer_training import train_sentencepiece
from megarlhf.data.tokenizers import load_tokenizer
from megarlhf.preparation.corpora import write_corpus
from tests.distributed.recipe import make_data, write_lines

SIZES = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "max_seq_len": 40, "init_std": 0.3}
WIDER = {**SIZES, "hidden_size": 12}
DEEP = {"num_layers": 4, "hidden_size": 8, "num_heads": 2, "max_seq_len": 40}
RATES = {"model": 0.003, "policy": 0.004, "value": 0.005}
"""Each trained model has a rate of its own, so that one is never taken for another's."""
RUNS = {
    "base": ("pretrain", []),
    "sft": ("sft", []),
    "reward": ("reward", []),
    "reward2": ("reward", ["run.seed=2"]),
    "ppo": ("ppo", []),
    "deep": ("pretrain", [f"model.architecture={DEEP}"]),
    "deep_reward": ("reward", [f"model.architecture={DEEP}"]),
}
"""What the cases start from: folder/runs/<name> -> (command, overrides)."""


def make_wiring_data(folder):
    """The recipe's data, and some that is wrong, short or other."""
    make_data(folder)
    train_sentencepiece([f"{i} is {i * i}, and {i + 1} is not." for i in range(4000)], folder / "other", vocab_size=400)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    text = [tokenizer.encode(f"row {i} of another corpus") for i in range(40)]
    write_corpus(folder / "rows", text, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    good = [{"prompt": f"word {i}?\n", "response": "it is", "chosen": "a", "rejected": "b"} for i in range(30)]
    write_lines(folder / "broken.jsonl", [*good, {"prompt": 7}])
    (folder / "more_prompts.jsonl").write_text((folder / "prompts.jsonl").read_text() + '{"prompt": "one more?"}\n')
    (folder / "words.py").write_text(WORDS)
    for name, records in OTHER.items():
        write_lines(folder / f"{name}.jsonl", records)


WORDS = """
def letters(prompts, responses, records):
    return [len(response) / 10 for response in responses]


def spaces(prompts, responses, records):
    return [float(response.count(" ")) for response in responses]
"""
OTHER = {
    "other_demonstrations": [{"prompt": f"item {i}?\n", "response": f"see {i}"} for i in range(24)],
    "other_rankings": [{"prompt": f"item {i}?\n", "chosen": f"see {i}", "rejected": "no"} for i in range(21)],
    "other_prompts": [{"prompt": f"item {i}?\n"} for i in range(26)],
    "task": [
        *({"part": "train", "context": f"item {i}", "choices": ["see", "no"], "answer": i % 2} for i in range(3)),
        *({"id": i, "context": f"word {i}", "choices": ["see", "it is"], "answer": i % 2} for i in range(7)),
    ],
    "other_task": [{"id": i, "context": f"what {i}", "choices": ["yes", "it is not"], "answer": i % 2} for i in range(5)],
    "answers_a": [{"id": i, "prompt": f"item {i}?\n", "response": f"see {i}"} for i in range(9)],
    "answers_b": [{"id": i, "prompt": f"item {i}?\n", "response": f"no {i * i}" if i % 2 else f"see {i}"} for i in range(9)],
    "answers_c": [{"id": i, "prompt": f"item {i}?\n", "response": f"it is {i}"} for i in range(9)],
    "labels": [{"id": i, "preference": "a" if i % 3 else "b"} for i in range(9)],
    "other_labels": [{"id": i, "preference": "tie"} for i in range(9)],
}


def configurations(folder):
    """Command -> the YAML tree that its cases change."""
    corpus = {"prefix": f"{folder}/corpus", "valid_prefix": f"{folder}/heldout", "seq_len": 32, "valid_rows": 6}
    held_out = {key: value for key, value in corpus.items() if key != "prefix"}
    limits = {"max_prompt_len": 16, "max_response_len": 20}
    sampling = {"max_new_tokens": 8}

    def trained(role, size, **source):
        return {"adam": {"learning_rate": RATES[role], "eps": 1e-5}, "micro_batch_size": size, **source}

    def saved(name):
        return {"load": f"{folder}/runs/{name}"}

    demonstrations = {"train": f"{folder}/demonstrations.jsonl", "valid": f"{folder}/demonstrations_valid.jsonl", "pretraining": corpus}
    rankings = {"train": f"{folder}/rankings.jsonl", "valid": f"{folder}/rankings_valid.jsonl", "demonstrations": demonstrations["valid"]}
    prompts = {"prompts": f"{folder}/prompts.jsonl", "prompts_valid": f"{folder}/prompts_valid.jsonl", "pretraining": corpus}
    algorithm = {"iterations": 1, "batch_size": 8, "minibatch_size": 8, "ptx_ratio": 1, "ptx_coef": 2.0, "warmup_iterations": 3}
    more = {"ema_decay": 0.9, "adaptive_kl": {"target": 0.5, "horizon": 40}}
    commands = {
        "pretrain": {"model": trained("model", 3, architecture=SIZES), "data": corpus, "steps": 1, "batch_size": 6},
        "sft": {
            "model": trained("model", 9, **saved("base")), "data": demonstrations, "limits": limits, "sampling": sampling,
            "epochs": 1, "batch_size": 24, "dropout": 0.0, "pretraining_mix": 0.25,
        },
        "reward": {
            "model": trained("model", 9, architecture=WIDER), "data": rankings, "limits": limits, "epochs": 1, "batch_size": 21,
        },
        "ppo": {
            "policy": trained("policy", 5, **saved("sft")), "value": trained("value", 3, **saved("reward")),
            "reward": {"micro_batch_size": 5, **saved("reward")}, "reference": {"micro_batch_size": 3, **saved("base")},
            "data": prompts, "limits": {"max_prompt_len": 16}, "ppo": {**algorithm, **more}, "generation": {"sampling": sampling},
        },
        "dpo": {
            "model": trained("model", 9, **saved("sft")), "reference": {"micro_batch_size": 9, **saved("base")},
            "data": {"train": rankings["train"], "valid": rankings["valid"], "pretraining": corpus}, "limits": limits,
            "batch_size": 21, "dpo": {"ptx_coef": 0.5},
        },
        "generate": {"model": saved("ppo"), "prompts": prompts["prompts"], "limits": {"max_prompt_len": 16}, "sampling": sampling},
        "evaluate": {
            "model": saved("ppo"), "reward": saved("reward"), "reference": saved("sft"), "prompts": prompts["prompts_valid"],
            "demonstrations": demonstrations["valid"], "rankings": rankings["valid"], "text": held_out,
            "limits": limits, "sampling": sampling,
        },
    }  # fmt: skip
    shared = {"tokenizer": {"path": f"{folder}/tokenizer.model"}, "run": {"dir": f"{folder}/runs/run"}}
    return {name: {"stage": name, **shared, **tree} for name, tree in commands.items()}
