"""What can be seen of one run, as a flat mapping of names to values: all of it, so that what a key must not change is seen too.

    exit, refused            the exit status, and what a run that was not well said at its end
    said/<first_words>       every other line on stderr, by what stands before its first colon; stdout
    files                    what lies in the run's folder
    metrics/<name>           a value for each step; no costs that the machine decides
    samples/<column>, responses/<column>, evaluation/<name>, inputs/<name>, best
    cursors/..., sources/..., fingerprints/..., models/...   what the newest checkpoint's state.json says, its configuration left out
    <model>/<kind>/<entry>   the newest checkpoint's tensors; kinds are weights, exp_avg, exp_avg_sq, ema

and, because no file tells, seen in the program itself as it runs:

    engine/<role>/<what>     how a model was built: precision, recompute, dropout, overlap, layout; its weights before the first step; what
                             of it has no memory while responses are sampled
    passes/<role>            [rows, width] of every micro-batch of every pass
    steps/<role>/<term>/...  of every optimizer step: rows, tokens, weight and loss of each term; steps/<role>/rate
    answers/...              [rows, width] of every batch of prompts that were answered, and in what layout for what purpose
    process/...              threads, time-out, sinks, how alerts are raised; "process/saves": the thread that wrote each checkpoint
"""

import contextlib
import hashlib
import io
import json
import re
import threading
from unittest import mock

import torch
from safetensors.torch import load_file

from megarlhf import cli
from megarlhf.engine import engine as engine_module
from megarlhf.engine import trainable
from megarlhf.engine.checkpoint import OwnPart
from megarlhf.engine.trainable import TrainEngine
from megarlhf.evaluation import responses
from megarlhf.generation.generator import Generator
from megarlhf.parallel.groups import World
from megarlhf.runs import folder as run_folder
from megarlhf.runs import loop as run_loop
from megarlhf.runs.checkpoints import own_checkpoints
from megarlhf.runs.models import ModelPlanner

COSTS = re.compile(r"metrics/(time|memory)(/|$)|_per_second$")
FICKLE_LINES = re.compile(r"passed, .* left|\] step \d+: |warn|^\s*$")
KEPT_STATE = ("cursors", "sources", "fingerprints")


def observe(words, run, places):
    """Run a command line in this process, into the folder `run`; returns what can be seen of it.

    places: path -> what stands for it in texts.
    """
    seen = {}
    stdout, stderr = io.StringIO(), io.StringIO()
    with watched(seen), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            seen["exit"] = cli.main(words)
        except SystemExit as end:
            seen["exit"] = end.code
        finally:
            torch.set_num_threads(1)
    seen |= {"stdout": stdout.getvalue()} | _left_in(run)
    seen |= _said(_placed(stderr.getvalue(), places), ok=seen["exit"] == 0)
    return {name.replace(" ", "_"): _placed(value, places) for name, value in seen.items() if not COSTS.search(name)}


def _placed(value, places):
    """A text with names in place of paths, longer paths first; what is no text as it is."""
    for path, name in places.items() if isinstance(value, str) else ():
        value = value.replace(str(path), name)
    return value


def _said(text, *, ok):
    seen = {} if ok else {"refused": text[text.find("megarlhf ") :]}
    for line in text.splitlines() if ok else ():
        if not FICKLE_LINES.search(line):
            name = f"said/{re.split('[:,]', line)[0].split('] ')[-1].strip()}"
            seen[name] = seen.get(name, "") + line + "\n"
    return seen


# In the run's folder


def _left_in(run):
    if not run.is_dir():
        return {"files": ()}
    names = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    seen = {"files": tuple(sorted(name for name in names if name.count("/") < 2 and name != "lock"))}
    for kind, file in (("metrics", "metrics.jsonl"), ("samples", "samples.jsonl"), ("responses", "responses.jsonl")):
        seen |= _columns(kind, run / file)
    for kind, file in (("evaluation", "evaluation.json"), ("inputs", "inputs.json"), ("best", "checkpoints/best.json")):
        if (run / file).exists():
            seen |= _flat(kind, json.loads((run / file).read_text()))
    found = own_checkpoints(run / "checkpoints", run=None, skip_damaged=True)[0]
    return seen | (_saved(found[0]) if found else {})


def _columns(kind, file):
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    names = dict.fromkeys(name for line in lines for name in line)
    return {f"{kind}/{name}": tuple(_value(line.get(name)) for line in lines) for name in names}


def _flat(path, value):
    if isinstance(value, dict):
        return {name: item for key in value for name, item in _flat(f"{path}/{key}", value[key]).items()}
    return {path: _value(value)}


def _value(value):
    return json.dumps(value) if isinstance(value, list | dict) else value


def _saved(saved):
    seen = {}
    for key in KEPT_STATE:
        seen |= _flat(key, saved.state[key])
    seen = {name: value for name, value in seen.items() if not name.endswith(("/load", "/load_model", "/load_average"))}  # as configured
    seen |= _flat("models", saved.models)
    for name in saved.files:
        for entry, tensor in load_file(saved.path / name).items():
            seen["/".join(entry.split(".", 2))] = tensor
    return seen


# In the program


