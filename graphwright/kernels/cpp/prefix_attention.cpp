// Attention over a prefix that all rows of the batch share, and over each row's own tokens.
//
// The queries of all rows and tokens form one sequence of query rows over the prefix: a chunk of it is read once for
// all of them. Partial results stay in float32; each row's own tokens are merged into them, chunk by chunk.
//
// Source: Juravsky et al. 2024, "Hydragen: High-Throughput LLM Inference with Shared Prefixes", section 3.
#include "attention_tree.h"
#include "prefix_attention.h"

namespace gw {
namespace {

constexpr int64_t ROWS = 1024;  // query tokens whose partial results are kept at one time

struct NoWorkspace {
  template <class Cache>
  explicit NoWorkspace(const Cache&) {}
};

// The prefix, to one sequence of all query tokens that see all of it; their results are kept.
template <class T>
struct SharedPrefix {
  using Workspace = NoWorkspace;
  const AttentionArgs<T>& a;
  int64_t length;
  const Partials& partials;

  int query_sets() const { return 1; }
  int states() const { return 1; }
  int segments(const Sequence&, Segment* out) const {
    out[0] = {0, length};
    return 1;
  }
  const T* turned(Workspace&, int64_t, const T* row, int) const { return row; }
  template <class Engine>
  void stage(Engine& engine, Workspace&, const Sequence&, int64_t group, const Segment&, int64_t chunk) const {
    engine.stage(Store<T>{a.keys + group * a.k_group, a.k_slot, length, 0, length},
                 Store<T>{a.values + group * a.v_group, a.v_slot, length, 0, length}, chunk);
  }
  void gather(Workspace&, int64_t, int, const Partial&, const Partial&) const {}
  void finish(const Sequence&, const RowTile& tile, const Partial& state) const {
    for (int i = 0; i < tile.count; ++i) partials.keep(tile.rows[i].token, tile.rows[i].head, state, i);
  }
};

// A row's own tokens, after what its queries have of the prefix.
template <class T>
struct OwnTokens {
  using Workspace = NoWorkspace;
  const AttentionArgs<T>& a;
  const Partials& partials;

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
    gw::stage(engine, seq, Store<T>{keys, a.k_slot, a.slots, seq.first_held, seq.total},
              Store<T>{values, a.v_slot, a.slots, seq.first_held, seq.total}, chunk);
  }
  void gather(Workspace&, int64_t, int, const Partial&, const Partial&) const {}
  void begin(const Sequence& seq, const RowTile& tile, const Partial& state) const {
    for (int i = 0; i < tile.count; ++i) {
      const QueryRow& row = tile.rows[i];
      if (row.token < a.counts[seq.row]) partials.give(seq.row * a.tokens + row.token, row.head, state, i);
    }
  }
};

// The step's arguments for the rows [from, to).
template <class T>
AttentionArgs<T> slice(const AttentionArgs<T>& a, int64_t from, int64_t to) {
  AttentionArgs<T> part = a;
  part.batch = to - from;
  part.q += from * a.q_batch;
  part.keys += from * a.k_batch;
  part.values += from * a.v_batch;
  part.positions += from * a.tokens;
  part.lengths += from;
  part.counts += from;
  if (a.tree) part.tree += from * a.tokens;
  part.out += from * a.tokens * a.heads * a.e;
  return part;
}

// All tokens of the step as one sequence behind the prefix.
template <class T>
AttentionArgs<T> as_one(const AttentionArgs<T>& a, const PrefixArgs<T>& prefix, const int64_t* counts) {
  AttentionArgs<T> one = a;
  if (a.batch > 1) one.q_token = a.tokens > 1 ? a.q_token : a.q_batch;
  one.batch = 1;
  one.tokens = a.batch * a.tokens;
  one.keys = prefix.keys, one.k_group = prefix.k_group, one.k_slot = prefix.k_slot;
  one.values = prefix.values, one.v_group = prefix.v_group, one.v_slot = prefix.v_slot;
  one.lengths = &prefix.length, one.counts = counts;
  one.slots = prefix.length + one.tokens;
  one.tree = nullptr;
  return one;
}

}  // namespace

template <class T>
void prefix_attention(const PrefixArgs<T>& prefix) {
  const AttentionArgs<T>& step = prefix.step;
  if (prefix.length == 0) return cache_attention(step);
  static thread_local Scratch memory;
  // Short steps run whole. Of a long one the arithmetic takes the time, however often the prefix is read.
  const int64_t rows = std::max<int64_t>(1, ROWS / step.tokens);
  for (int64_t from = 0; from < step.batch; from += rows) {
    const AttentionArgs<T> part = slice(step, from, std::min(step.batch, from + rows));
    const int64_t tokens = part.batch * part.tokens;
    const Partials partials(memory, tokens, part.heads, round_up(part.e, 16));
    const AttentionArgs<T> one = as_one(part, prefix, &tokens);
    attend(one, SharedPrefix<T>{one, prefix.length, partials});
    attend(part, OwnTokens<T>{part, partials});
  }
}
template void prefix_attention<float>(const PrefixArgs<float>&);
template void prefix_attention<bf16>(const PrefixArgs<bf16>&);

}  // namespace gw
