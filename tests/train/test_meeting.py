import threading

import pytest
import torch.distributed as dist

from flux_func.train import meeting


def meetings(count):
    store = dist.HashStore()
    return [meeting.Meeting(store, count) for _ in range(count)]


def together(*calls):
    """Runs each in a thread of its own; returns what each returned or raised."""
    answers = [None] * len(calls)

    def run(index, call):
        try:
            answers[index] = call()
        except BaseException as error:
            answers[index] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return answers


def test_all_come_and_may_come_again():
    met, passed = meetings(3), []

    def come(one):
        for _ in range(4):
            passed.append("in")
            one.wait_at_barrier("here", 10_000)
            passed.append("out")
            one.wait_at_barrier("there", 10_000, [0, 1, 2])

    assert together(*[lambda one=one: come(one) for one in met]) == [None] * 3
    assert passed == (["in"] * 3 + ["out"] * 3) * 4


def test_who_waits_for_too_long_says_for_what():
    one, _ = meetings(2)
    with pytest.raises(TimeoutError, match="not every process came to here within 0 s"):
        one.wait_at_barrier("here", 50)


def test_one_that_fails_lets_the_others_go():
    one, two, three = meetings(3)
    answers = together(lambda: one.wait_at_barrier("a", 20_000), lambda: two.wait_at_barrier("b", 20_000), three.fail)
    assert [type(answer) for answer in answers] == [meeting.Abandoned, meeting.Abandoned, type(None)]


def test_one_that_comes_by_on_its_way_out_fails():
    one, two = meetings(2)

    def leave():
        try:
            raise ValueError("its own")
        finally:
            two.wait_at_barrier("b", 20_000)

    first, second = together(lambda: one.wait_at_barrier("a", 20_000), leave)
    assert isinstance(first, meeting.Abandoned) and str(second) == "its own"


def test_what_was_being_handled_before_is_no_failure():
    one, two = meetings(2)

    def come(one):
        try:
            raise ValueError
        except ValueError as error:
            one.before = error
            one.wait_at_barrier("a", 20_000)

    assert together(lambda: come(one), lambda: come(two)) == [None, None]


def test_a_line_whose_other_end_is_gone_is_a_failure():
    import socket

    ours, theirs = socket.socketpair()
    store = dist.HashStore()
    one, two = meeting.Meeting(store, 3, [ours]), meeting.Meeting(store, 3)
    theirs.close()
    answers = together(lambda: one.wait_at_barrier("a", 20_000), lambda: two.wait_at_barrier("a", 20_000))
    assert [type(answer) for answer in answers] == [meeting.Abandoned] * 2