@contextlib.contextmanager
def watched(seen):
    """Note what engines, generators and worlds do."""
    roles = {}  # id of an engine or of a chunk of one -> role
    kept = []  # what has its id in `roles`, so that no other gets it

    def add(name, value):
        seen[name] = (*seen.get(name, ()), value)

    def built(make):
        def build(planner, plan, **how):
            engine = make(planner, plan, **how)
            kept.append(engine)
            roles.update({id(part): plan.role for part in (engine, *engine.transformers, *engine.chunks)})
            seen.update({f"engine/{plan.role}/{name}": value for name, value in _facts(engine).items()})
            seen["process/threads"] = torch.get_num_threads()
            return engine

        return build

    def schedule(run):
        def run_schedule(chunks, groups, rows, *args, **how):
            add(f"passes/{roles.get(id(chunks[0]))}", tuple(tuple(micro_batch.lengths.tolist()) for micro_batch in rows))
            return run(chunks, groups, rows, *args, **how)

        return run_schedule

    def step(engine, terms, *, learning_rate):
        role = roles.get(id(engine))
        add(f"steps/{role}/rate", learning_rate)
        for term in terms:
            add(f"steps/{role}/{term.name}/rows", term.batch.num_rows)
            add(f"steps/{role}/{term.name}/tokens", hashlib.sha256(term.batch.tokens.numpy().tobytes()).hexdigest()[:12])
            add(f"steps/{role}/{term.name}/objective", f"{term.weight} {term.loss}")
        return unwatched_step(engine, terms, learning_rate=learning_rate)

    def generate(generator, prompts, sampling, **how):
        add(f"answers/{how['purpose']}/layout", str(generator.groups.layout))
        for engine in kept if how["purpose"] == "ppo rollouts" else ():
            seen[f"engine/{roles[id(engine)]}/at_rest"] = _at_rest(engine)
        return unwatched_generate(generator, prompts, sampling, **how)

    def cache(generator, slots, capacity):
        add("answers/cache", (slots, capacity))
        return unwatched_cache(generator, slots, capacity)

    def connect(place=None, **how):
        world = unwatched_connect(place, **how)
        seen["process/timeout"] = world.timeout.total_seconds()
        return world

    def make_sinks(kinds, run_dir, **how):
        seen["process/sinks"] = f"{kinds} {how['wandb_mode']}"
        return unwatched_sinks([kind for kind in kinds if kind == "jsonl"], run_dir, **how)

    def alerts(*, deviations, window):
        seen["process/alerts"] = f"{deviations} deviations, window {window}"
        return unwatched_alerts(deviations=deviations, window=window)

    def write(part, path, rank):
        add("process/saves", threading.current_thread().name)
        return unwatched_write(part, path, rank)

    unwatched_write, unwatched_alerts = OwnPart.write, run_loop.Alerts
    unwatched_step, unwatched_cache, unwatched_generate = TrainEngine.step, Generator._cache, responses.generate
    unwatched_connect, unwatched_sinks = World.connect, run_folder.make_sinks
    from megarlhf.trainers import ppo

    with contextlib.ExitStack() as stack:
        for owner, name, watching in (
            (ModelPlanner, "build_frozen", built(ModelPlanner.build_frozen)),
            (ModelPlanner, "build_trained", built(ModelPlanner.build_trained)),
            (engine_module, "run_schedule", schedule(engine_module.run_schedule)),
            (trainable, "run_schedule", schedule(trainable.run_schedule)),
            (TrainEngine, "step", step),
            (Generator, "_cache", cache),
            (responses, "generate", generate),
            (ppo, "generate", generate),
            (World, "connect", staticmethod(connect)),
            (run_folder, "make_sinks", make_sinks),
            (run_loop, "Alerts", alerts),
            (OwnPart, "write", write),
        ):
            stack.enter_context(mock.patch.object(owner, name, watching))
        yield


def _facts(engine):
    engine.offload.need("weights")
    config, parameters = engine.transformers[0].config, engine.parameters()
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(parameters):
        digest.update(name.encode() + parameters[name].detach().clone().float().numpy().tobytes())
    return {
        "precision": str(next(iter(parameters.values())).dtype),
        "recompute": str(config.recompute_granularity),
        "dropout": config.hidden_dropout,
        "overlap": getattr(engine, "optimizer", None) is not None and engine.optimizer.overlap,
        "layout": str(engine.groups.layout),
        "initial": digest.hexdigest(),
    }


def _at_rest(engine):
    """The kinds whose storages are all empty."""
    held = {kind: [tensor for tensor in tensors if tensor.numel() > 1] for kind, tensors in engine.held().items()}
    sizes = {kind: {tensor.untyped_storage().nbytes() for tensor in tensors} for kind, tensors in held.items()}
    return " ".join(kind for kind, found in sizes.items() if found == {0})


# Two observations beside each other


def differing(before, after):
    """The names whose values are not the same, bit for bit."""
    return {name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name))}


def _same(one, other):
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and one == other


def is_rounding(one, other, tolerance=1e-3):
    """Whether two values are the same but for the order of additions."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and float((one - other).abs().max()) <= tolerance * float(1e-3 + one.abs().max())
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(is_rounding, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= tolerance * max(abs(one), 0.01)
    return one == other
