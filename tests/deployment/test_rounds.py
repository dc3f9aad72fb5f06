"""A real deployment trains as a simulation does."""

from __future__ import annotations

import shutil

import numpy as np
from safetensors.numpy import load_file

from securefl.runs import run


def test_a_seeded_deployment_gives_the_in_process_model_weight_for_weight(deployment) -> None:
    deployment.start_all()
    name = deployment.submit()
    over = deployment.wait_over(name)
    assert over.state == "finished", over

    own = deployment.folder / "own"
    for site in deployment.sites:
        (own / site).mkdir(parents=True)
        for file in ("site.toml", "site.key"):
            shutil.copy(deployment.kit(site) / file, own / site)
    alone = run(deployment.experiment(), deployment.folder / "alone", sites=own, report=False)

    here = load_file(alone.directory / "model.safetensors")
    there = load_file(deployment.run_folder(name) / "model.safetensors")
    assert here.keys() == there.keys()
    for tensor, values in here.items():
        assert np.array_equal(values, there[tensor]), tensor
