"""The engine: one queue of tasks, and batches whose rows are replaced as soon as they are done.

Rows that share a compiled program (a `Family`) form a batch; several batches take turns. The engine runs in a thread of
its own. It returns from the compiled loop after a fraction of a second, and then reads what was written, frees the rows
that are done or not wanted any more, and lets waiting tasks in, in the order in which they came.

The answer to a task depends on nothing but the task: not on the rows beside it, and not on when it joined them.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from dream_jax import sharding
from dream_jax.bounds import MOST_ROWS, MOST_TOKENS, POSITIVE, IntegerRange, check_numbers
from dream_jax.model import Dream
from dream_jax.sampler import SamplerConfig
from dream_jax.sampler.generate import UNDEFINED, lay_out
from dream_jax.sampler.growth import grow, wants_more
from dream_jax.sampler.loop import resume
from dream_jax.sampler.state import DynamicSettings
from dream_jax.serving.programs import (
    Family,
    Program,
    ProgramTable,
    TooManySettingsError,
    canvas_lengths,
    lengths_of,
    row_keys,
)
from dream_jax.serving.reader import AnswerReader
from dream_jax.serving.tasks import RowView, Task, Update
from dream_jax.tokenizer import Tokenizer

_FIRST_STEPS = 2  # steps of the first call of a batch, from which the time of a step is measured
_MOST_STEPS = 256
_PATIENCE = 3  # number of intervals after which the loop returns if no client waits for a part of an answer
_GATHER_SECONDS = 0.03  # maximum time for which an idle engine gathers tasks before it opens a batch
_QUIET_SECONDS = 0.01  # it stops earlier if no further task has come for this time

State = Literal["running", "draining", "stopped", "failed"]


class EngineError(Exception):
    """The engine could not finish a task; subclasses say why."""


class QueueFullError(EngineError):
    """Too many tasks are waiting; `retry_after` is the number of seconds after which to try again."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class NotAcceptingError(EngineError):
    """The engine is ending or has failed."""


class TimeLimitError(EngineError):
    """A task was not finished within the time limit."""


class DeviceError(EngineError):
    """The device could not run or compile a program, for instance because its memory did not suffice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The settings of the engine.

    Attributes:
      rows: number of rows of a batch, at least 1. A task that is alone runs in a batch of one row.
      most_batches: maximum number of batches that take turns, at least 1.
      most_waiting: maximum number of tasks that wait, at least 1.
      most_programs: maximum number of families of compiled programs, at least 1. Families that `Engine.reserve` has noted
        do not count.
      longest: maximum number of tokens of a row.
      interval: seconds after which the compiled loop returns, above 0.
      time_limit: seconds within which a task must be finished, waiting included; above 0.

    Raises:
      ValueError: a value is outside its range.
    """

    rows: int = 8
    most_batches: int = 4
    most_waiting: int = 64
    most_programs: int = 64
    longest: int = 2048
    interval: float = 0.1
    time_limit: float = 600.0

    def __post_init__(self) -> None:
        several = IntegerRange(1)
        check_numbers(
            self,
            rows=IntegerRange(1, MOST_ROWS),
            most_batches=several,
            most_waiting=several,
            most_programs=several,
            longest=IntegerRange(1, MOST_TOKENS),
            interval=POSITIVE,
            time_limit=POSITIVE,
        )


@dataclasses.dataclass
class EngineCounts:
    """What the engine has done since it was started. Other threads may read these numbers, but not change them."""

    waiting: int = 0
    busy_rows: int = 0
    batches: int = 0
    forwards: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


