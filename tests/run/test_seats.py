"""The CPU on which those that take turns are timed, with CPUs whose speed is told."""

import pytest

from harness.run.seats import LOOK_EVERY_S, Seats


class Worker:
    """Notes where it sits."""

    start_latency_s = 0.0

    def __init__(self, cpus=(2, 4, 6)):
        self.all, self.sat = cpus, []

    def cpus(self):
        return self.all

    def sit(self, cpu):
        self.sat.append(cpu)

    def stand(self):
        self.sat.append(None)

    def ask(self, command, trial, timeout_s, **arguments):
        raise AssertionError

    def close(self):
        raise AssertionError


@pytest.fixture
def rounds():
    """A function that says where two workers sat in rounds, by the seconds that each CPU takes in each of them."""

    def sat(number, *speeds, workers=None, every_s=LOOK_EVERY_S):
        ours, now, told = workers or [Worker(), Worker()], [0.0], iter(speeds)
        look = lambda cpus: {cpu: took for cpu, took in next(told).items() if cpu in cpus}  # noqa: E731
        with Seats(ours, number, look=look, clock=lambda: now[0]) as seats:
            for _ in speeds:
                seats.begin_round()
                now[0] += every_s
        assert all(one.sat == ours[0].sat for one in ours)
        return ours[0].sat

    return sat


ALIKE = {2: 1.0, 4: 1.0, 6: 1.0}


def test_each_replicate_has_another_cpu(rounds):
    """Counted round, and all stand up at the end."""
    assert [rounds(number, ALIKE, ALIKE) for number in range(4)] == [[2, None], [4, None], [6, None], [2, None]]


def test_a_cpu_that_is_slower_is_left_until_it_is_not(rounds):
    """For the fastest; a little slower is not worth moving."""
    assert rounds(0, ALIKE | {2: 1.02}, ALIKE | {2: 1.4, 6: 0.9}, ALIKE) == [2, 6, 2, None]


def test_cpus_are_looked_at_now_and_then(rounds):
    """Not before each of many short rounds."""
    assert rounds(0, ALIKE, ALIKE | {2: 1.4}, every_s=LOOK_EVERY_S / 2) == [2, None]


def test_of_many_cpus_some_are_looked_at(rounds):
    """Those after the one whose turn it is."""
    many = [Worker(tuple(range(16))), Worker(tuple(range(16)))]
    assert rounds(14, {cpu: 0.5 if cpu == 5 else 1.0 if cpu == 1 else 2.0 for cpu in range(16)}, workers=many) == [
        1,
        None,
    ]


@pytest.mark.parametrize(
    "workers", [[Worker()], [Worker((2,)), Worker((2,))], [Worker((2, 4)), Worker(())], [Worker(), Worker(), object()]]
)
def test_nobody_sits_where_there_is_nothing_to_choose(workers):
    """One worker alone, one CPU, a process that is gone, one that cannot be told."""
    with Seats(workers, 0, look=lambda cpus: {}) as seats:
        seats.begin_round()
    assert all(one.sat == [] for one in workers if isinstance(one, Worker))


def test_all_stand_up_after_an_error():
    """Whatever happens between two rounds."""
    ours = [Worker(), Worker()]
    with pytest.raises(RuntimeError), Seats(ours, 1, look=lambda cpus: {}) as seats:  # noqa: PT012
        seats.begin_round()
        raise RuntimeError
    assert [one.sat for one in ours] == [[4, None], [4, None]]
