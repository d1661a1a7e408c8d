// Attention of a step's tokens over a cache, and the append to the cache.
//
// Source: Dao et al. 2022 (FlashAttention) for the running softmax, Dao et al. 2023 (Flash-Decoding) for the
// split over keys.
#include "attention_engines.h"

namespace gw {
namespace {

constexpr int64_t WAVE = 64;  // chunks of a sequence in flight, which bounds the memory of partial results

// A task's worth of rows: one sequence, one group of heads, up to GROUP_TILES tiles.
template <class T>
struct Item {
  Sequence seq;
  int64_t group;
  int tiles = 0;
  int64_t first_chunk = 0, last_chunk = 0;  // [first, last)
  RowTile tile[GROUP_TILES];

  void fill(const AttentionArgs<T>& a, int64_t index, int64_t row_groups, int64_t all_tiles) {
    const int64_t part = index % row_groups;
    group = index / row_groups % a.groups;
    seq = sequence_of(a, index / row_groups / a.groups);
    int64_t lo = std::numeric_limits<int64_t>::max(), hi = 0;
    for (int64_t t = part * GROUP_TILES; t < std::min(all_tiles, (part + 1) * GROUP_TILES); ++t) {
      tile[tiles] = tile_of(a, seq, group, t);
      lo = std::min(lo, tile[tiles].lo);
      hi = std::max(hi, tile[tiles].hi);
      ++tiles;
    }
    if (lo < hi) {
      first_chunk = lo / CHUNK;
      last_chunk = (hi + CHUNK - 1) / CHUNK;
    }
  }
  bool touches(int t, int64_t chunk) const { return tile[t].lo < (chunk + 1) * CHUNK && chunk * CHUNK < tile[t].hi; }
  Store<T> keys(const AttentionArgs<T>& a) const {
    return {a.keys + seq.row * a.k_batch + group * a.k_group, a.k_slot, a.slots, seq.first_held, seq.total};
  }
  Store<T> values(const AttentionArgs<T>& a) const {
    return {a.values + seq.row * a.v_batch + group * a.v_group, a.v_slot, a.slots, seq.first_held, seq.total};
  }
};

template <class T, class Engine>
void load_queries(const AttentionArgs<T>& a, const Item<T>& item, Engine& engine) {
  for (int t = 0; t < item.tiles; ++t) {
    const T* rows[TILE] = {};
    for (int i = 0; i < item.tile[t].count; ++i) {
      const QueryRow& row = item.tile[t].rows[i];
      rows[i] = a.q + item.seq.row * a.q_batch + row.head * a.q_head + row.token * a.q_token;
    }
    engine.query(t, rows);
  }
}

template <class T, class Engine>
void compute(const AttentionArgs<T>& a, const Item<T>& item, int t, int64_t chunk, const Engine& engine,
             const Partial& out) {
  alignas(64) float scores[TILE * CHUNK];
  const RowTile& tile = item.tile[t];
  engine.scores(t, tile.count, scores);
  for (int i = 0; i < tile.count; ++i)
    softmax_row(a, item.seq, tile.rows[i], chunk, scores + i * CHUNK, out.max() + i, out.sum() + i);
  for (int i = tile.count; i < TILE; ++i) {
    out.max()[i] = NEG_INF;
    out.sum()[i] = 0.0f;
  }
  // The engines work on four rows at a time.
  std::fill(scores + tile.count * CHUNK, scores + round_up(tile.count, 4) * CHUNK, 0.0f);
  engine.weigh(tile.count, scores, out.weighted());
}

// Enough rows for all threads: each task goes through its chunks in order.
template <class T, class Engine>
void run_by_rows(const AttentionArgs<T>& a, int64_t items, int64_t row_groups, int64_t tiles) {
  const int64_t width = round_up(a.e, 16), size = Partial::size(width);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    Engine engine(a.d, a.e);
    Scratch memory;
    float* base = memory.get<float>(size * (GROUP_TILES + 1));
    const Partial part{base + size * GROUP_TILES, width};
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = items - 1; index >= 0; --index) {  // the longest causal rows first
      Item<T> item;
      item.fill(a, index, row_groups, tiles);
      load_queries(a, item, engine);
      for (int t = 0; t < item.tiles; ++t) clear({base + size * t, width});
      for (int64_t chunk = item.first_chunk; chunk < item.last_chunk; ++chunk) {
        engine.stage(item.keys(a), item.values(a), chunk);
        for (int t = 0; t < item.tiles; ++t) {
          if (!item.touches(t, chunk)) continue;
          compute(a, item, t, chunk, engine, part);
          merge({base + size * t, width}, part, item.tile[t].count);
        }
      }
      for (int t = 0; t < item.tiles; ++t) finish(a, item.seq, item.tile[t], {base + size * t, width});
    }
  }
}

