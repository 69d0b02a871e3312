"""The HTTP API does what its description says: Schemathesis makes requests up from it, good and bad, for a small model
in this process."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from starflow_jax.config import Serve
from starflow_jax.serving.describe import openapi
from tests.sampling.test_session import steerable
from tests.serving.served import served_here
from tests.small_model import CONFIG

schemathesis = pytest.importorskip("schemathesis", reason="needs the extra test-web")
pytestmark = pytest.mark.filterwarnings("ignore:.*no training caption")

LIMITS = dict(frames=9, sessions=2, queue=1_000, videos=1_000, rate=100_000)


def described(mode: str, allowed: tuple[str, ...]) -> Any:
    """What /openapi.json says. allowed: statuses of answers to requests that keep to it."""
    return schemathesis.openapi.from_dict(openapi(Serve(**LIMITS)), config=schemathesis.Config.from_dict({
        "request-timeout": 600,  # jobs are before it
        "generation": {"mode": mode, "max-examples": 20, "deterministic": True},
        "checks": {"positive_data_acceptance": {"expected-statuses": list(allowed)}}}))


# Which lengths are whole latent frames, which texts are moves and which files pictures, no description can say.
ANY, GOOD = described("all", ("2xx", "404", "409", "422")), described("positive", ("2xx",))


@pytest.fixture(scope="module")
def address(params) -> Iterator[str]:
    with served_here(steerable(dataclasses.replace(CONFIG.model, frames=4), params), **LIMITS) as made:
        yield made


@ANY.parametrize()
def test_every_operation_answers_as_described(case: Any, address: str) -> None:
    case.call_and_validate(base_url=address)


@GOOD.include(operation_id="makeVideo").parametrize()
def test_what_can_be_made_is_made(case: Any, address: str) -> None:
    case.body = {name: value for name, value in case.body.items() if name in ("prompt", "seed", "guidance")}
    case.call_and_validate(base_url=address, headers={"accept": "video/mp4"})


def test_jobs_are_looked_at_and_deleted(address: str) -> None:
    """Sequences of requests, by the description's links."""

    class Sequences(described("positive", ("2xx", "404", "409")).as_state_machine()):  # type: ignore[misc]
        wants_video = False

        def before_call(self, case: Any) -> None:
            if case.operation.method == "post":
                case.body = {"prompt": case.body["prompt"], "frames": 5}
            self.wants_video = case.operation.method == "get" and not self.wants_video

        def get_call_kwargs(self, case: Any) -> dict[str, Any]:
            return {"base_url": address, "headers": {"accept": "video/mp4"} if self.wants_video else {}}

    Sequences.run(settings=hypothesis.settings(
        max_examples=5, stateful_step_count=6, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck)))
