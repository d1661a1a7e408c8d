// How the query rows and the keys of a step are spread over threads, for any cache and any engine.
//
// A cache says in which segments a sequence's tokens are stored, puts a chunk of a segment before an engine, and
// finishes rows. Work is cut into pieces, a chunk of a segment each; their partial results are merged in order.
//
// Source: Dao et al. 2022 (FlashAttention) for the running softmax, Dao et al. 2023 (Flash-Decoding) for the
// split over keys.
#pragma once
#include "attention_engines.h"

namespace gw {

constexpr int64_t WAVE = 64;      // pieces of a sequence in flight, which bounds the memory of partial results
constexpr int MAX_SEGMENTS = 5;

// Tokens [lo, hi) of a sequence, stored in one way.
struct Segment {
  int64_t lo, hi;
  int queries = 0;          // the set of query rows that its keys are multiplied with
  int state = 0;            // the running result that its values are added to
  int keys = 0, values = 0; // where they are; the cache's own numbers
};

// A task's worth of rows: one sequence, one group of heads, up to GROUP_TILES tiles.
template <class T>
struct Item {
  // Consecutive pieces of one segment.
  struct Run {
    Segment segment;
    int64_t first_chunk, start;  // the first piece's chunk and number
  };
  Sequence seq;
  int64_t group, pieces = 0;
  int tiles = 0, runs = 0;
  Run run[MAX_SEGMENTS];
  RowTile tile[GROUP_TILES];

  // Rows [from, to) of a sequence and a group.
  template <class Cache>
  void fill(const AttentionArgs<T>& a, const Cache& cache, const Sequence& of, int64_t of_group, int64_t from,
            int64_t to) {
    seq = of;
    group = of_group;
    int64_t lo = std::numeric_limits<int64_t>::max(), hi = 0;
    for (int64_t r = from; r < to; r += TILE) {
      tile[tiles] = tile_of(a, seq, group, r, to);
      lo = std::min(lo, tile[tiles].lo);
      hi = std::max(hi, tile[tiles].hi);
      ++tiles;
    }
    Segment segments[MAX_SEGMENTS];
    const int count = cache.segments(seq, segments);
    for (int i = 0; i < count; ++i) {
      const int64_t from = std::max(lo, segments[i].lo), to = std::min(hi, segments[i].hi);
      if (from >= to) continue;
      run[runs++] = {segments[i], from / CHUNK, pieces};
      pieces += (to + CHUNK - 1) / CHUNK - from / CHUNK;
    }
  }
  const Run& run_of(int64_t piece) const {
    int i = runs - 1;
    while (run[i].start > piece) --i;
    return run[i];
  }
};

constexpr int64_t ITEM_ROWS = GROUP_TILES * TILE;

// The items of a step whose rows all read the same tokens of their sequence, as far as they see them.
template <class T>
struct Rows {
  const AttentionArgs<T>& a;
  int64_t rows, parts;  // of a sequence and group
  explicit Rows(const AttentionArgs<T>& a)
      : a(a), rows(a.heads / a.groups * a.tokens), parts((rows + ITEM_ROWS - 1) / ITEM_ROWS) {}
  int64_t count() const { return a.batch * a.groups * parts; }
  template <class Cache>
  void fill(Item<T>& item, const Cache& cache, int64_t index) const {
    const int64_t from = index % parts * ITEM_ROWS;
    item.fill(a, cache, sequence_of(a, index / parts / a.groups), index / parts % a.groups, from,
              std::min(rows, from + ITEM_ROWS));
  }
};

// A piece: the tokens of one chunk that are in one segment.
struct Piece {
  const Segment& segment;
  int64_t chunk;
  template <class T>
  Piece(const Item<T>& item, int64_t number) : Piece(item.run_of(number), number) {}
  bool touches(const RowTile& tile) const {
    const int64_t lo = std::max(segment.lo, chunk * CHUNK), hi = std::min(segment.hi, (chunk + 1) * CHUNK);
    return tile.lo < hi && lo < tile.hi;
  }

