// The function `graphwright_cpp::top_tokens`.
#include <ATen/ops/empty.h>

#include "bindings.h"

namespace {

using namespace gw::bind;

template <class T>
std::tuple<Tensor, Tensor> top(const Tensor& logits0, int64_t k) {
  check_dtype(logits0, Scalar<T>::type, "logits");
  const Tensor logits = logits0.stride(1) == 1 ? logits0 : logits0.contiguous();
  const int64_t rows = logits.size(0), size = logits.size(1);
  const Tensor ids = at::empty({rows, k}, logits.options().dtype(at::kLong));
  const Tensor log_probs = at::empty({rows, k}, logits.options().dtype(at::kFloat));
  gw::top_tokens<T>({pointer<const T>(logits), logits.stride(0), rows, size, int(k), pointer<int64_t>(ids),
                     pointer<float>(log_probs), threads()});
  return {ids, log_probs};
}

std::tuple<Tensor, Tensor> top_tokens(const Tensor& logits, int64_t k) {
  TORCH_CHECK(logits.dim() == 2 && k > 0 && k <= gw::MAX_TOP_TOKENS && k <= logits.size(1), "graphwright_cpp: the ", k,
              " largest of logits ", logits.sizes());
  return logits.scalar_type() == at::kBFloat16 ? top<gw::bf16>(logits, k) : top<float>(logits, k);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(graphwright_cpp, m) { m.def("top_tokens(Tensor logits, int k) -> (Tensor, Tensor)"); }

TORCH_LIBRARY_IMPL(graphwright_cpp, CPU, m) { m.impl("top_tokens", top_tokens); }
