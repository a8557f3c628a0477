"""Greedy answers of the converted SmolLM2-135M-Instruct, token by token against transformers': 20 prompts of 64 tokens in float32.

    python examples/smollm2_135m/fetch_model.py --to runs/smollm2/model
    megarlhf convert --from runs/smollm2/model --to runs/smollm2/start
    python examples/smollm2_135m/check_greedy.py --model runs/smollm2/model --converted runs/smollm2/start

Takes two minutes on two cores. Ends with exit status 1 where an answer differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from megarlhf.batch import Prompts
from megarlhf.engine.checkpoint import load_weights, saved_architecture
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.generation.generator import Generator
from megarlhf.models.transformer import ModelSpec
from megarlhf.parallel.groups import World
from megarlhf.storage.checkpoints import read_saved

NEW_TOKENS = 64
QUESTIONS = (
    "What is the capital of France?",
    "Explain photosynthesis to a child.",
    "Write two sentences about the sea.",
    "How do I boil an egg?",
    "Name three planets and one fact about each.",
    "What does a compiler do?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "Who wrote Hamlet?",
    "Summarize the story of Romeo and Juliet.",
    "What is 12 times 12?",
    "List five animals that live in the forest.",
    "How can I sleep better?",
    "Translate 'good morning' into French.",
    "What is gravity?",
    "Write a short poem about rain.",
    "What is the difference between a list and a tuple in Python?",
    "Give advice to somebody who starts a new job.",
    "Describe a sunset.",
    "How does a bicycle stay upright?",
)


@torch.no_grad()
def main() -> int:
    """Compare and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the Hugging Face folder")
    parser.add_argument("--converted", type=Path, required=True, help="the checkpoint that it was converted to")
    options = parser.parse_args()
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.converted)  # its files travelled
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True)["input_ids"]
        for question in QUESTIONS
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    theirs = [
        model.generate(torch.tensor([row]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=tokenizer.eos_token_id)[0, len(row) :]
        for row in prompts
    ]
    ours = generated(options.converted, prompts, tokenizer.eos_token_id)
    same = 0
    for question, one, other in zip(QUESTIONS, ours, theirs, strict=True):
        agree = one == other.tolist()
        same += agree
        print(f"{'same' if agree else 'DIFFERENT'}  {question}\n      {tokenizer.decode(one)!r}")
        if not agree:
            print(f"      {tokenizer.decode(other)!r}")
    print(f"{same} of {len(QUESTIONS)} answers are transformers', token by token ({sum(map(len, ours))} tokens)")
    return int(same < len(QUESTIONS))


def generated(folder: Path, prompts: list[list[int]], eos_id: int) -> list[list[int]]:
    """Our greedy answers, to EOS or NEW_TOKENS."""
    world, saved = World.connect(), read_saved(folder)
    architecture = saved_architecture(saved, "model")
    engine = FrozenEngine(ModelSpec(architecture=architecture, head="lm"), world.groups(world.layout()), micro_batch_size=1)
    load_weights(saved, "model", engine)
    lengths = torch.tensor([len(row) for row in prompts])
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for number, row in enumerate(prompts):
        tokens[number, : len(row)] = torch.tensor(row)
    generator = Generator(engine.transformers, engine.groups, architecture=architecture, eos_id=eos_id, pad_id=0)
    batch = Prompts(tokens=tokens, lengths=lengths, ids=torch.arange(len(prompts)))
    done = generator.generate(batch, max_new_tokens=NEW_TOKENS, temperature=0.0, seed=1, iteration=0)
    world.close()
    return [row[start:end].tolist() for row, start, end in zip(done.tokens, lengths.tolist(), done.lengths.tolist(), strict=True)]


if __name__ == "__main__":
    sys.exit(main())
