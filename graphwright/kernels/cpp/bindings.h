// What the files that define torch ops share: tensors to pointers, and checks.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "kernels.h"
#include "token_order.h"

namespace gw::bind {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

template <class T>
struct Scalar;
template <>
struct Scalar<float> { static constexpr at::ScalarType type = at::kFloat; };
template <>
struct Scalar<gw::bf16> { static constexpr at::ScalarType type = at::kBFloat16; };

template <class T>
T* pointer(const Tensor& x) { return static_cast<T*>(x.data_ptr()); }

inline void check_dtype(const Tensor& x, at::ScalarType type, const char* name) {
  TORCH_CHECK(x.scalar_type() == type, "graphwright_cpp: ", name, " is ", x.scalar_type(), ", expected ", type);
  TORCH_CHECK(x.device().is_cpu(), "graphwright_cpp: ", name, " is on ", x.device(), ", expected the CPU");
}

inline void check_step(const Tensor& lengths, const Tensor& counts, int64_t batch) {
  check_dtype(lengths, at::kLong, "lengths");
  check_dtype(counts, at::kLong, "counts");
  TORCH_CHECK(lengths.numel() == batch && counts.numel() == batch, "graphwright_cpp: lengths ", lengths.sizes(),
              " and counts ", counts.sizes(), " for a batch of ", batch);
}

// The lists of pages of a step; its tensors are held by them.
struct Lists {
  Tensor pages, chosen;
  gw::PageLists args;
};
struct StepShape {
  int64_t batch, tokens, groups, slots, window;
  const int64_t *lengths, *counts;
};
std::optional<Lists> read_lists(const OptionalTensor& pages, const OptionalTensor& chosen, int64_t page, int64_t first,
                                const StepShape& step);

inline Tensor unit_last(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous(); }

}  // namespace gw::bind