class Job:
    """A task that was handed to the engine.

    Args:
      task: the task.
      family: the family of its row.
      lengths: the lengths that its canvas takes one after the other, see `programs.lengths_of`; () if it does not grow.
      deadline: the time (`time.monotonic`) by which it must be finished.
      on_update: called in the thread of the engine with each update, and with an error if the task fails.
      tokenizer: the tokenizer of the model.
    """

    def __init__(
        self,
        task: Task,
        family: Family,
        lengths: tuple[int, ...],
        deadline: float,
        on_update: Callable[[Update | EngineError], None],
        tokenizer: Tokenizer,
    ):
        self.task, self.family, self.deadline = task, family, deadline
        self.lengths = lengths
        self.begun = time.monotonic()
        self.closed = False  # nothing more is reported, and the row is free
        self.cancelled = False  # set by other threads
        self._on_update, self._reader = on_update, AnswerReader(task, tokenizer)

    def cancel(self) -> None:
        """Frees the row at the next return of the loop; may be called in any thread, also after the end."""
        self.cancelled = True

    def read(self, row: RowView) -> Update:
        """Reads the row, and reports the update if the client wants it."""
        update = self._reader.read(row)
        if update.finish is not None:
            self.closed = True
        if update.finish is not None or update.text or update.written or update.tokens:
            self._on_update(update)
        return update

    def fail(self, error: EngineError) -> None:
        """Reports an error, with which the task ends."""
        self.closed = True
        self._on_update(error)


