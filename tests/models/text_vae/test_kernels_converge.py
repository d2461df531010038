"""The whole model trained with the Triton kernels and with the references: the same losses.

On a CPU the kernels run in Triton's interpreter, in fp32.
"""

import pytest
import torch

from cdpvae import SoftPromptVAELoss, StepPlan
from cdpvae.compatibility import forward
from support.triton import DEVICE

STEPS = 20


def train(make_model, batch, impl: str, **loss) -> list[float]:
    """STEPS optimizer steps on one batch with word dropout, noise and the view -> their losses."""
    model = make_model().float().to(DEVICE).train()
    model.impl = impl
    with torch.no_grad():
        # A step of this model must not blow up roundings. LoRA starts at zero, as in training; a
        # new Llama embeds its pad token, the dropped words, as zeros, where RMSNorm's gradient has
        # no bound.
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        row = torch.randn(32, generator=torch.Generator().manual_seed(4))
        model.backbone.embedding_weight[model.tokens.pad] = 0.2 * row
    loss_fn = SoftPromptVAELoss(latent_dim=6, free_bits=0.05, impl=impl, **loss)
    trainable = [p for p in model.parameters() if p.requires_grad]
    # Without a floor Adam divides a gradient that is only rounding by its own size.
    optimizer = torch.optim.AdamW(trainable, lr=2e-3, eps=1e-3)
    batch = batch.to(DEVICE)
    losses = []
    for step in range(STEPS):
        plan = StepPlan(
            step=step,
            epoch=step,
            beta=0.5,
            bow_weight=1.5,
            contrastive_weight=0.1,
            word_dropout=0.4,
            target_divisor=float(batch.targets.numel()),
            with_view=False,
        )
        total = forward(model, batch, plan, loss_fn=loss_fn, seed=7).loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return losses


@pytest.mark.parametrize("bow_reduction", ["bce", "categorical"])
def test_training_with_kernels_follows_training_with_references(make_model, batch, bow_reduction):
    curves = {
        impl: train(make_model, batch, impl, bow_reduction=bow_reduction)
        for impl in ("reference", "triton")
    }
    assert curves["reference"][-1] < 0.8 * curves["reference"][0], "nothing was learnt"
    torch.testing.assert_close(
        torch.tensor(curves["triton"]), torch.tensor(curves["reference"]), rtol=1e-5, atol=0
    )
