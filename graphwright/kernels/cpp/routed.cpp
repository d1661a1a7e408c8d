// Linear layers whose weight is chosen by row (experts, heads): rows come grouped by expert, so that the
// weight of an expert is read once for all of its rows.
//
// As in linear.cpp, blocking only decides which outputs are computed together: every output is the same
// sequence of operations whatever the other rows, the groups and the threads are.
#include "dot.h"
#include "kernels.h"

namespace gw {
namespace {

constexpr int64_t DOT_UNIT = 16;   // outputs of one task: their weights stay in the first cache
constexpr int64_t SUM_UNIT = 256;  // the same where memory is contiguous along the outputs

// What one task works on: some of an expert's outputs for all rows of its group.
template <class T, class X>
struct Task {
  const T* weight;
  const T* bias;  // or null
  const X* const* inputs;
  const int64_t* rows;
  int64_t count, first, last;  // rows of the group; outputs [first, last)
};

template <class T, class X>
Task<T, X> task_at(const RoutedArgs<T>& a, const X* const* inputs, int64_t at, int64_t unit) {
  const int64_t blocks = (a.n + unit - 1) / unit, group = at / blocks, first = at % blocks * unit;
  const int64_t begin = a.start[group], last = first + unit < a.n ? first + unit : a.n;
  return {a.weight + a.expert[group] * a.w_expert,
          a.bias ? a.bias + a.expert[group] * a.b_expert : nullptr,
          inputs + begin, a.rows + begin, a.start[group + 1] - begin, first, last};
}

template <class T>
int threads_for(const RoutedArgs<T>& a) {
  return a.start[a.groups] * a.n * a.k < 16384 ? 1 : a.threads;  // else not worth waking the others
}

template <class T, int NB, int MB>
void dots_out(const RoutedArgs<T>& a, const Task<T, T>& task, int64_t n0, int64_t m0) {
  const T* inputs[MB];
  for (int m = 0; m < MB; ++m) inputs[m] = task.inputs[m0 + m];
  alignas(64) float sums[LANES];
  Ahead nothing;
  store(sums, dot_block<T, NB, MB>(task.weight + n0 * a.w_row, a.w_row, inputs, a.k, nothing));
  for (int m = 0; m < MB; ++m)
    for (int n = 0; n < NB; ++n) {
      float y = sums[m * NB + n] + (task.bias ? to_float(task.bias[n0 + n]) : 0.0f);
      a.out[task.rows[m0 + m] * a.n + n0 + n] = from_float<T>(y);
    }
}

// MB rows with all outputs of a task.
template <class T, int MB>
void dots(const RoutedArgs<T>& a, const Task<T, T>& task, int64_t m0) {
  constexpr int NB = LANES / MB;
  int64_t n = task.first;
  for (; n + NB <= task.last; n += NB) dots_out<T, NB, MB>(a, task, n, m0);
  for (; n < task.last; ++n) dots_out<T, 1, MB>(a, task, n, m0);
}

// MB rows times NV vectors of outputs from n0 on, the last of them `width` lanes of outputs.
template <class T, int NV, int MB>
void sums_out(const RoutedArgs<T>& a, const Task<T, float>& task, int64_t n0, int64_t m0, int width) {
  Vec acc[MB][NV];
  const float* x[MB];
  for (int m = 0; m < MB; ++m) {
    x[m] = task.inputs[m0 + m];
    for (int v = 0; v < NV; ++v) acc[m][v] = splat(0.0f);
  }
  const T* w = task.weight + n0;
  for (int64_t k = 0; k < a.k; ++k, w += a.w_row) {
    Vec wr[NV];
    for (int v = 0; v + 1 < NV; ++v) wr[v] = load(w + v * LANES);
    wr[NV - 1] = load_up_to(w + (NV - 1) * LANES, width);
    for (int m = 0; m < MB; ++m) {
      const Vec xr = splat(x[m][k]);
      for (int v = 0; v < NV; ++v) acc[m][v] = fma(wr[v], xr, acc[m][v]);
    }
  }
  for (int m = 0; m < MB; ++m)
    for (int v = 0; v < NV; ++v) {
      const int lanes = v + 1 < NV ? LANES : width;
      const int64_t n = n0 + v * LANES;
      if (task.bias) acc[m][v] = add(acc[m][v], load_up_to(task.bias + n, lanes));
      store_up_to(a.out + task.rows[m0 + m] * a.n + n, acc[m][v], lanes);
    }
}

// All rows of a task for NV vectors of outputs; few rows take many vectors, for long reads of the weight.
template <class T, int NV>
void sums(const RoutedArgs<T>& a, const Task<T, float>& task, int64_t n0, int width = LANES) {
  int64_t m = 0;
  if constexpr (NV <= 4)
    for (; m + 4 <= task.count; m += 4) sums_out<T, NV, 4>(a, task, n0, m, width);
  if constexpr (NV <= 8)
    for (; m + 2 <= task.count; m += 2) sums_out<T, NV, 2>(a, task, n0, m, width);
  for (; m < task.count; ++m) sums_out<T, NV, 1>(a, task, n0, m, width);
}

}  // namespace

template <class T>
void routed_dots(const RoutedArgs<T>& a, const T* const* inputs) {
  const int64_t tasks = a.groups * ((a.n + DOT_UNIT - 1) / DOT_UNIT);
  const int threads = threads_for(a);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < tasks; ++i) {
    const auto task = task_at(a, inputs, i, DOT_UNIT);
    int64_t m = 0;
    for (; m + 4 <= task.count; m += 4) dots<T, 4>(a, task, m);
    for (; m + 2 <= task.count; m += 2) dots<T, 2>(a, task, m);
    if (m < task.count) dots<T, 1>(a, task, m);
  }
}

template <class T>
void routed_sums(const RoutedArgs<T>& a, const float* const* inputs) {
  const int64_t tasks = a.groups * ((a.n + SUM_UNIT - 1) / SUM_UNIT);
  const int threads = threads_for(a);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < tasks; ++i) {
    const auto task = task_at(a, inputs, i, SUM_UNIT);
    int64_t n = task.first;
    if (task.count == 1)
      for (; n + 16 * LANES <= task.last; n += 16 * LANES) sums<T, 16>(a, task, n);
    if (task.count < 4)
      for (; n + 8 * LANES <= task.last; n += 8 * LANES) sums<T, 8>(a, task, n);
    for (; n + 4 * LANES <= task.last; n += 4 * LANES) sums<T, 4>(a, task, n);
    for (; n < task.last; n += LANES) sums<T, 1>(a, task, n, int(task.last - n < LANES ? task.last - n : LANES));
  }
}

template void routed_dots<float>(const RoutedArgs<float>&, const float* const*);
template void routed_dots<bf16>(const RoutedArgs<bf16>&, const bf16* const*);
template void routed_sums<float>(const RoutedArgs<float>&, const float* const*);
template void routed_sums<bf16>(const RoutedArgs<bf16>&, const float* const*);

}  // namespace gw
