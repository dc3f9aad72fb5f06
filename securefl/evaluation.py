"""How well the global model does on records held out from training."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from securefl.config import ConfigurationError
from securefl.data.tables import Table
from securefl.models import Loss
from securefl.tallies import area_under_roc

BATCH = 1024


def evaluate(
    module: nn.Module, loss: Loss, table: Table, device: torch.device | str
) -> dict[str, float]:
    """The figures of `module` on `table`, each named test_*.

    Classification: test_loss, test_accuracy, and with two classes test_auc, unless one of them
    is absent or the scores are not finite. Regression: test_loss (in the units of training),
    test_mse, test_mae and test_r2 (in the target's own units; test_r2 is absent when all targets
    are equal). The module is moved to `device` and keeps its mode; no gradient is computed.

    The figures read every record of `table` without noise: give only records that are declared
    outside the privacy guarantee.
    """
    if len(table) == 0:
        raise ConfigurationError("no held-out records to test on: raise data.test_fraction")
    outputs, losses = forward(module, loss, table, device)
    figures = {"test_loss": float(losses.mean())}
    if table.task == "classification":
        figures["test_accuracy"] = float((outputs.argmax(axis=1) == table.target).mean())
        if len(table.classes) == 2:
            area = area_under_roc(outputs[:, 1] - outputs[:, 0], table.target == 1)
            if area is not None:
                figures["test_auc"] = area
        return figures
    low, high = table.target_range or (-1.0, 1.0)
    halfwidth = (high - low) / 2
    truth = table.target.astype(np.float64) * halfwidth
    error = outputs[:, 0] * halfwidth - truth
    figures["test_mse"] = float((error**2).mean())
    figures["test_mae"] = float(np.abs(error).mean())
    spread = float(truth.var())
    if spread > 0:
        figures["test_r2"] = 1 - figures["test_mse"] / spread
    return figures


def forward(
    module: nn.Module, loss: Loss, table: Table, device: torch.device | str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The outputs [n, outputs] and losses [n] of every record."""
    outputs, losses = [], []
    training = module.training
    module.to(device).eval()
    try:
        with torch.no_grad():
            for start in range(0, len(table), BATCH):
                rows = slice(start, start + BATCH)
                target = torch.from_numpy(table.target[rows]).to(device)
                given = module(torch.from_numpy(table.features[rows]).to(device))
                outputs.append(given.double().cpu().numpy())
                losses.append(loss(given, target).double().cpu().numpy())
    finally:
        module.train(training)
    return np.concatenate(outputs), np.concatenate(losses)
