// Which keys a query row sees, and the running softmax over chunks of keys. Shared by all engines.
//
// Keys are numbered by token, not by slot, and cut into chunks at multiples of CHUNK. A row's chunk has one
// partial result (maximum, sum, weighted values), and partials are merged in the order of the chunks. Nothing
// of this depends on the other rows, on the threads or on where a ring or a tree has put a token.
#pragma once
#include <algorithm>
#include <limits>

#include "kernels.h"
#include "token_order.h"
#include "tree_path.h"

namespace gw {

constexpr int TILE = 16;         // query rows computed together
constexpr int CHUNK = 128;       // keys of one partial result
constexpr int GROUP_TILES = 8;   // tiles that share one reading of the keys
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// One sequence of the batch.
struct Sequence {
  int64_t row, length, total, first_held;  // tokens before the step, after it, and the oldest in the cache
  bool plain;                              // a chain whose visibility is one range of token numbers
  const TokenOrder* order = nullptr;       // if any: what is read; all "numbers" are then places in it
  const TreePath* path = nullptr;          // if any: numbers from `length` on are places on it, queries are its own
  // The token of query i, and the end of what it sees of a chain.
  int64_t token(int64_t i) const { return path ? path->query[i] : i; }
  int64_t after(int64_t i) const {
    if (path) return length + path->seen[i];
    return order ? order->after(i) : length + i + 1;
  }
  // Which token of the step a number from `length` on is.
  int64_t column(int64_t number) const {
    if (path) return path->column[number - length];
    return order ? order->column(number) : number - length;
  }
};

template <class T>
Sequence sequence_of(const AttentionArgs<T>& a, int64_t row) {
  int64_t length = a.lengths[row], total = length + a.counts[row];
  bool plain = a.tree == nullptr;
  if (plain && a.window)
    for (int64_t j = 0; j < a.counts[row]; ++j) plain &= a.positions[row * a.tokens + j] == length + j;
  return {row, length, total, std::max<int64_t>(0, total - a.slots), plain};
}

// One query row: head and token, and the token numbers [lo, hi) that it may see.
struct QueryRow {
  int64_t head, token, lo, hi, position;
};

struct RowTile {
  int count = 0;
  int64_t lo = 0, hi = 0;  // the union of the rows' ranges; empty when lo >= hi
  QueryRow rows[TILE];
};

// Rows [from, to), or as many as fit. They are ordered by token, then by head of the group, so that a tile's ranges
// are close together.
template <class T>
RowTile tile_of(const AttentionArgs<T>& a, const Sequence& seq, int64_t group, int64_t from, int64_t to) {
  const int64_t shared = a.heads / a.groups;
  RowTile out;
  out.lo = std::numeric_limits<int64_t>::max();
  for (int64_t r = from; r < std::min(to, from + TILE); ++r) {
    QueryRow& row = out.rows[out.count++];
    row.head = group * shared + r % shared;
    row.token = seq.token(r / shared);
    row.position = a.positions[seq.row * a.tokens + row.token];
    if (row.token >= a.counts[seq.row]) {
      row.lo = row.hi = 0;
      continue;
    }
    row.lo = a.window ? std::max(seq.first_held, row.position - a.window + 1) : seq.first_held;
    row.hi = seq.plain ? seq.after(r / shared) : seq.total;
    out.lo = std::min(out.lo, row.lo);
    out.hi = std::max(out.hi, row.hi);
  }
  return out;
}

// Bit i: does the row see token `at + i`?
template <class T>
uint32_t visible(const AttentionArgs<T>& a, const Sequence& seq, const QueryRow& row, int64_t at) {
  int64_t hi = seq.plain ? row.hi : std::min(row.hi, seq.length);
  int64_t from = std::clamp<int64_t>(row.lo - at, 0, 16), to = std::clamp<int64_t>(hi - at, 0, 16);
  uint32_t mask = to > from ? ((1u << to) - 1) & ~((1u << from) - 1) : 0;
  if (seq.plain || row.lo >= row.hi) return mask;
  for (int64_t n = std::max(at, seq.length); n < std::min(at + 16, row.hi); ++n) {
    int64_t column = seq.column(n);
    bool seen = a.tree ? (a.tree[seq.row * a.tokens + row.token] >> std::min<int64_t>(column, 63)) & 1
                       : column <= row.token;
    if (a.window) seen &= a.positions[seq.row * a.tokens + column] > row.position - a.window;
    mask |= uint32_t(seen) << (n - at);
  }
  return mask;
}

// Partial results of a tile: max[16], sum[16], weighted[16][width].
struct Partial {
  float* data;
  int64_t width;
  float* max() const { return data; }
  float* sum() const { return data + TILE; }
  float* weighted(int64_t row = 0) const { return data + 2 * TILE + row * width; }
  static int64_t size(int64_t width) { return TILE * (width + 2); }
  // The one that lies `count` after this one.
  Partial following(int64_t count) const { return {data + count * size(width), width}; }
};

inline void clear(const Partial& p) {
  for (int i = 0; i < TILE; ++i) p.max()[i] = NEG_INF, p.sum()[i] = 0.0f;
  std::fill_n(p.weighted(), TILE * p.width, 0.0f);
}

// Scores of one row and chunk to weights exp(score - max) in place; gives the maximum and the sum.
template <class T>
void softmax_row(const AttentionArgs<T>& a, const Sequence& seq, const QueryRow& row, int64_t chunk, float* scores,
                 float* max, float* sum) {
  constexpr int BLOCKS = CHUNK / 16;
  Vec s[BLOCKS];
  Vec top = splat(NEG_INF);
  const int64_t at = chunk * CHUNK;
  const bool all = row.lo <= at && at + CHUNK <= (seq.plain ? row.hi : std::min(row.hi, seq.length));
  for (int i = 0; i < BLOCKS; ++i) {
    s[i] = mul(load(scores + 16 * i), splat(a.scale));
    if (a.softcap != 0.0f) {  // cap * tanh(x / cap), tanh(y) = 1 - 2 / (exp(2y) + 1)
      Vec e = vexp(mul(s[i], splat(2.0f / a.softcap)));
      s[i] = fma(div(splat(-2.0f * a.softcap), add(e, splat(1.0f))), splat(1.0f), splat(a.softcap));
    }
    if (!all) s[i] = keep(visible(a, seq, row, at + 16 * i), s[i], NEG_INF);
    top = vmax(top, s[i]);
  }
  *max = reduce_max(top);
  if (*max == NEG_INF) {
    std::fill_n(scores, CHUNK, 0.0f);
    *sum = 0.0f;
    return;
  }
  Vec total = splat(0.0f), minus = splat(-*max);
  for (int i = 0; i < BLOCKS; ++i) {
    Vec e = vexp(add(s[i], minus));
    store(scores + 16 * i, e);
    total = add(total, e);
  }
  *sum = reduce_add(total);
}

// state += part, for a tile's rows. A row that saw nothing in the chunk stays as it is, bit for bit.
inline void merge(const Partial& state, const Partial& part, int rows) {
  alignas(64) float keep_by[TILE], take_by[TILE];
  for (int i = 0; i < TILE; ++i) {
    float top = std::max(state.max()[i], part.max()[i]);
    keep_by[i] = state.max()[i] == top ? 0.0f : state.max()[i] - top;
    take_by[i] = part.max()[i] == NEG_INF ? NEG_INF : part.max()[i] - top;
    if (i < rows) state.max()[i] = top;
  }
  store(keep_by, vexp(load(keep_by)));
  store(take_by, vexp(load(take_by)));
  for (int i = 0; i < rows; ++i) {
    if (part.max()[i] == NEG_INF) continue;
    Vec kept = splat(keep_by[i]), taken = splat(take_by[i]);
    store_n(state.sum() + i, fma(splat(part.sum()[i]), taken, mul(splat(state.sum()[i]), kept)), 1);
    for (int64_t e = 0; e < state.width; e += 16) {
      float* to = state.weighted(i) + e;
      store(to, fma(load(part.weighted(i) + e), taken, mul(load(to), kept)));
    }
  }
}

// The finished rows of a tile to the output; padding rows are zeros.
template <class T>
void finish(const AttentionArgs<T>& a, const Sequence& seq, const RowTile& tile, const Partial& state) {
  for (int i = 0; i < tile.count; ++i) {
    const QueryRow& row = tile.rows[i];
    float top = state.max()[i], total = state.sum()[i], factor = 1.0f;
    if (a.sinks && row.token < a.counts[seq.row]) {
      float sink = a.sinks[row.head], both = std::max(top, sink);
      factor = top == NEG_INF ? 0.0f : std::exp(top - both);
      total = std::fma(total, factor, std::exp(sink - both));
    }
    Vec by = splat(total == 0.0f ? 0.0f : factor / total);
    T* out = a.out + ((seq.row * a.tokens + row.token) * a.heads + row.head) * a.e;
    for (int64_t e = 0; e < a.e; e += 16) store_up_to(out + e, mul(load(state.weighted(i) + e), by), a.e - e);
  }
}

// Where the keys (or values) of one sequence and group lie; null for a token that the cache does not hold.
template <class T>
struct Store {
  const T* base;
  int64_t stride, slots, first_held, total;
  const T* at(int64_t number) const {
    return number < first_held || number >= total ? nullptr : base + (number % slots) * stride;
  }
  // The first of 16 keys that follow each other in memory, or null.
  const T* run(int64_t number) const {
    if (number < first_held || number + 16 > total) return nullptr;
    int64_t slot = number % slots;
    return slot + 16 <= slots ? base + slot * stride : nullptr;
  }
};

// ... by place in a sequence with a path.
template <class T>
struct PathStore {
  const Store<T>& store;
  const TreePath& path;
  int64_t length, stride = store.stride;
  const T* at(int64_t place) const {
    if (place < length || place >= store.total) return store.at(place);
    return store.base + (length + path.column[place - length]) % store.slots * stride;
  }
  const T* run(int64_t place) const { return place + 16 <= length ? store.run(place) : nullptr; }
};

// The keys and values of a chunk before an engine.
template <class T, class Engine>
void stage(Engine& engine, const Sequence& seq, const Store<T>& keys, const Store<T>& values, int64_t chunk) {
  if (!seq.path) return engine.stage(keys, values, chunk);
  const int64_t length = seq.length;
  engine.stage(PathStore<T>{keys, *seq.path, length}, PathStore<T>{values, *seq.path, length}, chunk);
}

}  // namespace gw
