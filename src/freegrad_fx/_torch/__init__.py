"""The only package that uses private names of PyTorch, or replaces attributes in it.

The other packages call the functions here, which are named by their purpose. If a release of PyTorch does not have a
private name, the function that needs it raises `TorchVersionError` when it is called; importing never fails. Dynamo,
Inductor, torch.export and sympy are imported inside of functions only. Nothing in this package knows rules, sites or
tables.

- `releases`: the releases that are tested, and the lookup of private names
- `replacing`: temporary replacements
- `dispatch`: which transform, mode or recording is active
- `tensors`, `modules`, `graphs`, `operators`, `tree`: the objects of PyTorch
- `functions`: autograd.Function and checkpoints
- `exporting`: torch.export
- `dynamo`: torch.compile
"""
