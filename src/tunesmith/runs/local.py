"""Trainers as subprocesses on this machine. Knows processes, signals and orders, nothing of jobs or training.

A handle is `<pid>:<start time>`, and `<pid>:<start time>/<n>` for a run that joined. The start time tells a run from a
stranger that was given the same pid later, so that a dispatcher started anew can neither watch nor kill the wrong
process.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.rundir import ORDERS, PARENT_PID, RunDir
from tunesmith.runs.executor import RunState, trainer_of

logger = logging.getLogger(__name__)

TRAINER = (sys.executable, "-m", "tunesmith.training")
VMSTAT = Path("/proc/vmstat")
LET_GO_WITHIN_S = 10.0
"""A trainer of several runs that has not let go of one by then is killed: it hangs. The others are started again."""
_ZOMBIE = "Z"


@dataclass(slots=True)
class _Trainer:
    """A child process and the runs it trains."""

    child: subprocess.Popen[bytes]
    folder: RunDir
    """The run it was started for; its output is in the log there."""
    memory_kills: int
    """How often the kernel had killed for memory when the process was started."""
    runs: dict[str, RunDir] = field(default_factory=dict)
    """Those it has not let go of, by handle."""
    joined: int = 0
    """How many came after the first."""
    ending: bool = False
    """Whether it was told to end, with all its runs."""

    def has_let_go(self, handle: str) -> bool:
        """Whether a run has ended while the process goes on with others; the last one ends with the process."""
        folder = self.runs.get(handle) if len(self.runs) > 1 else None
        return folder is not None and (folder.released.exists() or folder.outcome.exists())

    def order(self, verb: str, folder: RunDir) -> bool:
        """Whether the process is there to read it. See `tunesmith.rundir`."""
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(f"{verb} {folder.path}\n".encode())
            self.child.stdin.flush()
        except BrokenPipeError:
            return False
        return True


class LocalExecutor:
    """Starts `command <run folder> ORDERS` as a process of its own group, in the background of all that answers users.

    The trainer asks the kernel to be killed when the thread that started it ends, so `start` is to be called from a
    thread that lives as long as its runs may.
    """

    def __init__(
        self,
        *,
        threads: int,
        niceness: int,
        command: Sequence[str] = TRAINER,
        monotonic: Callable[[], float] = time.monotonic,
        memory_kills: Callable[[], int] = lambda: count_memory_kills(VMSTAT),
    ) -> None:
        self._command = tuple(command)
        self._threads = threads
        self._niceness = niceness
        self._monotonic = monotonic
        self._memory_kills = memory_kills
        self._trainers: dict[str, _Trainer] = {}
        self._exited: set[str] = set()
        self._asked_at: dict[str, float] = {}

    def start(self, run_dir: Path, beside: str | None = None) -> str:
        """See `Executor`. Output of the process is appended to the log of the run that it was started for."""
        folder = RunDir(run_dir)
        folder.released.unlink(missing_ok=True)
        return (None if beside is None else self._join(folder, trainer_of(beside))) or self._spawn(folder)

    def state(self, handle: str) -> RunState:
        """See `Executor`."""
        name = trainer_of(handle)
        trainer = self._trainers.get(name)
        if trainer is None:
            if handle in self._exited:
                return RunState.EXITED
            return RunState.RUNNING if _is_running(name) else RunState.LOST
        code = trainer.child.poll()
        if code is not None:
            self._note_end(name, trainer, code)
        elif trainer.has_let_go(handle):
            self._let_go(trainer, handle)
        return RunState.EXITED if handle in self._exited else RunState.RUNNING

    def stop(self, handle: str, grace_s: float) -> None:
        """See `Executor`: SIGTERM, at which a trainer writes a checkpoint and exits; then SIGKILL.

        A trainer of other runs too is ordered to let go of this one, with or without a checkpoint.
        """
        if self.state(handle) is not RunState.RUNNING:
            return
        now = self._monotonic()
        first = handle not in self._asked_at
        asked_at = self._asked_at.setdefault(handle, now)
        trainer = self._trainers.get(trainer_of(handle))
        if trainer is not None and len(trainer.runs) > 1:
            if first or grace_s == 0:
                trainer.order("save" if grace_s > 0 else "drop", trainer.runs[handle])
            grace_s += LET_GO_WITHIN_S
        if now - asked_at >= grace_s:
            self._signal(handle, signal.SIGKILL)
        elif first and (trainer is None or len(trainer.runs) == 1):
            self._signal(handle, signal.SIGTERM)

    def _join(self, folder: RunDir, name: str) -> str | None:
        trainer = self._trainers.get(name)
        if trainer is None or trainer.ending or trainer.child.poll() is not None or not trainer.order("take", folder):
            return None
        trainer.joined += 1
        handle = f"{name}/{trainer.joined}"
        trainer.runs[handle] = folder
        with folder.log.open("a") as log:
            log.write(f"The trainer process is that of {trainer.folder.path.name}, whose log tells more.\n")
        return handle

    def _spawn(self, folder: RunDir) -> str:
        kills = self._memory_kills()
        with folder.log.open("ab") as log:
            child = subprocess.Popen(
                [*self._command, str(folder.path), ORDERS],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=trainer_environment(os.environ, self._threads),
                # A group of its own: Ctrl-C in the server's terminal reaches the server alone, which then drains.
                # Not a session of its own: with autogroup scheduling, niceness would count only within it.
                process_group=0,
            )
        # Set from here and not between fork and exec, where a process with threads may run next to nothing safely.
        os.setpriority(os.PRIO_PROCESS, child.pid, self._niceness)
        # An unreaped child keeps its entry in the process table, so there is a start time even if it has died already.
        handle = f"{child.pid}:{_stat(child.pid)[1]}"
        self._trainers[handle] = _Trainer(child, folder, kills, {handle: folder})
        return handle

    def _signal(self, handle: str, number: signal.Signals) -> None:
        name = trainer_of(handle)
        if name in self._trainers:
            self._trainers[name].ending = True
        try:
            os.killpg(int(name.partition(":")[0]), number)
        except ProcessLookupError:
            logger.debug("trainer %s ended before %s reached it", name, number.name)

    def _note_end(self, name: str, trainer: _Trainer, code: int) -> None:
        # A kill that was not ours, while the kernel killed for memory somewhere: this was most likely one of them.
        # If it was not, the runs go on a little slower.
        for_memory = code == -signal.SIGKILL and not trainer.ending and self._memory_kills() > trainer.memory_kills
        for handle, folder in list(trainer.runs.items()):
            _note_exit(folder, code, for_memory=for_memory)
            self._let_go(trainer, handle)
        assert trainer.child.stdin is not None
        with suppress(BrokenPipeError):
            trainer.child.stdin.close()
        del self._trainers[name]

    def _let_go(self, trainer: _Trainer, handle: str) -> None:
        del trainer.runs[handle]
        self._asked_at.pop(handle, None)
        self._exited.add(handle)


def trainer_environment(inherited: Mapping[str, str], threads: int) -> dict[str, str]:
    """Environment of a trainer: the inherited one with the settings that must be there before its libraries load."""
    return {
        **inherited,
        PARENT_PID: str(os.getpid()),
        "OMP_NUM_THREADS": str(threads),
        # Idle OpenMP threads sleep instead of spinning on a core that the engine needs to answer.
        "OMP_WAIT_POLICY": "passive",
        # Freed activations stay in the process instead of going back to the kernel after every step: 38 % fewer page
        # faults, a third less system time (docs/design/runs.md).
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
        # Large pages, where the system gives them on request: a step is 4 to 10 % faster. The last word is the user's.
        "GLIBC_TUNABLES": ":".join(filter(None, ["glibc.malloc.hugetlb=1", inherited.get("GLIBC_TUNABLES")])),
    }


def count_memory_kills(vmstat: Path) -> int:
    """How many processes the kernel has killed for memory since the machine started; 0 where it does not say."""
    try:
        fields = dict(line.split(maxsplit=1) for line in vmstat.read_text().splitlines())
    except OSError:
        return 0
    return int(fields.get("oom_kill", 0))


def _note_exit(folder: RunDir, code: int, *, for_memory: bool) -> None:
    """The log's last line says how the process ended: a killed one had no time to say it itself."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    if for_memory:
        how += ": the server ran out of memory"
        folder.note_shortage()  # the next trainer takes smaller micro-batches
    logger.info("trainer %s run=%s", how, folder.path.name)
    if code != 0 and folder.path.is_dir():
        with folder.log.open("a") as log:
            log.write(f"The trainer process {how}.\n")


def _is_running(name: str) -> bool:
    pid, _, started = name.partition(":")
    try:
        status, actual = _stat(int(pid))
    except (ProcessLookupError, ValueError):
        return False
    return actual == started and status != _ZOMBIE


def _stat(pid: int) -> tuple[str, str]:
    """Status letter and start time of a process. Raises ProcessLookupError if there is none of this pid."""
    if not Path("/proc/self/stat").exists():
        return _stat_by_ps(pid)
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError as error:
        raise ProcessLookupError(pid) from error
    # The command's name stands in parentheses and may hold anything: count fields from behind it. proc(5): 3rd, 22nd.
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]


def _stat_by_ps(pid: int) -> tuple[str, str]:
    """The same where there is no /proc, for example on macOS."""
    answer = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False, env={"LC_ALL": "C"}
    )
    status, _, started = answer.stdout.strip().partition(" ")
    if not started:
        raise ProcessLookupError(pid)
    return status[0], "-".join(started.split())
