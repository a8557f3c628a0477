"""What transformers says with the model that was downloaded and with the one that was exported: five questions, the likeliest answers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers

MAX_NEW_TOKENS = 32


def answers(folder: Path, chats: list[list[dict]]) -> list[str]:
    """The greedy answer to each chat; " ..." at the end of one that the limit cut off."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    said = []
    for chat in chats:
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        ended = tokens[-1] == tokenizer.eos_token_id
        said.append(tokenizer.decode(tokens, skip_special_tokens=True).strip() + ("" if ended else " ..."))
    return said


def main() -> None:
    """Print question, answer before and answer after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--after", type=Path, required=True, help="another")
    parser.add_argument("--prompts", type=Path, required=True, help="chats, of which five are asked, evenly spaced")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    chats = [json.loads(line)["messages"] for line in options.prompts.read_text(encoding="utf-8").splitlines()]
    chats = chats[:: len(chats) // 5][:5]
    print(f"\nFive of the questions, answered by transformers at temperature 0, before ({options.before}) and after ({options.after}):")
    for chat, before, after in zip(chats, answers(options.before, chats), answers(options.after, chats), strict=True):
        print(f"\n  {chat[-1]['content']}\n    before  {before}\n    after   {after}")


if __name__ == "__main__":
    main()
