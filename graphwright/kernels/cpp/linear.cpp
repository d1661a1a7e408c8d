// Linear layers for a few rows: every weight is read once, whatever the number of rows.
//
// One output is one accumulator vector, fed in order of k and reduced in a fixed order. Blocking only
// decides which outputs are computed together, so that a row has the same bits alone and among others.
#include "dot.h"
#include "kernels.h"

namespace gw {
namespace {

template <class T, int NB, int MB>
void block_out(const LinearWeight<T>& lw, int64_t row, const T* x, int64_t m0, int64_t k) {
  float sums[NB][MB];
  const T* inputs[MB];
  for (int m = 0; m < MB; ++m) inputs[m] = x + (m0 + m) * k;
  dot_block<T, NB, MB>(lw.weight + row * lw.row_stride, lw.row_stride, inputs, k, sums);
  for (int m = 0; m < MB; ++m)
    for (int n = 0; n < NB; ++n) {
      float y = sums[n][m] + (lw.bias ? to_float(lw.bias[row + n]) : 0.0f);
      lw.out[(m0 + m) * lw.n + row + n] = from_float<T>(y);
    }
}

template <class T, int NB>
void weight_rows(const LinearWeight<T>& lw, int64_t row, const T* x, int64_t m, int64_t k) {
  int64_t at = 0;
  for (; at + 4 <= m; at += 4) block_out<T, NB, 4>(lw, row, x, at, k);
  if (at + 2 <= m) {
    block_out<T, NB, 2>(lw, row, x, at, k);
    at += 2;
  }
  if (at < m) block_out<T, NB, 1>(lw, row, x, at, k);
}

constexpr int64_t UNIT = 16;  // weight rows of one task

}  // namespace

template <class T>
void linear_rows(const T* x, int64_t m, int64_t k, const LinearWeight<T>* weights, int64_t count, int threads) {
  int64_t units = 0;
  for (int64_t i = 0; i < count; ++i) units += (weights[i].n + UNIT - 1) / UNIT;
  if (units * UNIT * k < 16384) threads = 1;  // not worth waking the others
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t unit = 0; unit < units; ++unit) {
    int64_t i = 0, local = unit;
    for (; local >= (weights[i].n + UNIT - 1) / UNIT; ++i) local -= (weights[i].n + UNIT - 1) / UNIT;
    const LinearWeight<T>& lw = weights[i];
    int64_t row = local * UNIT, end = row + UNIT < lw.n ? row + UNIT : lw.n;
    for (; row + 4 <= end; row += 4) weight_rows<T, 4>(lw, row, x, m, k);
    for (; row < end; ++row) weight_rows<T, 1>(lw, row, x, m, k);
  }
}

template void linear_rows<float>(const float*, int64_t, int64_t, const LinearWeight<float>*, int64_t, int);
template void linear_rows<bf16>(const bf16*, int64_t, int64_t, const LinearWeight<bf16>*, int64_t, int);

}  // namespace gw
