// The ops of the namespace `graphwright_cpp`: checks, tensors to pointers, results.
// Schemas are those of the semantic ops (graphwright/ir/ops.py); shape functions are registered from Python.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include <vector>

#include "amx.h"
#include "bindings.h"
#include "sparse_attention.h"

namespace {

using namespace gw::bind;

template <class T>
std::vector<Tensor> linears(const Tensor& x, at::TensorList weights, const std::vector<OptionalTensor>& biases) {
  const int64_t k = x.size(-1), rows = x.numel() / std::max<int64_t>(k, 1);
  // Many rows are the library's business, but for machines with tiles: our tile kernel takes any number of rows
  // (and oneDNN's crashes in virtual machines that hide CPUID leaf 0x1d from it).
  const bool tiles = std::is_same_v<T, gw::bf16> && gw::amx_available();
  bool own = rows > 0 && (rows <= gw::MAX_LINEAR_ROWS || tiles);
  for (const Tensor& w : weights) own &= w.stride(1) == 1 || k == 1;
  std::vector<Tensor> outputs;
  outputs.reserve(weights.size());
  if (!own) {
    for (size_t i = 0; i < weights.size(); ++i) outputs.push_back(at::linear(x, weights[i], biases[i]).contiguous());
    return outputs;
  }
  const Tensor input = x.contiguous();
  std::vector<Tensor> held;  // bias tensors made contiguous, alive until the kernel has run
  std::vector<gw::LinearWeight<T>> group;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    check_dtype(w, Scalar<T>::type, "weight");
    TORCH_CHECK(w.dim() == 2 && w.size(1) == k, "graphwright_cpp: weight ", w.sizes(), " does not take ", x.sizes());
    const T* bias = nullptr;
    if (biases[i] && biases[i]->defined()) {
      check_dtype(*biases[i], Scalar<T>::type, "bias");
      TORCH_CHECK(biases[i]->numel() == w.size(0), "graphwright_cpp: bias ", biases[i]->sizes(), " for ", w.sizes());
      held.push_back(biases[i]->contiguous());
      bias = pointer<const T>(held.back());
    }
    at::DimVector shape(x.sizes().begin(), x.sizes().end());
    shape.back() = w.size(0);
    outputs.push_back(at::empty(shape, x.options()));
    group.push_back({pointer<const T>(w), w.stride(0), w.size(0), bias, pointer<T>(outputs.back())});
  }
  const auto count = int64_t(group.size());
  if constexpr (std::is_same_v<T, gw::bf16>) {
    if (gw::linear_rows_amx(pointer<const T>(input), rows, k, group.data(), count, threads())) return outputs;
  }
  gw::linear_rows<T>(pointer<const T>(input), rows, k, group.data(), count, threads());
  return outputs;
}

std::vector<Tensor> dispatch_linears(const Tensor& x, at::TensorList weights, const std::vector<OptionalTensor>& biases) {
  if (x.scalar_type() == at::kBFloat16) return linears<gw::bf16>(x, weights, biases);
  check_dtype(x, at::kFloat, "x");
  return linears<float>(x, weights, biases);
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return dispatch_linears(x, weight, {bias})[0];
}

std::vector<Tensor> linear_group(const Tensor& x, at::TensorList weights, const c10::List<OptionalTensor>& biases) {
  TORCH_CHECK(weights.size() == biases.size(), "graphwright_cpp: ", weights.size(), " weights, ", biases.size(), " biases");
  std::vector<OptionalTensor> list;
  for (size_t i = 0; i < biases.size(); ++i) list.push_back(biases.get(i));
  return dispatch_linears(x, weights, list);
}

// The assignments of `index` in order of their expert; those of one expert in order of their row.
struct Groups {
  std::vector<int64_t> expert, start, rows;
};

