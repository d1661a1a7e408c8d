// bfloat16 linear layers on AMX tiles.
//
// A weight block of 16 rows is the left operand, straight from its row-major memory; the input is the right
// operand, one column a row of x. A column's arithmetic does not know of the other columns, so an output row
// has the same bits whatever the number of rows, and up to 16 rows cost what one costs.
#include "amx.h"
#include "kernels.h"

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gw {

#ifdef GW_AMX
bool amx_available() {
  static const bool granted = [] {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  }();
  return granted;
}

namespace {

constexpr int64_t UNIT = 32;  // weight rows of one task: two tiles, so that two accumulations overlap

struct Packed {
  const char* data;     // per column block: per depth block: depth / 2 rows of column pairs
  int64_t row_bytes;    // of one tile row: 4 (one column, x itself) or 64
  int64_t depth;        // elements of k in one tile
  int64_t depth_blocks;
  int64_t columns;      // blocks of 16 columns
  const char* tile(int64_t column, int64_t block) const {
    return data + (column * depth_blocks + block) * (depth / 2) * row_bytes;
  }
};

Packed packed_shape(const bf16* x, int64_t m, int64_t k) {
  Packed packed{};
  packed.depth = tile_depth(k);
  packed.depth_blocks = k / packed.depth;
  packed.columns = (m + 15) / 16;
  packed.row_bytes = m == 1 ? 4 : 64;
  packed.data = reinterpret_cast<const char*>(x);
  return packed;
}

// Pairs of k become 32-bit words; the words of 16 rows are transposed into tile rows.
void pack_tile(const bf16* x, int64_t m, int64_t k, const Packed& packed, int64_t index, char* to) {
  const int64_t words = packed.depth / 2, column = index / packed.depth_blocks, block = index % packed.depth_blocks;
  alignas(64) uint32_t staged[16][16], turned[16 * 16];
  const void* rows[16] = {};
  for (int64_t r = 0; r < 16 && column * 16 + r < m; ++r) {
    rows[r] = x + (column * 16 + r) * k + block * packed.depth;
    if (words == 16) continue;
    std::memset(staged[r], 0, 64);
    std::memcpy(staged[r], rows[r], size_t(words) * 4);
    rows[r] = staged[r];
  }
  char* out = to + index * words * 64;
  if (words == 16) {
    transpose16(rows, reinterpret_cast<uint32_t*>(out), 16);
  } else {
    transpose16(rows, turned, 16);
    std::memcpy(out, turned, size_t(words) * 64);
  }
}

inline void prefetch_rows(const char* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(at + i, _MM_HINT_T1);
}

// Sums of 32 weight rows with one or two blocks of columns: tiles 0..3, two weight tiles, two input tiles.
template <bool TWO>
void multiply(const bf16* w, int64_t stride, const Packed& x, int64_t column, float* sums, const char* ahead,
              int64_t ahead_bytes) {
  const int64_t w_bytes = stride * 2, block_bytes = x.depth * 2;
  const char* low = reinterpret_cast<const char*>(w);
  const char* high = low + 16 * w_bytes;
  _tile_zero(0);
  _tile_zero(2);
  if (TWO) {
    _tile_zero(1);
    _tile_zero(3);
  }
  const int64_t ahead_step = ahead ? (ahead_bytes / x.depth_blocks + 63) / 64 * 64 : 0;
  for (int64_t block = 0; block < x.depth_blocks; ++block) {
    _tile_loadd(6, x.tile(column, block), x.row_bytes);
    _tile_loadd(4, low + block * block_bytes, w_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, high + block * block_bytes, w_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if (TWO) {
      _tile_loadd(7, x.tile(column + 1, block), x.row_bytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    if (ahead) prefetch_rows(ahead + block * ahead_step, ahead_step);
  }
  _tile_stored(0, sums, x.row_bytes);
  _tile_stored(2, sums + 4 * x.row_bytes, x.row_bytes);
  if (TWO) {
    _tile_stored(1, sums + 512, x.row_bytes);
    _tile_stored(3, sums + 768, x.row_bytes);
  }
  tile_fence();
}

// sums [32 weight rows][16 columns] (or [32] for one column) to the output rows, from weight row `first` of 32.
void write(const LinearWeight<bf16>& lw, int64_t row, int64_t first, int64_t column, int64_t m, const float* sums) {
  Vec bias[2];
  for (int half = 0; half < 2; ++half) bias[half] = lw.bias ? load(lw.bias + row + 16 * half) : splat(0.0f);
  alignas(64) float turned[2][16 * 16];
  if (m > 1) {
    for (int half = 0; half < 2; ++half) {
      const void* rows[16];
      for (int i = 0; i < 16; ++i) rows[i] = sums + half * 256 + i * 16;
      transpose16(rows, reinterpret_cast<uint32_t*>(turned[half]), 16);
    }
  }
  for (int64_t i = 0; i < 16 && column * 16 + i < m; ++i) {
    bf16* out = lw.out + (column * 16 + i) * lw.n + row;
    bf16 rounded[32];
    for (int half = 0; half < 2; ++half) {
      Vec sum = m > 1 ? load(turned[half] + i * 16) : load(sums + half * 16);
      store(rounded + 16 * half, add(sum, bias[half]));
    }
    std::memcpy(out + first, rounded + first, size_t(32 - first) * 2);
  }
}

void unit_rows(const LinearWeight<bf16>& lw, int64_t unit, const Packed& x, int64_t m, int64_t k) {
  // The last unit may overlap the one before: a row has the same bits at any place in a tile.
  int64_t row = unit * UNIT, first = 0;
  if (row + UNIT > lw.n) {
    first = row + UNIT - lw.n;
    row = lw.n - UNIT;
  }
  alignas(64) float sums[1024];
  const bf16* w = lw.weight + row * lw.row_stride;
  bool more = row + 2 * UNIT <= lw.n && lw.row_stride == k;
  const char* ahead = more ? reinterpret_cast<const char*>(w + UNIT * k) : nullptr;
  for (int64_t column = 0; column < x.columns; column += 2) {
    if (column + 1 < x.columns) multiply<true>(w, lw.row_stride, x, column, sums, ahead, UNIT * k * 2);
    else multiply<false>(w, lw.row_stride, x, column, sums, ahead, UNIT * k * 2);
    write(lw, row, first, column, m, sums);
    if (column + 1 < x.columns) write(lw, row, first, column + 1, m, sums + 512);
    ahead = nullptr;
  }
}

}  // namespace

bool linear_rows_amx(const bf16* x, int64_t m, int64_t k, const LinearWeight<bf16>* weights, int64_t count,
                     int threads) {
  if (!amx_available() || tile_depth(k) < 8) return false;
  int64_t units = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (weights[i].n < UNIT) return false;
    units += (weights[i].n + UNIT - 1) / UNIT;
  }
  static thread_local Scratch scratch;
  Packed packed = packed_shape(x, m, k);
  if (units * UNIT * k * packed.columns < 32768) threads = 1;
  char* to = m == 1 ? nullptr : scratch.get<char>(packed.columns * k * 32);
  const int64_t tiles = m == 1 ? 0 : packed.columns * packed.depth_blocks;
  if (to) packed.data = to;
  const bool pack_first = tiles <= 256;  // cheaper than a barrier
  for (int64_t i = 0; pack_first && i < tiles; ++i) pack_tile(x, m, k, packed, i, to);
  TileConfig config;
  for (int tile = 0; tile < 4; ++tile) config.set(tile, 16, int(packed.row_bytes));
  for (int tile = 4; tile < 6; ++tile) config.set(tile, 16, int(packed.depth * 2));
  for (int tile = 6; tile < 8; ++tile) config.set(tile, int(packed.depth / 2), int(packed.row_bytes));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (!pack_first) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < tiles; ++i) pack_tile(x, m, k, packed, i, to);
    }
    TileScope scope(config);
#pragma omp for schedule(static) nowait
    for (int64_t unit = 0; unit < units; ++unit) {
      int64_t i = 0, local = unit;
      for (; local >= (weights[i].n + UNIT - 1) / UNIT; ++i) local -= (weights[i].n + UNIT - 1) / UNIT;
      unit_rows(weights[i], local, packed, m, k);
    }
  }
  return true;
}
#else
bool amx_available() { return false; }
bool linear_rows_amx(const bf16*, int64_t, int64_t, const LinearWeight<bf16>*, int64_t, int) { return false; }
#endif

}  // namespace gw
