"""Generations of a group: between two of them all of its workers are ended and started anew.

Two processes that do the same differ steadily, by up to 4.5%: memory lies elsewhere. That shows in
no number of calls of these two, and in what a speedup is from one generation to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark import Rounds, RunFailed, WarmUp
from errors import InputError, Unsupported
from measure import protocol, quiet
from measure.worker import PREPARE_LIMIT_S, Hosts
from results.record import Machine

if TYPE_CHECKING:
    from measure.group import Running

# What a host takes to import PyTorch.
HOST_S = 3.0


class Generations:
    """Starts the workers of a group anew, and watches the machine within the rounds.

    Args:
        runs: those with a worker.
        rounds: that are made of them.
        folder: for what their engines are reloaded from.
        start: starts a worker for a run.
        request: to prepare a run from a folder in which it was saved.
        warm_up: of a worker that was started anew.
        timed_call: makes what a turn of a run calls.
        seen: called for each run before its first worker ends, which has made what others reload.
        say: takes a line for the user.
    """

    def __init__(
        self,
        runs: Sequence[Running],
        rounds: Rounds,
        hosts: Hosts,
        folder: Path,
        start: Callable[[Running], None],
        request: Callable[[Running, str], protocol.PrepareRun],
        warm_up: WarmUp,
        timed_call: Callable[[Running], Callable[[], float]],
        seen: Callable[[Running], None],
        say: Callable[[str], None],
    ) -> None:
        self.runs, self.rounds, self.hosts, self.folder = runs, rounds, hosts, folder
        self._start, self._request, self._warm_up = start, request, warm_up
        self._timed_call, self._seen, self._say = timed_call, seen, say
        self._spans: list[tuple[quiet.Snapshot, quiet.Snapshot]] = []
        self._began = self._snapshot()
        self._is_first = True

    @property
    def live(self) -> list[Running]:
        """The runs that have not failed."""
        failed = self.rounds.failures
        return [run for run in self.runs if run.worker is not None and run.key not in failed]

    def calls(self) -> dict[str, Callable[[], float]]:
        """What is called in the rounds of the first generation."""
        return {run.key: self._timed_call(run) for run in self.live}

    def expected_s(self) -> float:
        """Seconds that it is expected to take to start all of them anew."""
        return HOST_S + sum(_expected_s(run) for run in self.live)

    def machine(self) -> Machine:
        """What else the machine did within the rounds, up to now."""
        return quiet.within([*self._spans, (self._began, self._snapshot())])

    def renew(self) -> dict[str, Callable[[], float] | RunFailed]:
        """Starts all of them anew, in processes of other hosts: how memory lies is a host's.

        Returns:
            run -> what is called in the rounds that follow, or why there is nothing to call.
        """
        self._spans.append((self._began, self._snapshot()))
        live = self.live
        if self._is_first:
            for run in live:
                self._save(run)
                self._seen(run)
            self._is_first = False
        self.hosts.start_next()
        for run in self.runs:
            run.end()
        self.hosts.renew()
        self.hosts.start_next()  # They import while these are prepared, which nobody times.
        calls = self._started(live)
        self._began = self._snapshot()
        return calls

    def _snapshot(self) -> quiet.Snapshot:
        return quiet.snapshot([run.worker for run in self.live], self.hosts)

    def _saved(self, run: Running) -> str:
        return str(self.folder / f"{run.key}.saved")

    def _save(self, run: Running) -> None:
        try:
            run.ask(protocol.Save(self._saved(run)), PREPARE_LIMIT_S)
        except (RunFailed, Unsupported, InputError) as error:
            self._say(f"{run.label} cannot be saved, and is made anew each time: {error}")

    def _started(self, runs: Sequence[Running]) -> dict[str, Callable[[], float] | RunFailed]:
        """Starts workers for runs. They are prepared at once, and warmed one after the other."""
        calls: dict[str, Callable[[], float] | RunFailed] = {}
        answers: dict[str, Callable[[float], protocol.RunFacts]] = {}
        for run in runs:
            with _failing(run, calls):
                self._start(run)
                answers[run.key] = run.worker.begin(self._request(run, self._saved(run)))
        for run in runs:
            if run.key in answers:
                with _failing(run, calls):
                    answers[run.key](PREPARE_LIMIT_S)
                    calls[run.key] = self._timed_call(run)
        self.hosts.wait_for_next()
        for run in runs:
            # Nothing of this is within a round.
            unsettled = run.unsettled
            if not isinstance(calls[run.key], RunFailed):
                with _failing(run, calls):
                    run.ask(protocol.Warm.by(self._warm_up), PREPARE_LIMIT_S)
            run.unsettled = unsettled
        return calls


def _expected_s(run: Running) -> float:
    """Seconds to build a run's model and warm it."""
    call_s = run.warmup_s[-1] if run.warmup_s else 0.0
    return run.facts.prepare.build + 2 * call_s


@contextmanager
def _failing(run: Running, calls: dict[str, Callable[[], float] | RunFailed]) -> Iterator[None]:
    """While it lasts, a failure costs this run only."""
    try:
        yield
    except (RunFailed, Unsupported, InputError) as error:
        run.end()
        calls[run.key] = RunFailed(f"when it was started anew: {error}")
