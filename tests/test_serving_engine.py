"""The engine: any mix of tasks that come and go, each with the answer that it has alone; bounds, cancelling, ending."""

import dataclasses
import queue
import random
import threading

import jax
import numpy as np
import pytest
from marking import slow
from serving_client import TOKENIZER, expected_text, maker, nano, running, until

from dream_jax.inference import canvas_text, row_keys
from dream_jax.sampler import BlockCache, SamplerConfig, generate, growth
from dream_jax.serving import engine as engine_module
from dream_jax.serving import programs, server
from dream_jax.serving.engine import (
    DeviceError,
    EngineSettings,
    NotAcceptingError,
    QueueFullError,
    TimeLimitError,
)
from dream_jax.serving.programs import TooManySettingsError, canvas_lengths
from dream_jax.serving.requests import CompletionRequest, InfillRequest
from dream_jax.serving.tasks import Gap, Task

SETTINGS = EngineSettings(rows=4, longest=128, interval=0.02)


@pytest.fixture(scope="module")
def model():
    return nano()


@pytest.fixture(scope="module")
def engine(model):
    with running(model, SETTINGS) as started:
        yield started


def ask(engine, tasks):
    """The texts and reasons to finish of tasks, when all are finished."""
    told = queue.Queue()
    engine.submit(tasks, lambda index, update: told.put((index, update)))
    texts, reasons = [""] * len(tasks), [None] * len(tasks)
    while None in reasons:
        index, update = told.get(timeout=300)
        if isinstance(update, Exception):
            raise update
        texts[index] += update.text
        reasons[index] = update.finish
    return texts, reasons


def completion(**fields):
    options = {"prompt": "ab", "max_tokens": 10, "seed": 3} | fields
    return maker().tasks(CompletionRequest(model="nano", **options))


def test_a_batch_of_one_row_is_not_refilled_under_load(engine, monkeypatch):
    """Only the task that came alone is in it; the others share a batch, so that no second batch takes turns with it."""
    put, sizes = engine_module._Batch.put, []

    def noted(self, row, job):
        sizes.append(self.program.rows)
        put(self, row, job)

    monkeypatch.setattr(engine_module._Batch, "put", noted)
    first = threading.Thread(target=ask, args=(engine, completion(max_tokens=12)))
    first.start()
    until(lambda: sizes)
    ask(engine, [task for seed in range(7) for task in completion(max_tokens=40, seed=seed)])
    first.join()
    assert sizes == [1] + [4] * 7


def test_lengths_of_a_canvas():
    assert canvas_lengths(272) == (64, 72, 80, 88, 96, 104, 112, 120, 128, 144, 160, 176, 192, 208, 224, 240, 256, 272)
    assert canvas_lengths(500)[-3:] == (448, 480, 500)
    assert canvas_lengths(64) == (64,) and canvas_lengths(20) == (20,)


def test_tasks_of_several_lengths_share_a_batch(model, monkeypatch):
    """A shorter task joins a batch of longer rows if its program is compiled, and has the answer that it has alone."""
    put, canvases = engine_module._Batch.put, []

    def noted(self, row, job):
        canvases.append((self.program.rows, self.program.family.length))
        put(self, row, job)

    monkeypatch.setattr(engine_module._Batch, "put", noted)
    with running(model, EngineSettings(rows=2, longest=24, interval=0.02)) as started:
        started.lengths = (16, 20, 24)
        [short], [longer], [longest] = (completion(max_tokens=count, temperature=1.0) for count in (12, 16, 20))
        assert started.family(longer).serves(started.family(short))
        assert not started.family(short).serves(started.family(longer))
        assert not started.family(longest).serves(started.family(short))  # its canvas is half longer
        [other] = completion(max_tokens=16)
        assert not started.family(other).serves(started.family(short))  # its temperature is another
        started.compile(longer)
        together, _ = ask(started, [short, longer])
        assert canvases == [(2, 20)] * 2
        alone, _ = ask(started, [short])
        assert canvases[2:] == [(1, 16)] and together[0] == alone[0]


