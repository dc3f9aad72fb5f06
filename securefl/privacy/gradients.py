"""Per-sample gradients. The only user of Opacus."""

from __future__ import annotations

import torch
from opacus import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient


class PerSampleGradients(GradSampleModule):  # type: ignore[misc]
    """Opacus's, keeping a layer's gradients as they come: it would copy them into zeros first."""

    def capture_backprops_hook(
        self,
        module: torch.nn.Module,
        _forward_input: torch.Tensor,
        forward_output: torch.Tensor,
        loss_reduction: str,
        batch_first: bool,
    ) -> None:
        """Set `grad_sample` of the parameters of `module`; Opacus adds up those used repeatedly."""
        once = all(
            getattr(parameter, "_forward_counter", 0) == 1  # not tied to another layer
            and not hasattr(parameter, "_current_grad_sample")
            for parameter in module.parameters()
        )
        if not once:
            super().capture_backprops_hook(
                module, _forward_input, forward_output, loss_reduction, batch_first
            )
            return
        activations, backprops = self.rearrange_grad_samples(
            module=module,
            backprops=forward_output[0].detach(),
            loss_reduction=loss_reduction,
            batch_first=batch_first,
        )
        gradients = self.GRAD_SAMPLERS.get(type(module), ft_compute_per_sample_gradient)
        for parameter, each in gradients(module, activations, backprops).items():
            parameter.grad_sample = each
            parameter._forward_counter = 0
        del module.max_batch_len