Groups group_by_expert(const Tensor& index, int64_t experts) {
  const int64_t tokens = index.size(0), choices = index.size(1);
  const auto* number = pointer<const int64_t>(index);
  std::vector<int64_t> chosen(tokens * choices), next(experts + 1, 0);
  for (int64_t row = 0; row < tokens * choices; ++row) {
    const int64_t e = number[row / choices * index.stride(0) + row % choices * index.stride(1)];
    TORCH_CHECK(e >= 0 && e < experts, "graphwright_cpp: row ", row / choices, " chose expert ", e, " of ", experts);
    chosen[row] = e;
    ++next[e + 1];
  }
  Groups g{{}, {0}, std::vector<int64_t>(chosen.size())};
  for (int64_t e = 0; e < experts; ++e) {
    if (next[e + 1]) g.expert.push_back(e), g.start.push_back(g.start.back() + next[e + 1]);
    next[e + 1] += next[e];
  }
  for (size_t row = 0; row < chosen.size(); ++row) g.rows[next[chosen[row]]++] = int64_t(row);
  return g;
}

// Where the inputs of `rows` begin in x [tokens, 1 or choices, k].
template <class T>
std::vector<const T*> input_rows(const Tensor& x, const std::vector<int64_t>& rows, int64_t choices) {
  const int64_t by_choice = x.size(1) == 1 ? 0 : x.stride(1);
  std::vector<const T*> inputs;
  inputs.reserve(rows.size());
  for (int64_t row : rows) inputs.push_back(pointer<const T>(x) + row / choices * x.stride(0) + row % choices * by_choice);
  return inputs;
}

void check_routed(const Tensor& x, const Tensor& index, const Tensor& weight, const OptionalTensor& bias, bool transposed) {
  check_dtype(index, at::kLong, "index");
  check_dtype(weight, x.scalar_type(), "weight");
  TORCH_CHECK(x.dim() == 3 && index.dim() == 2 && weight.dim() == 3 && x.size(0) == index.size(0) &&
                  (x.size(1) == 1 || x.size(1) == index.size(1)) && weight.size(transposed ? 1 : 2) == x.size(2),
              "graphwright_cpp: experts ", weight.sizes(), " do not take ", x.sizes(), " routed by ", index.sizes());
  TORCH_CHECK(weight.stride(2) == 1 || weight.size(2) == 1, "graphwright_cpp: an expert's weight is not row-major");
  if (!bias || !bias->defined()) return;
  check_dtype(*bias, x.scalar_type(), "bias");
  TORCH_CHECK(bias->dim() == 2 && bias->size(0) == weight.size(0) && bias->size(1) == weight.size(transposed ? 2 : 1),
              "graphwright_cpp: bias ", bias->sizes(), " for experts ", weight.sizes());
}

template <class T>
Tensor route(const Tensor& x, const Tensor& index, const Tensor& weight, const OptionalTensor& bias, bool transposed) {
  check_routed(x, index, weight, bias, transposed);
  const int64_t choices = index.size(1);
  gw::RoutedArgs<T> a{};
  a.n = weight.size(transposed ? 2 : 1), a.k = x.size(2);
  Tensor out = at::empty({index.size(0), choices, a.n}, x.options());
  const Groups groups = group_by_expert(index, weight.size(0));
  a.groups = int64_t(groups.expert.size());
  a.expert = groups.expert.data(), a.start = groups.start.data(), a.rows = groups.rows.data();
  a.weight = pointer<const T>(weight), a.w_expert = weight.stride(0), a.w_row = weight.stride(1);
  Tensor held;
  if (bias && bias->defined()) {
    held = bias->stride(1) == 1 ? *bias : bias->contiguous();
    a.bias = pointer<const T>(held), a.b_expert = held.stride(0);
  }
  a.out = pointer<T>(out), a.threads = threads();
  // A compiled caller may lay x out otherwise than when the kernel was chosen.
  const Tensor rows = x.stride(2) == 1 || a.k == 1 ? x : x.contiguous();
  if (transposed) {
    const Tensor wide = rows.to(at::kFloat);
    gw::routed_sums<T>(a, input_rows<float>(wide, groups.rows, choices).data());
  } else {
    gw::routed_dots<T>(a, input_rows<T>(rows, groups.rows, choices).data());
  }
  return out;
}

