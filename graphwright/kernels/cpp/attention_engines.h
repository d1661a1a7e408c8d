// The two matrix products of attention on one chunk of keys: a portable engine in float32 arithmetic, and for bfloat16
// one on AMX tiles and one on vectors of pairs (attention_pairs.h). An engine holds a number of tiles of query rows and
// reads a chunk once (`stage`) for all of them.
#pragma once
#include "amx.h"
#include "attention_pairs.h"

namespace gw {

template <class T>
class FloatEngine {
 public:
  static constexpr bool ASKS_AHEAD = false;  // for what follows the chunk that is staged
  FloatEngine(int64_t d, int64_t e, int tiles) : d_(d), e_(e), dp_(round_up(d, 16)), ep_(round_up(e, 16)) {
    q_ = queries_.get<float>(tiles * TILE * dp_);
    k_ = keys_.get<float>(CHUNK * dp_);
    v_ = values_.get<float>(CHUNK * ep_);
    rows_ = staged_.get<float>(16 * dp_);
  }

  void query(int slot, const T* const rows[TILE]) {
    for (int r = 0; r < TILE; ++r) copy(rows[r], q_ + (slot * TILE + r) * dp_, d_, dp_);
  }

  // A store gives rows by number of token, as `Store` does.
  template <class Keys, class Values>
  void stage(const Keys& keys, const Values& values, int64_t chunk) {
    const int64_t at = chunk * CHUNK;
    for (int block = 0; block < CHUNK / 16; ++block) {
      const T* run = keys.run(at + block * 16);
      for (int i = 0; i < 16; ++i) {
        copy(run ? run + i * keys.stride : keys.at(at + block * 16 + i), rows_ + i * dp_, d_, dp_);
      }
      for (int64_t c = 0; c < dp_; c += 16) {
        const void* rows[16];
        for (int i = 0; i < 16; ++i) rows[i] = rows_ + i * dp_ + c;
        transpose16(rows, reinterpret_cast<uint32_t*>(k_ + (block * dp_ + c) * 16), 16);
      }
    }
    for (int block = 0; block < CHUNK; block += 16) {
      const T* run = values.run(at + block);
      for (int i = 0; i < 16; ++i) {
        copy(run ? run + i * values.stride : values.at(at + block + i), v_ + (block + i) * ep_, e_, ep_);
      }
    }
  }

  // scores[row][key] for the tile's rows: one accumulator a (row, 16 keys), fed in order of d.
  void scores(int slot, int rows, float* out) const {
    for (int r = 0; r < rows; r += 4)
      for (int block = 0; block < CHUNK / 16; block += 2) {
        const float* q = q_ + (slot * TILE + r) * dp_;
        const float* k = k_ + block * dp_ * 16;
        Vec acc[4][2];
        for (auto& pair : acc) pair[0] = pair[1] = splat(0.0f);
        for (int64_t c = 0; c < d_; ++c) {
          Vec k0 = load(k + c * 16), k1 = load(k + (dp_ + c) * 16);
          for (int i = 0; i < 4; ++i) {
            Vec x = splat(q[i * dp_ + c]);
            acc[i][0] = fma(x, k0, acc[i][0]);
            acc[i][1] = fma(x, k1, acc[i][1]);
          }
        }
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 2; ++j) store(out + (r + i) * CHUNK + (block + j) * 16, acc[i][j]);
      }
  }

  // weighted[row][e] = sum over the chunk's keys, in their order, of weights[row][key] * value[key][e].
  void weigh(int rows, const float* weights, float* weighted) const {
    for (int r = 0; r < rows; r += 4)
      for (int64_t e = 0; e < ep_; e += 32) {
        const bool two = e + 16 < ep_;
        Vec acc[4][2];
        for (auto& pair : acc) pair[0] = pair[1] = splat(0.0f);
        for (int key = 0; key < CHUNK; ++key) {
          Vec v0 = load(v_ + key * ep_ + e), v1 = two ? load(v_ + key * ep_ + e + 16) : v0;
          for (int i = 0; i < 4; ++i) {
            Vec p = splat(weights[(r + i) * CHUNK + key]);
            acc[i][0] = fma(p, v0, acc[i][0]);
            acc[i][1] = fma(p, v1, acc[i][1]);
          }
        }
        for (int i = 0; i < 4; ++i) {
          store(weighted + (r + i) * ep_ + e, acc[i][0]);
          if (two) store(weighted + (r + i) * ep_ + e + 16, acc[i][1]);
        }
      }
  }

