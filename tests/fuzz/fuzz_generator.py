"""Random programs: what users write in a forward, put together by chance.

Nothing here knows the product. `Generator.program` makes one; `features` of the program says what was put in.
"""

from __future__ import annotations

import random

from fuzz_programs import VARIABLES, WIDTH, Block, Class, Program, Statement

# Module class -> functions with the same meaning. {x} is the input; those of FUNCTIONS work on any tensor.
MODULES = {
    "relu": "nn.ReLU()", "relu6": "nn.ReLU6()", "leaky_relu": "nn.LeakyReLU(0.2)", "elu": "nn.ELU(0.7)",
    "selu": "nn.SELU()", "celu": "nn.CELU(0.6)", "gelu": "nn.GELU()", "silu": "nn.SiLU()", "mish": "nn.Mish()",
    "hardswish": "nn.Hardswish()", "hardsigmoid": "nn.Hardsigmoid()", "hardtanh": "nn.Hardtanh(-0.7, 0.9)",
    "softplus": "nn.Softplus()", "sigmoid": "nn.Sigmoid()", "tanh": "nn.Tanh()", "logsigmoid": "nn.LogSigmoid()",
    "hardshrink": "nn.Hardshrink(0.3)", "softshrink": "nn.Softshrink(0.3)", "threshold": "nn.Threshold(0.1, 0.05)",
    "prelu": "nn.PReLU()", "softmax": "nn.Softmax(dim=-1)", "log_softmax": "nn.LogSoftmax(dim=1)",
    "softsign": "nn.Softsign()", "tanhshrink": "nn.Tanhshrink()",
}  # fmt: skip
INPLACE_MODULES = {
    "relu": "nn.ReLU(inplace=True)", "elu": "nn.ELU(0.7, True)", "silu": "nn.SiLU(inplace=True)",
    "hardtanh": "nn.Hardtanh(-0.7, 0.9, inplace=True)", "leaky_relu": "nn.LeakyReLU(0.2, True)",
    "relu6": "nn.ReLU6(True)", "hardswish": "nn.Hardswish(True)", "mish": "nn.Mish(inplace=True)",
    "threshold": "nn.Threshold(0.1, 0.05, True)", "celu": "nn.CELU(0.6, inplace=True)",
}  # fmt: skip
FUNCTIONS = {
    "relu": ["F.relu({x})", "torch.relu({x})", "{x}.relu()", "F.relu(input={x})", "torch.Tensor.relu({x})",
             "TABLE['relu']({x})", "getattr(F, 'relu')({x})", "self.stored({x})"],
    "relu6": ["F.relu6({x})"],
    "leaky_relu": ["F.leaky_relu({x}, 0.2)", "F.leaky_relu({x}, negative_slope=0.3)", "helper({x})",
                   "functools.partial(F.leaky_relu, negative_slope=0.4)({x})"],
    "elu": ["F.elu({x})", "F.elu({x}, alpha=0.5)"],
    "selu": ["F.selu({x})", "torch.selu({x})"],
    "celu": ["F.celu({x}, 0.6)", "torch.celu({x})"],
    "gelu": ["F.gelu({x})", "F.gelu({x}, approximate='tanh')"],
    "silu": ["F.silu({x})"], "mish": ["F.mish({x})"], "hardswish": ["F.hardswish({x})"],
    "hardsigmoid": ["F.hardsigmoid({x})"], "hardtanh": ["F.hardtanh({x}, -0.5, 0.8)"],
    "softplus": ["F.softplus({x})", "F.softplus({x}, beta=2)"],
    "sigmoid": ["torch.sigmoid({x})", "{x}.sigmoid()", "torch.special.expit({x})"],
    "tanh": ["torch.tanh({x})", "{x}.tanh()", "TABLE['tanh']({x})"],
    "logsigmoid": ["F.logsigmoid({x})"],
    "hardshrink": ["F.hardshrink({x}, 0.3)", "{x}.hardshrink(0.3)"],
    "softshrink": ["F.softshrink({x}, 0.2)"],
    "prelu": ["F.prelu({x}, self.slope)", "torch.prelu({x}, self.slope)", "{x}.prelu(self.slope)"],
    "softmax": ["F.softmax({x}, dim=-1)", "{x}.softmax(1)", "torch.softmax({x}, 1)"],
    "log_softmax": ["F.log_softmax({x}, dim=1)", "{x}.log_softmax(-1)"],
    "sign": ["torch.sign({x})", "{x}.sign()"], "round": ["torch.round({x})", "{x}.round()"],
    "floor": ["{x}.floor()"], "trunc": ["torch.trunc({x})"],
    "clamp": ["{x}.clamp(-0.5, 0.5)", "torch.clamp({x}, min=-0.3)", "torch.clip({x}, -0.4, 0.6)"],
    "abs": ["{x}.abs()", "torch.abs({x})", "abs({x})"],
    "softsign": ["F.softsign({x})"], "tanhshrink": ["F.tanhshrink({x})"],
}  # fmt: skip
INPLACE_FUNCTIONS = {
    "relu": ["F.relu({x}, inplace=True)", "F.relu_({x})", "{x}.relu_()", "torch.relu_({x})", "F.relu({x}, True)"],
    "elu": ["F.elu({x}, 0.7, True)", "F.elu({x}, inplace=True)", "F.elu_({x})"],
    "silu": ["F.silu({x}, inplace=True)"], "selu": ["F.selu({x}, inplace=True)", "torch.selu_({x})"],
    "leaky_relu": ["F.leaky_relu({x}, 0.2, True)", "F.leaky_relu_({x}, 0.2)"],
    "hardtanh": ["F.hardtanh_({x}, -0.5, 0.8)", "F.hardtanh({x}, -0.5, 0.8, inplace=True)"],
    "sigmoid": ["{x}.sigmoid_()", "torch.sigmoid_({x})"], "tanh": ["{x}.tanh_()", "torch.tanh_({x})"],
    "clamp": ["{x}.clamp_(-0.5, 0.5)", "{x}.clamp_(min=-0.3)"], "abs": ["{x}.abs_()"],
    "hardswish": ["F.hardswish({x}, inplace=True)"], "mish": ["F.mish({x}, True)"],
}  # fmt: skip
# Each writes through a view or into a part.
PARTS = ("{x}[:, 1:3]", "{x}[:, ::2]", "{x}.t()", "{x}[0]", "{x}[:, 0]", "{x}.view(-1)", "{x}[1:]", "{x}.T",
         "{x}.view(-1, 2, 2).transpose(1, 2)", "{x}.chunk(2, 1)[1]", "{x}.unbind(0)[0]", "{x}[:0]", "{x}[0, 0]",
         "{x}.unsqueeze(0)", "{x}.narrow(1, 1, 2)")  # fmt: skip
