// Attention of a step's tokens over packed keys and values: a chunk of the pages is decoded into a buffer that
// stays in the first levels of the processor's cache, and an engine works on that.
//
// Orthogonal maps of the codec are not undone on the pages. Queries meet the pages' keys after the keys' own map,
// which keeps inner products; what was weighed from the pages is summed apart and turned back at the end.
#include "packed_codes.h"
#include "sparse_attention.h"

namespace gw {
namespace {

// x [d] in place: what the codec did to a page's rows.
void turn(const Turn& map, int64_t group, int64_t d, float* x, float* spare) {
  if (!map.matrix) {
    for (int64_t i = 0; i < d; ++i) spare[i] = x[map.order[group * d + i]];
  } else {
    for (int64_t c = 0; c < d; c += LANES) {
      Vec sum = splat(0.0f);
      for (int64_t i = 0; i < d; ++i) sum = fma(splat(x[i]), load_up_to(map.matrix + i * d + c, d - c), sum);
      store_up_to(spare + c, sum, d - c);
    }
  }
  std::copy_n(spare, d, x);
}

// ... and back; `transposed` is the map's matrix, transposed.
void turn_back(const Turn& map, const float* transposed, int64_t group, int64_t d, float* x, float* spare) {
  if (map.matrix) return turn({transposed, nullptr}, group, d, x, spare);
  for (int64_t i = 0; i < d; ++i) spare[map.order[group * d + i]] = x[i];
  std::copy_n(spare, d, x);
}

enum Place { FIRST, PAGES, TAIL };

// Where a token that is held is.
template <class T>
Place place_of(const PackedStore<T>& store, const Sequence& seq, int64_t number) {
  if (number >= store.packed[seq.row]) return TAIL;
  return number < store.first_tokens ? FIRST : PAGES;
}

template <class T>
struct PackedCache {
  const PackedArgs<T>& a;

  // A thread's buffers.
  struct Workspace {
    PageReader<T> keys, values;
    Scratch turned_memory, row_memory, back_memory;
    T* turned;           // [TILE, d], queries
    float* row;          // two rows
    float* back;         // the values' matrices, transposed when they are first needed
    bool ready = false;
    explicit Workspace(const PackedCache& cache) : keys(cache.a.keys), values(cache.a.values) {
      const PackedStore<T>&k = cache.a.keys, &v = cache.a.values;
      turned = turned_memory.get<T>(TILE * k.d + LANES);
      row = row_memory.get<float>(2 * std::max(k.d, v.d));
      back = back_memory.get<float>(v.turns * v.d * v.d);
    }
  };

  int query_sets() const { return a.keys.turns ? 2 : 1; }
  int states() const { return a.values.turns ? 2 : 1; }

  // The places change where those of the keys or those of the values do.
  int segments(const Sequence& seq, Segment* out) const {
    int64_t cut[MAX_SEGMENTS + 1] = {0, seq.order ? seq.order->total : seq.total};
    int cuts = 2, count = 0;
    for (const PackedStore<T>* s : {&a.keys, &a.values}) {
      const int64_t packed = s->packed[seq.row];
      cut[cuts++] = packed;
      cut[cuts++] = std::min(packed, s->first_tokens);
    }
    std::sort(cut, cut + cuts);
    for (int i = 0; i + 1 < cuts; ++i) {
      if (cut[i] == cut[i + 1]) continue;
      const Place k = place_of(a.keys, seq, cut[i]), v = place_of(a.values, seq, cut[i]);
      out[count++] = {cut[i], cut[i + 1], k == PAGES && a.keys.turns, v == PAGES && a.values.turns, k, v};
      if (seq.order) count = join_places(*seq.order, out, count);
    }
    return count;
  }

  // A query as the keys' pages want it, kept in place i.
  const T* turned(Workspace& work, int64_t group, const T* query, int i) const {
    const int64_t d = a.keys.d;
    for (int64_t c = 0; c < d; ++c) work.row[c] = to_float(query[c]);
    for (int m = 0; m < a.keys.turns; ++m) turn(a.keys.turn[m], group, d, work.row, work.row + d);
    T* out = work.turned + i * d;
    for (int64_t c = 0; c < d; ++c) out[c] = from_float<T>(work.row[c]);
    return out;
  }

  template <class Engine>
  void stage(Engine& engine, Workspace& work, const Sequence& seq, int64_t group, const Segment& segment,
             int64_t chunk) const {
    if (seq.order) {
      return engine.stage(listed_rows(a.keys, work.keys, seq, group, segment, chunk),
                          listed_rows(a.values, work.values, seq, group, segment, chunk), chunk);
    }
    gw::stage(engine, seq, rows(a.keys, work.keys, segment.keys, seq, group, segment, chunk),
              rows(a.values, work.values, segment.values, seq, group, segment, chunk), chunk);
  }

