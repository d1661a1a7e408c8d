// Linear layers for a few rows: every weight is read from memory once, whatever the number of rows.
//
// One output is one accumulator vector, fed in order of k and reduced in a fixed order. Blocking only
// decides which outputs are computed together, so that a row has the same bits alone and among others.
#include <algorithm>

#include "dot.h"
#include "kernels.h"

namespace gw {
namespace {

constexpr int64_t UNIT = 16;  // weight rows of one task: they stay in the first cache for all rows of x

// Weight rows [first, last) for all rows of x; meanwhile the rows after them are asked for.
template <class T>
struct Task {
  const LinearWeight<T>& lw;
  const T* x;
  int64_t m, k, first, last;
  Ahead ahead;
  Task(const LinearWeight<T>& lw, const T* x, int64_t m, int64_t k, int64_t first)
      : lw(lw), x(x), m(m), k(k), first(first), last(std::min(first + UNIT, lw.n)) {
    if (lw.row_stride != k) return;
    ahead.at = reinterpret_cast<const char*>(lw.weight + last * k);
    ahead.end = reinterpret_cast<const char*>(lw.weight + std::min(last + UNIT, lw.n) * k);
    // UNIT rows of weights have UNIT lines for each step of a dot product, to be spread over the m rows of x.
    ahead.bytes = (UNIT + m - 1) / m * 64;
  }
};

// MB rows of x with NB weight rows.
template <class T, int NB, int MB>
void block_out(Task<T>& task, int64_t row, int64_t m0) {
  const LinearWeight<T>& lw = task.lw;
  const T* inputs[MB];
  for (int m = 0; m < MB; ++m) inputs[m] = task.x + (m0 + m) * task.k;
  alignas(64) float bias[LANES] = {};
  for (int n = 0; lw.bias && n < NB; ++n)
    for (int m = 0; m < MB; ++m) bias[m * NB + n] = to_float(lw.bias[row + n]);
  alignas(64) T rounded[LANES];
  store(rounded, add(dot_block<T, NB, MB>(lw.weight + row * lw.row_stride, lw.row_stride, inputs, task.k, task.ahead),
                     load(bias)));
  for (int m = 0; m < MB; ++m) std::memcpy(lw.out + (m0 + m) * lw.n + row, rounded + m * NB, NB * sizeof(T));
}

// MB rows of x with all weight rows of a task: as many at once as there are accumulators for.
template <class T, int MB>
void input_rows(Task<T>& task, int64_t m0) {
  constexpr int NB = MB == 3 ? 4 : LANES / MB;  // a divisor of UNIT
  int64_t row = task.first;
  for (; row + NB <= task.last; row += NB) block_out<T, NB, MB>(task, row, m0);
  for (; row < task.last; ++row) block_out<T, 1, MB>(task, row, m0);
}

template <class T>
void run(Task<T>& task) {
  int64_t at = 0;
  for (; at + 4 <= task.m; at += 4) input_rows<T, 4>(task, at);
  switch (task.m - at) {
    case 3: return input_rows<T, 3>(task, at);
    case 2: return input_rows<T, 2>(task, at);
    case 1: return input_rows<T, 1>(task, at);
  }
}

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
    Task<T> task(weights[i], x, m, k, local * UNIT);
    run(task);
  }
}

template void linear_rows<float>(const float*, int64_t, int64_t, const LinearWeight<float>*, int64_t, int);
template void linear_rows<bf16>(const bf16*, int64_t, int64_t, const LinearWeight<bf16>*, int64_t, int);

}  // namespace gw
