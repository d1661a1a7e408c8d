// AMX tiles (Intel Sapphire Rapids and later): permission, configuration, compiler barrier.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && \
    defined(__AVX512VL__)
#include <immintrin.h>
#define GW_AMX 1
#endif

namespace gw {

// True when the operating system lets this process use the tile registers. Asked once.
bool amx_available();

#ifdef GW_AMX
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
  void set(int tile, int tile_rows, int tile_bytes) {
    rows[tile] = uint8_t(tile_rows);
    bytes_per_row[tile] = uint16_t(tile_bytes);
  }
};

// The compiler's tile intrinsics do not tell it that they touch memory.
inline void tile_fence() { asm volatile("" ::: "memory"); }

// Configures the thread's tiles and puts the former configuration back: oneDNN, which torch uses, has its own.
class TileScope {
 public:
  explicit TileScope(const TileConfig& config) {
    _tile_storeconfig(&saved_);
    tile_fence();
    _tile_loadconfig(&config);
    tile_fence();
  }
  ~TileScope() {
    tile_fence();
    _tile_loadconfig(&saved_);
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  TileConfig saved_;
};
#endif

// The widest even block, of at most 32, that divides k: the depth of one tile multiplication. 0 for odd k.
inline int64_t tile_depth(int64_t k) {
  for (int64_t d = 32; d >= 2; d -= 2)
    if (k % d == 0) return d;
  return 0;
}

}  // namespace gw