 private:
  template <class Run>
  Piece(const Run& run, int64_t number) : segment(run.segment), chunk(run.first_chunk + number - run.start) {}
};

template <class T, class Cache, class Engine>
void load_queries(const AttentionArgs<T>& a, const Cache& cache, typename Cache::Workspace& work, const Item<T>& item,
                  Engine& engine) {
  for (int set = 0; set < cache.query_sets(); ++set)
    for (int t = 0; t < item.tiles; ++t) {
      const T* rows[TILE] = {};
      for (int i = 0; i < item.tile[t].count; ++i) {
        const QueryRow& row = item.tile[t].rows[i];
        rows[i] = a.q + item.seq.row * a.q_batch + row.head * a.q_head + row.token * a.q_token;
        if (set) rows[i] = cache.turned(work, item.group, rows[i], i);
      }
      engine.query(set * GROUP_TILES + t, rows);
    }
}

template <class T, class Engine>
void compute(const AttentionArgs<T>& a, const Item<T>& item, int t, const Piece& piece, const Engine& engine,
             const Partial& out) {
  alignas(64) float scores[TILE * CHUNK];
  const RowTile& tile = item.tile[t];
  engine.scores(piece.segment.queries * GROUP_TILES + t, tile.count, scores);
  for (int i = 0; i < tile.count; ++i) {
    QueryRow row = tile.rows[i];
    row.lo = std::max(row.lo, piece.segment.lo);
    row.hi = std::min(row.hi, piece.segment.hi);
    softmax_row(a, item.seq, row, piece.chunk, scores + i * CHUNK, out.max() + i, out.sum() + i);
  }
  for (int i = tile.count; i < TILE; ++i) {
    out.max()[i] = NEG_INF;
    out.sum()[i] = 0.0f;
  }
  // The engines work on four rows at a time.
  std::fill(scores + tile.count * CHUNK, scores + round_up(tile.count, 4) * CHUNK, 0.0f);
  engine.weigh(tile.count, scores, out.weighted());
}

// A cache may begin a tile with a result that it has already, and keep a tile's result instead of writing it out.
// `state` is the first of the tile's states, which follow each other.
template <class Cache>
void begin_tile(const Cache& cache, const Sequence& seq, const RowTile& tile, const Partial& state) {
  if constexpr (requires { cache.begin(seq, tile, state); }) cache.begin(seq, tile, state);
}
template <class T, class Cache>
void finish_tile(const AttentionArgs<T>& a, const Cache& cache, const Sequence& seq, const RowTile& tile,
                 const Partial& state) {
  if constexpr (requires { cache.finish(seq, tile, state); }) cache.finish(seq, tile, state);
  else finish(a, seq, tile, state);
}

// Enough rows for all threads: each task goes through its pieces in order.
template <class T, class Cache, class Engine, class Items>
void run_by_rows(const AttentionArgs<T>& a, const Cache& cache, const Items& items) {
  const int64_t width = round_up(a.e, 16), size = Partial::size(width);
  const int states = cache.states();
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    Engine engine(a.d, a.e, cache.query_sets() * GROUP_TILES);
    typename Cache::Workspace work(cache);
    Scratch memory;
    float* base = memory.get<float>(size * (GROUP_TILES * states + 1));
    const Partial part{base + size * GROUP_TILES * states, width};
    const auto state = [=](int t, int s) { return Partial{base + size * (t * states + s), width}; };
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = items.count() - 1; index >= 0; --index) {  // the longest causal rows first
      Item<T> item;
      items.fill(item, cache, index);
      load_queries(a, cache, work, item, engine);
      for (int i = 0; i < item.tiles * states; ++i) clear({base + size * i, width});
      for (int t = 0; t < item.tiles; ++t) begin_tile(cache, item.seq, item.tile[t], state(t, 0));
      for (int64_t number = 0; number < item.pieces; ++number) {
        const Piece piece(item, number);
        cache.stage(engine, work, item.seq, item.group, piece.segment, piece.chunk);
        for (int t = 0; t < item.tiles; ++t) {
          if (!piece.touches(item.tile[t])) continue;
          compute(a, item, t, piece, engine, part);
          merge(state(t, piece.segment.state), part, item.tile[t].count);
        }
      }
      for (int t = 0; t < item.tiles; ++t) {
        cache.gather(work, item.group, item.tile[t].count, state(t, 0), state(t, states - 1));
        finish_tile(a, cache, item.seq, item.tile[t], state(t, 0));
      }
    }
  }
}