def test_keys_of_rows_are_those_of_the_command():
    found = programs.row_keys(np.array([3, 3, 2**31 - 1], np.int32), np.array([0, 2, 1], np.int32))
    wanted = row_keys([(3, 0, 0), (3, 0, 2), (2**31 - 1, 0, 1)])
    np.testing.assert_array_equal(jax.random.key_data(found), jax.random.key_data(wanted))


MIX = [
    {"preset": "exact"},
    {"preset": "exact", "temperature": 0.8},
    {"preset": "exact", "temperature": 1.3, "steps": 4, "eps": 0.01},
    {"preset": "balanced", "temperature": 0.7},
    {"preset": "exact", "temperature": 0.9, "top_p": 0.7},
    {"preset": "exact", "alg": "origin", "steps": 5},
    {"preset": "exact", "temperature": 0.9, "top_k": 5},
    {"preset": "exact", "alg_temp": 0.3},
    {"preset": "fast"},
    {"preset": "exact", "guidance": 0.5, "end_penalty": -3.0},
    {"preset": "exact", "block_length": 4, "steps": 4},
]


def asked(options, prompt, new_tokens, seed, trained_mask="bidirectional"):
    """The task of a request with these settings of the sampler."""
    dream = {name: value for name, value in options.items() if name not in ("temperature", "top_p")}
    top = {name: value for name, value in options.items() if name in ("temperature", "top_p")}
    body = {"model": "nano", "prompt": prompt, "max_tokens": new_tokens, "seed": seed, "dream": dream}
    make = dataclasses.replace(maker(), trained_mask=trained_mask)
    [task] = make.tasks(CompletionRequest.model_validate(body | top))
    return task


def check_mix(model, engine, mix, count, seed):
    """Tasks with these settings, mixed, get the answers that they have alone."""
    rng = random.Random(seed)
    # Few shapes, because `generate` compiles a program for each; the rows of the engine have more.
    chosen = []
    for number in range(count):
        options = mix[number % len(mix)]
        is_long = count > 20 and number % (2 * len(mix)) == len(mix)
        length = 30 if is_long else rng.randint(0, 7)
        chosen.append((options, "x" * length + "y", 12 + 8 * (mix.index(options) % 2), rng.randint(0, 99)))
    texts, _ = ask(engine, [asked(*one) for one in chosen])
    for (options, prompt, new_tokens, seed), text in zip(chosen, texts, strict=True):
        wanted = expected_text(model, prompt.encode(), new_tokens, seed=seed, **options)
        assert text == wanted, (options, prompt, new_tokens, seed)
    assert engine.counts.busy_rows <= SETTINGS.rows * SETTINGS.most_batches


def test_any_mix_gives_each_task_the_answer_it_has_alone(model, engine):
    check_mix(model, engine, [MIX[0], MIX[2], MIX[3]], 15, 0)


@pytest.mark.slow
def test_any_mix_of_all_settings(model, engine):
    check_mix(model, engine, MIX, 40, 1)


def test_samples_are_those_of_the_command(model, engine):
    tasks = completion(n=3, temperature=1.0)
    texts, _ = ask(engine, tasks)
    keys = row_keys([(3, 0, sample) for sample in range(3)])
    alone = generate(model, np.array([list(b"ab")] * 3), tasks[0].config, keys)
    for text, tokens in zip(texts, np.asarray(alone.tokens), strict=True):
        assert text == canvas_text(tokens[2:], TOKENIZER)
    assert len(set(texts)) > 1
    assert texts[0] == ask(engine, completion(temperature=1.0))[0][0]


