"""`megarlhf chat` as a process behind a pipe: its answers are the generator's, and Ctrl-C stops one of them."""

import os
import signal
import subprocess
import sys
import threading

from megarlhf.chat import command

SLOW = """
import signal, sys, time
from megarlhf import cli
from megarlhf.chat.conversation import SpokenText

token = SpokenText.token

def slow(self, row, number):
    token(self, row, number)
    time.sleep(0.4)

SpokenText.token = slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that started the tests in the background has it ignored
sys.argv[0] = "megarlhf"
cli.start()
"""
TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
LINES = ["word 1?", "/nothing", "word 2?", "/reset", "word 1?", "//word", "/help", "/quit", "word 3?"]


def started(words, *, program=("-m", "megarlhf"), **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "PYTHONIOENCODING": "utf-8", **environment}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *program, "chat", *words], env=env, encoding="utf-8", **pipes)


def test_lines_through_a_pipe_are_answered(recipe):
    words = [str(recipe / "runs" / "ppo"), "--max-new-tokens", "12", "--temperature", "1", "--seed", "5"]
    out, notes = started(words).communicate("".join(f"{line}\n" for line in LINES), timeout=300)
    for note in (
        "policy of",
        "as plain text, for its tokenizer comes without a chat template",
        "there is no /nothing",
        "forgotten",
        "/help",
    ):
        assert note in notes
    assert "Traceback" not in notes
    one_by_one = started(words)
    deadline = threading.Timer(300, one_by_one.kill)
    deadline.start()
    try:
        first, second = (said_to(one_by_one, line) for line in ("word 1?", "word 2?"))
        assert len(first) > 10 and out.startswith(first + second)
        assert out[len(first + second) :].startswith(first), "after /reset it is said again, without what was said between"
        one_by_one.stdout.close()  # as `head` does
        notes = one_by_one.communicate("word 3?\n" * 20)[1]
        assert one_by_one.returncode == 0 and "ipe" not in notes and "Traceback" not in notes
    finally:
        deadline.cancel()
        one_by_one.kill()


def said_to(process, line):
    """The answer: what stands in the pipe when a command that comes after the line is obeyed."""
    process.stdin.write(f"{line}\n/help\n")
    process.stdin.flush()
    while not process.stderr.readline().startswith("Ctrl-C"):  # the end of the help
        assert process.poll() is None, "the program has ended"
    said = os.read(process.stdout.fileno(), 65536).decode()
    return said.replace("\r\n", "\n").replace("\r", "\n")  # as reading text does


def test_ctrl_c_stops_the_answer_and_not_the_program(recipe, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    words = [str(recipe / "runs" / "ppo"), "--max-new-tokens", "20", "--temperature", "1", "--seed", "5"]
    process = started(words, program=(str(tmp_path / "slow.py"),))
    deadline = threading.Timer(300, process.kill)
    deadline.start()
    try:
        process.stdin.write("word 1?\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.readline()
        while not rest.endswith(" ...\n"):  # an answer may have lines
            line = process.stdout.readline()
            assert line, "the program has ended"
            rest += line
        process.stdin.write("/help\n/quit\n")
        notes = process.communicate(timeout=60)[1]
    finally:
        deadline.cancel()
        process.kill()
    assert process.returncode == 0 and "forget what was said" in notes and "Traceback" not in notes


def test_what_cannot_be_talked_to_is_said(recipe, monkeypatch, capsys):
    for words, environment, said in (
        ([str(recipe / "runs" / "reward")], {}, "is a reward model or a value function, which says nothing"),
        ([str(recipe / "runs" / "sft"), "--system", "be brief"], {}, "without one there is no system message"),
        ([str(recipe / "runs" / "sft")], TWO, "held by one process, and 2 were started"),
    ):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert command.main(words) == 2
        out, notes = capsys.readouterr()
        assert out == "" and notes.startswith("megarlhf chat: ") and said in notes
