// The module `_emulated`: the functions of `_cuda` on the emulator, and the settings of the tests.
// It is built by tests/emulator alone and is in no wheel.
#include <pybind11/stl.h>

#include "../bindings/cuda_kernels.h"
#include "emulator.h"

namespace py = pybind11;
using namespace llama2rt;

PYBIND11_MODULE(_emulated, m) {
  m.doc() = "The kernels of llama2rt._cuda, run on this CPU thread by thread; for tests.";
  bind_kernels(m);
  m.attr("MULTIPROCESSORS") = emulator::MULTIPROCESSORS;
  m.def("set_seed", &emulator::set_seed,
        "Draws the order of threads and blocks from this seed, from the next launch on.");
  m.def("set_os_threads", &emulator::set_os_threads, "How many thread blocks run at once.");
  m.def("sync_points", &emulator::sync_points,
        "Barriers and waits that kernels came by since the last set_seed: ['file.cu:line'].");
  m.def("leave_out", &emulator::leave_out,
        "Leaves the barrier or wait at 'file.cu:line' out from now on; '' for none.");
  m.def("set_buffers", &emulator::set_buffers,
        "The memory that kernels may touch from now on: [(address, bytes)].");
}
