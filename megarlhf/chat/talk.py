"""A conversation in a terminal or through a pipe: lines in, answers out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from megarlhf.batch import Prompts
from megarlhf.chat.conversation import Conversation, SpokenText
from megarlhf.config import check_config
from megarlhf.config.sections import SamplingConfig
from megarlhf.conversion.tokenizer_files import has_tokenizer, load_travelling
from megarlhf.data.tokenizers import Tokenizer
from megarlhf.engine.checkpoint import load_weights, saved_architecture
from megarlhf.engine.frozen import FrozenEngine
from megarlhf.evaluation.responses import generate, generator_of
from megarlhf.generation.generator import Generator
from megarlhf.models.transformer import ModelSpec
from megarlhf.parallel.groups import World
from megarlhf.parallel.launch import place_in_run
from megarlhf.runs.checkpoints import find_source
from megarlhf.runs.models import chosen_model
from megarlhf.storage.checkpoints import Saved

HELP = """/reset  forget what was said
/quit   end (so does Ctrl-D)
/help   this
Ctrl-C stops an answer; what was said of it stays. A line that begins with two slashes is sent with one of them."""


def talk(options: argparse.Namespace) -> None:
    """As the options of `megarlhf chat` say. ValueError for what the user can mend."""
    if (size := place_in_run().size) > 1:
        other = "megarlhf generate answers a file in any layout"
        raise ValueError(f"a conversation is held by one process, and {size} were started: start it without torchrun or srun; {other}")
    how = {key: getattr(options, key) for key in ("temperature", "top_k", "top_p", "max_new_tokens")}
    sampling = check_config(SamplingConfig(**how))
    saved = find_source(str(options.path))
    tokenizer = _tokenizer(saved, options.tokenizer)
    name = chosen_model(saved, options.model, "policy", "lm")
    if saved.models[name]["head"] != "lm":
        raise ValueError(f"{name} of {saved.path} is a reward model or a value function, which says nothing; name another with --model")
    architecture = saved_architecture(saved, name)
    conversation = Conversation(tokenizer, architecture.max_seq_len, options.system)
    if damages := saved.damages():
        raise ValueError("\n".join(damages))
    world = World.connect()
    try:
        spec = ModelSpec(architecture=architecture, head="lm", precision=options.precision)
        engine = FrozenEngine(spec, world.groups(world.layout()), micro_batch_size=1)
        load_weights(saved, name, engine, average=saved.models[name]["has_ema"] and options.weights == "average")
        form = "by its chat template" if conversation.has_template else "as plain text, for its tokenizer comes without a chat template"
        _note(f"{name} of {saved.path}, {architecture.num_parameters():,} parameters, {form}; /help says what there is")
        Talk(generator_of(engine, tokenizer), conversation, sampling, seed=options.seed).run()
    except BrokenPipeError:  # whoever read the answers has left: what is still in the buffer goes nowhere, and nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        world.close()


class Talk:
    """Lines in, answers out. Answers go to stdout and nothing else does; on a terminal the prompt of a line does too."""

    def __init__(self, generator: Generator, conversation: Conversation, sampling: SamplingConfig, *, seed: int) -> None:
        self.generator, self.conversation, self.sampling, self.seed = generator, conversation, sampling, seed
        self.asked = 0
        """Lines since the beginning or the last reset: what the noise of an answer is drawn from."""

    def run(self) -> None:
        """Until the lines end or one says so."""
        read = _reader()
        while (line := read()) is not None:
            line = line.strip()
            if line == "/quit":
                return
            if line == "/help":
                _note(HELP)
            elif line == "/reset":
                self.conversation.turns.clear()
                self.asked = 0
                _note("forgotten")
            elif line.startswith("/") and not line.startswith("//"):
                _note(f"there is no {line.split()[0]}; there are /reset, /quit and /help")
            elif any("\ud800" <= letter <= "\udfff" for letter in line):
                _note("this line is not UTF-8 text, and is left out")
            elif line:
                self.answer(line.removeprefix("/") if line.startswith("//") else line)

    def answer(self, line: str) -> None:
        """Write the answer to a line, and remember both."""
        context = self.conversation.context
        try:
            ids, left_out = self.conversation.prompt(line, min(self.sampling.max_new_tokens, context // 2))
        except ValueError as error:
            _note(str(error))
            return
        if left_out:
            _note(f"the context of {context} tokens is full: the first {left_out} of {len(self.conversation.turns)} exchanges are left out")
        prompts = Prompts(tokens=torch.tensor([ids]), lengths=torch.tensor([len(ids)]), ids=torch.tensor([self.asked]))
        spoken = SpokenText(self.conversation.tokenizer, _write)
        try:
            generate(self.generator, prompts, self.sampling, seed=self.seed, purpose="chat", listener=spoken)
        except KeyboardInterrupt:
            _write(" ...")
        _write("\n")
        self.asked += 1
        self.conversation.turns.append((line, spoken.text.rstrip("\n")))


def _reader() -> Callable[[], str | None]:
    """A function that gives the next line, None at their end; Ctrl-C while it waits is answered with how to end."""
    sys.stdin.reconfigure(errors="surrogateescape")  # whatever the locale: a line that is no text does not end the conversation
    sys.stdout.reconfigure(errors="replace")
    if sys.stdin.isatty():
        import readline  # noqa: F401  (it gives `input` a history and the keys to edit a line)

    def read() -> str | None:
        while True:
            try:
                if sys.stdin.isatty():
                    return input("> ")
                return sys.stdin.readline() or None
            except EOFError:
                return None
            except KeyboardInterrupt:
                _note("/quit ends")

    return read


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tokenizer(saved: Saved, path: Path | None) -> Tokenizer:
    """The one that is named, the one beside the checkpoint, or the one that its run had. ValueError where it is another than then."""
    config = saved.state.get("config", {}).get("tokenizer", {})
    if path is None:
        path = saved.path if has_tokenizer(saved.path) else Path(config["path"]) if "path" in config else None
    if path is None or not path.exists():
        raise ValueError(f"the tokenizer of {saved.path} is not at {path}: say with --tokenizer where it is")
    tokenizer = load_travelling(path, config.get("eos_token"))
    known = saved.state.get("fingerprints", {}).get("tokenizer")
    if known is not None and known != tokenizer.fingerprint:
        raise ValueError(f"{path} is not the tokenizer that {saved.path} was trained with: say with --tokenizer where that is")
    return tokenizer
