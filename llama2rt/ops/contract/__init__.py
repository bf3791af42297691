"""The seven ops: arguments and errors, schema, fake implementation, autograd.

Each op is registered (`registration`) under `torch.ops.llama2rt`. Schemas always return the same
tuple, take the backend's name as last argument and save it for backward. The public wrappers check
shapes and dtypes on the host (`checks`), without touching data; ids and offsets are checked where
the data is at hand (reference and CPU).
"""
