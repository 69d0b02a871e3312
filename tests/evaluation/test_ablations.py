"""Runs read together: means and intervals over seeds, differences from the base, what is missing."""

import json
from pathlib import Path

import numpy as np
import pytest

from starflow_jax.evaluation import ablations
from starflow_jax.evaluation.measures import interval

T_OF_2 = 4.302653  # Student's t, two degrees of freedom, 97.5 %
T_OF_1 = 12.706205


def write_run(folder: Path, name: str, bits: float, digit: float, horizon: float | None = None) -> Path:
    run = folder / name
    (run / "checkpoints").mkdir(parents=True)
    (run / "evaluate.json").write_text(json.dumps({
        "bits_per_dim": bits, "baselines": {"gaussian": 2.0}, "temporal_flickering": 0.9,
        "adherence": {"digit": digit, "colour": 1.0, "direction": 0.5}}))
    if horizon is not None:
        (run / "horizon.json").write_text(json.dumps({"stretches": [{"digit": 1.0}, {"digit": horizon}]}))
    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, (base, other) in enumerate(((1.0, 1.2), (1.1, 1.2), (1.2, 1.5))):
        write_run(tmp_path, f"base-{seed}", base, 0.1 * seed, horizon=0.2 * seed)
        write_run(tmp_path, f"global_shallow-{seed}", other, 0.5)
    write_run(tmp_path, "noise_0.3-0", 0.4, 0.3)
    write_run(tmp_path, "width_128-1", 1.4, 0.3)
    write_run(tmp_path, "width_192-1", 1.3, 0.4)
    write_run(tmp_path, "something_else-0", 9.0, 0.9)
    return tmp_path


def found_in(folder: Path) -> ablations.Found:
    return ablations.collect(folder, {run: 1000 for run in ablations.trained(folder)})


def test_interval() -> None:
    mean, half = interval([1.0, 2.0, 4.0])
    np.testing.assert_allclose((mean, half), (7 / 3, T_OF_2 * np.std([1, 2, 4], ddof=1) / np.sqrt(3)), rtol=1e-5)
    np.testing.assert_allclose(interval([0.0, 2.0]), (1.0, T_OF_1), rtol=1e-5)
    assert interval([3.0])[0] == 3.0 and np.isnan(interval([3.0])[1])


def test_means_differences_and_what_lies_past_the_window(folder: Path) -> None:
    rows = ablations.summary(found_in(folder))
    assert set(rows) == {"base", "global_shallow", "noise_0.3", "width_128", "width_192"}
    np.testing.assert_allclose(rows["base"]["bits_per_dim"], (1.1, T_OF_2 * 0.1 / np.sqrt(3)), rtol=1e-5)
    np.testing.assert_allclose(rows["global_shallow"]["bits_above"], interval([0.2, 0.1, 0.3]), rtol=1e-5)
    np.testing.assert_allclose(rows["width_128"]["bits_above"][0], 0.1)  # of seed 1
    # Bits of latents with other noise are of something else, and so are not compared.
    assert "bits_above" not in rows["noise_0.3"] and rows["noise_0.3"]["bits_below_gaussian"][0] == 1.6
    np.testing.assert_allclose(rows["base"]["last_training_length"]["digit"], interval([0.0, 0.2, 0.4]))
    assert "bits_above" not in rows["width_192"] and "bits_above" not in rows["base"]
    assert ablations.cells("width_128", rows["width_128"])[:5] == ["width_128", "1", "1,000", "1.4000", "0.1000"]
    assert ablations.in_words((1.0, 0.25), 2) == "1.00 ± 0.25" and ablations.in_words(None) == ""


def test_what_is_missing_is_named(folder: Path) -> None:
    missing = found_in(folder).missing
    assert {"width_128-0", "width_128-2", "no_images-0", "noise_0.3-1"} <= set(missing)
    assert not {"base-0", "global_shallow-2", "noise_0.3-0", "width_128-1"} & set(missing)
    assert len(missing) == 3 * len(ablations.VARIANTS) - 9


def test_charts_show_what_is_there(folder: Path) -> None:
    drawn = ablations.charts(ablations.summary(found_in(folder)))
    charts = {chart.title: chart for chart in drawn}
    above = charts["bits per dimension above the base of the same seed"]
    assert list(above.x) == ["global_shallow"] and above.level == 0
    assert list(charts["bits per dimension below a Gaussian's"].x) == [0.15, 0.3]
    assert list(charts["bits per dimension"].x) == [1000, 1000] and charts["bits per dimension"].log
    read, over_noise = (list(chart.x) for chart in drawn if chart.title == "read as asked")
    assert read == ["base", "global_shallow", "noise_0.3"] and over_noise == [0.15, 0.3]  # not of the widths
    alone = ablations.summary(found_in(folder))["width_128"]
    assert [chart.title for chart in ablations.charts({"width_128": alone})] == ["bits per dimension"]
