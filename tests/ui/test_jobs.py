"""Jobs wait in line, and a running one ends when it is cancelled, in the middle of a step too."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from kolors_core.ui.jobs import KEPT, MOST_WAITING, Job, Queue, logger


@pytest.fixture
def queue() -> Iterator[Queue]:
    queue = Queue()
    yield queue
    queue.close()
    assert not queue.worker.is_alive()


def until(queue: Queue, job: Job, state: str) -> None:
    with queue.changed:
        assert queue.changed.wait_for(lambda: job.state == state, 30), job.state


def held(release: threading.Event) -> Callable[[Job], dict[str, int]]:
    def work(job: Job) -> dict[str, int]:
        while not release.wait(0.01):
            pass
        return {"found": 1}

    return work


def test_they_run_one_after_another_and_say_their_place(queue: Queue) -> None:
    release = threading.Event()
    first, second, third = (queue.add(name, held(release)) for name in "abc")
    until(queue, first, "running")
    assert [queue.wait(job.id, -1)[1]["place"] for job in (first, second, third)] == [0, 1, 2]
    queue.cancel(second.id)
    assert queue.wait(third.id, -1)[1]["place"] == 1 and second.state == "cancelled"
    release.set()
    until(queue, third, "done")
    assert (first.result, second.result, third.result) == ({"found": 1}, None, {"found": 1})


@pytest.mark.parametrize("step", ["Python", "torch"])
def test_a_running_job_is_ended_in_the_middle_of_a_step(queue: Queue, step: str) -> None:
    began, cleaned = threading.Event(), list[str]()

    def work(job: Job) -> dict[str, int]:
        try:
            began.set()
            x = torch.ones(64, 64)
            while True:
                x = x @ x * 0 if step == "torch" else x
        finally:
            cleaned.append("as Ctrl-C does")

    job, after = queue.add("long", work), queue.add("short", lambda job: {"found": 2})
    assert began.wait(30)
    queue.cancel(job.id)
    until(queue, after, "done")
    assert (job.state, job.error, cleaned, after.result) == (
        "cancelled",
        "",
        ["as Ctrl-C does"],
        {"found": 2},
    )


def test_cancelling_what_is_over_ends_nothing_else(queue: Queue) -> None:
    job = queue.add("a", lambda job: {})
    until(queue, job, "done")
    queue.cancel(job.id)
    release = threading.Event()
    other = queue.add("b", held(release))
    until(queue, other, "running")
    queue.cancel(job.id)
    time.sleep(0.05)
    release.set()
    until(queue, other, "done")
    with pytest.raises(KeyError):
        queue.cancel("unknown")


def test_a_job_that_is_cancelled_as_it_ends_has_an_end(queue: Queue) -> None:
    release, ended = threading.Event(), threading.Event()

    def work(job: Job) -> dict[str, int]:
        release.wait(30)
        ended.set()
        return {}

    job = queue.add("a", work)
    until(queue, job, "running")
    with queue.changed:  # the thread waits for it, to say that the job is done
        release.set()
        ended.wait(30)
        time.sleep(0.05)
        queue.cancel(job.id)
    until(queue, other := queue.add("b", lambda job: {}), "done")
    assert (job.state, other.state) == ("cancelled", "done")


def test_what_a_job_cleans_up_is_not_ended_in_its_middle(queue: Queue) -> None:
    began, release, cleaned = threading.Event(), threading.Event(), list[str]()

    def cleanup() -> None:
        began.set()
        held(release)(job)
        cleaned.append("all of it")

    def work(job: Job) -> dict[str, int]:
        job.finish(lambda: None)
        job.finish(cleanup)
        cleaned.append("and went on")
        return {}

    job = queue.add("a", work)
    assert began.wait(30)
    queue.cancel(job.id)
    release.set()
    until(queue, queue.add("b", lambda job: {}), "done")
    assert (job.state, cleaned) == ("cancelled", ["all of it"])


def test_the_next_job_runs_after_a_fault_of_any_kind(queue: Queue) -> None:
    job, after = queue.add("a", lambda job: {}["no such key"]), queue.add("b", lambda job: {})
    until(queue, after, "done")
    told = "a fault of the library, please report it: KeyError: 'no such key'"
    assert (job.state, job.error) == ("failed", told)


def test_errors_and_warnings_are_the_jobs_own(queue: Queue) -> None:
    def warns(job: Job) -> dict[str, int]:
        logger.warning("eta has no effect")
        raise ValueError("steps must be at least 1,\ngot 0")

    failed, fine = queue.add("a", warns), queue.add("b", lambda job: {})
    until(queue, fine, "done")
    assert (failed.state, failed.notes) == ("failed", ["eta has no effect"])
    assert failed.error == "steps must be at least 1, got 0"
    assert (fine.notes, fine.error) == ([], "")


def test_progress_wakes_those_who_wait_and_tells_the_time_that_is_left(queue: Queue) -> None:
    """Of the whole job, by what was done since the first step: before it, models are loaded."""
    further, release, times = threading.Event(), threading.Event(), list[float]()

    def work(job: Job) -> dict[str, int]:
        time.sleep(0.5)
        times.append(time.monotonic())
        job.report(1, 4, "image 1 of 2", "data:,", done=1 / 8)
        further.wait(30)
        job.report(2, 4, "image 1 of 2", done=2 / 8)
        times.append(time.monotonic())
        return held(release)(job)

    job = queue.add("a", work)
    with queue.changed:
        assert queue.changed.wait_for(lambda: job.step == 1, 30)
        assert job.seen(0)["left"] is None
    time.sleep(0.01)
    further.set()
    while len(times) < 2:
        time.sleep(0.01)
    _, seen = queue.wait(job.id, -1)
    assert (seen["step"], seen["steps"], seen["part"], seen["preview"]) == (2, 4, "image 1 of 2", "data:,")
    assert 6 * 0.01 <= seen["left"] <= 6 * (times[1] - times[0])
    release.set()


def test_only_the_last_results_are_kept(queue: Queue) -> None:
    """A map of each token is megabytes."""
    for i in range(KEPT + 5):
        until(queue, queue.add(str(i), lambda job: {}), "done")
    assert len(queue.jobs) <= KEPT + 1 <= 50 and "0" not in {job.title for job in queue.jobs.values()}


def test_the_line_has_an_end(queue: Queue) -> None:
    release = threading.Event()
    until(queue, queue.add("first", held(release)), "running")
    for _ in range(MOST_WAITING):
        queue.add("more", lambda job: {})
    with pytest.raises(ValueError, match=f"{MOST_WAITING} jobs are waiting"):
        queue.add("too many", lambda job: {})
    release.set()