@pytest.mark.slow
def test_gaps_are_filled_as_by_generate(model, engine):
    [task] = maker().tasks(
        InfillRequest.model_validate({"model": "nano", "parts": ["ab", {"length": 3}, "c", {"length": 2}, "."]})
    )
    texts, reasons = ask(engine, [task])
    alone = generate(model, np.array([task.prompt]), task.config)
    assert texts[0] == TOKENIZER.decode(np.asarray(alone.tokens)[0].tolist())
    assert reasons == ["length"]


@pytest.mark.parametrize("trained_mask", ["prefix", slow("block-causal:4"), slow("block-diffusion:4")])
def test_masks_count_the_new_tokens_of_each_row(trained_mask):
    """Rows with different numbers of new tokens share a program, also if the mask depends on where the answer begins."""
    masked = nano()
    masked.trained_mask = trained_mask
    chosen = [({"preset": "exact"}, "x" * length, new_tokens, 0) for length, new_tokens in ((3, 9), (8, 4))]
    with running(masked, SETTINGS) as started:
        tasks = [asked(*one, trained_mask) for one in chosen]
        assert (tasks[0].config.cache == BlockCache()) == trained_mask.startswith("block-diffusion")
        texts, _ = ask(started, tasks)
    for (options, prompt, new_tokens, seed), text in zip(chosen, texts, strict=True):
        options = options | {"trained_mask": trained_mask}
        assert text == expected_text(masked, prompt.encode(), new_tokens, seed=seed, **options)


@pytest.mark.slow
def test_a_canvas_grows_while_texts_go_on(monkeypatch):
    """Rows of block diffusion begin on canvases of 32 tokens; those whose texts go on move to 64 and 128 tokens."""
    monkeypatch.setattr(programs, "SHORTEST_GROWING", 32)
    monkeypatch.setattr(growth, "FIRST_EXTENT", 8)
    used, original = [], engine_module.resume

    def noted(model, batch, new, canvas, *arguments, **options):
        used.append(canvas.shape[1])
        return original(model, batch, new, canvas, *arguments, **options)

    monkeypatch.setattr(engine_module, "resume", noted)
    masked = nano()
    masked.trained_mask = "block-diffusion:4"
    options = {"preset": "exact", "temperature": 0.8, "steps": 40}
    chosen = [
        ({**options, "end_penalty": penalty}, "x" * length, new_tokens, seed)
        for penalty, length, new_tokens, seed in (
            (50.0, 3, 90, 0),  # 32, 64, 128 tokens
            (50.0, 9, 45, 1),  # 32 and 64 tokens, of which the last four are not of the text
            (-50.0, 3, 90, 2),  # ends in its first block
        )
    ]
    tasks = [asked(*one, "block-diffusion:4") for one in chosen]
    assert [programs.lengths_of(task, 128) for task in tasks] == [(32, 64, 128), (32, 64), (32, 64, 128)]
    wanted = [
        expected_text(masked, prompt.encode(), new, seed=seed, trained_mask="block-diffusion:4", **options)
        for options, prompt, new, seed in chosen
    ]
    with running(masked, dataclasses.replace(SETTINGS, rows=2)) as started:
        assert ask(started, tasks)[0] == wanted
        assert set(used) == {32, 64, 128} and started.num_families == 3
        del used[:]
        assert ask(started, [tasks[2]])[0] == [wanted[2]]
        assert set(used) == {32}
    with running(masked, dataclasses.replace(SETTINGS, most_programs=2)) as started:  # too few for a canvas that grows
        family = started._admitted(tasks[0])
        assert (family.length, family.grows, started.num_families) == (96, False, 1)