 private:
  static void copy(const T* from, float* to, int64_t n, int64_t padded) {
    if (!from) {
      std::fill_n(to, padded, 0.0f);
      return;
    }
    for (int64_t i = 0; i < padded; i += 16) store(to + i, load_up_to(from + i, n - i));
  }

  int64_t d_, e_, dp_, ep_;
  Scratch queries_, keys_, values_, staged_;
  float *q_, *k_, *v_, *rows_;
};

#ifdef GW_AMX
// Scores: 16 keys (left operand, from their own memory) x 16 rows. Values: 16 rows x 32 keys (weights rounded to
// bfloat16) x pairs of keys, which are interleaved once a chunk. Products are accumulated in float32.
class TileEngine {
 public:
  static constexpr bool ASKS_AHEAD = true;
  TileEngine(int64_t d, int64_t e, int tiles)
      : d_(d), ep_(round_up(e, 16)), e_(e), depth_(tile_depth(d)), scope_(config(depth_)) {
    q_ = queries_.get<uint32_t>(tiles * (d / 2) * 16 + 256);
    v_ = values_.get<bf16>(CHUNK * ep_);
    staged_k_ = staged_.get<bf16>(CHUNK * d);
  }
  static bool takes(int64_t d) { return amx_available() && tile_depth(d) >= 8; }

  void query(int slot, const bf16* const rows[TILE]) {
    const int64_t words = depth_ / 2;
    alignas(64) uint32_t staged[TILE][16];
    for (int64_t block = 0; block < d_ / depth_; ++block) {
      const void* at[TILE];
      for (int r = 0; r < TILE; ++r) {
        at[r] = rows[r] ? rows[r] + block * depth_ : nullptr;
        if (!rows[r] || words == 16) continue;
        std::memset(staged[r], 0, 64);
        std::memcpy(staged[r], at[r], size_t(words) * 4);
        at[r] = staged[r];
      }
      alignas(64) uint32_t turned[256];
      transpose16(at, turned, 16);
      std::memcpy(q_ + (slot * (d_ / 2) + block * words) * 16, turned, size_t(words) * 64);
    }
  }

  template <class Keys, class Values>
  void stage(const Keys& keys, const Values& values, int64_t chunk) {
    const int64_t at = chunk * CHUNK;
    for (int block = 0; block < CHUNK / 16; ++block) {
      k_[block] = keys.run(at + block * 16);
      k_stride_[block] = keys.stride * 2;
      if (k_[block]) continue;
      bf16* to = staged_k_ + block * 16 * d_;
      for (int i = 0; i < 16; ++i) {
        const bf16* from = keys.at(at + block * 16 + i);
        if (from) std::memcpy(to + i * d_, from, size_t(d_) * 2);
        else std::memset(to + i * d_, 0, size_t(d_) * 2);
      }
      k_[block] = to;
      k_stride_[block] = d_ * 2;
    }
    for (int block = 0; block < CHUNK / 16; ++block) {
      const int64_t first = at + block * 16;
      const bf16* run = values.run(first);
      ahead(keys.run(first + CHUNK), keys.stride, d_);
      ahead(values.run(first + CHUNK), values.stride, e_);
      for (int i = 0; i < 16; i += 2) {
        const bf16* even = run ? run + i * values.stride : values.at(first + i);
        const bf16* odd = run ? even + values.stride : values.at(first + i + 1);
        const int pair = block * 8 + i / 2;  // 16 pairs and 16 columns are a tile
        interleave(even, odd, e_, v_ + (pair / 16 * (ep_ / 16)) * 512 + pair % 16 * 32, 512);
      }
    }
    tile_fence();
  }

