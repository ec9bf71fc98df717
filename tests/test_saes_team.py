"""The threads that share a training step out."""

import os
import threading
import time

import pytest
import torch

from saes.engine.team import Team, around, own_threads, team


@pytest.fixture(params=[1, 2, 4])
def size(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def test_results_come_in_order_from_several_threads(size):
    seen = set()

    def use(item):
        seen.add(threading.get_ident())
        time.sleep(0.002)
        return item, torch.get_num_threads()

    with team() as workers:
        assert workers.size == size
        assert workers.map(use, range(40)) == [(item, 1) for item in range(40)]
        assert workers.map(use, []) == []
    assert len(seen) == size


def test_an_error_stops_all_and_is_raised(size):
    asked = []

    def use(item):
        asked.append(item)
        time.sleep(0.001)
        if item == 5:
            raise ValueError("five")

    with team() as workers, pytest.raises(ValueError, match="five"):
        workers.map(use, range(200))
    assert len(asked) < 100
    with team() as workers:  # and it can go on
        assert workers.map(abs, [-1, -2, -3]) == [1, 2, 3]


def test_inside_a_team_there_is_that_one_and_inside_its_work_each_is_alone(size):
    assert around().size == 1
    with team() as outer, team() as inner:
        assert inner is outer is around()
        assert set(outer.map(lambda _: around().size, range(8))) == {1}
        with own_threads():
            assert torch.get_num_threads() == size and around().size == 1
        assert around() is outer and torch.get_num_threads() == 1
    assert around().size == 1


@pytest.mark.parametrize(("count", "most"), [(10, None), (10, 3), (2, None), (1000, 7)])
def test_parts_cover_everything_once(count, most):
    x = torch.arange(count)
    parts = Team(3).parts(x, most)
    assert torch.equal(torch.cat([x[part] for part in parts]), x)
    assert len(parts) >= min(3, count // 3) and all(len(x[part]) <= (most or count) for part in parts)


def test_a_forked_process_has_threads_of_its_own():
    torch.set_num_threads(2)
    with team() as workers:
        workers.map(abs, range(4))
    child = os.fork()
    if child == 0:
        try:
            with team() as workers:
                found = workers.map(abs, [-1, -2, -3, -4])
            os._exit(0 if found == [1, 2, 3, 4] else 1)
        finally:
            os._exit(2)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done and os.waitstatus_to_exitcode(status) == 0
