"""The parent's side of workers: start the host of an environment, ask a worker, end it.

A worker is a process of its own for one run. Whatever happens to it (a crash in an engine, a hang,
the system killing it for its memory) becomes a `benchmark.RunFailed` here, and costs that run only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil

from benchmark import RunFailed
from errors import InputError, Unsupported
from measure import protocol
from measure.protocol import CHUNK, HOST, PROTOCOL, STOP_S

PREPARE_LIMIT_S = 1800.0
# A call of the slowest test model takes some ten seconds on two cores; at `max` ten times that.
CALL_LIMIT_S = 600.0
# What a host does before it imports anything takes a second, and starting a container some more.
HELLO_LIMIT_S = 60.0
# That a command may print before, such as the banner of a container.
MOST_OTHER_LINES = 200
# Importing PyTorch for the first time, from a slow disk.
READY_LIMIT_S = 300.0
# To do what takes no time: fork, kill, end.
MOMENT_S = 10.0
# A worker that has answered may compute on: threads of engines wait for more work by spinning. It
# stands still when it used less than this share of a core in two steps, one after the other.
SETTLE_STEP_S = 0.005
SETTLED_SHARE = 0.2
SETTLE_LIMIT_S = 1.0
LIBC = ctypes.CDLL(None)
RUN = Path(__file__).resolve().parent / "run.py"

A = TypeVar("A")


class NotTheProtocol(Exception):
    """Something else was printed than a line of the protocol."""

    def __init__(self, printed: Any) -> None:
        self.printed = str(printed)
        super().__init__(f"it printed {self.printed[:80]!r} in place of the protocol")


@dataclass(frozen=True)
class Command:
    """What is started for the workers of an environment.

    Attributes:
        name: in messages: `openvino@old`; None for the suite's own environment.
        words: the interpreter, or a command that ends in one.
    """

    name: str | None
    words: tuple[str, ...]

    @classmethod
    def own(cls) -> Command:
        """The suite's own interpreter."""
        return cls(None, (sys.executable,))

    @classmethod
    def of(cls, name: str, text: str) -> Command:
        """From the command line.

        Raises:
            errors.InputError: there is no such program.
        """
        try:
            words = [os.path.expanduser(word) for word in shlex.split(text)]
        except ValueError as error:
            raise InputError(f"environment {name}: '{text}' is no command: {error}") from None
        if not words:
            raise InputError(f"environment {name}: there is no command")
        if shutil.which(words[0]) is None:
            what = "is no program that can be run" if Path(words[0]).exists() else "does not exist"
            raise InputError(f"environment {name}: {words[0]} {what}")
        return cls(name, tuple(words))

    def __str__(self) -> str:
        return "the suite's own environment" if self.name is None else f"environment {self.name}"