  void scores(int slot, int count, float* out) const {
    alignas(64) float sums[4][256];
    const uint32_t* q = q_ + slot * (d_ / 2) * 16;
    tile_fence();
    for (int block = 0; block < CHUNK / 16; block += 4) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t c = 0; c < d_; c += depth_) {
        _tile_loadd(7, q + c / 2 * 16, 64);
        _tile_loadd(6, k_[block] + c, k_stride_[block]);
        _tile_dpbf16ps(0, 6, 7);
        _tile_loadd(6, k_[block + 1] + c, k_stride_[block + 1]);
        _tile_dpbf16ps(1, 6, 7);
        _tile_loadd(6, k_[block + 2] + c, k_stride_[block + 2]);
        _tile_dpbf16ps(2, 6, 7);
        _tile_loadd(6, k_[block + 3] + c, k_stride_[block + 3]);
        _tile_dpbf16ps(3, 6, 7);
      }
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
      tile_fence();
      for (int i = 0; i < 4; ++i) {
        if (count <= 4) {
          turn_few(sums[i], count, out + (block + i) * 16);
          continue;
        }
        const void* rows[16];
        for (int key = 0; key < 16; ++key) rows[key] = sums[i] + key * 16;
        transpose16(rows, reinterpret_cast<uint32_t*>(out + (block + i) * 16), CHUNK);
      }
    }
  }

  void weigh(int rows, const float* weights, float* weighted) const {
    // Rows beyond the tile's are whatever memory holds: a row of a tile product depends on its own row only.
    alignas(64) bf16 p[TILE * CHUNK];
    for (int i = 0; i < rows * CHUNK; i += 32) {
      const __m512bh two = _mm512_cvtne2ps_pbh(load(weights + i + 16), load(weights + i));
      _mm512_store_si512(p + i, (__m512i)two);
    }
    tile_fence();
    for (int64_t e = 0; e < ep_; e += 64) {
      const int64_t tiles = std::min<int64_t>(4, (ep_ - e) / 16);
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int block = 0; block < CHUNK / 32; ++block) {
        const bf16* v = v_ + (block * (ep_ / 16) + e / 16) * 512;
        _tile_loadd(4, p + block * 32, CHUNK * 2);
        _tile_loadd(5, v, 64);
        _tile_dpbf16ps(0, 4, 5);
        if (tiles < 2) continue;
        _tile_loadd(5, v + 512, 64);
        _tile_dpbf16ps(1, 4, 5);
        if (tiles < 3) continue;
        _tile_loadd(5, v + 1024, 64);
        _tile_dpbf16ps(2, 4, 5);
        if (tiles < 4) continue;
        _tile_loadd(5, v + 1536, 64);
        _tile_dpbf16ps(3, 4, 5);
      }
      _tile_stored(0, weighted + e, ep_ * 4);
      if (tiles > 1) _tile_stored(1, weighted + e + 16, ep_ * 4);
      if (tiles > 2) _tile_stored(2, weighted + e + 32, ep_ * 4);
      if (tiles > 3) _tile_stored(3, weighted + e + 48, ep_ * 4);
    }
    tile_fence();
  }

 private:
  static TileConfig config(int64_t depth) {
    TileConfig c;
    for (int tile = 0; tile < 6; ++tile) c.set(tile, 16, 64);
    c.set(6, 16, int(depth * 2));
    c.set(7, int(depth / 2), 64);
    return c;
  }

  // Asks for 16 rows of the next chunk while this one is worked on.
  static void ahead(const bf16* run, int64_t stride, int64_t width) {
    if (!run) return;
    for (int i = 0; i < 16; ++i)
      for (int64_t e = 0; e < width; e += 32) _mm_prefetch(reinterpret_cast<const char*>(run + i * stride + e), _MM_HINT_T1);
  }

  // Scores [16 keys][16 rows] of up to four rows to [row][16 keys], a quarter of a full transpose.
  static void turn_few(const float* sums, int rows, float* out) {
    __m512 quad[4];
    for (int i = 0; i < 4; ++i) {
      // Keys i, 4 + i, 8 + i, 12 + i in the four lanes: the unpacks below then leave the keys in order.
      __m512 x = _mm512_castps128_ps512(_mm_load_ps(sums + i * 16));
      x = _mm512_insertf32x4(x, _mm_load_ps(sums + (4 + i) * 16), 1);
      x = _mm512_insertf32x4(x, _mm_load_ps(sums + (8 + i) * 16), 2);
      quad[i] = _mm512_insertf32x4(x, _mm_load_ps(sums + (12 + i) * 16), 3);
    }
    const __m512 a = _mm512_unpacklo_ps(quad[0], quad[1]), b = _mm512_unpacklo_ps(quad[2], quad[3]);
    const __m512 c = _mm512_unpackhi_ps(quad[0], quad[1]), d = _mm512_unpackhi_ps(quad[2], quad[3]);
    _mm512_storeu_ps(out, _mm512_shuffle_ps(a, b, 0x44));
    if (rows > 1) _mm512_storeu_ps(out + CHUNK, _mm512_shuffle_ps(a, b, 0xee));
    if (rows > 2) _mm512_storeu_ps(out + 2 * CHUNK, _mm512_shuffle_ps(c, d, 0x44));
    if (rows > 3) _mm512_storeu_ps(out + 3 * CHUNK, _mm512_shuffle_ps(c, d, 0xee));
  }

  int64_t d_, ep_, e_, depth_;
  TileScope scope_;
  Scratch queries_, values_, staged_;
  uint32_t* q_;
  bf16 *v_, *staged_k_;
  const bf16* k_[CHUNK / 16];
  int64_t k_stride_[CHUNK / 16];
};
#endif

}  // namespace gw
