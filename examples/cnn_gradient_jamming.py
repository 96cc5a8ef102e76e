"""LeNet-5 with ReLUs, whose gradient is multiplied by random numbers.

    python examples/cnn_gradient_jamming.py [--quick] [--data NAME] [--compare freegrad]

Gradient jamming, from Troiano et al. 2025 (doi:10.1016/j.neucom.2025.131178): every component of
the gradient is multiplied by a random number from [0, 1): everywhere, where the input of the
activation is not negative, or where it is in [-5, 5]. Elsewhere, the gradient is 0.
"""

from torch import nn

import freegrad_fx as fg
from _data import IMAGES
from _experiments import Experiment, Variant, main
from _lenet import LeNet5

EXPERIMENT = Experiment(
    name="cnn_gradient_jamming",
    title="LeNet-5, ReLU",
    model=lambda: LeNet5(nn.ReLU),
    variants=(
        Variant("ReLU / d(ReLU)"),
        Variant("ReLU / full jam", {"relu": fg.rules.full_jam}),
        Variant("ReLU / positive jam", {"relu": fg.rules.positive_jam}),
        Variant("ReLU / rectangular jam", {"relu": fg.rules.rectangular_jam(a=-5.0, b=5.0)}),
    ),
    data=IMAGES,
    epochs=20,
    batch_size=64,
    learning_rate=0.01,
)

if __name__ == "__main__":
    main(EXPERIMENT)
