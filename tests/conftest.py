from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", default=str(Path(__file__).parent / "golden"),
                     help="folder of golden cases (tests/golden/README.md)")
