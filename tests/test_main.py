"""Bad input on the command line: one line that names it, exit code 2, no traceback."""

import pytest

from tests.small_run import run

CASES = {
    "unknown field": (["--config.model.no_such_field=1"], "no_such_field"),
    "bad value": (["--config.train.batch_size=-3"], "train.batch_size=-3"),
    "wrong type": (["--config.train.batch_size=many"], "batch_size"),
    "unknown mode": (["--mode=fly"], "fly"),
    "unknown variant": (["--config=configs/t2v.py:9000b"], "9000b"),
    "missing config": (["--config=configs/nothing.py"], "nothing.py"),
    "missing prompts": (["--mode=sample", "--config.sample.prompts_file=no_such_prompts.txt"], "no_such_prompts.txt"),
    "missing image": (["--mode=sample", "--config.sample.prompt=x", "--config.sample.image=none.png"], "none.png"),
    "no prompt": (["--mode=sample"], "sample.prompt"),
    "length": (["--mode=sample", "--config.sample.prompt=x", "--config.sample.frames=12"], "sample.frames=12"),
    "missing video": (["--mode=evaluate", "--config.evaluate.video=no.mp4", "--config.evaluate.caption=x"], "no.mp4"),
    "no caption": (["--mode=evaluate", "--config.evaluate.video=no.mp4"], "evaluate.caption"),
    "stray argument": (["train"], "train"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_exit_code_2(name: str, tmp_path) -> None:
    arguments, told = CASES[name]
    result = run(tmp_path / "work", tmp_path, *arguments)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and told in lines[0], result.stderr