ARITHMETIC = (
    "{v} = {x} + {y}", "{v} = {x} - {y}", "{v} = {x} * {y}", "{v} = {x} * 1.5", "{v} = {x} + 0.1", "{v} = -{x}",
    "{v} = torch.where({y} > 0, {x}, {y})", "{v} = {x} * ({y} > 0)", "{v} = {x}.masked_fill({y} > 0.5, 0.25)",
    "{v} = torch.cat([{x}, {y}], 1)[:, ::2]", "{v} = torch.stack([{x}, {y}]).sum(0)", "{v} = {x} + {y}.mean()",
    "{v} = {x} - {x}.mean(0, keepdim=True)", "{v} = torch.add({x}, {y}, alpha=0.5)",
    "{v} = {x} / ({y}.abs() + 1)",
    "{v} = {x} * torch.tanh({y}.mean())", "{v} = torch.einsum('ij,ij->ij', {x}, {y})",
    "{v} = {x}.float().relu().to({x}.dtype)",
    "{v} = {x}.clone()", "{v} = {x} + F.relu({y}[:0]).sum()", "{v} = {x} @ self.square",
    "{v} = torch.maximum({x}, {y})", "{v} = {x} * torch.sigmoid(self.gain)", "{v} = {x} * self.scale",
    "{v} = {x} + self.constant", "{v} = torch.zeros_like({x}) + {y}", "{v} = {x}.new_ones({x}.shape) * {y}",
)  # fmt: skip
INPLACE_ARITHMETIC = (
    "{x} += {y}", "{x} *= 0.75", "{x} -= 0.1", "{x}.add_({y})", "{x}.mul_(0.5)", "{x} += {y}.detach()",
    "operator.iadd({x}, {y})", "{x}.copy_({y})", "{x}.masked_fill_({y} > 1, 0.5)", "{x} /= 1.5",
    "{x}[:, 0] = {y}[:, 1]", "{x}[:, :2] += 1", "{x}[0] = 0.5", "{x}[:, ::2].mul_(2)", "{x}.t().mul_(0.5)",
    "{x}[{x} > 0.5] = 0.25", "{x}.index_add_(1, torch.tensor([0, 2]), {y}[:, :2])", "{x}.zero_().add_({y})",
)  # fmt: skip
VIEWS = (
    "{v} = {x}", "{v} = {x}.view(-1, 4)", "{v} = {x}[:]", "{v} = {x}.view(-1, 2, 2).transpose(1, 2).reshape(-1, 4)",
    "{v} = {x}.t().t()", "{v} = torch.cat({x}.chunk(2, 1)[::-1], 1)", "{v} = {x}[:, [1, 0, 3, 2]]",
    "{v} = {x}[:1].expand_as({y})", "{v} = {x}.contiguous()", "{v} = {x}.flip(1)", "{v} = {x}.reshape(-1, 4)",
    "{v} = {x}.t().contiguous().t()", "{v} = {x}.detach()", "{v} = {x}.detach().clone()", "{v}, {x} = {x}, {v}",
    "{v} = {x}.view_as({x})", "{v} = torch.stack({x}.unbind(1), 1)",
)  # fmt: skip
LAYERS = (
    "{v} = self.fc({x})", "{v} = F.linear({x}, self.fc.weight)", "{v} = {x} @ self.fc.weight.t()",
    "{v} = self.fc2({x})", "{v} = self.norm({x})", "{v} = self.layer_norm({x})", "{v} = self.fc(self.fc2({x}))",
    "{v} = F.linear({x}, self.fc.weight * 0.5, self.fc.bias)", "{v} = F.layer_norm({x}, (4,))",
    "{v} = {x} @ self.fc.weight.T", "{v} = F.linear({x}, torch.tanh(self.fc2.weight))",
)  # fmt: skip
RANDOM = (
    "{v} = self.drop({x})", "{v} = F.dropout({x}, 0.4, self.training)",
    "{v} = F.dropout({x}, 0.4, training=self.norm.training)",
    "{v} = {x} + torch.rand({x}.shape[0], 1)", "{v} = {x} + torch.rand_like({x}) * 0.1",
    "F.dropout({x}, 0.3, self.training, True)",
)  # fmt: skip
STATE = (
    "self.count += 1\n{v} = {x} + 0.1 * self.count", "self.mean = 0.9 * self.mean + 0.1 * {x}.detach().mean(0)",
    "{v} = {x} - self.mean", "self.mean.mul_(0.9).add_({x}.detach().mean(0), alpha=0.1)", "self.count.fill_(2.0)",
    "self.last = {x}.detach()", "{v} = {x} + self.mean\nself.mean = {x}.detach().mean(0)",
    "self.buffers_seen[0] = {x}.detach().sum()", "{v} = {x} * torch.sigmoid(self.count)",
    "{v} = {x} + torch.relu(self.mean)",
    "with torch.no_grad():\n    self.mean.lerp_({x}.mean(0), 0.5)", "self.mean[:2] += 0.5",
)  # fmt: skip
PYTHON_STATE = (
    "self.steps += 1\n{v} = {x} * self.steps", "self.seen.append(1)\n{v} = {x} * len(self.seen)",
    "self.kept = {x} if self.kept is None else {x} + 0 * self.kept.detach()",
)  # fmt: skip
FLAGS = ("self.training", "not self.training", "self.flag", "self.norm.training", "self.fc.bias is not None",
         "self.training is False", "isinstance(x, torch.Tensor)")  # fmt: skip
