"""Work in steps."""

from __future__ import annotations

from datm_ray.core.steps import Steps, Work, all_of, finished, result_of


def counting(to: int) -> Steps[int]:
    for _ in range(to):
        yield
    return to


def test_the_result_is_returned_after_all_pauses() -> None:
    """The result is that of the last step, and there is one item for each pause."""
    for pauses in (3, 0):
        work = Work(counting(pauses))
        assert list(work) == [None] * pauses
        assert work.result == result_of(counting(pauses)) == pauses
    assert result_of(finished("done")) == "done"


def test_works_are_done_one_after_another() -> None:
    """Results come in the order of the works, with the pauses of all works. Each is made after the one before."""
    made = list[int]()

    def work(number: int) -> Steps[int]:
        made.append(number)
        return counting(number)

    works = all_of(work(number) for number in (2, 0, 1))
    next(works)
    assert made == [2]
    rest = Work(works)
    assert len(list(rest)) == 2  # of three pauses in all
    assert rest.result == [2, 0, 1]
