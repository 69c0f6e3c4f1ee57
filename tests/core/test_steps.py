"""Work in steps."""

from __future__ import annotations

from datm_ray.core.steps import Steps, all_of, finished, result_of


def counting(to: int) -> Steps[int]:
    for _ in range(to):
        yield
    return to


def test_the_result_is_returned_after_all_pauses() -> None:
    """The result is that of the last step, and `between` is called once at each pause."""
    pauses = list[int]()
    assert result_of(counting(3), lambda: pauses.append(1)) == 3
    assert len(pauses) == 3
    assert result_of(counting(0), lambda: pauses.append(1)) == 0
    assert len(pauses) == 3
    assert result_of(finished("done")) == "done"


def test_works_are_done_one_after_another() -> None:
    """Results come in the order of the works, with the pauses of all works. A work is made when its turn comes."""
    made = list[int]()

    def work(number: int) -> Steps[int]:
        made.append(number)
        return counting(number)

    works = all_of(work(number) for number in (2, 0, 1))
    next(works)
    assert made == [2]
    pauses = list[int]()
    assert result_of(works, lambda: pauses.append(1)) == [2, 0, 1]
    assert len(pauses) == 2  # of three in all