def test_lengths_of_canvases_that_grow():
    assert programs.growing_lengths(2048, 32) == (512, 1024, 2048)
    assert programs.growing_lengths(3000, 24) == (512, 1016, 2024, 3000 - 976 % 24)
    assert programs.growing_lengths(100, 8) == (100,)

    def lengths(prompt, new, trained_mask="block-diffusion:32", **more):
        config = SamplerConfig.preset("fast", max_new_tokens=new, trained_mask=trained_mask, **more)
        pieces = (Gap(start=prompt, length=new),)
        return programs.lengths_of(Task(prompt=(5,) * prompt, config=config, seed=0, sample=0, pieces=pieces), 2048)

    assert lengths(100, 1800) == (512, 1024, 2048)
    assert lengths(100, 500) == (512, 1024)
    assert lengths(300, 1500) == (1024, 2048)
    assert lengths(100, 400) == lengths(1800, 200) == ()  # the first length holds the whole text
    assert lengths(100, 1948) == ()  # with the padding to whole blocks it would be too long
    assert lengths(100, 1800, "bidirectional") == ()
    assert lengths(100, 1800, forced_tokens=((5, 7),)) == ()


def test_programs_do_not_depend_on_the_numbers_of_a_request(engine):
    """200 requests with different numbers need two programs: for one row and for a full batch."""
    rng = random.Random(1)
    families = {
        engine.family(
            asked(
                {"preset": "exact", "temperature": rng.random() + 0.1, "steps": rng.randint(1, 3)},
                "x" * rng.randint(0, 30),
                rng.randint(5, 20),
                seed,
            )
        )
        for seed in range(200)
    }
    assert len(families) == 1


def test_a_schedule_longer_than_its_row_is_refused(engine):
    """It would end the engine: the arrays of a program have a place for each step."""
    [task] = completion(max_tokens=10)
    config = dataclasses.replace(task.config, steps=512)
    with pytest.raises(ValueError, match="512 steps, more than the 64"):
        engine.submit([dataclasses.replace(task, config=config)], lambda *_: None)


def test_number_of_programs_is_bounded(model):
    with running(model, EngineSettings(rows=2, longest=64, most_programs=2)) as started:
        for top_k in (3, 4):
            started.family(asked({"top_k": top_k, "temperature": 1.0}, "x", 4, 0))
            started._programs.admit(started.family(asked({"top_k": top_k, "temperature": 1.0}, "x", 4, 0)))
        with pytest.raises(TooManySettingsError, match="--max-programs"):
            started.submit([asked({"top_k": 5, "temperature": 1.0}, "x", 4, 0)], lambda *_: None)
        server.reserve_programs(started, maker())
        plain = asked({"preset": "exact", "temperature": 0.5}, "x", 4, 0)
        started._programs.admit(started.family(plain))  # odd settings of others do not shut out plain ones
        with pytest.raises(TooManySettingsError, match="--max-programs"):
            started.submit([asked({"top_k": 5, "temperature": 1.0}, "x", 4, 0)], lambda *_: None)


def test_a_full_table_of_programs_serves_shorter_rows(model):
    """Lengths are many, so a client whose settings are in the table is not refused for a slightly shorter row."""
    with running(model, EngineSettings(rows=2, longest=24, most_programs=1)) as started:
        started.lengths = (16, 20, 24)
        [short], [longer], [longest] = (completion(max_tokens=count, temperature=1.0) for count in (12, 16, 20))
        found = started._programs.admit(started.family(longer))
        assert started._programs.admit(started.family(short)) is found and started.num_families == 1
        with pytest.raises(TooManySettingsError, match="--max-programs"):
            started._programs.admit(started.family(longest))


def test_queue_is_bounded_and_says_when_to_come_back(model):
    with running(model, EngineSettings(rows=2, longest=64, most_waiting=3)) as started:
        with pytest.raises(QueueFullError, match="at most 3") as error:
            started.submit(completion() * 4, lambda *_: None)
        assert 1 <= error.value.retry_after <= 60
        assert started.counts.waiting == 0  # all or none


