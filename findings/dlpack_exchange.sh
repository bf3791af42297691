#!/usr/bin/env bash
# What does torch's DLPack C exchange (torch 2.10, DLPack 1.3) hand to a native extension, beside what
# `__dlpack__` hands over?
#
# Guessed before running: that the C table refuses what `__dlpack__` refuses, that both refuse a
# tensor whose negative bit is set, and that both refuse a fake tensor and a wrapper subclass. Found:
# none of the three. The C table gives a tensor that requires grad, and one whose conjugate bit is
# set, as the memory below, without a word of the bit; the negative bit is passed over by both, so
# that numpy reads `z.conj().imag` with the wrong sign; and fake tensors and wrapper subclasses (as
# DTensor is one) come as CPU tensors at address 0, with success. Only meta and sparse tensors are
# refused. An extension that takes this fast path has to look at address, bits and type itself.
#
# Installs torch 2.13.0 and numpy 2.4.6 in a folder that is removed afterwards; reads no memory that
# is not the tensors'; exits 1 if any answer differs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/exchange.py" <<'PYTHON'
import ctypes
import sys
import warnings

import numpy
import torch
from torch._subclasses import FakeTensorMode


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("rank", ctypes.c_int32),
        ("dtype", DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    ]


READ = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))


class ExchangeApi(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint32 * 2),
        ("others", ctypes.c_void_p * 4),
        ("read", READ),
        ("stream", ctypes.c_void_p),
    ]


ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
ctypes.pythonapi.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
capsule = torch.Tensor.__dlpack_c_exchange_api__
api = ExchangeApi.from_address(
    ctypes.pythonapi.PyCapsule_GetPointer(capsule, b"dlpack_exchange_api")
)


class Wrapper(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def by_exchange(tensor):
    found = DLTensor()
    try:
        if api.read(tensor, ctypes.byref(found)) != 0:
            return "refused"
    except Exception as error:
        return f"refused ({type(error).__name__})"
    return "at its memory" if found.data else "at address 0"


def by_capsule(tensor):
    try:
        tensor.__dlpack__()
    except Exception as error:
        return f"refused ({type(error).__name__})"
    return "given"


warnings.simplefilter("ignore")
x = torch.ones(2, 3)
with FakeTensorMode() as mode:
    fake = mode.from_tensor(x)
cases = {
    "plain": x,
    "requires grad": torch.ones(2, 3, requires_grad=True),
    "conjugate bit": torch.ones(2, 3, dtype=torch.complex64).conj(),
    "negative bit": torch.ones(2, 3, dtype=torch.complex64).conj().imag,
    "meta": torch.ones(2, 3, device="meta"),
    "sparse": x.to_sparse(),
    "fake": fake,
    "wrapper subclass": torch.Tensor._make_wrapper_subclass(Wrapper, x.shape, dtype=x.dtype),
}
EXPECTED = {
    "plain": ("given", "at its memory"),
    "requires grad": ("refused (BufferError)", "at its memory"),
    "conjugate bit": ("refused (BufferError)", "at its memory"),
    "negative bit": ("given", "at its memory"),
    "meta": ("refused (BufferError)", "refused (RuntimeError)"),
    "sparse": ("refused (BufferError)", "refused (RuntimeError)"),
    "fake": ("given", "at address 0"),
    "wrapper subclass": ("given", "at address 0"),
}
found = {name: (by_capsule(tensor), by_exchange(tensor)) for name, tensor in cases.items()}
for name, answers in found.items():
    print(f"{name:18}__dlpack__ {answers[0]:24}exchange {answers[1]}")
imaginary = torch.tensor([1 + 2j]).conj().imag
read = numpy.from_dlpack(imaginary).item()
print(f"z.conj().imag: torch {imaginary.item():g}, numpy.from_dlpack {read:g}")
print("torch", torch.__version__, "DLPack", list(api.version))
sys.exit(0 if found == EXPECTED and (imaginary.item(), read) == (-2.0, 2.0) else "it has changed")
PYTHON
"$folder/venv/bin/python" "$folder/exchange.py"
