"""The one timing loop: turns, a first round that does not count, medians."""

from starflow_jax.io.timing import median_seconds, timed


def test_cases_take_turns_and_the_first_round_does_not_count():
    now, calls = [0.0], []
    took = {"a": iter([100, 1, 9, 2]), "b": iter([100, 3, 30, 300])}

    def case(name):
        def run():
            calls.append(name)
            now[0] += next(took[name])
            return len(calls)
        return run

    found = timed("test", {name: case(name) for name in took}, rounds=3, clock=lambda: now[0])
    assert calls == ["a", "b"] * 4
    assert found == {"a": (7, 2.0), "b": (8, 30.0)}  # the last results, the medians of the last three


def test_seconds_alone():
    now = iter(range(100))
    assert median_seconds("test", {"a": lambda: None}, rounds=2, clock=lambda: next(now)) == {"a": 1.0}