Tensor routed_linear(const Tensor& x, const Tensor& index, const Tensor& weight, const OptionalTensor& bias,
                     bool transposed) {
  if (x.scalar_type() == at::kBFloat16) return route<gw::bf16>(x, index, weight, bias, transposed);
  check_dtype(x, at::kFloat, "x");
  return route<float>(x, index, weight, bias, transposed);
}

void append(const Tensor& store, const Tensor& fresh, const int64_t* lengths, const int64_t* counts) {
  TORCH_CHECK(store.dim() == 4 && fresh.dim() == 4 && store.size(0) == fresh.size(0) && store.size(1) == fresh.size(1) &&
                  store.size(3) == fresh.size(3) && (store.stride(3) == 1 || store.size(3) == 1),
              "graphwright_cpp: cannot append ", fresh.sizes(), " to a cache ", store.sizes());
  check_dtype(fresh, store.scalar_type(), "the appended tensor");
  const auto size = int64_t(store.element_size());
  gw::AppendArgs a{};
  a.store = static_cast<char*>(store.data_ptr());
  a.s_batch = store.stride(0) * size, a.s_group = store.stride(1) * size, a.s_slot = store.stride(2) * size;
  a.fresh = static_cast<const char*>(fresh.data_ptr());
  a.f_batch = fresh.stride(0) * size, a.f_group = fresh.stride(1) * size;
  a.f_token = fresh.stride(2) * size, a.f_dim = fresh.stride(3) * size;
  a.lengths = lengths, a.counts = counts;
  a.batch = store.size(0), a.groups = store.size(1), a.slots = store.size(2), a.d = store.size(3);
  a.tokens = fresh.size(2), a.element = size;
  for (int64_t b = 0; b < a.batch; ++b)
    TORCH_CHECK(counts[b] >= 0 && counts[b] <= a.tokens && counts[b] <= a.slots && lengths[b] >= 0,
                "graphwright_cpp: row ", b, " appends ", counts[b], " of ", a.tokens, " tokens to ", a.slots,
                " slots after ", lengths[b]);
  gw::cache_append(a);
}

void cache_append(const Tensor& store, const Tensor& fresh, const Tensor& lengths, const Tensor& counts) {
  check_step(lengths, counts, store.size(0));
  append(store, fresh, pointer<const int64_t>(lengths.contiguous()), pointer<const int64_t>(counts.contiguous()));
}

struct ListArgs {
  const OptionalTensor &pages, &chosen;
  int64_t page, first;
};

