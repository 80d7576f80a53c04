"""One subprocess per run on this machine. Knows processes and signals, nothing of jobs or training.

A handle is `<pid>:<start time>`. The start time tells a run from a stranger that was given the same pid later, so that
a dispatcher started anew can neither watch nor kill the wrong process.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tunesmith.rundir import PARENT_PID, RunDir
from tunesmith.runs.executor import RunState

logger = logging.getLogger(__name__)

TRAINER = (sys.executable, "-m", "tunesmith.training")
VMSTAT = Path("/proc/vmstat")
_ZOMBIE = "Z"


class LocalExecutor:
    """Starts `command <run folder>` as a process of its own group, in the background of everything that answers users.

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
        self._children: dict[str, tuple[subprocess.Popen[bytes], RunDir, int]] = {}
        """With how often the kernel had killed for memory when the process was started."""
        self._exited: set[str] = set()
        self._asked_at: dict[str, float] = {}

    def start(self, run_dir: Path) -> str:
        """See `Executor`. Output of the process is appended to the folder's log."""
        folder = RunDir(run_dir)
        kills = self._memory_kills()
        with folder.log.open("ab") as log:
            child = subprocess.Popen(
                [*self._command, str(run_dir)],
                stdin=subprocess.DEVNULL,
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
        self._children[handle] = (child, folder, kills)
        return handle

    def state(self, handle: str) -> RunState:
        """See `Executor`."""
        if handle in self._children:
            child, folder, kills = self._children[handle]
            code = child.poll()
            if code is None:
                return RunState.RUNNING
            # A kill that was not ours, while the kernel killed for memory somewhere: this was most likely one of them.
            # If it was not, the run goes on a little slower.
            for_memory = code == -signal.SIGKILL and handle not in self._asked_at and self._memory_kills() > kills
            _note_exit(folder, code, for_memory=for_memory)
            del self._children[handle]
            self._asked_at.pop(handle, None)
            self._exited.add(handle)
        if handle in self._exited:
            return RunState.EXITED
        return RunState.RUNNING if _is_running(handle) else RunState.LOST

    def stop(self, handle: str, grace_s: float) -> None:
        """See `Executor`: SIGTERM, at which a trainer writes a checkpoint and exits; then SIGKILL."""
        if self.state(handle) is not RunState.RUNNING:
            return
        now = self._monotonic()
        first = handle not in self._asked_at
        asked_at = self._asked_at.setdefault(handle, now)
        if now - asked_at >= grace_s:
            _signal(handle, signal.SIGKILL)
        elif first:
            _signal(handle, signal.SIGTERM)


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


def _signal(handle: str, number: signal.Signals) -> None:
    try:
        os.killpg(int(handle.partition(":")[0]), number)
    except ProcessLookupError:
        logger.debug("run %s ended before %s reached it", handle, number.name)


def _is_running(handle: str) -> bool:
    pid, _, started = handle.partition(":")
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
