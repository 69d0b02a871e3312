"""What the tests of this folder share: for each file of tests one browser, and one server with the pretrained model."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.serving.served import Server
from tests.web.browser import Page, chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def server(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("no_model"), sessions=1, rate=100_000) as served:
        yield served


@pytest.fixture
def open_page(browser: Any, server: Server) -> Iterator[Callable[..., Page]]:
    """Pages, which are closed in the end; nothing may have gone wrong in them."""
    opened = []

    def made(**settings: Any) -> Page:
        opened.append(Page(browser, server.address, **settings))
        return opened[-1]

    yield made
    for page in opened:
        page.close()