class _Batch:
    """A batch whose rows are replaced one by one.

    Attributes:
      program: the compiled program of the batch.
      jobs: the job of each row; None if the row is free.
      in_flight: the jobs of the rows when the call was made whose result was not fetched yet; None without a call.
      full: bool [rows], whether the text of a row has filled the canvas and may go on.
    """

    def __init__(self, program: Program, model: Dream, config: SamplerConfig):
        rows, length = program.rows, program.family.length
        self.program = program
        self.jobs: list[Job | None] = [None] * rows
        self.in_flight: list[Job | None] | None = None
        self.full = np.zeros(rows, bool)
        self._model, self._batch = model, program.idle_batch(model)
        self._configs = [config] * rows
        self._canvas = np.full((rows, length), model.config.pad_token_id, np.int32)
        self._valid = np.ones((rows, length), bool)
        self._seed, self._sample = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self._masked = np.ones(rows, np.int32)
        self._new = np.zeros(rows, bool)
        # The first position of each row on the canvas, and the number of new tokens for which the canvas has room.
        self._begin, self._num_new = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self._dynamic: DynamicSettings | None = None
        self._passes = np.zeros(rows, np.int32)
        self._forwards = 0
        self._step_seconds: float | None = None
        self._called = 0.0

    @property
    def num_busy(self) -> int:
        """The number of rows that have a job."""
        return sum(job is not None for job in self.jobs)

    def put(self, row: int, job: Job) -> None:
        """Gives a free row to a job."""
        prompt, config = np.asarray(job.task.prompt, np.int32).reshape(1, -1), job.task.config
        length, num_new = self.program.family.length, config.max_new_tokens
        if job.task.length > length:  # the canvas begins with whole blocks, and grows later
            assert config.block_length is not None, "only a canvas of blocks grows"
            num_new = (length - prompt.shape[1]) // config.block_length * config.block_length
        now, padding = dataclasses.replace(config, max_new_tokens=num_new), length - prompt.shape[1] - num_new
        canvas, valid = lay_out(self._model, prompt, np.ones(prompt.shape, bool), now, padding)
        self._canvas[row], self._valid[row] = canvas[0], valid[0]
        # The schedule counts all masks of the text, also those for which the canvas has no room yet.
        self._masked[row] = np.sum(canvas == self._model.config.mask_token_id) + config.max_new_tokens - num_new
        self._configs[row], self._seed[row], self._sample[row] = now, job.task.seed, job.task.sample
        self._begin[row], self._num_new[row], self.full[row] = padding, num_new, False
        self._new[row], self.jobs[row], self._dynamic = True, job, None

    def clear(self, row: int) -> None:
        """Takes a row from its job; a canvas without masks ends what the row is doing."""
        self._canvas[row], self._valid[row] = self._model.config.pad_token_id, True
        self._new[row], self.jobs[row], self.full[row] = True, None, False

    def longer(self) -> Program | None:
        """Returns the program of the next length of the canvas; None if the texts of its rows need no longer one."""
        family = self.program.family
        jobs = [job for job in self.jobs if job is not None]
        found = [one for job in jobs for one in job.lengths if one > family.length]
        if not found or not family.grows:
            return None
        config = jobs[0].task.config
        return Program(Family.of(config, min(found), family.static.record, grows=True), self.program.rows)

    def grow(self, program: Program) -> None:
        """Makes the canvas as long as that of `program`, the result of `longer`; no call may be in flight."""
        columns = program.family.length - self.program.family.length
        most_B = np.array([0 if job is None else job.task.config.max_new_tokens for job in self.jobs], np.int32)
        columns_B = np.clip(most_B - self._num_new, 0, columns)
        occupied_B = np.array([job is not None for job in self.jobs]) & ~self._new
        static = self.program.family.static
        self._batch = grow(self._model, self._batch, occupied_B, columns_B, columns=columns, static=static)
        self._canvas = np.pad(self._canvas, ((0, 0), (0, columns)), constant_values=self._model.config.pad_token_id)
        self._valid = np.pad(self._valid, ((0, 0), (0, columns)), constant_values=True)
        self._num_new = self._num_new + columns_B
        self.full[:] = False
        self.program, self._dynamic = program, None
        for row, job in enumerate(self.jobs):
            if job is not None and self._new[row]:  # it has not begun, so it begins on the longer canvas
                self.put(row, job)

    def call(self, interval: float, wanted: bool) -> None:
        """Starts a call of the compiled loop, which returns after about `interval` seconds.

        If the rows are `wanted` by waiting tasks, it returns as soon as one more row is done.
        """
        rows = self.program.rows
        idle = rows - self.num_busy
        steps = _FIRST_STEPS if self._step_seconds is None else int(interval / self._step_seconds)
        if self._dynamic is None:
            self._dynamic = DynamicSettings.of_rows(self._configs, self._masked, self.program.family.static)
        self._called = time.monotonic()
        # The arrays are copied, because on a CPU the program may read them while they are changed for the next call.
        self._batch = resume(
            self._model,
            self._batch,
            self._new,
            self._canvas.copy(),
            self._valid.copy(),
            row_keys(self._seed.copy(), self._sample.copy()),
            self._dynamic,
            np.int32(min(idle + 1, rows) if wanted else rows),
            np.int32(min(max(steps, 1), _MOST_STEPS)),
            static=self.program.family.static,
        )
        self._passes = np.where(self._new, 0, self._passes)
        self._new = np.zeros(rows, bool)
        self.in_flight = list(self.jobs)

    def fetch(self, last_fetch: float) -> tuple[list[tuple[Job, RowView]], int]:
        """Waits for the call, and frees the rows that are done.

        Args:
          last_fetch: the time of the last fetch of any batch, before which the device did not work on this call.

        Returns:
          The jobs of the call that were not cancelled since, with the states of their rows; and the number of forward
          passes that the call made.
        """
        assert self.in_flight is not None
        state = self._batch.state
        family = self.program.family
        wants_B: Any = np.zeros(self.program.rows, bool)
        if family.grows:
            wants_B = wants_more(self._model, self._batch, static=family.static)
        found: Any = jax.device_get(
            (
                wants_B,
                state.block_start_B,
                state.canvas_BT,
                state.commit_step_BT,
                state.passes_B,
                state.forwards,
                state.undefined_B,
                state.recorded,
            )
        )
        wants_B, start_B, canvas_BT, commit_step_BT, passes_B, forwards, undefined_B, recorded = found
        steps = int(np.max(passes_B - self._passes, initial=1))
        seconds = (time.monotonic() - max(self._called, last_fetch)) / max(steps, 1)
        self._step_seconds = seconds if self._step_seconds is None else 0.5 * (self._step_seconds + seconds)
        self._passes = passes_B
        views = []
        for row, job in enumerate(self.in_flight):
            if job is None or job.closed:
                continue
            is_full = bool(wants_B[row]) and self._num_new[row] < job.task.config.max_new_tokens
            self.full[row] = is_full and self.jobs[row] is job
            done = bool(start_B[row] >= family.length) and not is_full
            shown = slice(self._begin[row], self._begin[row] + job.task.length)
            view = RowView(
                canvas_BT[row, shown],
                commit_step_BT[row, shown],
                int(passes_B[row]),
                bool(undefined_B[row]),
                recorded.confidence_BT[row, shown],
                done,
                *(() if recorded.logprobs is None else (leaf[row, shown] for leaf in recorded.logprobs)),
            )
            end = self._model.config.pad_token_id if done else self._model.config.mask_token_id
            views.append((job, view.lengthened(job.task.length, end)))
            if done and self.jobs[row] is job:
                self.jobs[row] = None
        self.in_flight = None
        new, self._forwards = int(forwards) - self._forwards, int(forwards)
        return views, new