SHAPE_FLAGS = ("{x}.shape[1] == 4", "{x}.dim() == 2", "len({x}.shape) > 1")
# What a block may do with its argument, which belongs to the caller.
ARGUMENT = (
    "F.relu_(x)", "x.mul_(0.5)", "x += 0.1", "{v} = F.relu(x)", "{v} = x", "part = x[:, 1:]\nF.elu_(part, 0.7)",
    "{v} = x.view(-1, 4)\n{v}.tanh_()", "{v} = {x} + x.sigmoid_()", "self.given = x", "{v} = {x} * x.T.relu().T",
)  # fmt: skip
PYTHON = (
    "{v} = sum([F.relu(t) for t in ({x}, {y})])", "{v} = torch.stack([torch.tanh(t) for t in {x}.unbind(1)], 1)",
    "{v} = (lambda t: F.elu(t, 0.5))({x})", "{v} = functools.reduce(torch.add, map(F.silu, [{x}, {y}]))",
    "def inner(t):\n    return F.relu(t) * {y}\n{v} = inner({x})", "{v} = self.method({x})", "{v} = {x}.data + {y}",
    "{x}.data.mul_(0.5)", "{v} = {y} + self.scale.data", "({v} := torch.relu({x})).add_(0.1)",
    "pair = {{'one': {x}, 'two': [{y}]}}\n{v} = F.gelu(pair['one']) + pair['two'][0]",
    "kept = [{x}]\nkept.append(F.relu_(kept[0] * 1.5))\n{v} = kept[-1]",
    "{v} = {x} if torch.jit.is_scripting() else {x}.relu()",
    "try:\n    {v} = torch.sigmoid({x})\nfinally:\n    {v} = {v} + 1",
    "with torch.no_grad():\n    self.scale.mul_(0.9)",
    "{v} = {x} * self.ratio", "{v} = getattr(torch, 'tanh')({x})", "{v} = F.rrelu({x}, 0.1, 0.3, self.training)",
    "{v} = {x} + F.one_hot({y}.argmax(1), 4).to({x}.dtype)", "{v} = F.gumbel_softmax({x}, dim=-1)",
    "{v} = {x}.type_as({y}).relu()",
    "old = {x}\n{x} = {x} * 1.5\n{x}.relu_()\n{v} = old + {x}", "{v} = {x}.sort(dim=1).values",
    "{v} = F.relu({x}).mul_({y}.detach())", "{v} = torch.relu({x}).view(-1).tanh_().view(-1, 4)",
    "low, high = {x}.aminmax()\n{v} = ({x} - low) / (high - low + 1)", "assert {x}.shape[-1] == 4",
    "{v} = torch.autograd.grad(F.silu({x}).sum(), {x}, create_graph=True)[0]", "{x}.retain_grad()",
)  # fmt: skip
GRAD_BLOCKS = ("with torch.no_grad()", "with torch.enable_grad()", "with torch.set_grad_enabled(False)")  # fmt: skip

