"""A single unit with a step activation, whose derivative is useless for training.

    python examples/bnn_step_activation.py [--quick] [--seeds N] [--compare freegrad]

The binary network of Troiano et al. 2025 (doi:10.1016/j.neucom.2025.131178): the derivative of a
step is 0, so the unit does not learn; with the constant 1 instead, it learns. The model is an
ordinary model with a logistic output, which the rules replace by the step.
"""

import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from _data import Source, load_ones
from _experiments import Experiment, Variant, main

DIMENSION = 64


class SingleUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIMENSION, 1)
        self.activation = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x)).squeeze(-1)


EXPERIMENT = Experiment(
    name="bnn_step_activation",
    title="Single unit, step",
    model=SingleUnit,
    variants=(
        Variant("Logistic / d(Logistic)"),
        Variant("Step / 0", {"sigmoid": fg.rules.scale(s=0.0, forward="heaviside")}),
        Variant("Step / 1", {"sigmoid": fg.rules.d_linear(forward="heaviside")}),
    ),
    data={"ones": Source(lambda: load_ones(DIMENSION, 4096))},
    epochs=20,
    batch_size=64,
    learning_rate=0.1,
    loss=F.mse_loss,
)

if __name__ == "__main__":
    main(EXPERIMENT)