class Host:
    """The process of an environment that forks its workers.

    It starts in the background: `wait` for it before there is need of it.

    Args:
        log: file that takes what it prints.

    Raises:
        errors.InputError: the command cannot be started.
    """

    def __init__(self, command: Command, log: Path) -> None:
        self.command, self.log = command, log
        self.is_visible = True
        self._hello: protocol.Hello | None = None
        self._is_ready = False
        self._buffer = bytearray()
        self._lines: deque[bytes] = deque()
        self._deaths: dict[int, int] = {}
        # Answers to what several workers were asked at once: of worker and id of the request.
        self._awaited: set[tuple[int, int]] = set()
        self._replies: dict[tuple[int, int], dict[str, Any]] = {}
        self._count = self._asked = 0
        try:
            with open(log, "ab") as file:
                self.process = subprocess.Popen(
                    [*command.words, str(RUN)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    bufsize=0,
                    # Ctrl-C is for the parent.
                    start_new_session=True,
                )
        except OSError as error:
            raise InputError(f"{command} cannot be started: {error.strerror or error}") from None

    def wait(self) -> protocol.Hello:
        """Waits until workers can be started.

        Raises:
            errors.InputError: the command is no interpreter that can run workers.
        """
        if self._hello is None:
            self._hello = hello = self._greeting("hello", protocol.Hello, HELLO_LIMIT_S)
            if hello.protocol != PROTOCOL:
                raise InputError(
                    f"{self.command} speaks protocol {hello.protocol} of workers, and this version "
                    f"of the suite {PROTOCOL}: give it the same version"
                )
            # In a container, or behind another command, it is another process than was started.
            self.is_visible = hello.pid == self.process.pid
        if not self._is_ready:
            ready = self._greeting("ready", protocol.Ready, READY_LIMIT_S)
            if ready.problem is not None:
                raise InputError(f"{self.command} cannot run workers: {ready.problem}")
            self._is_ready = True
        return self._hello

    def _greeting(self, name: str, kind: type[A], limit_s: float) -> A:
        """One of the first lines of a host; entry points of containers may print others before.

        Raises:
            errors.InputError: it does not come.
        """
        odd: NotTheProtocol | None = None
        deadline = time.monotonic() + limit_s
        try:
            for _ in range(MOST_OTHER_LINES):
                try:
                    return _greeted(self._next(deadline), name, kind)
                except NotTheProtocol as error:
                    if odd is None and error.printed:
                        odd = error
        except TimeoutError:
            raise InputError(
                f"{self.command} did not start within {limit_s:g} s: {shlex.join(self._words())}"
            ) from None
        except EOFError:
            if odd is None:
                raise InputError(
                    f"{self.command} cannot run workers, which need Python 3.8 or newer: "
                    f"{self._last_words()}"
                ) from None
        raise InputError(f"{self.command} is no Python that runs workers: {odd}")

    def _words(self) -> list[str]:
        return [Path(word).name for word in self.command.words]

    def _last_words(self) -> str:
        """Why it has ended: its exit code, and the last line that it has printed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(MOMENT_S)
        printed = self.log.read_text(errors="replace").strip().splitlines()
        last = f": {printed[-1]}" if printed else ""
        return f"it {_cause_of_death(self.process.poll())}{last}"

    def start(self, log: Path, threads: int, tf32: bool | None = None) -> Worker:
        """Forks a worker.

        Args:
            log: file that takes what it prints; its temporary files lie beside it.
            threads: CPU threads that it may use.
            tf32: see `protocol.Start`.

        Raises:
            errors.InputError: see `wait`.
            benchmark.RunFailed: the host has died, or hangs.
        """
        self.wait()
        self._count += 1
        number = self._count
        request = protocol.Start(number, str(log), threads, tf32)
        try:
            return Worker(self, number, self.ask(HOST, request, MOMENT_S).pid, log)
        except TimeoutError:
            raise RunFailed(f"no worker was started within {MOMENT_S:g} s") from None
        except InputError as error:
            raise InputError(f"{self.command}: {error}") from None

    @contextlib.contextmanager
    def worker(self, log: Path, threads: int, tf32: bool | None = None) -> Iterator[Worker]:
        """A worker for some questions, see `start`; it ends with the block."""
        worker = self.start(log, threads, tf32)
        try:
            yield worker
        finally:
            worker.kill()

    def ask(self, number: int, request: protocol.Request[A], limit_s: float) -> A:
        """Sends a request to a worker, or to the host itself, and waits for its answer.

        Raises:
            TimeoutError: there is none in time.
            benchmark.RunFailed: the worker failed or died.
            errors.InputError, errors.Unsupported: as raised there.
        """
        return self.answer(number, self.begin(number, request), request, limit_s)

    def begin(self, number: int, request: protocol.Request[Any]) -> int:
        """Sends a request whose `answer` will be asked for; returns its id.

        Raises:
            benchmark.RunFailed: the host has died.
        """
        try:
            asked = self.tell(number, request)
        except BrokenPipeError:
            raise RunFailed(f"the host of its worker died: {self._last_words()}") from None
        self._awaited.add((number, asked))
        return asked

    def answer(self, number: int, asked: int, request: protocol.Request[A], limit_s: float) -> A:
        """Waits for the answer to a request, see `ask`."""
        place, deadline = (number, asked), time.monotonic() + limit_s
        try:
            while place not in self._replies and number not in self._deaths:
                reply = self._hear(deadline)
                of = (reply.get("from"), reply.get("id"))
                if of in self._awaited:  # Others are outdated.
                    self._replies[of] = reply
            if place in self._replies:
                return _answer(self._replies.pop(place), request)
        except EOFError:
            raise RunFailed(f"the host of its worker died: {self._last_words()}") from None
        except NotTheProtocol as odd:
            raise RunFailed(f"{self.command} is out of step: {odd}") from None
        finally:
            self._awaited.discard(place)
        raise RunFailed(f"the process {_cause_of_death(self._deaths[number])}")

    def wait_for_end(self, number: int, limit_s: float) -> None:
        """Waits until a worker has ended, or the host, or that takes too long."""
        deadline = time.monotonic() + limit_s
        with contextlib.suppress(TimeoutError, EOFError, NotTheProtocol):
            while number not in self._deaths:
                self._hear(deadline)

    def tell(self, number: int, request: protocol.Request[Any]) -> int:
        """Sends a request without waiting for its answer; returns the id of that.

        Raises:
            BrokenPipeError: the host has died.
        """
        self._asked += 1
        message = {"to": number, "id": self._asked, "ask": type(request).__name__}
        line = json.dumps({**message, "with": asdict(request)}).encode() + b"\n"
        self.process.stdin.write(line)
        return self._asked

    def _hear(self, deadline: float) -> dict[str, Any]:
        """The next message, see `_next`; takes note of the death that it may tell of."""
        message = self._next(deadline)
        if "died" in message:
            self._deaths[message["number"]] = message["died"]
        return message

    def _next(self, deadline: float) -> dict[str, Any]:
        """The next message.

        Raises:
            TimeoutError: there is none in time.
            EOFError: the host has ended.
            NotTheProtocol: what came is no message.
        """
        while not self._lines:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError
            read = os.read(self.process.stdout.fileno(), CHUNK)
            if not read:
                raise EOFError
            self._buffer += read
            self._lines += protocol.lines(self._buffer)
        return _message(self._lines.popleft())

    def ended_seconds(self) -> float:
        """CPU seconds of its workers that have ended; 0 where they cannot be seen."""
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return times.children_user + times.children_system if self.is_visible else 0.0

    def close(self) -> None:
        """Ends the host and all of its workers."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            # One that is not ready has no workers, and is busy with its imports.
            self.process.wait(MOMENT_S if self._is_ready else 0)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise NotTheProtocol(line.decode(errors="replace"))
    return message


def _greeted(message: dict[str, Any], name: str, kind: type[A]) -> A:
    try:
        return msgspec.convert(message[name], kind)
    except (KeyError, msgspec.ValidationError):
        raise NotTheProtocol(message) from None


def _cause_of_death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = ", perhaps by the system for want of memory" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def _answer(reply: dict[str, Any], request: protocol.Request[A]) -> A:
    if "error" in reply:
        kinds = {"InputError": InputError, "Unsupported": Unsupported}
        raise kinds.get(reply["error"], RunFailed)(reply["message"])
    try:
        return msgspec.convert(reply["answer"], request.answer)
    except msgspec.ValidationError as error:
        name = type(request).__name__
        raise RunFailed(f"the answer to {name} is not of the protocol: {error}") from None


@dataclass(frozen=True)
class _Moment:
    """Seconds of a clock, and of CPU that a process has used until then."""

    time: float
    cpu: float


def _process_clock(pid: int) -> float | None:
    """CPU seconds of a process by the clock that Linux has for it; psutil counts in hundredths."""
    get_clock = getattr(LIBC, "clock_getcpuclockid", None)
    clock = ctypes.c_int()
    if get_clock is None or get_clock(pid, ctypes.byref(clock)) != 0:
        return None
    try:
        return time.clock_gettime(clock.value)
    except OSError:
        return None


def _wants_core(pid: int) -> bool:
    """Whether a thread of a process runs, or would if it had a core, as Linux tells it."""
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        # A thread may end meanwhile. Its name is in parentheses, whatever that is.
        with contextlib.suppress(OSError, IndexError):
            if path.read_bytes().rpartition(b")")[2].split()[0] == b"R":
                return True
    return False


class Worker:
    """A process for one run.

    Attributes:
        pid: as its host sees it.
        log: file that takes what it prints.
    """

    def __init__(self, host: Host, number: int, pid: int, log: Path) -> None:
        self.host, self.pid, self.log = host, pid, log
        self._number = number
        self._is_alive = True

    def ask(self, request: protocol.Request[A], limit_s: float = CALL_LIMIT_S) -> A:
        """Sends a request and waits for its answer.

        Raises:
            benchmark.RunFailed: the process failed, died, or took longer than `limit_s`.
            errors.InputError, errors.Unsupported: as raised there.
        """
        return self.begin(request)(limit_s)

    def begin(self, request: protocol.Request[A]) -> Callable[[float], A]:
        """Sends a request; others may be asked, too, until what it returns waits for the answer.

        Raises:
            benchmark.RunFailed: the host has died.
        """
        asked = self.host.begin(self._number, request)

        def answer(limit_s: float) -> A:
            try:
                return self.host.answer(self._number, asked, request, limit_s)
            except TimeoutError:
                self.kill()
                raise RunFailed(f"no answer within {limit_s:g} s") from None

        return answer

    def cpu_seconds(self) -> float | None:
        """CPU that it and its children that have ended have used; None where it has died."""
        if not self.host.is_visible:
            try:
                return self.ask(protocol.ReadCpuTime(), MOMENT_S).seconds
            except RunFailed:  # That is told elsewhere.
                return None
        try:
            times = psutil.Process(self.pid).cpu_times()
        except psutil.Error:
            return None
        return times.user + times.system + times.children_user + times.children_system

    def settle(self, limit_s: float = SETTLE_LIMIT_S) -> bool:
        """Waits until the process uses no more CPU, so that it disturbs nothing that comes next.

        Returns:
            False where it still did after `limit_s` seconds.
        """
        deadline = time.monotonic() + limit_s
        still, before = 0, self._cpu_clock()
        while before is not None and still < 2:
            if before.time > deadline:
                return False
            time.sleep(SETTLE_STEP_S)
            now = self._cpu_clock()
            if now is not None:
                used = (now.cpu - before.cpu) / (now.time - before.time)
                # On a machine that is busy it may use none and want some.
                is_still = used < SETTLED_SHARE and not self._wants_core()
                still = still + 1 if is_still else 0
            before = now  # None: it has died, and that is told when it is asked again.
        return True

    def _cpu_clock(self) -> _Moment | None:
        """What it has used so far, to the microsecond where the system has such a clock."""
        moment = time.monotonic()
        seconds = _process_clock(self.pid) if self.host.is_visible else None
        if seconds is None:
            seconds = self.cpu_seconds()
        return None if seconds is None else _Moment(moment, seconds)

    def _wants_core(self) -> bool:
        return self.host.is_visible and _wants_core(self.pid)

    def dismiss(self) -> None:
        """Tells the process to clear away what engines opened, and end; `stop` waits for that."""
        with contextlib.suppress(OSError):
            self.host.tell(self._number, protocol.Stop())

    def stop(self) -> None:
        """Ends the process, politely where it listens."""
        self.dismiss()
        self.host.wait_for_end(self._number, STOP_S)
        self.kill()

    def kill(self) -> None:
        """Ends the process at once, and waits for its end."""
        if not self._is_alive:
            return
        self._is_alive = False
        with contextlib.suppress(RunFailed, TimeoutError):
            self.host.ask(HOST, protocol.Kill(self._number), MOMENT_S)
        self.host.wait_for_end(self._number, MOMENT_S)


class Hosts:
    """The hosts of an invocation, one for each command.

    What is measured together is forked from hosts of its own: where memory lies differs between
    hosts, and is much the same among the workers of one.

    Args:
        folder: for their logs.
    """

    def __init__(self, commands: Sequence[Command], folder: Path) -> None:
        self.commands, self.folder = tuple(dict.fromkeys(commands)), folder
        self._open: dict[Command, Host] = {}
        self._next: dict[Command, Host] = {}
        self._count = 0

    def start(self) -> None:
        """Starts a host for each command, in the background."""
        for command in self.commands:
            self.of(command)

    def of(self, command: Command) -> Host:
        """The host of a command, which is started where there is none yet."""
        host = self._open.get(command)
        if host is None or host.process.poll() is not None:
            if host is not None:
                host.close()
            self._open[command] = self._started(command)
        return self._open[command]

    def _started(self, command: Command) -> Host:
        self._count += 1
        return Host(command, self.folder / f"host-{self._count}.log")

    def start_next(self) -> None:
        """Starts the hosts that `renew` will take, while there is nothing to disturb.

        One that cannot be started any more is told of when a worker is needed.
        """
        for command in self.commands:
            if command not in self._next:
                with contextlib.suppress(InputError):
                    self._next[command] = self._started(command)

    def wait_for_next(self) -> None:
        """Waits until the hosts that `renew` will take have imported what they need."""
        for host in self._next.values():
            with contextlib.suppress(InputError):
                host.wait()

    def renew(self) -> None:
        """From here on, workers are forked from other hosts."""
        for host in self._open.values():
            host.close()
        self._open, self._next = self._next, {}

    def ended_seconds(self) -> float:
        """CPU seconds of workers that have ended."""
        return sum(host.ended_seconds() for host in self._open.values())

    def close(self) -> None:
        """Ends all hosts and workers."""
        for host in (*self._open.values(), *self._next.values()):
            host.close()
        self._open, self._next = {}, {}


# Scratch folders begin with this, and have a lock in them as long as their process lives.
SCRATCH, LOCK = "run_blade_", "lock"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A directory for temporary files, removed at the end.

    Also where a compiler that an engine started has not noticed yet that its worker is gone.

    Raises:
        errors.InputError: there is no room for one.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(tempfile.mkdtemp(prefix=SCRATCH))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            # No other invocation sees it before it is locked.
            lock = stack.enter_context(open(folder / f"{LOCK}.new", "w"))
            with contextlib.suppress(OSError):  # Not all file systems have locks.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(lock.name, folder / LOCK)
        except OSError as error:
            raise InputError(
                f"there is no room for temporary files: {error.strerror or error}; TMPDIR names "
                "another folder for them"
            ) from None
        yield folder


def remove_left_behind() -> None:
    """Removes the scratch folders of invocations that were killed.

    Call it within a `scratch_folder`, so that there is a place for temporary files.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*/{LOCK}"):
        # Another user's, or one that another invocation has just removed; or it is in use.
        with contextlib.suppress(OSError), open(path, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
