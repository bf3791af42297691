// y = x weight^T, or x weight, for many rows: the weight is put into panels (panels.h), and x multiplied
// by them. Packing reads and writes the weight once, which hundreds of rows repay.
//
// A library's product of rows whose number it has not met before is first compiled for it: oneDNN
// takes a millisecond for that and keeps half a megabyte (docs/kernels/linear.md).
#include "panels.h"
#include "parallel.h"

namespace LLAMA2RT_ISA {

void blocked_linear(const BlockedLinear& a) {
  if (a.inner == 0) {  // empty sums
    memset(a.y, 0, a.rows * a.columns * (a.dtype == DType::fp32 ? 4 : 2));
    return;
  }
  if (a.rows == 0 || a.columns == 0) return;
  PackWeight pack{};
  pack.threads = a.threads;
  pack.dtype = a.dtype;
  pack.parts[0] = {a.weight, a.columns};
  pack.transposed = a.transposed;
  pack.to = {nullptr, nullptr, (Storage)a.dtype, a.columns, a.inner};
  const int64_t lanes = round_up(a.columns, PANEL_COLUMNS) * steps_of(pack.to);
  Workspace<char> panels(lanes * lane_bytes(pack.to.storage));
  pack.to.data = panels.data;
  pack_weight(pack);

  PackedLinear product{};
  product.threads = a.threads;
  product.dtype = a.dtype;
  product.rows = a.rows;
  product.x = a.x;
  product.weight = pack.to;
  product.y = a.y;
  product.y_stride = a.columns;
  product.y_is_fp32 = a.dtype == DType::fp32;
  packed_linear(product);
}

}  // namespace LLAMA2RT_ISA