class Engine:
    """Makes answers; any thread may call its methods.

    Args:
      model: any Dream. If its parameters are on a mesh, the batches are sharded over this mesh.
      tokenizer: the tokenizer of the model.
      settings: the settings of the engine.

    Attributes:
      counts: what the engine has done.
      lengths: the lengths of a canvas, to which rows are padded, in rising order.
      state: "running"; "draining": accepted tasks are finished and no new ones accepted; "stopped"; "failed": an error
        that is a fault of the program ended the thread.
    """

    def __init__(self, model: Dream, tokenizer: Tokenizer, settings: EngineSettings):
        self.settings, self.counts = settings, EngineCounts()
        self.state: State = "running"
        self._model, self._tokenizer = model, tokenizer
        self.lengths = canvas_lengths(settings.longest)
        self._wake = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._batches: list[_Batch] = []
        self._last_fetch = 0.0
        self._seconds = 1.0  # running mean of the seconds of an answer
        self._changed = self._abandoned = False
        self._programs = ProgramTable(model, settings.most_programs, self._notify)
        self._thread = threading.Thread(target=self._main, name="engine")
        self._thread.start()

    @property
    def num_families(self) -> int:
        """The number of families of programs that requests have asked for."""
        return self._programs.num_families

    def family(self, task: Task) -> Family:
        """Returns the family of programs that a task needs.

        Raises:
          ValueError: the task is longer than the longest row, or its schedule has more steps than the row has tokens.
        """
        if task.length > self.settings.longest:
            raise ValueError(
                f"the prompt and the new tokens make {task.length} tokens, more than the {self.settings.longest} of "
                "this server; shorten the prompt or ask for fewer new tokens"
            )
        return self._families(task)[0]

    def _families(self, task: Task) -> list[Family]:
        """Returns the families that a task needs, one after the other if its canvas grows. Raises as `family`."""
        lengths = lengths_of(task, self.settings.longest)
        return [self._family(task, length, grows=True) for length in lengths] or [self._whole(task)]

    def _whole(self, task: Task) -> Family:
        """Returns the family of a task whose canvas has its whole length from the beginning. Raises as `family`."""
        return self._family(task, next(length for length in self.lengths if length >= task.length), grows=False)

    def _family(self, task: Task, length: int, *, grows: bool) -> Family:
        family = Family.of(task.config, length, task.record, grows=grows)
        steps = task.config.block_steps(sum(gap.length for gap in task.gaps)) if family.static.follows_schedule else 1
        if steps > family.static.steps:
            raise ValueError(
                f"a block has {steps} steps, more than the {family.static.steps} of this server; ask for fewer"
            )
        return family

    def submit(self, tasks: Sequence[Task], on_update: Callable[[int, Update | EngineError], None]) -> list[Job]:
        """Puts tasks into the queue, all or none.

        Args:
          tasks: the tasks.
          on_update: called in the thread of the engine with the index of a task and an update, or the error with which
            it ended. The last update of a task has a reason to finish.

        Raises:
          ValueError: as `family` raises; or a task needs a program beyond the limit (TooManySettingsError).
          QueueFullError: the queue has no place for the tasks.
          NotAcceptingError: the engine is ending or has failed.
        """
        for task in tasks:
            self.family(task)  # raises ValueError for a task that does not fit
        with self._wake:
            self._check_accepts(len(tasks))
        families = [self._admitted(task) for task in tasks]
        deadline = time.monotonic() + self.settings.time_limit

        def reporter(index: int) -> Callable[[Update | EngineError], None]:
            return lambda update: on_update(index, update)

        jobs = [
            Job(
                task,
                family,
                lengths_of(task, self.settings.longest) if family.grows else (),
                deadline,
                reporter(index),
                self._tokenizer,
            )
            for index, (task, family) in enumerate(zip(tasks, families, strict=True))
        ]
        with self._wake:
            self._check_accepts(len(jobs))  # again, because other tasks may have been added meanwhile
            self._waiting.extend(jobs)
            self.counts.waiting = len(self._waiting)
            self._changed = True
            self._wake.notify_all()
        return jobs

    def _admitted(self, task: Task) -> Family:
        """Returns the family with which a task begins, after all that it may need were admitted; raises as `submit`.

        If there are too many families for a canvas that grows, it has its whole length from the beginning.
        """
        families = self._families(task)
        try:
            return self._programs.admit_all(families)
        except TooManySettingsError:
            return self._programs.admit(self._whole(task))

    def _check_accepts(self, count: int) -> None:
        """Raises NotAcceptingError or QueueFullError if the queue cannot take `count` tasks; the caller holds the lock."""
        if self.state != "running":
            raise NotAcceptingError(f"the server is {self.state} and takes no new requests")
        if len(self._waiting) + count > self.settings.most_waiting:
            waves = (len(self._waiting) + count) / self.settings.rows
            raise QueueFullError(
                f"{len(self._waiting)} answers are waiting, and at most {self.settings.most_waiting} may wait; "
                "try again later",
                min(max(round(waves * self._seconds), 1), 60),
            )

    def reserve(self, tasks: Iterable[Task]) -> None:
        """Reserves the programs of these tasks: tasks that need them are accepted even if there are too many programs."""
        self._programs.reserve(family for task in tasks for family in (*self._families(task), self._whole(task)))

    def compile(self, task: Task) -> None:
        """Compiles the programs of a task, for one row and for a full batch, and waits for them.

        Raises:
          ValueError, jax.errors.JaxRuntimeError: as `submit` and `ProgramTable.ready` raise.
        """
        families = self._families(task)
        self._programs.admit_all(families)
        for family in families:
            for rows in {1, self.settings.rows}:
                self._programs.ready(Program(family, rows), task.config)
        self._programs.wait()

    def wake(self) -> None:
        """Makes the engine look at its jobs, for instance after a job was cancelled."""
        self._notify()

    def drain(self, seconds: float | None = None) -> bool:
        """Refuses new tasks, finishes the accepted ones, and ends the thread.

        Args:
          seconds: how long to wait; None for ever. Tasks that are not finished by then fail.

        Returns:
          Whether all tasks were finished.
        """
        with self._wake:
            if self.state == "running":
                self.state = "draining"
            self._notify()
        self._thread.join(seconds)
        finished = not self._thread.is_alive()
        if not finished:
            self._abandoned = True
            self._notify()
            self._thread.join()
        self._programs.close()
        return finished

    def _notify(self) -> None:
        with self._wake:
            self._changed = True
            self._wake.notify_all()

    def _running(self) -> list[Job]:
        jobs = (job for batch in self._batches for job in (*batch.jobs, *(batch.in_flight or ())))
        return list({id(job): job for job in jobs if job is not None}.values())

    def _main(self) -> None:
        try:
            with sharding.mesh_context(self._model):
                while self._wait_for_work():
                    self._end_jobs()
                    self._open_batches()
                    for batch in list(self._batches):
                        self._turn(batch)
                    self._count()
            self.state = "stopped"
        finally:
            # After an error, which Python prints, no client waits for an answer that does not come.
            if self.state != "stopped":
                with self._wake:
                    self.state = "failed"
                    left = [job for job in [*self._waiting, *self._running()] if not job.closed]
                    self._waiting.clear()
                for job in left:
                    job.fail(NotAcceptingError("the engine has failed; the log of the server says why"))

    def _wait_for_work(self) -> bool:
        """Waits until something is to be done. Returns False when the engine is to end."""
        with self._wake:
            while not self._batches and not self._changed:
                if self.state == "draining" and not self._waiting:
                    return False
                # Waiting tasks may reach their time limit while their program is compiled.
                self._wake.wait(self.settings.interval if self._waiting else None)
                if self._waiting:
                    break
            if not self._batches:
                self._gather()
            self._changed = False
            return bool(self._batches or self._waiting or self.state == "running")

    def _gather(self) -> None:
        """Waits until no further task comes, or there are enough for a full batch; the caller holds the lock.

        Tasks that arrive together then share one batch from its first step. Otherwise the first task would be alone in a
        batch, and this batch would take every second turn.
        """
        end = time.monotonic() + _GATHER_SECONDS
        while 0 < len(self._waiting) < self.settings.rows and self.state == "running" and time.monotonic() < end:
            before = len(self._waiting)
            more = lambda before=before: len(self._waiting) > before or self.state != "running"
            if not self._wake.wait_for(more, _QUIET_SECONDS):
                return

    def _count(self) -> None:
        self.counts.waiting, self.counts.batches = len(self._waiting), len(self._batches)
        self.counts.busy_rows = sum(batch.num_busy for batch in self._batches)

    def _end_jobs(self) -> None:
        """Frees the rows and queue entries of jobs that were cancelled, or whose time is over."""
        now = time.monotonic()

        def ended(job: Job) -> bool:
            if job.closed:
                return True
            if job.cancelled:
                job.closed = True
                self.counts.cancelled += 1
            elif self._abandoned:
                self.counts.failed += 1
                job.fail(NotAcceptingError("the server was stopped before the answer was finished"))
            elif job.deadline <= now:
                self.counts.failed += 1
                limit = self.settings.time_limit
                job.fail(TimeLimitError(f"the answer was not finished within the time limit of {limit:g} seconds"))
            return job.closed

        with self._wake:
            waiting = list(self._waiting)
        gone = {id(job) for job in waiting if ended(job)}
        if gone:
            with self._wake:
                self._waiting = collections.deque(job for job in self._waiting if id(job) not in gone)
        for batch in self._batches:
            for row, job in enumerate(batch.jobs):
                if job is not None and ended(job):
                    batch.clear(row)

    def _open_batches(self) -> None:
        """Lets waiting tasks into rows, in the order in which they came.

        A task may join a batch whose canvas is longer than its own (`Family.serves`), so that tasks of several lengths
        share a batch. For the same reason a batch is opened for the longest of the waiting tasks that could share it.
        If a task needs a batch of its own, but there are as many as there may be, no later task starts before it.
        """
        with self._wake:
            waiting = list(self._waiting)
        started: set[int] = set()
        asked = collections.Counter(job.family for job in waiting)
        for job in waiting:
            shared = self._shared_family(job.family, asked)
            sharing = sum(count for family, count in asked.items() if shared.serves(family))
            serving = [batch for batch in self._batches if batch.program.family.serves(job.family)]
            serving.sort(key=lambda batch: batch.program.family.length)
            full_size = [batch for batch in serving if batch.program.rows == self.settings.rows]
            # A batch of one row is not refilled while several tasks could share one: it would take every second turn.
            usable = full_size or (serving if sharing == 1 else [])
            batch = next((batch for batch in usable if batch.num_busy < batch.program.rows), None)
            if batch is None:
                if full_size:
                    continue  # its batch is full, but rows of other batches may be free for others
                alone = not serving and sharing == 1
                program = Program(shared, 1 if alone else self.settings.rows)
                try:
                    if not self._programs.ready(program, job.task.config):
                        continue
                    if len(self._batches) >= self.settings.most_batches:
                        break
                    batch = _Batch(program, self._model, job.task.config)
                except jax.errors.JaxRuntimeError as error:
                    started.add(id(job))
                    self._fail(job, error)
                    continue
                self._batches.append(batch)
            batch.put(batch.jobs.index(None), job)
            self._start_longer(batch)
            started.add(id(job))
            self.counts.prompt_tokens += job.task.num_given
        if started:
            with self._wake:
                self._waiting = collections.deque(job for job in self._waiting if id(job) not in started)

    def _shared_family(self, own: Family, asked: Iterable[Family]) -> Family:
        """Returns the longest family among those that are asked for, serve `own` and are compiled for a full batch."""
        rows = self.settings.rows
        longer = (family for family in asked if family is not own and family.serves(own))
        compiled = (family for family in longer if self._programs.compiled(Program(family, rows)))
        return max((own, *compiled), key=lambda family: family.length)

    def _start_longer(self, batch: _Batch) -> None:
        """Compiles the program of the next length of a canvas that grows, while the batch runs with the present one."""
        longer = batch.longer()
        if longer is not None:
            self._programs.start(longer, next(job for job in batch.jobs if job is not None).task.config)

    def _grow(self, batch: _Batch) -> None:
        """Makes the canvas of a batch longer if a text has filled it; waits if its program is not compiled yet."""
        longer = batch.longer() if np.any(batch.full) else None
        if longer is not None:
            self._programs.finish(longer, next(job for job in batch.jobs if job is not None).task.config)
            batch.grow(longer)
            self._start_longer(batch)

    def _turn(self, batch: _Batch) -> None:
        """Fetches the result of a batch, starts its next call, and then reads the result while the device works."""
        views: list[tuple[Job, RowView]] = []
        try:
            if batch.in_flight is not None:
                views, forwards = batch.fetch(self._last_fetch)
                self._last_fetch = time.monotonic()
                self.counts.forwards += forwards
                self._end_jobs()
                self._grow(batch)
                self._open_batches()
            if batch.num_busy:
                wanted = any(batch.program.family.serves(job.family) for job in list(self._waiting))
                batch.call(self._interval(batch), wanted)
            else:
                self._batches.remove(batch)
        except jax.errors.JaxRuntimeError as error:
            if batch in self._batches:
                self._batches.remove(batch)
            for job in {id(job): job for job in (*batch.jobs, *(batch.in_flight or ())) if job is not None}.values():
                if not job.closed:
                    self._fail(job, error)
        for job, row in views:
            # If a task neither streams nor stops at strings, its answer is complete when its row is, and is only read then.
            early = job.task.streams or job.task.stop or not job.task.config.stop_at_end
            if not job.closed and (row.done or row.undefined or early):
                self._read(job, row)

    def _interval(self, batch: _Batch) -> float:
        """Returns the seconds after which the loop of a batch returns.

        The result is `_PATIENCE` intervals if the batch is full and is the only one, and no client waits for a part of an
        answer. Then an earlier return is only needed for clients that disconnect, and for rows that are done; for such
        rows the loop returns anyway if tasks are waiting.
        """
        alone = len(self._batches) == 1 and batch.num_busy == self.settings.rows
        patient = alone and not any(job is not None and job.task.streams for job in batch.jobs)
        return self.settings.interval * (_PATIENCE if patient else 1)

    def _read(self, job: Job, row: RowView) -> None:
        if row.undefined:
            self.counts.failed += 1
            job.fail(DeviceError(UNDEFINED))
            return
        update = job.read(row)
        if update.finish is not None:
            self.counts.finished += 1
            self.counts.answer_tokens += update.num_tokens
            self._seconds += 0.1 * (time.monotonic() - job.begun - self._seconds)

    def _fail(self, job: Job, error: Exception) -> None:
        self.counts.failed += 1
        job.fail(DeviceError(f"the device could not run the program of this request: {str(error).splitlines()[0]}"))
