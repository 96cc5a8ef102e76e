"""The one room for what PyTorch does not promise: its private names, and what is replaced in it for a time.

Every other part of the package calls the functions here, whose names are those of what they do. A private name that a
release of PyTorch does not have raises `TorchVersionError` when the function that needs it is called, and never at
import. Dynamo, Inductor, torch.export and sympy are imported inside of functions alone. Nothing here knows rules, sites
or tables.

- `releases`: the releases that are tested, and names that may be missing
- `replacing`: temporary replacements
- `dispatch`: which transform, mode or recording is active
- `tensors`, `modules`, `graphs`, `operators`, `tree`: the objects of PyTorch
- `functions`: autograd.Function and checkpoints
- `exporting`: torch.export
- `dynamo`: torch.compile
"""