template <class T>
Tensor attend(const Tensor& q0, const Tensor& keys0, const Tensor& values0, const Tensor& positions0,
              const Tensor& lengths0, const Tensor& counts0, const Tensor& tree0, double scale, int64_t window,
              double softcap, const OptionalTensor& sinks0, const ListArgs& listed) {
  const Tensor q = unit_last(q0), keys = unit_last(keys0), values = unit_last(values0);
  const Tensor positions = positions0.contiguous(), lengths = lengths0.contiguous(), counts = counts0.contiguous();
  const Tensor tree = tree0.contiguous();
  for (const Tensor* x : {&q, &keys, &values}) {
    check_dtype(*x, Scalar<T>::type, "an input of attention");
    TORCH_CHECK(x->dim() == 4, "graphwright_cpp: attention takes four dimensions, not ", x->sizes());
  }
  gw::AttentionArgs<T> a{};
  a.batch = q.size(0), a.heads = q.size(1), a.tokens = q.size(2), a.d = q.size(3);
  a.groups = keys.size(1), a.slots = keys.size(2), a.e = values.size(3);
  check_step(lengths, counts, a.batch);
  check_dtype(positions, at::kLong, "positions");
  check_dtype(tree, at::kLong, "tree");
  TORCH_CHECK(keys.size(0) == a.batch && values.size(0) == a.batch && values.size(1) == a.groups &&
                  values.size(2) == a.slots && keys.size(3) == a.d && a.groups > 0 && a.heads % a.groups == 0,
              "graphwright_cpp: q ", q.sizes(), ", keys ", keys.sizes(), " and values ", values.sizes(), " do not fit");
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
  a.positions = pointer<const int64_t>(positions);
  a.lengths = pointer<const int64_t>(lengths), a.counts = pointer<const int64_t>(counts);
  a.tree = tree.numel() ? pointer<const int64_t>(tree) : nullptr;
  a.out = pointer<T>(out);
  a.scale = float(scale), a.softcap = float(softcap), a.window = window, a.threads = threads();
  const auto lists = read_lists(listed.pages, listed.chosen, listed.page, listed.first,
                                {a.batch, a.tokens, a.groups, a.slots, a.window, a.lengths, a.counts});
  if (lists) gw::listed_attention<T>(a, lists->args);
  else gw::cache_attention<T>(a);
  return out;
}

Tensor cache_attention(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& positions,
                       const Tensor& lengths, const Tensor& counts, const Tensor& tree, double scale, int64_t window,
                       double softcap, const OptionalTensor& sinks, const OptionalTensor& pages,
                       const OptionalTensor& chosen, int64_t page, int64_t first) {
  const ListArgs lists{pages, chosen, page, first};
  if (q.scalar_type() == at::kBFloat16)
    return attend<gw::bf16>(q, keys, values, positions, lengths, counts, tree, scale, window, softcap, sinks, lists);
  return attend<float>(q, keys, values, positions, lengths, counts, tree, scale, window, softcap, sinks, lists);
}

Tensor append_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values,
                        const Tensor& positions, const Tensor& lengths, const Tensor& counts, const Tensor& tree,
                        double scale, int64_t window, double softcap, const OptionalTensor& sinks) {
  cache_append(keys, k, lengths, counts);
  cache_append(values, v, lengths, counts);
  return cache_attention(q, keys, values, positions, lengths, counts, tree, scale, window, softcap, sinks, {}, {}, 0, 0);
}

bool uses_amx() { return gw::amx_available(); }

}  // namespace

TORCH_LIBRARY(graphwright_cpp, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("linear_group(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]");
  m.def("routed_linear(Tensor x, Tensor index, Tensor weight, Tensor? bias=None, bool transposed=False) -> Tensor");
  m.def("cache_append(Tensor(a!) store, Tensor new, Tensor lengths, Tensor counts) -> ()");
  m.def("cache_attention(Tensor q, Tensor keys, Tensor values, Tensor positions, Tensor lengths, Tensor counts, "
        "Tensor tree, float scale, int window=0, float softcap=0.0, Tensor? sinks=None, Tensor? pages=None, "
        "Tensor? chosen=None, int page=0, int first=0) -> Tensor");
  m.def("append_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor positions, "
        "Tensor lengths, Tensor counts, Tensor tree, float scale, int window=0, float softcap=0.0, "
        "Tensor? sinks=None) -> Tensor");
  m.def("uses_amx() -> bool");
}

TORCH_LIBRARY_IMPL(graphwright_cpp, CPU, m) {
  m.impl("linear", linear);
  m.impl("linear_group", linear_group);
  m.impl("routed_linear", routed_linear);
  m.impl("cache_append", cache_append);
  m.impl("cache_attention", cache_attention);
  m.impl("append_attention", append_attention);
}

TORCH_LIBRARY_IMPL(graphwright_cpp, CompositeExplicitAutograd, m) { m.impl("uses_amx", uses_amx); }
