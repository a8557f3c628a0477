"""`megarlhf generate`: what is answered is kept, in any layout, whatever ends the process."""

import json
import signal
from unittest import mock

import pytest

from megarlhf.config import ConfigError
from megarlhf.runs.partial_answers import PartWriter
from megarlhf.trainers import generate as generate_stage
from tests.distributed.recipe import lines_of, run_stage_of, write_lines
from tests.distributed.test_trainers import assert_alike, said_by
from tests.faults.storm import Started

DIES_WHILE_IT_WRITES = """
import os, signal, sys
from megarlhf import cli
from megarlhf.runs.partial_answers import PartWriter

end, written = PartWriter.end, []

def dying(self, row, tokens):
    if os.environ["RANK"] == "1" and len(written) == 3:
        self._file.write(b'{"row": 3, "tok')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(row)
    return end(self, row, tokens)

PartWriter.end = dying
sys.argv[0] = "megarlhf"
cli.start()
"""


def check_the_rest(folder, run):
    """What is said of a start with other input, and as the killed run is gone on with; which rows were answered; and of a third start."""
    yaml, at = folder / "generate.yaml", [f"run.dir={run}", "parallel.tp=2"]
    other = said_by(yaml, [*at, "samples_per_prompt=2"])[1]
    rows, answer = [], generate_stage._answer

    def answering(*args):
        rows.extend(args[-1])
        return answer(*args)

    with mock.patch.object(generate_stage, "_answer", answering):
        going_on = said_by(yaml, at)
        again = said_by(yaml, at)
    return other, going_on, again, rows


def test_answers_outlive_a_kill_and_no_row_is_answered_twice(recipe, ranks2, tmp_path):
    """Of two copies one is killed within a line; the rest is answered in another layout."""
    (tmp_path / "dies.py").write_text(DIES_WHILE_IT_WRITES)
    run, parts = tmp_path / "run", tmp_path / "run" / "answers"
    words = ["generate", "--config", str(recipe / "generate.yaml"), f"run.dir={run}", "run.timeout_minutes=0.5"]
    started = Started(words, 2, tmp_path / "log.txt", program=(str(tmp_path / "dies.py"),))
    try:
        assert started.processes[1].wait(120) == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
        assert started.processes[0].wait(60) == 1
    finally:
        started.kill()
    assert not (run / "responses.jsonl").exists()
    content = (parts / "00001.jsonl").read_text()
    assert len(content.splitlines()) == 4 and not content.endswith("\n")
    done = {
        json.loads(line)["row"] for path in parts.iterdir() for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")
    }
    expected = lines_of(recipe / "runs" / "generate" / "responses.jsonl")
    assert 3 < len(done) < len(expected)

    other, (said, refused), (again, _), rows = ranks2.run(check_the_rest, recipe, run)[0]
    assert f"{parts} holds answers to other input (samples_per_prompt); choose another run.dir" in other
    assert refused is None and f"going on: {len(done)} of {len(expected)} responses are there" in said
    assert sorted(rows) == sorted(set(range(len(expected))) - done)
    assert_alike(lines_of(run / "responses.jsonl"), expected)
    assert not parts.exists() and f"all {len(expected)} responses are in" in again


def test_a_full_disk_is_said_with_the_file(tmp_path):
    (tmp_path / "00000.jsonl").symlink_to("/dev/full")
    writer = PartWriter(tmp_path / "00000.jsonl", [7], lambda *_: {"response": "x"}, progress=False)
    with pytest.raises(OSError, match="No space left on device: .*00000.jsonl"):
        writer.end(0, [1])
    writer.close()


def check_samples(folder, runs):
    """Three samples of each prompt, and one of a file that has every prompt three times; and a damaged line."""
    prompts = [{**record, "id": i} for i, record in enumerate(lines_of(folder / "prompts.jsonl")[:5])]
    write_lines(runs / "once.jsonl", prompts)
    write_lines(runs / "thrice.jsonl", [record for record in prompts for _ in range(3)])
    yaml = folder / "generate.yaml"
    run_stage_of(yaml, [f"run.dir={runs / 'samples'}", f"prompts={runs / 'once.jsonl'}", "samples_per_prompt=3"])
    run_stage_of(yaml, [f"run.dir={runs / 'copies'}", f"prompts={runs / 'thrice.jsonl'}", "sampling.max_batch_size=2"])
    (runs / "copies" / "responses.jsonl").unlink()
    (runs / "copies" / "answers").mkdir()
    (runs / "copies" / "answers" / "00000.jsonl").write_text('{"row": 0}\n')
    with pytest.raises(ConfigError, match="00000.jsonl:1 is damaged .*; remove the line, and its row is answered again"):
        run_stage_of(yaml, [f"run.dir={runs / 'copies'}", f"prompts={runs / 'thrice.jsonl'}"])
    return lines_of(runs / "samples" / "responses.jsonl")


def test_samples_of_a_prompt_are_those_of_as_many_equal_prompts(recipe, ranks1, tmp_path):
    (samples,) = ranks1.run(check_samples, recipe, tmp_path)
    assert [(line["id"], line["sample"]) for line in samples] == [(i, k) for i in range(5) for k in range(3)]
    assert len({line["response"] for line in samples}) > 5
