// The op `graphwright_cpp::packed_attention`: a packed store's tensors and codec to what the kernel takes.
#include <ATen/ops/empty.h>

#include <unordered_map>
#include <vector>

#include "bindings.h"
#include "packed.h"
#include "packed_codec.h"

namespace {

using namespace gw::bind;

// Parsed once a thread.
const gw::CodecRecipe& recipe_of(std::string_view text) {
  static thread_local std::unordered_map<std::string, gw::CodecRecipe> known;
  std::string key(text);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  try {
    return known.emplace(std::move(key), gw::codec_recipe(text)).first->second;
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK(false, "graphwright_cpp: ", error.what());
  }
}

// Tensors in their order, each with what is wrong when it is missing.
class Reader {
 public:
  Reader(at::TensorList tensors, const char* what) : tensors_(tensors), what_(what) {}
  const Tensor& next() {
    TORCH_CHECK(at_ < tensors_.size(), "graphwright_cpp: ", what_, " are only ", tensors_.size());
    return tensors_[at_++];
  }
  void done() const {
    TORCH_CHECK(at_ == tensors_.size(), "graphwright_cpp: ", what_, " are ", tensors_.size(), ", not ", at_);
  }

 private:
  at::TensorList tensors_;
  const char* what_;
  size_t at_ = 0;
};

// The shape of what a page buffer has to have.
void check_pages(const Tensor& x, at::ScalarType type, at::IntArrayRef shape, const char* name) {
  check_dtype(x, type, name);
  bool fits = x.dim() == int64_t(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = x.size(int64_t(i)) == shape[i];
  TORCH_CHECK(fits && (x.stride(-1) == 1 || x.size(-1) == 1), "graphwright_cpp: ", name, " of pages are ", x.sizes(),
              ", expected ", shape);
}

int64_t packed_width(int64_t features, int bits) {
  int64_t width = 0;
  for (int plane = 8, rest = bits; plane; plane /= 2)
    if (rest >= plane) width += (features * plane + 7) / 8, rest -= plane;
  return width;
}

struct Side {
  at::TensorList store, constants;
  std::string_view codec;
  int64_t page;
};

struct PageShape {
  int64_t batch, count, groups, tokens, d;
};

void read_scaling(const gw::CodecRecipe& recipe, const PageShape& s, Reader& buffers, gw::Pages& p) {
  using gw::Scaling;
  p.by_channel = recipe.by_channel();
  p.run = recipe.group ? recipe.group : s.d;
  TORCH_CHECK(s.d % p.run == 0 && (p.run == s.d || p.run % 32 == 0), "graphwright_cpp: groups of ", p.run, " features");
  const int64_t strides = p.by_channel || !recipe.group ? 4 : 5;
  const int64_t last = p.by_channel ? s.d : s.tokens;
  const int64_t shape[] = {s.batch, s.count, s.groups, last, s.d / p.run};
  const auto read = [&](const char* name, int64_t& batch, int64_t& page, int64_t& group, int64_t& token) {
    const Tensor& x = buffers.next();
    check_pages(x, at::kBFloat16, {shape, size_t(strides)}, name);
    batch = x.stride(0), page = x.stride(1), group = x.stride(2), token = p.by_channel ? 0 : x.stride(3);
    return pointer<const gw::bf16>(x);
  };
  if (recipe.has_low()) p.low = read("lows", p.l_batch, p.l_page, p.l_group, p.l_token);
  p.scale = read("scales", p.s_batch, p.s_page, p.s_group, p.s_token);
  p.factor = recipe.has_low() ? 0.5f : recipe.scaling == Scaling::TOKEN_NORM ? float(1 / std::sqrt(double(s.d))) : 1.0f;
}

void read_levels(const gw::CodecRecipe& recipe, Reader& constants, gw::Pages& p) {
  const int count = 1 << recipe.bits;
  if (recipe.quantizer == gw::Quantizer::LLOYD_MAX) {
    const Tensor& levels = constants.next();
    check_dtype(levels, at::kFloat, "the levels");
    TORCH_CHECK(levels.numel() == count && levels.is_contiguous(), "graphwright_cpp: levels ", levels.sizes(), " for ",
                recipe.bits, " bits");
    std::copy_n(pointer<const float>(levels), count, p.levels);
    return;
  }
  p.step = 2.0f / float(count - 1), p.offset = -1.0f;
  for (int code = 0; code < std::min(count, 16); ++code) p.levels[code] = float(code) * p.step + p.offset;
}

// `held` keeps what had to be copied.
void read_turns(const gw::CodecRecipe& recipe, int64_t groups, int64_t d, Reader& constants, gw::Turn* turn,
                std::vector<Tensor>& held) {
  TORCH_CHECK(recipe.turns <= gw::MAX_TURNS, "graphwright_cpp: a codec of ", recipe.turns, " maps");
  for (int i = 0; i < recipe.turns; ++i) {
    const Tensor& x = constants.next();
    const bool order = x.scalar_type() == at::kLong;
    if (!order) check_dtype(x, at::kFloat, "a rotation");
    TORCH_CHECK(x.dim() == 2 && x.size(0) == (order ? groups : d) && x.size(1) == d, "graphwright_cpp: a map ", x.sizes(),
                " for ", groups, " heads of ", d);
    const Tensor& map = x.is_contiguous() ? x : held.emplace_back(x.contiguous());
    turn[i] = order ? gw::Turn{nullptr, pointer<const int64_t>(map)} : gw::Turn{pointer<const float>(map), nullptr};
  }
}

template <class T>
gw::PackedStore<T> read_store(const Side& side, std::vector<Tensor>& held) {
  Reader store(side.store, "the tensors of a packed store"), constants(side.constants, "the codec's constants");
  const gw::CodecRecipe& recipe = recipe_of(side.codec);
  const Tensor &packed = store.next(), &tail = store.next(), &first = store.next();
  check_dtype(packed, at::kLong, "packed");
  for (const Tensor* x : {&tail, &first}) {
    check_dtype(*x, Scalar<T>::type, "a packed store's tail");
    TORCH_CHECK(x->dim() == 4 && (x->stride(3) == 1 || x->size(3) == 1), "graphwright_cpp: a packed store's tail is ",
                x->sizes());
  }
  gw::PackedStore<T> out{};
  out.packed = pointer<const int64_t>(packed);
  out.tail = pointer<const T>(tail), out.tail_slots = tail.size(2), out.d = tail.size(3);
  out.t_batch = tail.stride(0), out.t_group = tail.stride(1), out.t_slot = tail.stride(2);
  out.first = pointer<const T>(first), out.first_tokens = first.size(2);
  out.f_batch = first.stride(0), out.f_group = first.stride(1), out.f_slot = first.stride(2);
  TORCH_CHECK(packed.numel() == tail.size(0) && packed.is_contiguous() && first.size(0) == tail.size(0) &&
                  first.size(1) == tail.size(1) && first.size(3) == out.d && side.page > 0 && out.tail_slots > 0,
              "graphwright_cpp: a packed store of ", packed.sizes(), ", ", tail.sizes(), " and ", first.sizes());
  out.turns = recipe.turns;
  read_turns(recipe, tail.size(1), out.d, constants, out.turn, held);
  gw::Pages& p = out.pages;
  p.bits = recipe.bits;
  out.page_tokens = side.page;
  const Tensor& codes = side.store.back();
  TORCH_CHECK(codes.dim() == 5, "graphwright_cpp: pages are ", codes.sizes());
  out.page_count = codes.size(1);
  const PageShape s{tail.size(0), out.page_count, tail.size(1), side.page, out.d};
  const bool plain = recipe.quantizer == gw::Quantizer::FLOAT;
  if (!plain) {
    read_scaling(recipe, s, store, p);
    read_levels(recipe, constants, p);
  }
  const int64_t width = plain ? s.d : packed_width(s.d, recipe.bits);
  check_pages(store.next(), plain ? at::kBFloat16 : at::kByte, {s.batch, s.count, s.groups, s.tokens, width}, "codes");
  const auto size = int64_t(codes.element_size());
  p.codes = static_cast<const uint8_t*>(codes.data_ptr());
  p.c_batch = codes.stride(0) * size, p.c_page = codes.stride(1) * size;
  p.c_group = codes.stride(2) * size, p.c_token = codes.stride(3) * size;
  store.done();
  constants.done();
  return out;
}

// Nothing is read outside the store's tensors: what has left the tail was there, what has not still is.
template <class T>
void check_state(const gw::PackedStore<T>& s, const gw::AttentionArgs<T>& a) {
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t packed = s.packed[b];
    const bool fits = packed >= 0 && packed <= a.lengths[b] && a.counts[b] >= 0 &&
                      a.lengths[b] + a.counts[b] - packed <= s.tail_slots &&
                      (packed <= s.first_tokens || ((packed - s.first_tokens) % s.page_tokens == 0 && s.page_count > 0));
    TORCH_CHECK(fits, "graphwright_cpp: row ", b, " has packed ", packed, " of ", a.lengths[b], " + ", a.counts[b],
                " tokens in pages of ", s.page_tokens, " and a tail of ", s.tail_slots);
  }
}

struct Step {
  const Tensor &q, &slots, &positions, &lengths, &counts, &tree;
  double scale, softcap;
  int64_t window;
  const OptionalTensor &sinks, &pages, &chosen;
  int64_t page, first;
};

template <class T>
Tensor packed(const Step& step, const Side& key, const Side& value) {
  const Tensor q = unit_last(step.q), positions = step.positions.contiguous(), lengths = step.lengths.contiguous();
  const Tensor counts = step.counts.contiguous(), tree = step.tree.contiguous();
  TORCH_CHECK(q.dim() == 4 && step.slots.dim() == 4, "graphwright_cpp: attention takes four dimensions, not ", q.sizes());
  std::vector<Tensor> held;
  gw::PackedArgs<T> args{{}, read_store<T>(key, held), read_store<T>(value, held)};
  gw::AttentionArgs<T>& a = args.step;
  a.batch = q.size(0), a.heads = q.size(1), a.tokens = q.size(2), a.d = q.size(3), a.e = args.values.d;
  const Tensor &tail = key.store[1], &other = value.store[1];
  a.groups = tail.size(1), a.slots = step.slots.size(2);
  check_step(lengths, counts, a.batch);
  check_dtype(positions, at::kLong, "positions");
  check_dtype(tree, at::kLong, "tree");
  TORCH_CHECK(tail.size(0) == a.batch && other.size(0) == a.batch && other.size(1) == a.groups && args.keys.d == a.d &&
                  a.groups > 0 && a.heads % a.groups == 0,
              "graphwright_cpp: q ", q.sizes(), ", keys ", tail.sizes(), " and values ", other.sizes(), " do not fit");
  TORCH_CHECK(positions.numel() == a.batch * a.tokens && (tree.numel() == 0 || tree.numel() == a.batch * a.tokens),
              "graphwright_cpp: positions ", positions.sizes(), " and tree ", tree.sizes(), " for q ", q.sizes());
  Tensor out = at::empty({a.batch, a.tokens, a.heads, a.e}, q.options());
  if (out.numel() == 0) return out;
  Tensor sinks;
  if (step.sinks && step.sinks->defined()) {
    sinks = step.sinks->to(at::kFloat).contiguous();
    TORCH_CHECK(sinks.numel() == a.heads, "graphwright_cpp: sinks ", sinks.sizes(), " for ", a.heads, " heads");
    a.sinks = pointer<const float>(sinks);
  }
  a.q = pointer<const T>(q), a.q_batch = q.stride(0), a.q_head = q.stride(1), a.q_token = q.stride(2);
  a.positions = pointer<const int64_t>(positions);
  a.lengths = pointer<const int64_t>(lengths), a.counts = pointer<const int64_t>(counts);
  a.tree = tree.numel() ? pointer<const int64_t>(tree) : nullptr;
  a.out = pointer<T>(out);
  a.scale = float(step.scale), a.softcap = float(step.softcap), a.window = step.window, a.threads = threads();
  check_state(args.keys, a);
  check_state(args.values, a);
  const auto lists = read_lists(step.pages, step.chosen, step.page, step.first,
                                {a.batch, a.tokens, a.groups, a.slots, a.window, a.lengths, a.counts});
  if (!lists) return gw::packed_attention<T>(args), out;
  for (const gw::PackedStore<T>* s : {&args.keys, &args.values})
    TORCH_CHECK(step.page == s->page_tokens && step.first == s->first_tokens, "graphwright_cpp: lists of pages of ",
                step.page, " tokens after ", step.first, ", and stores with pages of ", s->page_tokens, " after ",
                s->first_tokens);
  gw::packed_attention<T>(args, &lists->args);
  return out;
}

Tensor packed_attention(const Tensor& q, at::TensorList keys, at::TensorList key_constants, at::TensorList values,
                        at::TensorList value_constants, const Tensor& slots, const Tensor& positions,
                        const Tensor& lengths, const Tensor& counts, const Tensor& tree, c10::string_view key_codec,
                        int64_t key_page, c10::string_view value_codec, int64_t value_page, double scale,
                        int64_t window, double softcap, const OptionalTensor& sinks, const OptionalTensor& pages,
                        const OptionalTensor& chosen, int64_t page, int64_t first) {
  const Step step{q,      slots,  positions, lengths, counts, tree, scale, softcap,
                  window, sinks,  pages,     chosen,  page,   first};
  const Side key{keys, key_constants, key_codec, key_page}, value{values, value_constants, value_codec, value_page};
  if (q.scalar_type() == at::kBFloat16) return packed<gw::bf16>(step, key, value);
  return packed<float>(step, key, value);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(graphwright_cpp, m) {
  m.def("packed_attention(Tensor q, Tensor[] keys, Tensor[] key_constants, Tensor[] values, Tensor[] value_constants, "
        "Tensor slots, Tensor positions, Tensor lengths, Tensor counts, Tensor tree, str key_codec, int key_page, "
        "str value_codec, int value_page, float scale, int window=0, float softcap=0.0, Tensor? sinks=None, "
        "Tensor? pages=None, Tensor? chosen=None, int page=0, int first=0) -> Tensor");
}

TORCH_LIBRARY_IMPL(graphwright_cpp, CPU, m) { m.impl("packed_attention", packed_attention); }