  // The pages' share of a tile's rows is turned back and joins the rest.
  void gather(Workspace& work, int64_t group, int count, const Partial& plain, const Partial& pages) const {
    const PackedStore<T>& v = a.values;
    if (!v.turns) return;
    if (!work.ready) transpose(work);
    for (int i = 0; i < count; ++i) {
      if (pages.max()[i] == NEG_INF) continue;
      for (int m = v.turns - 1; m >= 0; --m)
        turn_back(v.turn[m], work.back + m * v.d * v.d, group, v.d, pages.weighted(i), work.row);
    }
    merge(plain, pages, count);
  }

 private:
  // The last of `count` segments from numbers to places in an order. Listed rows are gathered from wherever they are,
  // so that only another set of queries or another state makes another segment.
  static int join_places(const TokenOrder& order, Segment* out, int count) {
    Segment& last = out[count - 1];
    last.lo = order.place(last.lo), last.hi = order.place(last.hi);
    if (last.lo == last.hi) return count - 1;
    if (count < 2) return count;
    Segment& before = out[count - 2];
    if (before.queries != last.queries || before.state != last.state) return count;
    before.hi = last.hi;
    return count - 1;
  }

  // The listed tokens of a chunk, all in the reader's rows.
  Store<T> listed_rows(const PackedStore<T>& store, PageReader<T>& reader, const Sequence& seq, int64_t group,
                       const Segment& segment, int64_t chunk) const {
    const TokenOrder& order = *seq.order;
    const int64_t from = std::max({segment.lo, seq.first_held, chunk * CHUNK});
    const int64_t to = std::min(segment.hi, (chunk + 1) * CHUNK);
    const T* first = store.first + seq.row * store.f_batch + group * store.f_group;
    const T* tail = store.tail + seq.row * store.t_batch + group * store.t_group;
    const int64_t packed = store.packed[seq.row];
    for (int64_t at = from, n; at < to; at += n) {
      const int64_t number = order.number(at);
      const Place place = place_of(store, seq, number);
      n = std::min(order.together(at), to - at);
      if (place != TAIL) n = std::min(n, packed - number);
      if (place == PAGES) {
        const int64_t later = at + CHUNK < segment.hi ? order.number(at + CHUNK) : -1;
        reader.read_page(seq.row, group, number, n, at % CHUNK, later < packed ? later : -1);
        continue;
      }
      for (int64_t i = 0; i < n; ++i) {
        const T* row = place == FIRST ? first + (number + i) * store.f_slot
                                      : tail + (number + i) % store.tail_slots * store.t_slot;
        std::copy_n(row, store.d, reader.rows() + (at + i) % CHUNK * reader.stride());
      }
    }
    return {reader.rows(), reader.stride(), CHUNK, from, to};
  }

  Store<T> rows(const PackedStore<T>& store, PageReader<T>& reader, int place, const Sequence& seq, int64_t group,
                const Segment& segment, int64_t chunk) const {
    const int64_t from = std::max({segment.lo, seq.first_held, chunk * CHUNK});
    const int64_t to = std::min(segment.hi, (chunk + 1) * CHUNK);
    if (place == PAGES) return {reader.read(seq.row, group, from, to), reader.stride(), CHUNK, from, to};
    // The engines ask for what follows the chunk ahead of time: up to the segment's end.
    if (place == FIRST) {
      const T* first = store.first + seq.row * store.f_batch + group * store.f_group;
      return {first, store.f_slot, store.first_tokens, from, segment.hi};
    }
    const T* tail = store.tail + seq.row * store.t_batch + group * store.t_group;
    return {tail, store.t_slot, store.tail_slots, from, segment.hi};
  }

  void transpose(Workspace& work) const {
    const int64_t d = a.values.d;
    for (int m = 0; m < a.values.turns; ++m) {
      const float* matrix = a.values.turn[m].matrix;
      for (int64_t i = 0; matrix && i < d; ++i)
        for (int64_t j = 0; j < d; ++j) work.back[(m * d + j) * d + i] = matrix[i * d + j];
    }
    work.ready = true;
  }
};

}  // namespace

template <class T>
void packed_attention(const PackedArgs<T>& args, const PageLists* lists) {
  const PackedCache<T> cache{args};
  if (lists) {
    const ListedItems<T> items(args.step, *lists);
    if (items.any()) return attend(args.step, cache, items);
  }
  attend(args.step, cache);
}
template void packed_attention<float>(const PackedArgs<float>&, const PageLists*);
template void packed_attention<bf16>(const PackedArgs<bf16>&, const PageLists*);

}  // namespace gw