RETURNS = ("a", "a + b + c", "a + b + c", "a * 0.5 + b", "(a, b, c)", "(a, b)", "{'out': a, 'more': (b, c)}",
           "[a, None, c.sum()]", "a, x")  # fmt: skip
STANDARD = (
    "self.fc, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)",
    "self.norm, self.layer_norm = nn.BatchNorm1d(4), nn.LayerNorm(4)",
    "self.drop = nn.Dropout(0.3)",
    "self.slope = nn.Parameter(torch.full((4,), 0.2))",
    "self.scale = nn.Parameter(torch.tensor([0.5, -0.7, 1.1, 0.9]))",
    "self.gain = nn.Parameter(torch.tensor(0.3))",
    "self.square = nn.Parameter(torch.randn(4, 4) * 0.4)",
    "self.constant = torch.tensor(0.25)",
    "self.stored = F.relu",
    "self.flag = True",
    "self.register_buffer('count', torch.zeros(()))",
    "self.register_buffer('mean', torch.zeros(4), persistent=False)",
    "self.register_buffer('buffers_seen', torch.zeros(3))",
    "self.last = torch.zeros(1)",
    "self.ratio = 0.75",
    "self.steps, self.seen, self.kept = 0, [], None",
)


class Generator:
    """Makes programs from a source of random numbers.

    Args:
        seed: The same seed gives the same program.
        risky: How often to put in what the symbolic way in refuses, or what fails natively, from 0 to 1.
    """

    def __init__(self, seed: int, risky: float = 0.1) -> None:
        self.random = random.Random(seed)
        self.risky = risky
        self.features: set[str] = set()
        self.init: list[str] = []
        self.modules: list[str] = []
        self.parts: list[str] = []
        self.root = True

    def program(self) -> Program:
        r = self.random
        blocks: list[Class] = []
        for number in range(r.choice((0, 0, 1, 1, 2))):
            blocks.append(self._make_class(f"Block{number}", blocks, r.randint(1, 4)))
        inputs: tuple[tuple[str, str], ...] = ()
        signature = "x"
        if self._chance(0.2):
            how = r.choice(("positional", "keyword", "default"))
            self.features.add(f"argument: {how}")
            signature = {
                "positional": "x, z", "keyword": "x, *, z", "default": "x, z=None, *, k=1.5, flag=False"
            }[how]  # fmt: skip
            inputs = (("z", how),)
        model = self._make_class("Model", blocks, r.randint(3, 9), root=True)
        body = list(model.body)
        if inputs:
            at = r.randint(0, len(body))
            line = {
                "positional": "b = b + torch.tanh(z)", "keyword": "z = z * 1.0\nb = b * F.relu_(z)",
                "default": "b = b * k if z is None else b + z",
            }[inputs[0][1]]  # fmt: skip
            body.insert(at, line)
        model = Class(model.name, model.init, tuple(body), self._returns(), signature)
        dtype = r.choice(("float64",) * 7 + ("float32", "bfloat16"))
        self.features.add(dtype)
        return Program((*blocks, model), dtype, inputs, frozenset(self.features))

    def _returns(self) -> str:
        kind = self.random.choice(RETURNS)
        self.features.add(f"returns {kind}")
        return kind

    def _chance(self, p: float) -> bool:
        return self.random.random() < p

    def _make_class(self, name: str, blocks: list[Class], length: int, root: bool = False) -> Class:
        self.init, self.modules, self.parts, self.root = list(STANDARD), [], [], root
        r = self.random
        if blocks and self._chance(0.9 if root else 0.4):
            for number in range(r.choice((1, 1, 2))):
                self.init.append(f"self.part{number} = {r.choice(blocks).name}()")
                self.parts.append(f"self.part{number}")
            if self._chance(0.15):
                self.init.append(f"self.again = {self.parts[0]}")
                self.parts.append("self.again")
                self.features.add("shared module")
            if self._chance(0.15):
                self.init.append(
                    f"self.listed = nn.ModuleList([{r.choice(blocks).name}(), nn.Mish()])"
                )
                self.parts.append("self.listed[0]")
                self.modules.append("self.listed[1]")
                self.features.add("ModuleList")
        if self._chance(0.12):
            self.init.append("self.fc2.weight = self.fc.weight")
            self.features.add("tied weights")
        if self._chance(0.06):
            self.init.append("self.fc = nn.utils.parametrizations.weight_norm(self.fc)")
            self.features.add("parametrization")
        if self._chance(0.08):
            self.init.append(
                f"self.{r.choice(('fc.weight', 'slope', 'scale'))}.requires_grad_(False)"
            )
            self.features.add("frozen")
        body = tuple(self._statement(2) for _ in range(length))
        if root and not any("self.fc" in s for s in body if isinstance(s, str)):
            body = ("a = self.fc(a)", *body)
        if self._chance(0.08):
            self._hook(root)
        used = "\n".join(_texts(body))
        init = tuple(
            line for line in self.init if line not in STANDARD or _needed(line, used, self.init)
        )
        return Class(
            name,
            init,
            body,
            r.choice(("a", "a + b + c", "a - b", "c", *([] if root else ["x", "a.view_as(a)"]))),
        )

    def _hook(self, root: bool) -> None:
        where = self.random.choice([*self.modules, "self.fc", *(["self"] if root else [])])
        kind = self.random.choice(
            ("forward_hook(after)", "forward_pre_hook(before)", "forward_hook(watch)")
        )
        self.init.append(f"{where}.register_{kind}")
        self.features.add("hook")

    # --- statements ---

    def _statement(self, depth: int) -> Statement:
        kind = self.random.choices(
            ("activation", "inplace", "part in place", "arithmetic", "inplace arithmetic", "view", "layer", "part",
             "random", "state", "function", "branch", "grad", "loop", "container", "checkpoint", "tensor hook",
             "python state", "data branch", "unused", "python", "argument"),
            (24, 12, 5, 9, 5, 7, 10, 9, 4, 5, 4, 6 * (depth > 0), 4 * (depth > 0), 3 * (depth > 0), 5, 2,
             2 * self.risky, 6 * self.risky, 4 * self.risky, 2, 8, 0 if self.root else 10),
        )[0]  # fmt: skip
        self.features.add(kind)
        made: Statement = getattr(self, "_" + kind.replace(" ", "_"))(depth)
        return made

    def _some(self) -> dict[str, str]:
        v, x, y = (self.random.choice(VARIABLES) for _ in range(3))
        # half of the statements go on with what they read: else most of a program would be dead
        v = x if self._chance(0.5) else v
        return {"v": v, "x": x, "y": y}

    def _from(self, templates: tuple[str, ...] | list[str]) -> str:
        return self.random.choice(templates).format(**self._some())

    def _activation(self, depth: int, x: str | None = None) -> str:
        r, some = self.random, self._some()
        x = x or some["x"]
        how = r.random()
        if how < 0.3:
            if not self.modules or self._chance(0.6):
                name = f"self.act{len(self.modules)}"
                self.init.append(f"{name} = {r.choice([*MODULES.values()])}")
                self.modules.append(name)
            call = f"{r.choice(self.modules)}({x})"
        elif how < 0.38:
            made = r.choice([m for name, m in MODULES.items() if name != "prelu"])
            call = f"{made}({x})"
            self.features.add("made inside")
        else:
            call = r.choice(r.choice([*FUNCTIONS.values()])).format(x=x)
        return f"{some['v']} = {call}"

    def _fresh(self, x: str) -> str:
        """Mostly, a line that makes a tensor that may be written into, as after a layer."""
        return f"{x} = {x} * 1.25\n" if self._chance(0.8) else ""

    def _inplace(self, depth: int, x: str | None = None) -> str:
        r, some = self.random, self._some()
        x = x or some["x"]
        if self._chance(0.3):
            name = f"self.act{len(self.modules)}"
            self.init.append(f"{name} = {r.choice([*INPLACE_MODULES.values()])}")
            self.modules.append(name)
            call = f"{name}({x})"
        elif self._chance(0.1):
            call = f"helper_inplace({x})"
        else:
            call = r.choice(r.choice([*INPLACE_FUNCTIONS.values()])).format(x=x)
            if self._chance(0.5):
                call = f"{some['v']} = {call}"
        alias = f"{some['y']} = {some['x']}\n" if self._chance(0.3) else ""
        return self._fresh(some["x"]) + alias + call

    def _part_in_place(self, depth: int) -> str:
        some = self._some()
        part = self.random.choice(PARTS).format(x=some["x"])
        call = self.random.choice(self.random.choice([*INPLACE_FUNCTIONS.values()])).format(
            x="part"
        )
        return self._fresh(some["x"]) + f"part = {part}\n{call}"

    def _arithmetic(self, depth: int) -> str:
        return self._from(ARITHMETIC)

    def _inplace_arithmetic(self, depth: int) -> str:
        some = self._some()
        return self._fresh(some["x"]) + self.random.choice(INPLACE_ARITHMETIC).format(**some)

    def _view(self, depth: int) -> str:
        return self._from(VIEWS)

    def _layer(self, depth: int) -> str:
        return self._from(LAYERS)

    def _part(self, depth: int) -> str:
        if not self.parts:
            return self._layer(depth)
        some = self._some()
        return f"{some['v']} = {self.random.choice(self.parts)}({some['x']})"

    def _random(self, depth: int) -> str:
        return self._from(RANDOM)

    def _state(self, depth: int) -> str:
        return self._from(STATE)

    def _python_state(self, depth: int) -> str:
        return self._from(PYTHON_STATE)

    def _function(self, depth: int) -> str:
        some = self._some()
        name = self.random.choice(("Spike", "Halved"))
        if self._chance(0.3):
            self.init.append(f"self.own = {name}.apply")
            return "{v} = {x} + self.own({y})".format(**some)
        return f"{some['v']} = {some['x']} + {name}.apply({some['y']})"

    def _branch(self, depth: int) -> Statement:
        flag = self.random.choice(SHAPE_FLAGS if self._chance(self.risky) else FLAGS)
        flag = flag.format(**self._some())
        if self._chance(0.25):
            one, other = self._activation(0), self._activation(0)
            v, _, first = one.partition(" = ")
            return f"{v} = {first} if {flag} else {other.partition(' = ')[2]}"
        other = self._body(depth) if self._chance(0.6) else None
        return Block(f"if {flag}", self._body(depth), other)

    def _data_branch(self, depth: int) -> Statement:
        some = self._some()
        return Block(f"if {some['x']}.sum() > 0", self._body(0), self._body(0))

    def _grad(self, depth: int) -> Statement:
        return Block(self.random.choice(GRAD_BLOCKS), self._body(depth))

    def _loop(self, depth: int) -> Statement:
        header = self.random.choice(
            (
                "for _ in range(2)",
                "for i, step in enumerate((0.5, 1.5))",
                "for _ in (self.fc, self.norm)",
            )
        )
        return Block(header, self._body(depth))

    def _body(self, depth: int) -> tuple[Statement, ...]:
        return tuple(self._statement(depth - 1) for _ in range(self.random.randint(1, 2)))

    def _container(self, depth: int) -> Statement:
        r, some = self.random, self._some()
        modules = [
            *MODULES.values(),
            *INPLACE_MODULES.values(),
            "nn.Linear(4, 4)",
            "nn.LayerNorm(4)",
            "nn.Identity()",
        ]
        some_of = [r.choice(modules) for _ in range(r.randint(1, 3))]
        name = f"self.box{len(self.init)}"
        kind = r.choice(("Sequential", "ModuleList", "ModuleDict"))
        self.features.add(kind)
        if kind == "Sequential":
            self.init.append(f"{name} = nn.Sequential(nn.Linear(4, 4), {', '.join(some_of)})")
            return f"{some['v']} = {name}({some['x']})"
        if kind == "ModuleList":
            self.init.append(f"{name} = nn.ModuleList([nn.Linear(4, 4), {', '.join(some_of)}])")
            return Block(f"for m in {name}", (f"{some['v']} = m({some['v']})",))
        self.init.append(f"{name} = nn.ModuleDict({{'one': {some_of[0]}, 'two': nn.Linear(4, 4)}})")
        return "{v} = {name}['one']({name}['two']({x}))".format(name=name, **some)

    def _checkpoint(self, depth: int) -> Statement:
        some = self._some()
        what = self.random.choice([*self.parts, "helper", "self.fc", "torch.relu"])
        return f"{some['v']} = checkpoint({what}, {some['x']}, use_reentrant=False)"

    def _tensor_hook(self, depth: int) -> Statement:
        return "{x} = {x} * 1.1\n{x}.requires_grad and {x}.register_hook(double)".format(
            **self._some()
        )

    def _python(self, depth: int) -> str:
        return self._from(PYTHON)

    def _argument(self, depth: int) -> str:
        return self._from(ARGUMENT)

    def _unused(self, depth: int) -> Statement:
        return "unused = " + self._activation(depth).partition(" = ")[2]


def _texts(body: tuple[Statement, ...]) -> list[str]:
    found = []
    for statement in body:
        if isinstance(statement, str):
            found.append(statement)
        else:
            found += [statement.header, *_texts(statement.body), *_texts(statement.other or ())]
    return found


def _needed(line: str, used: str, init: list[str]) -> bool:
    """Whether the forward, or another line of the constructor, uses what a line of the standard ones defines."""
    names = [part.strip(" ,=") for part in line.split("=")[0].split(",")]
    if line.startswith("self.register_buffer"):
        names = ["self." + line.split("'")[1]]
    others = "\n".join(other for other in init if other is not line)
    return any(name + end in used + "\n" + others + "\n" for name in names for end in "(.),[ \n:=*")


assert WIDTH == 4, "the templates have this width in them"