// Few rows: pieces are spread over the threads, their partial results merged in order afterwards.
template <class T, class Cache, class Engine, class Items>
void run_by_chunks(const AttentionArgs<T>& a, const Cache& cache, const Items& all) {
  const int64_t count = all.count();
  const int64_t width = round_up(a.e, 16), size = Partial::size(width);
  const int states = cache.states();
  static thread_local Scratch item_memory, state_memory, part_memory;
  Item<T>* items = item_memory.get<Item<T>>(count);
  int64_t pieces = 0;
  for (int64_t i = 0; i < count; ++i) {
    all.fill(*new (items + i) Item<T>(), cache, i);
    pieces = std::max(pieces, items[i].pieces);
  }
  float* base = state_memory.get<float>(count * GROUP_TILES * states * size);
  for (int64_t i = 0; i < count; ++i)
    for (int t = 0; t < items[i].tiles; ++t) {
      float* state = base + (i * GROUP_TILES + t) * states * size;
      for (int s = 0; s < states; ++s) clear({state + s * size, width});
      begin_tile(cache, items[i].seq, items[i].tile[t], {state, width});
    }
  const int64_t wave = std::max<int64_t>(1, std::min(WAVE, pieces));
  float* parts = part_memory.get<float>(count * wave * GROUP_TILES * size);
  const auto part = [=](int64_t item, int64_t piece, int t) {
    return Partial{parts + ((item * wave + piece) * GROUP_TILES + t) * size, width};
  };
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    Engine engine(a.d, a.e, cache.query_sets() * GROUP_TILES);
    typename Cache::Workspace work(cache);
    for (int64_t start = 0; start < std::max<int64_t>(pieces, 1); start += wave) {
      // Contiguous runs of pieces a thread, so that the hardware prefetches what follows.
      int64_t loaded = -1;
#pragma omp for schedule(static)
      for (int64_t task = 0; task < count * wave; ++task) {
        const Item<T>& item = items[task / wave];
        const int64_t number = start + task % wave;
        if (number >= item.pieces) continue;
        const Piece piece(item, number);
        if (loaded != task / wave) load_queries(a, cache, work, item, engine);
        loaded = task / wave;
        cache.stage(engine, work, item.seq, item.group, piece.segment, piece.chunk);
        for (int t = 0; t < item.tiles; ++t)
          if (piece.touches(item.tile[t])) compute(a, item, t, piece, engine, part(task / wave, task % wave, t));
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < count * GROUP_TILES; ++task) {
        const Item<T>& item = items[task / GROUP_TILES];
        const int t = int(task % GROUP_TILES);
        if (t >= item.tiles) continue;
        const auto state = [=](int s) { return Partial{base + (task * states + s) * size, width}; };
        for (int64_t i = 0; i < wave && start + i < item.pieces; ++i) {
          const Piece piece(item, start + i);
          if (piece.touches(item.tile[t]))
            merge(state(piece.segment.state), part(task / GROUP_TILES, i, t), item.tile[t].count);
        }
        if (start + wave < pieces) continue;
        cache.gather(work, item.group, item.tile[t].count, state(0), state(states - 1));
        finish_tile(a, cache, item.seq, item.tile[t], state(0));
      }
    }
  }
}

template <class T, class Cache, class Engine, class Items>
void run(const AttentionArgs<T>& a, const Cache& cache, const Items& items) {
  if (items.count() >= 4 * a.threads) run_by_rows<T, Cache, Engine>(a, cache, items);
  else run_by_chunks<T, Cache, Engine>(a, cache, items);
}

// With the engine that serves this machine and this width.
template <class T, class Cache, class Items>
void attend(const AttentionArgs<T>& a, const Cache& cache, const Items& items) {
#ifdef GW_AMX
  if constexpr (std::is_same_v<T, bf16>) {
    if (TileEngine::takes(a.d)) return run<T, Cache, TileEngine>(a, cache, items);
  }
#endif
#ifdef GW_PAIRS
  if constexpr (std::is_same_v<T, bf16>) return run<T, Cache, PairEngine>(a, cache, items);
#endif
  run<T, Cache, FloatEngine<T>>(a, cache, items);
}

}  // namespace gw