def test_time_limit(model):
    told = queue.Queue()
    with running(model, EngineSettings(rows=2, longest=64, time_limit=0.001)) as started:
        started.submit(completion(), lambda index, update: told.put(update))
        error = told.get(timeout=60)
        assert isinstance(error, TimeLimitError) and "0.001 seconds" in str(error)
        until(lambda: started.counts.failed == 1 and started.counts.busy_rows == started.counts.waiting == 0)


def test_cancelled_rows_are_free_and_the_others_unharmed(model, engine):
    """Cancelling at random times changes no other answer, and loses no row."""
    rng, before = random.Random(2), engine.counts.finished
    chosen = [(MIX[number % 2], "x" * rng.randint(1, 8), 12 + 8 * (number % 2), number) for number in range(24)]
    told = {number: queue.Queue() for number in range(24)}
    jobs = {}
    for number, one in enumerate(chosen):
        [jobs[number]] = engine.submit([asked(*one)], lambda _, update, number=number: told[number].put(update))
        if number % 3 == 0:
            threading.Timer(rng.random() * 0.2, jobs[number].cancel).start()
    for number, (options, prompt, new_tokens, seed) in enumerate(chosen):
        if number % 3:
            update = told[number].get(timeout=300)
            assert update.text == expected_text(model, prompt.encode(), new_tokens, seed=seed, **options)
    until(lambda: engine.counts.busy_rows == engine.counts.waiting == engine.counts.batches == 0)
    assert engine.counts.finished - before >= 16


def test_draining_finishes_what_was_accepted(model):
    told = queue.Queue()
    with running(model, SETTINGS) as started:
        started.submit(completion() * 6, lambda index, update: told.put(update))
        ended = threading.Thread(target=started.drain)
        ended.start()
        until(lambda: started.state != "running")
        with pytest.raises(NotAcceptingError, match="draining|stopped"):
            started.submit(completion(), lambda *_: None)
        ended.join(300)
        assert started.state == "stopped" and told.qsize() == 6
        assert all(told.get().finish is not None for _ in range(6))


def test_errors_of_the_device_end_the_requests_of_a_batch_only(model, monkeypatch):
    real, failing = programs.Program.compile, threading.Event()

    def compile(self, *arguments):
        if self.family.static.top_k == 7:
            failing.set()
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\ndetails")
        return real(self, *arguments)

    monkeypatch.setattr(programs.Program, "compile", compile)
    with running(model, SETTINGS) as started:
        with pytest.raises(DeviceError, match="RESOURCE_EXHAUSTED"):
            ask(started, [asked({"top_k": 7, "temperature": 1.0}, "x", 4, 0)])
        assert failing.is_set() and ask(started, completion())[1][0] is not None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_engine_leaves_no_client_waiting(model, monkeypatch):
    told = queue.Queue()
    with running(model, SETTINGS) as started:
        monkeypatch.setattr(type(started), "_turn", lambda *_: 1 / 0)
        started.submit(completion() * 3, lambda index, update: told.put(update))
        assert all(isinstance(told.get(timeout=60), NotAcceptingError) for _ in range(3))
        assert started.state == "failed"
        with pytest.raises(NotAcceptingError, match="failed"):
            started.submit(completion(), lambda *_: None)


def test_fair_order(model):
    """A task that needs a batch of its own is not passed by for ever by tasks that find free rows."""
    order, lock = [], threading.Lock()
    with running(model, EngineSettings(rows=4, longest=64, most_batches=1, interval=0.005)) as started:

        def note(name):
            def noted(index, update):
                with lock:
                    order.append(name)

            return noted

        for options in ({}, {"temperature": 1.0}):
            started.compile(asked(options, "x", 4, 0))
        for number in range(4):
            started.submit([asked({}, "x", 20, number)] * 2, note("first"))
        started.submit([asked({"temperature": 1.0}, "x", 4, 0)], note("other"))
        for number in range(4):
            started.submit([asked({}, "x", 20, number)] * 2, note("later"))
        until(lambda: len(order) == 17)
    assert order.index("other") == 8
