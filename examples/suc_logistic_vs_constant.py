"""A single unit that detects a majority of ones: derivative of the logistic function against 1.

    python examples/suc_logistic_vs_constant.py [--quick] [--seeds N] [--compare freegrad]

The first experiment of Troiano et al. 2025 (doi:10.1016/j.neucom.2025.131178): one neuron, trained
on bit vectors that are uniform in their number of ones. Its backward is that of the logistic
function ("tied"), or passes the gradient unchanged ("constant").
"""

import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from _data import Source, load_ones
from _experiments import Experiment, Variant, main

DIMENSION = 10


class SingleUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIMENSION, 1)
        self.activation = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x)).squeeze(-1)


EXPERIMENT = Experiment(
    name="suc_logistic_vs_constant",
    title="Single unit, logistic",
    model=SingleUnit,
    variants=(
        Variant("Logistic / d(Logistic)"),
        Variant("Logistic / 1", {"sigmoid": fg.rules.d_linear}),
    ),
    data={"ones": Source(lambda: load_ones(DIMENSION, 2000))},
    epochs=30,
    batch_size=32,
    learning_rate=0.1,
    loss=F.binary_cross_entropy,
)

if __name__ == "__main__":
    main(EXPERIMENT)
