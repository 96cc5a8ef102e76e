"""LeNet-5 with logistic activations: native derivative against a rectangle.

    python examples/lenet_mnist_rectangular.py [--quick] [--data NAME] [--compare freegrad]

The third experiment of Troiano et al. 2025 (doi:10.1016/j.neucom.2025.131178). The rectangle is 1
where the input of the activation is in [-0.5, 0.5], and 0 elsewhere.
"""

from torch import nn

import freegrad_fx as fg
from _data import IMAGES
from _experiments import Experiment, Variant, main
from _lenet import LeNet5

EXPERIMENT = Experiment(
    name="lenet_mnist_rectangular",
    title="LeNet-5, logistic",
    model=lambda: LeNet5(nn.Sigmoid),
    variants=(
        Variant("Logistic / d(Logistic)"),
        Variant("Logistic / rectangular", {"sigmoid": fg.rules.rectangular(a=-0.5, b=0.5)}),
    ),
    data=IMAGES,
    epochs=30,
    batch_size=256,
    learning_rate=0.01,
    momentum=0.9,
)

if __name__ == "__main__":
    main(EXPERIMENT)
