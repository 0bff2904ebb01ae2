#include "amx.h"

#include <cstdlib>

#include "vector.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BW__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
constexpr long TILE = 256;            // floats; two side by side are a part
constexpr long AHEAD = 4 * AMX_STEP;  // numbers of a row of the weight that are asked for before they are split

struct alignas(64) Shapes {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

// Not a local variable: the compiler does not know that its intrinsic reads all of it.
const Shapes SHAPES = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

bool ask() {
  const char* text = getenv("MINDSIGMA_AMX");
  if (text && text[0] == '0' && !text[1]) return false;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}

// The three parts of numbers, each in the upper half of its lanes.
struct Parts3 {
  __m512i high, middle, low;
  explicit Parts3(__m512 x) {
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xFFFF0000));
    high = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), upper);
    const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(high));
    middle = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(rest), half), upper);
    low = _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(middle)));
  }
};

__m512i to_lower_halves(__m512i x) { return _mm512_srli_epi32(x, 16); }

__m512i upper_halves() {
  alignas(64) int16_t places[32];
  for (int i = 0; i < 32; i++) places[i] = 2 * i + 1;
  return _mm512_load_si512(places);
}

template <bool WHOLE>
inline __m512 values(const float* x, long count) {
  if (WHOLE || count >= 16) return _mm512_loadu_ps(x);
  return count <= 0 ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps((1u << count) - 1, x);
}

// AMX_STEP numbers, of which `count` are there, to a row of a tile for each part.
template <bool WHOLE>
inline void split_row(const float* x, long count, __m512i places, __m512i (&to)[3]) {
  const Parts3 a(values<WHOLE>(x, count)), b(values<WHOLE>(x + 16, count - 16));
  to[0] = _mm512_permutex2var_epi16(a.high, places, b.high);
  to[1] = _mm512_permutex2var_epi16(a.middle, places, b.middle);
  to[2] = _mm512_permutex2var_epi16(a.low, places, b.low);
}

// A step of the left factor.
template <bool WHOLE>
void left_step(const float* x, long stride, long rows, long count, float* to) {
  const __m512i places = upper_halves();
  for (long row = 0; row < AMX_SIDE; row++) {
    __m512i parts[3] = {};
    if (WHOLE || row < rows) split_row<WHOLE>(x + row * stride, count, places, parts);
    for (int i = 0; i < 3; i++) _mm512_store_si512(to + 2 * i * TILE + row * 16, parts[i]);
  }
}

// A step of 16 columns of the right factor, from rows.
template <bool WHOLE>
void right_step(const float* w, long stride, long columns, long count, float* to) {
  const __m512i places = upper_halves();
  V squares[3][VL];
#pragma GCC unroll 16
  for (long i = 0; i < 16; i++) {
    __m512i parts[3] = {};
    if (WHOLE) {
      _mm_prefetch(w + i * stride + AHEAD, _MM_HINT_T0);
      _mm_prefetch(w + i * stride + AHEAD + 16, _MM_HINT_T0);
    }
    if (WHOLE || i < columns) split_row<WHOLE>(w + i * stride, count, places, parts);
    for (int part = 0; part < 3; part++) squares[part][i] = V(parts[part]);
  }
  for (int part = 0; part < 3; part++) {
    transpose(squares[part]);
#pragma GCC unroll 16
    for (long i = 0; i < 16; i++) store(to + 2 * part * TILE + i * 16, squares[part][i]);
  }
}

// A step of 16 columns of the right factor, from columns.
template <bool WHOLE>
void right_step_turned(const float* w, long stride, long columns, long count, float* to) {
  for (long pair = 0; pair < AMX_STEP / 2; pair++, w += 2 * stride, to += 16) {
    const Parts3 a(values<WHOLE>(w, WHOLE || 2 * pair < count ? columns : 0));
    const Parts3 b(values<WHOLE>(w + stride, WHOLE || 2 * pair + 1 < count ? columns : 0));
    _mm512_store_si512(to, _mm512_or_si512(b.high, to_lower_halves(a.high)));
    _mm512_store_si512(to + 2 * TILE, _mm512_or_si512(b.middle, to_lower_halves(a.middle)));
    _mm512_store_si512(to + 4 * TILE, _mm512_or_si512(b.low, to_lower_halves(a.low)));
  }
}

}  // namespace

bool has_amx() {
  static const bool allowed = ask();
  return allowed;
}

void split_left(const float* x, long stride, long rows, long depth, float* to) {
  for (long k = 0; k < depth; k += AMX_STEP, to += PARTS_OF_STEP)
    if (rows >= AMX_SIDE && k + AMX_STEP <= depth)
      left_step<true>(x + k, stride, rows, AMX_STEP, to);
    else
      left_step<false>(x + k, stride, rows, depth - k, to);
}

void split_right(const float* w, long stride, long columns, long depth, bool turned, float* to) {
  for (long k = 0; k < depth; k += AMX_STEP, to += PARTS_OF_STEP)
    for (long first = 0; first < AMX_SIDE; first += 16) {
      const float* from = turned ? w + k * stride + first : w + first * stride + k;
      const bool whole = columns >= first + 16 && k + AMX_STEP <= depth;
      const auto step = turned ? (whole ? right_step_turned<true> : right_step_turned<false>)
                               : (whole ? right_step<true> : right_step<false>);
      step(from, stride, columns - first, depth - k, to + first / 16 * TILE);
    }
}

Tiles::Tiles() { _tile_loadconfig(&SHAPES); }

Tiles::~Tiles() { _tile_release(); }

// Tiles 0 ... 3 are the product, 4 and 5 of the left factor, 6 and 7 of the right one.
#define TIMES                 \
  _tile_dpbf16ps(0, 4, 6);    \
  _tile_dpbf16ps(1, 4, 7);    \
  _tile_dpbf16ps(2, 5, 6);    \
  _tile_dpbf16ps(3, 5, 7);
#define LEFT(part)                                        \
  _tile_loadd(4, left + 2 * part * TILE, 64);             \
  _tile_loadd(5, left + (2 * part + 1) * TILE, 64);
#define RIGHT(part)                                       \
  _tile_loadd(6, right + 2 * part * TILE, 64);            \
  _tile_loadd(7, right + (2 * part + 1) * TILE, 64);

void multiply_parts(const float* left, const float* right, long steps, float* product) {
  asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler that they read
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long step = 0; step < steps; step++, left += PARTS_OF_STEP, right += PARTS_OF_STEP) {
    LEFT(0) RIGHT(0) TIMES
    LEFT(1) TIMES
    LEFT(2) TIMES
    LEFT(1) RIGHT(1) TIMES
    LEFT(0) TIMES
    RIGHT(2) TIMES
  }
  _tile_stored(0, product, AMX_SIDE * 4);
  _tile_stored(1, product + 16, AMX_SIDE * 4);
  _tile_stored(2, product + 16 * AMX_SIDE, AMX_SIDE * 4);
  _tile_stored(3, product + 16 * AMX_SIDE + 16, AMX_SIDE * 4);
}

#else

bool has_amx() { return false; }
void split_left(const float*, long, long, long, float*) { abort(); }
void split_right(const float*, long, long, long, bool, float*) { abort(); }
Tiles::Tiles() {}
Tiles::~Tiles() {}
void multiply_parts(const float*, const float*, long, float*) { abort(); }

#endif
