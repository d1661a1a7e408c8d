// The op `graphwright_cpp::prefix_attention`; see bindings.cpp.
#include <ATen/ops/empty.h>

#include "bindings.h"
#include "prefix_attention.h"

namespace {

using namespace gw::bind;

template <class T>
Tensor attend(const Tensor& q0, const Tensor& prefix_keys0, const Tensor& prefix_values0, const Tensor& keys0,
              const Tensor& values0, const Tensor& positions0, const Tensor& lengths0, const Tensor& counts0,
              const Tensor& tree0, double scale, double softcap, const OptionalTensor& sinks0) {
  // Tokens of all rows are one sequence: they must lie at one stride.
  const bool even = q0.size(0) == 1 || q0.size(2) == 1 || q0.stride(0) == q0.size(2) * q0.stride(2);
  const Tensor q = even ? unit_last(q0) : q0.transpose(1, 2).contiguous().transpose(1, 2);
  const Tensor prefix_keys = unit_last(prefix_keys0), prefix_values = unit_last(prefix_values0);
  const Tensor keys = unit_last(keys0), values = unit_last(values0), tree = tree0.contiguous();
  const Tensor positions = positions0.contiguous(), lengths = lengths0.contiguous(), counts = counts0.contiguous();
  for (const Tensor* x : {&q, &prefix_keys, &prefix_values, &keys, &values}) {
    TORCH_CHECK(x->dim() == 4, "graphwright_cpp: attention takes four dimensions, not ", x->sizes());
    check_dtype(*x, Scalar<T>::type, "an input of attention");
  }
  gw::PrefixArgs<T> prefix{};
  gw::AttentionArgs<T>& a = prefix.step;
  a.batch = q.size(0), a.heads = q.size(1), a.tokens = q.size(2), a.d = q.size(3);
  a.groups = keys.size(1), a.slots = keys.size(2), a.e = values.size(3);
  prefix.length = prefix_keys.size(2);
  check_step(lengths, counts, a.batch);
  check_dtype(positions, at::kLong, "positions");
  check_dtype(tree, at::kLong, "tree");
  TORCH_CHECK(keys.size(0) == a.batch && values.size(0) == a.batch && values.size(1) == a.groups &&
                  values.size(2) == a.slots && keys.size(3) == a.d && a.groups > 0 && a.heads % a.groups == 0,
              "graphwright_cpp: q ", q.sizes(), ", keys ", keys.sizes(), " and values ", values.sizes(), " do not fit");
  TORCH_CHECK(prefix_keys.size(0) == 1 && prefix_values.size(0) == 1 && prefix_keys.size(1) == a.groups &&
                  prefix_values.size(1) == a.groups && prefix_values.size(2) == prefix.length &&
                  prefix_keys.size(3) == a.d && prefix_values.size(3) == a.e,
              "graphwright_cpp: the prefix's keys ", prefix_keys.sizes(), " and values ", prefix_values.sizes(),
              " do not fit keys ", keys.sizes(), " and values ", values.sizes());
  TORCH_CHECK(positions.numel() == a.batch * a.tokens, "graphwright_cpp: positions ", positions.sizes(), " for q ", q.sizes());
  TORCH_CHECK(tree.numel() == 0 || tree.numel() == a.batch * a.tokens, "graphwright_cpp: tree ", tree.sizes(), " for q ", q.sizes());
  Tensor out = at::empty({a.batch, a.tokens, a.heads, a.e}, q.options());
  if (out.numel() == 0) return out;
  Tensor sinks;
  if (sinks0 && sinks0->defined()) {
    sinks = sinks0->to(at::kFloat).contiguous();
    TORCH_CHECK(sinks.numel() == a.heads, "graphwright_cpp: sinks ", sinks.sizes(), " for ", a.heads, " heads");
    a.sinks = pointer<const float>(sinks);
  }
  a.q = pointer<const T>(q), a.q_batch = q.stride(0), a.q_head = q.stride(1), a.q_token = q.stride(2);
  a.keys = pointer<const T>(keys), a.k_batch = keys.stride(0), a.k_group = keys.stride(1), a.k_slot = keys.stride(2);
  a.values = pointer<const T>(values), a.v_batch = values.stride(0), a.v_group = values.stride(1), a.v_slot = values.stride(2);
  prefix.keys = pointer<const T>(prefix_keys), prefix.k_group = prefix_keys.stride(1), prefix.k_slot = prefix_keys.stride(2);
  prefix.values = pointer<const T>(prefix_values);
  prefix.v_group = prefix_values.stride(1), prefix.v_slot = prefix_values.stride(2);
  a.positions = pointer<const int64_t>(positions);
  a.lengths = pointer<const int64_t>(lengths), a.counts = pointer<const int64_t>(counts);
  a.tree = tree.numel() ? pointer<const int64_t>(tree) : nullptr;
  a.out = pointer<T>(out);
  a.scale = float(scale), a.softcap = float(softcap), a.threads = threads();
  gw::prefix_attention<T>(prefix);
  return out;
}

Tensor prefix_attention(const Tensor& q, const Tensor& prefix_keys, const Tensor& prefix_values, const Tensor& keys,
                        const Tensor& values, const Tensor& positions, const Tensor& lengths, const Tensor& counts,
                        const Tensor& tree, double scale, double softcap, const OptionalTensor& sinks) {
  if (q.scalar_type() == at::kBFloat16)
    return attend<gw::bf16>(q, prefix_keys, prefix_values, keys, values, positions, lengths, counts, tree, scale,
                            softcap, sinks);
  return attend<float>(q, prefix_keys, prefix_values, keys, values, positions, lengths, counts, tree, scale, softcap,
                       sinks);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(graphwright_cpp, m) {
  m.def("prefix_attention(Tensor q, Tensor prefix_keys, Tensor prefix_values, Tensor keys, Tensor values, "
        "Tensor positions, Tensor lengths, Tensor counts, Tensor tree, float scale, float softcap=0.0, "
        "Tensor? sinks=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(graphwright_cpp, CPU, m) { m.impl("prefix_attention", prefix_attention); }