// Few rows: chunks are spread over the threads, their partial results merged in order afterwards.
template <class T, class Engine>
void run_by_chunks(const AttentionArgs<T>& a, int64_t count, int64_t row_groups, int64_t tiles) {
  const int64_t width = round_up(a.e, 16), size = Partial::size(width);
  static thread_local Scratch item_memory, state_memory, part_memory;
  Item<T>* items = item_memory.get<Item<T>>(count);
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) {
    (new (items + i) Item<T>())->fill(a, i, row_groups, tiles);
    chunks = std::max(chunks, items[i].last_chunk - items[i].first_chunk);
  }
  float* states = state_memory.get<float>(count * GROUP_TILES * size);
  for (int64_t i = 0; i < count * GROUP_TILES; ++i) clear({states + i * size, width});
  const int64_t wave = std::max<int64_t>(1, std::min(WAVE, chunks));
  float* parts = part_memory.get<float>(count * wave * GROUP_TILES * size);
  const auto part = [=](int64_t item, int64_t chunk, int t) {
    return Partial{parts + ((item * wave + chunk) * GROUP_TILES + t) * size, width};
  };
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    Engine engine(a.d, a.e);
    for (int64_t start = 0; start < std::max<int64_t>(chunks, 1); start += wave) {
      // Contiguous runs of chunks a thread, so that the hardware prefetches what follows.
      int64_t loaded = -1;
#pragma omp for schedule(static)
      for (int64_t task = 0; task < count * wave; ++task) {
        const Item<T>& item = items[task / wave];
        const int64_t chunk = item.first_chunk + start + task % wave;
        if (chunk >= item.last_chunk) continue;
        if (loaded != task / wave) load_queries(a, item, engine);
        loaded = task / wave;
        engine.stage(item.keys(a), item.values(a), chunk);
        for (int t = 0; t < item.tiles; ++t)
          if (item.touches(t, chunk)) compute(a, item, t, chunk, engine, part(task / wave, task % wave, t));
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < count * GROUP_TILES; ++task) {
        const Item<T>& item = items[task / GROUP_TILES];
        const int t = int(task % GROUP_TILES);
        if (t >= item.tiles) continue;
        const Partial state{states + task * size, width};
        for (int64_t i = 0; i < wave; ++i) {
          const int64_t chunk = item.first_chunk + start + i;
          if (chunk < item.last_chunk && item.touches(t, chunk))
            merge(state, part(task / GROUP_TILES, i, t), item.tile[t].count);
        }
        if (start + wave >= chunks) finish(a, item.seq, item.tile[t], state);
      }
    }
  }
}

template <class T, class Engine>
void run(AttentionArgs<T> a) {
  const int64_t tiles = (a.heads / a.groups * a.tokens + TILE - 1) / TILE;
  const int64_t row_groups = (tiles + GROUP_TILES - 1) / GROUP_TILES;
  const int64_t items = a.batch * a.groups * row_groups;
  if (items >= 4 * a.threads) run_by_rows<T, Engine>(a, items, row_groups, tiles);
  else run_by_chunks<T, Engine>(a, items, row_groups, tiles);
}

}  // namespace

template <>
void cache_attention<float>(const AttentionArgs<float>& args) {
  run<float, FloatEngine<float>>(args);
}

template <>
void cache_attention<bf16>(const AttentionArgs<bf16>& args) {
#ifdef GW_AMX
  if (TileEngine::takes(args.d)) {
    run<bf16, TileEngine>(args);
    return;
  }
#endif
  run<bf16, FloatEngine<bf16>>(args);
}

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
