"""A perceptron with one hidden layer on digits: derivative of the logistic function against 1.

    python examples/mlp_digits_constant_vs_tied.py [--quick] [--seeds N] [--compare freegrad]

The second experiment of Troiano et al. 2025 (doi:10.1016/j.neucom.2025.131178): 64-64-10 on
scikit-learn's digits of 8×8 pixels. The backward of the hidden layer is that of the logistic
function ("tied"), or passes the gradient unchanged ("constant").
"""

from torch import Tensor, nn

import freegrad_fx as fg
from _data import Source, load_digits
from _experiments import Experiment, Variant, main


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 64)
        self.activation = nn.Sigmoid()
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x.flatten(1))))


EXPERIMENT = Experiment(
    name="mlp_digits_constant_vs_tied",
    title="MLP 64-64-10, logistic",
    model=MLP,
    variants=(
        Variant("Logistic / d(Logistic)"),
        Variant("Logistic / 1", {"sigmoid": fg.rules.d_linear}),
    ),
    data={"digits": Source(lambda: load_digits(held_out=0.2))},
    epochs=100,
    batch_size=64,
    learning_rate=0.05,
)

if __name__ == "__main__":
    main(EXPERIMENT)
