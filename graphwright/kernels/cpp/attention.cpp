// Attention of a step's tokens over a cache in full precision, and the append to the cache.
#include "attention_tree.h"

namespace gw {
namespace {

// Keys and values as they were computed, token p in slot p % slots.
template <class T>
struct PlainCache {
  const AttentionArgs<T>& a;
  struct Workspace {
    explicit Workspace(const PlainCache&) {}
  };

  int query_sets() const { return 1; }
  int states() const { return 1; }
  int segments(const Sequence& seq, Segment* out) const {
    out[0] = {0, seq.total};
    return 1;
  }
  const T* turned(Workspace&, int64_t, const T* row, int) const { return row; }
  template <class Engine>
  void stage(Engine& engine, Workspace&, const Sequence& seq, int64_t group, const Segment&, int64_t chunk) const {
    const Store<T> keys{a.keys + seq.row * a.k_batch + group * a.k_group, a.k_slot, a.slots, seq.first_held, seq.total};
    const Store<T> values{a.values + seq.row * a.v_batch + group * a.v_group, a.v_slot, a.slots, seq.first_held, seq.total};
    gw::stage(engine, seq, keys, values, chunk);
  }
  void gather(Workspace&, int64_t, int, const Partial&, const Partial&) const {}
};

}  // namespace

template <class T>
void cache_attention(const AttentionArgs<T>& args) {
  attend(args, PlainCache<T>{args});
}
template void cache_attention<float>(const AttentionArgs<float>&);
template void cache_attention<bf16>(const AttentionArgs<bf16>&);

void cache_append(const AppendArgs& a) {
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t g = 0; g < a.groups; ++g)
      for (int64_t t = 0; t < a.counts[b]; ++t) {
        char* to = a.store + b * a.s_batch + g * a.s_group + (a.lengths[b] + t) % a.slots * a.s_slot;
        const char* from = a.fresh + b * a.f_batch + g * a.f_group + t * a.f_token;
        if (a.f_dim == a.element) {
          std::memcpy(to, from, size_t(a.d * a.element));
        } else {
          for (int64_t i = 0; i < a.d; ++i) std::memcpy(to + i * a.element, from + i * a.f_dim, size_t(a.element));
        }
      }
}

}  // namespace gw
