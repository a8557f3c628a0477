"""Commands one after another on the same ranks: one alone, or those of a recipe. What one of them sets in its process the next undoes."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megarlhf.api.stages import problems_of, run_in
from megarlhf.config.stage import StageConfig

if TYPE_CHECKING:
    from megarlhf.parallel.groups import World
    from megarlhf.parallel.launch import Place


@dataclass(frozen=True)
class Command:
    """A stage to be run."""

    config: StageConfig
    fresh: bool
    """Whether to refuse to go on with what its folder holds."""
    at: str = ""
    """Its place in a recipe, "recipe.txt:5"."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.config.stage} ({self.at})" if self.at else self.config.stage


@dataclass
class Series:
    """Runs commands in a world that is made anew for each but the first, so that each finds what it would find alone."""

    name: str
    """What is under way, as messages call it: the program's command, then each of the series."""
    commands: Sequence[Command]
    """Empty where they could not be read, which `run` is told."""
    place: Place
    is_recipe: bool = False
    world: World | None = field(default=None, repr=False)
    """The present one, once `run` has begun."""
    _threads: int = 0
    """torch's own choice."""

    def set_threads(self, command: Command) -> None:
        """Give torch the command's number of threads, without one its own choice."""
        import torch

        self._threads = self._threads or torch.get_num_threads()
        wanted = command.config.run.threads or self._threads
        if wanted != torch.get_num_threads():
            torch.set_num_threads(wanted)

    def run(self, world: World, problem: str | None) -> None:
        """Run all, in a world that was joined for the first of them; a collective.

        ConfigError on every rank, before the first begins, where any rank has a `problem` or other commands. Interrupted also between two
        commands: of the signals that ask a run to stop, those that come while no step is under way wait for the next that can be heard.
        """
        from megarlhf.runs.interruption import Interruption

        self.world = world
        problems = [problem] if problem else []
        if not self.is_recipe:
            config, fresh = (self.commands[0].config, self.commands[0].fresh) if self.commands else (None, False)
            run_in(world, config, problems=problems, fresh=fresh)
            return
        self._agree(problems)
        with Interruption((signal.SIGTERM, signal.SIGUSR1)) as asked:
            for number, command in enumerate(self.commands, 1):
                if number > 1:
                    gc.collect()  # models are cycles, and hold process groups
                    self.set_threads(command)
                    self.world = self.world.renewed(timeout_minutes=command.config.run.timeout_minutes)
                self.name = command.name
                self._stop_if_asked(asked.received)
                if self.world.rank == 0:
                    what = f"{command.config.stage} {command.config.run.dir}"
                    print(f"== {number} of {len(self.commands)}: {what}", file=sys.stderr, flush=True)
                self.world.alarm.doing = f"the start of {command.config.stage}"
                here = problems_of(command.config, self.place)
                run_in(self.world, command.config, problems=here, fresh=command.fresh, asked=asked)

    def _agree(self, problems: Sequence[str]) -> None:
        """ConfigError on every rank where any has problems, or the ranks were given different commands."""
        from megarlhf.parallel.collectives import gather_objects
        from megarlhf.runs.agreement import refuse_together, require_same_config

        refuse_together(problems, self.world)
        read = gather_objects([(command.config.stage, command.fresh) for command in self.commands])
        if others := [rank for rank, found in enumerate(read) if found != read[0]]:
            ranks = ", ".join(map(str, others))
            refuse_together([f"rank {ranks} of {self.world.size} read other commands than rank 0: is it an old copy?"], self.world)
        for command in self.commands:
            self.name = command.name
            require_same_config(command.config, self.world)

    def _stop_if_asked(self, received: int) -> None:
        from megarlhf.parallel.collectives import largest_of_world
        from megarlhf.runs.interruption import Interrupted

        if asked := largest_of_world([received], self.world)[0]:
            raise Interrupted(f"stopped by {signal.Signals(asked).name} before it began; start the recipe again to go on", asked)
