// Attention of a step's tokens over the listed pages of a cache in full precision.
//
// Source: Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", section 3.3, for
// attention over chosen pages.
#include "sparse_attention.h"

namespace gw {
namespace {

// Where the keys (or values) of one sequence and group lie, by place in an order; see Store.
template <class T>
struct ListedStore {
  const T* base;
  int64_t stride;
  const TokenOrder& order;
  int64_t first_held, total;
  const T* at(int64_t place) const {
    return place < first_held || place >= total ? nullptr : base + order.number(place) * stride;
  }
  const T* run(int64_t place) const {
    if (place < first_held || place + 16 > total || order.together(place) < 16) return nullptr;
    return base + order.number(place) * stride;
  }
};

template <class T>
struct ListedCache {
  const AttentionArgs<T>& a;
  struct Workspace {
    explicit Workspace(const ListedCache&) {}
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
    const T* keys = a.keys + seq.row * a.k_batch + group * a.k_group;
    const T* values = a.values + seq.row * a.v_batch + group * a.v_group;
    if (!seq.order) {
      return gw::stage(engine, seq, Store<T>{keys, a.k_slot, a.slots, seq.first_held, seq.total},
                       Store<T>{values, a.v_slot, a.slots, seq.first_held, seq.total}, chunk);
    }
    const ListedStore<T> k{keys, a.k_slot, *seq.order, seq.first_held, seq.total};
    const ListedStore<T> v{values, a.v_slot, *seq.order, seq.first_held, seq.total};
    if constexpr (!Engine::ASKS_AHEAD) {
      for (int64_t place = (chunk + 1) * CHUNK; place < (chunk + 2) * CHUNK; place += 16) {
        ask(k.run(place), a.k_slot, a.d);
        ask(v.run(place), a.v_slot, a.e);
      }
    }
    engine.stage(k, v, chunk);
  }
  void gather(Workspace&, int64_t, int, const Partial&, const Partial&) const {}

 private:
  // Pages lie apart: the hardware does not guess the next one. Sixteen rows of it. Compilers drop calls of functions
  // that only prefetch, so it must not be one.
  [[gnu::always_inline]] static inline void ask(const T* run, int64_t stride, int64_t width) {
    if (!run) return;
    for (int i = 0; i < 16; ++i)
      for (int64_t c = 0; c < width; c += int64_t(64 / sizeof(T))) __builtin_prefetch(run + i * stride + c, 0, 2);
  }
};

}  // namespace

template <class T>
void listed_attention(const AttentionArgs<T>& args, const PageLists& lists) {
  const ListedItems<T> items(args, lists);
  if (!items.any()) return cache_attention(args);
  attend(args, ListedCache<T>{args}, items);
}
template void listed_attention<float>(const AttentionArgs<float>&, const PageLists&);
template void listed_attention<bf16>(const AttentionArgs<bf16>&, const PageLists&);

}  // namespace gw
